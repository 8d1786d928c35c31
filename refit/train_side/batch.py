"""What one training step reads: pure Python, so that the caller needs neither torch nor Megatron."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One GRPO batch of N samples, the same object on every trainer rank.

    `prompts[i]` and `responses[i]` are token ids, both non-empty; `old_logprobs[i]` has one value per
    response token, under the policy that sampled it; `advantages[i]` is sample i's group-relative advantage.
    """

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    old_logprobs: tuple[tuple[float, ...], ...]
    advantages: tuple[float, ...]

    def __post_init__(self) -> None:
        counts = {
            "prompts": len(self.prompts),
            "responses": len(self.responses),
            "old_logprobs": len(self.old_logprobs),
            "advantages": len(self.advantages),
        }
        if len(set(counts.values())) != 1 or not self.prompts:
            raise ValueError(f"a batch needs the same number, at least 1, of each field, got {counts}")
        for index, (prompt, response, logprobs) in enumerate(
            zip(self.prompts, self.responses, self.old_logprobs, strict=True)
        ):
            if not prompt or not response:
                raise ValueError(
                    f"sample {index}: prompt ({len(prompt)} tokens) and response ({len(response)} tokens) "
                    "must both be non-empty"
                )
            if len(logprobs) != len(response):
                raise ValueError(
                    f"sample {index}: {len(response)} response tokens but {len(logprobs)} old_logprobs"
                )

    @property
    def num_samples(self) -> int:
        return len(self.prompts)

    @property
    def num_response_tokens(self) -> int:
        return sum(map(len, self.responses))

    @property
    def max_tokens(self) -> int:
        """Length of the longest prompt + response."""
        return max(len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True))
