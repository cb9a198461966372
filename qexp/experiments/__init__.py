"""One experiment: its settings resolved and checked, then run, measured and written to its folder."""
