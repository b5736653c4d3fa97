"""One optimizer step under any layout: megatron-core's DDP, schedules and distributed optimizer, put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from steel_megatron.config import RunConfig
from steel_megatron.errors import TrainingError
from steel_megatron.model.spec import DTYPES, build_model
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.diagnosis import where_backward_fails, where_forward_fails
from steel_megatron.train.objective import Batch, NextToken, infer_shape
from steel_megatron.train.optimizer_state import OptimizerState, allocate_state, load_state


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        step: number of the step, from 1.
        loss: mean over the labels of the global batch, in nats per token.
        grad_norm: global norm of the gradient, before clipping.
        lr: learning rate that the step used.
        tokens: labels that counted.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int


class Engine:
    """The model, its gradients, its optimizer and its schedule on this process.

    Args:
        run: the run's settings.
        topology: the process groups.
        stage: this process's part of the model; None builds it with the run's seed.
    """

    def __init__(self, run: RunConfig, topology: Topology, stage: GPTModel | None = None) -> None:
        self.run, self.topology = run, topology
        self.groups = topology.groups
        self.stage = stage or build_model(run.model, topology, run.training.precision, seed=run.training.seed)
        self.config = self.stage.config
        self.objective = NextToken(run.model.vocab_size, self.groups, self.stage.documents)
        self.step_number = 0
        self.model = DistributedDataParallel(
            config=self.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=topology.device.type == "cuda",
            ),
            module=self.stage,
            pg_collection=self.groups,
        )
        self.optimizer = self._optimizer()
        self.scheduler = self._scheduler()
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.no_sync_func = self.model.no_sync
        self.config.grad_scale_func = None

    def _optimizer(self) -> MegatronOptimizer:
        settings = self.run.optimizer
        dtype = DTYPES[self.run.training.precision]
        optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.epsilon,
                clip_grad=settings.clip_grad,
                bf16=dtype is torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
            ),
            [self.model],
        )
        allocate_state(optimizer)
        return optimizer

    def _scheduler(self) -> OptimizerParamScheduler:
        settings = self.run.optimizer
        # One unit is one step. The course ends at decay_steps, wherever the run stops.
        end = self.run.training.train_steps if settings.decay_steps is None else settings.decay_steps
        decay_steps = max(end, settings.warmup_steps + 1)
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=decay_steps,
            lr_decay_style="cosine",
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=decay_steps,
            wd_incr_style="constant",
        )

    def accumulate_gradients(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Forward and backward over this process's micro batches; gradients end up reduced and averaged.

        Returns:
            mean loss of the global batch in nats per token, and the number of labels that counted.
        """
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, forward_only=False)

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """Train on one global batch.

        Args:
            batches: this process's micro batches.

        Raises:
            TrainingError: the loss or the gradient is not finite. No weight has been changed.
        """
        loss, tokens = self.accumulate_gradients(batches)
        step = self.step_number + 1
        if not math.isfinite(loss):
            where = where_forward_fails(self.stage, lambda: self.evaluate(batches))
            raise TrainingError(
                f"step {step}: the loss is {loss}; stopped before the update, nothing was changed. The first number "
                f"that is not finite: {where}"
            )
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {step}: the gradient's norm is {norm} at a loss of {loss:.4f}; stopped before the update, "
                f"nothing was changed. Nearest to the loss: {where_backward_fails(self.stage)}"
            )
        self.scheduler.step(increment=1)  # so that step n uses the rate of step n, not of step n - 1
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.optimizer.step()
        self.step_number = step
        return StepResult(step=step, loss=loss, grad_norm=norm, lr=lr, tokens=tokens)

    def resume_at(self, step: int, optimizer_state: OptimizerState) -> None:
        """Go on after ``step`` steps, with the optimizer state that a checkpoint held."""
        load_state(self.optimizer, optimizer_state, step)
        self.step_number = step
        self.scheduler.num_steps = step
        self.scheduler.step(increment=0)

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Mean loss over the global batch of all processes' micro batches, and the labels that counted."""
        self.model.eval()
        with torch.no_grad():
            return self._run(batches, forward_only=True)

    def _run(self, batches: Sequence[Batch], *, forward_only: bool) -> tuple[float, int]:
        reports = get_forward_backward_func()(
            forward_step_func=self.objective.forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            forward_only=forward_only,
            **infer_shape(batches[0], self.config.context_parallel_size),
        )
        # Only the last stage has reports; the others add nothing.
        device = self.topology.device
        totals = torch.stack(reports).sum(0) if reports else torch.zeros(2, dtype=torch.float64, device=device)
        dist.all_reduce(totals, group=self.groups.dp_cp)
        dist.all_reduce(totals, group=self.groups.pp)
        total, count = totals.tolist()
        return total / max(count, 1), int(count)
