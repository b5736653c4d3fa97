"""What indexed corpora hold: counts, lengths, bytes per token of each source, decoded samples; and the commands."""

from __future__ import annotations

import dataclasses
import glob
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steel_megatron.config import TokenizerKind
from steel_megatron.data.indexed.dataset import IndexedCorpus, Origin, open_indexed, refuse_other_tokenizer, verify
from steel_megatron.data.indexed.format import BIN, IDX, ROWS, SUFFIXES
from steel_megatron.data.indexed.merge import merge
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import with_suffix
from steel_megatron.log import progress
from steel_megatron.streams import say

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)

_CHUNK = 1 << 20
"""Documents handled at a time."""
_SAMPLE_TOKENS, _SAMPLE_CHARACTERS = 200, 200
_BAR = 40
"""Characters of the longest bar of the histogram."""


@dataclass(frozen=True)
class Bin:
    """Documents of ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class SourceCounts:
    """What one source gave, as the manifests say."""

    source: str
    documents: int
    tokens: int
    text_bytes: int
    """Bytes of its text in UTF-8."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for."""
        return self.text_bytes / max(self.tokens, 1)


@dataclass(frozen=True)
class ShownDocument:
    """The begin of one document."""

    prefix: str
    document: int
    tokens: int
    text: str
    """Decoded, or the ids where there is no tokenizer."""
    origin: Origin | None


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found."""

    prefixes: list[str]
    dtypes: list[str]
    """How the ids of each corpus are stored."""
    documents: int
    tokens: int
    bytes: int
    """Bytes of all files but the manifests."""
    max_id: int | None
    """The largest id, where all manifests say."""
    quantiles: dict[str, int]
    """Tokens per document at each of :data:`QUANTILES`."""
    histogram: list[Bin]
    """Tokens per document, in bins that double."""
    sources: list[SourceCounts]
    """As far as the manifests say."""
    tokenizers: list[str]
    """Fingerprints that the manifests name; more than one: the corpora do not belong together."""
    without_manifest: list[str]
    """Corpora that say nothing of how they were made and have no checksums."""
    tokenizer_matches: bool | None
    """Whether the tokenizer given is the one recorded everywhere; None when nothing was given or recorded."""
    samples: list[ShownDocument]

    def as_json(self) -> str:
        """Everything, as JSON."""
        found = dataclasses.asdict(self)
        for entry, source in zip(found["sources"], self.sources, strict=True):
            entry["bytes_per_token"] = source.bytes_per_token
        return json.dumps(found, indent=2, ensure_ascii=False)

    def as_text(self) -> str:
        """Everything, to be read."""
        name = self.prefixes[0] if len(self.prefixes) == 1 else f"{len(self.prefixes)} corpora"
        lines = [
            f"{name}: {self.documents:,} documents, {self.tokens:,} tokens of {', '.join(sorted(set(self.dtypes)))}"
        ]
        if len(self.prefixes) > 1:
            lines += [f"  {prefix}" for prefix in self.prefixes]
        ids = "" if self.max_id is None else f"; the largest id is {self.max_id:,}"
        lines.append(f"{self.bytes / 1e6:,.1f} MB{ids}")
        lines += self._about_tokenizers()
        lines.append("tokens per document: " + ", ".join(f"{at} {size:,}" for at, size in self.quantiles.items()))
        most = max(bin.documents for bin in self.histogram)
        for bin in self.histogram:
            bar = "#" * round(_BAR * bin.documents / most)
            lines.append(f"  {bin.low:>13,} to {bin.high:>13,}: {bin.documents:>13,} {bar}")
        if self.sources:
            lines.append(f"{'source':<16} {'documents':>13} {'tokens':>17} {'bytes/token':>12}")
        for of in self.sources:
            lines.append(f"{of.source:<16} {of.documents:>13,} {of.tokens:>17,} {of.bytes_per_token:>12.3f}")
        for sample in self.samples:
            origin = f", row {sample.origin.row:,} of {sample.origin.path}" if sample.origin else ""
            where = f" of {sample.prefix}" if len(self.prefixes) > 1 else ""
            lines.append(f"document {sample.document}{where} ({sample.tokens:,} tokens{origin}): {sample.text!r}")
        return "\n".join(lines)

    def _about_tokenizers(self) -> list[str]:
        lines = []
        if len(self.tokenizers) > 1:
            lines.append(
                f"warning: made with {len(self.tokenizers)} different tokenizers: {', '.join(self.tokenizers)}"
            )
        elif self.tokenizers:
            given = "" if self.tokenizer_matches is None else ", which is the one given"
            lines.append(f"tokenizer: {self.tokenizers[0]}{given}")
        if self.without_manifest:
            lines.append(f"without a manifest, so without checksums: {', '.join(self.without_manifest)}")
        return lines


def expand_prefixes(prefixes: Sequence[str]) -> list[str]:
    """Prefixes of corpora, in order, each once; a pattern stands for what matches it, sorted.

    The name of one of a corpus' files stands for the corpus, so that a shell may expand the pattern.

    Raises:
        DataError: a pattern matches no corpus, or no prefix was given.
    """
    found: dict[str, None] = {}
    for prefix in prefixes:
        suffix = next((suffix for suffix in SUFFIXES if prefix.endswith(suffix)), "")
        if suffix and not with_suffix(prefix, IDX).exists():
            prefix = prefix.removesuffix(suffix)
        if glob.has_magic(prefix) and not with_suffix(prefix, IDX).exists():
            matches = [path.removesuffix(IDX) for path in sorted(glob.glob(prefix + IDX))]
            if not matches:
                raise DataError(f"no corpus matches {prefix} (there is no {prefix}{IDX})")
        else:
            matches = [prefix]
        found |= dict.fromkeys(matches)
    if not found:
        raise DataError("no corpus was given; name at least one prefix of .bin and .idx files")
    return list(found)


def inspect(prefixes: Sequence[str], tokenizer: Tokenizer | None = None, samples: int = 3) -> Inspection:
    """Look into corpora, taken together.

    Args:
        prefixes: prefixes or patterns, see :func:`expand_prefixes`.
        tokenizer: decodes samples; all ids must be its own.
        samples: documents to show, evenly spread.

    Raises:
        ConfigError: ``samples`` is negative.
        DataError: a corpus is damaged, or was made with another tokenizer.
    """
    if samples < 0:
        raise ConfigError(f"samples is {samples}; it must be at least 0")
    vocab_size = tokenizer.vocab_size if tokenizer is not None else None
    corpora = [open_indexed(prefix, vocab_size) for prefix in expand_prefixes(prefixes)]
    manifests = [corpus.manifest or {} for corpus in corpora]
    recorded = [of.get("tokenizer", {}).get("fingerprint") for of in manifests]
    if tokenizer is not None:
        for corpus in corpora:
            refuse_other_tokenizer(corpus, tokenizer.fingerprint)
    lengths, counts = _length_counts(corpora)
    return Inspection(
        prefixes=[corpus.prefix for corpus in corpora],
        dtypes=[corpus.dtype.name for corpus in corpora],
        documents=sum(corpus.documents for corpus in corpora),
        tokens=sum(corpus.tokens for corpus in corpora),
        bytes=sum(sum(corpus.files.values()) for corpus in corpora),
        max_id=max(of["max_id"] for of in manifests) if all(manifests) else None,
        quantiles=_quantiles(lengths, counts),
        histogram=_histogram(lengths, counts),
        sources=_sources(corpora),
        tokenizers=sorted({str(fingerprint) for fingerprint in recorded if fingerprint is not None}),
        without_manifest=[corpus.prefix for corpus in corpora if corpus.manifest is None],
        tokenizer_matches=True if tokenizer is not None and None not in recorded else None,
        samples=_samples(corpora, tokenizer, samples),
    )


def _length_counts(corpora: Sequence[IndexedCorpus]) -> tuple[np.ndarray, np.ndarray]:
    """The different lengths of documents, in order, and how many have each.

    There are at most about sqrt(2 tokens) different ones, so memory stays small where the lengths themselves would
    not fit.
    """
    lengths = counts = np.empty(0, np.int64)
    for corpus in corpora:
        for at in range(0, corpus.documents, _CHUNK):
            here, often = np.unique(corpus.sizes[at : at + _CHUNK], return_counts=True)
            both, places = np.unique(np.concatenate((lengths, here)), return_inverse=True)
            counts = np.bincount(places, np.concatenate((counts, often))).astype(np.int64)
            lengths = both
    return lengths, counts


def _quantiles(lengths: np.ndarray, counts: np.ndarray) -> dict[str, int]:
    ends = np.cumsum(counts)
    last = int(ends[-1]) - 1
    places = [np.searchsorted(ends, round(quantile * last), side="right") for quantile in QUANTILES]
    return {f"{quantile:.0%}": int(lengths[place]) for quantile, place in zip(QUANTILES, places, strict=True)}


def _histogram(lengths: np.ndarray, counts: np.ndarray) -> list[Bin]:
    bits = np.frexp(lengths.astype(np.float64))[1]  # a length of n bits is in the bin 2^(n-1) to 2^n - 1
    bins = []
    for n in range(int(bits[0]), int(bits[-1]) + 1):
        here = bits == n
        documents, tokens = int(counts[here].sum()), int((counts[here] * lengths[here]).sum())
        bins.append(Bin(1 << n >> 1, (1 << n) - 1, documents, tokens))
    return bins


def _sources(corpora: Sequence[IndexedCorpus]) -> list[SourceCounts]:
    fields = ("documents", "tokens", "text_bytes")
    sums: dict[str, list[int]] = {}
    for entry in (entry for corpus in corpora for entry in (corpus.manifest or {}).get("inputs", [])):
        if all(type(entry.get(field)) is int for field in fields):
            counts = sums.setdefault(str(entry.get("source", "unknown")), [0, 0, 0])
            counts[:] = [count + entry[field] for count, field in zip(counts, fields, strict=True)]
    return [SourceCounts(source, *counts) for source, counts in sums.items()]


def _samples(corpora: Sequence[IndexedCorpus], tokenizer: Tokenizer | None, samples: int) -> list[ShownDocument]:
    ends = np.cumsum([corpus.documents for corpus in corpora])
    total = int(ends[-1])
    shown = []
    for number in np.linspace(0, total - 1, min(samples, total)).astype(np.int64).tolist():
        place = int(np.searchsorted(ends, number, side="right"))
        corpus = corpora[place]
        document = number - int(ends[place]) + corpus.documents
        size = int(corpus.sizes[document])
        ids = corpus.tokens_of(document, 0, min(size, _SAMPLE_TOKENS)).tolist()
        text = tokenizer.decode(ids)[:_SAMPLE_CHARACTERS] if tokenizer else " ".join(map(str, ids[:20]))
        shown.append(ShownDocument(corpus.prefix, document, size, text, corpus.origin(document)))
    return shown


def _bytes(prefixes: Sequence[str], suffixes: Sequence[str]) -> int:
    """Bytes to read; a missing file is reported by the function that reads it."""
    paths = (with_suffix(prefix, suffix) for prefix in prefixes for suffix in suffixes)
    return sum(path.stat().st_size for path in paths if path.is_file())


def inspect_corpus(
    prefix: list[str],
    tokenizer_path: str | None = None,
    tokenizer_kind: TokenizerKind = "huggingface",
    samples: int = 3,
    json_output: bool = False,
) -> None:
    """Show what indexed corpora hold: counts, lengths, bytes per token by source, samples.

    Args:
        prefix: corpora without .bin or .idx, or patterns such as data/corpus_text_document_*.
        tokenizer_path: the tokenizer's folder or file; decodes the samples and checks that it is the corpus' own.
        tokenizer_kind: what it is.
        samples: documents to show, evenly spread.
        json_output: whether to write JSON.
    """
    found = inspect(prefix, load_tokenizer(tokenizer_kind, tokenizer_path) if tokenizer_path else None, samples)
    sys.stdout.write((found.as_json() if json_output else found.as_text()) + "\n")


def verify_corpus(prefixes: list[str], vocab_size: int | None = None, workers: int | None = None) -> None:
    """Read indexed corpora in full and check their structure, ids and checksums.

    Args:
        prefixes: corpora without .bin or .idx, or patterns such as data/corpus_text_document_*.
        vocab_size: all ids must be below it; what the corpus' manifest says if not given.
        workers: threads that read; one per processor, up to 8, if not given.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; it must be at least 1")
    found = expand_prefixes(prefixes)
    with progress("verify", _bytes(found, (BIN, IDX, ROWS)), "bytes") as bar:
        for prefix in found:
            result = verify(prefix, vocab_size, bar.advance, workers)
            checksums = "checksums match" if result.checksums else "no manifest, so no checksums to compare"
            say(
                f"{prefix}: {result.documents:,} documents, {result.tokens:,} tokens; structure in order, largest id "
                f"{result.max_id}, {checksums}"
            )


def merge_corpora(prefixes: list[str], output: str, overwrite: bool = False) -> None:
    """Write indexed corpora as one, in the given order, without loading them.

    Args:
        prefixes: corpora without .bin or .idx, or patterns such as data/corpus_text_document_*.
        output: where the new corpus goes, without .bin or .idx.
        overwrite: whether to replace an earlier corpus of that name.
    """
    if not Path(output).name or output.endswith("/"):
        raise ConfigError(f"output is {output!r}; it must end in a name, such as data/corpus")
    found = expand_prefixes(prefixes)
    with progress("merge", _bytes(found, (BIN,)), "bytes") as bar:
        manifest = merge(found, output, overwrite, bar.advance)
    say(f"{output}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens of {len(found)} corpora")
