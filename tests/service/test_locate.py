"""Which part of a tensor differs, in words, and the refits of real processes whose record says so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from refit.chaos import model
from refit.chaos.__main__ import a_ray
from refit.chaos.campaign import NUM_TRAINERS, config_of
from refit.chaos.crew import THREADS, Crew
from refit.chaos.faults import Fault
from refit.chaos.parties import PlainReplica
from refit.plan import Region
from refit.service.agreement import Mismatch
from refit.service.coordinator import Coordinator
from refit.service.locate import located
from refit.service.waiting import collect
from refit.transfer.memory import as_bits
from refit.transfer.protocol import slices_key
from refit.transfer.slices import Slice

TIMEOUT_S = 6.0
ROWS = [Region((row, 0), (row + 1, 4)) for row in range(12)]


def parts_of(digests: dict[int, int], source: int = 0) -> list[Slice]:
    """What joint rank 2 gets of "t", by row."""
    return [Slice("t", source, 2, ROWS[row], value) for row, value in digests.items()]


def mismatch_of(sent: list[Slice], held: list[Slice]) -> Mismatch:
    """Generator rank 0 is joint rank 2 behind two trainers."""
    sums = [f"{sum(part.digest for part in parts) % 2**64:016x}" for parts in (sent, held)]
    return Mismatch("t", 0, *sums)


def words(sent: list[Slice], held: list[Slice]) -> str:
    (found,) = located(2, [mismatch_of(sent, held)], sent, held)
    return found.parts


def test_parts_that_differ_are_named_with_their_sender_and_neighbours_are_joined() -> None:
    sent = parts_of({0: 1, 1: 2, 2: 3, 5: 4}) + parts_of({7: 5, 8: 2**64 - 1}, source=1)
    held = parts_of({0: 1, 1: 9, 2: 9, 5: 9}) + parts_of({7: 6, 8: 2**64 - 1}, source=1)
    assert words(sent, held) == (
        "[1:3, 0:4] from train rank 0, [5:6, 0:4] from train rank 0, [7:8, 0:4] from train rank 1"
    )
    (found,) = located(2, [mismatch_of(sent, held)], sent, held)
    assert str(found).endswith(": they differ in " + found.parts)


def test_of_many_parts_that_differ_three_are_named_and_the_others_counted() -> None:
    sent, held = parts_of(dict.fromkeys(range(0, 12, 2), 1)), parts_of(dict.fromkeys(range(0, 12, 2), 2))
    assert words(sent, held).endswith("[4:5, 0:4] from train rank 0 and 3 more boxes")


def test_a_part_that_only_one_end_has_differs() -> None:
    assert words(parts_of({0: 1, 1: 2}), parts_of({0: 1})) == "[1:2, 0:4] from train rank 0"


def test_of_a_tensor_that_is_kept_twice_the_copy_that_differs_shows() -> None:
    sent = parts_of({0: 1, 1: 2}) * 2
    assert words(sent, [*parts_of({0: 1, 1: 2}), *parts_of({0: 1, 1: 3})]) == "[1:2, 0:4] from train rank 0"


@pytest.mark.parametrize("changed", ["sent", "held"])
def test_nothing_is_said_of_an_end_that_no_longer_holds_what_it_reported(changed: str) -> None:
    sent, held = parts_of({0: 1, 1: 2}), parts_of({0: 1, 1: 3})
    wrong = mismatch_of(sent, held)
    now = parts_of({0: 8, 1: 8})
    (found,) = located(2, [wrong], now if changed == "sent" else sent, now if changed == "held" else held)
    assert found.parts == "" and "differ in" not in str(found)


@pytest.mark.parametrize("sides", [("0a", None), (None, "0a")])
def test_nothing_is_said_where_one_side_reported_nothing(sides: tuple[str | None, str | None]) -> None:
    parts = parts_of({0: 10})
    (found,) = located(2, [Mismatch("t", 0, *sides)], parts, parts)
    assert found.parts == ""


class Watched(PlainReplica):
    """It notes what it staged wrong, element by element, and whether it said what it holds in parts."""

    def __init__(self, replica: int, log_path: str, notes: str) -> None:
        super().__init__(replica, log_path)
        self._notes = Path(notes)

    def finish(self, version, attempt):
        wrong = []
        for name, held in (self._staging or {}).items():
            differs = as_bits(held) != as_bits(model.weight(name, version))
            wrong += [[name, at] for at in differs.nonzero().tolist()]
        answer = super().finish(version, attempt)
        rank = self._ready().rank
        said = self._control.peek(slices_key(attempt, rank)) is not None
        with self._notes.open("a") as notes:
            notes.write(json.dumps({"version": version, "rank": rank, "wrong": wrong, "said": said}) + "\n")
        return answer


class WatchedCrew(Crew):
    def __init__(self, num_replicas: int, folder: Path) -> None:
        self.notes = folder / "notes.jsonl"
        super().__init__(NUM_TRAINERS, num_replicas, folder)

    def _replica(self, number):
        log = str(self._logs / f"gen-{number}.log")
        return self._actor(Watched, THREADS, number, log, str(self.notes))

    def taken(self) -> list[dict]:
        return [json.loads(line) for line in self.notes.read_text().splitlines()]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(coordinator, crew) of two trainers and two replicas."""
    config = config_of(2, TIMEOUT_S)
    with a_ray(config):
        crew = WatchedCrew(2, tmp_path_factory.mktemp("locate"))
        coordinator = Coordinator.prepare(config, crew.trainers, crew.generators, crew)
        yield coordinator, crew
        coordinator.close()


@pytest.mark.ray
@pytest.mark.processes
@pytest.mark.parametrize("role", ["generator", "trainer"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_byte_that_changed_on_the_wire_is_named_by_region_and_sender(job, tmp_path, role, number) -> None:
    coordinator, crew = job
    crew.notes.write_text("")
    crew.arm(Fault(role, number, "round", "corrupt"), tmp_path / "mark")
    version = coordinator.version + 1
    record = coordinator.refit(version)
    assert (tmp_path / "mark").exists() and record.committed, "the attempt after it went well"
    (incident,) = [words for words in record.incidents if words.startswith("discarded")]
    ((rank, name, index),) = [
        (note["rank"], name, index) for note in crew.taken() for name, index in note["wrong"]
    ]
    found = re.search(
        r"(\S+) on gen rank (\d+) .*: they differ in \[(.*?)\] from train rank (\d+)$", incident
    )
    assert found, incident
    spans = [tuple(map(int, span.split(":"))) for span in found[3].split(", ")]
    assert (found[1], int(found[2])) == (name, rank - NUM_TRAINERS)
    assert int(found[4]) == model.stage_of(name, NUM_TRAINERS)
    assert all(start <= at < stop for at, (start, stop) in zip(index, spans, strict=True))
    sizes = [stop - start for start, stop in spans]
    assert sizes[0] * sizes[1] <= 128, f"{spans} of {model.shapes()[name]}"
    assert [note["rank"] for note in crew.taken() if note["said"]] == [rank], "only who differs says a part"
    assert set(coordinator.states().values()) == {f"serving({version})"}


@pytest.mark.ray
@pytest.mark.processes
def test_refits_whose_digests_agree_say_nothing_of_parts(job) -> None:
    coordinator, crew = job
    crew.notes.write_text("")
    for _ in range(2):
        record = coordinator.refit(coordinator.version + 1)
        assert record.committed and record.incidents == ()
    assert len(crew.taken()) == 4 and not any(note["said"] for note in crew.taken())


def cannot_say(actor) -> None:
    """In a trainer's process: the next time that it is asked for parts, it fails."""
    endpoint = actor._ready()

    def fails(*_):
        del endpoint.slices
        raise MemoryError("no room for parts")

    endpoint.slices = fails


@pytest.mark.ray
@pytest.mark.processes
def test_a_trainer_that_cannot_say_what_it_holds_costs_the_words_and_nothing_else(job, tmp_path) -> None:
    coordinator, crew = job
    collect({"train rank 0": crew.trainers[0].__ray_call__.remote(cannot_say)}, "break", 60.0)
    crew.arm(Fault("generator", 0, "round", "corrupt"), tmp_path / "mark")
    version = coordinator.version + 1
    record = coordinator.refit(version)
    why, discarded = record.incidents
    assert record.committed and "no room for parts" in why
    assert "the generator holds" in discarded and "differ in" not in discarded
    assert set(coordinator.states().values()) == {f"serving({version})"}
    assert coordinator.refit(version + 1).committed
