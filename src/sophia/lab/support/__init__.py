"""Errors, files, signals and units: nothing here knows of training."""
