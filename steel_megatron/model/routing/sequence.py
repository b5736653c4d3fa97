"""Mode ``sequence``: one set of slots over all tokens of a document, as published. Not causal."""

from __future__ import annotations

from steel_megatron.config import ModelConfig
from steel_megatron.config.routing import SequenceFacts
from steel_megatron.model.routing.mode import register_routing_mode
from steel_megatron.model.routing.slots import SlotRouting


@register_routing_mode
class Sequence(SequenceFacts, SlotRouting):
    """Every slot is a mean over the whole document (Steel-LLM, section 3.1)."""

    replicated_slots = True

    def refresh_length(self, block_length: int) -> None:
        return None

    def refreshes(self, model: ModelConfig) -> int:
        return 1
