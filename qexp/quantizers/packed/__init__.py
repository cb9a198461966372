"""Packed formats of our own: codes, bits, scales, and the tensor that holds them."""
