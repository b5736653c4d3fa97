"""Mode ``block_causal``: slots over the tokens so far, made anew at refresh points."""

from __future__ import annotations

from steel_megatron.config import ModelConfig
from steel_megatron.config.routing import BlockCausalFacts
from steel_megatron.model.routing.mode import register_routing_mode
from steel_megatron.model.routing.slots import SlotRouting
from steel_megatron.ops.reference import refresh_points


@register_routing_mode
class BlockCausal(BlockCausalFacts, SlotRouting):
    """A token reads the slots of the last refresh, which are means over tokens before it."""

    replicated_slots = False

    def refresh_length(self, block_length: int) -> int:
        return block_length

    def refreshes(self, model: ModelConfig) -> int:
        return len(refresh_points(model.sequence_length, model.block_length))
