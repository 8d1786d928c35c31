"""What Megatron-Core trainers hold, from a model and a mesh: its local parameter names and its fused orders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from refit.plan.collector import collector_paused
from refit.plan.errors import ConfigError
from refit.plan.manifest import Manifest, RankManifest
from refit.plan.synth.emit import Block, Emitter, cut_parts, num_rows, window
from refit.plan.synth.modules import (
    Attention,
    Experts,
    LatentDown,
    Linear,
    Mamba,
    Mlp,
    Model,
    Module,
    Vector,
    Vocabulary,
    shapes,
)
from refit.plan.synth.parallel import TrainMesh, even_share

GTP_ALIGNMENT_ROWS = 16
MAX_VOCABULARY_MULTIPLE = (
    128  # rows per TP rank are a multiple of the largest power of two in the vocabulary, up to this
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands on the axes that decide what it holds."""

    stage: int
    tp: int
    gtp: int
    etp: int
    ep: int
    egtp: int

    @classmethod
    def of(cls, mesh: TrainMesh, rank: int) -> "Place":
        stage, inside = divmod(rank, mesh.ranks_per_stage)
        dense = inside // mesh.tp
        expert = inside // mesh.expert_tp
        return cls(
            stage,
            inside % mesh.tp,
            dense % mesh.gtp,
            inside % mesh.expert_tp,
            expert % mesh.ep,
            expert // mesh.ep % mesh.egtp,
        )


@collector_paused()
def train_manifest(model: Model, mesh: TrainMesh) -> Manifest:
    """All trainers. Ranks in the same place share one body; cost is per distinct place.

    Raises ConfigError for axes of experts that the model does not have, as Megatron does.
    """
    axes = {"ep": mesh.ep, "etp": mesh.etp, "egtp": mesh.egtp}
    cut = [f"{key}={size}" for key, size in axes.items() if size > 1]
    if cut and not model.has_experts:
        raise ConfigError(f"train {', '.join(cut)}: {model.name} has no experts; leave that out")
    bodies: dict[Place, RankManifest] = {}
    ranks: list[RankManifest] = []
    for rank in range(mesh.num_ranks):
        place = Place.of(mesh, rank)
        if place not in bodies:
            bodies[place] = _body(model, mesh, place, rank)
            ranks.append(bodies[place])
        else:
            ranks.append(bodies[place].sibling(rank, 0))
    return Manifest("train", tuple(ranks))


def _body(model: Model, mesh: TrainMesh, place: Place, rank: int) -> RankManifest:
    lowering = _Lowering(mesh, place, Emitter("train", mesh.dtype))
    chunks = mesh.chunks(len(model.layers))[place.stage]
    last_stage, last_chunk = mesh.pp - 1, len(chunks) - 1
    if place.stage == 0:
        for module in model.first:
            lowering.add("chunk0/", module)
    for number, layers in enumerate(chunks):
        for local, layer in enumerate(layers):
            for module in model.layers[layer]:
                lowering.add(f"chunk{number}/decoder.layers.{local}.", module)
    if place.stage == last_stage:
        for module in model.last:
            if not (
                model.tied and isinstance(module, Vocabulary)
            ):  # a second copy of the embedding is no source
                lowering.add(f"chunk{last_chunk}/", module)
    return lowering.emitter.manifest(rank, place.stage, 0)


@dataclass(slots=True)
class _Lowering:
    mesh: TrainMesh
    place: Place
    emitter: Emitter

    def add(self, prefix: str, module: Module) -> None:
        named = shapes(module)
        self.emitter.shapes.update(named)
        for tensor in named:  # a rank names all tensors of its params, also those of which it holds no row
            self.emitter.name(tensor)
        match module:
            case Vector():
                self.emitter.rows(prefix + module.train, [Block(module.name, 0, module.size)])
            case Vocabulary():
                self._vocabulary(prefix, module)
            case Linear():
                self._linear(prefix, module)
            case Attention():
                self._attention(prefix, module)
            case LatentDown():
                self._latent(prefix, module)
            case Mlp():
                self._mlp(prefix, module)
            case Experts():
                self._experts(prefix, module)
            case Mamba():
                self._mamba(prefix, module)
            case _:
                assert_never(module)

    def _weight(self, param: str, blocks: Sequence[Block], expert: bool = False) -> None:
        """A matrix, cut once more over the GTP axis: rows padded to a multiple, then dealt evenly."""
        parts = self.mesh.egtp if expert else self.mesh.gtp
        if parts == 1:
            self.emitter.rows(param, blocks)
            return
        total = num_rows(blocks)
        pad = -total % (GTP_ALIGNMENT_ROWS * parts)
        stored = (total + pad) // parts
        low = (self.place.egtp if expert else self.place.gtp) * stored
        self.emitter.rows(param, window(blocks, low, min(low + stored, total)), stored)

    def _vocabulary(self, prefix: str, module: Vocabulary) -> None:
        multiple = self.mesh.tp * min(module.num_rows & -module.num_rows, MAX_VOCABULARY_MULTIPLE)
        padded = module.num_rows + -module.num_rows % multiple
        low, high = even_share("padded vocabulary", padded, self.mesh.tp, self.place.tp)
        self._weight(f"{prefix}{module.train}.weight", [Block(f"{module.name}.weight", low, high)])

    def _linear(self, prefix: str, module: Linear) -> None:
        rows, columns = (0, module.out_size), (0, module.in_size)
        if module.cut == "column":
            rows = even_share(f"{module.name} rows", module.out_size, self.mesh.tp, self.place.tp)
        elif module.cut == "row":
            columns = even_share(f"{module.name} columns", module.in_size, self.mesh.tp, self.place.tp)
        block = Block(f"{module.name}.weight", *rows, columns)
        if module.train == "mlp.router":
            self.emitter.rows(f"{prefix}{module.train}.weight", [block])
        else:
            self._weight(f"{prefix}{module.train}.weight", [block])
        if module.bias:
            self.emitter.rows(f"{prefix}{module.train}.bias", [Block(f"{module.name}.bias", *rows)])

    def _attention(self, prefix: str, module: Attention) -> None:
        """Rows go group by group: the group's q heads, its k head, its v head; then evenly over TP."""
        for kind in ("weight", "bias") if module.bias else ("weight",):
            blocks = tuple(_query_groups(module, kind))
            low, high = even_share(
                f"{module.name} q, k, v rows", num_rows(blocks), self.mesh.tp, self.place.tp
            )
            mine = window(blocks, low, high)
            name = f"{prefix}self_attention.linear_qkv.{kind}"
            if kind == "weight":
                self._weight(name, mine)
            else:
                self.emitter.rows(name, mine)

    def _latent(self, prefix: str, module: LatentDown) -> None:
        """Transformer Engine keeps the down projections whole on every TP rank; Megatron's own layers cut them."""
        parts = [("kv_a_proj_with_mqa", "linear_kv_down_proj", module.num_kv)]
        if module.num_q:
            parts.append(("q_a_proj", "linear_q_down_proj", module.num_q))
        for name, train, size in parts:
            low, high = 0, size
            if not self.mesh.te:
                low, high = even_share(f"{module.name}.{name} rows", size, self.mesh.tp, self.place.tp)
            block = Block(f"{module.name}.{name}.weight", low, high)
            self._weight(f"{prefix}self_attention.{train}.weight", [block])

    def _mlp(self, prefix: str, module: Mlp) -> None:
        low, high = even_share(f"{module.name} size", module.size, self.mesh.tp, self.place.tp)
        ups = ("gate", "up") if module.gated else ("up",)
        blocks = [Block(f"{module.name}.{part}_proj.weight", low, high) for part in ups]
        self._weight(f"{prefix}{module.train}.linear_fc1.weight", blocks)
        down = Block(f"{module.name}.down_proj.weight", 0, module.hidden, (low, high))
        self._weight(f"{prefix}{module.train}.linear_fc2.weight", [down])

    def _experts(self, prefix: str, module: Experts) -> None:
        first, stop = even_share(f"{module.name} experts", module.num_experts, self.mesh.ep, self.place.ep)
        low, high = even_share(f"{module.name} size", module.size, self.mesh.expert_tp, self.place.etp)
        ups = ("gate", "up") if module.gated else ("up",)
        for expert in range(first, stop):
            blocks = [Block(f"{module.name}.*.{part}_proj.weight", low, high, expert=expert) for part in ups]
            down = Block(f"{module.name}.*.down_proj.weight", 0, module.hidden, (low, high), expert)
            head = f"{prefix}mlp.experts.local_experts.{expert - first}"
            self._weight(f"{head}.linear_fc1.weight", blocks, expert=True)
            self._weight(f"{head}.linear_fc2.weight", [down], expert=True)

    def _mamba(self, prefix: str, module: Mamba) -> None:
        """in_proj rows are z, x, B, C, dt and conv1d rows x, B, C, each part cut evenly over TP."""
        inner, groups, heads = module.inner, module.group_rows, module.num_heads
        head = f"{prefix}mixer"
        self._weight(
            f"{head}.in_proj.weight",
            self._parts(module, "in_proj.weight", (inner, inner, groups, groups, heads)),
        )
        for kind in ("weight", "bias") if module.conv_bias else ("weight",):
            self.emitter.rows(
                f"{head}.conv1d_{kind}", self._parts(module, f"conv1d.{kind}", (inner, groups, groups))
            )
        for name in ("A_log", "D", "dt_bias"):
            self.emitter.rows(f"{head}.{name}", self._parts(module, name, (heads,)))
        self.emitter.rows(f"{head}.norm.weight", self._parts(module, "norm.weight", (inner,)))
        columns = even_share(f"{module.name} inner size", inner, self.mesh.tp, self.place.tp)
        out = Block(f"{module.name}.out_proj.weight", 0, module.hidden, columns)
        self._weight(f"{head}.out_proj.weight", [out])

    def _parts(self, module: Mamba, tensor: str, sizes: Sequence[int]) -> list[Block]:
        return cut_parts(f"{module.name}.{tensor}", sizes, self.mesh.tp, self.place.tp)


def _query_groups(module: Attention, kind: str) -> Sequence[Block]:
    size = module.head_size
    per_group = module.num_heads // module.num_kv_heads * size
    blocks: list[Block] = []
    for group in range(module.num_kv_heads):
        blocks.append(Block(f"{module.name}.q_proj.{kind}", group * per_group, (group + 1) * per_group))
        blocks.append(Block(f"{module.name}.k_proj.{kind}", group * size, (group + 1) * size))
        blocks.append(Block(f"{module.name}.v_proj.{kind}", group * size, (group + 1) * size))
    return blocks
