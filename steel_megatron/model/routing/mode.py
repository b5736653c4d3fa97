"""What a routing mode is: facts for the settings, and what it computes.

Legend: B sequences of T tokens (L of them on a process where several share a sequence), hidden size d, E experts with P
slots each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from steel_megatron.config import ModelConfig, RoutingModeFacts, SlotInput, add_routing_mode, warn_of_old_name
from steel_megatron.errors import ConfigError
from steel_megatron.model.documents import PackedDocuments
from steel_megatron.parallel.sequence import SequenceSplit


class OldNames:
    """Attributes of a layer under the names of the version before."""

    slot_input: SlotInput

    @property
    def routing_mix(self) -> SlotInput:
        """Old name of ``slot_input``."""
        warn_of_old_name("routing_mix")
        return self.slot_input


class RoutedLayer(Protocol):
    """What a mode sees of the layer that it routes for.

    Attributes:
        phi: [d, E, P], directions of the slots' keys.
        scale: [1], length of the slots' keys.
        slot_input: what is mixed into slots: ``raw`` tokens, or ``normalized`` ones.
        block_length: tokens of a block.
        num_experts: E, over all processes.
    """

    phi: torch.nn.Parameter
    scale: torch.nn.Parameter
    slot_input: SlotInput
    block_length: int
    num_experts: int

    def run_experts(self, vectors: torch.Tensor, *, replicated: bool = False) -> torch.Tensor:
        """Every expert on its own vectors, wherever the experts are.

        Args:
            vectors: [E, N, d], or [1, N, d] where all experts get the same.
            replicated: whether processes that share a sequence all bring the same vectors, and use the results each
                for its own tokens; else each brings its own.

        Returns:
            [E, N, d]
        """
        ...

    def run_merged_experts(
        self, segments: torch.Tensor, weights: torch.Tensor, *, equal_segments: bool = True
    ) -> torch.Tensor:
        """Each segment through one expert, merged of all by the segment's weights.

        Args:
            segments: [M, N, d].
            weights: [M, E] in float32 or wider.
            equal_segments: whether all processes have the same number of segments.

        Returns:
            [M, N, d]
        """
        ...


@dataclass(frozen=True)
class SharedSequences:
    """Sequences that several processes share.

    Attributes:
        split: who holds which tokens.
        rank: this process's number among them.
        gather: every process's tensor on each, differentiable: [...] to [ranks, ...].
        equal_blocks: whether all processes must send equally many slots to the experts.
    """

    split: SequenceSplit
    rank: int
    gather: Callable[[torch.Tensor], torch.Tensor]
    equal_blocks: bool


class RoutingMode(RoutingModeFacts, ABC):
    """How tokens reach experts. Register a subclass with :func:`register_routing_mode`.

    A subclass has ``name`` and ``causal``, and computes at least whole sequences. That it can compute sequences which
    processes share, keep packed documents apart, or do both at once, is stated by overriding ``forward_split``,
    ``forward_documents`` or ``forward_split_documents``; runs that need what a mode does not override are refused.
    """

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.splits_sequences = cls.forward_split is not RoutingMode.forward_split
        cls.packs_documents = cls.forward_documents is not RoutingMode.forward_documents
        cls.splits_documents = cls.forward_split_documents is not RoutingMode.forward_split_documents

    @abstractmethod
    def multiplications(self, model: ModelConfig, network: float) -> tuple[float, float]:
        """Multiplications of one layer's forward pass for one token: in experts, and in routing.

        Args:
            model: the settings; the mean is over a sequence of ``model.sequence_length`` tokens.
            network: multiplications of one vector through one expert.
        """

    @abstractmethod
    def forward(self, layer: RoutedLayer, x: torch.Tensor) -> torch.Tensor:
        """Whole sequences [B, T, d], each of them one document, to the same shape."""

    def forward_documents(self, layer: RoutedLayer, x: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
        """Whole sequences of several documents, each computed as if it were alone.

        Args:
            layer: the layer that the mode routes for.
            x: [B, T, d] tokens.
            documents: which documents the sequences hold.

        Returns:
            [B, T, d]

        Raises:
            NotImplementedError: the mode does not override it.
        """
        raise NotImplementedError(f"{self.name} does not keep documents apart; RunConfig refuses them")

    def forward_split(self, layer: RoutedLayer, x: torch.Tensor, shared: SharedSequences) -> torch.Tensor:
        """This process's tokens of sequences that several processes share.

        Args:
            layer: the layer that the mode routes for.
            x: [B, L, d] tokens.
            shared: the processes that share the sequences, and which tokens each holds.

        Returns:
            [B, L, d]

        Raises:
            NotImplementedError: the mode does not override it.
        """
        raise NotImplementedError(f"{self.name} does not split sequences; RunConfig refuses it")

    def forward_split_documents(
        self, layer: RoutedLayer, x: torch.Tensor, shared: SharedSequences, documents: PackedDocuments
    ) -> torch.Tensor:
        """This process's tokens of sequences that several processes share, each document computed as if it were alone.

        Args:
            layer: the layer that the mode routes for.
            x: [B, L, d] tokens.
            shared: the processes that share the sequences, and which tokens each holds.
            documents: which documents the whole sequences hold.

        Returns:
            [B, L, d]

        Raises:
            NotImplementedError: the mode does not override it.
        """
        raise NotImplementedError(f"{self.name} does not split sequences of several documents; RunConfig refuses it")


def register_routing_mode(mode: type[RoutingMode]) -> type[RoutingMode]:
    """Class decorator that puts a mode into the table, under its ``name``.

    Raises:
        ConfigError: the class lacks something, or another mode has this name.
    """
    where = f"{mode.__module__}.{mode.__qualname__}"
    lacking = [
        fact for fact, kind in (("name", str), ("causal", bool)) if not isinstance(getattr(mode, fact, None), kind)
    ]
    lacking += sorted(mode.__abstractmethods__)
    if lacking:
        raise ConfigError(f"the routing mode {where} lacks {', '.join(lacking)} (docs/new_routing_mode.md)")
    if not mode.name.isidentifier():
        raise ConfigError(f"{where}.name is {mode.name!r}; a routing mode's name has letters, digits and underscores")
    add_routing_mode(mode())
    return mode
