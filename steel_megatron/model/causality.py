"""Measuring causality: change later tokens and see how far everything before them moves.

In a causal model no value at a position depends on a later token. Whether that holds is a property of the code that
computes, so it is measured on that code, layer by layer, and never read off a setting. Texts are random token ids:
what counts is which values a token can reach, not what the text says. Shapes: N texts of T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from steel_megatron.errors import ConfigError, SteelError

Outputs = Mapping[str, torch.Tensor]
Forward = Callable[[torch.Tensor], Outputs]
LOGITS = "logits"
TOLERANCE = 1e-5
"""Movement, in standard deviations of what moves, up to which it counts as rounding.

A text and its changed copy are computed in the same shapes, so in a causal model most sums are the same to the bit.
What may differ is how they are grouped or what they refer to (a softmax that subtracts a maximum over the whole text is
causal in exact arithmetic only): a few units of float32's 1.2e-7 in each layer. 1e-5 leaves room for some tens of
layers; a leak through trained layers is 1e-2 and more.
"""


@dataclass(frozen=True)
class Movement:
    """How far values moved at positions before a changed token.

    Attributes:
        name: whose values: ``layer 1`` and so on for the hidden states after a layer, ``logits``.
        largest: largest absolute change, over all texts, changes and positions before them.
        std: standard deviation of the unchanged values.
        changed: first changed token of the change that did it.
        moved: the position that it moved.
        by_position: for each changed token, the largest change when it changed alone, and when all tokens after it
            changed as well.
    """

    name: str
    largest: float
    std: float
    changed: int
    moved: int
    by_position: dict[int, tuple[float, float]]

    @property
    def relative(self) -> float:
        """``largest`` in standard deviations."""
        if self.largest == 0:
            return 0.0
        return self.largest / self.std if self.std else math.inf


@dataclass(frozen=True)
class Causality:
    """What an audit of one model found.

    Attributes:
        movements: of every output, in the order of the model's layers.
        tolerance: movement relative to the standard deviation that counts as rounding.
    """

    movements: tuple[Movement, ...]
    tolerance: float

    @property
    def leaks(self) -> bool:
        """Whether something moved by more than rounding."""
        return any(movement.relative > self.tolerance for movement in self.movements)

    @property
    def shown(self) -> Movement:
        """The movement to report: the last output's, or the largest where that stood still."""
        last = self.movements[-1]
        if last.relative > self.tolerance or not self.leaks:
            return last
        return max(self.movements, key=lambda movement: movement.relative)

    @property
    def verdict(self) -> str:
        """``causal``, or ``leaks (0.39 in the logits, std 1.53)``."""
        return f"leaks ({self.figure})" if self.leaks else "causal"

    @property
    def figure(self) -> str:
        """The movement to report, in words."""
        movement = self.shown
        return f"{movement.largest:.3g} in the {movement.name}, std {movement.std:.3g}"


def default_positions(length: int, block_length: int | None = None) -> list[int]:
    """Tokens to change: the first that has one before it, inside blocks and at their edges, the last.

    Args:
        length: T, tokens of a text; at least 2.
        block_length: tokens of a block, where routing has blocks.
    """
    block = block_length or max(length // 3, 2)
    wanted = {1, 2, 3, block // 2, length - 1}
    for edge in (block, 2 * block):
        wanted |= {edge - 1, edge, edge + 1, edge + block // 2}
    return sorted(position for position in wanted if 1 <= position < length)


def check_positions(positions: Iterable[int], length: int) -> None:
    """Raise a ConfigError unless each of these tokens has one before it in a text of ``length``."""
    for position in positions:
        if not 1 <= position < length:
            raise ConfigError(
                f"position {position} cannot be audited: in texts of {length} tokens, positions 1 to {length - 1} "
                "have tokens before them"
            )


def audit_model(
    forward: Forward,
    *,
    vocab_size: int,
    length: int,
    positions: Sequence[int] = (),
    texts: int = 3,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    device: torch.device | str = "cpu",
) -> Causality:
    """Change tokens of random texts and measure how far values before them move.

    Args:
        forward: gives int64 [N, T] token ids' named outputs, each [N, T, any width], always under the same names.
        vocab_size: ids are below this; at least 2.
        length: T.
        positions: tokens to change, each once alone and once with all tokens after it; none for
            :func:`default_positions`.
        texts: N, each with its own tokens and its own replacements.
        seed: of texts and replacements.
        tolerance: movement relative to the standard deviation that counts as rounding.
        device: where ``forward`` wants its ids.

    Raises:
        ConfigError: a length, position or size does not allow to change a token after another.
        SteelError: an output holds values that are not finite.
    """
    if length < 2 or vocab_size < 2 or texts < 1:
        raise ConfigError(
            f"an audit needs texts of at least 2 tokens out of at least 2; it got {texts} texts of {length} tokens "
            f"out of {vocab_size}"
        )
    positions = list(positions) or default_positions(length)
    check_positions(positions, length)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (texts, length), generator=generator)
    others = (ids + torch.randint(1, vocab_size, ids.shape, generator=generator)) % vocab_size  # never the same id
    found: dict[str, dict[int, list[tuple[float, int]]]] = {}
    with torch.no_grad():
        before = _finite(forward(ids.to(device)))
        for first in positions:
            for end in (first + 1, length):
                changed = ids.clone()
                changed[:, first:end] = others[:, first:end]
                for name, values in _finite(forward(changed.to(device))).items():
                    change = (values[:, :first] - before[name][:, :first]).abs().flatten(2).amax((0, 2))
                    largest, where = change.max(0)
                    found.setdefault(name, {}).setdefault(first, []).append((float(largest), int(where)))
        spread = {name: float(values.float().std()) for name, values in before.items()}
    return Causality(tuple(_movement(name, spread[name], sizes) for name, sizes in found.items()), tolerance)


def _finite(outputs: Outputs) -> Outputs:
    for name, values in outputs.items():
        if not values.isfinite().all():
            raise SteelError(f"the audited model's {name} have values that are not finite, so it cannot be audited")
    return outputs


def _movement(name: str, std: float, sizes: Mapping[int, Sequence[tuple[float, int]]]) -> Movement:
    largest, changed, moved = max((size, first, where) for first, both in sizes.items() for size, where in both)
    by_position = {first: (alone[0], with_rest[0]) for first, (alone, with_rest) in sizes.items()}
    return Movement(name, largest, std, changed, moved, by_position)


def stage_outputs(stage: torch.nn.Module, vocab_size: int) -> Forward:
    """What a whole model on one process computes: hidden states after each layer, and logits.

    Args:
        stage: megatron-core's GPTModel with all layers.
        vocab_size: logits of the padding above it are left out.
    """

    def logits(ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.size(1), device=ids.device).unsqueeze(0)
        return stage(ids, positions, None)[..., :vocab_size]

    # megatron-core's layers give ([T, N, d], nothing).
    return watch(logits, stage.decoder.layers, lambda output: output[0].transpose(0, 1))  # type: ignore[union-attr,arg-type]


def watch(
    logits: Callable[[torch.Tensor], torch.Tensor],
    layers: Iterable[torch.nn.Module],
    hidden: Callable[..., torch.Tensor] = lambda output: output,
) -> Forward:
    """A forward for :func:`audit_model` out of a model and its layers.

    Args:
        logits: token ids [N, T] to logits [N, T, V], through the layers.
        layers: whose outputs are kept.
        hidden: a layer's output to [N, T, d].
    """

    def forward(ids: torch.Tensor) -> Outputs:
        outputs: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda layer, inputs, output: outputs.update({name: hidden(output)})

        handles = [layer.register_forward_hook(keep(f"layer {n}")) for n, layer in enumerate(layers, start=1)]
        try:
            last = logits(ids)
            return {**outputs, LOGITS: last}
        finally:
            for handle in handles:
                handle.remove()

    return forward
