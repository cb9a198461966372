"""The machine: files, memory, devices, progress, imports of heavy libraries."""
