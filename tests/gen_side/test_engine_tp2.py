"""A two-rank engine: two worker processes of vLLM's own, refitted, failed, and closed without a trace."""

import os
import threading
import time

import psutil
import pytest
import torch

from refit.gen_side.generator import Generator, GenOptions, GenParallel
from refit.service.diff import diff
from refit.service.holders import CheckpointWeights, EngineWeights
from refit.service.reader import JobEngine, Reader, VersionMoved
from refit.train_side.tiny_models import make_tiny_model
from refit.transfer.errors import RefitFailed
from tests.gen_side.checkpoints import shifted, tensors_of
from tests.gen_side.exact import fresh_hashes
from tests.gen_side.farm import run_ranks
from tests.gen_side.rounds import TIMEOUT_S, Rounds
from tests.gen_side.test_engine import BUILD_S, greedy

pytestmark = [pytest.mark.vllm, pytest.mark.processes, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp2")
    start = make_tiny_model("tiny-qwen3", folder / "start")
    return start, shifted(start, folder / "changed", seed=1)


LAYOUTS = [
    pytest.param(GenParallel(tensor=2), id="tp2"),
    pytest.param(GenParallel(pipeline=2), id="pp2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=LAYOUTS)
def engine(request, folders):
    generator = Generator.build(folders[0], request.param, GenOptions(call_timeout_s=60), BUILD_S)
    yield generator, request.param
    workers = list(generator._children)
    generator.close()
    assert workers and not any(worker.is_running() for worker in workers)
    assert not left_of(generator._segments)


def left_of(segments):
    """What is still there of an engine's shared memory, its queues in this process included."""
    return {segment for segment in segments if segment.exists()}


def test_both_ranks_hold_what_a_fresh_load_holds_after_two_refits(engine, folders):
    generator, parallel = engine
    start, changed = folders
    before = greedy(generator)
    with Rounds(generator, tensors_of(start), parallel.num_ranks) as rounds:
        assert rounds.refit(1, tensors_of(changed))
        after = greedy(generator)
        assert rounds.refit(2, tensors_of(start))
        assert greedy(generator) == before != after
        assert rounds.refit(3, tensors_of(changed))
        assert greedy(generator) == after
        audits = rounds.audit()
    fresh = run_ranks(parallel.num_ranks, fresh_hashes, parallel, "bfloat16", changed)
    assert [found["params_sha256"] for found in audits] == fresh


def test_one_flipped_element_on_one_rank_is_found_on_that_rank(engine, folders):
    generator, parallel = engine
    layer = 3 if parallel.tensor == 1 else 0  # one that rank 1 has
    with Rounds(generator, tensors_of(folders[0]), parallel.num_ranks) as rounds:
        assert rounds.refit(10, tensors_of(folders[1]))
        clean = rounds.audit()
        assert generator.flip_element(f"model.layers.{layer}.mlp.gate_up_proj.weight", 5, worker=1) == 1
        found = rounds.audit()
        assert found[0] == clean[0]
        wrong = [n for n in clean[1]["digests"] if clean[1]["digests"][n] != found[1]["digests"][n]]
        assert wrong == [f"model.layers.{layer}.mlp.gate_proj.weight"]


def test_every_tensor_is_read_back_by_name_while_the_engine_generates(engine, folders):
    generator, parallel = engine
    wanted = tensors_of(folders[1])
    with Rounds(generator, tensors_of(folders[0]), parallel.num_ranks) as rounds:
        assert rounds.refit(12, wanted)
        goal = greedy(generator)
        reader = Reader(JobEngine(rounds.control, 0, parallel.num_ranks), rounds.control, TIMEOUT_S)
        answers, seen = rounds.pool.submit(greedy, generator), []
        wrong = [name for name, tensor in wanted.items() if not torch.equal(reader.read(name).tensor, tensor)]
        assert answers.result(TIMEOUT_S) == goal
        assert wrong == []
        row = reader.read("model.embed_tokens.weight", len(wanted["model.embed_tokens.weight"]) - 1)
        assert (row.version, row.moved_bytes <= 64 << 10) == (12, True)
        assert row.ranks == ((1,) if parallel.tensor > 1 else (0,))
        with pytest.raises(VersionMoved, match="serves version 12, version 11 was asked for"):
            reader.read("model.norm.weight", version=11)
        report = diff(CheckpointWeights.open(folders[1]), EngineWeights(reader))
        assert report.equal and report.num_bytes == sum(t.nbytes for t in wanted.values())
        layer = 3 if parallel.pipeline > 1 else 0
        generator.flip_element(f"model.layers.{layer}.post_attention_layernorm.weight", 5, worker=1)
        found = diff(CheckpointWeights.open(folders[1]), EngineWeights(reader)).differences
        assert {(one.name, one.index) for one in found} == {
            (f"model.layers.{layer}.post_attention_layernorm.weight", (5,))
        }
        assert {one.right for one in found} == {"engine 0 rank 1"}
        assert rounds.refit(13, wanted, between=lambda: seen.append(reader.read("model.norm.weight").version))
        assert seen == [12] and reader.read("model.norm.weight").version == 13


def test_a_failed_staging_leaves_the_engine_serving_and_ready_for_the_next(engine, folders):
    generator, parallel = engine
    start, changed = folders
    with Rounds(generator, tensors_of(start), parallel.num_ranks) as rounds:
        assert rounds.refit(20, tensors_of(changed))
        goal = greedy(generator)
        rounds.control.fail("bulk", "train 0", "the trainer ran out of memory")
        with pytest.raises(RefitFailed, match="out of memory"):
            generator.stage(21, 99)
        assert not generator.finish(21, 99)
        assert generator.weight_version() == 20
        assert greedy(generator) == goal
    with Rounds(generator, tensors_of(start), parallel.num_ranks) as rounds:
        assert not rounds.refit(22, tensors_of(start), refuse="digests disagree")
        assert greedy(generator) == goal
        assert rounds.refit(23, tensors_of(changed))
        assert greedy(generator) == goal


def test_an_engine_that_cannot_be_built_leaves_no_process(tmp_path):
    folder = make_tiny_model(
        "tiny-qwen3", tmp_path / "odd", overrides={"num_attention_heads": 3, "num_key_value_heads": 3}
    )
    before = set(psutil.Process(os.getpid()).children(recursive=True))
    with pytest.raises(Exception, match=r"heads|divisible"):
        Generator.build(folder, GenParallel(tensor=2), GenOptions(), BUILD_S)
    assert set(psutil.Process(os.getpid()).children(recursive=True)) <= before


def test_an_engine_whose_worker_dies_says_so_in_time_and_leaves_no_process(engine):
    """The last of this module's cases: it ends the engine."""
    generator, _ = engine
    workers = sorted(
        (w for w in generator._children if "resource_tracker" not in " ".join(w.cmdline())),
        key=lambda w: w.pid,
    )
    workers[-1].kill()
    started = time.monotonic()
    with pytest.raises(Exception, match=r"."):
        generator.generate([[1, 2, 3]], 1, 4, 0.0, 0)
    assert time.monotonic() - started < 90
    everyone = list(generator._children)
    segments = generator._segments
    generator.close()
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in everyone)
    assert segments and not left_of(segments)
    closing = [thread.name for thread in threading.enumerate() if thread.name == "refit-close-engine"]
    assert not closing, "a closing that waits inside the collector keeps the whole process from collecting"
