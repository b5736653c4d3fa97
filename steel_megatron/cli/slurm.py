"""The commands on jobs of Slurm: render, submit, status, cancel."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steel_megatron.errors import ConfigError
from steel_megatron.slurm.profile import SlurmConfig
from steel_megatron.streams import say

if TYPE_CHECKING:
    from steel_megatron.slurm.queue import Job
    from steel_megatron.slurm.status import Status


def render(config: SlurmConfig) -> None:
    """Print the batch script of a run, to read, to edit and to give to sbatch."""
    from steel_megatron.slurm.script import render as run

    sys.stdout.write(run(config))


def submit(config: SlurmConfig) -> None:
    """Check that a run fits its nodes and that its folder is free, and submit it."""
    from steel_megatron import events
    from steel_megatron.files import is_locked
    from steel_megatron.slurm import nodes, queue
    from steel_megatron.slurm.profile import Profile, read_profile
    from steel_megatron.slurm.script import render as text_of

    script = text_of(config)
    run = Path(config.checkpoint.directory)
    if is_locked(run / "run"):
        raise ConfigError(f"a run is under way in {run} (it holds run.lock); stop it, or choose another folder")
    if jobs := queue.jobs_of(run):
        raise ConfigError(
            f"job {jobs[0].id} of {run} is {jobs[0].state.lower()}; end it with `steel-megatron slurm cancel {run}`, "
            "or choose another checkpoint.directory"
        )
    profile = read_profile(config.profile) if config.profile else Profile()
    given = ("nodes", "spare_nodes", "gpus_per_node", "processes_per_node", "time")
    origins = {name: (str(getattr(config, name)), f"--{name}") for name in given if getattr(config, name)}
    bad = nodes.excluded(run)
    words = [f"--exclude={','.join(bad)}"] if bad else []
    job = queue.submit(script, origins | config.asked_of_slurm(profile), words)
    run.mkdir(parents=True, exist_ok=True)
    events.record(run, "submit", job=job, excluded=list(bad) or None)
    say(f"job {job} is submitted; `steel-megatron slurm status {run}` shows it")


def status(run: str, json_output: bool = False) -> None:
    """Show the jobs of a run, its step, speed and loss, its faults, and the share of time in steps that count.

    Args:
        run: run folder (checkpoint.directory).
        json_output: print JSON.
    """
    from steel_megatron import events
    from steel_megatron.slurm import nodes, queue
    from steel_megatron.slurm.status import status_of

    known = events.read(Path(run))
    try:
        jobs: Sequence[Job] | None = queue.jobs_of(run)
    except ConfigError as error:
        if not known:
            raise
        jobs, why = None, str(error)
    if not known and not jobs:
        raise ConfigError(f"{run} has no {events.FILE}, and no job works on it; name the folder of a run")
    running = any(job.state == "RUNNING" for job in jobs or ())
    found = status_of(known, time.time() if running else None)
    if json_output:
        facts = {**dataclasses.asdict(found), "goodput": found.goodput, "excluded_nodes": nodes.excluded(Path(run))}
        facts["jobs"] = None if jobs is None else [dataclasses.asdict(job) for job in jobs]
        say(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    lines = [f"job {job.id} {job.state} {_place(job)}" for job in jobs or ()]
    lines += [] if jobs else ["no job is queued" if jobs is not None else f"no jobs known: {why}"]
    say("\n".join([*lines, *_lines(found), *(f"excluded: {n} ({r})" for n, r in nodes.excluded(Path(run)).items())]))


def _place(job: Job) -> str:
    return f"on {job.nodes}, {job.used} used, {job.left} left" if job.nodes else f"({job.reason})"


def _lines(found: Status) -> list[str]:
    lines = [f"step {found.step:,} of {found.steps:,}" + ("" if found.loss is None else f", loss {found.loss:.4f}")]
    lines[0] += "" if found.tokens_per_second is None else f", {found.tokens_per_second:,.0f} tokens/s"
    lines[0] += "" if found.eta_seconds is None else f", done in {_duration(found.eta_seconds)} at this speed"
    lines.append("no checkpoint yet" if found.checkpoint is None else f"newest checkpoint: step {found.checkpoint:,}")
    for name, counts in (("requeues", found.requeues), ("faults", found.faults)):
        total = ", ".join(f"{count} {cause}" for cause, count in counts.items())
        lines += [f"{name}: {total}"] if total else []
    if found.goodput is not None:
        lines.append(f"goodput: {found.goodput:.1%} of {found.allocated_seconds / 3600:,.2f} node hours")
    return [*lines, *([f"ended: {found.ended}"] if found.ended else [])]


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def cancel(run: str) -> None:
    """Save and stop a run, and do not requeue its job; a job that waits is removed from the queue.

    Args:
        run: run folder (checkpoint.directory).
    """
    from steel_megatron.errors import TrainingError
    from steel_megatron.files import write_atomically
    from steel_megatron.slurm import queue
    from steel_megatron.slurm.next import STOP_FOR_GOOD

    jobs = queue.jobs_of(run)
    if not jobs:
        raise ConfigError(f"no job of {run} is queued or runs")
    ids = " ".join(job.id for job in jobs)
    write_atomically(Path(run) / STOP_FOR_GOOD, ids.encode(), TrainingError)  # the batch script reads it
    for job in jobs:
        if job.state == "RUNNING":  # the steps alone: the script then decides
            queue.command(["scancel", "--signal=TERM", job.id])
            say(f"job {job.id} saves and stops")
        else:
            queue.command(["scancel", job.id])
            say(f"job {job.id} is removed from the queue")
