"""What a comparison takes on one processor, and what it can tell."""

from sophia.lab.experiments.few_resources.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
