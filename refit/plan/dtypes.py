"""Names and sizes of element types, and which of them may be cast on the sender."""

from refit.plan.errors import PlanError

ITEM_BYTES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
CASTABLE = frozenset({"float64", "float32", "float16", "bfloat16"})


def item_bytes(dtype: str) -> int:
    """Bytes of one element. Raises PlanError for a dtype that the planner does not know."""
    size = ITEM_BYTES.get(dtype)
    if size is None:
        raise PlanError(f"dtype {dtype!r} is not known; known are {', '.join(sorted(ITEM_BYTES))}")
    return size


def can_cast(stored: str, wire: str) -> bool:
    """True if a sender may turn `stored` into `wire` element by element, with no scale or other tensor
    involved."""
    return stored == wire or (stored in CASTABLE and wire in CASTABLE)
