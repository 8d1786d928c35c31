"""Parcels of real plans through the kernels' boundary, under the interpreter, against torch views and digests."""

import importlib
import threading
import time

import pytest
import torch

from refit.plan import build_plan
from refit.transfer import bulk, compiled
from refit.transfer.compiled import compile_stage
from refit.transfer.digest import MASK, digest
from refit.transfer.groups import Group
from refit.transfer.kernels import parcel as kernel_parcel
from refit.transfer.kernels.parcel import Params
from refit.transfer.memory import copy_cast, strided_box, torch_dtype
from refit.transfer.runs import Runs
from refit.transfer.transports.in_memory import InMemoryNetwork
from refit.transfer.weighing import ParcelWeighing
from tests.transfer.cases import empty_params, fill_params, make_case, same_bits
from tests.transfer.interpreted import interpreted_kernels
from tests.transfer.test_transports import at_once

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made():
    with interpreted_kernels():
        yield importlib.reload(kernel_parcel)
    importlib.reload(kernel_parcel)


def addresses(params: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.tensor([param.data_ptr() for param in params.values()])


def parcels_of(seed: int, rank: int):
    """Segments of every bucket that a rank sends in a generated case, and its filled params."""
    case = make_case(seed, num_tensors=5, largest_dim=16)
    plan = build_plan(case.train, case.gen, case.options)
    manifest = case.manifest(rank)
    params = empty_params(manifest)
    fill_params(params, case, manifest, seed, 1)
    rounds = [round_ for stage in plan.rank_plan(rank).stages for round_ in stage.rounds]
    return plan, params, [bucket for round_ in rounds for bucket in round_.sends]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rank_of_a_real_plan_packs_unpacks_and_weighs_what_torch_does(made, seed):
    plan, params, buckets = parcels_of(seed, 0)
    names = list(params)
    known = Params({name: i for i, name in enumerate(names)}, {name: params[name].dtype for name in names})
    bases = made.bases_of(addresses(params), CPU)
    assert bases is not None
    for bucket in buckets:
        indexes = range(len(bucket.segments))
        kernels = made.ParcelKernels.of(bucket.segments, 0, known, indexes, CPU, is_direct=False)
        payload = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        kernels.copy(bases, payload, is_pack=True)
        sums = torch.zeros(len(bucket.segments), dtype=torch.int64)
        kernels.add_digests(bases, payload, sums)
        for segment, found in zip(bucket.segments, sums.tolist(), strict=True):
            box = strided_box(params[segment.param], segment.shape, segment.strides, segment.offset)
            wired = torch.empty(segment.shape, dtype=torch_dtype(segment.wire_dtype))
            copy_cast(wired, box)
            packed = payload[segment.start_byte :][: wired.numel() * wired.itemsize]
            assert torch.equal(packed, wired.reshape(-1).view(torch.uint8))
            wanted = digest(wired, segment.region, plan.tensors[segment.tensor].shape)
            assert found & MASK == wanted


def test_unpacking_what_was_packed_restores_exactly_the_boxes(made):
    _, params, buckets = parcels_of(3, 0)
    names = list(params)
    known = Params({name: i for i, name in enumerate(names)}, {name: params[name].dtype for name in names})
    bucket = max(buckets, key=lambda one: one.num_bytes)
    kernels = made.ParcelKernels.of(
        bucket.segments, 0, known, range(len(bucket.segments)), CPU, is_direct=False
    )
    payload = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    kernels.copy(made.bases_of(addresses(params), CPU), payload, is_pack=True)
    wiped = {name: torch.zeros_like(param) for name, param in params.items()}
    kernels.copy(made.bases_of(addresses(wiped), CPU), payload, is_pack=False)
    expected = {name: torch.zeros_like(param) for name, param in params.items()}
    for segment in bucket.segments:
        place = (segment.shape, segment.strides, segment.offset)
        wire = strided_box(params[segment.param], *place).to(torch_dtype(segment.wire_dtype))
        copy_cast(strided_box(expected[segment.param], *place), wire)
    for name in names:
        assert same_bits(wiped[name], expected[name])


def test_a_direct_parcel_is_weighed_where_it_lies_and_never_packed(made):
    plan, params, buckets = parcels_of(1, 0)
    names = list(params)
    known = Params({name: i for i, name in enumerate(names)}, {name: params[name].dtype for name in names})
    segment = next(
        one
        for bucket in buckets
        for one in bucket.segments
        if str(params[one.param].dtype).endswith(one.wire_dtype)
    )
    kernels = made.ParcelKernels.of([segment], segment.start_byte, known, [0], CPU, is_direct=True)
    payload = torch.full((8,), 7, dtype=torch.uint8)
    bases = made.bases_of(addresses(params), CPU)
    kernels.copy(bases, payload, is_pack=True)
    assert payload.tolist() == [7] * 8
    sums = torch.zeros(1, dtype=torch.int64)
    kernels.add_digests(bases, payload, sums)
    box = strided_box(params[segment.param], segment.shape, segment.strides, segment.offset)
    assert int(sums) & MASK == digest(box, segment.region, plan.tensors[segment.tensor].shape)


def test_params_that_are_not_aligned_are_left_to_torch(made):
    assert made.bases_of(addresses({"a": torch.zeros(8), "b": torch.zeros(8)[1:]}), CPU) is None


def one_at_a_time(call, lock: threading.Lock):
    def locked(*args):
        with lock:
            return call(*args)

    return locked


def move(rank: int, case, plan, network: InMemoryNetwork, params, seed: int):
    manifest = case.manifest(rank)
    dtypes = {spec.name: spec.dtype for spec in manifest.params}
    reports = []
    for stage in plan.rank_plan(rank).stages:
        made = compile_stage(plan, stage, rank, dtypes, CPU)
        group = Group("stage", stage.group_ranks, rank, network.transport(rank))
        job = bulk.StageJob(plan, made, rank, params, group, time.monotonic() + 60, CPU)
        assert made.has_kernels
        reports.append(bulk.move_stage(job))
    return reports


def test_a_whole_transfer_by_kernels_leaves_the_planned_bits_and_equal_digests(made, monkeypatch):
    monkeypatch.setattr(compiled, "kernels_run_on", lambda device: True)
    lock = threading.Lock()  # Triton's interpreter is not for several threads
    for name in ("pack", "unpack", "add_digests"):
        monkeypatch.setattr(made.triton_bucket, name, one_at_a_time(getattr(made.triton_bucket, name), lock))
    monkeypatch.setattr(Runs, "copy", None)
    monkeypatch.setattr(ParcelWeighing, "add", None)
    seed = 6
    case = make_case(seed, 1, 1, num_tensors=4, largest_dim=12)
    plan = build_plan(case.train, case.gen, case.options)
    network = InMemoryNetwork((0, 1))
    params = {rank: empty_params(case.manifest(rank)) for rank in (0, 1)}
    fill_params(params[0], case, case.manifest(0), seed, 1)
    sent, held = at_once(
        [lambda rank=rank: move(rank, case, plan, network, params[rank], seed) for rank in (0, 1)]
    )
    expected = empty_params(case.manifest(1))
    fill_params(expected, case, case.manifest(1), seed, 1)
    for name, param in expected.items():
        assert same_bits(params[1][name], param)
    assert [report.digests for report in sent] == [report.digests for report in held]
    assert sum(report.bytes_received for report in held) > 0
