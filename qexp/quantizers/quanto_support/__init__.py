"""Parts of the quanto backend."""
