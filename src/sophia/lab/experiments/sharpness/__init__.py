"""Curvature along the step that each optimizer takes."""

from sophia.lab.experiments.sharpness.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
