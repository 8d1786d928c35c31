"""The shipped matrices hold what they promise; a file that cannot work is refused by name."""

from pathlib import Path

import pytest

from refit.cli import main
from refit.plan import ConfigError
from refit.validation.matrix import choose, load_matrix


def runnable(matrix):
    return [case for case in load_matrix(matrix) if not case.unrunnable]


def test_the_small_matrix_has_ten_cases_over_dense_experts_latent_attention_and_hybrids():
    cases = runnable("l0")
    assert len(cases) >= 10
    assert {case.model for case in cases} >= {
        "tiny-qwen3",
        "tiny-qwen3-moe",
        "tiny-deepseek-v3",
        "tiny-nemotron-h",
    }
    assert any(case.logprobs for case in cases)


WANTED = {
    "TP2 to TP4, 2 KV heads": ("TP2 > TP4", "tiny-qwen3"),
    "TP4 to TP2, 2 KV heads": ("TP4 > TP2", "tiny-qwen3"),
    "uneven PP2 to PP2 TP2": ("PP2 first1 > TP2 PP2", "tiny-qwen3"),
    "virtual PP": ("PP2 VPP2 > TP2", "tiny-qwen3"),
    "EP2 TP2 with ETP1": ("TP2 EP2 > TP2", "tiny-qwen3-moe"),
    "EP2 TP2 with ETP2": ("TP2 EP2 ETP2 DP2 > TP4", "tiny-qwen3-moe"),
    "EP4 to EP2 TP2": ("EP4 DP4 > TP2 EP", "tiny-qwen3-moe"),
    "DP2 to 3 engines": ("DP2 > 3 x 1", "tiny-qwen3"),
    "GTP2 TP2 dense": ("TP2 GTP2 > TP2", "tiny-qwen3"),
    "GTP2 TP2 experts": ("TP2 EP2 GTP2 EGTP2 > TP2", "tiny-qwen3-moe"),
    "hybrid": ("TP2 > TP2", "tiny-nemotron-h"),
    "QKV bias": ("TP2 > TP2", "tiny-qwen2.5"),
    "Llama": ("PP2 > TP2", "tiny-llama"),
}


@pytest.mark.parametrize("what", WANTED)
def test_the_large_matrix_has_the_layouts_that_break_refits(what):
    assert WANTED[what] in [(case.layout, case.model) for case in runnable("l1")]


def test_the_large_matrix_has_forty_cases_with_ties_odd_vocabularies_and_token_prediction_layers():
    cases = runnable("l1")
    assert len(cases) >= 40
    tied_pipelines = [c for c in cases if c.overrides.get("tie_word_embeddings") and c.train.pipeline > 1]
    assert len(tied_pipelines) >= 2
    assert {c.overrides["vocab_size"] for c in cases if "vocab_size" in c.overrides} >= {500, 321}
    assert any(c.overrides.get("num_nextn_predict_layers") for c in cases)


def test_a_users_file_is_a_matrix_and_cases_are_chosen_by_name(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[[case]]\nname = "a"\nmodel = "tiny-qwen3"\n[[case]]\nname = "b"\nmodel = "folder"\n')
    cases = load_matrix(str(file))
    assert [case.layout for case in cases] == ["1 > 1", "1 > 1"]
    assert [case.name for case in choose(cases, ["b"])] == ["b"]
    with pytest.raises(ConfigError, match=r"no case 'bb' among the 2 of this matrix; did you mean 'b'\?"):
        choose(cases, ["bb"])


def test_the_readme_counts_the_cases_of_the_large_matrix():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert f"# {len(load_matrix('l1'))} cases, of which a CPU can run {len(runnable('l1'))}" in readme


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[case]]\nname = "a"\nmodel = "m"\ncolour = 1', "unknown key 'colour'"),
        ('[[case]]\nname = "a"\nmodel = "m"\ntrain = { tp = 2 }', "case 'a'"),
        ('[[case]]\nname = "a"\nmodel = "m"\nprecision = "fp8"', "precision 'fp8'"),
        ('[[case]]\nname = "a"\nmodel = "m"\nquantized = "fp8"', "are made from bf16"),
        ('[[case]]\nname = "a"\nmodel = "m"\nprecision = "bf16"\nquantized = "nvfp4"', "fp8 and mxfp8"),
        ('[[case]]\nname = "a"\nmodel = "m"\nfp8_trainers = true', "fp8_trainers with quantized ''"),
        ('[[case]]\nname = "a"\nmodel = "m"\n[[case]]\nname = "a"\nmodel = "m"', "called 'a'"),
        ("[[case]\n", "not TOML"),
        ("", "found none"),
    ],
)
def test_a_matrix_that_cannot_work_is_refused_with_file_and_case(tmp_path, capsys, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    assert main(["validate", "--matrix", str(file)]) == 2
    said = capsys.readouterr().err
    assert message in said and "bad.toml" in said


def test_the_matrix_of_quantized_engines_has_every_layout_from_bf16_and_from_trainers_that_store_fp8():
    cases = runnable("fp8")
    found = {(case.quantized, case.fp8_trainers, case.layout) for case in cases}
    assert found >= {
        ("fp8", False, "TP2 > TP4"),
        ("fp8", False, "EP2 DP2 > TP2"),
        ("fp8", False, "PP2 > TP2"),
        ("fp8", False, "GTP3 > 1"),
        ("fp8", False, "PP2 EP2 DP2 > TP2 PP2"),
        ("mxfp8", False, "TP2 > TP2"),
        ("mxfp8", False, "EP2 DP2 > TP2"),
        ("fp8", True, "TP2 > TP4"),
        ("fp8", True, "EP2 DP2 > TP2"),
        ("fp8", True, "PP2 > TP2"),
        ("fp8", True, "PP2 EP2 DP2 > TP2 PP2"),
    }
    assert all("double" in case.name for case in cases if case.fp8_trainers)
    assert {case.model for case in cases} == {"tiny-qwen3", "tiny-qwen3-moe"}
