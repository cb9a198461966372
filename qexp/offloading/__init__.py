"""Offloading: where weights rest, in which groups they travel to the compute device, and how."""
