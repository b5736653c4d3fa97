"""Train the same small model with different feed-forward layers, and make a table of what came out.

    python examples/ablation/run.py --jobs 2              # all runs that have no result yet, then speed, then the table
    python examples/ablation/run.py --study long          # some of the variants for three times as long
    python examples/ablation/run.py --report              # only the tables, from the results that are there
    python examples/ablation/run.py --speed               # only the speed, on a machine that does nothing else
    python examples/ablation/run.py --sweep               # the learning rates that were tried, on the dense baseline

Every run is a process of its own with one thread, and leaves one JSON file under OUTPUT/results. A run that is there
is not repeated; one that crashed is listed, with the reason, and is tried again by the next command. So it can be
stopped and started at any time. See docs/ablation.md for what is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in every job

import job
import torch
from speed import measure_speed
from table import write_report
from variants import LONG, QUICK, VARIANTS, Variant

from steel_megatron.errors import CheckpointError, DataError, SteelError
from steel_megatron.files import exclusive_lock, write_atomically

ROOT = Path(__file__).resolve().parents[2]
SWEPT = "dense-double"


@dataclasses.dataclass(frozen=True)
class Study:
    """What is trained and for how long.

    Attributes:
        folder: of its results, below the output's; the short study's are in the output folder itself.
        steps: optimizer steps of a run.
        batch: sequences of a step.
        lr: highest learning rate: the best of ``rates``, on the dense baseline.
        rates: what --sweep tries.
        eval_sequences: validation sequences, at most.
        positions: lengths of prefix at which models that see the future are measured.
        largest_module: bytes of the largest module of Python's library in the corpus.
        variants: their names.
    """

    folder: str
    steps: int
    batch: int
    lr: float
    rates: tuple[float, ...]
    eval_sequences: int
    positions: int
    largest_module: int
    variants: tuple[str, ...]


NAMES = tuple(variant.name for variant in VARIANTS)
STUDIES = {
    "short": Study("", 400, 4, 8e-3, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), 256, 16, 16 * 1024, NAMES),
    "long": Study("long", 1200, 4, 8e-3, (2e-3, 4e-3, 8e-3), 1024, 16, 64 * 1024, LONG),
    "quick": Study("", 4, 2, 8e-3, (4e-3, 8e-3), 4, 2, 16 * 1024, QUICK),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    study = STUDIES["quick" if options.quick else options.study]
    output = options.output.resolve()
    plan = job.Plan(
        output=output / study.folder,
        steps=options.steps or study.steps,
        batch=study.batch,
        lr=options.lr or study.lr,
        eval_sequences=study.eval_sequences,
        positions=study.positions,
    )
    variants = [by_name(name) for name in options.variants or study.variants]
    try:
        if options.report:
            write_report(output, options.docs)
            return 0
        with exclusive_lock(output / "ablation", CheckpointError):
            corpus = job.prepare_corpus(plan.output / "data", study.largest_module)
            say(f"corpus: {corpus['documents']} documents, {corpus['tokens']:,} bytes")
            if options.sweep:
                return sweep(plan, study.rates, options.jobs)
            # Seed by seed, so that a broken variant shows early and an unfinished set of runs is still a table.
            seeds = range(1, 1 + (1 if options.quick else options.seeds))
            runs = [Run(plan, variant, seed) for seed in seeds for variant in variants]
            failed = 0 if options.speed else run_all(runs, options.jobs)
            if not options.no_speed:
                measure_speed(plan, variants, rounds=1 if options.quick else 5)
        write_report(output, options.docs)
    except SteelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/ablation", help="folder of the results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of ablation.md and ablation.png")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--study", choices=("short", "long"), default="short", help="all variants, or some for longer")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run, other than the study's")
    parser.add_argument("--lr", type=float, help="highest learning rate for all variants, other than the study's")
    parser.add_argument("--variants", nargs="+", choices=NAMES, help="only these", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a few variants, a few steps: does it work at all?")
    parser.add_argument("--report", action="store_true", help="only write the table from the results that are there")
    parser.add_argument("--sweep", action="store_true", help="try learning rates on the dense baseline")
    parser.add_argument("--speed", action="store_true", help="only measure tokens per second, and write the table")
    parser.add_argument("--no-speed", action="store_true", help="do not measure tokens per second")
    options = parser.parse_args(arguments)
    if min(options.jobs, options.seeds, options.steps or 1) < 1 or (options.lr or 1.0) <= 0:
        parser.error("--jobs, --seeds, --steps and --lr must be positive")
    return options


def by_name(name: str) -> Variant:
    return next(variant for variant in VARIANTS if variant.name == name)


def say(text: str) -> None:
    print(text, flush=True)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of one variant."""

    plan: job.Plan
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}.{self.seed}"

    @property
    def result(self) -> Path:
        return self.plan.output / "results" / f"{self.name}.json"

    @property
    def failure(self) -> Path:
        return self.plan.output / "failed" / f"{self.name}.txt"

    @property
    def log(self) -> Path:
        return self.plan.output / "logs" / f"{self.name}.log"


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a result is there that was made with these settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("settings") == settings


def sweep(plan: job.Plan, rates: Sequence[float], jobs: int) -> int:
    """The validation loss of the dense baseline at several learning rates, one seed; printed and written as JSON."""
    plans = [dataclasses.replace(plan, lr=rate, output=plan.output / "sweep" / f"{rate:g}") for rate in rates]
    for swept in plans:
        swept.output.mkdir(parents=True, exist_ok=True)
        if not (swept.output / "data").exists():
            (swept.output / "data").symlink_to(plan.output / "data")
    variant = by_name(SWEPT)
    failed = run_all([Run(swept, variant, 1) for swept in plans], jobs)
    found = {}
    for swept in plans:
        path = Run(swept, variant, 1).result
        if path.exists():
            found[f"{swept.lr:g}"] = json.loads(path.read_text(encoding="utf-8"))["causal_validation_loss"]
            say(f"lr {swept.lr:g}: validation loss {found[f'{swept.lr:g}']:.4f}")
    write_atomically(plan.output / "sweep.json", json.dumps(found, indent=1).encode(), DataError)
    return 1 if failed else 0


def run_all(wanted: list[Run], jobs: int) -> int:
    """Do the runs that have no result; returns how many failed."""
    waiting = [run for run in wanted if not is_done(run.result, job.settings(run.plan, run.variant.model, run.seed))]
    say(f"{len(wanted)} runs, {len(wanted) - len(waiting)} of them done before")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["job", "steel_megatron.platform"])
    running: dict[BaseProcess, tuple[Run, float]] = {}
    done = failed = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            run = waiting.pop(0)
            run.result.unlink(missing_ok=True)
            run.log.parent.mkdir(parents=True, exist_ok=True)
            process = context.Process(target=do, args=(run,))
            process.start()
            running[process] = (run, time.monotonic())
        multiprocessing.connection.wait([process.sentinel for process in running])
        for process in [process for process in running if not process.is_alive()]:
            run, started = running.pop(process)
            process.join()
            done += 1
            head = f"[{done} done, {len(waiting) + len(running)} left] {run.name} in {time.monotonic() - started:.0f} s"
            failed += report_end(run, process.exitcode, head)
    return failed


def report_end(run: Run, code: int | None, head: str) -> int:
    """Say how a run ended; 1 if it failed."""
    if code == 0 and run.result.exists():
        run.failure.unlink(missing_ok=True)
        result = json.loads(run.result.read_text(encoding="utf-8"))
        loss, leak = result["causal_validation_loss"], result["leak"]
        say(f"{head}: training {result['train_loss']:.4f}, causal validation {loss:.4f}, leak {leak:.2g}")
        return 0
    lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines() if run.log.exists() else []
    reason = f"exit code {code}: {lines[-1] if lines else 'nothing logged'}"
    write_atomically(run.failure, reason.encode(), DataError)
    say(f"{head}: FAILED, {reason} (see {run.log})")
    return 1


def do(run: Run) -> None:
    """What a job's process does; everything it says goes into its log."""
    log = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    job.train_and_measure(run.plan, run.variant.name, run.variant.model, run.seed, run.result)


if __name__ == "__main__":
    sys.exit(main())
