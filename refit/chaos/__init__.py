"""Break real processes during real refits, at random, and see what serves: `python -m refit.chaos --help`."""
