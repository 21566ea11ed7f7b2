"""Training: one run, and several at a time."""
