"""A plain torch trainer in one process refits a stock vLLM server.

    VLLM_SERVER_DEV_MODE=1 vllm serve DIR --weight-transfer-config '{"backend": "refit"}' --port 8000
    python examples/plain_torch_source.py --model DIR --url http://127.0.0.1:8000 --save trained

DIR is the folder of an HF checkpoint of a dense model. The script trains two steps, refits after each, and saves the
result.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM

from refit.service.http_engine import HttpEngine
from refit.service.http_refit import HttpRefit, join_source, next_version
from refit.transfer.source import ModelSource

NUM_STEPS = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--save", required=True)
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    engines = [HttpEngine(arguments.url)]
    first = next_version(engines)
    refitter = HttpRefit.open(engines, num_train=1)
    with ThreadPoolExecutor(1) as beside:
        planned = beside.submit(refitter.prepare)
        source = join_source(ModelSource.of_model(model), refitter.store, refitter.run_id)
        plan = planned.result()
        print(f"plan {plan.digest[:12]}: bulk {plan.bulk_bytes} bytes, misc {plan.misc_bytes} bytes")
        for version in range(first, first + NUM_STEPS):
            tokens = torch.randint(0, 256, (4, 16))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done = beside.submit(refitter.refit, version)
            source.send(version)
            record = done.result()
            if not record.committed:
                raise SystemExit(f"version {version} was discarded: {record.reason}")
            print(f"version {version}: {record.total_s:.3f} s, digests {record.digest_state}")
    source.close()
    refitter.close()
    model.save_pretrained(arguments.save)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
