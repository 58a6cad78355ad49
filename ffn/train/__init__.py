"""Training: configuration, optimizer, the loop and its checkpoints."""
