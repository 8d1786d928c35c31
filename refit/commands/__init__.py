"""The commands of `python -m refit`, one module each."""
