"""How long generation stands still for a refit: seconds of a refit, of its commit, and without a token; one JSON line.

    python -m benchmarks.commit_pause                # the default job, 20 refits
    python -m benchmarks.commit_pause generation.tensor_parallel=1

Engines stage beside what serves, so that only the commit stops them. Medians are over the refits after the first.
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

from refit.run import load_config
from refit.service.job import running_job
from refit.service.progress import JobProgress
from refit.train_side.tiny_models import make_tiny_model

PHASES = ("stage", "verify", "commit", "halt")


def main(argv: Sequence[str] | None = None) -> int:
    """Refit one job again and again; prints one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--refits", type=int, default=20)
    parser.add_argument("overrides", nargs="*", help="key=value of the job's configuration")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, JobProgress.open(sys.stderr) as progress:
        config = load_config(
            "default", ["++policy.nccl_xfer_refit=true", f"run_dir={folder}", *arguments.overrides]
        )
        model_dir = make_tiny_model(config.policy.model, Path(folder) / "model", seed=0, dtype="bfloat16")
        with running_job(config, model_dir, Path(folder), progress) as (_, coordinator):
            records = [coordinator.refit(version) for version in range(1, arguments.refits + 2)][1:]
            digest = coordinator.plan.digest
    assert all(record.committed for record in records), "a refit of a benchmark was discarded"
    line = {
        "benchmark": "commit_pause",
        "hardware": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "plan": digest,
        "refits": len(records),
        "total_s_p50": statistics.median(record.total_s for record in records),
        **{f"{phase}_s_p50": statistics.median(r.seconds[phase] for r in records) for phase in PHASES},
        "commit_share": statistics.median(record.seconds["commit"] / record.total_s for record in records),
        "halt_share": statistics.median(record.seconds["halt"] / record.total_s for record in records),
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
