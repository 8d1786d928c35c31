"""From flows to rounds: each rank works out its own share, and both ends of a pair come to the same buckets.

No rank lists other ranks' work. What the two ends of a pair must agree on is the *quota* (bytes of the pair
per round) and the *phase* (which rounds the pair uses); both follow from numbers that every rank knows: the
bytes of the pair, the totals of its two ends in the stage, and the number of peers.

quota = bucket_bytes * min over both ends of (pair / total of the end + 1 / peers of the end) / 2: quotas of
one rank add up to at most bucket_bytes, large pairs advance together, and small ones are done in the first
round.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from refit.plan.dtypes import item_bytes
from refit.plan.errors import PlanError
from refit.plan.flows import Flow, Stripe
from refit.plan.manifest import Holding
from refit.plan.options import ALIGNMENT_BYTES, PlanOptions
from refit.plan.rank_plan import Bucket, Round, Segment, StagePlan
from refit.plan.region import Region, split_rows
from refit.plan.sides import Copy, Side


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a stripe that lies in one holding on each end."""

    region: Region
    shape: tuple[int, ...]
    num_bytes: int
    train_holding: int
    gen_holding: int


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """All pieces of a stripe in packing order, and where they lie in a holding, as far as that was asked for.

    Equal layers share a cut: only the names of their tensors and params differ.
    """

    pieces: tuple[Piece, ...]
    known: dict[tuple[object, ...], tuple["Place", ...]] = field(default_factory=dict)

    def places(
        self, mine: str, holdings: Sequence[Holding], quota: int, element_bytes: int
    ) -> Sequence["Place"]:
        """The pieces as boxes of at most `quota` bytes in the memory of this rank, in packing order."""
        memory = tuple([(held.offset, held.strides) for held in holdings])
        key = (quota, memory)
        places = self.known.get(key)
        if places is None:
            places = self.known[key] = tuple(self._places(mine, holdings, quota, element_bytes))
        return places

    def _places(
        self, mine: str, holdings: Sequence[Holding], quota: int, element_bytes: int
    ) -> Iterator["Place"]:
        for piece in self.pieces:
            number = piece.train_holding if mine == "train" else piece.gen_holding
            held = holdings[number]
            whole = piece.num_bytes <= quota
            for part in (piece.region,) if whole else split_rows(piece.region, quota // element_bytes):
                num_bytes = part.num_elements * element_bytes
                padded_bytes = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                yield part, part.shape, number, held.offset_of(part), held.strides, num_bytes, padded_bytes


# box, its shape, number of the holding, flat element of the first element, strides, bytes, bytes with padding
type Place = tuple[Region, tuple[int, ...], int, int, tuple[int, ...], int, int]


@dataclass(frozen=True, slots=True)
class StageTotals:
    """Bytes per train rank and per gen rank in one stage, and who takes part. Known to every rank."""

    stage: int
    train_ranks: tuple[int, ...]
    num_gen: int
    sent: Mapping[int, int]
    received: Mapping[int, int]

    @property
    def span(self) -> int:
        return max(len(self.train_ranks), self.num_gen)

    def phase(self, train_rank: int, gen_rank: int, peers_per_round: int) -> int:
        """A rank meets at most `peers_per_round` peers in one phase."""
        position = self.train_ranks.index(train_rank)
        return (gen_rank - position) % self.span // peers_per_round

    def num_phases(self, peers_per_round: int) -> int:
        return -(-self.span // peers_per_round)

    def quota(self, train_rank: int, gen_rank: int, pair_bytes: int, options: PlanOptions) -> int:
        """Most bytes that the pair may put into one round; a multiple of the alignment."""
        limit = options.bucket_bytes // 2
        peers = options.peers_per_round
        by_train = limit * pair_bytes // self.sent[train_rank] + limit // min(peers, self.num_gen)
        by_gen = limit * pair_bytes // self.received[gen_rank] + limit // min(peers, len(self.train_ranks))
        return min(by_train, by_gen) // ALIGNMENT_BYTES * ALIGNMENT_BYTES


@dataclass(slots=True)
class Pieces:
    """Cuts stripes at the holdings of both ends; remembers results per pair of patterns, because layers
    repeat."""

    train: Side
    gen: Side
    known: dict[tuple[int, int, int, int, int], Cut] = field(default_factory=dict)

    def of(self, flow: Flow, stripe: Stripe) -> tuple[Cut, Copy, Copy]:
        """The cut of a stripe, with the copies on the train and on the gen side."""
        source = self.train.copies(self.train.body_of_rank[stripe.holder], stripe.tensor)[0]
        target = self.gen.copies(self.gen.body_of_rank[stripe.receiver], stripe.tensor)[flow.copy]
        key = (flow.index, stripe.first_row, stripe.stop_row, source.pattern, target.pattern)
        cut = self.known.get(key)
        if cut is None:
            box = flow.part(stripe.first_row, stripe.stop_row)
            cut = Cut(cut_at_holdings(box, source, target, item_bytes(flow.wire_dtype)))
            self.known[key] = cut
        return cut, source, target


def cut_at_holdings(box: Region, source: Copy, target: Copy, element_bytes: int) -> tuple[Piece, ...]:
    """Split a box so that each piece lies in one holding of the source and one of the target."""
    found: list[Piece] = []
    for gen_holding, part in _parts(box, target):
        for train_holding, region in _parts(part, source):
            num_bytes = region.num_elements * element_bytes
            found.append(Piece(region, region.shape, num_bytes, train_holding, gen_holding))
    if sum(piece.num_bytes for piece in found) != box.num_elements * element_bytes:
        raise PlanError(f"box {box} is not fully inside the holdings of its two ends; the plan is broken")
    found.sort(key=lambda piece: piece.region)
    return tuple(found)


def _parts(box: Region, copy: Copy) -> Iterator[tuple[int, Region]]:
    """Disjoint parts of a box, each with the first holding that has it."""
    rest: tuple[Region, ...] = (box,)
    for position, holding in enumerate(copy.holdings):
        for piece in rest:
            common = piece.intersect(holding.region)
            if common is not None:
                yield position, common
        if copy.overlapping:
            rest = tuple(part for piece in rest for part in piece.subtract(holding.region))


@dataclass(frozen=True, slots=True)
class Load:
    """Pieces of one tensor before they are placed in buckets, with this rank's memory behind each."""

    tensor: str
    wire_dtype: str
    cut: Cut
    holdings: tuple[Holding, ...]


@dataclass(slots=True)
class Stream:
    """All loads of one pair in one stage, in the order that both ends know."""

    train_rank: int
    gen_rank: int
    num_bytes: int = 0
    loads: list[Load] = field(default_factory=list)


def stage_plan(
    totals: StageTotals, streams: Sequence[Stream], mine: str, num_train: int, options: PlanOptions
) -> StagePlan:
    """Rounds of one rank in one stage from its streams with every peer."""
    by_round: dict[int, list[Bucket]] = {}
    num_phases = totals.num_phases(options.peers_per_round)
    for stream in streams:
        phase = totals.phase(stream.train_rank, stream.gen_rank, options.peers_per_round)
        quota = totals.quota(stream.train_rank, stream.gen_rank, stream.num_bytes, options)
        peer = num_train + stream.gen_rank if mine == "train" else stream.train_rank
        for number, bucket in enumerate(_buckets(peer, mine, stream.loads, quota)):
            by_round.setdefault(number * num_phases + phase, []).append(bucket)
    rounds: list[Round] = []
    for index, buckets in sorted(by_round.items()):
        ordered = tuple(sorted(buckets, key=lambda bucket: bucket.peer))
        rounds.append(Round(index, ordered, ()) if mine == "train" else Round(index, (), ordered))
    group = totals.train_ranks + tuple(range(num_train, num_train + totals.num_gen))
    return StagePlan(totals.stage, group, tuple(rounds))


def _buckets(peer: int, mine: str, loads: Sequence[Load], quota: int) -> Iterator[Bucket]:
    segments: list[Segment] = []
    end = 0
    for load in loads:
        tensor, dtype, holdings = load.tensor, load.wire_dtype, load.holdings
        places = load.cut.places(mine, holdings, quota, item_bytes(dtype))
        for region, shape, number, offset, strides, num_bytes, padded_bytes in places:
            if segments and end + num_bytes > quota:
                yield Bucket(peer, end, tuple(segments))
                segments, end = [], 0
            param = holdings[number].param
            segments.append(Segment(tensor, region, param, offset, shape, strides, dtype, end))
            end += padded_bytes
    if segments:
        yield Bucket(peer, end, tuple(segments))
