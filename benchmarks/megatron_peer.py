"""Megatron-Core's own resharding (megatron.core.resharding, gloo service) between two layouts of the same model.

The models are real GPTModels with empty weights, one layout on the first ranks and one on the others. Without CUDA the
service runs with its streams stubbed and its staging buffers not pinned; what it copies and sends is unchanged.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from refit.train_side import cpu_compat
from refit.transfer.rendezvous import ControlStore

TIMEOUT_S = 300.0
cpu_compat.import_bridge()  # here, so that a fork server that preloads this module spares its children 20 s


@dataclass(frozen=True, slots=True)
class PeerLayout:
    """Parallel sizes of one side and its first rank in the joint world."""

    first_rank: int
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.num_ranks)


class MegatronPeer:
    """One rank's model, on the side that it is on. Collective over all ranks."""

    def __init__(self, config: dict[str, Any], src: PeerLayout, dst: PeerLayout, rank: int) -> None:
        from megatron.core.resharding.copy_services.gloo_copy_service import GlooCopyService

        groups = [_collection(layout, rank) for layout in (src, dst)]
        self._src = self._dst = None
        with cpu_compat.cpu_megatron():
            if rank in src.ranks():
                self._src = _model(config, src, groups[0])
            else:
                self._dst = _model(config, dst, groups[1])
            self._service = GlooCopyService(dist.new_group(backend="gloo"))

    def reshard(self) -> None:
        """Bring the weights over, with Megatron-Core's plan, which it makes in the first call and keeps."""
        from megatron.core.resharding.refit import reshard_model_weights

        real_empty: Callable[..., torch.Tensor] = torch.empty

        def unpinned(*args: Any, **kwargs: Any) -> torch.Tensor:
            kwargs.pop("pin_memory", None)
            return real_empty(*args, **kwargs)

        with cpu_compat.cpu_megatron(), mock.patch.object(torch, "empty", unpinned), torch.no_grad():
            reshard_model_weights(self._src, self._dst, service=self._service)

    @classmethod
    def of_case(
        cls, config: dict[str, Any], train: str, gen: str, rank: int, num_ranks: int, control: ControlStore
    ) -> "MegatronPeer":
        """From words such as "tp=2,pp=2" and "tp=2,replicas=2": the same sizes for a Megatron model on either side."""
        src_sizes, dst_sizes = (
            {word.partition("=")[0]: int(word.partition("=")[2]) for word in words.split(",")}
            for words in (train, gen)
        )
        expert = src_sizes.get("ep", 1)
        src = PeerLayout(0, src_sizes.get("tp", 1), src_sizes.get("pp", 1), expert, expert)
        dst = PeerLayout(src.num_ranks, dst_sizes.get("tp", 1), data=dst_sizes.get("replicas", 1))
        if src.num_ranks + dst.num_ranks != num_ranks:
            raise ValueError(
                f"{train!r} and {gen!r} make {src.num_ranks} + {dst.num_ranks} ranks, not {num_ranks}"
            )
        if rank == 0:
            control.put("mcore/port", free_port())
        port = control.get("mcore/port", TIMEOUT_S)
        open_world(rank, num_ranks, f"127.0.0.1:{port}", TIMEOUT_S)
        return cls(config, src, dst, rank)

    @property
    def received_bytes(self) -> int:
        """Bytes of weights that this rank gets."""
        if self._dst is None:
            return 0
        return sum(param.numel() * param.element_size() for param in self._dst.parameters())

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for param in (self._src or self._dst).parameters():
                param.fill_(value)

    def holds(self, value: float) -> bool:
        return all(bool((param == value).all()) for param in (self._src or self._dst).parameters())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def open_world(rank: int, size: int, address: str, timeout_s: float) -> None:
    """Megatron-Core asks the default group for its world."""
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )


def _collection(layout: PeerLayout, rank: int) -> Any:
    """Megatron's groups of one side: rank order is tensor, then data, then pipeline; experts share tensor x data."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    per_stage = layout.tensor * layout.data
    stages = [layout.first_rank + stage * per_stage for stage in range(layout.pipeline)]
    tp = [
        [at + d * layout.tensor + t for t in range(layout.tensor)]
        for at in stages
        for d in range(layout.data)
    ]
    dp = [
        [at + d * layout.tensor + t for d in range(layout.data)]
        for at in stages
        for t in range(layout.tensor)
    ]
    pp = [[at + i for at in stages] for i in range(per_stage)]
    model = [[*layout.ranks()]] if layout.data == 1 else [[at + i for at in stages] for i in range(per_stage)]
    ep = [
        [at + block * layout.expert + i for i in range(layout.expert)]
        for at in stages
        for block in range(per_stage // layout.expert)
    ]
    alone = [[member] for member in layout.ranks()]
    expt_tp = tp if layout.expert == 1 else alone
    expt_dp = dp if layout.expert == 1 else alone
    found = ProcessGroupCollection()
    wanted = {
        ("tp", "tp_cp"): tp,
        ("dp", "dp_cp", "intra_dp_cp", "dp_cp_gtp_remat"): dp,
        ("pp", "embd", "pos_embd"): pp,
        ("mp",): model,
        ("ep",): ep,
        ("cp", "hcp", "inter_dist_opt", "gtp_remat", "expt_gtp_remat"): alone,
        ("expt_tp",): expt_tp,
        ("tp_ep", "tp_ep_pp"): ep if layout.expert > 1 else tp,
        ("expt_dp", "intra_expt_dp", "expt_dp_gtp_remat"): expt_dp,
    }
    for names, members in wanted.items():
        mine = _my_group(members, rank)
        for name in names:
            setattr(found, name, mine)
    return found


def _my_group(members: Sequence[Sequence[int]], rank: int) -> Any:
    """Every rank of the world makes every group; a rank keeps the one that it is in."""
    mine = None
    for ranks in members:
        group = dist.new_group(list(ranks), backend="gloo")
        if rank in ranks:
            mine = group
    return mine


def _model(config: dict[str, Any], layout: PeerLayout, groups: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    spec = get_gpt_layer_local_spec(
        num_experts=config.get("num_experts"),
        moe_grouped_gemm=False,
        qk_layernorm=True,
        normalization="RMSNorm",
    )
    stage = groups.pp.rank()
    model = GPTModel(
        _config(config, layout),
        spec,
        vocab_size=config["vocab_size"],
        max_sequence_length=128,
        pre_process=stage == 0,
        post_process=stage == layout.pipeline - 1,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        pg_collection=groups,
    )
    return model.to(torch.bfloat16).requires_grad_(False)


def _config(config: dict[str, Any], layout: PeerLayout) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts = config.get("num_experts")
    moe = (
        {}
        if experts is None
        else {
            "num_moe_experts": experts,
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            "moe_router_topk": config["num_experts_per_tok"],
            "moe_token_dispatcher_type": "alltoall",
        }
    )
    return TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        qk_layernorm=True,
        add_bias_linear=False,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1 if layout.expert > 1 else layout.tensor,
        **moe,
    )
