"""Cleaning: raw corpora -> documents that a recipe's operators keep, without duplicates, and a report of what went.

A recipe (:mod:`~steel_megatron.data.cleaning.recipe`) is a list of operators. A job cleans its input unit by unit,
compares the signatures of what is left, and writes what is no duplicate. :mod:`steel_megatron.jobs` runs the steps on
this machine, over Slurm or over Ray. The result is the same bytes for any number of tasks and workers; after a kill at
any moment the same command resumes. The output folder appears under its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steel_megatron.config import CleanConfig, ExecutorName
from steel_megatron.data.cleaning.filters import WordRepetition, WordsNum, tokenizer_at
from steel_megatron.data.cleaning.job import CleaningStep, Job, Unit
from steel_megatron.data.cleaning.language_model import LanguageModel
from steel_megatron.data.cleaning.mappers import ChineseConvert, CleanHtml, FixUnicode
from steel_megatron.data.cleaning.recipe import Recipe, load_recipe
from steel_megatron.data.cleaning.result import check_places, check_replaceable, finished_report, plan_of, publish
from steel_megatron.data.cleaning.steps import (
    STEPS,
    CleanUnits,
    FindDuplicates,
    SampleTexts,
    TrainModel,
    WriteKept,
    forget_units_without_documents,
)
from steel_megatron.data.reading.documents import Input, parse_inputs
from steel_megatron.data.reading.formats import PARQUET_SUFFIX
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import disk_errors, exclusive_lock, with_suffix
from steel_megatron.jobs.folder import prepare, remove_rest
from steel_megatron.jobs.run import run_step
from steel_megatron.log import get_logger
from steel_megatron.signals import stop_signals

logger = get_logger(__name__)

UNIT_BYTES = 32 << 20
"""A file of more bytes, as stored, is cleaned in parts; smaller ones are put together up to as many."""
_MOST_PARTS = 64


@dataclass(frozen=True)
class CleaningResult:
    """What a job did."""

    output: Path
    """The folder with the cleaned documents, ``quarantine``, ``funnel.json`` and ``funnel.png``."""
    documents_in: int
    documents_kept: int
    documents_dropped: int
    report: dict[str, Any]
    """The content of ``funnel.json``."""


def clean_corpus(config: CleanConfig) -> CleaningResult:
    """Clean corpora by a recipe; the same call resumes after a kill.

    Raises:
        ConfigError: the recipe is wrong, or neither it nor the config names sources and an output.
        DataError: an input or an output cannot be used, a package is missing, a row is broken, or a task failed.
    """
    loaded = load_recipe(
        config.recipe, sources=config.sources or None, output=config.output, tokenizer=config.tokenizer
    )
    if not loaded.sources:
        raise ConfigError(f"{config.recipe} names no sources; name them with --sources, or sources: in the recipe")
    if not loaded.output:
        raise ConfigError(f"{config.recipe} names no output folder; name it with --output, or output: in the recipe")
    inputs = parse_inputs(loaded.sources)
    packages = check_packages(loaded, inputs, config.executor)

    final = Path(os.path.realpath(loaded.output))
    job = Job(loaded, _units(inputs), with_suffix(final, ".partial"), config.text_key, config.on_bad_row)
    check_places(job, loaded.sources, inputs, final)
    _check_resources(job)
    plan = plan_of(job, inputs, packages)
    with exclusive_lock(final, DataError), stop_signals() as signals:
        remove_rest(job.folder)
        report = finished_report(job, plan, final)
        if report is None:
            check_replaceable(final, config.overwrite)
            names = [step.name for step in STEPS]
            prepare(job.folder, plan, CleaningStep.job_name, names, config.overwrite, config.executor == "slurm")
            _work(job, config)
            with signals.held():
                report = publish(job, final, config.overwrite)
    totals = report["totals"]
    logger.info(
        f"{final}: {totals['documents_in']:,} documents in = {totals['documents_kept']:,} kept + "
        f"{totals['documents_dropped']:,} dropped"
    )
    return CleaningResult(final, totals["documents_in"], totals["documents_kept"], totals["documents_dropped"], report)


def _work(job: Job, config: CleanConfig) -> None:
    """Do all steps, or what is left of them."""
    forget_units_without_documents(job)
    try:
        for step in _steps(job):
            run_step(step, config)
    except (KeyboardInterrupt, SystemExit):
        logger.warning(f"stopped. Units that are done are kept in {job.folder}: the same command resumes there")
        raise


def _steps(job: Job) -> list[CleaningStep]:
    steps: list[CleaningStep] = []
    operator = job.recipe.perplexity
    if operator is not None and operator.model == "train":
        steps += [SampleTexts(job), TrainModel(job)]
    steps.append(CleanUnits(job))
    if job.deduplicates:
        steps += [FindDuplicates(job), WriteKept(job)]
    return steps


def check_packages(recipe: Recipe, inputs: Sequence[Input], executor: ExecutorName = "local") -> list[str]:
    """Refuse operators, formats or an executor that need a package that is not installed.

    Nothing is installed.

    Args:
        recipe: its operators.
        inputs: the files; their names show their format.
        executor: where the job runs.

    Returns:
        the packages whose versions decide what operators make of a text.

    Raises:
        DataError: names the packages and how to install them.
    """
    deciding: dict[str, str] = {}
    for operator in recipe.operators:
        for kind, package in ((ChineseConvert, "opencc"), (FixUnicode, "ftfy"), (CleanHtml, "selectolax")):
            if isinstance(operator, kind):
                deciding[package] = operator.name
        if isinstance(operator, (WordsNum, WordRepetition)) and operator.tokenization == "jieba":
            deciding["rjieba"] = operator.name
    needed = dict(deciding)
    if executor != "local":
        needed["datatrove"] = f"executor {executor}"
    parquet = next((given.path for given in inputs if given.path.name.endswith(PARQUET_SUFFIX)), None)
    if parquet is not None:
        needed["pyarrow"] = parquet.name
    missing = {package: name for package, name in needed.items() if not _is_installed(package)}
    if missing:
        what = ", ".join(f"{package} (for {name})" for package, name in missing.items())
        raise DataError(f"cleaning needs packages that are not installed: {what}; pip install 'steel-megatron[data]'")
    return list(deciding)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _units(inputs: Sequence[Input]) -> tuple[Unit, ...]:
    units: list[Unit] = []
    for number, given in enumerate(inputs):
        with disk_errors("read", given.path, DataError):
            size = given.path.stat().st_size
        file = {str(given.path): number}
        parts = min(math.ceil(size / UNIT_BYTES), _MOST_PARTS)
        last = units[-1] if units else None
        if parts > 1:
            units += [Unit(file, given.source, size // parts, part, parts) for part in range(parts)]
        elif last and last.parts == 1 and last.source == given.source and last.size + size <= UNIT_BYTES:
            last.files.update(file)
            units[-1] = dataclasses.replace(last, size=last.size + size)
        else:
            units.append(Unit(file, given.source, size))
    return tuple(units)


def _check_resources(job: Job) -> None:
    """Load what the operators need, so that errors in it are raised before anything is read."""
    if job.recipe.tokenizer is not None:
        tokenizer_at(job.recipe.tokenizer)
    operator = job.recipe.perplexity
    if operator is None:
        return
    if operator.model != "train":
        LanguageModel.load(Path(operator.model))
        return
    known = {unit.source for unit in job.units}
    for name in filter(None, map(str.strip, operator.train_on.split(","))):
        if name not in known:
            raise ConfigError(
                f"{operator.name}: train_on names {name!r}, which is no source of this job; it has "
                f"{', '.join(sorted(known))}"
            )
