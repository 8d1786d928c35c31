"""Resident memory during refits: bounded by the buckets, flat over many refits."""

import gc
from pathlib import Path

import pytest
import torch

from refit.plan import Holding, Manifest, ParamSpec, PlanOptions, RankManifest, Region, TensorSpec
from refit.transfer.endpoint import Endpoint
from refit.transfer.protocol import decision_key
from refit.transfer.rendezvous import ControlStore
from tests.processes import Processes
from tests.transfer import coordinator
from tests.transfer.cases import Case

pytestmark = pytest.mark.processes
MIB = 1 << 20
NUM_STREAMS = 2


def column_case(num_tensors: int, rows: int, columns: int, bucket_bytes: int) -> Case:
    """Two trainers cut by rows, two generators by columns: every byte is packed on one end and strided on the other."""
    specs = tuple(TensorSpec(f"t{i}.weight", (rows, columns), "bfloat16") for i in range(num_tensors))

    def rank(side: str, number: int, region: Region, shape: tuple[int, int], stage: int) -> RankManifest:
        params = tuple(ParamSpec(spec.name, shape, "bfloat16") for spec in specs)
        holdings = tuple(Holding(spec.name, region, spec.name, 0, (shape[1], 1)) for spec in specs)
        return RankManifest(side, number, stage, 0, specs, params, holdings, ())

    middle_row, middle_column = rows // 2, columns // 2
    train = tuple(
        rank(
            "train", n, Region((n * middle_row, 0), ((n + 1) * middle_row, columns)), (middle_row, columns), 0
        )
        for n in range(2)
    )
    gen = tuple(
        rank(
            "gen",
            n,
            Region((0, n * middle_column), (rows, (n + 1) * middle_column)),
            (rows, middle_column),
            0,
        )
        for n in range(2)
    )
    options = PlanOptions(bucket_bytes, 16, (r"t\d+\..*",))
    return Case(Manifest("train", train), Manifest("gen", gen), options)


def memory_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measuring_rank(rank: int, port: int, case: Case, num_refits: int) -> tuple[int, int, list[int]]:
    """Peak RSS above the start in the first refit, reported peak, and RSS after each refit."""
    torch.set_num_threads(1)  # on a busy machine thread pools that wait for each other cost minutes
    control = ControlStore.join("127.0.0.1", port, "memory")
    manifest = case.manifest(rank)
    endpoint = Endpoint.prepare(control, manifest, 60.0)
    params = {spec.name: torch.ones(spec.shape, dtype=torch.bfloat16) for spec in manifest.params}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory_bytes("VmRSS")
    peak, reported, resident = 0, 0, []
    for attempt in range(num_refits):
        endpoint.begin(attempt, attempt)
        if manifest.side == "train":
            for number, param in enumerate(params.values()):
                param.fill_(attempt + number)
        reported = endpoint.move_bulk(params).peak_extra_bytes
        if attempt == 0:
            peak = memory_bytes("VmHWM") - before
        endpoint.put_report()
        assert endpoint.decision()[0], "the coordinator found different digests"
        resident.append(memory_bytes("VmRSS"))
    assert all(param[0, 0] == num_refits - 1 + number for number, param in enumerate(params.values()))
    endpoint.close()
    return peak, reported, resident


def refit_often(case: Case, num_refits: int, timeout_s: float) -> list[tuple[int, int, list[int]]]:
    host = ControlStore.host()
    control = host.under("memory")
    with Processes(measuring_rank, 4, (host.port, case, num_refits)) as processes:
        coordinator.prepare(control, 2, 2, case.options, num_streams=NUM_STREAMS, timeout_s=60.0)
        for attempt in range(num_refits):
            coordinator.require_equal_digests(coordinator.reports(control, attempt, 4, 60.0), 2)
            control.put(decision_key(attempt), {"commit": True, "reason": ""})
        outcomes = processes.outcomes(timeout_s)
    host.close()
    assert all(outcome.returned for outcome in outcomes), [outcome.error for outcome in outcomes]
    return [outcome.value for outcome in outcomes]


def test_a_refit_needs_two_buckets_per_stream_and_not_a_copy_of_the_model():
    bucket_bytes = 2 * MIB
    bound = 2 * NUM_STREAMS * bucket_bytes + 64 * MIB
    case = column_case(200, 2048, 2048, bucket_bytes)  # 1.6 GiB in all, 0.8 GiB a side: ten times the bound
    model_bytes = 200 * 2048 * 2048 * 2
    assert model_bytes > 10 * bound
    for peak, reported, _ in refit_often(case, 1, 60.0):
        assert peak <= bound, f"{peak / MIB:.1f} MiB resident, {bound / MIB} allowed"
        assert reported <= 2 * NUM_STREAMS * bucket_bytes


@pytest.mark.slow
def test_memory_stays_flat_over_two_hundred_refits():
    for _, _, resident in refit_often(column_case(20, 512, 512, MIB), 200, 120.0):
        assert resident[-1] <= 1.01 * resident[9], (
            f"{resident[9] / MIB:.1f} MiB grew to {resident[-1] / MIB:.1f} MiB"
        )
