"""Real vLLM ranks as forks of one process that has vLLM imported."""

from tests.rank_pool import RankPool

_pool = RankPool("gen", "refit.gen_side.bare:preload")


def open_ranks():
    """To be called where `run_ranks` is called in a thread that ends."""
    _pool.open()


def run_ranks(num_ranks, body, *args, timeout_s=200.0):
    """body(rank, address, *args) in `num_ranks` processes; their results in rank order. Raises on a failure."""
    return _pool.run(body, num_ranks, args, timeout_s)
