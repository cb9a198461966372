"""Models of a hub: downloaded file by file, and uploaded."""
