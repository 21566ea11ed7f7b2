"""A whole comparison, decided before its first run. The packaged ones are in ``presets`` and ``recipes``."""
