#!/usr/bin/env bash
# Compile requirements/cpu.txt anew from requirements/cpu.in. The result names versions only, no addresses.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$refit_root"
uv pip compile --quiet requirements/cpu.in --overrides requirements/cpu.overrides --python-version 3.12 \
  --no-emit-index-url --no-emit-find-links --no-annotate --no-header -o requirements/cpu.txt
