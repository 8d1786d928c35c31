"""The m2n back end as far as a CPU goes: every limit is refused by name, and descriptors are what the package takes."""

import pytest
import torch
from torch.distributed.tensor.placement_types import Replicate, Shard

from refit.plan import PlanError
from refit.transfer.m2n import Descriptor, import_m2n, require_m2n
from refit.transfer.placements import Layout
from refit.transfer.rendezvous import ControlStore
from refit.transfer.xferdtensor import xferdtensor
from tests.processes import run_processes
from tests.transfer.test_xferdtensor import _group

SHAPE = (48, 32)
ROWS = Layout((0, 1), (2,), (0,))
COLUMNS = Layout((2, 3, 4, 5), (2, 2), (None, 1))


def test_what_m2n_can_do_passes():
    require_m2n(SHAPE, ROWS, "bfloat16", COLUMNS, "bfloat16")
    require_m2n(SHAPE, Layout((0,), (1,), (None,)), "uint8", Layout((1, 2), (2,), (None,)), "uint8")
    require_m2n((64,), Layout(tuple(range(16)), (16,), (0,)), "float32", Layout((16,), (1,), (0,)), "float32")


@pytest.mark.parametrize(
    ("changes", "limit", "fact"),
    [
        ({"shape": (2, 2, 2, 2)}, "tensor rank", "4 dims"),
        ({"dst_dtype": "float32"}, "no casts", "bfloat16, the destination float32"),
        ({"src_dtype": "int16", "dst_dtype": "int16"}, "dtypes", "int16"),
        ({"src": Layout((0, 1), (1, 2, 1), (None, 0, None))}, "mesh axes", "(1, 2, 1)"),
        ({"src": Layout((0, 1, 6, 7), (2, 2), (0, 1))}, "contiguous rank intervals", "(0, 1, 6, 7)"),
        ({"src": Layout((1, 0), (2,), (0,))}, "contiguous rank intervals", "(1, 0)"),
        ({"dst": Layout((2, 3, 4, 5), (2, 2), (0, 1))}, "one shard axis a side", "cut along 2 mesh axes"),
        ({"dst": Layout((2, 3, 4, 5, 6), (5,), (1,))}, "even cuts", "dim 1 of (48, 32)"),
        ({"dst": Layout((1, 2), (2,), (1,))}, "disjoint meshes", "ranks [1]"),
        (
            {"src": Layout(tuple(range(24)), (24,), (0,)), "dst": Layout((24,), (1,), (None,))},
            "sources into one destination",
            "24 sources",
        ),
        (
            {
                "shape": (96, 8),
                "src": Layout((0,), (1,), (None,)),
                "dst": Layout(tuple(range(1, 97)), (96,), (0,)),
            },
            "destinations of one source",
            "96 destinations",
        ),
    ],
)
def test_each_limit_is_refused_by_its_name(changes, limit, fact):
    given = {"shape": SHAPE, "src": ROWS, "src_dtype": "bfloat16", "dst": COLUMNS, "dst_dtype": "bfloat16"}
    with pytest.raises(PlanError) as caught:
        require_m2n(**{**given, **changes})
    assert f"(limit: {limit})" in str(caught.value)
    assert fact in str(caught.value)
    assert str(caught.value).endswith("use backend 'p2p'")


def test_seventeen_sources_may_feed_destinations_that_meet_sixteen_of_them_at_most():
    src = Layout(tuple(range(32)), (32,), (0,))
    require_m2n((64, 4), src, "float32", Layout((32, 33), (2,), (0,)), "float32")
    with pytest.raises(PlanError, match="32 sources"):
        require_m2n((64, 4), src, "float32", Layout((32, 33), (2,), (1,)), "float32")


def test_descriptors_say_to_the_package_what_the_layouts_say():
    m2n = import_m2n()
    local = torch.zeros(24, 32, dtype=torch.bfloat16)
    given = Descriptor.of(ROWS, SHAPE, "bfloat16").tensor(m2n, local)
    assert (given.mesh.dims, given.mesh.start_rank, given.local_shape) == ((2, 1), 0, (24, 32))
    assert given.placements[0] == 0
    assert given.data_ptr == local.data_ptr()
    wanted = Descriptor.of(COLUMNS, SHAPE, "bfloat16").tensor(m2n, None)
    assert (wanted.mesh.dims, wanted.mesh.start_rank, wanted.local_shape) == ((2, 2), 2, (48, 16))
    assert (
        wanted.placements
        == m2n.DistTensor(
            None, (48, 16), torch.bfloat16, mesh=wanted.mesh, placements=[Replicate(), Shard(1)]
        ).placements
    )
    assert not wanted.is_participating
    assert given.dtype == wanted.dtype
    given.as_binding(), wanted.as_binding()  # the native layer takes both


def test_replicas_on_all_axes_become_one_axis_of_replicas_and_a_cut_into_one_part():
    m2n = import_m2n()
    wanted = Descriptor.of(Layout((2, 3, 4, 5), (2, 2), (None, None)), SHAPE, "uint8").tensor(m2n, None)
    assert (wanted.mesh.dims, wanted.mesh.start_rank, wanted.local_shape) == ((4, 1), 2, SHAPE)
    assert wanted.placements[1] == 0
    assert wanted.placements[0] != 0


def on_gloo(rank: int, port: int) -> list[str]:
    group = _group(rank, port, 2).process_group
    errors = []
    source, target = torch.tensor([0]), torch.tensor([1])
    for shape in ((4, 4), (2, 2, 2, 2)):
        held = torch.zeros(shape)
        src, dst = (held, None) if rank == 0 else (None, held)
        with pytest.raises(PlanError) as caught:
            xferdtensor(
                src, source, [Shard(0)], dst, target, [Shard(0)], group, backend="m2n", timeout_s=20.0
            )
        errors.append(str(caught.value))
    return errors


@pytest.mark.processes
def test_xferdtensor_refuses_m2n_on_every_rank_alike_and_names_why():
    host = ControlStore.host()
    first, second = run_processes(on_gloo, 2, host.port)
    assert first == second
    assert "(limit: NCCL groups only)" in first[0]
    assert "(limit: tensor rank)" in first[1]
