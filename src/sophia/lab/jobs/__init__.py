"""Work of each subcommand; its options are in ``commands``."""
