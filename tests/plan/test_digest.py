"""One digest everywhere: under any hash seed, in any order of input, and different where anything differs."""

import os
import subprocess
import sys
from dataclasses import replace

from refit.plan import Manifest, PlanOptions, RankManifest, build_plan
from tests.plan.worlds import random_world

CODE = """
from refit.plan import build_plan
from refit.plan.synth.config import load_model
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import parse_gen, parse_train
from refit.plan.synth.train import train_manifest
model = load_model("qwen3-4b")
train = train_manifest(model, parse_train("tp=2,pp=2,dp=3"))
plan = build_plan(train, gen_manifest(model, parse_gen("tp=4,replicas=3")))
share = repr(plan.rank_plan(5))
print(plan.digest, hash("x"), len(share), __import__("hashlib").sha256(share.encode()).hexdigest())
"""


def lines_under(seed):
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_two_processes_with_different_hash_seeds_make_the_same_plan():
    first, second = lines_under("1"), lines_under("4242")
    assert first[1] != second[1], "the seeds did not differ"
    assert first[0] == second[0] and first[2:] == second[2:]


def test_the_order_in_which_a_rank_lists_its_holdings_does_not_matter():
    train, gen, options = random_world(11)
    turned = Manifest(
        "train",
        tuple(
            RankManifest(
                "train", r.rank, r.stage, 0, r.tensors[::-1], r.params[::-1], r.holdings[::-1], r.misc
            )
            for r in train.ranks
        ),
    )
    assert turned == train
    assert build_plan(turned, gen, options).digest == build_plan(train, gen, options).digest


def test_every_input_that_matters_changes_the_digest():
    train, gen, options = random_world(12)
    digest = build_plan(train, gen, options).digest
    others = [
        build_plan(train, gen, replace(options, bucket_bytes=options.bucket_bytes * 2)),
        build_plan(train, gen, replace(options, max_ops_per_round=7)),
        build_plan(train, gen, PlanOptions(options.bucket_bytes, options.max_ops_per_round, ())),
        build_plan(moved(train), gen, options),
        build_plan(renamed(train), gen, options),
        build_plan(staged(train), gen, options),
    ]
    assert len({digest, *(plan.digest for plan in others)}) == 7


def renamed(manifest):
    """The same manifest with one param under another name."""
    first = manifest.ranks[0]
    name = first.holdings[0].param
    params = tuple(replace(one, name="other") if one.name == name else one for one in first.params)
    holdings = tuple(replace(one, param="other") if one.param == name else one for one in first.holdings)
    return Manifest("train", (replace(first, params=params, holdings=holdings), *manifest.ranks[1:]))


def staged(manifest):
    """The same manifest with all ranks one pipeline stage later."""
    return Manifest("train", tuple(replace(rank, stage=rank.stage + 1) for rank in manifest.ranks))


def moved(manifest):
    """The same manifest with one holding at another place of its param."""
    first = manifest.ranks[0]
    params = tuple(replace(param, shape=(param.num_elements + 1,)) for param in first.params)
    held = first.holdings[0]
    holdings = (replace(held, offset=held.offset + 1), *first.holdings[1:])
    return Manifest("train", (replace(first, params=params, holdings=holdings), *manifest.ranks[1:]))
