"""The commands as a user runs them, on a machine without torch, ray, vllm, numpy, yaml, with and without rich."""

import json
import subprocess
import sys

import pytest

from refit.commands.tables import show

FRAMEWORKS = ("torch", "ray", "vllm", "megatron", "numpy", "hydra", "omegaconf", "yaml", "transformers")
LAYOUT = ("--model", "qwen3-4b", "--train", "tp=2,pp=2,dp=1", "--gen", "tp=2,replicas=3")
KEYS = {
    "model",
    "num_tensors",
    "routes",
    "bulk_share",
    "plan_s",
    "rank_plan_s",
    "send_max_over_mean",
    "idle_senders",
    "bound_ratio",
    "predicted_s",
    "peak_bytes_per_rank",
    "digest",
}


def refit(*words, without=FRAMEWORKS):
    """Run `python -m refit` in a process where importing any of `without` fails."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({without!r})); sys.argv[1:] = {list(words)!r};"
        "from refit.cli import main; sys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )


def test_plan_reports_every_promised_key_as_json():
    done = refit("plan", *LAYOUT, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() >= KEYS
    assert report["bulk_share"] == 1.0 and report["bound_ratio"] <= 1.05 and report["idle_senders"] == 0
    assert report["peak_bytes_per_rank"] <= report["bucket_bytes"]
    assert report["bound_s"] <= report["predicted_s"] <= report["predicted_two_streams_s"] * 1.01


def test_plan_gives_a_reason_for_every_tensor_that_is_not_bulk():
    layout = ("--model", "nemotron-h-8b", "--train", "tp=2", "--gen", "tp=4")
    report = json.loads(refit("plan", *layout, "--json").stdout)
    assert 0.999 <= report["bulk_share"] < 1 and report["misc_bytes"] > 0
    ((reason, names),) = report["misc"].items()
    assert names == ["backbone.layers.N.mixer.A_log"] and "the loader stores -exp(A_log)" in reason
    (line,) = (line for line in refit("plan", *layout).stdout.splitlines() if line.startswith("not bulk"))
    assert line == f"not bulk, {reason}: {names[0]}"


@pytest.mark.parametrize("without", [FRAMEWORKS, (*FRAMEWORKS, "rich")], ids=["with rich", "without rich"])
def test_plan_prints_tables_for_people(without):
    done = refit("plan", *LAYOUT, without=without)
    assert done.returncode == 0, done.stderr
    for word in ("bulk", "routes", "lower bound", "busiest link", "predicted", "digest", "Assumes"):
        assert word in done.stdout


def test_explain_draws_both_sides_and_lists_the_routes_of_one_tensor():
    done = refit("explain", "model.layers.3.self_attn.k_proj.weight", *LAYOUT)
    assert done.returncode == 0, done.stderr
    assert "class: bulk" in done.stdout and "####" in done.stdout and "train 0" in done.stdout
    document = json.loads(
        refit("explain", "model.layers.3.self_attn.k_proj.weight", *LAYOUT, "--json").stdout
    )
    assert len(document["routes"]) == 6


def test_simulate_shows_what_a_slow_rank_costs_and_writes_a_picture(tmp_path):
    picture = tmp_path / "timeline.svg"
    even = json.loads(refit("simulate", *LAYOUT, "--json").stdout)
    slow = refit("simulate", *LAYOUT, "--json", "--slow", "gen:1=0.1", "--picture", str(picture))
    report = json.loads(slow.stdout)
    assert report["seconds"] > 1.2 * even["seconds"] and report["straggler"] == "gen 1"
    assert even["bound_s"] <= even["seconds"]
    assert picture.read_text().startswith("<svg")


def test_simulate_names_the_dead_rank_and_says_which_version_serves():
    report = json.loads(
        refit("simulate", *LAYOUT, "--json", "--fail", "train:0=0.01", "--deadline", "5").stdout
    )
    assert report["failure"].startswith("rank 0 died at 0.010 s") and "old version" in report["failure"]
    assert report["seconds"] == pytest.approx(5.01)


def test_a_topology_shows_the_fan_out_inside_nodes_and_without_one_there_is_none():
    assert json.loads(refit("plan", *LAYOUT, "--json").stdout)["fan_out"] is None
    fabric = ("--topology", "ranks_per_node=4,nics_per_node=4")
    report = json.loads(refit("plan", *LAYOUT, "--json", *fabric).stdout)
    assert (
        report["fan_out"]["bound_ratio"] <= 1.05 and report["fan_out"]["predicted_s"] < report["predicted_s"]
    )
    assert "executor moves direct plans only" in refit("plan", *LAYOUT, *fabric).stdout
    direct, two_hops = (
        json.loads(refit("simulate", *LAYOUT, "--json", *fabric, *words).stdout)
        for words in ((), ("--fan-out",))
    )
    assert two_hops["seconds"] < direct["seconds"]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("plan", "--model", "nothing", "--train", "tp=1", "--gen", "tp=1"), "shipped are deepseek-v3"),
        (
            ("plan", "--model", "qwen3-4b", "--train", "tp=5", "--gen", "tp=1"),
            "cannot be cut into 5 equal parts",
        ),
        (("plan", *LAYOUT, "--topology", "nic=4"), "KEY=VALUE with a key out of ranks_per_node"),
        (("plan", *LAYOUT, "--bucket-bytes", "10"), "give at least"),
        (
            ("explain", "model.layers.99.self_attn.k_proj.weight", *LAYOUT),
            "did you mean model.layers.0.self_attn",
        ),
        (("simulate", *LAYOUT, "--slow", "gen:99=0.5"), "with a rank of this plan"),
        (("simulate", *LAYOUT, "--slow", "gen:1=2"), "up to 1, and got 2; use --fail for a dead rank"),
        (("simulate", *LAYOUT, "--slow", "gen:1=1", "--slow", "gen:1=0.5"), "--slow is given twice"),
        (
            ("simulate", *LAYOUT, "--fail", "gen:1=1", "--fail", "gen:1=2"),
            "twice for one rank: 1 and 'gen:1=2'",
        ),
        (("read", "--timeout", "0"), "--timeout: '0' is no limit of a wait; give seconds above 0"),
        (("validate", "--timeout", "inf"), "'inf' is no limit of a wait"),
        (("doctor", "--timeout", "soon"), "'soon' is no limit of a wait"),
        (("simulate", *LAYOUT, "--deadline", "-1"), "--deadline is -1 s; it must be above 0"),
        (("simulate", *LAYOUT, "--fan-out"), "give --topology"),
        (("simulate", *LAYOUT, "--streams", "-3"), "--streams: -3 is below 0"),
        (("plan", *LAYOUT, "--streams", "-3"), "--streams: -3 is below 0"),
        (("simulate", *LAYOUT, "--picture", "/nowhere/at/all.svg"), "name another file"),
        (
            ("plan", "--model", "qwen3-4b", "--train", "tp=-1", "--gen", "tp=1"),
            "tp='-1' must be a whole number from 1 to 9999999",
        ),
        (
            (
                "explain",
                "model.layers.3.mlp.experts.128.up_proj.weight",
                *("--model", "qwen3-30b-a3b", "--train", "tp=1", "--gen", "tp=1"),
            ),
            "the experts of this layer are 0 to 127",
        ),
    ],
)
def test_an_error_ends_with_status_2_and_says_what_to_do(words, remedy):
    done = refit(*words)
    assert done.returncode == 2 and remedy in done.stderr and "Traceback" not in done.stderr


def test_a_config_that_is_no_object_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    done = refit("plan", "--model", str(tmp_path), "--train", "tp=1", "--gen", "tp=1")
    assert done.returncode == 2 and "config.json holds list, not the object" in done.stderr


def test_the_planner_imports_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import refit.plan, refit.plan.simulate, refit.plan.cost,"
        " refit.plan.synth.gen, refit.plan.synth.train, refit.plan.synth.config;"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(tops - set(sys.stdlib_module_names) - {'refit'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_awex_benchmark_runs_tiny_without_awex():
    words = [sys.executable, "benchmarks/plan_vs_awex.py", "--tiny", "--without-awex", "--repeat", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    case = json.loads(done.stdout)["cases"][0]
    assert case.keys() >= {"case", "ours_s", "routes", "send_max_over_mean", "idle_senders"}
    assert case["send_max_over_mean"]["ours"] <= 1.05 and case["idle_senders"]["ours"] == 0


def test_brackets_in_a_table_are_text(capsys):
    show("a[b]", ("x[y]",), [("refit[cpu]",)])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("a[b]", "refit[cpu]"))
