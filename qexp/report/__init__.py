"""Tables, plots and reports of a sweep, from files alone (`python -m qexp.report`)."""
