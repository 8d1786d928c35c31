"""The command that users run, with engines of two pipeline stages."""

import json

import pytest

from tests.end_to_end.test_main_job import run_job

pytestmark = [
    pytest.mark.slow, pytest.mark.ray, pytest.mark.vllm, pytest.mark.megatron, pytest.mark.timeout(900),
]  # fmt: skip


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_job_refits_engines_of_two_stages_and_says_what_they_run(tensor, tmp_path):
    arguments = [
        "+policy.nccl_xfer_refit=true",
        "generation.pipeline_parallel=2",
        f"generation.tensor_parallel={tensor}",
        f"generation.sequence_parallel={str(tensor > 1).lower()}",
        "grpo.steps=2",
        "refit.verify_every=1",
    ]
    summary = run_job(arguments, {}, tmp_path)
    print(
        {
            key: summary[key]
            for key in ("audits", "gen_kl_max", "gen_logprob_gap_max", "bulk_share", "engines")
        }
    )
    assert summary["path"] == "p2p"
    assert summary["steps"] == summary["weight_version"] == summary["audits"] == 2
    assert summary["gen_kl_max"] <= 5e-3
    assert summary["bulk_share"] >= 0.99
    (engine,) = summary["engines"].values()
    assert (engine["tensor"], engine["pipeline"]) == (tensor, 2)
    assert engine["stages"] == [[0, 2], [2, 4]]
    assert not engine["sequence_parallel"] and engine["sequence_off"], (
        "a CPU has no such pass, asked for or not"
    )
    assert json.loads((tmp_path / "engines.json").read_text()) == summary["engines"]
