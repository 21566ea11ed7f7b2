"""Contenders: the optimizers that the lab compares."""
