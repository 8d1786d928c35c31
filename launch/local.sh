#!/usr/bin/env bash
# Set up everything and run the main job on this machine: two Megatron-Core trainers (PP2) refit one vLLM engine (TP2).
# Arguments go to `python -m refit.run`, for example:  bash launch/local.sh --config-name dp2_to_2x_tp1 grpo.steps=10
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$refit_root"
if [ "$#" -eq 0 ]; then
  set -- +policy.nccl_xfer_refit=true
fi
exec python -m refit.run "$@"
