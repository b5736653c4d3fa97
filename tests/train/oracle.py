"""A trainer in plain PyTorch that says what a step of the library has to give.

The forward pass is the exported model (:mod:`steel_megatron.hf.modeling_steel`), one process computes whole sequences,
and everything around it is written here from its definition. Nothing of ``steel_megatron.train`` or megatron-core is
used: that is what is held to this.

- Loss: cross entropy summed over all labels of the *global* batch that count, divided by their number.
- Packed documents: each is computed in a sequence of its own.
- Clipping: where the gradient's global norm n is over ``clip_grad``, the gradient is multiplied by
  ``clip_grad / (n + 1e-6)``; 0 clips nothing. The norm that is reported is n.
- AdamW: decoupled decay of all matrices: embeddings, projections, experts, ``phi``. Vectors do not decay: biases, the
  weights of norms, the routing's ``scale``.
- Learning rate of step n, from 1: ``lr * n / warmup`` up to step ``warmup``; then half a cosine from ``lr``, which it
  has at step ``warmup``, to ``min_lr``, which it has at step ``decay_steps`` (at the first step after the warm-up if
  that is later) and keeps. ``decay_steps`` is that of the settings, or all steps of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from steel_megatron.config import OptimizerConfig, RunConfig
from steel_megatron.hf import mapping

Weights = dict[str, torch.Tensor]
"""By published name."""
DECAYED = ("proj.weight", "embed_tokens.weight", "lm_head.weight", ".phi")
CONSTANT = ("bias", "norm.weight", ".scale")


@dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes:
        tokens: int64 [T + 1].
        counts: bool [T], whether token t + 1 is to be predicted.
        begins: where documents begin within the sample, the first one aside; empty where they see each other.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    begins: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    """What a step gives: the mean loss, the norm before clipping, the rate that was used, and the labels counted."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int


def learning_rate(step: int, settings: OptimizerConfig, train_steps: int) -> float:
    """The rate of a step, from 1."""
    warmup = settings.warmup_steps
    if step <= warmup:
        return settings.lr * step / warmup
    end = max(train_steps if settings.decay_steps is None else settings.decay_steps, warmup + 1)
    progress = min(1.0, (step - warmup) / (end - warmup))
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class Oracle:
    """The model and its optimizer.

    Args:
        run: the run's settings; its layout has no meaning here.
        weights: initial weights.
        dtype: in which all is computed.
    """

    def __init__(self, run: RunConfig, weights: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64) -> None:
        from steel_megatron.hf.configuration_steel import SteelConfig  # transformers takes seconds to import
        from steel_megatron.hf.modeling_steel import SteelForCausalLM

        self.run, self.steps_done = run, 0
        self.model = SteelForCausalLM(SteelConfig(**mapping.config_to_hf(run.model))).to(dtype).eval()
        self.model.load_state_dict(weights)
        names = [name for name, _ in self.model.named_parameters()]
        assert all(name.endswith(DECAYED) != name.endswith(CONSTANT) for name in names)
        settings = run.optimizer
        groups = [
            {
                "params": [tensor for name, tensor in self.model.named_parameters() if name.endswith(ends)],
                "weight_decay": decay,
            }
            for ends, decay in ((DECAYED, settings.weight_decay), (CONSTANT, 0.0))
        ]
        betas = settings.beta1, settings.beta2
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=settings.epsilon)

    def weights(self) -> Weights:
        """The weights as they are now."""
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}

    def total_loss(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, int]:
        """Cross entropy summed over the labels that count, and their number."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        whole = [sample for sample in samples if not sample.begins]
        parts = [(torch.stack([s.tokens for s in whole]), torch.stack([s.counts for s in whole]))] if whole else []
        for sample in samples:
            if sample.begins:
                edges = [0, *(begin for begin in sample.begins if begin < len(sample.counts)), len(sample.counts)]
                for first, last in pairwise(edges):
                    parts.append((sample.tokens[None, first : last + 1], sample.counts[None, first:last]))
        for tokens, counts in parts:
            logits = self.model(tokens[:, :-1], use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            total = total + losses[counts.flatten()].sum()
            count += int(counts.sum())
        return total, count

    def evaluate(self, samples: Sequence[Sample]) -> tuple[float, int]:
        """Mean loss over the labels that count, and their number."""
        with torch.no_grad():
            total, count = self.total_loss(samples)
        return float(total) / count, count

    def gradients(self, samples: Sequence[Sample]) -> tuple[float, int, Weights]:
        """Loss, labels and gradients, before clipping."""
        self.optimizer.zero_grad()
        total, count = self.total_loss(samples)
        (total / count).backward()
        grads = {name: tensor.grad for name, tensor in self.model.named_parameters() if tensor.grad is not None}
        assert len(grads) == len(list(self.model.parameters()))
        return float(total.detach()) / count, count, grads

    def step(self, samples: Sequence[Sample]) -> Step:
        """Train on one global batch."""
        loss, count, grads = self.gradients(samples)
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
        clip = self.run.optimizer.clip_grad
        if clip and clip / (norm + 1e-6) < 1:
            for grad in grads.values():
                grad.mul_(clip / (norm + 1e-6))
        self.steps_done += 1
        lr = learning_rate(self.steps_done, self.run.optimizer, self.run.training.train_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return Step(loss, norm, lr, count)


def movement_errors(ours: Weights, theirs: Weights, before: Weights, rounding: float = 0.0) -> dict[str, float]:
    """For each tensor how far off it is, relative to how far it should have moved from ``before``.

    Args:
        ours: what is checked.
        theirs: the oracle's.
        before: from where both began.
        rounding: relative error that ``ours`` may have beside, because of the type it is stored in.
    """
    assert ours.keys() == theirs.keys() == before.keys()
    return {
        name: max(0.0, float((ours[name].double() - expected).norm() - rounding * expected.norm()))
        / float((expected - before[name].double()).norm())
        for name, expected in theirs.items()
    }
