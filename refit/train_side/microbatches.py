"""A global batch as the tensors of one data parallel rank, cut into microbatches of one common shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from refit.train_side.batch import TrainBatch

_LENGTH_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Microbatch:
    """`num_rows` samples right-padded to one length S. Position t of `tokens` predicts `targets[:, t]`.

    `mask` [rows, S] is 1.0 where the target is a response token. Rows that only fill up the microbatch have
    an empty mask. `sample_index[row]` is the sample's place in the global batch, -1 for a filler.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    sample_index: tuple[int, ...]

    def to(self, device: torch.device) -> Microbatch:
        """The same on `device`; itself where it is there already."""
        moved = (self.tokens, self.targets, self.mask, self.old_logprobs, self.advantages)
        return Microbatch(*(tensor.to(device) for tensor in moved), self.sample_index)

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


def split_batch(
    batch: TrainBatch, num_microbatches: int, data_rank: int, data_size: int, tensor_size: int = 1
) -> tuple[Microbatch, ...]:
    """The microbatches of one data parallel rank. All ranks get the same number and the same [rows, S].

    Sample i goes to rank i % data_size. S is the longest sample, rounded up to a multiple of 8 and of `tensor_size`:
    tensor parallel ranks may share out the sequence.
    """
    rows = -(-batch.num_samples // (num_microbatches * data_size))
    multiple = math.lcm(_LENGTH_MULTIPLE, tensor_size)
    length = -(-batch.max_tokens // multiple) * multiple
    mine = list(range(data_rank, batch.num_samples, data_size))
    mine += [-1] * (rows * num_microbatches - len(mine))
    return tuple(
        _pad(batch, tuple(mine[start : start + rows]), length) for start in range(0, len(mine), rows)
    )


def _pad(batch: TrainBatch, samples: tuple[int, ...], length: int) -> Microbatch:
    tokens = torch.zeros(len(samples), length, dtype=torch.int64)
    mask = torch.zeros(len(samples), length)
    old_logprobs = torch.zeros(len(samples), length)
    advantages = torch.zeros(len(samples))
    for row, sample in enumerate(samples):
        if sample < 0:
            continue  # a filler row stays token 0 under an empty mask
        prompt, response = batch.prompts[sample], batch.responses[sample]
        tokens[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        span = response_span(batch, sample)
        mask[row, span] = 1.0
        old_logprobs[row, span] = torch.tensor(batch.old_logprobs[sample])
        advantages[row] = batch.advantages[sample]
    return Microbatch(tokens, tokens.roll(-1, dims=1), mask, old_logprobs, advantages, samples)


def response_span(batch: TrainBatch, sample: int) -> slice:
    """Positions whose targets are the response tokens of `sample`: from the last prompt token on."""
    start = len(batch.prompts[sample]) - 1
    return slice(start, start + len(batch.responses[sample]))
