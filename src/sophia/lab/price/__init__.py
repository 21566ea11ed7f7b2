"""Hours and dollars of a pre-training run: `inputs` with their sources, and the `bill` from them."""
