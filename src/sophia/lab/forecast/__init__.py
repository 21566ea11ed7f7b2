"""How long runs will take, and how much memory and disk, before they begin."""
