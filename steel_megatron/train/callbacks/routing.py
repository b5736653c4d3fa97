"""What the routing does, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from steel_megatron.model.soft_moe import ParallelSoftMoE
from steel_megatron.ops import reference
from steel_megatron.train.callbacks.base import Callback, RunView
from steel_megatron.train.callbacks.metrics import TensorBoard
from steel_megatron.train.engine import StepResult
from steel_megatron.train.fully_sharded import whole_weights

NAMES = ("combine_entropy", "dispatch_entropy", "slot_similarity", "scale")


@torch.no_grad()
def routing_figures(x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Figures of one layer's routing over whole sequences (Soft MoE, arXiv 2308.00951, section 2.1).

    Args:
        x: [B, T, d] the layer's input.
        phi: [d, E, P].
        scale: [1].

    Returns:
        float64 [4 + E]: entropy of the combine weights over the S slots as a share of log(S), mean over tokens;
        entropy of the dispatch weights over the T tokens as a share of log(T), mean over slots; mean cosine of two
        slots' vectors; the scale; and of each expert its share of the combine weights, mean over tokens. An entropy
        over one item, and the similarity of a single slot, are 1.
    """
    x, phi, scale = x.double(), phi.double(), scale.double()
    logits = torch.nn.functional.normalize(x, dim=-1) @ reference.slot_keys(phi, scale)  # [B, T, S]
    combine, dispatch = logits.softmax(-1), logits.softmax(1)
    slots = torch.nn.functional.normalize(dispatch.transpose(1, 2) @ x, dim=-1)  # [B, S, d]
    count = logits.size(-1)
    cosines = (slots @ slots.transpose(1, 2)).sum((1, 2)).mean() - count
    similarity = cosines / (count * (count - 1)) if count > 1 else cosines.new_ones(())
    figures = (_entropy(combine, -1).mean(), _entropy(dispatch, 1).mean(), similarity, scale.abs().squeeze())
    shares = combine.unflatten(-1, phi.shape[1:]).sum(-1).mean((0, 1))
    return torch.cat((torch.stack(figures), shares))


def _entropy(weights: torch.Tensor, dim: int) -> torch.Tensor:
    """Of distributions along an axis, as a share of the highest there can be."""
    highest = math.log(weights.size(dim))
    entropy = torch.special.entr(weights).sum(dim)
    return entropy / highest if highest else torch.ones_like(entropy)


class RoutingMetrics(Callback):
    """Every so many steps, :func:`routing_figures` of each Soft-MoE layer, to TensorBoard as ``routing/layer_03/...``.

    Measured on the first micro batch of the step, on the tokens that each process holds, and averaged over processes.

    Args:
        tensorboard: the run's TensorBoard log.
        interval: steps between two measurements.
    """

    def __init__(self, tensorboard: TensorBoard, interval: int) -> None:
        self._tensorboard, self._interval = tensorboard, interval
        self._inputs: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def before_step(self, run: RunView) -> None:
        """Before a step that is measured, listen to the layers' inputs."""
        if (run.step + 1) % self._interval == 0 and run.config.model.ffn == "soft_moe":
            self._hooks = [
                layer.mlp.register_forward_pre_hook(self._listener(layer.layer_number)) for layer in _layers(run)
            ]

    def _listener(self, number: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._inputs.setdefault(number, inputs[0].detach().transpose(0, 1))

        return keep

    def after_step(self, run: RunView, result: StepResult) -> None:
        """Measure what was heard."""
        model = run.config.model
        if run.step % self._interval or model.ffn != "soft_moe":
            return
        for hook in self._hooks:
            hook.remove()
        width = len(NAMES) + model.num_experts
        sums = torch.zeros(model.num_layers, width + 1, dtype=torch.float64, device=run.topology.device)
        for layer in _layers(run):
            with whole_weights(layer):
                figures = routing_figures(self._inputs.pop(layer.layer_number), layer.mlp.phi, layer.mlp.scale)
            sums[layer.layer_number - 1] = torch.cat((figures, figures.new_ones(1)))
        dist.all_reduce(sums)  # a layer is on one pipeline stage, and there on several processes
        means = (sums[:, :-1] / sums[:, -1:]).tolist()
        names = [*NAMES, *(f"share_of_expert_{number}" for number in range(model.num_experts))]
        for number, values in enumerate(means, 1):
            scalars = {f"routing/layer_{number:02d}/{name}": value for name, value in zip(names, values, strict=True)}
            self._tensorboard.write(scalars, result.step)


def _layers(run: RunView) -> list[Any]:
    """This process's layers that route."""
    return [layer for chunk in run.chunks for layer in chunk.decoder.layers if isinstance(layer.mlp, ParallelSoftMoE)]
