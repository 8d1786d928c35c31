"""`read` and `diff` from the command line, of a job whose engines are memory of this process behind real desks."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.read_back import MemoryRanks, make_model, plant, write_checkpoint
from refit import cli
from refit.gen_side.live import desk as desk_module
from refit.gen_side.live.desk import Desk
from refit.service import access
from refit.service.access import JobAddress, job_reader
from refit.service.reader import JobEngine, Reader
from refit.service.trainer_weights import TrainerDesk
from refit.transfer.errors import TransportError
from refit.transfer.rendezvous import ControlStore
from tests.service.test_reader import DENSE

EMBEDDING = "model.embed_tokens.weight"
SECONDS = 30.0


@pytest.fixture
def job(tmp_path):
    """(run folder, canonical tensors, the engines' ranks, the job's store) of a job with two engines, TP2 and TP1."""
    control = ControlStore.host(run_id="job")
    _, tensors = make_model(DENSE, "tp=2")
    ranks = [MemoryRanks(make_model(DENSE, "tp=2")[0], tensors) for _ in range(2)]
    store = f"127.0.0.1:{control.port}"
    desks = [
        Desk(store, place, lambda info, one=one: one.ask(info, SECONDS)) for place, one in enumerate(ranks)
    ]
    JobAddress(store, 2, 2).write(tmp_path)
    assert all(desk.attending.wait(SECONDS) for desk in desks)
    yield tmp_path, tensors, ranks, control
    for desk in desks:
        desk.close()
        desk.join(SECONDS)
        assert not desk.is_alive()
    for one in ranks:
        one.close()
    control.close()


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_rows_are_printed_and_written(job, capsys, tmp_path):
    folder, tensors, _, _ = job
    out = tmp_path / "rows.safetensors"
    code, text, _ = run(capsys, "read", f"{EMBEDDING}[256:258]", "--run-dir", folder, "--out", out, "--json")
    assert code == 0 and "bfloat16 [2, 64], version 1, from ranks [1] (plain)" in text
    assert torch.equal(load_file(out)[EMBEDDING], tensors[EMBEDDING][256:258])
    line = json.loads(text.splitlines()[-1])
    assert [float(value) for value in line["values"]] == tensors[EMBEDDING][
        256:258
    ].double().flatten().tolist()
    code, text, _ = run(capsys, "read", "model.norm.weight", "--run-dir", folder, "--engine", 1)
    assert code == 0 and "[64], version 1, from ranks [0]" in text and "1 others agree" in text


def test_without_a_name_all_that_the_engine_holds_is_listed(job, capsys):
    folder, tensors, _, _ = job
    code, text, _ = run(capsys, "read", "--run-dir", folder, "--json")
    assert code == 0 and f"{EMBEDDING}  bfloat16 [259, 64]\n" in text
    assert f"engine 0: {len(tensors)} tensors on 2 ranks, 0 not readable" in text
    assert set(json.loads(text.splitlines()[-1])["tensors"]) == set(tensors)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([f"{EMBEDDING}[259]"], 2, "row 259 of model.embed_tokens.weight is padding"),
        (["model.embed.weight"], 2, "the nearest of its"),
        ([EMBEDDING, "--engine", "2"], 2, "engine 2 is not there: the job has engines 0 to 1"),
        ([EMBEDDING, "--version", "9"], 1, "serves version 1, version 9 was asked for"),
        ([EMBEDDING, "--dequantize"], 2, "not stored quantized"),
    ],
)
def test_what_cannot_be_read_is_said(job, capsys, words, code, message):
    found = run(capsys, "read", *words, "--run-dir", job[0])
    assert found[0] == code and message in found[2]


def test_without_a_job_the_way_out_is_said(capsys, tmp_path):
    code, _, words = run(capsys, "read", EMBEDDING, "--run-dir", tmp_path)
    assert code == 2 and "no job runs in" in words and "--server" in words
    JobAddress("127.0.0.1:9", 1, 1).write(tmp_path)  # a job that was killed leaves its file
    code, _, words = run(capsys, "read", EMBEDDING, "--run-dir", tmp_path)
    assert code == 1 and "no control store answers at 127.0.0.1:9: that job has ended" in words
    for text in ('{"store": "127.0', '{"stores": 1}', "7"):
        (tmp_path / access.FILE).write_text(text)
        code, _, words = run(capsys, "read", EMBEDDING, "--run-dir", tmp_path)
        assert code == 2 and f"{access.FILE} is not what a job of this version writes" in words, text


def test_the_only_job_that_runs_is_meant_where_none_is_named(job, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, words = run(capsys, "read", EMBEDDING)
    assert code == 2 and f"no job runs in a folder of {tmp_path / 'runs'}; give --run-dir" in words
    for name in ("killed", "first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    JobAddress("127.0.0.1:9", 1, 1).write(tmp_path / "runs" / "killed")
    JobAddress.of(job[0]).write(tmp_path / "runs" / "first")
    code, text, _ = run(capsys, "read", "model.norm.weight")
    assert code == 0 and "[64], version 1" in text
    assert run(capsys, "diff", "engine:0", "engine:1", "--only", "*.norm.*")[0] == 0
    JobAddress.of(job[0]).write(tmp_path / "runs" / "second")
    code, _, words = run(capsys, "read", EMBEDDING)
    assert code == 2 and "2 jobs run, in runs/first, runs/second; give --run-dir of one" in words


def test_diff_names_tensor_index_and_rank_and_its_exit_code_tells(job, capsys):
    folder, tensors, ranks, _ = job
    checkpoint = write_checkpoint(tensors, folder / "model")
    assert run(capsys, "diff", checkpoint, "engine:0", "--run-dir", folder)[0] == 0
    index = plant(ranks[1], "model.layers.1.mlp.up_proj.weight", 1, 77)
    code, text, _ = run(capsys, "diff", "engine:0", "engine:1", "--run-dir", folder, "--json")
    assert code == 1
    (found,) = json.loads(text.splitlines()[-1])["differences"]
    assert (found["name"], tuple(found["index"])) == ("model.layers.1.mlp.up_proj.weight", index)
    assert found["right"] == "engine 1 rank 1" and found["text"] in text
    assert run(capsys, "diff", "engine:0", "engine:1", "--run-dir", folder, "--only", "*.norm.*")[0] == 0
    assert run(capsys, "diff", checkpoint, checkpoint, "--strict")[0] == 0
    part = write_checkpoint({EMBEDDING: tensors[EMBEDDING]}, folder / "part")
    code, text, _ = run(capsys, "diff", checkpoint, part)
    assert code == 0 and f"not compared: lm_head.weight: only {checkpoint} has it" in text
    assert run(capsys, "diff", checkpoint, part, "--strict")[0] == 1


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (["engine:x", "engine:0"], "names no engine"),
        (["nowhere", "engine:0"], "is no side"),
        (["trainers", "nowhere"], "trainers are compared with an engine of their job"),
    ],
)
def test_a_side_that_is_none_is_refused(job, capsys, sides, message):
    code, _, words = run(capsys, "diff", *sides, "--run-dir", job[0])
    assert code == 2 and message in words


def test_a_desk_survives_readers_that_die_and_asks_that_fail(job, monkeypatch):
    monkeypatch.setattr(desk_module, "LATE_S", 0.5)
    folder, tensors, ranks, control = job
    desk = control.under("desk")
    desk.count("asks/0", 1)  # a reader that counted and died before it put its ask
    ask = ranks[0].ask

    def failing(info, timeout_s):
        raise TransportError("there was no turn")

    ranks[0].ask = failing
    with pytest.raises(
        TransportError, match="engine 0 could not be asked: TransportError: there was no turn"
    ):
        Reader(JobEngine(control, 0, 2), control, SECONDS).read(EMBEDDING, 0)
    ranks[0].ask = ask
    with job_reader(folder) as reader:
        assert torch.equal(reader.read(EMBEDDING, 3).tensor, tensors[EMBEDDING][3:4])


def test_an_engine_without_a_desk_costs_the_time_limit_and_is_named(job):
    with pytest.raises(TransportError, match="done/7/1"):
        Reader(JobEngine(job[3], 7, 2), job[3], 0.3).read(EMBEDDING, 0)


def test_a_diff_that_fails_is_told_to_who_asked_and_the_next_one_is_taken(job):
    control = job[3]
    desk = TrainerDesk(control, {}, SECONDS)
    asked = control.under("desk")
    for number in (1, 2):
        asked.count("asks/trainer", 1)
        asked.put(f"ask/trainer/{number}", {"place": "none", "pattern": "*"})
        desk.serve(None, 2)
        assert "ValueError" in asked.get(f"done/trainer/{number}", SECONDS)["error"]
    desk.serve(None, 2)  # nothing new
    assert asked.peek("done/trainer/3") is None
