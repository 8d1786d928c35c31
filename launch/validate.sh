#!/usr/bin/env bash
# Set up everything and run golden-versus-real validation: real trainers refit real generator ranks, every byte is compared.
# Arguments go to `python -m refit validate`, for example:  bash launch/validate.sh --matrix l1 --json
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$refit_root"
exec python -m refit validate "$@"
