"""A real vLLM engine refitted through its plug-in, against a fresh engine loaded from the changed checkpoint."""

import threading
import time

import pytest

from refit.gen_side import engine
from refit.gen_side.calls import Background
from refit.gen_side.generator import Generator, GenOptions, GenParallel
from refit.train_side.tiny_models import make_tiny_model
from refit.transfer.errors import RefitFailed, TransportError
from refit.transfer.protocol import slices_key, suspects_key
from refit.transfer.rendezvous import ControlStore
from tests.gen_side.checkpoints import shifted, tensors_of
from tests.gen_side.rounds import Rounds

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPTS = [[1, 2, 3, 4, 5], [200, 100, 50], [7] * 12]
BUILD_S = 400.0


def greedy(generator):
    return [(s.tokens, s.logprobs) for s in generator.generate(PROMPTS, 1, 8, 0.0, 0)]


@pytest.fixture(scope="module", params=["tiny-qwen3", "tiny-qwen3-moe"])
def case(request, tmp_path_factory):
    """(generator on the start checkpoint, start folder, changed folder, greedy answers of a fresh engine on it)."""
    folder = tmp_path_factory.mktemp(request.param)
    start = make_tiny_model(request.param, folder / "start")
    changed = shifted(start, folder / "changed", seed=1)
    fresh = Generator.build(changed, GenParallel(), GenOptions(), BUILD_S)
    goal = greedy(fresh)
    fresh.close()
    generator = Generator.build(start, GenParallel(), GenOptions(), BUILD_S)
    yield generator, start, changed, goal
    generator.close()


def test_answers_after_a_refit_equal_those_of_a_fresh_engine(case):
    generator, start, changed, goal = case
    before = greedy(generator)
    assert before != goal
    with Rounds(generator, tensors_of(start), 1) as rounds:
        assert rounds.refit(1, tensors_of(changed))
        assert generator.weight_version() == 1
        assert greedy(generator) == goal
        assert rounds.refit(2, tensors_of(start))
        assert greedy(generator) == before
        for version in range(3, 11):
            assert rounds.refit(version, tensors_of(changed if version % 2 else start))
        assert greedy(generator) == before
        assert {s.weight_version for s in generator.generate(PROMPTS, 2, 4, 1.0, 5)} == {10}


def test_p2p_golden_and_conventional_refits_leave_equal_bytes(case):
    generator, start, changed, goal = case
    hashes = []
    for version, (whitelist, bulk) in enumerate([(None, "p2p"), (None, "golden"), ((), "p2p")], start=20):
        options = {} if whitelist is None else {"whitelist": whitelist}
        with Rounds(generator, tensors_of(start), 1, bulk=bulk, **options) as rounds:
            assert rounds.refit(version, tensors_of(start))
            assert rounds.refit(version + 10, tensors_of(changed))
            assert greedy(generator) == goal
            (found,) = rounds.audit()
            assert found["changed"] == []
            assert found["digests"] == rounds.trained_digests()
            hashes.append(found["params_sha256"])
    assert hashes[0] == hashes[1] == hashes[2]


def test_the_old_version_serves_while_the_new_one_is_staged(case):
    generator, start, changed, goal = case
    with Rounds(generator, tensors_of(start), 1) as rounds:
        assert rounds.refit(14, tensors_of(start))
        before, meanwhile = greedy(generator), []
        assert rounds.refit(15, tensors_of(changed), between=lambda: meanwhile.append(greedy(generator)))
        assert meanwhile == [before]
        assert greedy(generator) == goal


def test_requests_wait_for_one_call_of_the_workers_and_for_nothing_else(case, monkeypatch):
    generator, start, changed, goal = case
    executor, calls = generator._llm.llm_engine.engine_core.engine_core.model_executor, []
    rpc = executor.collective_rpc
    monkeypatch.setattr(
        executor,
        "collective_rpc",
        lambda what, *rest, **more: (calls.append(what), rpc(what, *rest, **more))[1],
    )
    with Rounds(generator, tensors_of(start), 1) as rounds:
        assert rounds.refit(30, tensors_of(changed), between=calls.clear)
        assert calls == ["refit_finish"]
        (report,) = generator.finish_reports
        assert report["version"] == 30 and 0.0 < report["finalize_s"] < generator.pause_s
        assert greedy(generator) == goal


def test_a_refused_refit_leaves_the_old_version_serving(case):
    generator, start, changed, goal = case
    with Rounds(generator, tensors_of(start), 1) as rounds:
        assert rounds.refit(40, tensors_of(changed))
        assert not rounds.refit(41, tensors_of(start), refuse="digests disagree")
        assert generator.weight_version() == 40
        assert greedy(generator) == goal
        assert not rounds.refit(42, tensors_of(start), fail="a trainer died")
        assert greedy(generator) == goal
    with Rounds(generator, tensors_of(start), 1) as rounds:
        assert rounds.refit(43, tensors_of(changed))
        assert greedy(generator) == goal


def test_what_is_discarded_is_first_told_in_the_parts_that_the_trainer_cuts_too(case):
    generator, start, changed, goal = case
    with Rounds(generator, tensors_of(start), 1) as rounds:
        assert rounds.refit(44, tensors_of(changed))
        assert rounds.control.peek(slices_key(rounds.attempt, 1)) is None
        bulk = [name for name, tensor in rounds.plan.tensors.items() if tensor.kind == "bulk"]
        suspects = {"1": [bulk[0], bulk[-1]]}
        rounds.control.put(suspects_key(rounds.attempt + 1), suspects)
        assert not rounds.refit(45, tensors_of(start), refuse="digests disagree")
        held = rounds.control.peek(slices_key(rounds.attempt, 1))
        assert {message[0] for message in held} == {bulk[0], bulk[-1]}
        assert sorted(held) == sorted(rounds.endpoint.slices(rounds.params, suspects, 60.0))
        assert greedy(generator) == goal


def test_a_prepare_that_fails_leaves_no_connection_of_the_worker_to_the_control_store(case):
    generator, start, changed, goal = case
    host = ControlStore.host(run_id="failed")
    host.fail("prepare", "train 0", "no such model")
    info = {"action": "prepare", "store": f"127.0.0.1:{host.port}", "run_id": "failed", "timeout_s": 20.0}
    with pytest.raises(RefitFailed, match="no such model"):
        generator.prepare_refit({**info, "first_gen_rank": 0, "replica": 0})
    deadline_s = time.monotonic() + 30.0
    while connections_to(host.port) > 2:  # the host's own, and the driver's, which the next prepare closes
        assert time.monotonic() < deadline_s, f"{connections_to(host.port)} connections are open"
        time.sleep(0.05)
    host.close()
    with Rounds(generator, tensors_of(start), 1) as rounds:
        assert rounds.refit(45, tensors_of(changed))
        assert greedy(generator) == goal


def test_a_commit_whose_digests_could_not_be_taken_is_not_audited_by_those_of_an_older_one(case, monkeypatch):
    generator, start, changed, goal = case
    with Rounds(generator, tensors_of(start), 1) as rounds:
        assert rounds.refit(46, tensors_of(start))
        rounds.audit()
        with monkeypatch.context() as broken:
            broken.setattr(engine, "observe_commit", out_of_memory)
            assert rounds.refit(47, tensors_of(changed))
            for _ in range(2):
                with pytest.raises(RefitFailed, match="no room to digest"):
                    generator.audit("refused")
                rounds.control.drop("failed")  # as a new round would have it: keys of its own
        assert greedy(generator) == goal
        assert rounds.refit(48, tensors_of(changed)), "what an audit lacks costs no refit"
        assert rounds.audit()[0]["digests"] == rounds.trained_digests()


def out_of_memory(*_):
    raise MemoryError("no room to digest")


def test_a_step_in_the_background_that_hangs_is_given_up_and_named():
    end = threading.Event()
    step = Background("the digest of a commit", end.wait)
    with pytest.raises(TransportError, match=r"the digest of a commit has not ended within 0\.1 s"):
        step.result(0.1)
    end.set()
    assert step.result(10.0) is True


def connections_to(port):
    """Clients of a control store in this process, where the engine's one worker lives too: each has a thread."""
    return sum(thread.name == f"the control store at 127.0.0.1:{port}" for thread in threading.enumerate())


FLIPS = {
    "plain": ("model.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
    "head": ("lm_head.weight", "lm_head.weight"),
    "packed": ("model.layers.2.self_attn.qkv_proj.weight", "model.layers.2.self_attn.q_proj.weight"),
}


@pytest.mark.parametrize("kind", FLIPS)
def test_one_flipped_element_after_a_refit_is_found_and_its_tensor_named(case, kind):
    generator, start, changed, _ = case
    param, tensor = FLIPS[kind]
    with Rounds(generator, tensors_of(start), 1) as rounds:
        assert rounds.refit(50, tensors_of(changed))
        assert generator.flip_element(param, 3) == 1
        (found,) = rounds.audit()
        trained = rounds.trained_digests()
        assert [name for name in trained if found["digests"][name] != trained[name]] == [tensor]
        assert param in found["changed"]
        assert rounds.refit(51, tensors_of(changed))
        assert rounds.audit()[0]["digests"] == trained


def test_a_flipped_expert_is_found(case):
    generator, start, changed, _ = case
    with Rounds(generator, tensors_of(start), 1) as rounds:
        assert rounds.refit(60, tensors_of(changed))
        param = "model.layers.1.mlp.experts.routed_experts.w2_weight"
        if generator.flip_element(param, 17) == 0:
            pytest.skip("a dense model")
        (found,) = rounds.audit()
        trained = rounds.trained_digests()
        wrong = [name for name in trained if found["digests"][name] != trained[name]]
        assert wrong == ["model.layers.1.mlp.experts.*.down_proj.weight"]
        assert found["changed"] == [param]
