"""Every tensor of a family, and random slices, read back by HF name from real vLLM ranks, before and after a commit."""

import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest

from refit.gen_side.generator import GenParallel
from refit.service.reader import Reader
from refit.train_side.tiny_models import make_tiny_model
from refit.transfer.rendezvous import ControlStore
from refit.validation import reading
from refit.validation.reading import PoolEngine, read_faults, serve
from refit.validation.weights import read_tensors
from tests.gen_side.checkpoints import shifted
from tests.gen_side.farm import open_ranks, run_ranks

pytestmark = [pytest.mark.vllm, pytest.mark.processes, pytest.mark.timeout(900)]

TP2, PP2_TP2 = GenParallel(tensor=2), GenParallel(tensor=2, pipeline=2)
HYBRID = {"layers_block_type": ["mamba", "mlp", "mamba", "attention"]}
FAMILIES = {
    "qwen3": ("tiny-qwen3", "bfloat16", {}),
    "tied": ("tiny-qwen3", "float32", {"tie_word_embeddings": True}),
    "llama": ("tiny-llama", "bfloat16", {}),
    "odd-vocabulary": ("tiny-qwen2.5", "float32", {"vocab_size": 500}),
    "moe": ("tiny-qwen3-moe", "float32", {}),
    "mla": ("tiny-deepseek-v3", "float32", {}),
    "hybrid": ("tiny-nemotron-h", "bfloat16", HYBRID),
}
QUICK = {("odd-vocabulary", "pp2-tp2"), ("moe", "tp2"), ("hybrid", "tp2")}
CASES = [
    pytest.param(
        family, parallel, id=f"{family}-{layout}", marks=[] if (family, layout) in QUICK else pytest.mark.slow
    )
    for family in FAMILIES
    for layout, parallel in (("tp2", TP2), ("pp2-tp2", PP2_TP2))
]
TIMEOUT_S = 400.0  # the first case waits for vLLM's imports too


def give_back(rank, address, parallel, dtype, folders, store, run_id):
    """Load the first folder, answer reads; commit the second over it, answer reads. Returns how it was read."""
    from refit.gen_side.bare import join_ranks, load
    from refit.gen_side.live.audit import observe_commit, observe_staging
    from refit.gen_side.live.memory import LiveMemory
    from refit.gen_side.loader.hf_index import read_hf_shapes
    from refit.gen_side.loader.trace import trace_loader
    from refit.gen_side.staging import Staging
    from refit.transfer.reading import Holder, Reads

    start, changed = folders
    join_ranks(start, parallel, dtype, rank, address)
    worker = load(start, parallel, dtype, rank)
    control = ControlStore.join(*store, run_id)
    with worker.active():
        trace = trace_loader(worker.model, read_hf_shapes(start))
        manifest = trace.manifest(gen_rank=rank, stage=rank // parallel.tensor, replica=0)
        reads, committed = Reads(), None
        for version in (0, 1):
            if version:
                staging = Staging.begin(worker.model, trace)
                staging.load_misc(read_tensors(changed).items())
                loaded = observe_staging(worker.model, staging)
                staging.commit(worker.model_config)
                committed = observe_commit(worker.model, loaded)
            holder = Holder(
                rank,
                version,
                lambda: manifest,
                lambda committed=committed: LiveMemory(worker.model, trace, committed),
            )
            serve(control, version, rank, TIMEOUT_S, lambda info, holder=holder: reads.answer(info, holder))
        reads.close()
    control.close()


@pytest.mark.parametrize(("family", "parallel"), CASES)
def test_what_ranks_give_back_is_what_they_loaded_and_then_what_was_committed(
    family, parallel, tmp_path, monkeypatch
):
    monkeypatch.setattr(reading, "NUM_SLICES", 60)
    model, dtype, overrides = FAMILIES[family]
    start = make_tiny_model(model, tmp_path / "start", dtype=dtype, overrides=overrides)
    folders = start, shifted(start, tmp_path / "changed", seed=1)
    control = ControlStore.host(run_id=secrets.token_hex(4))
    store = ("127.0.0.1", control.port)
    try:
        open_ranks()
        with ThreadPoolExecutor(1) as pool:
            ranks = pool.submit(
                run_ranks,
                parallel.num_ranks,
                give_back,
                parallel,
                dtype,
                folders,
                store,
                control.run_id,
                timeout_s=TIMEOUT_S,
            )
            ranks.add_done_callback(
                lambda done: done.exception() and control.fail("read", "ranks", "they failed")
            )
            engines = [PoolEngine(control, version, parallel.num_ranks) for version in (0, 1)]
            try:
                for engine, folder in zip(engines, folders, strict=True):
                    reader = Reader(engine, control, TIMEOUT_S)
                    assert list(read_faults(reader, read_tensors(folder))) == []
                    engine.end()
            except Exception as error:
                for engine in engines:
                    engine.end()
                if isinstance(error, RuntimeError):
                    ranks.result(TIMEOUT_S)  # a rank that failed is the cause
                raise
            ranks.result(TIMEOUT_S)
    finally:
        control.close()
