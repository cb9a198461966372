"""Parts of the torchao backend."""
