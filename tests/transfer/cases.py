"""Generated refit cases: manifests with cuts, replicas, stages and strided memory of many forms, and their contents."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from refit.plan import Holding, Manifest, ParamSpec, PlanOptions, RankManifest, Region, TensorSpec
from refit.transfer.memory import as_bits, copy_cast, strided_box, torch_dtype

FLOATS = ("float32", "bfloat16", "float16")
DTYPE_PAIRS = (
    ("bfloat16", "bfloat16"),
    ("float32", "bfloat16"),
    ("float32", "float32"),
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("uint8", "uint8"),
    ("int32", "int32"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One refit: what both sides hold, and options small enough for many rounds."""

    train: Manifest
    gen: Manifest
    options: PlanOptions

    @property
    def num_ranks(self) -> int:
        return len(self.train.ranks) + len(self.gen.ranks)

    def manifest(self, rank: int) -> RankManifest:
        num_train = len(self.train.ranks)
        return self.train.ranks[rank] if rank < num_train else self.gen.ranks[rank - num_train]


def make_case(
    seed: int, num_train: int = 2, num_gen: int = 2, num_tensors: int = 8, largest_dim: int = 48
) -> Case:
    """A case that every element of is wanted by each replica and held by some trainer."""
    rng = random.Random(seed)
    num_stages = rng.choice([1, num_train])
    num_replicas = rng.choice([1, num_gen])
    tensors = [_tensor(rng, number, largest_dim) for number in range(num_tensors)]
    train = [_Rank("train", rank, rank * num_stages // num_train, 0) for rank in range(num_train)]
    gen = [_Rank("gen", rank, 0, rank * num_replicas // num_gen) for rank in range(num_gen)]
    for shape, stored, wanted, name in tensors:
        stage = rng.randrange(num_stages)
        holders = [rank for rank in train if rank.stage == stage]
        _deal(rng, TensorSpec(name, shape, stored), holders)
        for replica in range(num_replicas):
            _deal(rng, TensorSpec(name, shape, wanted), [rank for rank in gen if rank.replica == replica])
    options = PlanOptions(rng.choice([4096, 8192, 1 << 20]), rng.choice([1, 2, 16]), (r"t\d+\..*",))
    return Case(_manifest("train", train), _manifest("gen", gen), options)


def full_tensor(spec: TensorSpec, stored: str, seed: int, version: int) -> torch.Tensor:
    """One tensor at one version, in the dtype of the trainer: any bits, or normal floats if a cast follows."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.name} {seed} {version}".encode()))
    if stored != spec.dtype:
        return torch.randn(spec.shape, generator=generator).to(torch_dtype(stored))
    dtype = torch_dtype(stored)
    raw = torch.randint(0, 256, (*spec.shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(spec.shape)


def param_dtypes(manifest: RankManifest) -> dict[str, str]:
    return {spec.name: spec.dtype for spec in manifest.params}


def empty_params(manifest: RankManifest) -> dict[str, torch.Tensor]:
    """Params of one rank, filled with a pattern that shows any stray write."""
    return {
        spec.name: torch.full((_bytes(spec),), 0xA5, dtype=torch.uint8)
        .view(torch_dtype(spec.dtype))
        .view(spec.shape)
        for spec in manifest.params
    }


def few_changes(spec: TensorSpec, stored: str, seed: int, version: int) -> torch.Tensor:
    """The same, but all zero bits except for one element in a hundred: two in a hundred differ from another version."""
    full = torch.zeros(spec.shape, dtype=torch_dtype(stored))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.name} {seed} {version} places".encode()))
    chosen = torch.rand(spec.shape, generator=generator) < 0.01
    as_bits(full)[chosen] = as_bits(full_tensor(spec, stored, seed, version))[chosen]
    return full


def fill_params(
    params: dict[str, torch.Tensor],
    case: Case,
    manifest: RankManifest,
    seed: int,
    version: int,
    contents: Callable[[TensorSpec, str, int, int], torch.Tensor] = full_tensor,
) -> None:
    """Write every holding of a rank as it has to be at `version`: input of trainers, goal of generators."""
    stored = {spec.name: spec.dtype for rank in case.train.ranks for spec in rank.tensors}
    wanted = {spec.name: spec for rank in case.gen.ranks for spec in rank.tensors}
    for holding in manifest.holdings:
        full = contents(wanted[holding.tensor], stored[holding.tensor], seed, version)
        region = holding.region
        part = full[tuple(slice(*span) for span in zip(region.starts, region.stops, strict=True))]
        box = strided_box(params[holding.param], region.shape, holding.strides, holding.offset)
        copy_cast(box, part)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(as_bits(left), as_bits(right))


class _Rank:
    """A rank manifest in the making."""

    def __init__(self, side: str, rank: int, stage: int, replica: int) -> None:
        self.side, self.rank, self.stage, self.replica = side, rank, stage, replica
        self.tensors: list[TensorSpec] = []
        self.params: list[ParamSpec] = []
        self.holdings: list[Holding] = []

    def hold(self, rng: random.Random, spec: TensorSpec, region: Region) -> None:
        if spec not in self.tensors:
            self.tensors.append(spec)
        if region.is_empty:
            return
        name = f"p{len(self.params)}"
        shape, offset, strides = _place(rng, region.shape)
        self.params.append(ParamSpec(name, shape, spec.dtype))
        self.holdings.append(Holding(spec.name, region, name, offset, strides))


def _tensor(rng: random.Random, number: int, largest_dim: int) -> tuple[tuple[int, ...], str, str, str]:
    shape = tuple(rng.randint(1, largest_dim) for _ in range(rng.choice([1, 2, 2, 2, 3])))
    stored, wanted = rng.choice(DTYPE_PAIRS)
    return shape, stored, wanted, f"t{number}.weight"


def _deal(rng: random.Random, spec: TensorSpec, ranks: list[_Rank]) -> None:
    """Replicate, cut in one dim at random places, or cut in tiles along two dims."""
    whole = Region.whole(spec.shape)
    if len(ranks) == 1 or rng.random() < 0.2:
        for rank in ranks:
            rank.hold(rng, spec, whole)
        return
    dim = rng.randrange(len(spec.shape))
    cuts = [0, *sorted(rng.randint(0, spec.shape[dim]) for _ in ranks[1:]), spec.shape[dim]]
    parts = [whole.with_dim(dim, cuts[i], cuts[i + 1]) for i in range(len(ranks))]
    other = rng.randrange(len(spec.shape))
    for rank, part in zip(ranks, parts, strict=True):
        middle = rng.randint(0, spec.shape[other])
        if other != dim and rng.random() < 0.5:
            rank.hold(rng, spec, part.with_dim(other, 0, middle))
            rank.hold(rng, spec, part.with_dim(other, middle, spec.shape[other]))
        else:
            rank.hold(rng, spec, part)


def _place(rng: random.Random, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Shape of a param, and offset and strides of a box of `shape` in it: plain, permuted or inside a larger param."""
    padding = rng.choice([0, 0, 1, 3])
    order = list(range(len(shape)))
    if rng.random() < 0.3:
        rng.shuffle(order)
    param_shape = tuple(shape[dim] + padding for dim in order)
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim] + padding
    offset = sum(rng.randint(0, padding) * stride for stride in strides)
    return param_shape, offset, tuple(strides)


def _manifest(side: str, ranks: list[_Rank]) -> Manifest:
    return Manifest(
        side,
        tuple(
            RankManifest(
                side, r.rank, r.stage, r.replica, tuple(r.tensors), tuple(r.params), tuple(r.holdings), ()
            )
            for r in ranks
        ),
    )


def _bytes(spec: ParamSpec) -> int:
    return spec.num_elements * torch_dtype(spec.dtype).itemsize
