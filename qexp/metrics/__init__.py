"""Pure numbers: tensors in, a metric out, one file for each."""
