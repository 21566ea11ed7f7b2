"""What an experiment is, and how one is run, recorded and turned into a claim."""
