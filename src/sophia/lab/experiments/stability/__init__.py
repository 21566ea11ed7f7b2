"""Learning rates that deep models stand, with and without the scaling of the attention."""

from sophia.lab.experiments.stability.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
