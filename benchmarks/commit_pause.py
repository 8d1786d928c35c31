"""How long generation stands still for a refit: seconds of a refit, of its commit, and without a token; one JSON line.

    python -m benchmarks.commit_pause                # the default job, 20 refits
    python -m benchmarks.commit_pause --size 94mb    # the same job with a model of 94 MB
    python -m benchmarks.commit_pause generation.tensor_parallel=1

Engines stage beside what serves, so that only the commit stops them. Medians are over the refits after the first.
`rpc_s_p50` is a call of all workers that does nothing: no commit can halt an engine for less.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ray

from refit.run import load_config
from refit.service.coordinator import Coordinator
from refit.service.job import running_job
from refit.service.progress import JobProgress
from refit.train_side.tiny_models import make_tiny_model

PHASES = ("stage", "verify", "commit", "halt", "finalize")
RPC_CALLS = 50
SIZES = {
    "demo": {},
    "94mb": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}
"""Fields of the model's HF config, by name of the size in bf16."""


def main(argv: Sequence[str] | None = None) -> int:
    """Refit one job again and again; prints one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--refits", type=int, default=20)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("overrides", nargs="*", help="key=value of the job's configuration")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, JobProgress.open(sys.stderr) as progress:
        config = load_config(
            "default", ["++policy.nccl_xfer_refit=true", f"run_dir={folder}", *arguments.overrides]
        )
        model_dir = make_tiny_model(
            config.policy.model, Path(folder) / "model", overrides=SIZES[arguments.size]
        )
        with running_job(config, model_dir, Path(folder), progress) as (_, coordinator):
            records = [coordinator.refit(version) for version in range(1, arguments.refits + 2)][1:]
            digest, rpc_s = coordinator.plan.digest, _rpc_s(coordinator)
    assert all(record.committed for record in records), "a refit of a benchmark was discarded"
    line = {
        "benchmark": "commit_pause",
        "hardware": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "plan": digest,
        "model_bytes": records[0].bulk_bytes + records[0].misc_bytes,
        "refits": len(records),
        "rpc_s_p50": rpc_s,
        "total_s_p50": statistics.median(record.total_s for record in records),
        **{f"{phase}_s_p50": statistics.median(r.seconds[phase] for r in records) for phase in PHASES},
        "commit_share": statistics.median(record.seconds["commit"] / record.total_s for record in records),
        "halt_share": statistics.median(record.seconds["halt"] / record.total_s for record in records),
    }
    print(json.dumps(line))
    return 0


def _rpc_s(coordinator: Coordinator) -> float:
    """The median of empty calls of all workers of an engine, as it sees them."""
    engine = next(iter(coordinator.serving().values()))
    return statistics.median(ray.get(engine.call_seconds.remote(RPC_CALLS)))


if __name__ == "__main__":
    sys.exit(main())
