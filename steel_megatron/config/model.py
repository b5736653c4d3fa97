"""The network."""

from __future__ import annotations

import logging
from dataclasses import InitVar, dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, get_args

from steel_megatron.config.checks import at_least, at_most, below_one, divides, one_of, typed
from steel_megatron.config.megatron import changes_the_result
from steel_megatron.config.routing import RoutingModeFacts, routing_facts, routing_mode_names
from steel_megatron.errors import ConfigError

logger = logging.getLogger(__name__)

FeedForward = Literal["soft_moe", "dense", "none", "top_k_moe"]
Activation = Literal["double_swiglu", "swiglu"]
LoadBalancing = Literal["aux_loss", "seq_aux_loss"]
SlotInput = Literal["normalized", "raw"]
ImplementationName = Literal["auto", "local", "transformer_engine"]
MOST_LAYERS, MOST = 65_536, 2**31 - 1
"""The most layers or experts, and the most of anything else: beyond are no models, but damaged files."""


def take_old_names(owner: object, **old: object) -> None:
    """Set the fields of ``owner`` (a config or a layer) that were given under old names; None stands for not given.

    Raises:
        ConfigError: both names were given, with different values.
    """
    for name, value in old.items():
        if value is None:
            continue
        new = ModelConfig.RENAMED[name]
        warn_of_old_name(name)
        if getattr(owner, new) not in (value, ModelConfig.__dataclass_fields__[new].default):
            raise ConfigError(f"{name} is {value!r} and {new} is {getattr(owner, new)!r}; give only {new}")
        object.__setattr__(owner, new, value)


@cache
def warn_of_old_name(name: str) -> None:
    """Log the new name of a model's setting, once in a process."""
    new = ModelConfig.RENAMED[name]
    logger.warning(f"{name} is now called {new}; the next version no longer accepts the old name")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network (Steel-LLM, section 3 and table 1)."""

    RENAMED: ClassVar[dict[str, str]] = {"routing_mix": "slot_input", "experts_alike": "identical_expert_init"}

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Query heads; hidden_size must be divisible by it."""
    num_query_groups: int | None = None
    """Key and value heads (grouped-query attention); none means one per query head."""
    ffn: FeedForward = "soft_moe"
    """Feed-forward layer: a Soft-MoE, one dense network, none (attention only), or megatron-core's top-k MoE."""
    ffn_activation: Activation = "double_swiglu"
    """What an expert (or the dense network) computes: Steel's double SwiGLU ("senet"), or SwiGLU."""
    ffn_hidden_size: int = 256
    """Inner width of one expert, or of the dense network."""
    num_experts: int = 6
    """Experts of an MoE layer."""
    slots_per_expert: int = 1
    """Slots that each expert computes per sequence or block."""
    routing_mode: str | None = None
    """How tokens reach experts; a Soft-MoE run must say which: sequence (the only one that is not causal), token,
    block_causal, merged, or module:name of a mode of your own (docs/new_routing_mode.md)."""
    slot_input: SlotInput = "raw"
    """What is mixed into slots: the tokens as they are, or scaled to length 1 (the published weights)."""
    block_length: int = 64
    """Tokens between two refreshes of the slots (block_causal), or of one segment (merged)."""
    routing_scale_init: float = 1.0
    """Initial length of the slots' keys: how sharp routing is before it is trained. Logits are at most this large."""
    moe_top_k: int = 2
    """Experts that each token of a top_k_moe passes through."""
    moe_aux_loss_coeff: float = 0.01
    """Weight of the loss that spreads a top_k_moe's tokens over its experts."""
    moe_router_load_balancing_type: LoadBalancing = "aux_loss"
    """What that loss is over: the tokens of a micro batch (aux_loss), or of each sequence (seq_aux_loss). Both are the
    same under every layout, the second one for every micro batch size as well."""
    shared_expert_intermediate_size: int = 0
    """Inner width of one more expert that every token passes through; 0 for none."""
    vocab_size: int = 151936
    """Token ids are below this number."""
    make_vocab_size_divisible_by: int = 128
    """Embedding rows are padded to a multiple of this; padding never gets probability."""
    sequence_length: int = 2048
    """Tokens of one training sequence."""
    rotary_base: int = 1_000_000
    """Base of the rotary position embedding, computed in float32."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMSNorm."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
    expert_init_method_std: float | None = None
    """The same for experts, or for the dense network; none means init_method_std. Merging E experts evenly divides the
    deviation by sqrt(E), which init_method_std * sqrt(E) makes up for."""
    hidden_dropout: float = 0.0
    """Probability with which training drops an element of the embedding, or of what a layer's attention or feed-forward
    part adds to the residual stream."""
    attention_dropout: float = 0.0
    """Probability with which training drops an attention weight; above 0, all weights of a layer are stored."""
    identical_expert_init: bool = False
    """Start the experts of a layer as copies of one (sparse upcycling); routing then makes them different."""
    implementation: ImplementationName = "auto"
    """What computes it: torch's modules (local), or transformer-engine's, which need a GPU; auto takes these where they
    are. Checkpoints of one load in the other."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Further fields of megatron-core's TransformerConfig, by name (docs/extending.md lists them)."""
    routing_mix: InitVar[SlotInput | None] = None
    """Old name of slot_input; the next version no longer accepts it."""
    experts_alike: InitVar[bool | None] = None
    """Old name of identical_expert_init; the next version no longer accepts it."""

    def __post_init__(self, routing_mix: SlotInput | None, experts_alike: bool | None) -> None:
        take_old_names(self, routing_mix=routing_mix, experts_alike=experts_alike)
        typed(self)
        one_of(("soft_moe", "dense", "none", "top_k_moe"), self, "ffn")
        one_of(("double_swiglu", "swiglu"), self, "ffn_activation")
        one_of(("normalized", "raw"), self, "slot_input")
        one_of(get_args(ImplementationName), self, "implementation")
        one_of(("aux_loss", "seq_aux_loss"), self, "moe_router_load_balancing_type")
        at_least(1, self, "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
        at_least(1, self, "num_experts", "slots_per_expert", "block_length", "vocab_size", "sequence_length")
        at_least(1, self, "make_vocab_size_divisible_by", "rotary_base", "moe_top_k")
        at_least(0, self, "shared_expert_intermediate_size", "norm_epsilon", "init_method_std")
        at_least(0, self, "routing_scale_init", "moe_aux_loss_coeff", "expert_init_method_std")
        at_most(MOST_LAYERS, self, "num_layers", "num_experts")
        at_most(MOST, self, "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
        at_most(MOST, self, "slots_per_expert", "block_length", "sequence_length", "make_vocab_size_divisible_by")
        at_most(MOST, self, "moe_top_k", "shared_expert_intermediate_size")
        at_most(2**53, self, "rotary_base")
        below_one(self, "hidden_dropout", "attention_dropout")
        if self.ffn == "soft_moe" and self.routing_mode is None:
            modes = [name if routing_facts(name).causal else f"{name} (not causal)" for name in routing_mode_names()]
            raise ConfigError(
                f"ModelConfig.routing_mode is not set; a Soft-MoE run must say which mode it trains: {', '.join(modes)}"
            )
        if self.routing_mode is not None:
            routing_facts(self.routing_mode).check_model(self)
        if self.ffn == "top_k_moe":
            self._check_top_k_moe()
        divides(self.num_attention_heads, "num_attention_heads", self.hidden_size, "hidden_size")
        if self.head_dim % 2:
            raise ConfigError(
                f"hidden_size / num_attention_heads = {self.head_dim}; the rotary embedding needs an even head size"
            )
        divides(self.query_groups, "num_query_groups", self.num_attention_heads, "num_attention_heads")

    def _check_top_k_moe(self) -> None:
        if self.ffn_activation != "swiglu":
            raise ConfigError(
                f"ModelConfig.ffn_activation is {self.ffn_activation}; the experts of ffn = top_k_moe are "
                "megatron-core's own, which compute swiglu"
            )
        if self.moe_top_k > self.num_experts:
            raise ConfigError(f"ModelConfig.moe_top_k = {self.moe_top_k} is over num_experts = {self.num_experts}")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Key and value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrices. Does not depend on the parallel layout, so checkpoints fit any."""
        multiple = self.make_vocab_size_divisible_by
        return (self.vocab_size + multiple - 1) // multiple * multiple

    @property
    def routing(self) -> RoutingModeFacts | None:
        """The routing mode's entry in the table; None where there is no Soft-MoE."""
        return routing_facts(self.routing_mode) if self.ffn == "soft_moe" and self.routing_mode else None

    @property
    def causal(self) -> bool:
        """Whether no token's output depends on a later token."""
        return self.routing is None or self.routing.causal

    @property
    def megatron_computing(self) -> dict[str, Any]:
        """The further fields of megatron-core that change what the model computes."""
        return {name: value for name, value in self.megatron.items() if changes_the_result(name)}

    @property
    def loss_name(self) -> str:
        """How a loss of this model is to be called in a report."""
        return "loss" if self.causal else "loss (non-causal)"
