"""What vLLM engines hold in the layout that their loaders write, from a model and a mesh."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from refit.plan.collector import collector_paused
from refit.plan.errors import ConfigError
from refit.plan.manifest import Manifest, MiscReason, RankManifest
from refit.plan.synth.emit import Block, Emitter, cut_parts
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
from refit.plan.synth.parallel import GenMesh, even_share

VOCABULARY_PADDING_ROWS = 64
# The engine's own names of the stacked experts are known to the generator adapter alone. A plan needs no more than
# names that differ, so these two are our own; every other param has the engine's name.
EXPERT_UPS, EXPERT_DOWNS = "routed_experts.ups", "routed_experts.downs"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands inside its replica."""

    stage: int
    tp: int
    ep: int

    @classmethod
    def of(cls, mesh: GenMesh, rank: int) -> "Place":
        inside = rank % mesh.ranks_per_replica
        tp, engine = inside % mesh.tp, inside // (mesh.tp * mesh.pp)
        return cls(inside // mesh.tp % mesh.pp, tp, engine * mesh.tp + tp if mesh.ep else 0)


@collector_paused()
def gen_manifest(model: Model, mesh: GenMesh) -> Manifest:
    """All generators. Equal places of all replicas share one body; cost is per place.

    Raises ConfigError for `ep` of a model without experts, as vLLM does.
    """
    if mesh.ep and not model.has_experts:
        raise ConfigError(f"gen ep={mesh.ep}: {model.name} has no experts; leave that out")
    bodies: dict[Place, RankManifest] = {}
    ranks: list[RankManifest] = []
    for rank in range(mesh.num_ranks):
        place, replica = Place.of(mesh, rank), rank // mesh.ranks_per_replica
        if place not in bodies:
            bodies[place] = _body(model, mesh, place, rank, replica)
            ranks.append(bodies[place])
        else:
            ranks.append(bodies[place].sibling(rank, replica))
    return Manifest("gen", tuple(ranks))


def _body(model: Model, mesh: GenMesh, place: Place, rank: int, replica: int) -> RankManifest:
    lowering = _Lowering(mesh, place, Emitter("gen", mesh.dtype))
    if place.stage == 0:
        for module in model.first:
            lowering.add(module)
    for layer in mesh.stage_layers(len(model.layers))[place.stage]:
        for module in model.layers[layer]:
            lowering.add(module)
    if place.stage == mesh.pp - 1:
        for module in model.last:
            shared = model.tied and isinstance(module, Vocabulary) and mesh.pp == 1
            if not shared:
                lowering.add(module)
    manifest = lowering.emitter.manifest(rank, place.stage, replica)
    if not lowering.misc:
        return manifest
    parts = (manifest.tensors, manifest.params, manifest.holdings, tuple(lowering.misc))
    return RankManifest("gen", rank, place.stage, replica, *parts)


class _Lowering:
    def __init__(self, mesh: GenMesh, place: Place, emitter: Emitter) -> None:
        self.mesh, self.place, self.emitter = mesh, place, emitter
        self.misc: list[MiscReason] = []

    def add(self, module: Module) -> None:
        self.emitter.shapes.update(shapes(module))
        if isinstance(
            module, Mamba
        ):  # the engine computes with -exp(A_log), in float32 whatever the model has
            self.emitter.shapes[f"{module.name}.A_log"] = ((module.num_heads,), "float32")
        match module:
            case Vector():
                self._rows(module.name, [Block(module.name, 0, module.size)])
            case Vocabulary():
                self._vocabulary(module)
            case Linear():
                self._linear(module)
            case Attention():
                self._attention(module)
            case LatentDown():
                self._latent(module)
            case Mlp():
                self._mlp(module)
            case Experts():
                self._experts(module)
            case Mamba():
                self._mamba(module)
            case _:
                assert_never(module)

    def _rows(self, param: str, blocks: Sequence[Block]) -> None:
        """Nemotron-H is the one family whose params the engine does not name as the checkpoint names its tensors."""
        if param.startswith("backbone."):
            param = param.replace("backbone.", "model.", 1).replace(".embeddings.", ".embed_tokens.")
        self.emitter.rows(param, blocks)

    def _vocabulary(self, module: Vocabulary) -> None:
        padded = module.num_rows + -module.num_rows % VOCABULARY_PADDING_ROWS
        low, high = even_share("padded vocabulary", padded, self.mesh.tp, self.place.tp)
        self._rows(f"{module.name}.weight", [Block(f"{module.name}.weight", low, high)])

    def _linear(self, module: Linear) -> None:
        rows, columns = (0, module.out_size), (0, module.in_size)
        if module.cut == "column":
            rows = even_share(f"{module.name} rows", module.out_size, self.mesh.tp, self.place.tp)
        elif module.cut == "row":
            columns = even_share(f"{module.name} columns", module.in_size, self.mesh.tp, self.place.tp)
        self._rows(f"{module.name}.weight", [Block(f"{module.name}.weight", *rows, columns)])
        if module.bias:
            self._rows(f"{module.name}.bias", [Block(f"{module.name}.bias", *rows)])

    def _attention(self, module: Attention) -> None:
        """Rows are this rank's q heads, then k, then v; a KV head is repeated where TP exceeds their number."""
        tp, size = self.mesh.tp, module.head_size
        q_low, q_high = even_share(f"{module.name} heads", module.num_heads, tp, self.place.tp)
        if module.num_kv_heads >= tp:
            low, high = even_share(f"{module.name} KV heads", module.num_kv_heads, tp, self.place.tp)
        elif tp % module.num_kv_heads:
            raise ConfigError(
                f"{module.name} has {module.num_kv_heads} KV heads; gen tp={tp} must be a multiple"
            )
        else:
            low = self.place.tp // (tp // module.num_kv_heads)
            high = low + 1
        for kind in ("weight", "bias") if module.bias else ("weight",):
            blocks = [
                Block(f"{module.name}.q_proj.{kind}", q_low * size, q_high * size),
                Block(f"{module.name}.k_proj.{kind}", low * size, high * size),
                Block(f"{module.name}.v_proj.{kind}", low * size, high * size),
            ]
            self._rows(f"{module.name}.qkv_proj.{kind}", blocks)

    def _latent(self, module: LatentDown) -> None:
        blocks = [Block(f"{module.name}.kv_a_proj_with_mqa.weight", 0, module.num_kv)]
        if module.num_q:
            blocks = [Block(f"{module.name}.q_a_proj.weight", 0, module.num_q), *blocks]
        fused = "fused_qkv_a_proj" if module.num_q else "kv_a_proj_with_mqa"
        self._rows(f"{module.name}.{fused}.weight", blocks)

    def _mlp(self, module: Mlp) -> None:
        low, high = even_share(f"{module.name} size", module.size, self.mesh.tp, self.place.tp)
        ups = ("gate", "up") if module.gated else ("up",)
        blocks = [Block(f"{module.name}.{part}_proj.weight", low, high) for part in ups]
        fused = "gate_up_proj" if module.gated else "up_proj"
        self._rows(f"{module.name}.{fused}.weight", blocks)
        down = Block(f"{module.name}.down_proj.weight", 0, module.hidden, (low, high))
        self._rows(f"{module.name}.down_proj.weight", [down])

    def _experts(self, module: Experts) -> None:
        experts, (low, high) = range(module.num_experts), (0, module.size)
        if self.mesh.ep:
            experts = linear_experts(module.num_experts, self.mesh.tp * self.mesh.dp, self.place.ep)
        else:
            low, high = even_share(f"{module.name} size", module.size, self.mesh.tp, self.place.tp)
        if not experts:
            return
        ups = ("gate", "up") if module.gated else ("up",)
        blocks = [Block(f"{module.name}.*.{part}_proj.weight", low, high) for part in ups]
        self.emitter.expert_rows(f"{module.name}.{EXPERT_UPS}", blocks, experts)
        down = Block(f"{module.name}.*.down_proj.weight", 0, module.hidden, (low, high))
        self.emitter.expert_rows(f"{module.name}.{EXPERT_DOWNS}", [down], experts)

    def _mamba(self, module: Mamba) -> None:
        inner, groups, heads = module.inner, module.group_rows, module.num_heads
        name = module.name
        self._rows(
            f"{name}.in_proj.weight",
            self._parts(module, "in_proj.weight", (inner, inner, groups, groups, heads)),
        )
        for kind in ("weight", "bias") if module.conv_bias else ("weight",):
            self._rows(
                f"{name}.conv1d.{kind}", self._parts(module, f"conv1d.{kind}", (inner, groups, groups))
            )
        for tensor in ("D", "dt_bias"):
            self._rows(f"{name}.{tensor}", self._parts(module, tensor, (heads,)))
        self.emitter.name(f"{name}.A_log")
        self.misc.append(MiscReason(f"{name}.A_log", "the loader stores -exp(A_log), which is not a view"))
        self._rows(f"{name}.norm.weight", self._parts(module, "norm.weight", (inner,)))
        columns = even_share(f"{name} inner size", inner, self.mesh.tp, self.place.tp)
        self._rows(f"{name}.out_proj.weight", [Block(f"{name}.out_proj.weight", 0, module.hidden, columns)])

    def _parts(self, module: Mamba, tensor: str, sizes: Sequence[int]) -> list[Block]:
        return cut_parts(f"{module.name}.{tensor}", sizes, self.mesh.tp, self.place.tp)


def linear_experts(num_experts: int, parts: int, index: int) -> range:
    """vLLM's linear placement: the first `num_experts % parts` ranks hold one expert more."""
    base, more = divmod(num_experts, parts)
    start = index * base + min(index, more)
    return range(start, start + base + (1 if index < more else 0))
