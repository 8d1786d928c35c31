"""Token log-probabilities from vocabulary-parallel logits, and the GRPO loss on them."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Log-probability of each target, float32 [batch, tokens], at temperature 1, the same on every TP rank.

    `logits` [batch, tokens, local vocabulary] is this TP rank's cut of the padded vocabulary; entries at and
    beyond `vocab_size` are padding and get no probability. Only [batch, tokens] crosses ranks.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    num_local = logits.shape[-1]
    first = group.rank() * num_local
    num_valid = max(0, min(num_local, vocab_size - first))
    local = logits[..., :num_valid].float()
    peak = local.detach().amax(-1) if num_valid else local.new_full(targets.shape, -torch.inf)
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX, group=group)
    shifted = local - peak.unsqueeze(-1)
    mine = (targets >= first) & (targets < first + num_valid)
    if num_valid:
        index = torch.where(mine, targets - first, 0).unsqueeze(-1)
        picked = torch.where(mine, shifted.gather(-1, index).squeeze(-1), 0.0)
    else:
        picked = shifted.sum(-1)
    # One sum over ranks for both; its backward is the identity, as the loss is the same on every TP rank.
    total, chosen = reduce_from_tensor_model_parallel_region(
        torch.stack((shifted.exp().sum(-1), picked))
    ).unbind(0)
    return chosen - total.log()


def grpo_token_losses(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    clip_ratio: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token (loss, KL to the reference, clipped flag), all shaped like `logprobs` [batch, tokens].

    Loss: PPO's clipped surrogate with the sample's group-relative advantage, plus `kl_coef` times the k3
    estimate exp(d) - d - 1 with d = reference - policy (J. Schulman, "Approximating KL divergence", 2020):
    unbiased and never negative.
    """
    ratio = (logprobs - old_logprobs).exp()
    advantage = advantages.unsqueeze(-1)
    plain = ratio * advantage
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantage
    delta = reference_logprobs - logprobs
    kl = delta.exp() - delta - 1
    return kl_coef * kl - torch.minimum(plain, clipped), kl.detach(), (clipped < plain).float()
