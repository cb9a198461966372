"""Weights & Biases runs, logged from a run folder alone."""
