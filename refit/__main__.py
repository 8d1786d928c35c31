"""`python -m refit`: see `refit.cli`."""

import sys

if sys.version_info < (3, 12):  # noqa: UP036  older ones do not even parse what comes next
    sys.exit(
        f"refit needs Python 3.12, this is {sys.version.split()[0]} ({sys.executable}): source launch/setup.sh"
    )

from refit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
