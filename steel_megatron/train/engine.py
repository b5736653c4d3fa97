"""One optimizer step under any layout: megatron-core's DDP, schedules and distributed optimizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from steel_megatron.config import RunConfig
from steel_megatron.config.megatron import LOSS_SCALE_FIELDS, OPTIMIZER_FIELDS
from steel_megatron.errors import ConfigError, TrainingError
from steel_megatron.model.megatron_fields import with_further_fields
from steel_megatron.model.spec import DTYPES, build_chunks
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.bad_steps import BadSteps, agreed
from steel_megatron.train.checkpoint_info import Base
from steel_megatron.train.data_parallel import Replicated
from steel_megatron.train.diagnosis import where_backward_fails, where_forward_fails
from steel_megatron.train.fully_sharded import FullySharded, reduce_over_all_ranks
from steel_megatron.train.loss_scale import LossScale, first_loss_scale
from steel_megatron.train.objective import Term
from steel_megatron.train.objective.base import objective_of
from steel_megatron.train.optimizer_state import OptimizerState, allocate_state
from steel_megatron.train.update import fuse, update

_DECAY_STYLES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "wsd": "WSD",
    "inverse_sqrt": "inverse-square-root",
}
"""What megatron-core calls the schedules."""


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        step: number of the step, from 1.
        terms: what the objective reports, over the global batch. The first is what was minimised.
        grad_norm: global norm of the gradient, before clipping.
        lr: learning rate that the step used.
        skipped: why nothing was updated; None if weights were.
        loss_scale: what the loss was multiplied by before the backward pass; None unless in float16.
    """

    step: int
    terms: dict[str, Term]
    grad_norm: float
    lr: float
    skipped: str | None = None
    loss_scale: float | None = None

    @property
    def loss(self) -> float:
        """What was minimised: for next tokens, the mean over the labels of the global batch, in nats per token."""
        return minimised(self.terms).mean

    @property
    def tokens(self) -> int:
        """How many labels counted."""
        return minimised(self.terms).items


def minimised(terms: dict[str, Term]) -> Term:
    """The term that an objective minimises."""
    return next(iter(terms.values()))


class Engine:
    """The model, its gradients, its optimizer and its schedule on this process.

    Args:
        run: the run's settings.
        topology: the process groups.
        stage: this process's part of the model; None builds it with the run's seed.

    Attributes:
        base: the checkpoint whose weights its adapters adapt, once they are loaded; None without adapters.
        before_update: called before anything changes weights or the optimizer's state, which a save may be copying.
        models: what :attr:`chunks` are, each with its gradients.
    """

    def __init__(self, run: RunConfig, topology: Topology, stage: GPTModel | None = None) -> None:
        self.run, self.topology = run, topology
        self.groups = topology.groups
        training = run.training
        self._chunks = (
            [stage]
            if stage
            else build_chunks(
                run.model, topology, training.precision, seed=training.seed, fp8=training.fp8, lora=run.lora
            )
        )
        self.config = self._chunks[0].config
        self.objective = objective_of(run).build(run, topology, self._chunks[0])
        self.step_number = 0
        self.before_update: Callable[[], None] = lambda: None
        self.base: Base | None = None
        kind = FullySharded if topology.parallel.fsdp else Replicated
        self.models: list[Replicated | FullySharded] = [kind(chunk, topology) for chunk in self._chunks]
        self.optimizer = self._optimizer()
        self.loss_scale = LossScale(self.optimizer) if run.training.precision == "float16" else None
        self.bad_steps = BadSteps(run.training, self.loss_scale)
        self.scheduler = self._scheduler()
        self.config.finalize_model_grads_func = finalize_model_grads
        no_syncs = [model.no_sync for model in self.models]
        self.config.no_sync_func = no_syncs if topology.parallel.interleaved else no_syncs[0]
        self.config.grad_scale_func = self.optimizer.scale_loss if self.loss_scale else None

    @property
    def chunks(self) -> list[GPTModel]:
        """This process's parts of the model, in the order of their layers, with the weights of the last step: one, or
        several under the interleaved schedule."""
        for model in self.models:
            model.wait_for_weights()
        return self._chunks

    @property
    def stage(self) -> GPTModel:
        """This process's only part of the model.

        Raises:
            ConfigError: it has several.
        """
        if len(self._chunks) > 1:
            raise ConfigError(
                f"each process has {len(self._chunks)} model chunks (parallel.virtual_pipeline_model_parallel_size): "
                "use chunks, not stage or model, which only a process with a single one has"
            )
        return self.chunks[0]

    def _optimizer(self) -> MegatronOptimizer:
        settings = self.run.optimizer
        sharded = self.topology.parallel.fsdp
        precision = self.run.training.precision
        in_float16 = precision == "float16"
        labels = self.run.training.micro_batch_size * self.run.model.sequence_length
        own = {
            "optimizer": "adam",
            "lr": settings.lr,
            "min_lr": settings.min_lr,
            "weight_decay": settings.weight_decay,
            "adam_beta1": settings.beta1,
            "adam_beta2": settings.beta2,
            "adam_eps": settings.epsilon,
            "clip_grad": settings.clip_grad,
            "bf16": precision == "bfloat16" and not sharded,  # shards are in float32, and need no copies
            "fp16": in_float16,
            "params_dtype": torch.float32 if sharded else DTYPES[precision],
            "use_distributed_optimizer": not sharded,
        }
        config = with_further_fields(
            MegatronOptimizerConfig,
            own,
            {**(first_loss_scale(labels) if in_float16 else {}), **settings.megatron},
            "optimizer.megatron",
            OPTIMIZER_FIELDS + (LOSS_SCALE_FIELDS if in_float16 else ()),
        )
        optimizer = get_megatron_optimizer(config, self.models)
        if sharded:
            reduce_over_all_ranks(optimizer)
        fuse(optimizer)
        allocate_state(optimizer)
        return optimizer

    def _scheduler(self) -> OptimizerParamScheduler:
        settings, decay_steps = self.run.optimizer, self.run.decay_steps
        # One unit is one step.
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=decay_steps,
            lr_decay_style=_DECAY_STYLES[settings.lr_schedule],
            wsd_decay_steps=self.run.wsd_decay_steps,
            lr_wsd_decay_style=settings.wsd_decay_style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=decay_steps,
            wd_incr_style="constant",
        )

    def accumulate_gradients(self, batches: Sequence[Any]) -> dict[str, Term]:
        """Forward and backward over this process's micro batches; gradients end up reduced and averaged.

        Returns:
            the objective's terms over the global batch.
        """
        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, forward_only=False)

    def step(self, batches: Sequence[Any]) -> StepResult:
        """Train on one global batch.

        Args:
            batches: this process's micro batches.

        Raises:
            TrainingError: more steps in a row are bad than may be skipped. No weight has been changed.
        """
        terms = self.accumulate_gradients(batches)
        step = self.step_number + 1
        overflow = self.optimizer.prepare_grads()
        loss, norm = agreed(minimised(terms).mean, float(self.optimizer.get_grad_norm()))
        skipped = self.bad_steps.why_skip(step, loss, norm, minimised(terms).items)
        if (limit := self.bad_steps.too_many) is not None:
            raise TrainingError(
                f"step {step}: {skipped}; stopped before the update, nothing was changed ({limit}). "
                + self._where_it_fails(batches, loss, norm)
            )
        self.scheduler.step(increment=1)  # so that step n uses the rate of step n, not of step n - 1
        lr = max(group["lr"] for group in self.optimizer.param_groups if group["default_config"])  # not decoupled_lr
        if skipped is None:
            self.before_update()
            update(self.optimizer, norm)
        for model in self.models:
            model.begin_to_gather()
        scale = None
        if self.loss_scale is not None:
            scale = self.loss_scale.value
            self.loss_scale.adapt(overflow)
        self.step_number = step
        return StepResult(step=step, terms=terms, grad_norm=norm, lr=lr, skipped=skipped, loss_scale=scale)

    def _where_it_fails(self, batches: Sequence[Any], loss: float, norm: float) -> str:
        """What the model says of numbers that are wrong on all processes."""
        if not math.isfinite(loss):
            where = where_forward_fails(self.chunks, self._weights, lambda: self.evaluate(batches))
            return f"The first number that is not finite: {where}"
        if not math.isfinite(norm):
            return f"Nearest to the loss: {where_backward_fails(self.chunks, self._weights)}"
        return "All numbers are finite"

    @property
    def _weights(self) -> list[dict[str, torch.nn.Parameter]]:
        """What this process holds of each chunk's weights, by their names in the chunk."""
        return [
            {name.removeprefix("module."): weight for name, weight in model.named_parameters()} for model in self.models
        ]

    def resume_at(self, step: int, optimizer_state: OptimizerState) -> None:
        """Resume after ``step`` steps, with an optimizer state that was filled from a checkpoint."""
        optimizer_state.loaded(step - self.bad_steps.skipped)
        self.step_number = step
        self.scheduler.num_steps = step
        self.scheduler.step(increment=0)

    def evaluate(self, batches: Sequence[Any]) -> dict[str, Term]:
        """The objective's terms over all processes' micro batches, without training on them."""
        for model in self.models:
            model.eval()
        with torch.no_grad():
            return self._run(batches, forward_only=True)

    def _run(self, batches: Sequence[Any], *, forward_only: bool) -> dict[str, Term]:
        sizes, step = self.objective.sizes(batches[0]), self.step_number + 1
        size, topology = sizes["micro_batch_size"], self.topology
        apart = size * topology.data_parallel_size

        def read() -> Iterator[Any]:
            """The micro batches, for one chunk; each sets the dropout of its forward pass."""
            firsts = itertools.count(size * topology.data_parallel_rank, apart)  # of micro batches in the global batch
            for batch, first in zip(batches, firsts, strict=False):
                self._chunks[0].dropout.set(self.run.training.seed, step, first)
                yield batch

        reports = get_forward_backward_func()(
            forward_step_func=self.objective.forward_step,
            data_iterator=[read() for _ in self._chunks] if topology.parallel.interleaved else read(),
            model=self.models,
            num_microbatches=len(batches),
            forward_only=forward_only,
            **sizes,
        )
        # Only the last stage has reports; the others add nothing.
        names, device = self.objective.terms, self.topology.device
        totals = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
        if reports:
            totals += torch.stack(reports).sum(0)
        dist.all_reduce(totals, group=self.groups.dp_cp)
        dist.all_reduce(totals, group=self.groups.pp)
        sums = zip(names, totals.tolist(), strict=True)
        return {name: Term(total / max(count, 1), int(count)) for name, (total, count) in sums}
