"""Quantization backends: one file for each, found by its name (`base.py` has the hooks)."""
