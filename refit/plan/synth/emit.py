"""Turns "this param is a stack of row blocks of tensors" into specs and holdings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from refit.plan.manifest import Holding, ParamSpec, RankManifest, TensorSpec, coalesce_holdings
from refit.plan.region import Region
from refit.plan.synth.modules import Shapes
from refit.plan.synth.parallel import even_share


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `[start, stop)` of a tensor (of one expert of it), with the columns `columns` of its second row dim.

    Rows at or beyond the tensor's end are padding: they take room in the param and hold nothing.
    """

    tensor: str
    start: int
    stop: int
    columns: tuple[int, int] | None = None
    expert: int | None = None


def window(blocks: Iterable[Block], low: int, high: int) -> tuple[Block, ...]:
    """The blocks cut to the rows `[low, high)` of their stack."""
    found: list[Block] = []
    row = 0
    for block in blocks:
        size = block.stop - block.start
        start, stop = max(low, row), min(high, row + size)
        if start < stop:
            found.append(replace(block, start=block.start + start - row, stop=block.start + stop - row))
        row += size
    return tuple(found)


def num_rows(blocks: Iterable[Block]) -> int:
    """Rows of a stack of blocks."""
    return sum(block.stop - block.start for block in blocks)


def cut_parts(tensor: str, sizes: Iterable[int], parts: int, index: int) -> list[Block]:
    """Share `index` of `parts` of each of the row blocks of `sizes` rows that a fused tensor consists of."""
    blocks: list[Block] = []
    base = 0
    for size in sizes:
        low, high = even_share(f"{tensor} part", size, parts, index)
        blocks.append(Block(tensor, base + low, base + high))
        base += size
    return blocks


@dataclass(slots=True)
class Emitter:
    """Collects what one rank holds. `dtype` is used for tensors whose dtype the model leaves open."""

    side: str
    dtype: str
    shapes: Shapes = field(default_factory=dict)
    params: list[ParamSpec] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)
    tensors: dict[str, TensorSpec] = field(default_factory=dict)

    def rows(self, param: str, blocks: Sequence[Block], stored_rows: int | None = None) -> None:
        """A param whose rows are the rows of the blocks, one after the other; `stored_rows` adds padding behind."""
        if not blocks and stored_rows is None:
            return
        inner = self._inner_shape(blocks[0]) if blocks else ()
        row_elements = prod(inner)
        row = 0
        for block in blocks:
            self._hold(param, block, row * row_elements, inner, None)
            row += block.stop - block.start
        total = row if stored_rows is None else stored_rows
        dtype = self.tensors[blocks[0].tensor].dtype if blocks else self.dtype
        self.params.append(ParamSpec(param, (total, *inner), dtype))

    def expert_rows(self, param: str, blocks: Sequence[Block], experts: range) -> None:
        """A param [experts, rows, columns]: the blocks of each expert one after the other."""
        inner = self._inner_shape(blocks[0])
        row_elements, total = prod(inner), num_rows(blocks)
        row = 0
        for block in blocks:
            self._hold(param, block, row * row_elements, inner, (experts, total * row_elements))
            row += block.stop - block.start
        dtype = self.tensors[blocks[0].tensor].dtype
        self.params.append(ParamSpec(param, (len(experts), total, *inner), dtype))

    def manifest(self, rank: int, stage: int, replica: int) -> RankManifest:
        """Everything that was emitted, as one rank's manifest."""
        tensors = tuple(sorted(self.tensors.values(), key=lambda spec: spec.name))
        return RankManifest(
            self.side, rank, stage, replica, tensors, tuple(self.params), coalesce_holdings(self.holdings), ()
        )

    def name(self, tensor: str) -> TensorSpec:
        """Register a tensor and return its spec."""
        spec = self.tensors.get(tensor)
        if spec is None:
            shape, dtype = self.shapes[tensor]
            spec = self.tensors[tensor] = TensorSpec(tensor, shape, dtype or self.dtype)
        return spec

    def _inner_shape(self, block: Block) -> tuple[int, ...]:
        shape = self._row_shape(block)[1:]
        if block.columns is None:
            return shape
        return (block.columns[1] - block.columns[0], *shape[1:])

    def _row_shape(self, block: Block) -> tuple[int, ...]:
        """Shape of the tensor without the expert dim."""
        shape = self.name(block.tensor).shape
        return shape[1:] if ".*." in block.tensor else shape

    def _hold(
        self,
        param: str,
        block: Block,
        offset: int,
        inner: tuple[int, ...],
        stack: tuple[range, int] | None,
    ) -> None:
        shape = self._row_shape(block)
        stop = min(block.stop, shape[0])
        if block.start >= stop or not all(inner):
            return
        columns = block.columns or ((0, shape[1]) if len(shape) > 1 else None)
        starts = (block.start, *((columns[0], *(0 for _ in shape[2:])) if columns else ()))
        stops = (stop, *((columns[1], *shape[2:]) if columns else ()))
        strides = tuple(prod(inner[dim:]) for dim in range(len(inner) + 1))
        if stack is not None:
            experts, expert_stride = stack
            starts, stops = (experts.start, *starts), (experts.stop, *stops)
            strides = (expert_stride, *strides)
        elif block.expert is not None:
            starts, stops = (block.expert, *starts), (block.expert + 1, *stops)
            strides = (prod(inner) * max(1, stop - block.start), *strides)
        self.holdings.append(Holding(block.tensor, Region(starts, stops), param, offset, strides))
