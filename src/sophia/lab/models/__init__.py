"""Models from their configuration, and their size."""
