"""Whole refits between real processes over gloo: what arrives, what is reported, what is left untouched."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from refit.plan import PlanOptions, build_plan
from refit.transfer.endpoint import Endpoint, misc_specs
from refit.transfer.protocol import AUTO, GOLDEN, NIXL, P2P, PROCESS_GROUP
from refit.transfer.rendezvous import ControlStore
from tests.processes import Processes
from tests.transfer import coordinator
from tests.transfer.cases import Case, empty_params, fill_params, full_tensor, make_case, same_bits

pytestmark = pytest.mark.processes
NUM_VERSIONS = 3


def refit_rank(rank: int, port: int, runs: list[tuple[str, int, Case, int]]) -> list[int]:
    """One rank's life over several runs of several refits. Returns the peak extra bytes of each refit."""
    peaks = []
    for run_id, seed, case, versions in runs:
        control = ControlStore.join("127.0.0.1", port, run_id)
        manifest = case.manifest(rank)
        endpoint = Endpoint.prepare(control, manifest, 60.0)
        params = empty_params(manifest)
        for version in range(versions):
            if manifest.side == "train":
                fill_params(params, case, manifest, seed, version)
            endpoint.begin(version, version)
            peaks.append(endpoint.move_bulk(params).peak_extra_bytes)
            _misc(endpoint, case, seed, version)
            endpoint.put_report()
            expected = empty_params(manifest)
            fill_params(expected, case, manifest, seed, version)
            for name in expected:
                if _is_bulk(endpoint, manifest, name):
                    assert same_bits(params[name], expected[name]), f"{run_id} version {version} param {name}"
        endpoint.close()
        control.close()
    return peaks


def _is_bulk(endpoint: Endpoint, manifest, param: str) -> bool:
    tensors = {holding.tensor for holding in manifest.holdings if holding.param == param}
    return all(endpoint.plan.tensors[tensor].kind == "bulk" for tensor in tensors)


def _misc(endpoint: Endpoint, case: Case, seed: int, version: int) -> None:
    specs = misc_specs(endpoint.plan)
    stored = {spec.name: spec.dtype for rank in case.train.ranks for spec in rank.tensors}

    def contents(name):
        return full_tensor(specs[name], stored[name], seed, version)

    if endpoint.rank == 0:
        names = list(endpoint.misc_names)
        random.Random(version).shuffle(names)
        endpoint.send_misc((name, contents(name)) for name in names)
    elif endpoint.rank >= endpoint.plan.num_train:
        got = dict(endpoint.receive_misc())
        assert set(got) == set(specs)
        for name, tensor in got.items():
            expected = (
                contents(name).to(tensor.dtype) if stored[name] != specs[name].dtype else contents(name)
            )
            assert same_bits(tensor, expected)


def run_refits(
    runs: list[tuple[str, int, Case, int]],
    bulk_of_run: dict[str, str],
    transport: str = AUTO,
    life: Callable[..., object] = refit_rank,
) -> list[list[int]]:
    case = runs[0][2]
    num_train = len(case.train.ranks)
    host = ControlStore.host()
    with Processes(life, case.num_ranks, (host.port, runs)) as processes:
        for run_id, _, run_case, versions in runs:
            control = host.under(run_id)
            coordinator.prepare(
                control,
                num_train,
                len(case.gen.ranks),
                run_case.options,
                bulk=bulk_of_run[run_id],
                num_streams=2,
                transport=transport,
            )
            for version in range(versions):
                found = coordinator.reports(control, version, case.num_ranks)
                coordinator.require_equal_digests(found, num_train)
                sent = sum(report.bytes_sent for report in found)
                assert sent == sum(report.bytes_received for report in found) > 0
        outcomes = processes.outcomes(60)
    host.close()
    assert all(outcome.returned for outcome in outcomes), "\n".join(
        str(outcome.error) for outcome in outcomes
    )
    return [outcome.value for outcome in outcomes]


def test_p2p_and_golden_leave_exactly_the_planned_bits_over_three_versions():
    runs, modes = [], {}
    for seed in range(8):
        case = make_case(seed)
        for bulk in (P2P, GOLDEN):
            run_id = f"{bulk}-{seed}"
            runs.append((run_id, seed, case, NUM_VERSIONS))
            modes[run_id] = bulk
    run_refits(runs, modes)


def test_three_trainers_feed_three_generators_in_many_small_rounds():
    cases = [make_case(seed, 3, 3, num_tensors=12) for seed in (100, 101, 102)]
    runs = [
        (f"run-{seed}", seed, replace(case, options=replace(case.options, bucket_bytes=4096)), 2)
        for seed, case in enumerate(cases)
    ]
    run_refits(runs, {run_id: P2P for run_id, _, _, _ in runs})


@pytest.mark.parametrize("transport", [PROCESS_GROUP, NIXL])
def test_a_refit_leaves_the_planned_bits_over_three_versions_whatever_carries_bulk(transport):
    runs = [(f"{transport}-{seed}", seed, make_case(seed), NUM_VERSIONS) for seed in (0, 3)]
    golden = (f"{transport}-golden", 4, make_case(4), 1)
    run_refits([*runs, golden], {**{run[0]: P2P for run in runs}, golden[0]: GOLDEN}, transport)


def test_tensors_without_a_whitelist_pattern_go_by_broadcast():
    case = make_case(7, num_tensors=10)
    case = replace(case, options=PlanOptions(8192, 16, (r"t[0-4]\.weight",)))
    assert len(build_plan(case.train, case.gen, case.options).misc_names) == 5
    run_refits([("misc", 7, case, 2)], {"misc": P2P})


def test_extra_memory_is_at_most_two_buckets_per_stream():
    case = make_case(11, num_tensors=6, largest_dim=200)
    bucket_bytes = 16384
    case = replace(case, options=PlanOptions(bucket_bytes, 16, case.options.whitelist))
    for peaks in run_refits([("peak", 11, case, 1)], {"peak": P2P}):
        assert max(peaks) <= 2 * 2 * bucket_bytes
