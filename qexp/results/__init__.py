"""Results on disk: run folders, manifests, rows, labels, outcomes, the environment of a run."""
