"""What runs on this machine: every backend option tried on a small layer (`python -m qexp.doctor`)."""
