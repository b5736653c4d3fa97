"""Documents -> indexed corpora of token ids: parallel, resumable, deterministic, in bounded memory.

One process cuts the inputs into chunks and hands them out in order; workers parse and encode them; the results are
written in the order of the inputs. So the files are the same, byte for byte, for any number of workers. A journal
beside the outputs says how far they are on disk; the same job, started again, goes on from there to the same bytes.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steel_megatron.config import TokenizerKind
from steel_megatron.data.encoding import TRAIN, VALID, Encoder
from steel_megatron.data.formats import has_keys, read_chunks
from steel_megatron.data.indexed import token_dtype
from steel_megatron.data.indexed_format import BIN
from steel_megatron.data.job_journal import InputFile, Journal, differences, examine
from steel_megatron.data.named_sources import Source, get_source
from steel_megatron.data.preprocess_run import Pace, Run, write_all
from steel_megatron.data.shards import Counts, refuse_existing, remove_partial
from steel_megatron.data.sources import BadRowPolicy, documents_of, parse_inputs
from steel_megatron.data.stop_signals import stop_signals
from steel_megatron.data.tokenizer import Engine, Tokenizer, load_tokenizer
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import disk_errors, exclusive_lock, with_suffix
from steel_megatron.log import get_logger

_COUNTED = 1 << 22
"""Tokens that are counted at a time."""
_KEPT = (
    "What is written so far is kept: the same command goes on from there, with any number of workers and with either "
    "on_bad_row. Where an input has to change, begin anew with overwrite"
)

_PACE = Pace()
_log = get_logger(__name__)


@dataclass(frozen=True)
class SourceReport:
    """What became of the rows of one source."""

    splits: dict[str, Counts]
    """What was written to each output."""
    skipped: int
    """Rows that gave no document."""


@dataclass(frozen=True)
class PreprocessReport:
    """What :func:`preprocess` read and wrote. ``documents + skipped`` is the number of rows that were read."""

    documents: int
    """Documents written, over all outputs."""
    skipped: int
    """Rows that gave no document."""
    tokens: int
    """Tokens written, over all outputs."""
    bytes: int
    """Bytes of the documents' text in UTF-8."""
    seconds: float
    """Wall time of this run; of a job that was interrupted, since it went on."""
    outputs: dict[str, str]
    """Prefix of each corpus by split (``train``, ``valid``); ``<split>.<key>`` when there are several keys. Where
    corpora are sharded, shard numbers follow (``_00000``)."""
    shards: dict[str, list[str]]
    """Prefixes of the corpora of each output; the one above where it is not sharded."""
    split_documents: dict[str, int]
    """Documents of each output."""
    split_tokens: dict[str, int]
    """Tokens of each output."""
    sources: dict[str, SourceReport]
    """The same by the name of the source."""
    unigram_entropy: float
    """Nats per token of the distribution of single tokens in the training split: the loss of a model that knows
    nothing but how often each token occurs."""


def preprocess(
    inputs: Sequence[str],
    output_prefix: str | Path,
    tokenizer_kind: TokenizerKind,
    tokenizer_path: str | Path,
    json_keys: Sequence[str] = ("text",),
    workers: int = 1,
    append_eod: bool = True,
    valid_fraction: float = 0.0,
    on_bad_row: BadRowPolicy = "stop",
    overwrite: bool = False,
    seed: int = 0,
    shard_size: int | None = None,
    engine: Engine = "auto",
    pace: Pace = _PACE,
) -> PreprocessReport:
    """Tokenize documents into indexed corpora.

    Without a validation split the corpus of a key is ``<output_prefix>_<key>_document``; with one,
    ``<output_prefix>_train_<key>_document`` and ``<output_prefix>_valid_<key>_document``. A document's split follows
    from its text and ``seed`` alone: it never moves, and copies of it fall on the same side. Nothing appears under
    these names before it is complete. Rows that gave no document are listed in ``<output_prefix>_skipped.jsonl``.

    A job that was stopped, by a signal, a bad row or a full disk, leaves ``<output_prefix>.progress.json``; called
    again with the same arguments (``workers``, ``on_bad_row``, ``engine`` and ``pace`` may differ), it goes on, and
    what it writes is what it would have written.

    Args:
        inputs: files, folders and patterns, each alone or as ``SOURCE=PATTERN``, see
            :func:`~steel_megatron.data.sources.parse_inputs`.
        output_prefix: begin of all output paths; missing folders are made.
        tokenizer_kind: ``huggingface`` or ``sentencepiece``.
        tokenizer_path: its folder or file.
        json_keys: keys of the JSON rows whose texts become corpora, one each.
        workers: processes that encode; with 1 the calling process does.
        append_eod: whether each document ends in the tokenizer's end-of-document id.
        valid_fraction: share of documents for validation; 0 for no split.
        on_bad_row: ``stop`` at a row that cannot be read, or ``skip`` it.
        overwrite: whether corpora that are there may be replaced, and another unfinished job discarded.
        seed: enters the choice of the split.
        shard_size: most tokens of a corpus; the next one takes what follows. None for a single corpus.
        engine: what encodes, see :func:`~steel_megatron.data.tokenizer.load_tokenizer`.
        pace: the size of the steps.

    Raises:
        ConfigError: an argument is out of range.
        DataError: inputs, tokenizer or outputs cannot be used, a worker died, a split got no document, or another
            job is at work, or unfinished, under the prefix.
    """
    _check_arguments(output_prefix, json_keys, workers, valid_fraction, on_bad_row, shard_size)
    started = time.monotonic()
    prefix = os.fspath(output_prefix)
    files = [examine(found) for found in parse_inputs(inputs)]
    sources = _sources(files, json_keys)
    splits = (TRAIN, VALID) if valid_fraction else (TRAIN,)
    outputs = {
        (split, key): f"{prefix}{f'_{split}' if valid_fraction else ''}_{key}_document"
        for key in json_keys
        for split in splits
    }
    journal = Journal(prefix)
    with exclusive_lock(prefix, DataError), stop_signals() as signals:
        if not journal.path.exists():
            for path in outputs.values():
                refuse_existing(path, overwrite)
        tokenizer = load_tokenizer(tokenizer_kind, tokenizer_path, engine=engine)
        _verify_engine(tokenizer, files[0], sources[json_keys[0]])
        dtype = token_dtype(tokenizer.vocab_size)
        encoder = Encoder(tokenizer, dtype, sources, on_bad_row, append_eod, valid_fraction, seed)
        settings = {
            "tokenizer": tokenizer.describe(),
            "append_eod": append_eod,
            "valid_fraction": valid_fraction,
            "seed": seed,
        }
        job = {"settings": settings, "shard_size": shard_size, "keys": list(json_keys), "inputs": [*map(asdict, files)]}
        noted = _go_on(journal, job, outputs.values(), overwrite)
        run = Run(job, outputs, encoder.dtype, journal, overwrite, noted)
        try:
            write_all(run, encoder, files, workers, pace, signals)
            with signals.held():
                run.complete()
        except BaseException as error:
            with signals.held():
                kept = run.leave()
            if kept and isinstance(error, DataError):
                raise DataError(f"{error}. {_KEPT}") from error
            if kept:
                _log.warning(f"stopped. {_KEPT}")
            raise
    return _report(run, time.monotonic() - started, tokenizer.vocab_size)


def _check_arguments(
    output_prefix: str | Path,
    json_keys: Sequence[str],
    workers: int,
    valid_fraction: float,
    on_bad_row: str,
    shard_size: int | None,
) -> None:
    if on_bad_row not in ("stop", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; it must be stop or skip")
    if workers < 1 or not 0 <= valid_fraction < 1 or not json_keys or len(set(json_keys)) < len(json_keys):
        raise ConfigError(
            f"workers = {workers} must be at least 1, valid_fraction = {valid_fraction} at least 0 and below 1, "
            f"json_keys = {list(json_keys)} at least one key and none twice"
        )
    if shard_size is not None and shard_size < 1:
        raise ConfigError(f"shard_size is {shard_size}; a shard holds at least 1 token")
    if not Path(output_prefix).name or os.fspath(output_prefix).endswith(os.sep):
        raise ConfigError(f"output_prefix is {os.fspath(output_prefix)!r}; it must end in a name, such as data/corpus")


def _sources(files: Sequence[InputFile], json_keys: Sequence[str]) -> dict[str, dict[str, Source]]:
    """By key: the sources of the inputs by name."""
    for file in files if len(json_keys) > 1 else ():
        if file.source != "text" or not has_keys(Path(file.path)):
            what = f"is read as {file.source}, which has" if file.source != "text" else "has"
            raise DataError(f"{file.path} {what} no keys to choose from; give it to a run with a single json key")
    names = dict.fromkeys(file.source for file in files)
    return {key: {name: get_source(name, key) for name in names} for key in json_keys}


def _verify_engine(tokenizer: Tokenizer, file: InputFile, sources: Mapping[str, Source]) -> None:
    """Compare a fast engine with the tokenizer's own library on the first documents there are."""
    source = sources[file.source]
    for chunk in itertools.islice(read_chunks(file.path, columns=source.columns), 1):
        tokenizer.verify_on([document.text for document in documents_of(chunk, source, "skip")])


def _go_on(journal: Journal, job: Mapping[str, Any], outputs: Iterable[str], overwrite: bool) -> dict[str, Any] | None:
    """What is noted of this very job; None to begin."""
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
    for prefix in outputs:
        remove_partial(prefix)
    journal.remove()
    return None


def _report(run: Run, seconds: float, vocab_size: int) -> PreprocessReport:
    several = len({key for _, key in run.outputs}) > 1
    named = {f"{split}.{key}" if several else split: writer for (split, key), writer in run.outputs.items()}
    names = dict.fromkeys(entry["source"] for entry in run.job["inputs"])
    sources = {
        source: SourceReport(
            {name: writer.per_source.get(source, Counts()) for name, writer in named.items()},
            run.skipped_rows.get(source, 0),
        )
        for source in names
    }
    for name, writer in named.items():
        assert writer.documents == sum(of.splits[name].documents for of in sources.values()), name
    training = [shard.prefix for (split, _), writer in run.outputs.items() if split == TRAIN for shard in writer.shards]
    report = PreprocessReport(
        documents=sum(writer.documents for writer in named.values()),
        skipped=run.skipped,
        tokens=sum(writer.tokens for writer in named.values()),
        bytes=sum(counts.text_bytes for of in sources.values() for counts in of.splits.values()),
        seconds=seconds,
        outputs={name: writer.prefix for name, writer in named.items()},
        shards={name: [shard.prefix for shard in writer.shards] for name, writer in named.items()},
        split_documents={name: writer.documents for name, writer in named.items()},
        split_tokens={name: writer.tokens for name, writer in named.items()},
        sources=sources,
        unigram_entropy=_unigram_entropy(training, vocab_size),
    )
    _log_report(report)
    return report


def _log_report(report: PreprocessReport) -> None:
    for source, found in report.sources.items() if len(report.sources) > 1 else ():
        for name, counts in found.splits.items():
            _log.info(
                f"preprocess: {source}, {name}: {counts.documents:,} documents, {counts.tokens:,} tokens, "
                f"{counts.text_bytes / 1e6:,.1f} MB"
            )
        _log.info(f"preprocess: {source}: {found.skipped:,} skipped")
    _log.info(
        f"preprocess: {report.documents + report.skipped:,} documents in = {report.documents:,} written + "
        f"{report.skipped:,} skipped; {report.tokens:,} tokens, {report.bytes / max(report.tokens, 1):.2f} bytes each, "
        f"{report.seconds:,.1f} s"
    )


def _unigram_entropy(prefixes: Sequence[str], vocab_size: int) -> float:
    """Entropy of the distribution of single tokens in corpora, in nats per token."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for prefix in prefixes:
        path = with_suffix(prefix, BIN)
        with disk_errors("read", path, DataError), path.open("rb") as file:
            while len(ids := np.fromfile(file, token_dtype(vocab_size), _COUNTED)):
                counts += np.bincount(ids, minlength=vocab_size)
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
