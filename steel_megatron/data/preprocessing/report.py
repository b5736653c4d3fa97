"""What a preprocessing job read and wrote: for its caller, and, on disk, for the same job when it is started again."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from steel_megatron.data.indexed.format import BIN
from steel_megatron.data.preprocessing.corpora import Corpora, CorpusCounts, content_of, corpora_at, publish
from steel_megatron.data.preprocessing.encoder import TRAIN
from steel_megatron.data.reading.folders import in_words
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, remove, sync_folder, with_suffix, write_atomically
from steel_megatron.jobs.folder import differences, read_json
from steel_megatron.log import get_logger

FORMAT = "steel-megatron-preprocess-report-1"
"""Name and version of ``<prefix>.report.json``."""
_RECORD = "finished.json"
"""In a job's folder: what becomes that report."""

_log = get_logger(__name__)


@dataclass(frozen=True)
class SourceReport:
    """What became of the rows of one source."""

    splits: dict[str, CorpusCounts]
    """What was written to each output."""
    skipped: int
    """Rows that gave no document."""


@dataclass(frozen=True)
class PreprocessReport:
    """What a job read and wrote. ``documents + skipped`` is the number of rows that were read, for each key."""

    documents: int
    """Documents written, over all outputs."""
    skipped: int
    """Rows that gave no document."""
    tokens: int
    """Tokens written, over all outputs."""
    bytes: int
    """Bytes of the documents' text in UTF-8."""
    seconds: float
    """Wall time of the run; of a job that was interrupted, since it went on."""
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
    left_out: dict[str, Any] = field(default_factory=dict)
    """What folders and patterns among the inputs hold in addition: how many files by reason, with examples."""

    def as_json(self) -> str:
        """The report as a JSON object with the fields above."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def summary(self) -> str:
        """The counts, for people: documents in = out + skipped above all."""
        lines = []
        for source, found in self.sources.items() if len(self.sources) > 1 else ():
            for name, counts in found.splits.items():
                size = f"{counts.tokens:,} tokens, {counts.text_bytes / 1e6:,.1f} MB"
                lines.append(f"{source}, {name}: {counts.documents:,} documents, {size}")
            lines.append(f"{source}: {found.skipped:,} skipped")
        for name, prefix in self.outputs.items():
            size = f"{self.split_documents[name]:,} documents, {self.split_tokens[name]:,} tokens"
            shards = self.shards[name]
            where = prefix if shards == [prefix] else f"{len(shards):,} shards, {shards[0]} to {shards[-1]}"
            lines.append(f"{name}: {size} in {where}")
        keys = len({name.partition(".")[2] for name in self.outputs})
        what = "documents in" if keys == 1 else f"texts under {keys} keys"  # a row has one under each
        lines.append(
            f"{self.documents + self.skipped:,} {what} = {self.documents:,} written + {self.skipped:,} skipped; "
            f"{self.tokens:,} tokens, {self.bytes / self.tokens:.2f} bytes each, {self.seconds:,.1f} s"
        )
        lines.append(f"unigram entropy: {self.unigram_entropy:.4f} nats per token")
        if self.left_out:
            lines.append(f"left out of the inputs: {in_words(self.left_out)}")
        return "\n".join(lines)


def report_of(corpora: Corpora, seconds: float) -> PreprocessReport:
    """The report of a job whose outputs are complete."""
    several = len({key for _, key in corpora.counted}) > 1
    named = {f"{split}.{key}" if several else split: writer for (split, key), writer in corpora.counted.items()}
    names = dict.fromkeys(entry["source"] for entry in corpora.job["inputs"])
    sources = {
        source: SourceReport(
            {name: writer.per_source.get(source, CorpusCounts()) for name, writer in named.items()},
            corpora.skipped_rows.get(source, 0),
        )
        for source in names
    }
    for name, writer in named.items():
        assert writer.documents == sum(of.splits[name].documents for of in sources.values()), name
    training = sum(writer.tokens for (split, _), writer in corpora.counted.items() if split == TRAIN)
    assert corpora.token_counts.sum() == training, (corpora.token_counts.sum(), training)
    return PreprocessReport(
        documents=sum(writer.documents for writer in named.values()),
        skipped=corpora.skipped,
        tokens=sum(writer.tokens for writer in named.values()),
        bytes=sum(counts.text_bytes for of in sources.values() for counts in of.splits.values()),
        seconds=seconds,
        outputs={name: writer.prefix for name, writer in named.items()},
        shards={name: list(writer.shards) for name, writer in named.items()},
        split_documents={name: writer.documents for name, writer in named.items()},
        split_tokens={name: writer.tokens for name, writer in named.items()},
        sources=sources,
        unigram_entropy=_entropy(corpora.token_counts),
        left_out=dict(corpora.left_out),
    )


def _entropy(counts: np.ndarray) -> float:
    """Of a distribution, in nats; from how often each token occurs [vocabulary]."""
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def report_path(prefix: str) -> Path:
    """Where the report of a finished job lies."""
    return with_suffix(prefix, ".report.json")


def is_report(path: Path) -> bool:
    """Whether a file is a report in JSON, or an empty one that waits for it."""
    with disk_errors("read", path, DataError):
        content = path.read_bytes()
    try:
        return not content or set(json.loads(content)) >= {"documents", "skipped", "unigram_entropy"}
    except (ValueError, TypeError):
        return False


def skipped_path(prefix: str) -> Path:
    """Where the list of skipped rows of a finished job lies."""
    return with_suffix(prefix, "_skipped.jsonl")


def write_record(folder: Path, corpora: Corpora, report: PreprocessReport) -> None:
    """Record in the job's folder that its corpora are complete; :func:`give_names` gives them their names.

    Args:
        folder: the job's folder.
        corpora: the corpora.
        report: the report of the job.

    Raises:
        DataError: the disk is full.
    """
    contents = {prefix: content for writer in corpora.outputs.values() for prefix, content in writer.shards.items()}
    recorded = {"format": FORMAT, "report": asdict(report), "job": corpora.job, "contents": contents}
    write_atomically(folder / _RECORD, json.dumps(recorded, ensure_ascii=False).encode(), DataError)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What :func:`write_record` left; None if the corpora of the job are not complete, or were to lie elsewhere."""
    recorded, prefix = read_json(folder / _RECORD), str(folder.with_suffix(""))
    if recorded is None or not all(str(Path(shard)).startswith(prefix) for shard in recorded["contents"]):
        return None
    return recorded


def give_names(
    prefix: str, folder: Path, recorded: Mapping[str, Any], outputs: Iterable[str], overwrite: bool
) -> PreprocessReport:
    """Give complete corpora, the list of skipped rows and the report their names.

    Run again after a kill, it completes what is left to do.

    Args:
        prefix: of the job.
        folder: the job's folder.
        recorded: what :func:`read_record` gave.
        outputs: paths of the corpora without shard number and suffix.
        overwrite: whether corpora of an earlier job may be replaced.

    Raises:
        DataError: a corpus may not be replaced, or the disk refuses.
    """
    publish(folder / "corpora", recorded["contents"], outputs, overwrite)
    skipped = skipped_path(prefix)
    listed = folder / "corpora" / skipped.name
    report = _report_from(recorded["report"])
    with disk_errors("write", skipped, DataError):
        if listed.exists():
            listed.replace(skipped)
        elif not report.skipped:
            skipped.unlink(missing_ok=True)  # of an earlier job
        sync_folder(skipped.parent)
    if report.skipped:
        _log.warning(f"rows were skipped; they are listed in {skipped}")
    final = report_path(prefix)
    write_atomically(final, json.dumps(recorded, ensure_ascii=False).encode(), DataError)
    for unfinished in final.parent.glob(f"{glob.escape(final.name)}.*.partial"):  # of a call that was killed
        remove(unfinished)
    return report


def refuse_other_report(prefix: str, job: Mapping[str, Any]) -> None:
    """Refuse to replace the report and the skipped rows of another job whose corpora are still there.

    Args:
        prefix: of the job.
        job: what decides the bytes of its outputs.

    Raises:
        DataError: the message names what differs.
    """
    recorded = read_json(report_path(prefix))
    if recorded is None or recorded.get("format") != FORMAT:
        return
    contents, changed = recorded.get("contents", {}), differences(recorded.get("job", {}), job)
    if changed and any(with_suffix(shard, BIN).exists() for shard in contents):
        raise DataError(
            f"{report_path(prefix)} is the report of another job under this prefix ({changed[0]}), whose corpora are "
            "still there; choose another prefix, or replace its report with --overwrite true"
        )


def finished_report(prefix: str, job: Mapping[str, Any], outputs: Iterable[str]) -> PreprocessReport | None:
    """The report of this very job, if it is finished and its corpora are still what it wrote; else None.

    Args:
        prefix: of the job.
        job: what decides the bytes of the outputs, see :class:`~steel_megatron.data.preprocessing.corpora.Corpora`.
        outputs: paths of its corpora without shard number and suffix.
    """
    path = report_path(prefix)
    if not path.exists():
        return None
    with disk_errors("read", path, DataError):
        content = path.read_bytes()
    try:
        recorded = json.loads(content)
        if recorded["format"] != FORMAT or differences(recorded["job"], job):
            return None
        found: dict[str, str | None] = recorded["contents"]
        if set(found) != {shard for output in outputs for shard in corpora_at(output)}:
            return None
        if any(content_of(shard) != content for shard, content in found.items()):
            return None
        return _report_from(recorded["report"])
    except (ValueError, KeyError, TypeError, AttributeError, DataError):  # damaged: as if it were not there
        return None


def _report_from(fields: dict[str, Any]) -> PreprocessReport:
    sources = {
        name: SourceReport({split: CorpusCounts(**counts) for split, counts in of["splits"].items()}, of["skipped"])
        for name, of in fields["sources"].items()
    }
    return PreprocessReport(**{**fields, "sources": sources})
