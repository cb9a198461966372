"""The Python API: `qexp.load`, `save`, `offload`, `load_pipeline` and the others, as functions."""
