"""What a cleaning job makes: its plan, its report, the result under its own name; and what must never be replaced.

A job works in ``OUTPUT.partial``. An earlier result is replaced only if its ``funnel.json`` shows that it is one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from steel_megatron.data.cleaning import funnel
from steel_megatron.data.cleaning.filters import Perplexity, tokenizer_at
from steel_megatron.data.cleaning.job import Job
from steel_megatron.data.cleaning.steps import CleanUnits, WriteKept
from steel_megatron.data.cleaning.unit_files import damaged
from steel_megatron.data.reading.inputs import Input
from steel_megatron.data.reading.storage import is_remote, status_of
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, replace_folder, sha256_of, write_atomically
from steel_megatron.jobs.folder import PLAN, is_plan, matches, read_json, remove_folder
from steel_megatron.jobs.step import marker
from steel_megatron.log import get_logger

logger = get_logger(__name__)

PLAN_FORMAT = "steel_megatron cleaning job 2"
REPORT_FORMAT = "steel_megatron cleaning funnel 1"
_UNIT_FILE = re.compile(r"\d{6,}\.jsonl\.zst")


def check_places(job: Job, sources: Sequence[str], inputs: Sequence[Input], final: Path) -> None:
    """Refuse inputs in the folders that the job writes, and an output that the same inputs would match later.

    Args:
        job: the job.
        sources: the inputs as the user named them: paths and patterns, each alone or as ``SOURCE=PATTERN``.
        inputs: the files they matched.
        final: the output folder, absolute.

    Raises:
        DataError: an input or the output is in the wrong place; the message names the input and the folder.
    """
    written = (final, job.folder)
    for given in inputs:
        if is_remote(given.path):
            continue
        path = Path(given.path).resolve()
        for folder in written:
            if path.is_relative_to(folder):
                raise DataError(f"input {path} is in {folder}, which this job writes; choose another output")
    for source in sources:
        pattern = source if os.path.exists(source) else source.partition("=")[2] or source
        if is_remote(pattern):
            continue
        head, anything, _ = pattern.partition("**")
        pattern = os.path.join(os.path.realpath(head), "*") if anything else os.path.realpath(pattern)
        # A folder that matches is searched through all levels: so "*", which stands for "/" too here, is right.
        for folder in written:
            if any(str(place) == pattern or fnmatchcase(str(place), pattern) for place in (folder, *folder.parents)):
                raise DataError(
                    f"output {final} is where the input {source!r} is searched, so that cleaned documents would come "
                    "in again the next time; choose an output outside"
                )


def plan_of(job: Job, inputs: Sequence[Input], packages: Iterable[str]) -> dict[str, Any]:
    """What decides the result: an interrupted job resumes only under the same plan.

    Args:
        job: the job.
        inputs: its files.
        packages: those whose versions decide it.
    """
    with disk_errors("read", Path("the inputs"), DataError):
        stats = [status_of(given.path) for given in inputs]
    recipe = job.recipe
    given_model = job.language_model if recipe.perplexity and recipe.perplexity.model != "train" else None
    return {
        "format": PLAN_FORMAT,
        "kind": recipe.kind,
        "operators": [{operator.name: dataclasses.asdict(operator)} for operator in recipe.operators],
        "packages": {package: importlib.metadata.version(package) for package in sorted(packages)},
        "tokenizer": tokenizer_at(recipe.tokenizer).fingerprint if recipe.tokenizer else None,
        "language_model": _fingerprints(given_model) if given_model else None,
        "text_key": job.text_key,
        "on_bad_row": job.on_bad_row,
        "inputs": [
            [given.path, given.source, stat.size, stat.mtime_ns] for given, stat in zip(inputs, stats, strict=True)
        ],
        "units": [[*unit.files.values(), unit.part, unit.parts] for unit in job.units],
    }


def _fingerprints(model: Path) -> dict[str, str]:
    with disk_errors("read", model, DataError):
        return {path.name: sha256_of(path) for path in sorted(model.iterdir()) if path.suffix in (".json", ".npy")}


def check_replaceable(final: Path, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is to be overwritten and holds nothing but a result of an earlier job.

    Raises:
        DataError: it may not be replaced.
    """
    if not final.exists():
        return
    if not overwrite:
        raise DataError(f"{final} exists; choose another output, or replace it with --overwrite true")
    with disk_errors("read", final, DataError):
        empty = final.is_dir() and not any(final.iterdir())
    report = read_json(final / "funnel.json")
    if not empty and (report is None or report.get("format") != REPORT_FORMAT):
        raise DataError(
            f"{final} is no result of cleaning (it has no funnel.json of ours), so --overwrite does not replace it; "
            "choose another output, or move it away yourself"
        )
    for path in sorted(final.rglob("*")):
        if not path.is_dir() and not _is_of_result(path.relative_to(final), report or {}):
            raise DataError(
                f"{path} is no result of cleaning, so --overwrite does not replace {final}; move it away, or choose "
                "another output"
            )


def _is_of_result(path: Path, report: Mapping[str, Any]) -> bool:
    """Whether a file, relative to a result's folder, is one that cleaning wrote."""
    folders = path.parts[:-1]
    if not folders:
        return path.name in ("funnel.json", "funnel.png")
    if folders == ("language_model",):
        return path.suffix in (".json", ".npy")
    is_unit = _UNIT_FILE.fullmatch(path.name) is not None
    of_source = len(folders) == 1 and folders[0] in report.get("totals", {}).get("sources", {})
    return is_unit and (of_source or (len(folders) == 2 and folders[0] == "quarantine"))


def publish(job: Job, final: Path, overwrite: bool) -> dict[str, Any]:
    """Write the report, give the result its name, and remove the job's folder.

    Args:
        job: the job, with all its units done.
        final: the output folder.
        overwrite: whether an earlier result there may be replaced.

    Returns:
        the report, as in ``funnel.json``.

    Raises:
        DataError: the output may not be replaced, or the disk refuses.
    """
    operators: list[dict[str, Any]] = [{"operator": funnel.READ, "settings": {}, "left_out": False}]
    for label, operator in zip(job.recipe.labels, job.recipe.operators, strict=True):
        left_out = isinstance(operator, Perplexity) and operator.model == "none"
        settings = {key: None if value == math.inf else value for key, value in dataclasses.asdict(operator).items()}
        operators.append({"operator": label, "settings": settings, "left_out": left_out})
    units = [
        (unit.source, _counts(job, done))
        for number, unit in enumerate(job.units)
        for step in (CleanUnits.name, WriteKept.name)
        if (done := marker(job.folder, step, number)).exists()
    ]
    about: dict[str, Any] = {"format": REPORT_FORMAT, "kind": job.recipe.kind}
    if job.left_out:
        about["left_out"] = job.left_out
    report = {**about, **funnel.merge(units, operators)}
    content = json.dumps(report, indent=1, ensure_ascii=False).encode()
    write_atomically(job.output / "funnel.json", content, DataError)
    with disk_errors("write", final, DataError):
        for left in job.output.rglob("*.partial"):  # of files that were being written when an earlier call was killed
            left.unlink()
        funnel.draw(report, job.output / "funnel.png")
        write_atomically(_finished(job), hashlib.sha256(content).hexdigest().encode(), DataError)
        check_replaceable(final, overwrite)  # it may have come while the job ran
        replace_folder(job.output, final)
        remove_folder(job.folder)
    return report


def _counts(job: Job, done: Path) -> funnel.UnitCounts:
    """The counts in a unit's marker, once what the unit gave to the result is found to be there."""
    try:
        counts, files = funnel.load_counts(done.read_bytes())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(done, job.folder, error) from error
    for name, size in files.items():
        path = job.folder / name
        if path.is_relative_to(job.output) and (not path.exists() or path.stat().st_size != size):
            raise damaged(path, job.folder, f"it had {size:,} bytes")
    return counts


def _finished(job: Job) -> Path:
    """The file that says, by the hash of its report, which result is about to be published."""
    return job.folder / "finished"


def finished_report(job: Job, wanted: Mapping[str, Any], final: Path) -> dict[str, Any] | None:
    """The report of a job with this plan that was killed when its result already had its name.

    The folder of a job whose result was published is of no more use and is removed, whatever its plan.

    Args:
        job: the job.
        wanted: its plan, from :func:`plan_of`.
        final: the output folder.

    Returns:
        the report; None if there is no such job, or its result is no longer there.

    Raises:
        DataError: the job's folder cannot be read or removed.
    """
    with disk_errors("remove", job.folder, DataError):
        plan = read_json(job.folder / PLAN)
        if not _finished(job).exists() or job.output.exists() or not is_plan(plan, PLAN_FORMAT):
            return None
        digest, same = _finished(job).read_text(), matches(job.folder, wanted)
        report = final / "funnel.json"
        published = report.exists() and sha256_of(report) == digest
        remove_folder(job.folder)
        shutil.rmtree(
            final.with_name(f".{final.name}.old"), ignore_errors=True
        )  # of replace_folder, if that was killed
    return read_json(report) if same and published else None
