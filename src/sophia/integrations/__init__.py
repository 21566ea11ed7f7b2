"""What hosts need beyond the optimizer itself; each module imports its framework, and is imported by name."""
