"""T steps of AdamW against T/2 of Sophia at several sizes."""

from sophia.lab.experiments.half_the_steps.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
