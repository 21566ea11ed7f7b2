"""One run, and several at a time."""
