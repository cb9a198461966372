"""`python -m qexp.predict`: what a model takes in each backend, before anything is downloaded or read."""
