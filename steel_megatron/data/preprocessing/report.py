"""What a preprocessing job read and wrote: for its caller, and, on disk, for the same job when it is started again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steel_megatron.data.preprocessing.encoder import TRAIN
from steel_megatron.data.preprocessing.job import Run
from steel_megatron.data.preprocessing.journal import differences
from steel_megatron.data.preprocessing.shards import CorpusCounts, content_of, corpora_at
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, with_suffix, write_atomically

FORMAT = "steel-megatron-preprocess-report-1"
"""Name and version of ``<prefix>.report.json``."""


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
        return "\n".join(lines)


def report_of(run: Run, seconds: float) -> PreprocessReport:
    """The report of a job whose outputs are complete."""
    several = len({key for _, key in run.outputs}) > 1
    named = {f"{split}.{key}" if several else split: writer for (split, key), writer in run.outputs.items()}
    names = dict.fromkeys(entry["source"] for entry in run.job["inputs"])
    sources = {
        source: SourceReport(
            {name: writer.per_source.get(source, CorpusCounts()) for name, writer in named.items()},
            run.skipped_rows.get(source, 0),
        )
        for source in names
    }
    for name, writer in named.items():
        assert writer.documents == sum(of.splits[name].documents for of in sources.values()), name
    training = sum(writer.tokens for (split, _), writer in run.outputs.items() if split == TRAIN)
    assert run.token_counts.sum() == training, (run.token_counts.sum(), training)
    return PreprocessReport(
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
        unigram_entropy=_entropy(run.token_counts),
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


def write_report(run: Run, report: PreprocessReport) -> None:
    """Write ``<prefix>.report.json``: the report, which job it was, and what the corpora are.

    Raises:
        DataError: the disk is full.
    """
    contents = {shard.prefix: shard.content for writer in run.outputs.values() for shard in writer.shards}
    recorded = {"format": FORMAT, "report": asdict(report), "job": run.job, "contents": contents}
    write_atomically(report_path(run.journal.prefix), json.dumps(recorded, ensure_ascii=False).encode(), DataError)


def finished_report(prefix: str, job: Mapping[str, Any], outputs: Iterable[str]) -> PreprocessReport | None:
    """The report of this very job, if it is finished and its corpora are still what it wrote; else None.

    Args:
        prefix: of the job.
        job: what decides the bytes of the outputs, see :class:`~steel_megatron.data.preprocessing.job.Run`.
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
