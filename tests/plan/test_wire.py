"""The wire form: exact, compact, strict. Mutated documents give PlanError with the path, nothing else."""

import json
import os
from random import Random

import pytest

from refit.plan import (
    Holding,
    ParamSpec,
    PlanError,
    RankManifest,
    Region,
    TensorSpec,
    decode_manifest,
    decode_rank_manifest,
    encode_manifest,
    encode_rank_manifest,
)
from refit.plan.synth.config import load_model, model_from_config
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import GenMesh, TrainMesh
from refit.plan.synth.train import train_manifest
from tests.plan.worlds import random_world


def small(num_layers=2):
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 8,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "num_experts": 4,
        "moe_intermediate_size": 4,
        "vocab_size": 10,
    }
    return model_from_config("small", config)


@pytest.mark.parametrize("seed", range(30))
def test_random_manifests_survive_the_wire(seed):
    train, gen, _ = random_world(seed)
    for side in (train, gen):
        assert decode_manifest(encode_manifest(side)) == side
        for rank in side.ranks:
            assert decode_rank_manifest(encode_rank_manifest(rank)) == rank


def test_strides_of_a_param_survive_the_wire_and_fit_its_shape():
    tensor = TensorSpec("w", (2, 3), "float32")
    holding = Holding("w", Region.whole((2, 3)), "w", 0, (1, 2))

    def manifest(strides):
        params = (ParamSpec("w", (2, 3), "float32", strides),)
        return RankManifest("train", 0, 0, 0, (tensor,), params, (holding,), ())

    for strides in ((1, 2), None):
        assert decode_rank_manifest(encode_rank_manifest(manifest(strides))) == manifest(strides)
    wrong = encode_rank_manifest(manifest((1, 2))).replace('"float32",[1,2]]', '"float32",[1]]')
    with pytest.raises(PlanError, match=r"^\$\.body\[0\]\.params\[0\].*2 dims but strides \(1,\)"):
        decode_rank_manifest(wrong)


def test_layered_manifests_survive_the_wire_with_virtual_stages_and_uneven_layers():
    model = small(7)
    for mesh in (
        TrainMesh(pp=2, vpp=2, ep=2),
        TrainMesh(tp=2, pp=3, first=1, last=1),
        TrainMesh(gtp=2, etp=2, tp=2),
    ):
        train = train_manifest(model, mesh)
        assert decode_manifest(encode_manifest(train)) == train
    gen = gen_manifest(model, GenMesh(tp=2, pp=2, ep=1, replicas=2))
    assert decode_manifest(encode_manifest(gen)) == gen


def test_sixty_equal_layers_do_not_cost_sixty_times_the_text():
    texts = {n: encode_rank_manifest(train_manifest(small(n), TrainMesh()).ranks[0]) for n in (1, 60)}
    assert len(texts[60]) < 1.6 * len(texts[1])
    assert (
        len(encode_rank_manifest(gen_manifest(load_model("deepseek-v3"), GenMesh(tp=32)).ranks[5])) < 10_000
    )


def test_replicas_share_one_body_in_the_text_and_in_memory():
    model = small()
    one, many = (gen_manifest(model, GenMesh(tp=2, replicas=n)) for n in (1, 50))
    assert len(encode_manifest(many)) < len(encode_manifest(one)) + 50 * 20
    decoded = decode_manifest(encode_manifest(many))
    assert decoded.ranks[0].holdings is decoded.ranks[98].holdings


def test_names_that_look_like_templates_are_kept():
    name = "model.layers.{}.x.layers.3.y"
    spec = TensorSpec(name, (2,), "int8")
    held = Holding(name, Region((0,), (2,)), "layers.007.p", 0, (1,))
    rank = RankManifest("gen", 3, 0, 1, (spec,), (ParamSpec("layers.007.p", (2,), "int8"),), (held,), ())
    assert decode_rank_manifest(encode_rank_manifest(rank)) == rank


def edit(path, value):
    """A one-rank document with one value replaced; path is keys and indices."""
    document = json.loads(encode_rank_manifest(train_manifest(small(), TrainMesh()).ranks[0]))
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 2, r"^\$\.schema: schema 2 is not read here"),
        (("schema",), True, r"^\$\.schema: must be an integer, got True"),
        (("extra",), 1, r"^\$: unknown key 'extra'"),
        (("side",), "both", r"^\$\.side: must be one of train, gen"),
        (("rank",), -1, r"^\$\.rank: must be in 0"),
        (("rank",), 1.0, r"^\$\.rank: must be an integer"),
        (("stage",), "0", r"^\$\.stage: must be an integer, got '0'"),
        (("replica",), 1, r"^\$\.body: train rank 0 has replica 1"),
        (("body",), {}, r"^\$\.body: must be a list"),
        (("body", 0, "layers", 0), [1], r"^\$\.body\[0\]\.layers\[0\]: must have 2 columns"),
        (
            ("body", 0, "tensors", 0, 0),
            "plain",
            r"^\$\.body\[0\]\.tensors\[0\]\[0\]: a name in a group with layers",
        ),
        (("body", 0, "tensors", 0, 2), "float3", r"^\$\.body\[0\]\.tensors\[0\]\[2\]: must be one of"),
        (("body", 0, "holdings", 0, 0), 99, r"^\$\.body\[0\]\.holdings\[0\]\[0\]: must be in 0"),
        (("body", 0, "holdings", 0, 3), [0, 0], r"^\$\.body\[0\]\.holdings\[0\]: region"),
        (("body", 0, "holdings", 0, 4), 10**9, r"(?s)^\$\.body: .*reaches flat element"),
        (
            ("body", 0, "holdings", 0, 5),
            [1, 1, 1, 1, 1],
            r"^\$\.body\[0\]\.holdings\[0\]: .*strides are given",
        ),
    ],
)
def test_a_fault_is_named_with_its_path(path, value, message):
    with pytest.raises(PlanError, match=message):
        decode_rank_manifest(edit(path, value))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "null",
        "NaN",
        '{"schema":1,"schema":1}',
        "[" * 100_000,
        "9" * 5000,
        '"\\ud800"',
        "{}",
        "1e999",
    ],
)
def test_text_that_is_no_document_is_refused(text):
    for decode in (decode_manifest, decode_rank_manifest):
        with pytest.raises(PlanError, match=r"^\$"):
            decode(text)


def test_a_small_document_cannot_ask_for_unbounded_memory():
    document = json.loads(encode_rank_manifest(train_manifest(small(), TrainMesh()).ranks[0]))
    document["body"][0]["layers"] = [[n, n] for n in range(200_000)]
    with pytest.raises(PlanError, match="stands for more than"):
        decode_rank_manifest(json.dumps(document))


def mutated(random, value):
    """The document with one thing changed somewhere."""
    junk = [
        None,
        True,
        -1,
        0,
        1,
        2**63,
        10**30,
        1.5,
        "",
        "x",
        "{}",
        [],
        {},
        [[]],
        [0, 0],
        "layers.1.x",
        "gen",
    ]
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        changed = dict(value)
        if random.random() < 0.05:
            changed.pop(key)
        elif random.random() < 0.05:
            changed[random.choice(["x", "schema", "body"])] = random.choice(junk)
        else:
            changed[key] = mutated(random, value[key])
        return changed
    if isinstance(value, list) and value and random.random() < 0.9:
        changed = list(value)
        place = random.randrange(len(changed))
        kind = random.random()
        if kind < 0.05:
            changed.pop(place)
        elif kind < 0.1:
            changed.insert(place, random.choice([changed[place], *junk]))
        else:
            changed[place] = mutated(random, changed[place])
        return changed
    if type(value) is int and random.random() < 0.5:
        return value + random.choice([-1, 1, 7, -value, 2**40])
    return random.choice(junk)


def fuzz(num_documents, seed):
    random = Random(seed)
    sides = [train_manifest(small(), TrainMesh(ep=2)), gen_manifest(small(), GenMesh(tp=2))]
    sources = [(decode_manifest, encode_manifest(side)) for side in sides]
    sources += [(decode_rank_manifest, encode_rank_manifest(side.ranks[1])) for side in sides]
    sources = [(decode, text, json.loads(text)) for decode, text in sources]
    num_refused = 0
    for _ in range(num_documents):
        decode, text, document = random.choice(sources)
        if random.random() < 0.2:
            place = random.randrange(len(text))
            changed = text[:place] + random.choice(['"', "{", "]", ",", "0", "\\", ""]) + text[place + 1 :]
        else:
            changed = json.dumps(mutated(random, document))
        try:
            decode(changed)
        except PlanError as fault:
            num_refused += 1
            assert str(fault).startswith("$"), str(fault)
    return num_refused


def test_mutated_documents_are_read_or_refused_with_the_path():
    assert fuzz(2_000, 7) > 1_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_mutated_documents_are_read_or_refused_with_the_path():
    assert fuzz(int(os.environ.get("REFIT_FUZZ_DOCUMENTS", "100000")), 1) > 50_000
