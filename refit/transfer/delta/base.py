"""What a rank keeps of the last version that it brought over, so that the next one can be told by what changed.

A trainer keeps a copy of the params that it sends from, whatever the number of generators; a generator keeps one of the
params that it receives into. Both are by param and not by parcel, so they outlive a plan: when a replica is lost or
joins, the others keep theirs.

A state is named by a token made of the run id of the groups, the version and the attempt: no two attempts of a job, and
no two jobs, have the same. A trainer's copy is changed at the end of a move; its token is that of the attempt that it
then holds, committed or not. A generator's copy is changed while bytes arrive, so it has no token from the start of an
attempt until its commit: after a failure, a time-out or a discard nobody can take it for a version.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from refit.plan import BULK, Plan, RankManifest
from refit.transfer.memory import copy_cast

TOKEN_BYTES = 16
NO_TOKEN = bytes(TOKEN_BYTES)


def token_of(run_id: str, version: int, attempt: int) -> bytes:
    """The name of what an attempt brings over."""
    return hashlib.sha256(f"{run_id}\0{version}\0{attempt}".encode()).digest()[:TOKEN_BYTES]


class Base:
    """Outlives endpoints: one per rank, handed to each `Endpoint.prepare`. Empty, and without cost, until it is used.

    Extra memory: the params with bulk holdings, once, from the first move on.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._names: tuple[str, ...] = ()
        self._is_sender = False
        self._pending = NO_TOKEN
        self.token = NO_TOKEN
        self.params: dict[str, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        return sum(tensor.nbytes for tensor in self.params.values())

    def fit(self, manifest: RankManifest, plan: Plan) -> None:
        """Be of use under `plan`. What is kept is dropped unless the same holdings are bulk as before."""
        held = tuple(h for h in manifest.holdings if plan.tensors[h.tensor].kind == BULK)
        key = (manifest.side, manifest.params, held)
        if key != self._key:
            self.token, self.params = NO_TOKEN, {}
        self._key, self._is_sender = key, manifest.side == "train"
        self._names = tuple(sorted({holding.param for holding in held}))

    def begin(self, params: Mapping[str, Tensor]) -> bytes:
        """Make room before a move; returns the token of what is kept. A generator's copy has none from here on."""
        self._pending = NO_TOKEN
        for name in self._names:
            if not _is_alike(self.params.get(name), params[name]):
                self.token = NO_TOKEN
                self.params[name] = torch.empty_strided(
                    params[name].size(), params[name].stride(), dtype=params[name].dtype
                )
        token = self.token
        if not self._is_sender:
            self.token = NO_TOKEN
        return token

    def end(self, params: Mapping[str, Tensor], token: bytes) -> None:
        """After a move that brought `token` over: a trainer keeps what it sent, a generator waits for the commit."""
        if not self._is_sender:
            self._pending = token
            return
        self.token = NO_TOKEN
        for name in self._names:
            copy_cast(self.params[name], params[name].detach())
        self.token = token

    def committed(self) -> None:
        """The attempt of the last move serves on this generator."""
        if not self._is_sender:
            self.token, self._pending = self._pending, NO_TOKEN


def _is_alike(kept: Tensor | None, param: Tensor) -> bool:
    return kept is not None and (kept.shape, kept.dtype, kept.stride()) == (
        param.shape,
        param.dtype,
        param.stride(),
    )
