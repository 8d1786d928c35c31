"""The JSON form of a body: equal layers are written once.

A body is a list of groups. A group has `layers`, a list of [number in tensor names, number in param names], and its
tensors, params, holdings and misc reasons with `{}` in place of the number; it stands for one copy per layer. A group
whose `layers` is null stands for itself, names taken as they are. Holdings refer to tensors and params of their group.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from refit.plan.dtypes import ITEM_BYTES
from refit.plan.errors import PlanError
from refit.plan.manifest import Holding, MiscReason, ParamSpec, RankManifest, TensorSpec
from refit.plan.reader import Node, located
from refit.plan.region import Region

DTYPES = tuple(sorted(ITEM_BYTES))
MAX_ITEMS = 1_000_000  # the largest shipped model on a single rank has 118,000
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")

type Body = tuple[tuple[TensorSpec, ...], tuple[ParamSpec, ...], tuple[Holding, ...], tuple[MiscReason, ...]]


@dataclass(slots=True)
class _Unit:
    """What one layer of a rank holds, or all that belongs to no single layer."""

    tensors: list[TensorSpec] = field(default_factory=list)
    params: list[ParamSpec] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)
    misc: list[MiscReason] = field(default_factory=list)


def body_out(manifest: RankManifest) -> list[dict[str, Any]]:
    """The groups of a body, as JSON values. The same body always gives the same groups."""
    groups: dict[str, dict[str, Any]] = {}
    for layers, unit in _units(manifest):
        content = _content(unit, layers)
        group = groups.setdefault(repr(content), {"layers": [] if layers else None, **content})
        if layers:
            group["layers"].append(list(layers))
    return list(groups.values())


def _units(manifest: RankManifest) -> Iterator[tuple[tuple[int, int] | None, _Unit]]:
    """Layers in order, then the rest (None). A param that serves several layers keeps them out of the layers."""
    layer_of_tensor = {spec.name: _layer(spec.name) for spec in manifest.tensors}
    layer_of_param = {spec.name: _layer(spec.name) for spec in manifest.params}
    numbers: dict[int, set[int | None]] = {}
    served: dict[str, set[int | None]] = {}
    for held in manifest.holdings:
        layer = layer_of_tensor[held.tensor]
        served.setdefault(held.param, set()).add(layer)
        if layer is not None:
            numbers.setdefault(layer, set()).add(layer_of_param[held.param])
    mixed = {layer for layers in served.values() if len(layers) > 1 for layer in layers}
    plain = {
        layer: number
        for layer, found in numbers.items()
        if len(found) == 1 and layer not in mixed and (number := min(found, key=str)) is not None
    }
    units: dict[int | None, _Unit] = {layer: _Unit() for layer in [*sorted(plain), None]}
    home = {name: layer if layer in plain else None for name, layer in layer_of_tensor.items()}
    for spec in manifest.tensors:
        units[home[spec.name]].tensors.append(spec)
    for param in manifest.params:
        layers = served.get(param.name, set())
        layer = min(layers, key=str) if len(layers) == 1 else None
        units[layer if layer in plain else None].params.append(param)
    for held in manifest.holdings:
        units[home[held.tensor]].holdings.append(held)
    for misc in manifest.misc:
        units[home[misc.tensor]].misc.append(misc)
    for layer, unit in units.items():
        yield (None if layer is None else (layer, plain[layer])), unit


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    if found is None or "{" in name or str(int(found[0])) != found[0]:
        return None
    return int(found[0])


def _template(name: str, layers: tuple[int, int] | None) -> str:
    return name if layers is None else _LAYER.sub("{}", name, count=1)


def _content(unit: _Unit, layers: tuple[int, int] | None) -> dict[str, Any]:
    tensor_number = {spec.name: number for number, spec in enumerate(unit.tensors)}
    param_number = {spec.name: number for number, spec in enumerate(unit.params)}
    return {
        "tensors": [[_template(spec.name, layers), spec.shape, spec.dtype] for spec in unit.tensors],
        "params": [[_template(spec.name, layers), *_param_out(spec)] for spec in unit.params],
        "holdings": [
            [
                tensor_number[held.tensor],
                param_number[held.param],
                held.region.starts,
                held.region.stops,
                held.offset,
                held.strides,
            ]
            for held in unit.holdings
        ],
        "misc": [[tensor_number[misc.tensor], misc.reason] for misc in unit.misc],
    }


def _param_out(spec: ParamSpec) -> tuple[Any, ...]:
    """Shape and dtype, and strides where they are not row-major: they are rare."""
    return (spec.shape, spec.dtype) if spec.strides is None else (spec.shape, spec.dtype, spec.strides)


def body_in(node: Node) -> Body:
    """The inverse of `body_out`. Raises PlanError with the path; a body of more than MAX_ITEMS is not expanded."""
    groups = tuple(_groups_in(node))
    units = [_unit_in(rows, pair) for layers, rows in groups for pair in layers]
    return (
        tuple([spec for unit in units for spec in unit.tensors]),
        tuple([spec for unit in units for spec in unit.params]),
        tuple([held for unit in units for held in unit.holdings]),
        tuple([misc for unit in units for misc in unit.misc]),
    )


def _groups_in(node: Node) -> Iterator[tuple[list[tuple[int, int] | None], list[tuple[Node, ...]]]]:
    """The layers and the rows of each group; the rows are not read yet."""
    num_items = 0
    for group in node.items():
        layers_node, *columns = group.keys("layers", "tensors", "params", "holdings", "misc")
        layers = _layers_in(layers_node)
        rows = [tuple(column.items()) for column in columns]
        num_items += len(layers) * sum(map(len, rows))
        if num_items > MAX_ITEMS:
            group.fail(f"stands for more than {MAX_ITEMS} specs and holdings; no rank holds that many")
        yield layers, rows


def _layers_in(node: Node) -> list[tuple[int, int] | None]:
    if node.value is None:
        return [None]
    found: list[tuple[int, int] | None] = []
    for row in node.items():
        tensor_layer, param_layer = row.row("tensor layer", "param layer")
        found.append((tensor_layer.integer(), param_layer.integer()))
    return found


def _unit_in(rows: list[tuple[Node, ...]], layers: tuple[int, int] | None) -> _Unit:
    tensor_rows, param_rows, holding_rows, misc_rows = rows
    unit = _Unit()
    for row in tensor_rows:
        name, shape, dtype = row.row("name", "shape", "dtype")
        unit.tensors.append(TensorSpec(_name_in(name, layers, 0), shape.integers(), dtype.one_of(DTYPES)))
    for row in param_rows:
        try:
            unit.params.append(_param_in(row, layers))
        except PlanError as fault:
            raise located(row, fault) from fault
    unit.holdings = list(_holdings_in(holding_rows, unit))
    for row in misc_rows:
        tensor, reason = row.row("tensor", "reason")
        unit.misc.append(
            MiscReason(unit.tensors[tensor.integer(0, len(unit.tensors) - 1)].name, reason.text())
        )
    return unit


def _param_in(row: Node, layers: tuple[int, int] | None) -> ParamSpec:
    last = ("strides",) if isinstance(row.value, list) and len(row.value) == 4 else ()
    name, shape, dtype, *rest = row.row("name", "shape", "dtype", *last)
    strides = rest[0].integers() if rest else None
    return ParamSpec(_name_in(name, layers, 1), shape.integers(), dtype.one_of(DTYPES), strides)


def _name_in(node: Node, layers: tuple[int, int] | None, side: int) -> str:
    text = node.text()
    if layers is None:
        return text
    if text.count("{}") != 1:
        node.fail(f"a name in a group with layers must have one {{}} for the layer number, got {text[:60]!a}")
    return text.replace("{}", str(layers[side]))


def _holdings_in(rows: Iterable[Node], unit: _Unit) -> Iterator[Holding]:
    for row in rows:
        columns = row.row("tensor", "param", "starts", "stops", "offset", "strides")
        tensor, param, starts, stops, offset, strides = columns
        tensor_name = unit.tensors[tensor.integer(0, len(unit.tensors) - 1)].name
        param_name = unit.params[param.integer(0, len(unit.params) - 1)].name
        try:
            region = Region(starts.integers(), stops.integers())
            yield Holding(tensor_name, region, param_name, offset.integer(), strides.integers())
        except PlanError as fault:
            raise located(row, fault) from fault
