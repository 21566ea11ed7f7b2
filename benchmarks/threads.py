"""Counting the processor time of several threads."""

import os
import sys


def waiting_costs_nothing(threads: int) -> None:
    """Start the program again with OpenMP threads that sleep while they wait for one another.

    As a rule they spin, and on a machine with other work the processor time of torch's own loops is then
    mostly that of waiting: AdamW took four times as much. OpenMP reads the setting as it loads.
    """
    if threads > 1 and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.argv])
