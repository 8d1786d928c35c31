"""What real vLLM ranks say they hold, and how to compare two rank manifests."""

from dataclasses import replace

from refit.plan import RankManifest, coalesce_holdings, encode_rank_manifest
from refit.plan.synth.gen import EXPERT_DOWNS, EXPERT_UPS


def traced(rank, address, parallel, folder, dtype):
    """Body of one forked vLLM rank: the manifest that tracing its loader gives, as text."""
    import contextlib
    import io

    from vllm.config import set_current_vllm_config

    from refit.gen_side.bare import join_ranks, load
    from refit.gen_side.loader.hf_index import read_hf_shapes
    from refit.gen_side.loader.trace import trace_loader

    with contextlib.redirect_stderr(io.StringIO()):
        join_ranks(folder, parallel, dtype, rank, address)
        worker = load(folder, parallel, dtype, rank, load_format="dummy")
        with set_current_vllm_config(worker.config):
            trace = trace_loader(worker.model, read_hf_shapes(folder))
    stage = rank // parallel.tensor % parallel.pipeline
    return encode_rank_manifest(trace.manifest(gen_rank=rank, stage=stage, replica=0))


def differences(real: RankManifest, synthetic: RankManifest) -> list[str]:
    """Where the two differ in tensors, misc names, params or holdings; strides of dims of one element are free."""
    found: list[str] = []
    for what, mine, theirs in (
        (
            "place",
            {(real.side, real.rank, real.stage, real.replica)},
            {(synthetic.side, synthetic.rank, synthetic.stage, synthetic.replica)},
        ),
        ("tensor", set(real.tensors), set(synthetic.tensors)),
        ("misc", {one.tensor for one in real.misc}, {one.tensor for one in synthetic.misc}),
        ("param", used_params(real), used_params(synthetic)),
        ("holding", holdings(real), holdings(synthetic)),
    ):
        found += [f"{what} only in the real manifest: {one}" for one in sorted(map(str, mine - theirs))]
        found += [f"{what} only in the synthetic manifest: {one}" for one in sorted(map(str, theirs - mine))]
    return found


def with_names_of(real: RankManifest, synthetic: RankManifest) -> RankManifest:
    """The synthetic manifest with the stacked experts under the names that the real one has for the same memory.

    The new names are one to one: two params that the real rank keeps apart stay apart.
    """
    real_param = {replace(held, param=""): held.param for held in holdings(real)}
    names: dict[str, str] = {}
    for held in holdings(synthetic):
        if held.param.endswith((EXPERT_UPS, EXPERT_DOWNS)):
            names.setdefault(held.param, real_param.get(replace(held, param=""), held.param))
    assert len(set(names.values())) == len(names), f"two params became one: {names}"
    return replace(
        synthetic,
        params=tuple(replace(one, name=names.get(one.name, one.name)) for one in synthetic.params),
        holdings=tuple(replace(one, param=names.get(one.param, one.param)) for one in synthetic.holdings),
    )


def used_params(manifest):
    used = {held.param for held in manifest.holdings}
    return {param for param in manifest.params if param.name in used}


def holdings(manifest):
    return {
        replace(
            held,
            strides=tuple(
                stride if size > 1 else 0
                for stride, size in zip(held.strides, held.region.shape, strict=True)
            ),
        )
        for held in coalesce_holdings(manifest.holdings)
    }
