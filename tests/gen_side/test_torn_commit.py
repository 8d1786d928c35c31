"""A commit that fails half way in a real engine: whatever serves then, nobody is given a token of it."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from refit.gen_side.generator import Generator, GenOptions, GenParallel
from refit.gen_side.switch import Switch
from refit.train_side.tiny_models import make_tiny_model
from refit.transfer.errors import TransportError
from tests.gen_side.checkpoints import shifted, tensors_of
from tests.gen_side.rounds import Rounds

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPTS = [[1, 2, 3, 4, 5], [200, 100, 50]]
LONG = 40
WAIT_S = 60.0
STEP_S = 0.05  # slow enough for a refit to come amid the answers


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torn")
    start = make_tiny_model("tiny-qwen3", folder / "start")
    changed = shifted(start, folder / "changed", seed=1)
    generator = Generator.build(start, GenParallel(), GenOptions(pause="keep"), 400.0)
    generator._stop_tokens = ()
    yield generator, tensors_of(start), tensors_of(changed)
    generator.close()


def test_an_engine_whose_workers_did_not_answer_the_commit_serves_no_more(case, monkeypatch):
    generator, start, changed = case
    monkeypatch.setattr(generator, "_failure", "")  # and again after this test: the engine is whole in truth
    executor = generator._llm.llm_engine.engine_core.engine_core.model_executor
    rpc = executor.collective_rpc

    def silent(what, *rest, **more):
        answer = rpc(what, *rest, **more)
        if what == "refit_finish":
            raise TimeoutError("a worker died")
        return answer

    with Rounds(generator, start, 1) as rounds:
        monkeypatch.setattr(executor, "collective_rpc", silent)
        with pytest.raises(TimeoutError, match="a worker died"):
            rounds.refit(1, changed)
        assert "a worker died" in generator.condition()
        with pytest.raises(TransportError, match="must not serve"):
            generator.generate(PROMPTS, 1, 4, 0.0, 0)


def test_answers_under_way_are_not_handed_out_after_a_commit_that_failed(case, monkeypatch):
    generator, start, changed = case

    def half(switch):
        for live, staged in switch.moves[: len(switch.moves) // 2]:
            live.copy_(staged)
        raise RuntimeError("the device is gone")

    step = generator._requests._step
    with Rounds(generator, start, 1) as rounds, ThreadPoolExecutor(1) as pool:
        assert rounds.refit(2, start)
        monkeypatch.setattr(generator._requests, "_step", lambda: (step(), time.sleep(STEP_S)))
        monkeypatch.setattr(Switch, "run", half)
        answers = pool.submit(generator.generate, PROMPTS, 1, LONG, 0.0, 0)
        deadline_s = time.monotonic() + WAIT_S
        while len(generator._requests._answers) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.001)
        with pytest.raises(RuntimeError, match="the device is gone"):
            rounds.refit(3, changed)
        with pytest.raises(TransportError, match=r"must not serve.*the device is gone"):
            answers.result(WAIT_S)
        assert "the device is gone" in generator.condition()
