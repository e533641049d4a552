"""Commands beside training and evaluation: `python -m tools.NAME`."""
