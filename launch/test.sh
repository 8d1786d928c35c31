#!/usr/bin/env bash
# Set up everything and run the checks: format, lint, types, import contracts, tests. Arguments go to pytest instead of the default selection.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$refit_root"
ruff format --check .
ruff check .
mypy
lint-imports
exec python -m pytest "$@"
