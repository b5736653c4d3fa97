"""How much arithmetic a token costs: the base of model FLOPs utilisation."""

from __future__ import annotations

from steel_megatron.config import ModelConfig
from steel_megatron.ops.reference import refresh_points


def training_flops_per_token(model: ModelConfig) -> float:
    """Floating-point operations of one token's forward and backward pass, at the model's sequence length.

    Counts the products of matrices (a multiplication and an addition each; the backward pass is twice the forward
    pass) and causal attention at half its square; norms, softmax and the embedding are left out.
    """
    hidden, length = model.hidden_size, model.sequence_length
    attention = hidden * (model.num_attention_heads + 2 * model.query_groups) * model.head_dim + hidden * hidden
    scores = length * hidden  # queries by keys, and weights by values, over half the sequence on average
    layer = attention + scores + _feed_forward(model)
    return 3 * 2 * (model.num_layers * layer + hidden * model.padded_vocab_size)


def _feed_forward(model: ModelConfig) -> float:
    """Multiplications of one feed-forward layer for one token."""
    matrices = 4 if model.ffn_activation == "double_swiglu" else 3
    network = matrices * model.hidden_size * model.ffn_hidden_size
    if model.ffn == "dense":
        return network
    length, slots = model.sequence_length, model.num_experts * model.slots_per_expert
    shared = matrices * model.hidden_size * model.shared_expert_intermediate_size
    route = slots * model.hidden_size  # one product with every slot's key
    if model.routing_mode == "token":
        return shared + route + model.num_experts * network
    if model.routing_mode == "merged":
        segment = min(model.block_length, length)
        return shared + network + (route + model.num_experts * network) / segment
    refreshes = 1 if model.routing_mode == "sequence" else len(refresh_points(length, model.block_length))
    # logits, dispatch and combine for each token; the experts once for each slot of each refresh
    return shared + 3 * route + refreshes * slots * network / length
