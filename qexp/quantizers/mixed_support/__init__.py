"""Parts of the mixed backend."""
