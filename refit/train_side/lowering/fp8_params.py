"""Parameters that Transformer Engine stores in FP8 blocks, as two plain tensors: elements and scales.

Written for Transformer Engine 2's `Float8BlockwiseQTensor` and read as megatron-bridge 0.6 reads it in
`build_export_fp8_tasks`: by `get_metadata()`. Row-wise data are uint8 [n, k], their scales fp32 [n / 128, k / 128]
with rows padded to a multiple of 4. Bridge trims the padding by a copy; here it stays, and holdings step over it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refit.plan import Holding, ParamSpec, TensorSpec
from refit.train_side.lowering.pieces import CannotLowerError
from refit.transfer.memory import param_spec
from refit.transfer.precision.formats import PrecisionError
from refit.transfer.precision.fp8 import BLOCK, FP8_BLOCK
from refit.transfer.precision.stored import BlockScales

SCALES = "_rowwise_scale_inv"
NUM_TERMS = 3
"""bf16 has 8 significant bits, fp32 24."""


@dataclass(frozen=True, slots=True)
class BlockParam:
    """The memory of one such parameter at this moment. `elements` is float8, `scales` may have padded rows."""

    elements: Tensor
    scales: Tensor

    def values(self) -> Tensor:
        """The elements in bf16, which has all values of e4m3."""
        return self.elements.to(torch.bfloat16)

    def scale_term(self, number: int) -> Tensor:
        """One bf16 per element, for gathers that know nothing of blocks; an fp32 scale is the sum of NUM_TERMS such."""
        rest = self.scales
        for _ in range(number):
            rest = rest - rest.to(torch.bfloat16).float()
        rows, columns = self.elements.shape
        whole = rest.to(torch.bfloat16).repeat_interleave(BLOCK[0], 0)[:rows]
        return whole.repeat_interleave(BLOCK[1], 1)[:, :columns].contiguous()


def is_block_param(weight: Any) -> bool:
    """Whether Bridge too would take it for one."""
    found = _metadata(weight)
    return "is_2D_scaled" in found and found.get("rowwise_scale_inv") is not None


def block_param(name: str, weight: Any) -> BlockParam:
    """Raises CannotLowerError for scales of another form than 128 x 128, or without row-wise data."""
    found = _metadata(weight)
    data, scales = found.get("rowwise_data"), found.get("rowwise_scale_inv")
    block = found["quantizer"].block_len if found.get("quantizer") is not None else BLOCK[0]
    if not found["is_2D_scaled"] or block != BLOCK[0]:
        form = f"blocks of {block} x {block}" if found["is_2D_scaled"] else f"runs of {block}"
        raise CannotLowerError(f"{name} is stored in FP8 with a scale for {form}, not for 128 x 128")
    if data is None or not data.is_contiguous() or not scales.is_contiguous():
        raise CannotLowerError(f"{name} is stored in FP8 without dense row-wise data")
    return BlockParam(data.view(torch.float8_e4m3fn), scales)


def _metadata(weight: Any) -> dict[str, Any]:
    read = getattr(weight, "get_metadata", None)  # plain parameters have none
    return dict(read()) if callable(read) else {}


def plain_memory(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The memory of a parameter by the names that a manifest gives it: elements and scales, or the parameter itself."""
    try:
        blocks = block_param(name, weight) if is_block_param(weight) else None
    except CannotLowerError:
        blocks = None
    return {name: weight} if blocks is None else {name: blocks.elements, f"{name}.{SCALES}": blocks.scales}


def param_specs(memory: Mapping[str, Tensor]) -> Iterator[ParamSpec]:
    return (param_spec(name, each) for name, each in memory.items())


def parts_of(spec: TensorSpec) -> Iterator[TensorSpec]:
    """The tensors that an engine stores instead."""
    return (TensorSpec(part.name(spec.name), part.shape(spec.shape), part.dtype) for part in FP8_BLOCK.parts)


def scale_holdings(
    name: str, blocks: BlockParam, holdings: Iterable[Holding], shape_of: Callable[[str], tuple[int, ...]]
) -> list[Holding]:
    """Where the scales of the parameter's tensors lie. Raises CannotLowerError where a block has none of its own."""
    (rows, columns), (scale_rows, pitch) = blocks.elements.shape, blocks.scales.shape
    try:
        scales = BlockScales(f"{name}.{SCALES}", (rows, columns), (scale_rows, pitch))
        return [scales.of(holding, shape_of(holding.tensor)) for holding in holdings]
    except PrecisionError as error:
        raise CannotLowerError(str(error)) from error


class BlockTasks(list):
    """Conversion tasks that give Bridge one plain tensor of each parameter: `read` of its blocks.

    Bridge's gathers then put together what the ranks store, whatever it is. All in bf16, since Bridge's mappings
    remember the dtype of what they broadcast between pipeline stages.
    """

    def __init__(self, tasks: Iterable[Any], read: Callable[[BlockParam], Tensor]) -> None:
        super().__init__(tasks)
        self._read = read

    def __iter__(self) -> Iterator[Any]:
        for task in super().__iter__():
            weight = task.param_weight  # None on other pipeline stages
            if weight is not None:
                weight = self._read(block_param(task.param_name, weight))
            yield dataclasses.replace(task, param_weight=weight)


def one_per_block(name: str, expanded: Tensor) -> Tensor:
    """The scales of a whole matrix from those of its elements. Raises ValueError if a block has two."""
    found = expanded[:: BLOCK[0], :: BLOCK[1]]
    rows, columns = expanded.shape
    whole = found.repeat_interleave(BLOCK[0], 0)[:rows].repeat_interleave(BLOCK[1], 1)[:, :columns]
    if not torch.equal(whole, expanded):
        raise ValueError(f"{name}: a block of {BLOCK} has two scales")
    return found.contiguous()
