"""One small function per Megatron-Bridge mapping class: which rows of a local parameter are which HF rows.

Written for megatron-bridge 0.6. A rule gets the mapping, the model config and the shapes, and yields Pieces;
it sees no tensor and calls no collective. `rules()` is looked up by exact class: a subclass may change values, so
it is unknown until it has a rule of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from refit.train_side.lowering.pieces import CannotLowerError, HfTensor, LocalParam, Piece


@dataclass(frozen=True, slots=True)
class Subject:
    """What a rule may look at. `tensor(name)` gives an HF tensor of the checkpoint by its name.

    `kinds` remembers what Bridge said about a module class: it tries to import modelopt each time it is asked,
    which is 80 % of the time to lower a parameter.
    """

    mapping: Any
    module: Any
    config: Any
    param: LocalParam
    tensor: Callable[[str], HfTensor]
    kinds: dict[tuple[type, str], str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Bridge's "column", "row" or "replicated" for this parameter of its module."""
        known = self.mapping._MODULE_TYPE_REGISTRY.values()
        if not any(type(self.module).__name__ in names for names in known):
            return self.mapping._detect_parallelism_type(self.module)  # depends on the module's attributes
        key = (type(self.module), self.mapping.megatron_param.rpartition(".")[2])
        if key not in self.kinds:
            self.kinds[key] = self.mapping._detect_parallelism_type(self.module)
        return self.kinds[key]

    def hf(self, part: str) -> HfTensor:
        return self.tensor(self.mapping.hf_param[part])

    @property
    def only(self) -> HfTensor:
        return self.tensor(str(self.mapping.hf_param))

    @property
    def tp_rank(self) -> int:
        return self.mapping.tp_rank

    @property
    def tp_size(self) -> int:
        return self.mapping.tp_size

    def one_expert(self, local_shape: tuple[int, ...]) -> tuple[HfTensor, tuple[int, ...] | None]:
        """This parameter's expert of an HF tensor [experts, ...], and the dims if HF keeps it transposed.

        `local_shape` is the expert's full Megatron shape. As Bridge does: transposed only if the shape does
        not fit as it is.
        """
        from megatron.bridge.utils.common_utils import extract_expert_number_from_param

        number = extract_expert_number_from_param(self.mapping.megatron_param)
        expert = HfTensor(self.only.name, self.only.shape[1:], number)
        if expert.shape == local_shape or not self.mapping.transpose_on_export:
            return expert, None
        return expert, (1, 0)

    def check_rows(self, num_hf_rows: int) -> None:
        """Raise unless the TP ranks' rows add up to `num_hf_rows`."""
        total = self.param.num_tp_rows * self.tp_size
        if total != num_hf_rows:
            raise CannotLowerError(
                f"{self.param.name} has {self.param.num_tp_rows} rows on each of {self.tp_size} ranks, "
                f"its HF tensors have {num_hf_rows}"
            )


Rule = Callable[[Subject], Iterator[Piece]]


def replicated(subject: Subject) -> Iterator[Piece]:
    """Every rank stores the whole tensor."""
    tensor = subject.only
    if (subject.param.tp_shape if tensor.shape else ()) != tensor.shape:
        raise CannotLowerError(f"{subject.param.name} {subject.param.tp_shape} is not {tensor.shape}")
    yield Piece(tensor, 0, 0, subject.param.num_tp_rows)


_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


def column(subject: Subject) -> Iterator[Piece]:
    """Dim 0 is cut in equal parts. Only vocabularies may be longer than their tensor: the tail is padding."""
    tensor, rows = subject.only, subject.param.num_tp_rows
    if not subject.mapping.megatron_param.endswith(_PADDED):
        subject.check_rows(tensor.shape[0])
    elif rows * subject.tp_size < tensor.shape[0]:
        raise CannotLowerError(f"{tensor.name} has {tensor.shape[0]} rows, the ranks {rows} each")
    yield Piece(tensor, 0, subject.tp_rank * rows, rows)


def row(subject: Subject) -> Iterator[Piece]:
    """Dim 1 is cut in equal parts; a bias (one dim) is replicated."""
    if len(subject.param.shape) == 1:
        yield from replicated(subject)
        return
    tensor, columns = subject.only, subject.param.shape[1]
    if (subject.param.num_tp_rows, columns * subject.tp_size) != tensor.shape:
        raise CannotLowerError(f"{subject.param.name} {subject.param.tp_shape} is no cut of {tensor.shape}")
    yield Piece(tensor, 0, 0, subject.param.num_tp_rows, first_column=subject.tp_rank * columns)


def auto(subject: Subject) -> Iterator[Piece]:
    """Bridge finds out from the module whether it is column, row or replicated."""
    pieces = {"column": column, "row": row, "replicated": replicated}[subject.kind]
    if subject.mapping.permute_dims is None:
        yield from pieces(subject)
    else:
        yield from _permuted(subject, pieces, tuple(subject.mapping.permute_dims))


def _permuted(subject: Subject, pieces: Rule, dims: tuple[int, ...]) -> Iterator[Piece]:
    """The pieces of a tensor whose dim d is dim `dims[d]` of what Megatron stores (TP gathered)."""

    def stored_shape(name: str) -> HfTensor:
        tensor = subject.tensor(name)
        shape = tuple(tensor.shape[dims.index(dim)] for dim in range(len(dims)))
        return replace(tensor, shape=shape)

    for piece in pieces(replace(subject, tensor=stored_shape)):
        yield replace(piece, tensor=subject.tensor(str(subject.mapping.hf_param)), dims=dims)


@dataclass(frozen=True, slots=True)
class _Heads:
    num_heads: int
    num_groups: int
    head_size: int

    @classmethod
    def of(cls, config: Any) -> _Heads:
        size = config.kv_channels or config.hidden_size // config.num_attention_heads
        return cls(config.num_attention_heads, config.num_query_groups, size)

    @property
    def group_rows(self) -> int:
        """Query rows of one group."""
        return self.num_heads // self.num_groups * self.head_size


# (part, first HF row, rows) in the order of the fused matrix
_Run = tuple[str, int, int]


def _fused_column(subject: Subject, runs: Iterator[_Run], tensors: Mapping[str, HfTensor]) -> Iterator[Piece]:
    """A fused matrix of `runs` of HF rows, cut along its own rows in equal parts, wherever heads end."""
    offset = -subject.tp_rank * subject.param.num_tp_rows
    for part, tensor_row, num_rows in runs:
        yield Piece(tensors[part], offset, tensor_row, num_rows)
        offset += num_rows


def _num_rows(runs: Iterator[_Run]) -> int:
    return sum(num_rows for _, _, num_rows in runs)


def _qkv_runs(heads: _Heads, gated: bool) -> Iterator[_Run]:
    """Per query group: its queries, with an output gate the gates of these heads, one key, one value head.

    HF keeps a gated query projection as (query, gate) per head.
    """
    size = heads.head_size
    for group in range(heads.num_groups):
        per_group = heads.num_heads // heads.num_groups
        first, last = group * per_group, (group + 1) * per_group
        if gated:
            yield from (("q", 2 * head * size, size) for head in range(first, last))
            yield from (("q", (2 * head + 1) * size, size) for head in range(first, last))
        else:
            yield "q", first * size, heads.group_rows
        yield "k", group * size, size
        yield "v", group * size, size


def qkv(subject: Subject) -> Iterator[Piece]:
    """Fused queries, keys, values (weights and biases), interleaved by query group."""
    runs = functools.partial(_qkv_runs, _Heads.of(subject.config), _has_output_gate(subject.config))
    subject.check_rows(_num_rows(runs()))
    yield from _fused_column(subject, runs(), {part: subject.hf(part) for part in "qkv"})


def _has_output_gate(config: Any) -> bool:
    return bool(config.attention_output_gate)


def qkv_concatenated(subject: Subject) -> Iterator[Piece]:
    """The same on the Megatron side; HF has one tensor [queries; keys; values]."""
    heads = _Heads.of(subject.config)
    subject.check_rows(subject.only.shape[0])
    keys = heads.num_heads * heads.head_size
    base = {"q": 0, "k": keys, "v": keys + heads.num_groups * heads.head_size}
    runs = (("only", base[part] + start, size) for part, start, size in _qkv_runs(heads, False))
    yield from _fused_column(subject, runs, {"only": subject.only})


def qkv_with_head_gate(subject: Subject) -> Iterator[Piece]:
    """QKV and one gate row per head: behind all of it, or repeated over a head's rows (the first counts)."""
    heads, tensors = _Heads.of(subject.config), {part: subject.hf(part) for part in "qkvg"}
    if not _has_output_gate(subject.config):
        runs = [*_qkv_runs(heads, False), ("g", 0, heads.num_heads)]
        subject.check_rows(_num_rows(iter(runs)))
        yield from _fused_column(subject, iter(runs), tensors)
        return
    size, per_group = heads.head_size, heads.num_heads // heads.num_groups
    fused_rows = 2 * (heads.num_heads + heads.num_groups) * size
    subject.check_rows(fused_rows)
    offset = -subject.tp_rank * subject.param.num_tp_rows
    for group in range(heads.num_groups):
        first = group * per_group
        yield Piece(tensors["q"], offset, first * size, per_group * size)
        offset += per_group * size
        for head in range(first, first + per_group):
            yield Piece(tensors["g"], offset, head, 1)
            offset += size
        for part in "kv":
            yield Piece(tensors[part], offset, group * size, size)
            offset += size


def kv(subject: Subject) -> Iterator[Piece]:
    """Fused keys and values, interleaved by query group."""
    heads = _Heads.of(subject.config)
    subject.check_rows(2 * heads.num_groups * heads.head_size)
    size = heads.head_size
    runs = ((part, group * size, size) for group in range(heads.num_groups) for part in "kv")
    yield from _fused_column(subject, runs, {part: subject.hf(part) for part in "kv"})


def _blocks(subject: Subject, blocks: list[tuple[HfTensor, int, int]]) -> Iterator[Piece]:
    """Each TP rank stores its equal part of every block (tensor, first HF row, HF rows), one after another."""
    subject.check_rows(sum(num_rows for _, _, num_rows in blocks))
    local_row = 0
    for tensor, first, num_rows in blocks:
        part, rest = divmod(num_rows, subject.tp_size)
        if rest:
            raise CannotLowerError(f"{tensor.name}: {num_rows} rows do not divide by TP {subject.tp_size}")
        yield Piece(tensor, local_row, first + subject.tp_rank * part, part)
        local_row += part


def gated_mlp(subject: Subject) -> Iterator[Piece]:
    """Gate and up: every rank stores [its gate rows; its up rows]."""
    gate, up = subject.hf("gate"), subject.hf("up")
    yield from _blocks(subject, [(gate, 0, gate.shape[0]), (up, 0, up.shape[0])])


def mamba_in_proj(subject: Subject) -> Iterator[Piece]:
    """z, x, B, C, dt of a Mamba2 mixer, concatenated in HF, each cut by TP in Megatron."""
    inner, states, heads = _mamba_sizes(subject.config)
    yield from _consecutive(subject, (inner, inner, states, states, heads))


def mamba_conv1d(subject: Subject) -> Iterator[Piece]:
    """x, B, C channels of the Mamba2 convolution (weight or bias)."""
    inner, states, _ = _mamba_sizes(subject.config)
    yield from _consecutive(subject, (inner, states, states))


def _mamba_sizes(config: Any) -> tuple[int, int, int]:
    inner = config.mamba_num_heads * config.mamba_head_dim
    return inner, config.mamba_state_dim * config.mamba_num_groups, config.mamba_num_heads


def gdn_conv1d(subject: Subject) -> Iterator[Piece]:
    """q, k, v channels of a gated delta net's convolution."""
    config = subject.config
    keys = config.linear_key_head_dim * config.linear_num_key_heads
    values = config.linear_value_head_dim * config.linear_num_value_heads
    yield from _consecutive(subject, (keys, keys, values))


def fused_expert(subject: Subject) -> Iterator[Piece]:
    """One expert of an HF tensor [experts, rows, columns]."""
    kind = subject.kind
    rows, columns = subject.param.tp_shape
    full = (rows * subject.tp_size, columns) if kind == "column" else (rows, columns * subject.tp_size)
    tensor, dims = subject.one_expert(full)
    pieces = {"column": column, "row": row, "replicated": replicated}[kind]
    stored = HfTensor(tensor.name, full, tensor.expert)
    for piece in pieces(replace(subject, tensor=lambda _: stored)):
        yield replace(piece, tensor=tensor, dims=dims)


def fused_gated_expert(subject: Subject) -> Iterator[Piece]:
    """One expert of an HF tensor [experts, gate rows + up rows, columns]."""
    rows, columns = subject.param.tp_shape
    tensor, dims = subject.one_expert((rows * subject.tp_size, columns))
    half = rows * subject.tp_size // 2
    stored = HfTensor(tensor.name, (2 * half, columns), tensor.expert)
    for piece in _blocks(subject, [(stored, 0, half), (stored, half, half)]):
        yield replace(piece, tensor=tensor, dims=dims)


def _consecutive(subject: Subject, sizes: tuple[int, ...]) -> Iterator[Piece]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    yield from _blocks(subject, [(subject.only, *part) for part in zip(starts, sizes, strict=True)])


def gdn_in_proj_separate(subject: Subject) -> Iterator[Piece]:
    """q, k, v in one HF tensor, gate z, beta b and decay a in one each; every rank stores its part of each."""
    config = subject.config
    keys = config.linear_key_head_dim * config.linear_num_key_heads
    values = config.linear_value_head_dim * config.linear_num_value_heads
    fused = subject.hf("qkv")
    blocks = [(fused, 0, keys), (fused, keys, keys), (fused, 2 * keys, values)]
    blocks += [(subject.hf("z"), 0, values)]
    blocks += [(subject.hf(part), 0, config.linear_num_value_heads) for part in "ba"]
    yield from _blocks(subject, blocks)


def gdn_in_proj(subject: Subject) -> Iterator[Piece]:
    """HF groups (q, k, v, z) and (b, a) by key head; every rank stores its heads' q, then k, v, z, b, a."""
    config, heads = subject.config, subject.config.linear_num_key_heads
    values_per_head = config.linear_num_value_heads // heads
    key, value = config.linear_key_head_dim, values_per_head * config.linear_value_head_dim
    layout = [
        (subject.hf("qkvz"), (key, key, value, value)),
        (subject.hf("ba"), (values_per_head, values_per_head)),
    ]
    subject.check_rows(sum(heads * sum(sizes) for _, sizes in layout))
    first_head, num_heads = subject.tp_rank * heads // subject.tp_size, heads // subject.tp_size
    local_row = 0
    for tensor, sizes in layout:
        for position, size in enumerate(sizes):
            for head in range(first_head, first_head + num_heads):
                yield Piece(tensor, local_row, head * sum(sizes) + sum(sizes[:position]), size)
                local_row += size


@functools.cache
def rules() -> Mapping[type, Rule]:
    """Every mapping class that has a rule. Bridge must have been imported."""
    from megatron.bridge.models.conversion import param_mapping as bridge

    return {
        bridge.AutoMapping: auto,
        bridge.ColumnParallelMapping: column,
        bridge.RowParallelMapping: row,
        bridge.ReplicatedMapping: replicated,
        bridge.DirectMapping: replicated,
        bridge.QKVMapping: qkv,
        bridge.ConcatenatedQKVMapping: qkv_concatenated,
        bridge.QKVGMapping: qkv_with_head_gate,
        bridge.KVMapping: kv,
        bridge.GatedMLPMapping: gated_mlp,
        bridge.FusedExpertMapping: fused_expert,
        bridge.FusedGatedExpertMapping: fused_gated_expert,
        bridge.MambaInProjMapping: mamba_in_proj,
        bridge.MambaConv1dMapping: mamba_conv1d,
        bridge.GDNConv1dMapping: gdn_conv1d,
        bridge.GDNLinearMapping: gdn_in_proj,
        bridge.GDNLinearMappingSeparate: gdn_in_proj_separate,
    }
