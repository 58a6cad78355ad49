"""Other libraries: swap for their modules, hf for their checkpoints. No other folder knows their names."""
