"""A second step over saved outputs: compare with the reference, write metrics and pictures."""
