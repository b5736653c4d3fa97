"""The commands on checkpoints: list, verify, plan, reshard, compare."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steel_megatron.config import RunConfig
from steel_megatron.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from steel_megatron.train.checkpoint import CheckpointInfo
    from steel_megatron.train.checkpoint_compare import Difference
    from steel_megatron.train.checkpoint_list import Listed


@dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
    """A run that is to load a checkpoint."""

    path: str
    """Checkpoint folder (step_...); its run.yaml is the run, unless --config names another."""
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
    """Checkpoint folder (step_...); its run.yaml is the run, unless --config names another."""
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
    from pathlib import Path

    _prepare()
    from steel_megatron.train.checkpoint_list import list_checkpoints as find

    found = find(Path(folder))
    if json_output:
        _print_json([{**dataclasses.asdict(one), "path": str(one.path)} for one in found])
        return
    sys.stdout.write(_table(found, time.time()))


def verify(path: str) -> None:
    """Compare all files of a checkpoint with their checksums.

    Args:
        path: checkpoint folder (step_...).
    """
    _prepare()
    info = _verified(path)
    size = sum(file.stat().st_size for file in info.path.iterdir())
    what = "weights and optimizer" if info.has_optimizer else "weights only"
    sys.stdout.write(f"{path} is whole: step {info.step}, {what}, {_bytes(size)}, saved by {_saved_by(info)}\n")


def plan(config: PlanConfig) -> None:
    """Say whether a checkpoint loads under a layout, and what memory each rank needs, before a job is queued."""
    from pathlib import Path

    _prepare()
    from steel_megatron.train.checkpoint import read_info
    from steel_megatron.train.checkpoint_plan import plan as run

    info = read_info(Path(config.path))
    found = run(info, _run_of(config), config.processes)
    if config.json_output:
        stages = [{**dataclasses.asdict(one), "total": one.total} for one in found.stages]
        facts = {key: getattr(found, key) for key in ("layout", "processes", "resumes", "keeps_random_states")}
        _print_json({"path": str(info.path), "step": info.step, **facts, "stages": stages})
        return
    how = "resumes" if found.resumes else "holds weights only: a run begins with them (checkpoint.init_from)"
    anew = "" if found.keeps_random_states or not found.resumes else " Random generators are seeded anew."
    lines = [
        f"{config.path}, saved by {_saved_by(info)}, loads under {found.layout}, {_count(found.processes)}",
        f"and {how}.{anew}",
        "",
        f"{'stage':<8}{'rank':>6}{'weights':>14}{'gradients':>14}{'optimizer':>14}{'total':>14}",
    ]
    for number, one in enumerate(found.stages):
        sizes = (one.weights, one.gradients, one.optimizer, one.total)
        lines.append(f"{number:<8}{one.rank:>6}" + "".join(f"{_bytes(size):>14}" for size in sizes))
    lines += ["", "Other ranks of a stage need no more, but for counters. Activations come on top."]
    sys.stdout.write("\n".join(lines) + "\n")


def reshard(config: ReshardConfig) -> None:
    """Write a checkpoint anew as a run under another layout would have saved it, with the same bits.

    A checkpoint loads under any layout as it is; its own layout only loads it faster.
    """
    from pathlib import Path

    _prepare()
    from steel_megatron.train.checkpoint_reshard import reshard as run

    info = _verified(config.path)
    made = run(info, Path(config.output), _run_of(config), config.processes)
    sys.stdout.write(f"{config.output} has step {made.step} as saved by {_saved_by(made)}\n")


def compare(a: str, b: str, tolerance: float = 0.0, json_output: bool = False) -> int:
    """Name the tensors of two checkpoints that differ, whatever layouts saved them.

    The exit code is 0 if weights and optimizer state are equal, 1 if not.

    Args:
        a: checkpoint folder (step_...).
        b: another one.
        tolerance: count a tensor as equal whose largest difference is at most this part of its largest magnitude.
        json_output: print JSON.
    """
    if not tolerance >= 0:
        raise ConfigError(f"tolerance is {tolerance}; it must be 0 or more")
    _prepare()
    from steel_megatron.train.checkpoint_compare import compare as run

    infos = _verified(a), _verified(b)
    found = run(infos[0].path, infos[1].path, tolerance)
    if json_output:
        _print_json({"tensors": found.tensors, "differences": [dataclasses.asdict(one) for one in found.differences]})
        return 1 if found.differences else 0
    lines = [
        f"{name}: {path}, step {info.step}, {_saved_by(info)}"
        for name, path, info in zip("AB", (a, b), infos, strict=True)
    ]
    for one in found.differences:
        lines += [one.name, f"    {_difference(one)}"]
    lines.append(f"{len(found.differences):,} of {found.tensors:,} tensors differ")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if found.differences else 0


def _prepare() -> None:
    from steel_megatron.platform import prepare

    prepare()  # before megatron-core is imported


def _verified(path: str) -> CheckpointInfo:
    from pathlib import Path

    from steel_megatron.train.checkpoint import read_info
    from steel_megatron.train.checkpoint import verify as check

    info = read_info(Path(path))
    check(Path(path))
    return info


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

    _prepare()
    from steel_megatron.config import from_dict, to_dict
    from steel_megatron.train.checkpoint import read_info

    info = read_info(path)  # refuses to import what comes with weights
    file = path / "run.yaml"
    if not file.is_file():
        return {"model": to_dict(info.model)}
    try:
        run: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    from_dict(RunConfig, run, str(file))  # names a key that this version does not have
    return run


def _table(found: list[Listed], now: float) -> str:
    """At most 80 columns wide, with what is wrong below."""
    lines = [f"{'step':>10}  {'layout':<26}{'size':>9}{'age':>7}  {'whole':<14}finite"]
    notes = []
    for one in found:
        whole = "yes" if one.state == "whole" else one.state
        finite = {True: "yes", False: "no", None: "unknown"}[one.finite]
        layout = one.layout if len(one.layout) <= 25 else one.layout.replace(" ", "")[:25]
        aside = " (set aside)" if one.path.parent.name == "set_aside" else ""
        size, age = _bytes(one.bytes), _age(now - one.saved)
        lines.append(f"{one.step:>10}  {layout or '-':<26}{size:>9}{age:>7}  {whole:<14}{finite}")
        if one.problem or aside:
            notes.append(f"{one.path.name}{aside}{': ' if one.problem else ''}{one.problem}")
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _difference(one: Difference) -> str:
    if one.kind.startswith("only"):
        return f"{one.kind} ({one.of:,} elements)"
    sides = f"{one.kind} {one.a} in A, {one.b} in B" if one.a else ""
    if one.kind == "shape":
        return sides
    numbers = (
        f"{one.elements:,} of {one.of:,} elements differ, by at most {one.max_abs:.3g} "
        f"({one.max_rel:.3g} of the largest)"
    )
    return f"{sides}; {numbers}" if sides else numbers


def _saved_by(info: CheckpointInfo) -> str:
    return f"{info.layout}, {_count(info.world_size)}"


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes:,} processes"


def _bytes(size: float) -> str:
    """In decimal units, as disks and networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 1000 else f"{size:,.0f} TB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
