"""Settings of a run that are allowed, but can hardly be meant; each is told in one line when the run starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from steel_megatron.config.execution import ExecutionConfig
from steel_megatron.config.preprocess import PreprocessConfig
from steel_megatron.config.run import RunConfig


def doubts(run: RunConfig) -> list[str]:
    """What makes no sense in a run's settings, a line each."""
    return [*_schedule(run), *_intervals(run), *_without_effect(run), *_data(run), *_start(run)]


def job_doubts(job: ExecutionConfig) -> list[str]:
    """The same for a clean or preprocess job."""
    found = []
    if job.executor != "slurm":
        names = [field.name for field in dataclasses.fields(job) if field.name.startswith("slurm_")]
        found = [f"{name} has no effect: executor is {job.executor}" for name in names if _is_set(job, name)]
    if isinstance(job, PreprocessConfig) and not job.valid_fraction and _is_set(job, "seed"):
        found.append("seed has no effect: it splits off validation documents, and valid_fraction is 0")
    return found


def _schedule(run: RunConfig) -> Iterator[str]:
    optimizer, steps = run.optimizer, run.training.train_steps
    if optimizer.lr == 0:
        yield "optimizer.lr is 0, so no step changes the weights"
    elif optimizer.warmup_steps > steps:
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps} is over training.train_steps = {steps}, so the "
            f"learning rate ends at {steps / optimizer.warmup_steps:.0%} of optimizer.lr"
        )
    if optimizer.decay_steps is not None and optimizer.decay_steps <= optimizer.warmup_steps:
        yield (
            f"optimizer.decay_steps = {optimizer.decay_steps} is not over optimizer.warmup_steps = "
            f"{optimizer.warmup_steps}, so the decay ends right after the warm-up"
        )


def _intervals(run: RunConfig) -> Iterator[str]:
    training, steps = run.training, run.training.train_steps
    asked = [name for name in ("log_interval", "eval_interval") if _is_set(training, name)]
    if not run.data.validation_sets:
        asked = [name for name in asked if name != "eval_interval"]
    for name in asked:
        if getattr(training, name) > steps:
            what = "a line is logged" if name == "log_interval" else "the run is validated"
            value = getattr(training, name)
            yield f"training.{name} = {value} is over train_steps = {steps}, so {what} only at the end"
    if training.routing_metrics_interval is not None and training.routing_metrics_interval > steps:
        yield (
            f"training.routing_metrics_interval = {training.routing_metrics_interval} is over train_steps = {steps}, "
            "so the routing is never measured"
        )
    if run.checkpoint.save_interval > steps:
        yield (
            f"checkpoint.save_interval = {run.checkpoint.save_interval} is over training.train_steps = {steps}, so the "
            "run is saved only at its end"
        )
    if training.skip_spikes is not None and training.spike_window >= steps:
        yield (
            f"training.spike_window = {training.spike_window} is not below train_steps = {steps}, so skip_spikes never "
            "skips a step"
        )


def _without_effect(run: RunConfig) -> Iterator[str]:
    """Settings of something that is off."""
    optimizer, training = run.optimizer, run.training
    if optimizer.lr_schedule != "wsd":
        for name in ("wsd_decay_steps", "wsd_decay_style"):
            if _is_set(optimizer, name):
                yield f"optimizer.{name} has no effect: lr_schedule is {optimizer.lr_schedule}, not wsd"
    if optimizer.lr_schedule == "constant" and optimizer.min_lr:
        yield f"optimizer.min_lr = {optimizer.min_lr} has no effect: lr_schedule is constant"
    if training.skip_spikes is None:
        for name in ("spike_window", "skip_spikes_in_a_row"):
            if _is_set(training, name):
                yield f"training.{name} has no effect: skip_spikes is not set"


def _data(run: RunConfig) -> Iterator[str]:
    trained = set(run.data.train)
    for name, prefixes in run.data.validation_sets.items():
        for prefix in prefixes:
            if prefix in trained:
                what = f"data.validation.{name}" if name else "data.validation"
                yield f"{what} has {prefix}, which is in data.train as well: its loss is that of texts seen in training"


def _start(run: RunConfig) -> Iterator[str]:
    if run.training.objective in ("sft", "sft_per_sample") and run.checkpoint.init_from is None:
        yield (
            f"checkpoint.init_from is not set, so {run.training.objective} begins with random weights; name a "
            "checkpoint of pretrain or import-hf"
        )


def _is_set(section: object, name: str) -> bool:
    """Whether a field has another value than its default."""
    fields = {field.name: field for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    return bool(getattr(section, name) != fields[name].default)
