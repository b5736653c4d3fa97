"""The folder that a job works in, next to what it makes: what may be resumed there, and what may be removed.

Its ``plan.json`` says what decides the result. The same job resumes; another one is refused until the folder is to be
overwritten. Nothing without a plan of ours is ever removed. A folder is renamed before it is removed, so that a kill
leaves none with only some of its files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, write_atomically
from steel_megatron.jobs.slurm import live_jobs
from steel_megatron.log import get_logger

PLAN = "plan.json"
_FORMATS = "steel_megatron "
"""What the format of every plan begins with."""
_SHOWN = 3
"""Differences between two jobs that a message names."""
_LONGEST_VALUE = 80
"""Characters of a setting above which a message says only that it changed."""

_log = get_logger(__name__)


def prepare(
    folder: Path, plan: Mapping[str, Any], job: str, steps: Iterable[str], overwrite: bool, over_slurm: bool
) -> bool:
    """Make a job's folder, or find it as an interrupted call with the same plan left it.

    Args:
        folder: the job's folder.
        plan: what decides the result, as JSON; ``format`` ends in the version of the plan's format.
        job: name of the kind of job.
        steps: names of all its steps.
        overwrite: whether the folder of an interrupted job with another plan may be removed.
        over_slurm: whether this call runs the job over Slurm, so that it may wait for tasks that are still running.

    Returns:
        whether the job resumes.

    Raises:
        DataError: something is in the way that may not be removed, or Slurm tasks of an earlier call still run.
    """
    wanted = json.dumps(plan, indent=1).encode()
    with disk_errors("write", folder, DataError):
        if folder.exists():
            found = read_json(folder / PLAN)
            live = live_jobs(folder, job, steps)
            changed = None if found is None else differences(found, json.loads(wanted))
            if live and not (changed == [] and over_slurm):
                raise DataError(
                    f"Slurm still runs {', '.join(live)} for {folder}; end it (scancel {' '.join(live)}), or give the "
                    "command that submitted it again, which waits for it"
                )
            if changed == []:
                _log.info(f"resuming the interrupted job in {folder}")
                if not live:
                    shutil.rmtree(folder / "tmp", ignore_errors=True)
                return True
            _check_removable(folder, plan["format"], found, changed, overwrite)
            _log.warning(f"discarding the unfinished job in {folder}")
            remove_folder(folder)
        folder.mkdir(parents=True)
    write_atomically(folder / PLAN, wanted, DataError)
    return False


def _check_removable(
    folder: Path,
    plan_format: str,
    plan: Mapping[str, Any] | None,
    changed: Sequence[str] | None,
    overwrite: bool,
) -> None:
    """Refuse to remove a folder that is no job's, or the work of a job that nobody gave up."""
    if plan is None:
        # A kill while the plan was written leaves part of it.
        if not folder.is_dir() or any(not path.match(f"{PLAN}.*.partial") for path in folder.iterdir()):
            raise DataError(f"{folder}, where this job would work, exists and is none of ours; move it away")
    elif not is_plan(plan, plan_format):
        raise DataError(f"{folder}, where this job would work, holds a {PLAN} that is none of ours; move it away")
    elif not overwrite:
        assert changed
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise DataError(
            f"{folder} holds an unfinished job that is not this one: {'; '.join(changed[:_SHOWN])}{more}. Finish that "
            "one, choose another output, or discard it with --overwrite true"
        )


def matches(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Whether a folder is that of the job with this plan."""
    found = read_json(folder / PLAN)
    return found is not None and not differences(found, json.loads(json.dumps(plan)))


def is_job(folder: Path) -> bool:
    """Whether a job of this library works, or worked, in a folder."""
    return is_plan(read_json(folder / PLAN), _FORMATS)


def is_plan(found: Mapping[str, Any] | None, plan_format: str) -> bool:
    """Whether a plan is of this kind of job, in whichever version.

    Args:
        found: what was read; None if there is no plan.
        plan_format: the ``format`` of such plans.
    """
    return found is not None and str(found.get("format")).startswith(plan_format.rstrip("0123456789"))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is none."""
    try:
        read = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours, whose name is free at once."""
    doomed = _doomed(folder)
    remove_rest(folder)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def remove_rest(folder: Path) -> None:
    """Remove what is left of a folder whose removal was cut short by a kill."""
    shutil.rmtree(_doomed(folder), ignore_errors=True)


def _doomed(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.removed")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two plans, in words; nested settings by their path (``tokenizer.fingerprint``)."""
    found = []
    for name in {**before, **now}:
        was, value = before.get(name), now.get(name)
        if was == value:
            continue
        if name == "inputs" and isinstance(was, list) and isinstance(value, list):
            found += _changed_inputs(was, value)
        elif isinstance(was, dict) and isinstance(value, dict):
            found += [f"{name}.{difference}" for difference in differences(was, value)]
        elif len(f"{was}{value}") > _LONGEST_VALUE:
            found.append(f"{name} changed")
        else:
            found.append(f"{name} was {was}, is {value}")
    return found


def _changed_inputs(before: Sequence[Any], after: Sequence[Any]) -> list[str]:
    was, now = ({entry["path"]: entry for entry in map(_named, entries)} for entries in (before, after))
    found = [f"{path} is no longer among the inputs" for path in was if path not in now]
    found += [f"{path} was not among the inputs" for path in now if path not in was]
    for path in was:
        if path in now and was[path] != now[path]:
            found += [f"{path}: {difference}" for difference in differences(was[path], now[path])]
    return found or ["the inputs come in another order"]


def _named(entry: Any) -> dict[str, Any]:
    """An input by the names of its fields; plans of cleaning have them in a list."""
    return entry if isinstance(entry, dict) else dict(zip(("path", "source", "bytes", "mtime_ns"), entry, strict=True))
