"""One optimizer step under any layout: megatron-core's DDP, schedules and distributed optimizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from steel_megatron.config import RunConfig
from steel_megatron.config.megatron import OPTIMIZER_FIELDS
from steel_megatron.errors import ConfigError, TrainingError
from steel_megatron.model.megatron_fields import with_further_fields
from steel_megatron.model.spec import DTYPES, build_chunks
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.bad_steps import BadSteps, agreed
from steel_megatron.train.diagnosis import where_backward_fails, where_forward_fails
from steel_megatron.train.objective import Term
from steel_megatron.train.objective.base import objective_of
from steel_megatron.train.optimizer_state import OptimizerState, allocate_state

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
    """

    step: int
    terms: dict[str, Term]
    grad_norm: float
    lr: float
    skipped: str | None = None

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
        before_update: called before anything changes weights or the optimizer's state, which a save may be copying.
        chunks: this process's parts of the model, in the order of their layers: one, or several under the interleaved
            schedule.
        models: the same, each with its gradients.
    """

    def __init__(self, run: RunConfig, topology: Topology, stage: GPTModel | None = None) -> None:
        self.run, self.topology = run, topology
        self.groups = topology.groups
        self.chunks = (
            [stage] if stage else build_chunks(run.model, topology, run.training.precision, seed=run.training.seed)
        )
        self.config = self.chunks[0].config
        self.objective = objective_of(run).build(run, topology, self.chunks[0])
        self.step_number = 0
        self.before_update: Callable[[], None] = lambda: None
        self.bad_steps = BadSteps(run.training)
        self.models = [
            DistributedDataParallel(
                config=self.config,
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=topology.device.type == "cuda",
                ),
                module=chunk,
                pg_collection=self.groups,
            )
            for chunk in self.chunks
        ]
        self.optimizer = self._optimizer()
        self.scheduler = self._scheduler()
        self.config.finalize_model_grads_func = finalize_model_grads
        no_syncs = [model.no_sync for model in self.models]
        self.config.no_sync_func = no_syncs if topology.parallel.interleaved else no_syncs[0]
        self.config.grad_scale_func = None

    @property
    def stage(self) -> GPTModel:
        """This process's only part of the model.

        Raises:
            ConfigError: it has several.
        """
        if len(self.chunks) > 1:
            raise ConfigError(
                f"each process has {len(self.chunks)} model chunks (parallel.virtual_pipeline_model_parallel_size): "
                "use chunks, not stage or model, which only a process with a single one has"
            )
        return self.chunks[0]

    def _optimizer(self) -> MegatronOptimizer:
        settings = self.run.optimizer
        dtype = DTYPES[self.run.training.precision]
        own = {
            "optimizer": "adam",
            "lr": settings.lr,
            "min_lr": settings.min_lr,
            "weight_decay": settings.weight_decay,
            "adam_beta1": settings.beta1,
            "adam_beta2": settings.beta2,
            "adam_eps": settings.epsilon,
            "clip_grad": settings.clip_grad,
            "bf16": dtype is torch.bfloat16,
            "params_dtype": dtype,
            "use_distributed_optimizer": True,
        }
        config = with_further_fields(
            MegatronOptimizerConfig, own, settings.megatron, "optimizer.megatron", OPTIMIZER_FIELDS
        )
        optimizer = get_megatron_optimizer(config, self.models)
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
        self.optimizer.prepare_grads()
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
            self.optimizer.step()
        self.step_number = step
        return StepResult(step=step, terms=terms, grad_norm=norm, lr=lr, skipped=skipped)

    def _where_it_fails(self, batches: Sequence[Any], loss: float, norm: float) -> str:
        """What the model says of numbers that are wrong on all processes."""
        if not math.isfinite(loss):
            where = where_forward_fails(self.chunks, lambda: self.evaluate(batches))
            return f"The first number that is not finite: {where}"
        if not math.isfinite(norm):
            return f"Nearest to the loss: {where_backward_fails(self.chunks)}"
        return "All numbers are finite"

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
                self.chunks[0].dropout.set(self.run.training.seed, step, first)
                yield batch

        reports = get_forward_backward_func()(
            forward_step_func=self.objective.forward_step,
            data_iterator=[read() for _ in self.chunks] if topology.parallel.interleaved else read(),
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
