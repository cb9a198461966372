"""Pure functions from tensors to a metric, and the networks that perceptual metrics need."""
