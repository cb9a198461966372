"""GGUF's blocks: encoding, decoding, and the tensor that holds them."""
