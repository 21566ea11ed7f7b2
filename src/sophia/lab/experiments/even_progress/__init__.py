"""How the decrease of the loss is spread over sharp and flat dimensions."""

from sophia.lab.experiments.even_progress.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
