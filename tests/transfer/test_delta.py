"""Delta refits between real processes: the bits of a full refit, few bytes on the wire, and never a wrong base."""

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from refit.plan import build_plan
from refit.service.agreement import mismatches_of
from refit.transfer.delta.base import Base
from refit.transfer.delta.mover import MOST_BUCKETS
from refit.transfer.endpoint import Endpoint
from refit.transfer.errors import TransportError
from refit.transfer.memory import as_bits, strided_box
from refit.transfer.protocol import GOLDEN, NIXL, P2P, PROCESS_GROUP, TCP, Inputs, RefitReport
from refit.transfer.rendezvous import ControlStore
from tests.processes import Processes
from tests.transfer import coordinator
from tests.transfer.cases import Case, empty_params, few_changes, fill_params, make_case, same_bits
from tests.transfer.test_memory_bound import column_case, memory_bytes

pytestmark = pytest.mark.processes
SEED = 11
OTHER_FORMS = [(transport, seed) for transport in (PROCESS_GROUP, TCP, NIXL) for seed in range(1, 6)]
NUM_TRAIN, NUM_GEN = 2, 2
NUM_STREAMS = 2


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt: of this version, decided like this. The rank `tampered` has a wrong base."""

    version: int
    commit: bool = True
    tampered: int | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """Attempts under one run id. The ranks of `fresh` come new, as a replaced process does; the others keep bases."""

    run_id: str
    attempts: tuple[Attempt, ...]
    fresh: tuple[int, ...] = ()


def life(rank: int, port: int, case: Case, sessions: tuple[Session, ...]) -> None:
    """One rank: everything that a generator takes over is compared with a full refit, bit for bit."""
    torch.set_num_threads(1)  # on a busy machine thread pools that wait for each other cost minutes
    manifest = case.manifest(rank)
    base, live = Base(), empty_params(manifest)
    for session in sessions:
        base = Base() if rank in session.fresh else base
        control = ControlStore.join("127.0.0.1", port, session.run_id)
        endpoint = Endpoint.prepare(control, manifest, 60.0, base=base)
        for number, attempt in enumerate(session.attempts):
            params = live if manifest.side == "train" else empty_params(manifest)  # a staging is new memory
            if manifest.side == "train":
                fill_params(params, case, manifest, SEED, attempt.version, few_changes)
            if attempt.tampered == rank:
                tamper(base, manifest, params)
            endpoint.begin(attempt.version, number)
            endpoint.move_bulk(params)
            endpoint.put_report()
            if manifest.side == "gen" and endpoint.decision()[0]:
                expected = empty_params(manifest)
                fill_params(expected, case, manifest, SEED, attempt.version, few_changes)
                assert all(same_bits(params[name], expected[name]) for name in expected)
                endpoint.committed()
        endpoint.close()
        control.close()


def tamper(base, manifest, params):
    """In the first holding: a generator's base is off by a bit, a trainer's claims that the new state was sent before.

    (What a trainer's base has wrong in any other way is sent as a change too many, and does no harm.)
    """
    holding = manifest.holdings[0]
    kept, param = base.params[holding.param], params[holding.param]
    if manifest.side == "train":
        kept.copy_(param)
    else:
        box = strided_box(kept, holding.region.shape, holding.strides, holding.offset)
        as_bits(box).view(-1)[0].bitwise_xor_(1)


def lead(case: Case, sessions: tuple[Session, ...], transport: str = TCP) -> list[list[list[RefitReport]]]:
    """Reports by session, attempt and joint rank. A tampered attempt is discarded; see that only it differs."""
    host = ControlStore.host()
    found: list[list[list[RefitReport]]] = []
    plan = build_plan(case.train, case.gen, case.options)
    with Processes(life, case.num_ranks, (host.port, case, sessions)) as processes:
        for session in sessions:
            control = host.under(session.run_id)
            coordinator.prepare(
                control,
                NUM_TRAIN,
                NUM_GEN,
                case.options,
                num_streams=NUM_STREAMS,
                transport=transport,
                delta=True,
            )
            found.append([])
            for number, attempt in enumerate(session.attempts):
                reports = coordinator.reports(control, number, case.num_ranks)
                wrong = mismatches_of(plan, {rank: report.message() for rank, report in enumerate(reports)})
                if attempt.tampered is None:
                    assert not wrong
                else:
                    name = case.manifest(attempt.tampered).holdings[0].tensor
                    assert {mismatch.tensor for mismatch in wrong} == {name}
                coordinator.decide(control, number, attempt.commit and not wrong)
                found[-1].append(reports)
        outcomes = processes.outcomes(60)
    host.close()
    assert all(o.returned for o in outcomes), "\n".join(str(o.error) for o in outcomes)
    return found


def shares(reports):
    """By generator: bytes on the wire over bytes of the plan."""
    return [report.wire_bytes_received / report.bytes_received for report in reports[NUM_TRAIN:]]


def sent_share(reports):
    return sum(r.wire_bytes_sent for r in reports) / sum(r.bytes_sent for r in reports)


def versions(*numbers):
    return tuple(Attempt(number) for number in numbers)


@pytest.fixture(scope="module")
def story():
    """One job over TCP; each test that asks for it looks at a part. Reports by session and attempt."""
    before = (*versions(1, 2, 3, 3), Attempt(4, commit=False), *versions(5, 6))
    wrong = (
        Attempt(7, tampered=0),
        Attempt(8),
        Attempt(9),
        Attempt(10, tampered=NUM_TRAIN),
        *versions(11, 12),
    )
    return lead(
        column_case(4, 256, 512, 1 << 18),
        (
            Session("first", (*before, *wrong)),
            Session("new-generator", versions(13, 14), fresh=(NUM_TRAIN,)),
            Session("new-trainers", versions(15, 16), fresh=(0, 1)),
        ),
    )


def test_refits_of_few_changes_leave_all_bits_and_send_few(story):
    full, second, third, unchanged = map(sent_share, story[0][:4])
    assert 1 <= full < 1.01
    assert (
        second < 0.05 and third < 0.05
    )  # two elements in a hundred, of two bytes, and a byte or two for the place of each
    assert unchanged < 0.001
    for reports in story[0]:
        assert sum(r.wire_bytes_sent for r in reports) == sum(r.wire_bytes_received for r in reports)
        assert (
            sum(r.bytes_sent for r in reports) == sum(r.bytes_received for r in reports) == 4 * 256 * 512 * 2
        )


def test_after_a_discard_the_next_attempt_is_sent_whole(story):
    discarded, whole, after = map(sent_share, story[0][4:7])
    assert discarded < 0.05 and after < 0.05
    assert whole >= 1


def test_a_wrong_base_on_either_side_is_caught_by_the_digest_of_its_tensor_and_mended_by_a_full_refit(story):
    of_trainer, of_generator = map(sent_share, (story[0][7], story[0][10]))
    assert 0 < of_trainer < 0.05 and 0 < of_generator < 0.05  # deltas; `lead` has seen which tensor differs
    for mended, after in (story[0][8:10], story[0][11:13]):
        assert min(shares(mended)) >= 1 and max(shares(after)) < 0.05


def test_a_replaced_generator_is_sent_everything_and_the_others_what_changed(story):
    new, old = shares(story[1][0])
    assert new >= 1 and old < 0.05
    assert max(shares(story[1][1])) < 0.05


def test_new_trainers_send_everything(story):
    assert min(shares(story[2][0])) >= 1 and max(shares(story[2][1])) < 0.05


@pytest.mark.parametrize(
    ("transport", "seed"),
    [
        (PROCESS_GROUP, 0),
        *[
            pytest.param(way, seed, marks=pytest.mark.slow)
            for way in (PROCESS_GROUP, TCP, NIXL)
            for seed in range(1, 6)
        ],
    ],
)
def test_layouts_of_every_form_keep_their_bits_over_three_deltas_whatever_carries_them(transport, seed):
    lead(make_case(seed, NUM_TRAIN, NUM_GEN), (Session(f"forms-{seed}", versions(1, 2, 3)),), transport)


def measuring(rank: int, port: int, case: Case) -> tuple[int, int, int]:
    """Of a refit of few changes: peak RSS above its start, reported peak, bytes of the base."""
    torch.set_num_threads(1)
    manifest, base = case.manifest(rank), Base()
    control = ControlStore.join("127.0.0.1", port, "memory")
    endpoint = Endpoint.prepare(control, manifest, 60.0, base=base)
    params = {spec.name: torch.ones(spec.shape, dtype=torch.bfloat16) for spec in manifest.params}
    for attempt in range(2):
        if manifest.side == "train":
            for param in params.values():
                param[::10] += attempt  # a tenth of all rows
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = memory_bytes("VmRSS")
        endpoint.begin(attempt, attempt)
        reported = endpoint.move_bulk(params).peak_extra_bytes
        peak = memory_bytes("VmHWM") - before
        endpoint.put_report()
        if manifest.side == "gen":
            assert endpoint.decision()[0]
            endpoint.committed()
    endpoint.close()
    return peak, reported, base.num_bytes


@pytest.mark.slow
def test_extra_memory_is_a_copy_of_the_params_and_at_most_five_buckets_per_stream():
    mib = 1 << 20
    case = column_case(40, 2048, 2048, 2 * mib)
    bound = MOST_BUCKETS * NUM_STREAMS * case.options.bucket_bytes
    host = ControlStore.host()
    control = host.under("memory")
    with Processes(measuring, 4, (host.port, case)) as processes:
        coordinator.prepare(control, 2, 2, case.options, num_streams=NUM_STREAMS, delta=True)
        for attempt in range(2):
            found = coordinator.reports(control, attempt, 4)
            coordinator.require_equal_digests(found, 2)
            coordinator.decide(control, attempt, True)
        outcomes = processes.outcomes(60)
    host.close()
    assert all(outcome.returned for outcome in outcomes), [outcome.error for outcome in outcomes]
    assert sent_share(found) < 0.2
    for peak, reported, base_bytes in (outcome.value for outcome in outcomes):
        assert base_bytes == 40 * 2048 * 1024 * 2
        assert 0 < reported <= bound
        assert peak <= bound + 48 * mib < base_bytes, f"{peak / mib:.1f} MiB resident, {bound / mib} allowed"


def test_a_base_is_dropped_where_other_tensors_become_bulk():
    case = make_case(3, NUM_TRAIN, NUM_GEN)
    plan = build_plan(case.train, case.gen, case.options)
    base, manifest = Base(), case.manifest(0)
    base.fit(manifest, plan)
    base.begin(empty_params(manifest))
    base.end(empty_params(manifest), b"v" * 16)
    base.fit(manifest, plan)
    assert base.token == b"v" * 16 and base.num_bytes > 0
    fewer = replace(case.options, whitelist=(r"t[0-3]\..*",))
    base.fit(manifest, build_plan(case.train, case.gen, fewer))
    assert base.token == bytes(16) and base.num_bytes == 0


def test_a_generator_has_no_base_from_the_start_of_a_move_to_its_commit():
    case = make_case(3, NUM_TRAIN, NUM_GEN)
    base, manifest = Base(), case.manifest(NUM_TRAIN)
    params = empty_params(manifest)
    base.fit(manifest, build_plan(case.train, case.gen, case.options))
    for token in (b"1" * 16, b"2" * 16):
        base.begin(params)
        assert base.token == bytes(16)
        base.end(params, token)
        assert base.token == bytes(16)
        base.committed()
        assert base.token == token
    assert base.begin({name: torch.empty(1) for name in params}) == bytes(16)  # memory of another form


def test_golden_and_delta_exclude_each_other():
    case = make_case(0)
    with pytest.raises(TransportError, match="delta needs bulk 'p2p', got 'golden'"):
        Inputs(case.train, case.gen, case.options, "gloo", GOLDEN, 1, 1.0, "", delta=True)
    assert Inputs(case.train, case.gen, case.options, "gloo", P2P, 1, 1.0, "", delta=True).delta
