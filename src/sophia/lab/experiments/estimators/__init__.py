"""The estimators of the curvature against exact diagonals."""

from sophia.lab.experiments.estimators.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
