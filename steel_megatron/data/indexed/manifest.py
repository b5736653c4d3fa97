"""The manifest of an indexed corpus: what is recorded beside the tokens, and how it is held against the files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors

FORMAT = "steel-megatron-indexed-2"
"""Name and version of the manifest."""
OWN_FIELDS = ("format", "documents", "tokens", "dtype", "max_id", "block_bytes", "blocks", "content")
"""What the writer records by itself; everything else comes from who uses it."""

_EARLIER = "steel-megatron-indexed-1"
_COUNTS = ("documents", "tokens", "text_bytes")
"""What an entry of the inputs counts; the rest of it identifies the file."""
_DIGEST = re.compile("[0-9a-f]{64}")


def content_of(dtype: str, blocks: Mapping[str, Sequence[str]]) -> str:
    """The identity of a corpus' tokens and documents, whatever its path: hex SHA-256 over dtype and block digests.

    Args:
        dtype: name of the token dtype.
        blocks: hex digests of the blocks of ``bin`` and ``idx``.
    """
    lines = [f"dtype {dtype}", *(f"{name} {digest}" for name in ("bin", "idx") for digest in blocks[name])]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_manifest(path: Path, found: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Read a manifest and hold it against the files it describes.

    Args:
        path: the manifest.
        found: ``documents``, ``tokens`` and ``dtype`` as the files have them.
        sizes: bytes of ``bin`` and ``idx``, and what ``rows`` has if there is one.

    Raises:
        DataError: the manifest is damaged, or describes another corpus.
    """
    with disk_errors("read", path, DataError):
        content = path.read_bytes()
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"manifest {path} cannot be read: {error}") from error
    name = manifest.get("format") if isinstance(manifest, dict) else None
    if name == _EARLIER:
        raise DataError(
            f"{path} was made by an earlier version (format {_EARLIER!r}, this is {FORMAT!r}); make the corpus again, "
            "or move the manifest away to read the corpus without checksums"
        )
    if name != FORMAT:
        raise DataError(f"{path} is no manifest of format {FORMAT!r}; move it away if it belongs to something else")
    for field, value in found.items():
        if manifest.get(field) != value:
            raise DataError(
                f"{path} describes another corpus: {field} is {value}, recorded is {manifest.get(field)}; files of two "
                "corpora were mixed up"
            )
    _check_fields(path, manifest, sizes)
    return manifest


def _check_fields(path: Path, manifest: dict[str, Any], sizes: Mapping[str, int]) -> None:
    def require(holds: bool, field: str, right: str) -> None:
        """Raise a DataError unless a condition holds.

        Args:
            holds: the condition.
            field: the manifest's field that it concerns.
            right: what the field must be, for the message.
        """
        if not holds:
            raise DataError(f"manifest {path} is damaged: {field} is {str(manifest.get(field))[:80]}, not {right}")

    block_bytes, blocks, inputs = (manifest.get(field) for field in ("block_bytes", "blocks", "inputs"))
    tokenizer = manifest.get("tokenizer", {})
    require(type(manifest.get("max_id")) is int, "max_id", "a number")
    known = isinstance(tokenizer, dict) and type(tokenizer.get("vocab_size", 0)) is int
    require(known, "tokenizer", "an object with a number of ids")
    require(_is_list(manifest.get("inputs", []), dict), "inputs", "a list of objects")
    require(type(block_bytes) is int and block_bytes > 0 and block_bytes % 8 == 0, "block_bytes", "a multiple of 8")
    require(isinstance(blocks, dict) and {"bin", "idx"} <= set(blocks) <= set(sizes), "blocks", "those of bin and idx")
    assert isinstance(block_bytes, int) and isinstance(blocks, dict)
    for name, digests in blocks.items():
        count = -(-sizes[name] // block_bytes)
        whole = _is_list(digests, str) and len(digests) == count and all(map(_DIGEST.fullmatch, digests))
        require(whole, "blocks", f"{count} SHA-256 digests for {name}")
    content = content_of(manifest["dtype"], blocks)
    require(manifest.get("content") == content, "content", f"{content}, which its blocks give")
    if "rows" in blocks:
        counts = [entry.get("documents") for entry in inputs or []]
        whole = all(type(count) is int and count >= 0 for count in counts) and sum(counts) == manifest["documents"]
        require(whole, "inputs", f"files with {manifest['documents']:,} documents together")


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def merged_extra(manifests: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What the manifest of merged corpora says beside what the writer records.

    Kept is what all manifests say alike; the inputs follow each other, those of one file that was cut into shards
    counted together.

    Args:
        manifests: prefix and manifest of each corpus, in order; ``{}`` for a corpus without one.

    Raises:
        DataError: the tokenizers differ, or only some corpora end their documents with a token of their own.
    """
    for field in ("tokenizer", "append_eod"):
        values = {json.dumps(of[field], sort_keys=True): prefix for prefix, of in manifests if field in of}
        if len(values) > 1:
            raise DataError(
                f"corpora that differ in {field} cannot be merged: "
                + ", ".join(f"{value} in {prefix}" for value, prefix in values.items())
            )
    first, *others = (of for _, of in manifests)
    extra = {
        field: value
        for field, value in first.items()
        if field not in (*OWN_FIELDS, "inputs") and all(field in of and of[field] == value for of in others)
    }
    return {**extra, "inputs": _joined([entry for of in (first, *others) for entry in of.get("inputs", [])])}


def _joined(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of one file that follow each other as one."""
    joined: list[dict[str, Any]] = []
    for entry in inputs:
        last = joined[-1] if joined else {}
        counted = all(type(of.get(count)) is int for of in (last, entry) for count in _COUNTS)
        if counted and all(last.get(field) == entry.get(field) for field in {*last, *entry} - {*_COUNTS}):
            joined[-1] = {**entry, **{count: last[count] + entry[count] for count in _COUNTS}}
        else:
            joined.append(entry)
    return joined
