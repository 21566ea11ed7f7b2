"""Steps against the condition number."""

from sophia.lab.experiments.condition_number.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
