"""Documents -> indexed corpora of token ids: parallel, resumable, deterministic, in bounded memory.

One process cuts the inputs into chunks and hands them out in order; workers parse and encode them; the results are
written in the order of the inputs. So the files are the same, byte for byte, for any number of workers. A journal
beside the outputs says how far they are on disk; the same job, started again, goes on from there to the same bytes.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steel_megatron.config import PreprocessConfig
from steel_megatron.data.indexed.dataset import token_dtype
from steel_megatron.data.preprocessing.encoder import SPLIT_BY, TRAIN, VALID, Encoder
from steel_megatron.data.preprocessing.job import ChunkSizes, Run, write_all
from steel_megatron.data.preprocessing.journal import InputFile, Journal, SkippedRows, differences, examine
from steel_megatron.data.preprocessing.report import (
    PreprocessReport,
    SourceReport,
    finished_report,
    is_report,
    report_of,
    report_path,
    write_report,
)
from steel_megatron.data.preprocessing.shards import corpora_at, refuse_existing, remove_corpus, remove_partial
from steel_megatron.data.reading.documents import documents_of, parse_inputs, plain_texts
from steel_megatron.data.reading.formats import RawChunk, has_keys, read_chunks
from steel_megatron.data.reading.sources import Source, get_source
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import exclusive_lock, write_atomically
from steel_megatron.log import get_logger
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
    "What is written so far is kept: the same command goes on from there, with any number of workers and with either "
    "on_bad_row. Where an input has to change, begin anew with overwrite"
)

_PACE = ChunkSizes()
_log = get_logger(__name__)


def preprocess(config: PreprocessConfig, pace: ChunkSizes = _PACE) -> PreprocessReport:
    """Tokenize documents into indexed corpora.

    Without a validation split the corpus of a key is ``<output_prefix>_<key>_document``; with one,
    ``<output_prefix>_train_<key>_document`` and ``<output_prefix>_valid_<key>_document``. A document's split follows
    from its text and ``seed`` alone: it never moves, and copies of it fall on the same side. Nothing appears under
    these names before it is complete. Rows that gave no document are listed in ``<output_prefix>_skipped.jsonl``, and
    ``<output_prefix>.report.json`` says what was done. Once finished, the same job says so and returns that report.

    A job that was stopped, by a signal, a bad row or a full disk, leaves ``<output_prefix>.progress.json``; called
    again with the same config (``workers``, ``on_bad_row``, ``engine`` and ``pace`` may differ), it goes on, and
    what it writes is what it would have written.

    Args:
        config: the job. Its inputs are read by :func:`~steel_megatron.data.reading.documents.parse_inputs`; what the
            job itself writes is none.
        pace: the size of the steps.

    Raises:
        ConfigError: the prefix makes names that are too long.
        DataError: inputs, tokenizer or outputs cannot be used, a worker died, a split got no document, or another
            job is at work, or unfinished, under the prefix.
    """
    prefix, keys = config.output_prefix, config.json_keys
    outputs = _outputs(prefix, keys, config.valid_fraction)
    _check_names([prefix, *outputs.values()])
    files = [examine(found) for found in parse_inputs(config.inputs, _own_files(prefix, keys, config.report))]
    sources = _sources(files, keys)
    if config.report is not None:
        _check_report(config.report, _own_files(prefix, keys, None))
    journal = Journal(prefix)
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
        }
        job = {
            "settings": settings,
            "shard_size": config.shard_size,
            "keys": list(keys),
            "inputs": [*map(asdict, files)],
        }
        if not journal.path.exists() and not config.overwrite:
            if (finished := finished_report(prefix, job, outputs.values())) is not None:
                _log.info(f"this very job is finished already; its report is in {report_path(prefix)}")
                _write_report_to(config.report, finished)
                return finished
            for path in outputs.values():
                refuse_existing(path, config.overwrite)
        plain = _verify_engine(tokenizer, files, sources)
        encoder = Encoder(
            tokenizer,
            token_dtype(tokenizer.vocab_size),
            sources,
            config.on_bad_row,
            config.append_eod,
            config.valid_fraction,
            config.seed,
            by_threads=plain and tokenizer.engine == "gigatoken",
        )
        noted = _go_on(journal, job, outputs.values(), config.overwrite)
        run = Run(job, outputs, encoder.dtype, journal, config.overwrite, noted)
        return _work(run, encoder, files, config, pace, signals)


def _work(
    run: Run,
    encoder: Encoder,
    files: Sequence[InputFile],
    config: PreprocessConfig,
    pace: ChunkSizes,
    signals: StopSignals,
) -> PreprocessReport:
    """Do a job, or what is left of it."""
    started = time.monotonic()
    try:
        write_all(run, encoder, files, config.workers, pace, signals)
        with signals.held():
            run.complete()
            done = report_of(run, time.monotonic() - started)
            write_report(run, done)
            _write_report_to(config.report, done)
            run.forget()  # the very last: until here, the same command comes to the same end
    except BaseException as error:
        with signals.held():
            kept = run.leave()
        if kept and isinstance(error, DataError):
            raise DataError(f"{error}. {_KEPT}") from error
        if kept:
            _log.warning(f"stopped. {_KEPT}")
        raise
    return done


def _outputs(prefix: str, json_keys: Sequence[str], valid_fraction: float) -> dict[tuple[str, str], str]:
    """Paths of a job's corpora, without shard number and suffix, by split and key."""
    splits = {TRAIN: f"_{TRAIN}", VALID: f"_{VALID}"} if valid_fraction else {TRAIN: ""}
    return {(split, key): f"{prefix}{infix}_{key}_document" for key in json_keys for split, infix in splits.items()}


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
    """Tells the files that a job under this prefix may write and that look like inputs."""
    corpora = "|".join(map(re.escape, [*_outputs("", json_keys, 0).values(), *_outputs("", json_keys, 0.5).values()]))
    name = re.compile(
        re.escape(os.path.basename(prefix))
        + rf"(\.progress\.json|\.report\.json|_skipped\.jsonl|({corpora})(_\d{{5,}})?\.json)"
    )
    folder = os.path.realpath(os.path.dirname(prefix))
    reported = None if report is None else os.path.realpath(report)

    def own(path: Path) -> bool:
        if name.fullmatch(path.name) and os.path.realpath(path.parent) == folder:
            return True
        return reported is not None and os.path.realpath(path) == reported

    return own


def _sources(files: Sequence[InputFile], json_keys: Sequence[str]) -> dict[str, dict[str, Source]]:
    """By key: the sources of the inputs by name."""
    for file in files if len(json_keys) > 1 else ():
        if file.source != "text" or not has_keys(Path(file.path)):
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
    """Texts of the first chunk that has any, and whether most are plain; damage is told when its turn comes."""

    def chunks() -> Iterator[tuple[RawChunk, Source]]:
        for file in files:
            source = sources[file.source]
            with suppress(DataError):
                for chunk in read_chunks(file.path, columns=source.columns):
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


def _go_on(journal: Journal, job: Mapping[str, Any], outputs: Iterable[str], overwrite: bool) -> dict[str, Any] | None:
    """What is noted of this very job; None to begin."""
    noted = None
    try:
        noted = journal.read()
        if noted is None:
            return None
        changed = differences(noted["job"], job)
    except DataError:
        if not overwrite:
            raise
    else:
        # A job that was begun with overwrite goes on with the same command.
        if not changed and (noted["overwrite"] or not overwrite):
            _log.info(f"going on with the job that {journal.path} describes")
            return noted
        if not overwrite:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise DataError(
                f"{journal.path} describes an unfinished job that is not this one: {'; '.join(changed[:3])}{more}. "
                "Finish that one, choose another prefix, or discard it with overwrite"
            )
    _log.warning(f"discarding the unfinished job that {journal.path} describes")
    _discard(journal, noted, outputs)
    return None


def _discard(journal: Journal, noted: Mapping[str, Any] | None, outputs: Iterable[str]) -> None:
    """Remove everything an unfinished job wrote; of one whose journal is damaged, what has the names of this one."""
    for prefix in outputs:
        remove_partial(prefix)
    if noted is not None:
        job = noted["job"]
        for (split, key), prefix in _outputs(journal.prefix, job["keys"], job["settings"]["valid_fraction"]).items():
            remove_partial(prefix)
            # Until its first shard is complete, a job that may overwrite leaves the corpora of an earlier one.
            if noted["outputs"][f"{split}.{key}"]["shards"] or not noted["overwrite"]:
                for corpus in corpora_at(prefix):
                    remove_corpus(corpus)
    SkippedRows(journal.prefix).close(keep=False)
    journal.remove()
