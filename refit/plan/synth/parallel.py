"""Parallelism strings such as `tp=2,pp=4,ep=8,dp=1` and the place of each rank in the meshes they describe."""

from dataclasses import dataclass, fields
from math import lcm

from refit.plan.errors import ConfigError

MAX_RANKS = 1 << 16  # of a side: planned in seconds to minutes; above it a layout is rather a slip of the pen


@dataclass(frozen=True, slots=True)
class TrainMesh:
    """Axes of the trainers. Rank order is Megatron's: tp fastest, then gtp, cp, dp; expert axes etp, ep,
    egtp, dp; pp slowest.

    One stage has lcm(tp * gtp * cp, etp * ep * egtp) * dp ranks: `dp` repeats the smallest set of ranks that
    both the dense and the expert mesh fit on. `te` says whose layers they are: with 1 (Transformer Engine) MLA's
    down projections are whole on each TP rank, with 0 (Megatron's own) they are cut. `layers` gives the layers of
    every stage (of every virtual chunk, stage by stage within a chunk, when vpp > 1); `first` and `last` fix only
    those stages.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 0
    dp: int = 1
    cp: int = 1
    gtp: int = 1
    egtp: int = 1
    vpp: int = 1
    first: int = 0
    last: int = 0
    layers: tuple[int, ...] = ()
    te: int = 1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _check_positive(self, ("tp", "pp", "ep", "dp", "cp", "gtp", "egtp", "vpp"))
        if self.te not in (0, 1):
            raise ConfigError(
                f"train te is {self.te}; 1 means layers of Transformer Engine, 0 Megatron's own layers"
            )
        if self.etp < 0:
            raise ConfigError(
                f"train etp is {self.etp}; give a positive number, or leave it out for etp = tp"
            )
        _check_size("train", self.num_ranks, "dp")

    @property
    def expert_tp(self) -> int:
        """Tensor parallel size of the experts: Megatron's default is that of the dense layers."""
        return self.etp or self.tp

    @property
    def ranks_per_stage(self) -> int:
        return lcm(self.tp * self.gtp * self.cp, self.expert_tp * self.ep * self.egtp) * self.dp

    @property
    def num_ranks(self) -> int:
        return self.ranks_per_stage * self.pp

    def chunks(self, num_layers: int) -> tuple[tuple[range, ...], ...]:
        """Global layers of each stage, as one range per virtual chunk."""
        counts = self._chunk_layers(num_layers)
        starts = [sum(counts[:number]) for number in range(len(counts))]
        spans = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
        return tuple(tuple(spans[stage :: self.pp]) for stage in range(self.pp))

    def _chunk_layers(self, num_layers: int) -> list[int]:
        num_chunks = self.pp * self.vpp
        if self.layers:
            if len(self.layers) != num_chunks or sum(self.layers) != num_layers:
                raise ConfigError(
                    f"train layers={':'.join(map(str, self.layers))} must be {num_chunks} numbers"
                    f" that add up to {num_layers}"
                )
            return list(self.layers)
        fixed = {0: self.first} if self.first else {}
        if self.last:
            fixed[num_chunks - 1] = self.last
        free = num_layers - sum(fixed.values())
        num_free = num_chunks - len(fixed)
        if free < num_free or (num_free == 0 and free):
            raise ConfigError(
                f"train pp={self.pp}, vpp={self.vpp} leaves {free} of {num_layers} layers for {num_free} chunks;"
                " lower pp or vpp, or give layers="
            )
        base, more = divmod(free, num_free) if num_free else (0, 0)
        counts = [base + 1 if number < more else base for number in range(num_free)]
        return [fixed[number] if number in fixed else counts.pop(0) for number in range(num_chunks)]


@dataclass(frozen=True, slots=True)
class GenMesh:
    """Axes of the generators. One replica is dp x pp x tp ranks, tp fastest, then pp, then dp; ep=1 cuts experts
    over tp * dp ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 0
    replicas: int = 1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _check_positive(self, ("tp", "pp", "dp", "replicas"))
        if self.ep not in (0, 1, self.tp * self.dp):
            raise ConfigError(
                f"gen ep is {self.ep}; 0 turns it off, 1 cuts experts over tp * dp = {self.tp * self.dp}"
            )
        _check_size("gen", self.num_ranks, "replicas")

    @property
    def ranks_per_replica(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def num_ranks(self) -> int:
        return self.ranks_per_replica * self.replicas

    def stage_layers(self, num_layers: int) -> tuple[range, ...]:
        """Layers of each stage. vLLM gives the remainder to the stages before the last, from the back."""
        counts = [num_layers // self.pp] * self.pp
        for number in range(num_layers % self.pp):
            counts[-2 - number] += 1
        if counts[0] < 1:
            raise ConfigError(f"gen pp={self.pp} is more than the {num_layers} layers; lower pp")
        return tuple(range(sum(counts[:stage]), sum(counts[: stage + 1])) for stage in range(self.pp))


def parse_train(text: str) -> TrainMesh:
    """`tp=2,pp=4,...` as a TrainMesh. Raises ConfigError naming the key."""
    values = _parse(text, TrainMesh, "train")
    if "layers" in values:
        values["layers"] = tuple(
            _number("train", "layers", part) for part in str(values["layers"]).split(":")
        )
    return TrainMesh(**values)  # type: ignore[arg-type]


def parse_gen(text: str) -> GenMesh:
    """`tp=8,replicas=4,...` as a GenMesh. Raises ConfigError naming the key."""
    return GenMesh(**_parse(text, GenMesh, "gen"))  # type: ignore[arg-type]


def _parse(text: str, mesh: type[TrainMesh] | type[GenMesh], side: str) -> dict[str, object]:
    known = tuple(field.name for field in fields(mesh))
    values: dict[str, object] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f"{side} layout {text!r}: {part!r} is not KEY=VALUE with a key out of {', '.join(known)}"
            )
        if key in values:
            raise ConfigError(f"{side} layout {text!r}: {key} is given twice")
        values[key] = value if key in ("dtype", "layers") else _number(side, key, value)
    return values


def _number(side: str, key: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 7:
        raise ConfigError(f"{side} layout: {key}={value!r} must be a whole number from 1 to 9999999")
    return int(value)


def _check_positive(mesh: TrainMesh | GenMesh, keys: tuple[str, ...]) -> None:
    side = "train" if isinstance(mesh, TrainMesh) else "gen"
    for key in keys:
        value = getattr(mesh, key)
        if value < 1:
            raise ConfigError(f"{side} {key} is {value}; it must be at least 1")


def _check_size(side: str, num_ranks: int, key: str) -> None:
    if num_ranks > MAX_RANKS:
        raise ConfigError(
            f"the {side} layout has {num_ranks} ranks, a plan takes up to {MAX_RANKS}; lower {key}"
        )


def even_share(what: str, size: int, parts: int, index: int) -> tuple[int, int]:
    """The `index`-th of `parts` equal shares of `size`. Raises ConfigError where it does not divide."""
    if size % parts:
        raise ConfigError(
            f"{what} is {size} and cannot be cut into {parts} equal parts; change the parallel size"
        )
    step = size // parts
    return index * step, (index + 1) * step
