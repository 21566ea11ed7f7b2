"""What a step does to the tensors of a parameter group."""
