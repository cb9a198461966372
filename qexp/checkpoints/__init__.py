"""Files of weights: what is in a checkpoint, where each tensor's bytes are, how they are read and written. No model."""
