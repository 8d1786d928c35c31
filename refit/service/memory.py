"""How much memory a job needs on one machine without a GPU: measured process sizes plus what the weights take."""

from __future__ import annotations

from refit.service.config import JobConfig

MIB = 2**20
DRIVER_BYTES = 1000 * MIB
RAY_BYTES = 700 * MIB
TRAIN_RANK_BYTES = 1200 * MIB
ENGINE_BYTES = 1000 * MIB
ENGINE_WORKER_BYTES = 1200 * MIB
TRAIN_BYTES_PER_PARAM = 22
"""bf16 weights 2 and reference 2, float32 gradients 4 and masters 4, Adam 8, send buffers and a gather 2."""
GEN_BYTES_PER_PARAM = 6
"""Weights 2, the staged version 2, one copy while vLLM processes it 2. What streams take is beside that."""
WIRE_BYTES_PER_PARAM = 2
DELTA_BYTES_PER_PARAM = 2
"""What each side keeps of the last refit, with `refit.delta`."""


def needed_bytes(config: JobConfig, num_params: int) -> int:
    """Peak of all processes of the job. Weights count once per data-parallel copy and once per replica."""
    train = config.policy.world_size * TRAIN_RANK_BYTES
    train += config.policy.data_parallel * num_params * TRAIN_BYTES_PER_PARAM
    workers = config.generation.world_size if config.generation.workers_per_replica > 1 else 0
    replica = ENGINE_BYTES + num_params * GEN_BYTES_PER_PARAM + _receive_bytes(config, num_params)
    gen = config.generation.replicas * replica
    if config.refit.delta:
        copies = config.policy.data_parallel + config.generation.replicas
        gen += copies * num_params * DELTA_BYTES_PER_PARAM
    return DRIVER_BYTES + RAY_BYTES + train + gen + workers * ENGINE_WORKER_BYTES


def _receive_bytes(config: JobConfig, num_params: int) -> int:
    """Buffers of one replica: two buckets a stream and worker, and never more than the whole version."""
    buckets = 2 * config.num_streams * config.refit.buffer_bytes * config.generation.workers_per_replica
    return min(buckets, num_params * WIRE_BYTES_PER_PARAM)
