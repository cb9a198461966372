"""What `scripts/gpu_check` runs: checks of loading and offloading on an accelerator, and step times beside a peer's.

    __main__.py      the command: starts the worker, collects rows, writes JSON, says what failed
    worker.py        the process that checks; where one check kills it, another goes on after that one
    checks.py        one check is one row: passed, failed, skipped or unsupported, with its message and its numbers
    accelerator.py   memory, time and facts of the device; transfers.py counts what crosses the bus
    subjects.py      the models that are loaded, placed and timed
    loading.py, offloading.py, speed.py   the three groups of checks

Everything runs on any device that PyTorch has, so that it can be tried without a GPU.
"""
