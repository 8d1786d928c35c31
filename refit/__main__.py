"""`python -m refit COMMAND ...`; see `python -m refit --help`."""

import sys

from refit.cli import main

sys.exit(main())
