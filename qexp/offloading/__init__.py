"""Offloading: weights are stored in CPU memory or on disk, and copied to the compute device in groups."""
