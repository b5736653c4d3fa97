"""Documents -> indexed corpora of token ids: parallel, resumable, deterministic, in bounded memory.

The inputs are units of work, done on this machine or as tasks over Slurm or Ray. One process cuts the files of a unit
into chunks and hands them out in order; workers parse and encode them. The results are put together in the order of
the inputs, so the corpora are the same, byte for byte, for any number of tasks and workers. What is done lies as
segments in ``<output_prefix>.partial``; the same job, started again, resumes behind them and comes to the same bytes.
"""

from __future__ import annotations

import functools
import glob
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from steel_megatron.config import PreprocessConfig
from steel_megatron.data.indexed.dataset import token_dtype
from steel_megatron.data.indexed.labels import CHAT
from steel_megatron.data.preprocessing.chat_encoder import ChatEncoder, ChatSettings, chat_source
from steel_megatron.data.preprocessing.corpora import Corpora, EmptyCorpus, file_name_of, refuse_existing
from steel_megatron.data.preprocessing.encoder import SPLIT_BY, TRAIN, VALID, Encoder
from steel_megatron.data.preprocessing.inputs import InputFile, examine
from steel_megatron.data.preprocessing.report import (
    PreprocessReport,
    SourceReport,
    finished_report,
    give_names,
    is_report,
    read_record,
    refuse_other_report,
    report_of,
    report_path,
    skipped_path,
    write_record,
)
from steel_megatron.data.preprocessing.segments import Corpus, Segment, segments_of
from steel_megatron.data.preprocessing.step import ChunkSizes, EncodeUnits, units_of
from steel_megatron.data.reading.chunks import RawChunk
from steel_megatron.data.reading.documents import documents_of, plain_texts, unused_columns
from steel_megatron.data.reading.formats import read_chunks
from steel_megatron.data.reading.forms import has_keys
from steel_megatron.data.reading.inputs import find_inputs
from steel_megatron.data.reading.sources import Source, get_source
from steel_megatron.data.reading.storage import is_stream
from steel_megatron.data.tokenizing.chat_template import ChatTemplate
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import disk_errors, exclusive_lock, with_suffix, write_atomically
from steel_megatron.jobs import step as in_process
from steel_megatron.jobs.folder import matches, prepare, remove_folder, remove_rest
from steel_megatron.jobs.run import run_step
from steel_megatron.jobs.slurm import was_submitted
from steel_megatron.log import get_logger, progress
from steel_megatron.signals import StopSignals, stop_signals

__all__ = ["PreprocessReport", "SourceReport", "preprocess"]

_COMPARED = 100_000
"""Characters on which a fast engine is compared with the tokenizer's own library."""
_LOOKED_AT = 8
"""Chunks of a source in which they are looked for."""
_LONGEST_NAME = 255
"""Bytes of a file's name, on all common file systems."""
_APPENDED = 64
"""Bytes of what is appended to the names of outputs, such as ``_00000.rows.npy.partial``, at most."""
_KEPT = (
    "What is written so far is kept: the same command resumes there, with any number of workers or tasks and with "
    "either --on_bad_row. Where an input has to change, start anew with --overwrite true"
)
_OF_TASKS = "tasks read inputs by themselves, so leave out --tasks and --executor, or"
PLAN_FORMAT = "steel_megatron preprocessing job 1"
"""Name and version of the plan in a job's folder."""

_PACE = ChunkSizes()
_log = get_logger(__name__)


def preprocess(
    config: PreprocessConfig, pace: ChunkSizes = _PACE, chat: ChatSettings | None = None
) -> PreprocessReport:
    """Tokenize documents into indexed corpora.

    Without a validation split the corpus of a key is ``<output_prefix>_<key>_document``; with one,
    ``<output_prefix>_train_<key>_document`` and ``<output_prefix>_valid_<key>_document``. A document's split follows
    from its text and ``seed`` alone: it never moves, and copies of it fall on the same side. Nothing appears under
    these names before it is complete. Rows that gave no document are listed in ``<output_prefix>_skipped.jsonl``, and
    ``<output_prefix>.report.json`` says what was done. Once finished, the same job says so and returns that report.

    A job that was stopped, by a signal, a bad row or a full disk, leaves the folder ``<output_prefix>.partial``; called
    again with the same config (``workers``, ``executor``, ``tasks``, ``on_bad_row``, ``engine`` and ``pace`` may
    differ), it resumes, and what it writes is what it would have written.

    Args:
        config: the job. Its inputs are read by :func:`~steel_megatron.data.reading.inputs.find_inputs`; what the
            job itself writes is none.
        pace: the size of the steps.
        chat: what to make of conversations, if the documents are such; the keys are then those of
            :mod:`~steel_megatron.data.indexed.labels`.

    Raises:
        ConfigError: the prefix makes names that are too long.
        DataError: inputs, tokenizer or outputs cannot be used, a worker died, a split got no document, or another
            job is at work, or unfinished, under the prefix.
    """
    prefix, keys = config.output_prefix, config.json_keys
    outputs = _outputs(prefix, keys, config.valid_fraction)
    _check_names([prefix, *outputs.values()])
    tasks = config.executor != "local" or config.tasks is not None
    inputs = find_inputs(config.inputs, _own_files(prefix, keys, config.report), _OF_TASKS if tasks else None)
    found = inputs.files if chat is None else [replace(one, source=chat_source(one.source)) for one in inputs.files]
    files = [examine(one) for one in found]
    sources = _sources(files, keys, alike=chat is not None)
    _tell_unused(files, sources[keys[0]])
    if config.report is not None:
        _check_report(config.report, _own_files(prefix, keys, None))
    with exclusive_lock(prefix, DataError), stop_signals() as signals:
        tokenizer = load_tokenizer(
            config.tokenizer_kind, config.tokenizer_path, engine=config.engine, eod_token=config.eod_token
        )
        settings = {
            "tokenizer": tokenizer.describe(),
            "append_eod": config.append_eod,
            "valid_fraction": config.valid_fraction,
            "seed": config.seed,
            **({"split_by": SPLIT_BY} if config.valid_fraction else {}),
            **({CHAT: {**asdict(chat), "template": ChatTemplate(tokenizer).fingerprint}} if chat else {}),
        }
        job = {
            "settings": settings,
            "shard_size": config.shard_size,
            "keys": list(keys),
            "inputs": [*map(asdict, files)],
        }
        folder, units = with_suffix(prefix, ".partial"), units_of(files)
        plan = {"format": PLAN_FORMAT, **job, "units": units}
        remove_rest(folder)
        finished = _finished(config, job, plan, folder, outputs)
        if finished is not None:
            return finished
        with signals.held():  # a library swallows an exception while it imports others, at its first call
            plain = chat is None and _verify_engine(tokenizer, files, sources)
        kind = functools.partial(ChatEncoder, chat=chat) if chat else Encoder
        encoder = kind(
            tokenizer,
            token_dtype(tokenizer.vocab_size),
            sources,
            config.on_bad_row,
            config.append_eod,
            config.valid_fraction,
            config.seed,
            by_threads=plain and tokenizer.engine == "gigatoken",
        )
        on_slurm = config.executor == "slurm"
        prepare(folder, plan, EncodeUnits.job_name, [EncodeUnits.name], config.overwrite, on_slurm)
        step = EncodeUnits(folder, tuple(files), units, encoder, tuple(outputs), pace)
        return _work(step, job, outputs, inputs.left_out, config, signals)


def _finished(
    config: PreprocessConfig,
    job: Mapping[str, Any],
    plan: Mapping[str, Any],
    folder: Path,
    outputs: Mapping[Corpus, str],
) -> PreprocessReport | None:
    """The report of this very job, if it is finished, or was killed while its corpora got their names.

    Raises:
        DataError: corpora or reports of other jobs are in the way.
    """
    prefix = config.output_prefix
    earlier = with_suffix(prefix, ".progress.json")
    if earlier.exists():
        if not config.overwrite:
            raise DataError(
                f"{earlier} belongs to an unfinished job of an earlier version of the library; finish it with that "
                "version, choose another prefix, or discard it with --overwrite true"
            )
        _discard_earlier_format(earlier, outputs.values())
    if matches(folder, plan) and (recorded := read_record(folder)) is not None:
        return _complete(config, folder, recorded, outputs)
    if config.overwrite or (finished := finished_report(prefix, job, outputs.values())) is None:
        for path in outputs.values():
            refuse_existing(path, config.overwrite)
        if not config.overwrite:
            refuse_other_report(prefix, job)
        return None
    _log.info(f"this very job is finished already; its report is in {report_path(prefix)}")
    _write_report_to(config.report, finished)
    return finished


def _complete(
    config: PreprocessConfig, folder: Path, recorded: Mapping[str, Any], outputs: Mapping[Corpus, str]
) -> PreprocessReport:
    """Give everything its name; the job's folder goes last, as until then the same command comes to the same end."""
    report = give_names(config.output_prefix, folder, recorded, outputs.values(), config.overwrite)
    _write_report_to(config.report, report)
    with disk_errors("remove", folder, DataError):
        remove_folder(folder)
    return report


def _work(
    step: EncodeUnits,
    job: Mapping[str, Any],
    outputs: Mapping[Corpus, str],
    left_out: Mapping[str, Any],
    config: PreprocessConfig,
    signals: StopSignals,
) -> PreprocessReport:
    """Do a job, or what is left of it."""
    started, folder = time.monotonic(), step.folder
    try:
        with Corpora(job, outputs, step.encoder.dtype, folder, left_out) as corpora:
            _encode(step, corpora, config, signals)
            with signals.held():
                segments = [segment for unit in range(step.count) for segment in step.segments(unit)]
                corpora.finish(segments, corpora.folder / skipped_path(config.output_prefix).name)
        with signals.held():
            write_record(folder, corpora, report_of(corpora, time.monotonic() - started))
            recorded = read_record(folder)
            assert recorded is not None
            done = _complete(config, folder, recorded, outputs)
    except BaseException as error:
        with signals.held():
            kept = _leave(step, resumable=not isinstance(error, EmptyCorpus))
        if kept and isinstance(error, DataError):
            raise DataError(f"{error}. {_KEPT}") from error
        if kept:
            _log.warning(f"stopped. {_KEPT}")
        raise
    return done


def _encode(step: EncodeUnits, corpora: Corpora, config: PreprocessConfig, signals: StopSignals) -> None:
    """Encode what is left of the inputs, and give the corpora everything in the order of the inputs."""
    before, missing = step.begun(), step.missing()
    here = config.executor == "local" and config.tasks is None
    # One process encodes in the order of the inputs: the corpora take its results as they come, unless there is
    # something of units behind the first missing one.
    at_once = here and not any(before[missing[0] + 1 :] if missing else [])
    if at_once:
        _put_together(itertools.chain.from_iterable(before), step, corpora)
    if here:
        with progress(step.name, step.bytes_to_read(), "bytes") as shown, in_process.counted_by(shown.advance):
            step.encode(missing, config.workers, signals, corpora.add if at_once else lambda documents: None)
    else:
        run_step(step, config)
    if not at_once:
        _put_together((segment for unit in range(step.count) for segment in step.segments(unit)), step, corpora)


def _put_together(segments: Iterable[Segment], step: EncodeUnits, corpora: Corpora) -> None:
    for segment in segments:
        for documents in segment.documents(step.corpora, step.encoder.dtype):
            corpora.add(documents)


def _leave(step: EncodeUnits, resumable: bool) -> bool:
    """Leave an unfinished job: to be resumed, or, if there is nothing to resume, without a trace.

    Returns:
        whether something was kept.
    """
    begun = was_submitted(step.folder) or any(segments_of(step.folder, unit) for unit in range(step.count))
    kept = resumable and begun
    if not kept and step.folder.exists():
        with suppress(DataError), disk_errors("remove", step.folder, DataError):
            remove_folder(step.folder)
    return kept


def _outputs(prefix: str, json_keys: Sequence[str], valid_fraction: float) -> dict[Corpus, str]:
    """Paths of a job's corpora, without shard number and suffix, by split and key."""
    splits = {TRAIN: f"_{TRAIN}", VALID: f"_{VALID}"} if valid_fraction else {TRAIN: ""}
    names = {key: file_name_of(key) for key in json_keys}
    return {
        (split, key): f"{prefix}{infix}_{names[key]}_document" for key in json_keys for split, infix in splits.items()
    }


def _check_names(prefixes: Iterable[str]) -> None:
    """Refuse names that a file system refuses, before anything is written under shorter ones."""
    for name in (os.path.basename(prefix) for prefix in prefixes):
        if (size := len(os.fsencode(name))) > _LONGEST_NAME - _APPENDED:
            raise ConfigError(
                f"output_prefix makes names of {size} bytes ({name[:40]}...), and up to {_APPENDED} are appended; "
                f"{_LONGEST_NAME} is the most that the name of a file has: choose a shorter prefix"
            )


def _check_report(path: str, is_own: Callable[[Path], bool]) -> None:
    """Refuse a report that cannot be written, or would replace something else, before the work."""
    if os.path.isdir(path):
        raise DataError(f"the report {path} is a folder; name a file")
    if is_own(Path(path)):
        raise DataError(f"the report {path} is a file that this job writes itself; name another, or leave it out")
    if os.path.exists(path) and not is_report(Path(path)):
        raise DataError(f"{path} exists and is no report of preprocess; name another file for the report")
    with exclusive_lock(path, DataError):
        pass


def _write_report_to(path: str | None, report: PreprocessReport) -> None:
    if path is not None:
        write_atomically(path, report.as_json().encode(), DataError)


def _own_files(prefix: str, json_keys: Sequence[str], report: str | None) -> Callable[[Path], bool]:
    """Tells the files that a job under this prefix may write."""
    corpora = "|".join(map(re.escape, [*_outputs("", json_keys, 0).values(), *_outputs("", json_keys, 0.5).values()]))
    name = re.compile(
        re.escape(os.path.basename(prefix))
        + r"(\.progress\.json|\.report\.json|_skipped\.jsonl|\.lock|"
        + rf"({corpora})(_\d{{5,}})?(\.json|\.bin|\.idx|\.rows\.npy))"
    )
    folder = os.path.realpath(os.path.dirname(prefix))
    reported = None if report is None else os.path.realpath(report)
    works_in = Path(os.path.realpath(f"{prefix}.partial"))

    def own(path: Path) -> bool:
        if Path(os.path.realpath(path)).is_relative_to(works_in):
            return True
        if name.fullmatch(os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), folder)):
            return True
        return reported is not None and os.path.realpath(path) in (reported, f"{reported}.lock")

    return own


def _tell_unused(files: Sequence[InputFile], sources: Mapping[str, Source]) -> None:
    """Say once for each source which columns of its first file are not read."""
    firsts = {file.source: file for file in reversed(files)}
    for name, file in firsts.items():
        if not is_stream(file.path) and (unused := unused_columns(file.path, sources[name])):
            _log.warning(f"{file.path} as {name}: not read are the columns {', '.join(unused)}")


def _sources(files: Sequence[InputFile], json_keys: Sequence[str], alike: bool) -> dict[str, dict[str, Source]]:
    """By key: the sources of the inputs by name; ``alike`` where the keys are not keys of rows."""
    for file in files if len(json_keys) > 1 and not alike else ():
        if file.source != "text" or not has_keys(file.path):
            what = f"is read as {file.source}, which has" if file.source != "text" else "has"
            raise DataError(f"{file.path} {what} no keys to choose from; give it to a run with a single json key")
    names = dict.fromkeys(file.source for file in files)
    return {key: {name: get_source(name, key) for name in names} for key in json_keys}


def _verify_engine(
    tokenizer: Tokenizer, files: Sequence[InputFile], sources: Mapping[str, Mapping[str, Source]]
) -> bool:
    """Compare a fast engine with the tokenizer's own library on documents of each source, and of the middle file.

    Returns:
        whether the compiled reader takes nearly all of these.
    """
    choices: dict[str, Sequence[InputFile]] = {}
    for file in files:
        choices[file.source] = [*choices.get(file.source, ()), file]
    choices[""] = files[len(files) // 2 :]
    samples = [_first_texts(choice, by_name) for by_name in sources.values() for choice in choices.values()]
    share = _COMPARED // len(samples)
    tokenizer.verify_on([text for texts, _ in samples for text in _begin_of(texts, share)])
    return all(plain for _, plain in samples)


def _first_texts(files: Iterable[InputFile], sources: Mapping[str, Source]) -> tuple[list[str], bool]:
    """Texts of the first chunk that has any, and whether most are plain; damage is reported when its turn comes."""

    def chunks() -> Iterator[tuple[RawChunk, Source]]:
        for file in files:
            source = sources[file.source]
            with suppress(DataError):
                for chunk in read_chunks(file.path, columns=source.columns, peek=True):
                    yield chunk, source

    for chunk, source in itertools.islice(chunks(), _LOOKED_AT):
        if texts := [document.text for document in documents_of(chunk, source, "skip")]:
            return texts, plain_texts(chunk, source) is not None
    return [], True


def _begin_of(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


def _discard_earlier_format(journal: Path, outputs: Iterable[str]) -> None:
    """Remove what an unfinished job left that was begun before jobs had folders."""
    _log.warning(f"discarding the unfinished job that {journal} describes")
    journal.unlink()
    for prefix in outputs:
        for left in Path(prefix).parent.glob(f"{glob.escape(Path(prefix).name)}*.partial"):
            if left.is_file():
                left.unlink()
