"""The table of routing modes, as far as settings need to know them.

Everything that depends on a mode reads its entry here. The entries of the modes in this file hold facts alone, so that
settings can be checked before torch is imported; :mod:`steel_megatron.model.routing` replaces each by an object that
also computes. A mode of somebody else's is named by ``module:name``, and its module imported when settings name it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, ClassVar

from steel_megatron.errors import ConfigError


class RoutingModeFacts:
    """What settings, reports and checks ask of a routing mode."""

    name: ClassVar[str]
    """What ``model.routing_mode`` calls it."""
    causal: ClassVar[bool]
    """Whether no token's output depends on a later token: the mode's claim, which the audit measures."""
    has_blocks: ClassVar[bool] = False
    """Whether it works in blocks of ``model.block_length`` tokens."""
    splits_sequences: ClassVar[bool] = False
    """Whether it computes sequences that several processes share (context and sequence parallelism)."""
    packs_documents: ClassVar[bool] = False
    """Whether it keeps documents apart that share a sequence (``data.reset_at_eod``)."""
    splits_documents: ClassVar[bool] = False
    """Whether it does both at once: documents that lie on several processes."""

    def check_model(self, model: Any) -> None:
        """Raise a ConfigError when the settings lack what the mode needs.

        Args:
            model: a ModelConfig, or a plain SoftMoE, which has the routing's fields under the same names.
        """

    def check_chunks(self, model: Any, chunk: int, chunks: int, cut: str) -> None:
        """Raise a ConfigError when the mode cannot compute sequences that are cut in this way.

        Args:
            model: the ModelConfig.
            chunk: tokens of a chunk; a process holds one or more whole chunks of each sequence.
            chunks: chunks of a sequence.
            cut: the settings that cut it, for the message.
        """


class SequenceFacts(RoutingModeFacts):
    """One set of slots per document, as published."""

    name = "sequence"
    causal = False
    splits_sequences = packs_documents = splits_documents = True


class TokenFacts(RoutingModeFacts):
    """Every token through all experts."""

    name = "token"
    causal = True
    splits_sequences = packs_documents = splits_documents = True


class BlockCausalFacts(RoutingModeFacts):
    """Slots over the tokens before a block."""

    name = "block_causal"
    causal = has_blocks = True
    splits_sequences = packs_documents = splits_documents = True


class MergedFacts(RoutingModeFacts):
    """One expert per segment, merged by the routing of the segment before (Lory, arXiv 2405.03133)."""

    name = "merged"
    causal = has_blocks = True
    splits_sequences = packs_documents = splits_documents = True


_FACTS = ("causal", "has_blocks", "splits_sequences", "packs_documents", "splits_documents")
_MODES: dict[str, RoutingModeFacts] = {
    mode.name: mode for mode in (SequenceFacts(), TokenFacts(), BlockCausalFacts(), MergedFacts())
}


def add_routing_mode(mode: RoutingModeFacts) -> None:
    """Put a mode into the table, or what computes it in the place of its facts.

    Raises:
        ConfigError: another mode has this name.
    """
    there, new = _MODES.get(mode.name), type(mode)
    old = type(there)
    if there is not None and old.__module__ == __name__ and isinstance(mode, old):
        differing = [fact for fact in _FACTS if getattr(there, fact) != getattr(mode, fact)]
        assert not differing, f"{mode.name} computes otherwise than its facts say: {differing}"
    # A class may replace itself: its module or a notebook's cell was run again.
    elif there is not None and (old.__module__, old.__qualname__) != (new.__module__, new.__qualname__):
        raise ConfigError(
            f"{new.__module__}.{new.__qualname__} calls itself routing mode {mode.name!r}, which is "
            f"{old.__module__}.{old.__qualname__}; give it another name"
        )
    _MODES[mode.name] = mode


def routing_mode_names() -> tuple[str, ...]:
    """The modes in the table."""
    return tuple(_MODES)


def routing_facts(mode: str) -> RoutingModeFacts:
    """A mode's entry in the table.

    Args:
        mode: its name, or ``module:name``, which imports the module.

    Raises:
        ConfigError: there is no such mode, or its module cannot be imported.
    """
    module, colon, name = str(mode).rpartition(":")
    if colon:
        import_routing_code(module)
    if name not in _MODES:
        raise ConfigError(
            f"routing_mode is {mode!r}; it must be one of {', '.join(_MODES)}, or module:name of a mode "
            "that the module registers"
        )
    return _MODES[name]


def import_routing_code(module: str) -> None:
    """Import a module that registers routing modes.

    Raises:
        ConfigError: there is no such module, or one that it imports is missing.
    """
    if not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(
            f"{module!r} is no name of a module; a routing mode of your own is named my_package.my_module:name"
        )
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the module {module} of a routing mode cannot be imported ({error}); install it, or put its folder into "
            "PYTHONPATH"
        ) from None


def refuse_unknown_routing_code(mode: Any, origin: str) -> None:
    """Refuse settings that came with weights when building them would import a module.

    Args:
        mode: what they say of the routing mode.
        origin: where they came from, for the message.

    Raises:
        ConfigError: the mode's module is not imported yet.
    """
    module, colon, _ = str(mode).rpartition(":")
    if colon and module not in sys.modules:
        raise ConfigError(
            f"{origin} has routing mode {mode}, which is no part of this library, and nothing that comes with weights "
            f"may import code: name its module yourself (audit and generate: --routing_code {module}; in Python, "
            "import it first); export-hf has no such modes"
        )
