"""What is to be run, as frozen data; its hash names the run."""
