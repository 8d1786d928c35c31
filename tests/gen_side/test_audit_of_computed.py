"""Tensors that an engine stores a function of (Mamba's A = -exp(A_log)) are audited like those that it stores."""

import pytest

from refit.gen_side.generator import Generator, GenOptions, GenParallel
from refit.gen_side.staging import Staging
from refit.gen_side.switch import plain
from refit.service.oracle import digests_of, shares_of
from refit.train_side.tiny_models import make_tiny_model
from tests.gen_side.checkpoints import shifted, tensors_of
from tests.gen_side.rounds import Rounds

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

BUILD_S = 400.0
LAYOUTS = {
    "tp1": (GenParallel(), "bfloat16"),
    "tp1 fp32": (GenParallel(), "float32"),
    "tp2": (GenParallel(tensor=2), "bfloat16"),
}
SLOW = ("tp1 fp32", "tp2")
A, A_LOG = "model.layers.0.mixer.A", "backbone.layers.0.mixer.A_log"


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS],
)
def case(request, tmp_path_factory):
    """(engine of a Mamba hybrid, how many ranks it has, tensors of its checkpoint, tensors of a later version)."""
    parallel, dtype = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("hybrid")
    start = make_tiny_model("tiny-nemotron-h-dense", folder / "start", dtype=dtype)
    changed = shifted(start, folder / "changed", seed=1)
    generator = Generator.build(start, parallel, GenOptions(dtype=dtype), BUILD_S)
    yield generator, parallel.num_ranks, tensors_of(start), tensors_of(changed)
    generator.close()


def copied(tensors):
    """Memory for a trainer, which changes it."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def owed(rounds, tensors):
    """{rank: {tensor: digest}} by the trainers' export, as the service computes it."""
    found = digests_of(tensors.items(), shares_of(rounds.plan.gen.manifest), 0)
    return [{name: by_rank[str(rank)] for name, by_rank in found.items() if str(rank) in by_rank}
            for rank in range(rounds.num_gen)]  # fmt: skip


def wrong(audited, wanted):
    """Names of what a rank does not hold as it should, of all that either side names."""
    return sorted(name for name in audited.keys() | wanted.keys() if audited.get(name) != wanted.get(name))


def test_after_a_commit_every_tensor_has_the_digest_of_the_trainers_export(case):
    generator, num_ranks, start, changed = case
    with Rounds(generator, copied(start), num_ranks) as rounds:
        for version, tensors in ((1, changed), (2, start), (3, changed)):
            assert rounds.refit(version, tensors)
            for audit, wanted in zip(rounds.audit(), owed(rounds, tensors), strict=True):
                assert A_LOG in wanted and wrong(audit["digests"], wanted) == [] == audit["changed"]
        stale = owed(rounds, start)
        assert all(A_LOG in wrong(a["digests"], w) for a, w in zip(rounds.audit(), stale, strict=True))


def test_a_flipped_bit_of_what_is_stored_is_found_and_the_tensor_named(case):
    generator, num_ranks, start, changed = case
    rank = num_ranks - 1
    with Rounds(generator, copied(start), num_ranks) as rounds:
        assert rounds.refit(10, changed)
        wanted = owed(rounds, changed)
        assert generator.flip_element(A, 1, worker=rank) == 1
        for number, (audit, mine) in enumerate(zip(rounds.audit(), wanted, strict=True)):
            assert wrong(audit["digests"], mine) == ([A_LOG] if number == rank else [])
            assert audit["changed"] == ([A] if number == rank else [])
        assert rounds.refit(11, changed)
        for audit, mine in zip(rounds.audit(), wanted, strict=True):
            assert wrong(audit["digests"], mine) == []


def test_what_the_loader_should_not_have_stored_is_found_though_nothing_changes_it_later(case, monkeypatch):
    generator, num_ranks, start, changed = case
    if num_ranks > 1:
        pytest.skip("the fault is put into this process, where an engine of one rank has its worker")
    load = Staging.load_misc

    def load_a_little_wrong(staging, weights):
        load(staging, weights)
        plain(staging.tensors[A])[1] *= 1.5

    with Rounds(generator, copied(start), num_ranks) as rounds, monkeypatch.context() as patch:
        patch.setattr(Staging, "load_misc", load_a_little_wrong)
        assert rounds.refit(20, changed)
        (audit,), (wanted,) = rounds.audit(), owed(rounds, changed)
        assert wrong(audit["digests"], wanted) == [A_LOG] and audit["changed"] == []
