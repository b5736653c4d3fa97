"""What happens beside training: metrics for people and TensorBoard, and the wish to stop."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType

import psutil
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import _get_write_results_queue
from torch.utils.tensorboard import SummaryWriter

from steel_megatron.config import RunConfig
from steel_megatron.errors import TrainingError
from steel_megatron.files import disk_errors
from steel_megatron.log import get_logger
from steel_megatron.model.causality import audit_model, stage_outputs
from steel_megatron.model.flops import training_flops_per_token
from steel_megatron.parallel.topology import Topology
from steel_megatron.platform import probe
from steel_megatron.train.engine import Engine, StepResult

logger = get_logger(__name__)
GIB = 2**30


class Metrics:
    """Writes every step to TensorBoard and some of them to the log, on the first process.

    Args:
        run: the run's settings.
        topology: the process groups.
        engine: the run's engine, at the step from which training goes on.
    """

    def __init__(self, run: RunConfig, topology: Topology, engine: Engine) -> None:
        self._run, self._device = run, topology.device
        peak = probe().peak_flops
        self._peak_flops = peak * topology.launch.world_size if peak else None
        self._flops_per_token = training_flops_per_token(run.model)
        self._loss_name = run.model.loss_name
        self._last_time = time.monotonic()
        self._speaks = topology.is_first_process
        self._writer = None
        if self._speaks:
            # Scalars of steps that a killed run did after its last checkpoint are dropped: they come again.
            with disk_errors("write", run.tensorboard_dir, TrainingError):
                self._writer = SummaryWriter(str(run.tensorboard_dir), purge_step=engine.step_number + 1)
            logger.info(
                f"training {topology.describe()}, {run.training.precision}, {run.training.global_batch_size} sequences "
                f"of {run.model.sequence_length} tokens a step, {run.training.train_steps} steps"
            )
            if not run.model.causal:
                logger.warning(
                    f"routing_mode {run.model.routing_mode} is not causal: tokens see later ones through the slots "
                    f"({_leak(run, topology, engine)}), so this loss is not a language model's loss and is reported as "
                    f"'{run.model.loss_name}'"
                )

    def record(self, result: StepResult) -> None:
        """Take note of a step that has just been done."""
        if not self._speaks:
            return
        now = time.monotonic()
        tokens_per_second = result.tokens / (now - self._last_time)
        self._last_time = now
        scalars = {
            f"train/{self._loss_name}": result.loss,
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
            "speed/tokens_per_second": tokens_per_second,
            "memory/gib": self._memory(),
        }
        if self._peak_flops:
            scalars["speed/mfu"] = tokens_per_second * self._flops_per_token / self._peak_flops
        self._write(scalars, result.step)
        if result.step % self._run.training.log_interval == 0 or result.step == self._run.training.train_steps:
            mfu = f"  MFU {scalars['speed/mfu']:.1%}" if "speed/mfu" in scalars else ""
            logger.info(
                f"step {result.step:>6} of {self._run.training.train_steps}  {self._loss_name} {result.loss:.4f}  "
                f"lr {result.lr:.2e}  grad norm {result.grad_norm:.3f}  {tokens_per_second:,.0f} tokens/s{mfu}"
            )

    def record_validation(self, step: int, loss: float) -> None:
        """Take note of a validation; its time does not count as training's."""
        if self._speaks:
            self._write({f"validation/{self._loss_name}": loss}, step)
            logger.info(f"step {step:>6} validation {self._loss_name} {loss:.4f}")
        self.restart_clock()

    def restart_clock(self) -> None:
        """The time until now, of a checkpoint or a validation, does not count as the next step's."""
        self._last_time = time.monotonic()

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        """Curves are not worth a run: when they cannot be written, training goes on without, and is logged on."""
        if self._writer is None:
            return
        try:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            logger.warning(f"no more TensorBoard scalars from step {step} on: {error}")
            self._writer = None

    def _memory(self) -> float:
        """GiB: the device's peak, or this process's resident set where the device is the CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GIB
        return psutil.Process().memory_info().rss / GIB


def _leak(run: RunConfig, topology: Topology, engine: Engine) -> str:
    """What a short audit of the model measures as it stands; only where this process holds all of it."""
    cut = run.parallel
    degrees = (cut.tensor_model_parallel_size, cut.pipeline_model_parallel_size, cut.expert_model_parallel_size)
    if max(*degrees, cut.context_parallel_size) > 1 or run.model.sequence_length < 2:
        return "by its settings; `steel-megatron audit CHECKPOINT` measures it"
    found = audit_model(
        stage_outputs(engine.stage, run.model.vocab_size),
        vocab_size=run.model.vocab_size,
        length=min(run.model.sequence_length, 32),
        texts=1,
        device=topology.device,
    )
    return f"measured with the weights it starts from: {found.figure}"


class StopSignal:
    """Notices SIGTERM and SIGUSR1, with which schedulers announce that they will end a job.

    Attributes:
        received: whether one has come. A second one acts as it would without this.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        # megatron-core writes checkpoints through a helper process that lives on after the first. Launchers signal the
        # whole process group: the helper must be started so that it ignores what this process acts on.
        self._before = {number: signal.signal(number, signal.SIG_IGN) for number in self.SIGNALS}
        _get_write_results_queue()
        for number in self.SIGNALS:
            signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
