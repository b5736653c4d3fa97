"""Metrics for people and for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter

from steel_megatron.errors import TrainingError
from steel_megatron.files import disk_errors
from steel_megatron.log import get_logger
from steel_megatron.model.causality import audit_model, stage_outputs
from steel_megatron.model.flops import training_flops_per_token
from steel_megatron.platform import probe
from steel_megatron.train.callbacks.base import Callback, RunView
from steel_megatron.train.engine import StepResult, minimised

logger = get_logger(__name__)
GIB = 2**30


class TensorBoard(Callback):
    """The run's TensorBoard log, on rank 0. Curves are not worth a run: when they cannot be written, it trains on.

    Args:
        first: whether it is the first of the run's writers to start; the others must drop nothing.
    """

    def __init__(self, first: bool = True) -> None:
        self._first = first
        self._writer: SummaryWriter | None = None

    def start(self, run: RunView) -> None:
        """Begin to write. Scalars of steps that a killed run did after its last checkpoint are dropped:
        they come again.

        Raises:
            TrainingError: the log's folder cannot be made or written to.
        """
        if run.is_rank0:
            folder = run.config.tensorboard_dir
            with disk_errors("write", folder, TrainingError):
                self._writer = SummaryWriter(str(folder), purge_step=run.step + 1 if self._first else None)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write scalars of a step."""
        if self._writer is None:
            return
        try:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            logger.warning(f"no more TensorBoard scalars from step {step} on: {error}")
            self._writer = None

    def stop(self, run: RunView) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


class Metrics(Callback):
    """Writes every step to TensorBoard and some of them to the log, on rank 0.

    Args:
        tensorboard: the run's TensorBoard log.
    """

    def __init__(self, tensorboard: TensorBoard) -> None:
        self._tensorboard = tensorboard
        self._last_time = 0.0

    def start(self, run: RunView) -> None:
        """Say what is trained, and that a mode is not causal."""
        self._restart_clock()
        if not run.is_rank0:
            return
        self._flops_per_token = training_flops_per_token(run.config.model)
        training = run.config.training
        logger.info(
            f"training {run.topology.describe()}, {training.precision}, {training.global_batch_size} sequences "
            f"of {run.config.model.sequence_length} tokens a step, {training.train_steps} steps"
        )
        model = run.config.model
        if not model.causal:
            logger.warning(
                f"routing_mode {model.routing_mode} is not causal: tokens see later ones through the slots "
                f"({_leak(run)}), so this loss is not a language model's loss and is reported as '{model.loss_name}'"
            )

    def after_step(self, run: RunView, result: StepResult) -> None:
        """Take note of a step that has just been done."""
        if not run.is_rank0:
            return
        seconds = time.monotonic() - self._last_time
        settings, items = run.config, getattr(run.engine.objective, "items", "tokens")
        tokens_per_second = settings.training.global_batch_size * settings.model.sequence_length / seconds
        scalars = {f"train/{name}": term.mean for name, term in result.terms.items()} | {
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
            "speed/tokens_per_second": tokens_per_second,
            "memory/gib": _memory(run.topology.device),
        }
        if result.loss_scale is not None:
            scalars["train/loss_scale"] = result.loss_scale
        if peak := probe().peak_flops:
            peak *= run.topology.launch.world_size
            scalars["speed/mfu"] = tokens_per_second * self._flops_per_token / peak
        own = ""
        if items != "tokens":  # such as labels, which are some of the tokens
            per_second = scalars[f"speed/{items}_per_second"] = minimised(result.terms).items / seconds
            own = f" ({per_second:,.1f} {items}/s)"
        self._tensorboard.write(scalars, result.step)
        training = settings.training
        if result.step % training.log_interval == 0 or result.step == training.train_steps:
            mfu = f"  MFU {scalars['speed/mfu']:.1%}" if "speed/mfu" in scalars else ""
            terms = "  ".join(f"{name} {term.mean:.4f}" for name, term in result.terms.items())
            logger.info(
                f"step {result.step:>6} of {training.train_steps}  {terms}  "
                f"lr {result.lr:.2e}  grad norm {result.grad_norm:.3f}  {tokens_per_second:,.0f} tokens/s{own}{mfu}"
            )
        self._restart_clock()

    def after_validation(self, run: RunView, losses: Mapping[str, float]) -> None:
        """Take note of a validation; its time does not count as training's."""
        if run.is_rank0:
            name = run.engine.objective.terms[0]
            for validation_set, loss in losses.items():
                label = f"{validation_set}/{name}" if validation_set else name
                self._tensorboard.write({f"validation/{label}": loss}, run.step)
                logger.info(f"step {run.step:>6} validation {label} {loss:.4f}")
        self._restart_clock()

    def after_save(self, run: RunView, path: Path) -> None:
        """The time of a save does not count as training's."""
        logger.info(f"saved {path}")
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._last_time = time.monotonic()


def _memory(device: torch.device) -> float:
    """GiB: the device's peak, or this process's resident set where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return psutil.Process().memory_info().rss / GIB


def _leak(run: RunView) -> str:
    """The figures of a short audit of the current model; only on a process that holds the whole model."""
    cut, model = run.config.parallel, run.config.model
    degrees = (cut.tensor_model_parallel_size, cut.pipeline_model_parallel_size, cut.expert_model_parallel_size)
    if max(*degrees, cut.context_parallel_size, cut.expert_tensor_size) > 1 or cut.fsdp or model.sequence_length < 2:
        return "by its settings; `steel-megatron audit CHECKPOINT` measures it"
    found = audit_model(
        stage_outputs(run.model, model.vocab_size),
        vocab_size=model.vocab_size,
        length=min(model.sequence_length, 32),
        texts=1,
        device=run.topology.device,
    )
    return f"measured with the weights it starts from: {found.figure}"
