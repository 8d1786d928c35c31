"""Wait until all nodes have joined the Ray of the job: asks Ray, and names those that have not joined in time.

Exit code 1 at the deadline. Needs RAY_AUTH_MODE and the token in the environment.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import ray

POLL_S = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--nodes", type=Path, required=True, help="nodes.json of nodes.py")
    parser.add_argument("--timeout", type=float, required=True, metavar="S")
    arguments = parser.parse_args()
    wanted = {place["node"] for place in json.loads(arguments.nodes.read_text())}
    begun_s = time.monotonic()
    connect(arguments.address, begun_s + arguments.timeout)
    while True:
        alive = {node["Labels"].get("refit-node", ""): node for node in ray.nodes() if node["Alive"]}
        missing = sorted(wanted - set(alive))
        if not missing or time.monotonic() - begun_s > arguments.timeout:
            break
        time.sleep(POLL_S)
    for name, node in sorted(alive.items()):
        shown = {key: value for key, value in node["Resources"].items() if key in ("CPU", "GPU")}
        print(f"Ray node {name}: {node['NodeManagerAddress']}, {shown}, {node['Labels']}")
    if missing:
        print(
            f"{', '.join(missing)} did not join Ray within {arguments.timeout:.0f} s "
            f"({len(alive)} of {len(wanted)} nodes there)",
            file=sys.stderr,
        )
    return 1 if missing else 0


def connect(address: str, deadline_s: float) -> None:
    """Join Ray as a driver. The head's port answers before its node does, longer so on a busy machine: tried again.

    Raises Ray's ConnectionError at `deadline_s` of time.monotonic().
    """
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            ray.shutdown()
            if time.monotonic() > deadline_s:
                raise
            print(f"{error}; trying again", file=sys.stderr, flush=True)
            time.sleep(POLL_S)
        else:
            return


if __name__ == "__main__":
    raise SystemExit(main())
