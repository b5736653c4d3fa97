"""The table of routing modes: one file a mode, and what several of them use.

``mode`` says what a mode is; ``sequence``, ``block_causal``, ``token`` and ``merged`` are the library's own. ``slots``
is dispatch, experts and combine; ``split`` and ``split_plan`` are slots of sequences that processes share; ``merging``
merges experts. docs/new_routing_mode.md adds a mode.
"""

from steel_megatron.config import routing_facts
from steel_megatron.model.routing import block_causal, merged, sequence, token  # noqa: F401 (they register themselves)
from steel_megatron.model.routing.mode import OldNames, RoutedLayer, RoutingMode, SharedSequences, register_routing_mode

__all__ = ["OldNames", "RoutedLayer", "RoutingMode", "SharedSequences", "register_routing_mode", "routing_mode"]


def routing_mode(mode: str) -> RoutingMode:
    """What computes a mode.

    Args:
        mode: its name, or ``module:name``.

    Raises:
        ConfigError: there is no such mode.
    """
    found = routing_facts(mode)
    assert isinstance(found, RoutingMode), f"{mode} is in the table without a forward"
    return found
