"""Soft-MoE routing: dispatch and combine, on compiled kernels or plain PyTorch."""

from steel_megatron.ops.soft_moe import Routing, combine, dispatch, expert_weights, merge_weights, mixed_tokens

__all__ = ["Routing", "combine", "dispatch", "expert_weights", "merge_weights", "mixed_tokens"]
