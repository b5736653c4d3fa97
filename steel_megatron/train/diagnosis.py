"""Where numbers stopped being finite: found by looking again, after a loss or a gradient has come out wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

PARTS = ("self_attention", "mlp")


Weights = Sequence[Mapping[str, torch.nn.Parameter]]
"""What this process holds of each chunk's weights, by name."""


def where_forward_fails(chunks: Sequence[GPTModel], weights: Weights, forward: Callable[[], object]) -> str:
    """Which part of the model first gives a value that is not finite; every process of the launch calls it.

    Args:
        chunks: this process's parts of the model.
        weights: of each chunk.
        forward: computes the batches again that went wrong.

    Returns:
        such as ``layer 3's mlp (at token 17 of sequence 0), from finite inputs``.
    """
    found: list[tuple[int, str]] = []
    for number, name, parameter in _parameters(chunks, weights):
        if not torch.isfinite(parameter).all():
            found.append((3 * number, f"the weight {name} of layer {number}" if number else f"the weight {name}"))
    with _watching(chunks, found):
        forward()
    return _earliest(found) or (
        "in no weight and no layer: the sum of the losses overflows, or computing the same batch again gave finite "
        "numbers"
    )


def where_backward_fails(chunks: Sequence[GPTModel], weights: Weights) -> str:
    """Which weight's gradient is not finite, nearest to the loss; every process of the launch calls it.

    Args:
        chunks: this process's parts of the model.
        weights: of each chunk.
    """
    found = []
    for number, name, parameter in _parameters(chunks, weights):
        if parameter.requires_grad and not torch.isfinite(parameter.main_grad).all():
            found.append((-number, f"the gradient of {name}" + (f" (layer {number})" if number else "")))
    return _earliest(found) or "no single gradient: their norm overflows"


@contextmanager
def _watching(chunks: Sequence[GPTModel], found: list[tuple[int, str]]) -> Iterator[None]:
    """Notes each part of a layer that gives something not finite."""

    def watch(number: int, part: str) -> Callable[..., None]:
        def look(module: torch.nn.Module, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if torch.isfinite(values).all():
                return
            inputs = arguments[0] if arguments else keywords["hidden_states"]
            token, sequence = (~torch.isfinite(values)).any(-1).nonzero()[0].tolist()
            state = "from finite inputs" if torch.isfinite(inputs).all() else "from inputs that already are not"
            found.append(
                (
                    3 * number + 1 + PARTS.index(part),
                    f"the {part} of layer {number} (at token {token} of sequence {sequence}), {state}",
                )
            )

        return look

    handles = [
        getattr(layer, part).register_forward_hook(watch(layer.layer_number, part), with_kwargs=True)
        for chunk in chunks
        for layer in chunk.decoder.layers
        for part in PARTS
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parameters(chunks: Sequence[GPTModel], weights: Weights) -> Iterator[tuple[int, str, Any]]:
    """Each parameter with its name, and before it the number of its layer in the whole model, from 1; 0 outside."""
    for chunk, own in zip(chunks, weights, strict=True):
        for name, parameter in own.items():
            match = re.search(r"\bdecoder\.layers\.(\d+)\.", name)
            yield chunk.decoder.layers[int(match[1])].layer_number if match else 0, name, parameter


def _earliest(found: list[tuple[int, str]]) -> str:
    """The first of what all processes found."""
    of_all_ranks: list[tuple[int, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all_ranks, min(found, default=None))
    return min((one for one in of_all_ranks if one is not None), default=(0, ""))[1]
