"""Jobs of a sweep: run keys, resume, worker processes, the reference that runs share."""
