"""Random two-sided worlds for property tests, and an element-by-element run of a plan to compare with."""

from itertools import product
from random import Random

from refit.plan import Holding, Manifest, ParamSpec, Plan, PlanOptions, RankManifest, Region, TensorSpec
from refit.plan.dtypes import item_bytes

EVERYTHING = (r".*",)
TRAIN_DTYPES = ("float32", "bfloat16")


def chunk(size, parts, index):
    """torch.chunk's rule: ceil-sized chunks, the last ones shorter or empty."""
    step = -(-size // parts) if size else 0
    return min(size, index * step), min(size, (index + 1) * step)


def random_cuts(random, shape):
    """A side's mesh: axis sizes, and for every axis the dim that it cuts (None = replicated)."""
    axes = [random.choice([1, 2, 2, 3, 4]) for _ in range(random.randint(1, 3))]
    dims = [random.choice([None, *range(len(shape))]) for _ in axes]
    return axes, dims


def region_at(shape, axes, dims, coordinates):
    starts, stops = [0] * len(shape), list(shape)
    for size, dim, index in zip(axes, dims, coordinates, strict=True):
        if dim is not None:
            low, high = chunk(stops[dim] - starts[dim], size, index)
            starts[dim], stops[dim] = starts[dim] + low, starts[dim] + high
    return Region(tuple(starts), tuple(stops))


def random_pieces(random, region, num_cuts):
    pieces = [region]
    for _ in range(num_cuts):
        piece = pieces.pop(random.randrange(len(pieces)))
        dims = [d for d, size in enumerate(piece.shape) if size > 1]
        if dims:
            dim = random.choice(dims)
            cut = random.randint(piece.starts[dim] + 1, piece.stops[dim] - 1)
            pieces += [
                piece.with_dim(dim, piece.starts[dim], cut),
                piece.with_dim(dim, cut, piece.stops[dim]),
            ]
        else:
            pieces.append(piece)
    random.shuffle(pieces)
    return pieces


def random_memory(random, region):
    """Strides in a random order of dims with gaps, an offset, and the size of the memory that holds them."""
    order = list(range(len(region.shape)))
    random.shuffle(order)
    strides, step = [0] * len(order), random.choice([1, 1, 2])
    for dim in order:
        strides[dim] = step
        step = step * region.shape[dim] + random.choice([0, 0, 1, 3])
    offset = random.choice([0, 0, 5])
    last = sum((size - 1) * stride for size, stride in zip(region.shape, strides, strict=True))
    return offset, tuple(strides), offset + last + 1 + random.choice([0, 2])


def random_side(random, side, shapes, dtypes):
    num_ranks = random.choice([1, 2, 3, 4, 6])
    bodies = [([], [], []) for _ in range(num_ranks)]
    for name, shape in shapes.items():
        axes, dims = random_cuts(random, shape)
        coordinates = list(product(*map(range, axes)))
        places = [coordinates[i % len(coordinates)] for i in range(max(num_ranks, len(coordinates)))]
        random.shuffle(places)
        regions_of = [set() for _ in range(num_ranks)]
        for i, place in enumerate(places):
            regions_of[i % num_ranks].add(region_at(shape, axes, dims, place))
        for rank, (tensors, params, holdings) in enumerate(bodies):
            tensors.append(TensorSpec(name, shape, dtypes[name]))
            taken = disjoint_only(sorted(regions_of[rank]))
            twice = taken if random.random() < 0.1 else []
            for number, region in enumerate([*taken, *twice]):
                for part, piece in enumerate(random_pieces(random, region, random.randint(0, 2))):
                    if not piece.is_empty:
                        offset, strides, size = random_memory(random, piece)
                        param = f"p.{name}.{number}.{part}"
                        params.append(ParamSpec(param, (size,), dtypes[name]))
                        holdings.append(Holding(name, piece, param, offset, strides))
    stages = sorted(random.randrange(3) for _ in range(num_ranks)) if side == "train" else [0] * num_ranks
    return Manifest(
        side,
        tuple(
            RankManifest(side, rank, stages[rank], 0, *map(tuple, body), ())
            for rank, body in enumerate(bodies)
        ),
    )


def disjoint_only(regions):
    kept = []
    for region in regions:
        if all(region.intersect(other) is None for other in kept):
            kept.append(region)
    return kept


def random_world(seed):
    """(train, gen, options) of a random small world. Not every tensor needs to be provable."""
    random = Random(seed)
    longest = [9, 30, 12, 7, 4]
    dims = [random.choice([0, 1, 2, 2, 3, 3, 4]) for _ in range(random.randint(1, 3))]
    shapes = {
        f"t{number}": tuple(random.randint(1, longest[dims[number]]) for _ in range(dims[number]))
        for number in range(len(dims))
    }
    train_dtypes = {name: random.choice(TRAIN_DTYPES) for name in shapes}
    gen_dtypes = {name: random.choice(TRAIN_DTYPES) for name in shapes}
    options = PlanOptions(
        bucket_bytes=random.choice([4096, 4096, 1 << 20]),
        max_ops_per_round=random.choice([1, 2, 3, 512]),
        whitelist=EVERYTHING,
    )
    return (
        random_side(random, "train", shapes, train_dtypes),
        random_side(random, "gen", shapes, gen_dtypes),
        options,
    )


def elements(region):
    return product(*(range(start, stop) for start, stop in zip(region.starts, region.stops, strict=True)))


def flat(offset, region, strides, index):
    return offset + sum(
        (i - start) * stride for i, start, stride in zip(index, region.starts, strides, strict=True)
    )


def run(plan: Plan, train: Manifest, gen: Manifest):
    """Move every element as the rank plans say. Returns the generators' memory: {(gen_rank, param): {flat:
    values}}."""
    wire = sent_by_all(plan, train_memory(train))
    written = {}
    for gen_rank in range(plan.num_gen):
        for stage in plan.rank_plan(plan.num_train + gen_rank).stages:
            assert list(stage.group_ranks) == sorted(stage.group_ranks)
            for round_ in stage.rounds:
                check_bounds(plan, round_)
                for bucket in round_.receives:
                    key = (stage.stage, round_.index, bucket.peer, plan.num_train + gen_rank)
                    unpacked(bucket, gen_rank, wire.pop(key), written)
    assert not wire, f"buckets that nobody receives: {sorted(wire)}"
    return written


def train_memory(train):
    memory = {}
    for rank in train.ranks:
        for held in rank.holdings:
            for index in elements(held.region):
                memory[rank.rank, held.param, flat(held.offset, held.region, held.strides, index)] = (
                    held.tensor,
                    index,
                )
    return memory


def sent_by_all(plan, memory):
    wire = {}
    for rank in range(plan.num_train):
        for stage in plan.rank_plan(rank).stages:
            for round_ in stage.rounds:
                check_bounds(plan, round_)
                for bucket in round_.sends:
                    wire[stage.stage, round_.index, rank, bucket.peer] = packed(bucket, rank, memory)
    return wire


def check_bounds(plan, round_):
    assert round_.send_bytes <= plan.options.bucket_bytes
    assert round_.receive_bytes <= plan.options.bucket_bytes
    assert len(round_.sends) + len(round_.receives) <= plan.options.max_ops_per_round


def packed(bucket, rank, memory):
    content = {}
    for segment in bucket.segments:
        assert segment.start_byte % 16 == 0 and segment.shape == segment.region.shape
        for number, index in enumerate(elements(segment.region)):
            place = flat(segment.offset, segment.region, segment.strides, index)
            byte = segment.start_byte + number * item_bytes(segment.wire_dtype)
            assert byte + item_bytes(segment.wire_dtype) <= bucket.num_bytes
            assert byte not in content
            content[byte] = memory[rank, segment.param, place]
    return (
        bucket.num_bytes,
        [(s.tensor, s.region, s.wire_dtype, s.start_byte) for s in bucket.segments],
        content,
    )


def unpacked(bucket, gen_rank, sent, written):
    num_bytes, labels, content = sent
    assert num_bytes == bucket.num_bytes
    assert labels == [(s.tensor, s.region, s.wire_dtype, s.start_byte) for s in bucket.segments]
    for segment in bucket.segments:
        for number, index in enumerate(elements(segment.region)):
            value = content.pop(segment.start_byte + number * item_bytes(segment.wire_dtype))
            place = flat(segment.offset, segment.region, segment.strides, index)
            written.setdefault((gen_rank, segment.param), {}).setdefault(place, []).append(value)
    assert not content


def expected(plan: Plan, gen: Manifest):
    """What the generators' memory must hold: by brute force over the elements of their holdings of bulk
    tensors."""
    wanted = {}
    for rank in gen.ranks:
        for held in rank.holdings:
            if plan.tensors[held.tensor].kind == "bulk":
                for index in elements(held.region):
                    place = flat(held.offset, held.region, held.strides, index)
                    wanted.setdefault((rank.rank, held.param), {})[place] = [(held.tensor, index)]
    return wanted
