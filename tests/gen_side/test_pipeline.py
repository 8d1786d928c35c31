"""Engines of two pipeline stages, alone and with tensor parallelism: what they receive, say and survive."""

import time

import pytest

from refit.gen_side.generator import Generator, GenOptions, GenParallel
from refit.gen_side.live.configuration import NOT_ASKED
from refit.plan.sequence import SequenceCut
from tests.gen_side.checkpoints import tensors_of
from tests.gen_side.parity import (
    BUILD_S,
    DTYPES,
    answers_of,
    make_lesson,
    require_twin,
    two_refits,
)
from tests.gen_side.rounds import Rounds
from tests.gen_side.test_engine_tp2 import left_of

pytestmark = [
    pytest.mark.slow, pytest.mark.vllm, pytest.mark.processes, pytest.mark.timeout(900),
]  # fmt: skip

LAYOUTS = {
    "pp2": (GenParallel(pipeline=2), "tiny-qwen3", "bf16"),
    "pp2 tp2": (GenParallel(tensor=2, pipeline=2), "tiny-qwen3", "bf16"),
    "pp2 tp2 fp32": (GenParallel(tensor=2, pipeline=2), "tiny-qwen3", "fp32"),
    "tp2": (GenParallel(tensor=2), "tiny-qwen3", "bf16"),
    "pp2 moe": (GenParallel(pipeline=2), "tiny-qwen3-moe", "bf16"),
}
PROMPT = [1, 2, 3, 4, 5]
LONG = 24


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    made = {}

    def get(model, precision):
        if (model, precision) not in made:
            folder = tmp_path_factory.mktemp(f"{model}-{precision}")
            made[model, precision] = make_lesson(folder, model, precision, tensor=2)
        return made[model, precision]

    return get


@pytest.fixture(scope="module", params=LAYOUTS)
def case(request, lessons):
    """(name, engine that was asked for sequence parallelism and prompt embeddings, its layout, the lesson)."""
    parallel, model, precision = LAYOUTS[request.param]
    lesson = lessons(model, precision)
    options = GenOptions(
        dtype=DTYPES[precision], call_timeout_s=60, sequence_parallel=True, prompt_embeds=True
    )
    generator = Generator.build(lesson.start, parallel, options, BUILD_S)
    yield request.param, generator, parallel, lesson
    generator.close()


def test_logprobs_equal_those_of_one_rank_that_takes_the_same_sums_after_two_refits(case):
    _, generator, parallel, lesson = case
    seen = []
    for index, found in two_refits(generator, parallel, lesson, first_version=1):
        require_twin(found, lesson, parallel, index)
        table = tensors_of(lesson.folders[index])["model.embed_tokens.weight"]
        embeddings = [table[list(prompt)] for prompt in lesson.prompts]
        by_ids, by_embeddings = answers_of(generator, lesson.prompts), answers_of(generator, embeddings)
        assert by_embeddings == by_ids, "embeddings of the new version are its token ids"
        seen.append(by_ids)
    assert seen[0] != seen[1], "the second refit changed nothing"


def test_p2p_golden_and_conventional_refits_leave_equal_bytes_on_every_stage_twice_in_a_row(case):
    _, generator, parallel, lesson = case
    versions = [tensors_of(folder) for folder in lesson.folders]
    found = []
    for number, (bulk, options) in enumerate([("p2p", {}), ("golden", {}), ("p2p", {"whitelist": ()})]):
        start = tensors_of(lesson.start)  # memory that the trainer changes
        with Rounds(generator, start, parallel.num_ranks, bulk=bulk, **options) as rounds:
            hashes = []
            for step, tensors in enumerate(versions):
                assert rounds.refit(20 + 10 * number + step, tensors)
                hashes.append([audit["params_sha256"] for audit in rounds.audit()])
            sent = sum(report["bytes_sent"] for report in rounds.reports.values())
            assert (sent == 0) == (options != {}), "the conventional refit sends nothing point to point"
        found.append(hashes)
    assert found[0] == found[1] == found[2] and found[0][0] != found[0][1]
    assert all(len(hashes) > 0 for hashes in found[0][0]), "every rank was audited"


def test_each_stage_receives_the_bytes_of_its_own_layers_and_no_others(case):
    _, generator, parallel, lesson = case
    tensors = tensors_of(lesson.start)
    with Rounds(generator, tensors, parallel.num_ranks) as rounds:
        assert rounds.refit(100, tensors)
        found = [rounds.reports[1 + rank]["bytes_received"] for rank in range(parallel.num_ranks)]
        wanted = [
            sum(share(name, tensor, rank, parallel, tensors) for name, tensor in tensors.items())
            for rank in range(parallel.num_ranks)
        ]
        print(f"bytes | {parallel} | by rank {found} | model {sum(t.nbytes for t in tensors.values())}")
        assert found == wanted
        held = [{tensor.name for tensor in body.tensors} for body in rounds.manifests()]
        for rank, names in enumerate(held):
            stage = rank // parallel.tensor
            assert names and all(is_held(tensor_name, stage, parallel, tensors) for tensor_name in names)


def share(name, tensor, rank, parallel, tensors):
    """Bytes of a tensor that belong on a rank: nothing of the other stage's, all of what is not cut, else its part."""
    stage, place = divmod(rank, parallel.tensor)
    if not is_held(name, stage, parallel, tensors):
        return 0
    if "norm" in name or name.endswith("mlp.gate.weight"):
        return tensor.nbytes
    if "embed" in name or "lm_head" in name:
        num_rows = -(-len(tensor) // 64) * 64  # vLLM pads a vocabulary so, then cuts it
        rows = SequenceCut(num_rows, parallel.tensor).rows(place)
        return tensor[rows.start : rows.stop].nbytes
    return tensor.nbytes // parallel.tensor


def is_held(name, stage, parallel, tensors):
    """Whether a stage (of two, of two layers each) has a tensor. vLLM 0.31 makes both ends of Qwen3-MoE on each."""
    if parallel.pipeline == 1:
        return True
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) // 2 == stage
    has_experts = any(".experts." in each for each in tensors)
    return has_experts or stage == (0 if name.startswith("model.embed") else 1)


def test_an_engine_describes_its_live_layout_and_not_what_was_asked_for(case):
    _, generator, parallel, _ = case
    found = generator.describe()
    assert (found.tensor, found.pipeline) == (parallel.tensor, parallel.pipeline)
    assert found.stages == (((0, 2), (2, 4)) if parallel.pipeline > 1 else ((0, 4),))
    assert found.prompt_embeds
    asked = generator._llm.llm_engine.vllm_config.compilation_config.pass_config
    assert generator._options.sequence_parallel and not found.sequence_parallel
    assert not asked.enable_sp and found.sequence_off == NOT_ASKED


@pytest.mark.parametrize("kv_cache", ["keep", "clear"])
def test_a_batch_that_is_under_way_at_a_commit_counts_as_the_old_versions(case, kv_cache):
    """A pipeline works on a batch between two steps. Where keys and values are kept, vLLM takes its token after the
    commit, for the new version's; where they are cleared, it samples that token again."""
    _, generator, parallel, lesson = case
    start, changed = (tensors_of(folder) for folder in lesson.folders)
    requests, core = generator._requests, generator._llm.llm_engine.engine_core.engine_core
    version = {"keep": 200, "clear": 210}[kv_cache]
    with Rounds(generator, start, parallel.num_ranks) as rounds, pytest.MonkeyPatch.context() as patch:
        assert rounds.refit(version, start)
        patch.setattr(generator, "_stop_tokens", ())
        patch.setattr(generator, "_options", GenOptions(call_timeout_s=60, pause="keep", kv_cache=kv_cache))
        (old,) = generator.generate([PROMPT], 1, LONG, 0.0, 0)
        run = requests._run

        def refit_when_a_batch_is_under_way(deadline_s, timeout_s):
            while not requests._answers or (parallel.pipeline > 1 and not under_way(core)):
                assert time.monotonic() < deadline_s
                requests._step()
            patch.setattr(requests, "_run", run)
            assert rounds.refit(version + 1, changed)
            run(deadline_s, timeout_s)

        patch.setattr(requests, "_run", refit_when_a_batch_is_under_way)
        (sample,) = generator.generate([PROMPT], 1, LONG, 0.0, 0)
        (first, num_old), (second, num_new) = sample.spans
        assert (first, second, num_old + num_new) == (version, version + 1, LONG)
        assert sample.tokens[:num_old] == old.tokens[:num_old]
        assert sample.logprobs[:num_old] == pytest.approx(old.logprobs[:num_old], abs=1e-6)
        assert sample.logprobs[num_old] != pytest.approx(old.logprobs[num_old], abs=1e-4), (
            "not the old weights'"
        )
        if kv_cache == "clear":
            (again,) = generator.generate([[*PROMPT, *sample.tokens[:num_old]]], 1, num_new, 0.0, 0)
            assert again.tokens == sample.tokens[num_old:]
            assert again.logprobs[0] == pytest.approx(sample.logprobs[num_old], abs=0.02), (
                "the new version's own"
            )


def under_way(core):
    return any(scheduled.total_num_scheduled_tokens for _, scheduled, _ in core.batch_queue)


def test_an_engine_that_loses_a_worker_of_its_first_stage_ends_in_time_and_leaves_no_process(case):
    """The last of this module's cases: it ends the engine."""
    _, generator, _, _ = case
    everyone = list(generator._children)
    workers = sorted(
        (w for w in everyone if "resource_tracker" not in " ".join(w.cmdline())), key=lambda w: w.pid
    )
    workers[0].kill()
    started = time.monotonic()
    with pytest.raises(Exception, match=r"."):
        generator.generate([PROMPT], 1, 4, 0.0, 0)
    assert time.monotonic() - started < 90
    generator.close()
    assert not any(is_alive(worker) for worker in everyone)
    assert generator._segments and not left_of(generator._segments)


def is_alive(process):
    return process.is_running() and process.status() != "zombie"
