"""How much arithmetic a token costs: the base of model FLOPs utilisation, and of comparisons at equal FLOPs."""

from __future__ import annotations

from steel_megatron.config import ModelConfig
from steel_megatron.model.routing import routing_mode


def training_flops_per_token(model: ModelConfig, *, frozen: bool = False) -> float:
    """Floating-point operations of one token's forward and backward pass, at the model's sequence length.

    Counts the products of matrices (a multiplication and an addition each; the backward pass is twice the forward
    pass) and causal attention at half its square; norms, softmax and the embedding are left out. Frozen weights have no
    gradients to be computed, and their adapters are left out.

    Args:
        model: the settings.
        frozen: whether its weights are.
    """
    passes = dict.fromkeys(("attention", "experts", "output"), 2) if frozen else {}
    return 2 * sum(passes.get(name, 3) * count for name, count in multiplications_per_token(model).items())


def multiplications_per_token(model: ModelConfig) -> dict[str, float]:
    """Multiplications of one token's forward pass at the model's sequence length, summed over layers, by purpose.

    Returns:
        ``attention``: the four projections. ``scores``: queries by keys and weights by values, over half the sequence
        on average. ``experts``: feed-forward networks of every kind, and the merging of their weights. ``routing``:
        logits, dispatch and combine. ``output``: the logits of the next token.
    """
    hidden, length, layers = model.hidden_size, model.sequence_length, model.num_layers
    projections = hidden * (model.num_attention_heads + 2 * model.query_groups) * model.head_dim + hidden * hidden
    experts, routing = _feed_forward(model)
    return {
        "attention": layers * projections,
        "scores": layers * length * hidden,
        "experts": layers * experts,
        "routing": layers * routing,
        "output": hidden * model.padded_vocab_size,
    }


def _feed_forward(model: ModelConfig) -> tuple[float, float]:
    """Multiplications of one feed-forward layer for one token: in experts, and in routing."""
    matrices = 4 if model.ffn_activation == "double_swiglu" else 3
    network = matrices * model.hidden_size * model.ffn_hidden_size
    if model.ffn == "none":
        return 0, 0
    if model.ffn == "dense":
        return network, 0
    if model.ffn == "top_k_moe":
        return model.moe_top_k * network, model.num_experts * model.hidden_size
    assert model.routing_mode is not None, "checked by ModelConfig"
    experts, routing = routing_mode(model.routing_mode).multiplications(model, network)
    return matrices * model.hidden_size * model.shared_expert_intermediate_size + experts, routing
