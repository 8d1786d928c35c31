"""The parts of a model that both sides lay out: sizes and HF names, nothing about parallelism.

`name` is the HF prefix of the part's tensors. Sizes are in elements.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vector:
    """One 1-D tensor that every tensor-parallel rank holds whole. `train` is Megatron's local name."""

    name: str
    train: str
    size: int
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Embedding or output matrix [rows, hidden], rows cut by tensor parallelism, padded by both sides."""

    name: str
    train: str
    num_rows: int
    hidden: int


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix [out, in]. cut is "column" (rows of the matrix), "row" (its columns) or "none"."""

    name: str
    train: str
    out_size: int
    in_size: int
    cut: str
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """q, k, v projections, which both sides store as one matrix in different orders, and their output."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LatentDown:
    """MLA's two down projections, fused on the generator; q may be absent (num_q 0)."""

    name: str
    num_q: int
    num_kv: int
    hidden: int


@dataclass(frozen=True, slots=True)
class Mlp:
    """Dense or shared-expert MLP: (gate and) up [size, hidden], down [hidden, size]."""

    name: str
    train: str
    size: int
    hidden: int
    gated: bool


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts, stacked in the index space: (gate and) up [E, size, hidden], down [E, hidden, size]."""

    name: str
    num_experts: int
    size: int
    hidden: int
    gated: bool


@dataclass(frozen=True, slots=True)
class Mamba:
    """A Mamba-2 mixer. in_proj rows are z, x, B, C, dt; conv1d rows are x, B, C."""

    name: str
    num_heads: int
    head_size: int
    num_groups: int
    state_size: int
    kernel_size: int
    hidden: int
    conv_bias: bool

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_size

    @property
    def group_rows(self) -> int:
        return self.num_groups * self.state_size


# canonical tensor name -> (shape, fixed dtype, or None for the model's own)
type Shapes = dict[str, tuple[tuple[int, ...], str | None]]
type Module = Vector | Vocabulary | Linear | Attention | LatentDown | Mlp | Experts | Mamba


@dataclass(frozen=True, slots=True)
class Model:
    """A whole model. `first` stands before the layers, `last` behind them."""

    name: str
    first: tuple[Module, ...]
    layers: tuple[tuple[Module, ...], ...]
    last: tuple[Module, ...]
    tied: bool

    @property
    def has_experts(self) -> bool:
        return any(isinstance(module, Experts) for layer in self.layers for module in layer)


def shapes(module: Module) -> Shapes:
    """Canonical tensors of a part."""
    match module:
        case Vector():
            return {module.name: ((module.size,), module.dtype)}
        case Vocabulary():
            return {f"{module.name}.weight": ((module.num_rows, module.hidden), None)}
        case Linear():
            return _with_bias(module.name, module.out_size, module.in_size, module.bias)
        case Attention():
            found: Shapes = {}
            for part, heads in zip("qkv", (module.num_heads, *(module.num_kv_heads,) * 2), strict=True):
                rows = heads * module.head_size
                found |= _with_bias(f"{module.name}.{part}_proj", rows, module.hidden, module.bias)
            return found
        case LatentDown():
            downs = {"q_a_proj": module.num_q} if module.num_q else {}
            downs["kv_a_proj_with_mqa"] = module.num_kv
            return {
                f"{module.name}.{part}.weight": ((rows, module.hidden), None) for part, rows in downs.items()
            }
        case Mlp() | Experts():
            return _mlp_shapes(module)
        case Mamba():
            return _mamba_shapes(module)


def _with_bias(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": ((rows, columns), None)}
    return {**weight, f"{name}.bias": ((rows,), None)} if bias else weight


def _mlp_shapes(module: Mlp | Experts) -> Shapes:
    head: str = module.name
    stack: tuple[int, ...] = ()
    if isinstance(module, Experts):
        head, stack = f"{module.name}.*", (module.num_experts,)
    ups = ("gate", "up") if module.gated else ("up",)
    found: Shapes = {
        f"{head}.{part}_proj.weight": ((*stack, module.size, module.hidden), None) for part in ups
    }
    return {**found, f"{head}.down_proj.weight": ((*stack, module.hidden, module.size), None)}


def _mamba_shapes(module: Mamba) -> Shapes:
    conv_rows = module.inner + 2 * module.group_rows
    in_rows = module.inner + conv_rows + module.num_heads
    name = module.name
    found: Shapes = {
        f"{name}.in_proj.weight": ((in_rows, module.hidden), None),
        f"{name}.conv1d.weight": ((conv_rows, 1, module.kernel_size), None),
        f"{name}.A_log": ((module.num_heads,), None),
        f"{name}.D": ((module.num_heads,), None),
        f"{name}.dt_bias": ((module.num_heads,), None),
        f"{name}.norm.weight": ((module.inner,), None),
        f"{name}.out_proj.weight": ((module.hidden, module.inner), None),
    }
    return {**found, f"{name}.conv1d.bias": ((conv_rows,), None)} if module.conv_bias else found
