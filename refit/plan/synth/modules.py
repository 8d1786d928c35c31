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


type Module = Vector | Vocabulary | Linear | Attention | LatentDown | Mlp | Experts | Mamba


@dataclass(frozen=True, slots=True)
class Model:
    """A whole model. `first` stands before the layers, `last` behind them."""

    name: str
    first: tuple[Module, ...]
    layers: tuple[tuple[Module, ...], ...]
    last: tuple[Module, ...]
    tied: bool


def shapes(module: Module) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Canonical tensors of a part: name -> (shape, fixed dtype or None for the model's own)."""
    match module:
        case Vector():
            return {module.name: ((module.size,), module.dtype)}
        case Vocabulary():
            return {f"{module.name}.weight": ((module.num_rows, module.hidden), None)}
        case Linear():
            return _with_bias(module.name, module.out_size, module.in_size, module.bias)
        case Attention():
            found: dict[str, tuple[tuple[int, ...], str | None]] = {}
            for part, heads in (
                ("q", module.num_heads),
                ("k", module.num_kv_heads),
                ("v", module.num_kv_heads),
            ):
                rows = heads * module.head_size
                found |= _with_bias(f"{module.name}.{part}_proj", rows, module.hidden, module.bias)
            return found
        case LatentDown():
            q = (
                {f"{module.name}.q_a_proj.weight": ((module.num_q, module.hidden), None)}
                if module.num_q
                else {}
            )
            return {**q, f"{module.name}.kv_a_proj_with_mqa.weight": ((module.num_kv, module.hidden), None)}
        case Mlp() | Experts():
            return _mlp_shapes(module)
        case Mamba():
            return _mamba_shapes(module)


def _with_bias(
    name: str, rows: int, columns: int, bias: bool
) -> dict[str, tuple[tuple[int, ...], str | None]]:
    weight: dict[str, tuple[tuple[int, ...], str | None]] = {f"{name}.weight": ((rows, columns), None)}
    return {**weight, f"{name}.bias": ((rows,), None)} if bias else weight


def _mlp_shapes(module: Mlp | Experts) -> dict[str, tuple[tuple[int, ...], str | None]]:
    head: str = module.name
    stack: tuple[int, ...] = ()
    if isinstance(module, Experts):
        head, stack = f"{module.name}.*", (module.num_experts,)
    ups = ("gate", "up") if module.gated else ("up",)
    found: dict[str, tuple[tuple[int, ...], str | None]] = {
        f"{head}.{part}_proj.weight": ((*stack, module.size, module.hidden), None) for part in ups
    }
    return {**found, f"{head}.down_proj.weight": ((*stack, module.hidden, module.size), None)}


def _mamba_shapes(module: Mamba) -> dict[str, tuple[tuple[int, ...], str | None]]:
    conv_rows = module.inner + 2 * module.group_rows
    in_rows = module.inner + conv_rows + module.num_heads
    name = module.name
    found: dict[str, tuple[tuple[int, ...], str | None]] = {
        f"{name}.in_proj.weight": ((in_rows, module.hidden), None),
        f"{name}.conv1d.weight": ((conv_rows, 1, module.kernel_size), None),
        f"{name}.A_log": ((module.num_heads,), "float32"),
        f"{name}.D": ((module.num_heads,), "float32"),
        f"{name}.dt_bias": ((module.num_heads,), "float32"),
        f"{name}.norm.weight": ((module.inner,), None),
        f"{name}.out_proj.weight": ((module.hidden, module.inner), None),
    }
    return {**found, f"{name}.conv1d.bias": ((conv_rows,), None)} if module.conv_bias else found
