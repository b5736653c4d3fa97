"""The fields of megatron-core's own configs that ``model.megatron`` and ``optimizer.megatron`` may set.

megatron-core's configs have hundreds of fields. Most are read only by modules that this library does not use, and some
break a run. The lists below hold the fields that the library's modules read and that train;
``tests/train/test_megatron_fields.py`` proves both.
"""

from __future__ import annotations

EXECUTION_FIELDS = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "distribute_saved_activations",
    "batch_p2p_comm",
)
"""Fields of TransformerConfig that change how a model is computed, but not the result."""
COMPUTATION_FIELDS = ("softmax_scale", "rotary_interleaved", "no_rope_freq")
"""Fields of TransformerConfig that change the result."""
TOP_K_MOE_FIELDS = (
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_score_function",
    "moe_z_loss_coeff",
    "activation_func_clamp_value",
    "glu_linear_offset",
)
"""Fields that only megatron-core's MoE layer (``ffn: top_k_moe``) reads; they change the result."""
OPTIMIZER_FIELDS = ("decoupled_weight_decay", "decoupled_lr", "decoupled_min_lr")
"""Fields of OptimizerConfig."""
LOSS_SCALE_FIELDS = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
"""Fields of OptimizerConfig that only runs in float16 read."""

REQUIRES: dict[str, tuple[str, object]] = {
    "recompute_method": ("recompute_granularity", "full"),
    "recompute_num_layers": ("recompute_granularity", "full"),
    "distribute_saved_activations": ("recompute_granularity", "full"),
    "recompute_modules": ("recompute_granularity", "selective"),
    "moe_router_num_groups": ("moe_router_group_topk", None),
    "decoupled_min_lr": ("decoupled_lr", None),
}
"""Fields without effect unless another one has this value (None: any)."""

_NO_LONGER_ACCEPTED = ("moe_", "multi_latent_attention", "attention_output_gate", "fp32_residual_connection")
"""Beginnings of fields that are refused today, but changed the result in earlier versions."""


def changes_the_result(field: str) -> bool:
    """Whether a field of TransformerConfig changes what given weights compute.

    Checkpoints of earlier versions may also hold fields that had no effect at all.
    """
    return field in COMPUTATION_FIELDS + TOP_K_MOE_FIELDS or field.startswith(_NO_LONGER_ACCEPTED)
