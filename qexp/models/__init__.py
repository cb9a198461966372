"""Model sources: the network on the meta device, its checkpoint files, how it generates."""
