"""Analysis of records: intervals, speed-ups, verdicts. Records are its only input; nothing is trained."""
