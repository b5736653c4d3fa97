"""The commands on checkpoints: list, verify, plan, reshard, compare."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steel_megatron.config import RunConfig
from steel_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
    """A run that is to load a checkpoint."""

    path: str
    """Checkpoint folder (step_...), or a run's (its newest checkpoint); its run.yaml is the run, unless --config names
    another."""
    processes: int | None = None
    """Processes of the launch; default: as many as saved the checkpoint."""
    json_output: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_processes(self.processes)


@dataclass(frozen=True, kw_only=True)
class ReshardConfig(RunConfig):
    """A run for whose layout a checkpoint is written anew."""

    path: str
    """Checkpoint folder (step_...), or a run's (its newest checkpoint); its run.yaml is the run, unless --config names
    another."""
    output: str
    """Checkpoint to create."""
    processes: int | None = None
    """Processes of the new layout; default: as many as saved the checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_processes(self.processes)


def _check_processes(processes: int | None) -> None:
    if processes is not None and processes < 1:
        raise ConfigError(f"processes is {processes}; it must be at least 1")


def list_checkpoints(folder: str, json_output: bool = False) -> None:
    """List a run's checkpoints: step, layout, size, age, whether each is whole and finite.

    Sizes of files are compared with what was saved; `checkpoint verify` compares checksums as well.

    Args:
        folder: run folder (checkpoint.directory).
        json_output: print JSON.
    """
    from steel_megatron.cli.checkpoint_text import table
    from steel_megatron.train.checkpoint_list import list_checkpoints as find

    found = find(Path(folder))
    if json_output:
        _print_json([{**dataclasses.asdict(one), "path": str(one.path)} for one in found])
        return
    sys.stdout.write(table(found, time.time()))


def verify(path: str) -> None:
    """Compare all files of a checkpoint with their checksums.

    Args:
        path: checkpoint folder (step_...), or a run's (its newest checkpoint).
    """
    from steel_megatron.cli.checkpoint_text import saved_by, size_text, verified

    info = verified(path)
    size = sum(file.stat().st_size for file in info.path.iterdir())
    what = "weights and optimizer" if info.has_optimizer else "weights only"
    sys.stdout.write(f"{info.path} is whole: step {info.step}, {what}, {size_text(size)}, saved by {saved_by(info)}\n")


def plan(config: PlanConfig) -> None:
    """Say whether a checkpoint loads under a layout, and what memory each rank needs, before a job is queued."""
    from steel_megatron.cli.checkpoint_text import process_count, saved_by, size_text
    from steel_megatron.train.model_path import find_checkpoint

    info = find_checkpoint(config.path)
    _prepare()
    from steel_megatron.train.checkpoint_plan import plan as run

    found = run(info, _run_of(config), config.processes)
    if config.json_output:
        stages = [{**dataclasses.asdict(one), "total": one.total} for one in found.stages]
        facts = {key: getattr(found, key) for key in ("layout", "processes", "resumes", "keeps_random_states")}
        _print_json({"path": str(info.path), "step": info.step, **facts, "stages": stages})
        return
    how = "resumes" if found.resumes else "holds weights only: a run begins with them (checkpoint.init_from)"
    anew = "" if found.keeps_random_states or not found.resumes else " Random generators are seeded anew."
    lines = [
        f"{info.path}, saved by {saved_by(info)}, loads under {found.layout}, {process_count(found.processes)}",
        f"and {how}.{anew}",
        "",
        f"{'stage':<8}{'rank':>6}{'weights':>14}{'gradients':>14}{'optimizer':>14}{'total':>14}",
    ]
    for number, one in enumerate(found.stages):
        sizes = (one.weights, one.gradients, one.optimizer, one.total)
        lines.append(f"{number:<8}{one.rank:>6}" + "".join(f"{size_text(size):>14}" for size in sizes))
    lines += ["", "Other ranks of a stage need no more, but for counters. Activations come on top."]
    sys.stdout.write("\n".join(lines) + "\n")


def reshard(config: ReshardConfig) -> None:
    """Write a checkpoint anew as a run under another layout would have saved it, with the same bits.

    A checkpoint loads under any layout as it is; its own layout only loads it faster.
    """
    from steel_megatron.cli.checkpoint_text import saved_by, verified

    info = verified(config.path)
    from steel_megatron.train.checkpoint_reshard import reshard as run

    made = run(info, Path(config.output), _run_of(config), config.processes)
    sys.stdout.write(f"{config.output} has step {made.step} as saved by {saved_by(made)}\n")


def compare(a: str, b: str, tolerance: float = 0.0, json_output: bool = False) -> int:
    """Name the tensors of two checkpoints that differ, whatever layouts saved them.

    The exit code is 0 if weights and optimizer state are equal, 1 if not.

    Args:
        a: checkpoint folder (step_...), or a run's (its newest checkpoint).
        b: another one.
        tolerance: count a tensor as equal whose largest difference is at most this part of its largest magnitude.
        json_output: print JSON.
    """
    if not tolerance >= 0:
        raise ConfigError(f"tolerance is {tolerance}; it must be 0 or more")
    from steel_megatron.cli.checkpoint_text import difference_text, saved_by, verified
    from steel_megatron.train.model_path import find_checkpoint

    for path in (a, b):
        find_checkpoint(path)  # neither is read if one is not there
    infos = verified(a), verified(b)
    from steel_megatron.train.checkpoint_compare import compare as run

    found = run(infos[0].path, infos[1].path, tolerance)
    if json_output:
        _print_json({"tensors": found.tensors, "differences": [dataclasses.asdict(one) for one in found.differences]})
        return 1 if found.differences else 0
    lines = [f"{name}: {info.path}, step {info.step}, {saved_by(info)}" for name, info in zip("AB", infos, strict=True)]
    for one in found.differences:
        lines += [one.name, f"    {difference_text(one)}"]
    lines.append(f"{len(found.differences):,} of {found.tensors:,} tensors differ")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if found.differences else 0


def _prepare() -> None:
    from steel_megatron.platform import prepare

    prepare()  # before megatron-core is imported


def _run_of(config: RunConfig) -> RunConfig:
    """The run without what a command adds to it."""
    return RunConfig(**{one.name: getattr(config, one.name) for one in dataclasses.fields(RunConfig)})


def base_options(path: Path) -> dict[str, Any]:
    """The options of the run that saved a checkpoint; its model's alone where it was no run.

    Raises:
        CheckpointError: the checkpoint is not whole.
        ConfigError: its routing mode is code that has not been imported, or its run.yaml cannot be read.
    """
    import yaml

    from steel_megatron.config import from_dict, to_dict
    from steel_megatron.train.model_path import find_checkpoint

    info = find_checkpoint(path)  # refuses to import what comes with weights
    file = info.path / "run.yaml"
    if not file.is_file():
        return {"model": to_dict(info.model)}
    try:
        run: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    from_dict(RunConfig, run, str(file))  # names a key that this version does not have
    return run


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
