"""Exact weight refit for RL: Megatron-Core trainers to vLLM generators, shard to shard."""
