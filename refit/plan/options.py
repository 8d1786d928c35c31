"""What both sides must agree on besides the manifests, and the default whitelist."""

import re
from dataclasses import dataclass

from refit.plan.errors import ConfigError

ALIGNMENT_BYTES = 16
MIN_BUCKET_BYTES = 4096

_FLOAT_OR_SCALE = r"(weight|bias|weight_scale_inv|weight_scale|weight_scale_2|input_scale|scales?)"
_ATTENTION = r"q|k|v|o|qkv|query|key|value|out|dense|query_key_value"
_LATENT_ATTENTION = r"q_a|q_b|kv_a|kv_b|kv_a_proj_with_mqa|q_a_proj|q_b_proj|kv_b_proj|o_a|o_b"
_MLP = r"gate|up|down|gate_up|fc1|fc2|w1|w2|w3|c_fc|c_proj|c_attn|wi|wo"
_MAMBA_AND_OTHERS = r"in|x|dt|fc1_latent|fc2_latent|eh"
_LINEAR = rf"({_ATTENTION}|{_LATENT_ATTENTION}|{_MLP}|{_MAMBA_AND_OTHERS})(_proj)?"
DEFAULT_WHITELIST: tuple[str, ...] = (
    # embeddings and the output layer
    r"(.*\.)?(embed_tokens|embeddings?|tok_embeddings|word_embeddings|wte|shared_embedding)\.weight",
    r"(.*\.)?(lm_head|output|embed_out|shared_head\.head)\.(weight|bias)",
    # projections of attention, MLPs, experts (stacked), Mamba mixers
    rf"(.*\.)?{_LINEAR}\.{_FLOAT_OR_SCALE}",
    rf"(.*\.)?experts\.\*\.{_LINEAR}\.{_FLOAT_OR_SCALE}",
    r"(.*\.)?experts\.(gate_up_proj|down_proj|up_proj|gate_proj)(_bias|_scales?|_blocks)?",
    # routers
    r"(.*\.)?(gate|router|shared_expert_gate)\.(weight|bias|e_score_correction_bias)",
    r"(.*\.)?e_score_correction_bias",
    # norms, by whatever prefix
    r"(.*\.)?([A-Za-z0-9_]*(norm|layernorm|ln|norm_f|enorm|hnorm)[A-Za-z0-9_]*)\.(weight|bias)",
    # Mamba parameters; those that a loader transforms are not pure views and fail the proof
    r"(.*\.)?conv1d\.(weight|bias)",
    r"(.*\.)?(A_log|D|dt_bias)",
    # attention sinks and KV-cache scales
    r"(.*\.)?(sinks|[kv]_scale|[kv]_proj\.[kv]_scale)",
)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Agreed options of a plan.

    bucket_bytes: most bytes that one rank sends, and most that it receives, in one round.
    max_ops_per_round: most sends plus receives of one rank in one round.
    whitelist: full-match patterns on canonical names; empty means that everything is misc (the conventional
    refit).
    ranks_per_node, nics_per_node: the trainers' nodes, where they are known (0: every rank has a NIC of its own).
    """

    bucket_bytes: int = 256 << 20
    max_ops_per_round: int = 512
    whitelist: tuple[str, ...] = DEFAULT_WHITELIST
    ranks_per_node: int = 0
    nics_per_node: int = 0

    def __post_init__(self) -> None:
        if self.bucket_bytes < MIN_BUCKET_BYTES:
            raise ConfigError(f"bucket_bytes is {self.bucket_bytes}; give at least {MIN_BUCKET_BYTES}")
        if self.max_ops_per_round < 1:
            raise ConfigError(f"max_ops_per_round is {self.max_ops_per_round}; give at least 1")
        if min(self.ranks_per_node, self.nics_per_node) < 0 or (
            bool(self.ranks_per_node) != bool(self.nics_per_node)
        ):
            raise ConfigError(
                f"ranks_per_node is {self.ranks_per_node} and nics_per_node {self.nics_per_node}; give both, or neither"
            )
        if isinstance(self.whitelist, str):
            raise ConfigError(f"whitelist is one string {self.whitelist!r}; give a tuple of patterns")
        for pattern in self.whitelist:
            try:
                re.compile(pattern)
            except re.error as fault:
                raise ConfigError(
                    f"whitelist pattern {pattern!r} is not a regular expression: {fault}"
                ) from fault

    @property
    def peers_per_round(self) -> int:
        """Most peers that one rank talks to in one direction in one round; each gets at least 1 KiB of the
        bucket."""
        return max(1, min(self.max_ops_per_round, self.bucket_bytes // 2048))
