"""JSON form of manifests. Strict: unknown keys, wrong types, boxes out of range raise PlanError with the
path.

A *body* is what replicas share: tensors, params, holdings, misc. A manifest lists each distinct body once.
"""

import json
from typing import Any

from refit.plan.dtypes import ITEM_BYTES
from refit.plan.errors import PlanError
from refit.plan.manifest import SIDES, Holding, Manifest, MiscReason, ParamSpec, RankManifest, TensorSpec
from refit.plan.reader import Node
from refit.plan.region import Region

SCHEMA = 1
RANK_KIND, MANIFEST_KIND = "rank_manifest", "manifest"
DTYPES = tuple(sorted(ITEM_BYTES))


def encode_rank_manifest(manifest: RankManifest) -> str:
    """One rank's manifest as JSON text; the same value gives the same text."""
    document = {
        "schema": SCHEMA,
        "kind": RANK_KIND,
        "side": manifest.side,
        "rank": manifest.rank,
        "stage": manifest.stage,
        "replica": manifest.replica,
        "body": _body_out(manifest),
    }
    return _dump(document)


def encode_manifest(manifest: Manifest) -> str:
    """One side as JSON text. Ranks that share their body name it by number."""
    bodies: list[dict[str, Any]] = []
    numbers: dict[tuple[int, ...], int] = {}
    by_text: dict[str, int] = {}
    rows: list[list[int]] = []
    for rank in manifest.ranks:
        identity = (id(rank.tensors), id(rank.params), id(rank.holdings), id(rank.misc))
        number = numbers.get(identity)
        if number is None:
            body = _body_out(rank)
            number = by_text.setdefault(_dump(body), len(bodies))
            numbers[identity] = number
            if number == len(bodies):
                bodies.append(body)
        rows.append([rank.stage, rank.replica, number])
    return _dump(
        {"schema": SCHEMA, "kind": MANIFEST_KIND, "side": manifest.side, "bodies": bodies, "ranks": rows}
    )


def decode_rank_manifest(text: str) -> RankManifest:
    """The inverse of `encode_rank_manifest`."""
    root = Node.parse(text)
    schema, kind, side, rank, stage, replica, body = root.keys(
        "schema", "kind", "side", "rank", "stage", "replica", "body"
    )
    _check_head(schema, kind, RANK_KIND)
    parts = _body_in(body)
    try:
        return RankManifest(side.one_of(SIDES), rank.integer(), stage.integer(), replica.integer(), *parts)
    except PlanError as fault:
        raise _at(body, fault) from fault


def decode_manifest(text: str) -> Manifest:
    """The inverse of `encode_manifest`. Ranks with one body share it in memory."""
    root = Node.parse(text)
    schema, kind, side, bodies, ranks = root.keys("schema", "kind", "side", "bodies", "ranks")
    _check_head(schema, kind, MANIFEST_KIND)
    side_name = side.one_of(SIDES)
    body_nodes = tuple(bodies.items())
    parts = tuple(_body_in(node) for node in body_nodes)
    first: dict[tuple[int, int], RankManifest] = {}
    found: list[RankManifest] = []
    for position, node in enumerate(ranks.items()):
        stage, replica, body = node.row("stage", "replica", "body")
        number = body.integer(0, len(parts) - 1)
        key = (number, stage.integer())
        try:
            if key not in first:
                first[key] = RankManifest(side_name, position, key[1], replica.integer(), *parts[number])
                found.append(first[key])
            else:
                found.append(first[key].sibling(position, replica.integer()))
        except PlanError as fault:
            raise _at(body_nodes[number], fault) from fault
    try:
        return Manifest(side_name, tuple(found))
    except PlanError as fault:
        raise _at(ranks, fault) from fault


def _at(node: Node, fault: PlanError) -> PlanError:
    if str(fault).startswith("$"):
        return fault
    return PlanError(f"{node.path}: {fault}", fault.problems)


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=True)


def _check_head(schema: Node, kind: Node, wanted: str) -> None:
    if schema.integer() != SCHEMA:
        schema.fail(
            f"schema {schema.value} is not read here; this version reads {SCHEMA}, use the same on both sides"
        )
    kind.one_of((wanted,))


def _body_out(manifest: RankManifest) -> dict[str, Any]:
    tensor_number = {spec.name: number for number, spec in enumerate(manifest.tensors)}
    param_number = {spec.name: number for number, spec in enumerate(manifest.params)}
    return {
        "tensors": [[spec.name, spec.shape, spec.dtype] for spec in manifest.tensors],
        "params": [[spec.name, spec.shape, spec.dtype] for spec in manifest.params],
        "holdings": [
            [
                tensor_number[held.tensor],
                param_number[held.param],
                held.region.starts,
                held.region.stops,
                held.offset,
                held.strides,
            ]
            for held in manifest.holdings
        ],
        "misc": [[tensor_number[misc.tensor], misc.reason] for misc in manifest.misc],
    }


type _Body = tuple[tuple[TensorSpec, ...], tuple[ParamSpec, ...], tuple[Holding, ...], tuple[MiscReason, ...]]


def _body_in(node: Node) -> _Body:
    tensor_rows, param_rows, holding_rows, misc_rows = node.keys("tensors", "params", "holdings", "misc")
    tensors: list[TensorSpec] = []
    params: list[ParamSpec] = []
    for row in tensor_rows.items():
        name, shape, dtype = row.row("name", "shape", "dtype")
        tensors.append(TensorSpec(name.text(), shape.integers(), dtype.one_of(DTYPES)))
    for row in param_rows.items():
        name, shape, dtype = row.row("name", "shape", "dtype")
        params.append(ParamSpec(name.text(), shape.integers(), dtype.one_of(DTYPES)))
    holdings = tuple(_holding_in(row, tensors, params) for row in holding_rows.items())
    misc: list[MiscReason] = []
    for row in misc_rows.items():
        tensor, reason = row.row("tensor", "reason")
        misc.append(MiscReason(tensors[tensor.integer(0, len(tensors) - 1)].name, reason.text()))
    return tuple(tensors), tuple(params), holdings, tuple(misc)


def _holding_in(row: Node, tensors: list[TensorSpec], params: list[ParamSpec]) -> Holding:
    tensor, param, starts, stops, offset, strides = row.row(
        "tensor", "param", "starts", "stops", "offset", "strides"
    )
    tensor_name = tensors[tensor.integer(0, len(tensors) - 1)].name
    param_name = params[param.integer(0, len(params) - 1)].name
    try:
        region = Region(starts.integers(), stops.integers())
        return Holding(tensor_name, region, param_name, offset.integer(), strides.integers())
    except PlanError as fault:
        raise _at(row, fault) from fault
