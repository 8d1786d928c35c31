"""JSON form of manifests. Strict: unknown keys, wrong types, boxes out of range raise PlanError with the
path.

A *body* is what replicas share: tensors, params, holdings, misc. A manifest lists each distinct body once, and a body
writes equal layers once (`wire_body`).
"""

import json
from typing import Any

from refit.plan.collector import collector_paused
from refit.plan.errors import PlanError
from refit.plan.manifest import SIDES, Manifest, RankManifest
from refit.plan.reader import Node, located
from refit.plan.wire_body import body_in, body_out

SCHEMA = 1
RANK_KIND, MANIFEST_KIND = "rank_manifest", "manifest"


def encode_rank_manifest(manifest: RankManifest) -> str:
    """One rank's manifest as JSON text; the same value gives the same text."""
    document = {
        "schema": SCHEMA,
        "kind": RANK_KIND,
        "side": manifest.side,
        "rank": manifest.rank,
        "stage": manifest.stage,
        "replica": manifest.replica,
        "body": body_out(manifest),
    }
    return _dump(document)


def encode_manifest(manifest: Manifest) -> str:
    """One side as JSON text. Ranks that share their body name it by number."""
    bodies: list[list[dict[str, Any]]] = []
    numbers: dict[tuple[int, ...], int] = {}
    by_text: dict[str, int] = {}
    rows: list[list[int]] = []
    for rank in manifest.ranks:
        identity = (id(rank.tensors), id(rank.params), id(rank.holdings), id(rank.misc))
        number = numbers.get(identity)
        if number is None:
            body = body_out(rank)
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
    parts = body_in(body)
    try:
        return RankManifest(side.one_of(SIDES), rank.integer(), stage.integer(), replica.integer(), *parts)
    except PlanError as fault:
        raise located(body, fault) from fault


@collector_paused()
def decode_manifest(text: str) -> Manifest:
    """The inverse of `encode_manifest`. Ranks with one body share it in memory."""
    root = Node.parse(text)
    schema, kind, side, bodies, ranks = root.keys("schema", "kind", "side", "bodies", "ranks")
    _check_head(schema, kind, MANIFEST_KIND)
    side_name = side.one_of(SIDES)
    body_nodes = tuple(bodies.items())
    parts = tuple(body_in(node) for node in body_nodes)
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
            raise located(body_nodes[number], fault) from fault
    try:
        return Manifest(side_name, tuple(found))
    except PlanError as fault:
        raise located(ranks, fault) from fault


def _dump(document: object) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=True)


def _check_head(schema: Node, kind: Node, wanted: str) -> None:
    if schema.integer() != SCHEMA:
        schema.fail(
            f"schema {schema.value} is not read here; this version reads {SCHEMA}, use the same on both sides"
        )
    kind.one_of((wanted,))
