"""Strict reading of JSON values. Every fault raises PlanError with the path of the value in the document."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from refit.plan.errors import PlanError

MAX_INT = 2**62
MAX_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Node:
    """One JSON value and where it stands, for example `$.ranks[3].stage`."""

    value: Any
    path: str

    @classmethod
    def parse(cls, text: str) -> "Node":
        """The document as a node. Duplicate keys, NaN and numbers that are no ints are refused."""
        if not isinstance(text, str):
            raise PlanError(f"$: wire text must be a str, got {type(text).__name__}")
        try:
            value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except RecursionError as fault:
            raise PlanError("$: the document is nested too deeply") from fault
        except PlanError:
            raise
        except ValueError as fault:
            raise PlanError(f"$: not JSON: {fault}") from fault
        return cls(value, "$")

    def fail(self, message: str) -> NoReturn:
        raise PlanError(f"{self.path}: {message}")

    def keys(self, *names: str) -> tuple["Node", ...]:
        """The values of an object that has exactly these keys, in the order asked for."""
        if not isinstance(self.value, dict):
            self.fail(f"must be an object with keys {', '.join(names)}, got {shown(self.value)}")
        unknown = sorted(self.value.keys() - set(names))
        if unknown:
            self.fail(f"unknown key {unknown[0][:MAX_SHOWN_CHARS]!r}; known are {', '.join(names)}")
        missing = [name for name in names if name not in self.value]
        if missing:
            self.fail(f"key {missing[0]!r} is missing")
        return tuple(Node(self.value[name], f"{self.path}.{name}") for name in names)

    def items(self) -> Iterator["Node"]:
        """The elements of a list."""
        if not isinstance(self.value, list):
            self.fail(f"must be a list, got {shown(self.value)}")
        for position, value in enumerate(self.value):
            yield Node(value, f"{self.path}[{position}]")

    def row(self, *names: str) -> tuple["Node", ...]:
        """The elements of a list of exactly these columns."""
        nodes = tuple(self.items())
        if len(nodes) != len(names):
            self.fail(f"must have {len(names)} columns ({', '.join(names)}), got {len(nodes)}")
        return nodes

    def integer(self, low: int = 0, high: int = MAX_INT) -> int:
        """An int in `low..high`, both included. A bool is no int."""
        if type(self.value) is not int:
            self.fail(f"must be an integer, got {shown(self.value)}")
        if not low <= self.value <= high:
            self.fail(f"must be in {low}..{high}, got {shown(self.value)}")
        return self.value

    def integers(self, low: int = 0, high: int = MAX_INT) -> tuple[int, ...]:
        """A list of ints in `low..high`."""
        return tuple(node.integer(low, high) for node in self.items())

    def text(self) -> str:
        """A string that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            self.fail(f"must be a non-empty string, got {shown(self.value)}")
        return self.value

    def one_of(self, choices: Sequence[str]) -> str:
        """A string out of `choices`."""
        if not isinstance(self.value, str) or self.value not in choices:
            self.fail(f"must be one of {', '.join(choices)}, got {shown(self.value)}")
        return self.value


def shown(value: object) -> str:
    """A short, bounded form of any JSON value for a message."""
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'object'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_INT:
        return "an integer out of range"
    return ascii(value)[:MAX_SHOWN_CHARS]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"$: key {twice[:MAX_SHOWN_CHARS]!r} is given twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise PlanError(f"$: {name} is not allowed")


def located(node: Node, fault: PlanError) -> PlanError:
    """A fault found while building a value from `node`, with the node's path in front unless it has one."""
    if str(fault).startswith("$"):
        return fault
    return PlanError(f"{node.path}: {fault}", fault.problems)
