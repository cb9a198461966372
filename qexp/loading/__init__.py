"""From a checkpoint to a quantized model: the nine stages (`lifecycle.py`), plan, placement, audit, saving."""
