"""All ranks of a real run come to one plan, each from the documents of all in the real control store."""

import pytest

from refit.plan import Manifest, build_plan, decode_rank_manifest, encode_rank_manifest
from refit.plan.synth.config import model_from_config
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import GenMesh, TrainMesh
from refit.plan.synth.train import train_manifest
from refit.transfer.rendezvous import ControlStore
from tests.plan.test_models import TINY_MOE
from tests.processes import run_processes

pytestmark = pytest.mark.processes

TRAIN, GEN = TrainMesh(pp=2, ep=2), GenMesh(tp=2, replicas=2)
NUM_RANKS = TRAIN.num_ranks + GEN.num_ranks
TIMEOUT_S = 30.0


def planning_rank(rank: int, port: int) -> tuple[str, str, list[tuple[int, int]], list[tuple[int, int]]]:
    """Describe, read all, plan, agree. Returns own digest, all digests, (peer, bytes) sent, (peer, bytes) received."""
    store = ControlStore.join("127.0.0.1", port, "plan", TIMEOUT_S)
    model = model_from_config("tiny", TINY_MOE)
    sides = (train_manifest(model, TRAIN).ranks, gen_manifest(model, GEN).ranks)
    store.put(f"describe/{rank}", encode_rank_manifest([*sides[0], *sides[1]][rank]))
    texts = [str(store.get(f"describe/{other}", TIMEOUT_S)) for other in range(NUM_RANKS)]
    ranks = tuple(map(decode_rank_manifest, texts))
    train, gen = ranks[: TRAIN.num_ranks], ranks[TRAIN.num_ranks :]
    plan = build_plan(Manifest("train", train), Manifest("gen", gen))
    store.put(f"digest/{rank}", plan.digest)
    digests = {str(store.get(f"digest/{other}", TIMEOUT_S)) for other in range(NUM_RANKS)}
    rounds = [one for stage in plan.rank_plan(rank).stages for one in stage.rounds]
    return (
        plan.digest,
        "|".join(sorted(digests)),
        [(bucket.peer, bucket.num_bytes) for one in rounds for bucket in one.sends],
        [(bucket.peer, bucket.num_bytes) for one in rounds for bucket in one.receives],
    )


def test_every_rank_computes_the_same_plan_and_expects_what_its_peers_send():
    host = ControlStore.host(run_id="plan")
    results = run_processes(planning_rank, NUM_RANKS, host.port)
    assert len({result[0] for result in results}) == 1
    assert {result[1] for result in results} == {results[0][0]}, "a rank read another digest in the store"
    sent = sorted((rank, *bucket) for rank, result in enumerate(results) for bucket in result[2])
    received = sorted((peer, rank, size) for rank, result in enumerate(results) for peer, size in result[3])
    assert sent == received and sent
