"""Files of weights: what is in a checkpoint, where each tensor's bytes are, and how files are written. No model.

Only headers are read here; `loading/streaming` reads the weights.
"""
