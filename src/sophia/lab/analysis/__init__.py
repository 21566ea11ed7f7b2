"""What records establish: speed-ups, intervals, verdicts. Records are its only input: no training here."""
