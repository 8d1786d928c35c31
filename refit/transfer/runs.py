"""Copies between a parcel and the params, as lists of contiguous runs, with addresses worked out per parcel.

On a CPU a run is one memmove, or a row of an indexed copy where many are of one length. A box of more than MAX_RUNS
runs, a cast, and everything on CUDA goes through torch.
"""

import ctypes
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import call, is_, itemgetter, lt
from typing import TYPE_CHECKING, Protocol
from weakref import ref

import torch
from torch import Tensor

from refit.plan import Segment
from refit.transfer.errors import TransportError
from refit.transfer.memory import as_bits, torch_dtype
from refit.transfer.rows import WORD_BYTES, Rows, Run, rows_of
from refit.transfer.transports.seam import Pieces

MAX_RUNS = 6  # a box of more is cheaper as one strided copy of torch (5 us) than as memmoves (0.7 us each)
LONG_RUN_BYTES = 64 << 10  # from here on a copy lets other threads run
LISTED_BYTES = 6 << 20  # of the pieces that are kept per stage; those of long boxes are listed for each round
NO_ADDRESSES = torch.empty(0, dtype=torch.int64)


class HasRuns(Protocol):
    """What a move says of its memory."""

    @property
    def segment(self) -> Segment: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def start_byte(self) -> int: ...
    @property
    def is_cast(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Moves:
    """Runs that are copied one by one: `params` are positions in the stage's list, the rest is in bytes."""

    params: Tensor
    in_param: Tensor
    in_parcel: Tensor
    num_bytes: tuple[int, ...]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Moves":
        columns = [torch.tensor([run[i] for run in runs], dtype=torch.int64) for i in range(3)]
        return cls(columns[0], columns[1], columns[2], tuple(run[3] for run in runs))

    def copy(self, addresses: Tensor, parcel: int, is_pack: bool) -> None:
        """Copy all. `addresses` are those of the stage's params, `parcel` that of the parcel."""
        if not self.num_bytes:
            return
        mine = (addresses[self.params] + self.in_param).tolist()
        packed = (self.in_parcel + parcel).tolist()
        targets, sources = (packed, mine) if is_pack else (mine, packed)
        is_small = sum(self.num_bytes) < LONG_RUN_BYTES * len(self.num_bytes)
        deque(map(_memmove if is_small else ctypes.memmove, targets, sources, self.num_bytes), maxlen=0)


@dataclass(frozen=True, slots=True)
class Runs:
    """All runs of a parcel: `every` one by one, or, where memory is aligned to words, `rows` and the `rest`."""

    every: Moves
    rows: tuple[Rows, ...]
    rest: Moves

    @property
    def num_bytes(self) -> tuple[int, ...]:
        """Of each run, in the order of the parcel."""
        return self.every.num_bytes

    def copy(self, live: "LiveParams", payload: Tensor, is_pack: bool) -> None:
        """Copy all between the params and the parcel that `payload` holds; pack: into the parcel."""
        parcel = payload.data_ptr()
        if not (self.rows and live.is_word_aligned and is_word_aligned(payload)):
            self.every.copy(live.addresses, parcel, is_pack)
            return
        words = payload[: payload.numel() // WORD_BYTES * WORD_BYTES].view(torch.int64)
        for rows in self.rows:
            rows.copy(live.addresses, words, is_pack)
        self.rest.copy(live.addresses, parcel, is_pack)


def is_word_aligned(payload: Tensor) -> bool:
    """True if bytes can be seen as 64-bit words."""
    return payload.data_ptr() % WORD_BYTES == 0 and payload.storage_offset() % WORD_BYTES == 0


class RunsInMaking:
    """Makes the `Runs` of a stage; counts its params and how far into each the runs reach."""

    def __init__(self, dtypes: Mapping[str, str], device: torch.device) -> None:
        self._all = {name: torch_dtype(dtype) for name, dtype in dtypes.items()}
        self._positions: dict[str, int] = {}
        self._by_memmove = device.type == "cpu"
        self.dtypes: dict[str, torch.dtype] = {}
        self.reach_bytes: list[int] = []

    @property
    def positions(self) -> Mapping[str, int]:
        """The place of each param in the list of addresses."""
        return self._positions

    def dtype(self, param: str) -> torch.dtype:
        """The dtype of a param, which from now on belongs to the stage."""
        if param not in self._positions:
            self._positions[param] = len(self._positions)
            self.dtypes[param] = self._all[param]
            self.reach_bytes.append(0)
        return self.dtypes[param]

    def of[M: HasRuns](self, moves: Sequence[M]) -> tuple[Runs, tuple[M, ...]]:
        """The runs of these moves, and the moves that are not made of runs."""
        found: list[Run] = []
        boxes: list[M] = []
        for move in moves:
            position = self._positions[move.segment.param]
            runs = None if move.is_cast or not self._by_memmove else _runs(move, position)
            if runs is None:
                boxes.append(move)
            else:
                found.extend(runs)
        merged = _merged(found)
        for param, start, _, num_bytes in merged:
            self.reach_bytes[param] = max(self.reach_bytes[param], start + num_bytes)
        done = sum(run[3] for run in merged) + sum(move.num_bytes for move in boxes)
        planned = sum(move.num_bytes for move in moves)
        assert done == planned, f"copies of {done} bytes are made for a parcel of {planned}"
        rows, rest = rows_of(merged)
        return Runs(Moves.of(merged), rows, Moves.of(rest)), tuple(boxes)


class Seen:
    """Params that a refit before this one looked at: which tensors, as long as they live, and where they began."""

    def __init__(self, tensors: Sequence[Tensor], pointers: "array[int]") -> None:
        self._watched = tuple(map(ref, tensors))
        self._pointers = pointers.tobytes()
        self._listed: dict[tuple[HasPieces, int], Pieces] = {}
        self._listed_bytes = 0
        self.addresses = torch.frombuffer(pointers, dtype=torch.int64) if pointers else NO_ADDRESSES
        self.is_word_aligned = not bool((self.addresses % WORD_BYTES).any())

    def are(self, tensors: Sequence[Tensor], pointers: "array[int]") -> bool:
        """True if they are the same tensors at the same addresses.

        Weak references, not ids: these may be given anew, and where anybody has set an audit hook (filelock does),
        each `id` calls it.
        """
        return self._pointers == pointers.tobytes() and all(map(is_, tensors, map(call, self._watched)))

    def pieces(self, gather: "HasPieces", slot: int) -> Pieces:
        """Where the bytes of a gather lie; `slot` is the address of its slot."""
        found = self._listed.get((gather, slot))
        if found is None:
            found = gather.pieces(torch.cat([self.addresses, torch.tensor([slot])]))
            num_bytes = found.table.nbytes + found.ends.nbytes
            if self._listed_bytes + num_bytes <= LISTED_BYTES:
                self._listed_bytes += num_bytes
                self._listed[gather, slot] = found
        return found


class HasPieces(Protocol):
    """A gather, known by its identity."""

    def pieces(self, addresses: Tensor) -> Pieces: ...


class LiveParams:
    """The params of one stage as they are in this refit.

    Raises TransportError for a param that is not what the stage was compiled for. Those of `seen` are not looked at
    again where they are the same tensors at the same addresses.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        reach_bytes: Sequence[int],
        seen: Seen | None = None,
    ) -> None:
        self._params = params
        self._bits: dict[str, Tensor] = {}
        tensors = itemgetter(*dtypes)(params) if len(dtypes) > 1 else [params[name] for name in dtypes]
        pointers = array("q", map(Tensor.data_ptr, tensors))
        if seen is None or not seen.are(tensors, pointers):
            _require_all(tensors, dtypes, reach_bytes)
            seen = Seen(tensors, pointers)
        self.seen = seen
        self.addresses = seen.addresses
        self.is_word_aligned = seen.is_word_aligned

    def values(self, name: str) -> Tensor:
        return self._params[name].detach()

    def bits(self, name: str) -> Tensor:
        """The same memory as integers."""
        if name not in self._bits:
            self._bits[name] = as_bits(self._params[name].detach())
        return self._bits[name]


def _require_all(
    tensors: Sequence[Tensor], dtypes: Mapping[str, torch.dtype], reach_bytes: Sequence[int]
) -> None:
    """Whole lists are compared first: with 10,000 params a look at each by itself takes as long as its copy."""
    is_same = [tensor.dtype for tensor in tensors] == list(dtypes.values())
    if not is_same or any(map(lt, [tensor.nbytes for tensor in tensors], reach_bytes)):
        for (name, dtype), tensor, reach in zip(dtypes.items(), tensors, reach_bytes, strict=True):
            _require(name, tensor, dtype, reach)


def _require(name: str, tensor: Tensor, dtype: torch.dtype, reach_bytes: int) -> None:
    if tensor.dtype != dtype:
        raise TransportError(
            f"param {name!r} is {tensor.dtype}, but the transfer was compiled for {dtype}; prepare again"
        )
    if reach_bytes > _memory_bytes(tensor):
        raise TransportError(
            f"a transfer reaches {reach_bytes} bytes into param {name!r}, whose memory has {_memory_bytes(tensor)}"
        )


def is_run(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True if a box of these strides is contiguous in row-major order."""
    return inner_dims(shape, strides) == len(shape)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def inner_dims(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many of the last dims lie in memory without gaps."""
    step, count = 1, 0
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return count
        step *= size
        count += 1
    return count


def _runs(move: HasRuns, param: int) -> list[Run] | None:
    """Each run of a box; None if there are too many."""
    segment = move.segment
    item_bytes = torch_dtype(segment.wire_dtype).itemsize
    num_outer = len(segment.shape) - inner_dims(segment.shape, segment.strides)
    offsets = [segment.offset]
    for size, stride in zip(segment.shape[:num_outer], segment.strides[:num_outer], strict=True):
        if size * len(offsets) > MAX_RUNS:
            return None
        offsets = [offset + i * stride for offset in offsets for i in range(size)]
    if move.num_bytes == 0:
        return []
    run_bytes = move.num_bytes // len(offsets)
    return [
        (param, offset * item_bytes, move.start_byte + number * run_bytes, run_bytes)
        for number, offset in enumerate(offsets)
    ]


def _merged(runs: Sequence[Run]) -> list[Run]:
    """Runs that follow each other on both ends are one."""
    found: list[Run] = []
    for run in runs:
        if found:
            param, in_param, in_parcel, num_bytes = found[-1]
            if run[:3] == (param, in_param + num_bytes, in_parcel + num_bytes):
                found[-1] = (param, in_param, in_parcel, num_bytes + run[3])
                continue  # it is part of the run before it now
        found.append(run)
    return found


def _memory_bytes(tensor: Tensor) -> int:
    """Bytes from the first element to the end of its memory."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    return int(tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size())


if TYPE_CHECKING:

    def _memmove(target: int, source: int, num_bytes: int, /) -> None: ...

else:
    # Through PyDLL, which keeps the interpreter lock: a thread switch at every small run would cost more than the run.
    _memmove = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
        ("memmove", ctypes.PyDLL(None))
    )
