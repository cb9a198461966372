"""Parts of the bitsandbytes backend."""
