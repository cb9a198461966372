"""Device maps: which device each part of a model goes to."""
