"""The command line: Hydra's run, flags, help and the wording of composition errors."""
