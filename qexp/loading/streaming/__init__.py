"""Weights from files to workers: a reader, staging buffers, quantize workers, lanes of an accelerator."""
