"""Steps, batches and what happens between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from steel_megatron.config.checks import at_least, one_of, typed
from steel_megatron.errors import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]
Fp8 = Literal["e4m3", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Steps, batches and what happens between them."""

    objective: str = "next_token"
    """What is minimised."""
    label_smoothing: float = 0.0
    """Share of each label's probability that is spread evenly over the vocabulary, in [0, 1); validation has none."""
    train_steps: int = 100
    """Optimizer steps of the whole run."""
    stop_after_step: int | None = None
    """Save and leave after this step, as a preempted job would; the schedule still spans train_steps."""
    micro_batch_size: int = 1
    """Sequences that one data-parallel process computes at a time."""
    global_batch_size: int = 8
    """Sequences of one optimizer step, over all processes."""
    precision: Precision = "float32"
    """Type of weights and activations (float16 with a dynamic loss scale); optimizer state is always float32."""
    fp8: Fp8 | None = None
    """Format of matrix products in FP8: e4m3, or hybrid (gradients in e5m2); it needs bfloat16, transformer-engine and
    a GPU. None for no FP8."""
    seed: int = 1234
    """Seed of the initial weights and of the order of samples."""
    log_interval: int = 10
    """Steps between two lines of the log; TensorBoard gets every step."""
    eval_interval: int = 100
    """Steps between two validations; the last step is always validated."""
    eval_steps: int = 10
    """Global batches of one validation of each corpus, at most."""
    skip_non_finite_steps: int = 0
    """Steps in a row that are skipped if their loss or gradient is not finite; one more ends the run. 0 ends it at the
    first."""
    skip_spikes: float | None = None
    """Skip a step whose loss or gradient norm is more than this many standard deviations over the mean of the last
    spike_window accepted steps; none skips no spikes."""
    spike_window: int = 128
    """Accepted steps that skip_spikes compares with; before there are as many, no step counts as a spike."""
    skip_spikes_in_a_row: int = 8
    """Spikes in a row that are skipped; one more ends the run."""
    routing_metrics_interval: int | None = None
    """Steps between two measurements of the routing (entropies, loads, slot similarity) for TensorBoard; none for no
    measurement."""
    watchdog_seconds: float | None = 600.0
    """End the run when a process gives no sign of life, or none of them gets any further, for this long; the stacks of
    all are written to stacks/ first. None waits for ever."""

    def __post_init__(self) -> None:
        typed(self)
        one_of(get_args(Precision), self, "precision")
        if self.fp8 is not None:
            one_of(get_args(Fp8), self, "fp8")
            if self.precision != "bfloat16":
                raise ConfigError(
                    f"TrainingConfig.fp8 is {self.fp8} with precision = {self.precision}; what is not in FP8 is in "
                    "bfloat16 then: set precision to bfloat16"
                )
        at_least(1, self, "train_steps", "stop_after_step", "micro_batch_size", "global_batch_size")
        at_least(1, self, "log_interval", "eval_interval", "eval_steps", "routing_metrics_interval")
        at_least(1, self, "watchdog_seconds")
        at_least(0, self, "seed", "skip_non_finite_steps", "skip_spikes", "skip_spikes_in_a_row")
        at_least(2, self, "spike_window")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"TrainingConfig.label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if self.stop_after_step is not None and self.stop_after_step > self.train_steps:
            raise ConfigError(
                f"TrainingConfig.stop_after_step = {self.stop_after_step} is over train_steps = {self.train_steps}"
            )

    @property
    def last_step(self) -> int:
        """The step after which this launch leaves."""
        return self.stop_after_step or self.train_steps
