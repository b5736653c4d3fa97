"""The result of an audit, and its report as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from steel_megatron.config import ModelConfig
from steel_megatron.hf.mapping import why_not_exportable
from steel_megatron.model.causality import Causality

Kind = Literal["checkpoint", "Hugging Face folder", "settings"]
EQUAL = 1e-3
"""Difference of logits computed in two ways, in standard deviations, up to which they are equal.

Other shapes and other orders of sums: float32's rounding, grown by the layers, is 1e-6 to 1e-4. A wrong state of a
cache, or a token in the wrong block, is 1e-2 and more.
"""
TEXTS = 3
"""Random texts, each with replacements of its own."""


def blocks_of(model: ModelConfig) -> int | None:
    """Block length, in the modes that have blocks."""
    return model.block_length if model.routing is not None and model.routing.has_blocks else None


def feed_forward_of(model: ModelConfig) -> str:
    """The model's kind of feed-forward layer, in words."""
    return f"ffn {model.ffn}" if model.routing is None else f"routing mode {model.routing_mode}"


@dataclass(frozen=True)
class Difference:
    """Logits of the same tokens, computed in two ways.

    Attributes:
        largest: largest absolute difference.
        std: standard deviation of the logits.
        same_choice: share of the positions at which both find the same token likeliest.
        positions: how many were compared.
    """

    largest: float
    std: float
    same_choice: float
    positions: int

    @property
    def equal(self) -> bool:
        """Whether there is no more than rounding between them."""
        return self.largest <= EQUAL * self.std

    @property
    def figure(self) -> str:
        """In words."""
        return f"{self.largest:.2g}, std {self.std:.3g}, same likeliest token at {self.same_choice:.0%}"


@dataclass(frozen=True)
class ExportedAudit:
    """The audit of the exported model code.

    Attributes:
        causality: its own audit.
        agreement: its logits against the library's.
        decoding: its logits one token at a time, with a cache, against those of its full forward on the text so far.
        prompts: lengths of the prompts that decoding began after.
    """

    causality: Causality
    agreement: Difference
    decoding: Difference
    prompts: tuple[int, ...]


@dataclass(frozen=True)
class AuditReport:
    """What the audit of a model found.

    Attributes:
        path: what was audited.
        kind: what that is.
        model: its settings, with as many layers as were audited.
        parameters: how many numbers the weights of these layers are, embeddings included.
        length: tokens of each text.
        positions: the tokens that were changed.
        seed: of texts and replacements, and of random weights.
        library: the library's own stage, which trains.
        exported: the exported code, for models that have one.
    """

    path: str
    kind: Kind
    model: ModelConfig
    parameters: int
    length: int
    positions: tuple[int, ...]
    seed: int
    library: Causality
    exported: ExportedAudit | None

    @property
    def leaks(self) -> bool:
        """Whether tokens see later ones: measured, or by the routing mode where next to nothing moved."""
        exported = self.exported is not None and self.exported.causality.leaks
        return self.library.leaks or exported or not self.model.causal

    @property
    def passed(self) -> bool:
        """Whether the model is causal, computes the same in both ways, and decodes what it computes."""
        return self.verdict == "causal"

    @property
    def verdict(self) -> str:
        """``causal``, ``leaks (figure)``, or ``causal, but`` what else is wrong."""
        if self.library.leaks:
            return self.library.verdict
        if self.exported is not None and self.exported.causality.leaks:
            return f"{self.exported.causality.verdict}, in the exported code"
        if not self.model.causal:
            return (
                f"leaks (by its routing mode, {self.model.routing_mode}; these weights let through no more than "
                f"rounding: {self.library.figure})"
            )
        if self.exported is not None and not self.exported.agreement.equal:
            return f"causal, but the exported code gives other logits ({self.exported.agreement.figure})"
        if self.exported is not None and not self.exported.decoding.equal:
            return f"causal, but decoding with a cache gives other logits ({self.exported.decoding.figure})"
        return "causal"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {name: getattr(self, name) for name in ("verdict", "leaks", "passed")} | dataclasses.asdict(self)

    def to_text(self) -> str:
        """The report as a page of text; the last line is the verdict."""
        mode = feed_forward_of(self.model)
        blocks = f", blocks of {self.model.block_length} tokens" if blocks_of(self.model) else ""
        lines = [
            f"{self.path}: {self.kind}, {self.model.num_layers} layers, {self.parameters:,} parameters, {mode}{blocks}",
            f"{TEXTS} random texts of {self.length} tokens, seed {self.seed}, float32",
            f"changed tokens: {', '.join(map(str, self.positions))}; each alone, and with all tokens after it",
            "",
            f"{'movement before the change':<28}{'library':>12}{'std':>8}{'exported':>14}{'std':>8}",
        ]
        exported = self.exported.causality.movements if self.exported else ()
        for number, ours in enumerate(self.library.movements):
            theirs = f"{exported[number].largest:>14.3g}{exported[number].std:>8.3g}" if exported else f"{'-':>14}"
            lines.append(f"  {ours.name:<26}{ours.largest:>12.3g}{ours.std:>8.3g}{theirs}")
        if self.library.leaks:
            lines += ["", f"{'changed token, logits moved':<28}{'alone':>12}{'with all after it':>22}"]
            for position, (alone, with_rest) in self.library.movements[-1].by_position.items():
                lines.append(f"  {position:<26}{alone:>12.3g}{with_rest:>22.3g}")
        lines += ["", *self._decoding_lines(), f"verdict: {self.verdict}"]
        return "\n".join(lines) + "\n"

    def _decoding_lines(self) -> list[str]:
        if self.exported is None:
            return [f"audited the library's own model alone, without decoding: {why_not_exportable(self.model)}"]
        prompts = ", ".join(map(str, self.exported.prompts))
        return [
            f"exported code against the library: {self.exported.agreement.figure}",
            f"one token at a time with a cache after prompts of {prompts}, against the full forward: "
            f"{self.exported.decoding.figure}",
        ]
