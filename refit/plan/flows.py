"""Flows: all copies of one cell of one layout pair, with the rows that each holder sends.

The rows of a flow form one line: for each receiver, for each tensor, the rows of the cell along `row_dim`.
Holder `i` sends the stretch `[cuts[i], cuts[i + 1])` of that line. So a flow of 60 equal layers and 8
replicas is one value.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from refit.plan.balance import cut_points, nic_weights, share_out
from refit.plan.classify import BULK, Classification, Matched
from refit.plan.dtypes import item_bytes
from refit.plan.options import PlanOptions
from refit.plan.region import Region
from refit.plan.sides import Side


@dataclass(frozen=True, slots=True)
class Stripe:
    """Part of one tensor's cell that one holder sends to one receiver. Rows count from the cell's own
    start."""

    flow: int
    tensor: str
    receiver: int
    holder: int
    first_row: int
    stop_row: int


@dataclass(frozen=True, slots=True)
class Flow:
    """holders and receivers are ranks inside their sides; `copy` is the receivers' copy number of the
    tensor."""

    index: int
    tensors: tuple[str, ...]
    wire_dtype: str
    region: Region
    copy: int
    holders: tuple[int, ...]
    receivers: tuple[int, ...]
    row_dim: int
    num_rows: int
    cuts: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.region.num_elements // self.num_rows * item_bytes(self.wire_dtype)

    @property
    def bytes_per_receiver(self) -> int:
        return self.region.num_elements * item_bytes(self.wire_dtype) * len(self.tensors)

    def part(self, first_row: int, stop_row: int) -> Region:
        """The box of some rows of the cell."""
        if first_row == 0 and stop_row == self.num_rows:
            return self.region
        base = self.region.starts[self.row_dim]
        return self.region.with_dim(self.row_dim, base + first_row, base + stop_row)

    def sent_by(self, position: int) -> Iterator[Stripe]:
        """Stripes of the holder at `position`, in line order."""
        return self._stretch(self.cuts[position], self.cuts[position + 1], position)

    def received_by(self, position: int) -> Iterator[Stripe]:
        """Stripes of the receiver at `position`, in line order."""
        per_receiver = len(self.tensors) * self.num_rows
        here, stop = position * per_receiver, (position + 1) * per_receiver
        holder = bisect_right(self.cuts, here) - 1
        while here < stop:
            end = min(stop, self.cuts[holder + 1])
            yield from self._stretch(here, end, holder)
            here = end
            holder = bisect_right(self.cuts, here) - 1

    def _stretch(self, here: int, stop: int, holder: int) -> Iterator[Stripe]:
        while here < stop:
            item, row = divmod(here, self.num_rows)
            receiver, tensor = divmod(item, len(self.tensors))
            end = min(stop, here - row + self.num_rows)
            yield Stripe(
                self.index,
                self.tensors[tensor],
                self.receivers[receiver],
                self.holders[holder],
                row,
                row + end - here,
            )
            here = end

    @property
    def num_stripes(self) -> int:
        """How many stripes the flow has, without listing them."""
        inner = {cut for cut in self.cuts if cut % self.num_rows}
        return len(self.tensors) * len(self.receivers) + len(inner)


@dataclass(frozen=True, slots=True)
class _Draft:
    tensors: tuple[str, ...]
    wire_dtype: str
    region: Region
    copy: int
    holders: tuple[int, ...]
    receivers: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        copies = len(self.tensors) * len(self.receivers)
        return self.region.num_elements * item_bytes(self.wire_dtype) * copies


def build_flows(classes: Classification, train: Side, gen: Side, options: PlanOptions) -> tuple[Flow, ...]:
    """All flows of the bulk tensors, with balanced sources. Deterministic; cost is per distinct layout
    pair."""
    drafts = tuple(_drafts(classes, train, gen))
    demands: dict[tuple[int, ...], int] = {}
    for draft in drafts:
        demands[draft.holders] = demands.get(draft.holders, 0) + draft.num_bytes
    weights = None
    if options.ranks_per_node:
        num_ranks = len(train.manifest.ranks)
        weights = nic_weights(num_ranks, options.ranks_per_node, options.nics_per_node)
    shares = share_out(demands, weights)
    return tuple(_flow(index, draft, shares) for index, draft in enumerate(drafts))


def _drafts(classes: Classification, train: Side, gen: Side) -> Iterator[_Draft]:
    groups: dict[tuple[int, int, tuple[int, ...], str], list[str]] = {}
    for tensor in classes.tensors.values():
        if tensor.kind == BULK:
            pair = (train.layouts[tensor.name].index, gen.layouts[tensor.name].index)
            groups.setdefault((*pair, tensor.shape, tensor.dtype), []).append(tensor.name)
    unions: dict[tuple[tuple[int, ...], ...], tuple[int, ...]] = {}
    for (source, wanted, shape, dtype), names in groups.items():
        yield from _pair_drafts(classes.pairs[source, wanted, shape], tuple(names), dtype, unions)


def _pair_drafts(
    pair: Matched,
    names: tuple[str, ...],
    dtype: str,
    unions: dict[tuple[tuple[int, ...], ...], tuple[int, ...]],
) -> Iterator[_Draft]:
    for entry, cells in zip(pair.gen.entries, pair.cells, strict=True):
        for cell in cells:
            parts = tuple(pair.train.entries[source].ranks for source in cell.sources)
            holders = parts[0] if len(parts) == 1 else unions.get(parts)
            if holders is None:
                holders = unions[parts] = tuple(sorted({rank for part in parts for rank in part}))
            yield _Draft(names, dtype, cell.region, entry.copy, holders, entry.ranks)


def _flow(index: int, draft: _Draft, shares: Mapping[tuple[int, ...], Sequence[int]]) -> Flow:
    row_dim = _row_dim(draft.region)
    num_rows = draft.region.shape[row_dim] if draft.region.starts else 1
    line = num_rows * len(draft.tensors) * len(draft.receivers)
    cuts = (0, line) if len(draft.holders) == 1 else cut_points(shares[draft.holders], line)
    return Flow(
        index,
        draft.tensors,
        draft.wire_dtype,
        draft.region,
        draft.copy,
        draft.holders,
        draft.receivers,
        row_dim,
        num_rows,
        cuts,
    )


def _row_dim(region: Region) -> int:
    """Rows are cut along the first dim that can be cut, so that a part stays one run of the packed box."""
    return next((dim for dim, size in enumerate(region.shape) if size > 1), 0)
