"""The manifest of an indexed corpus: what is recorded next to the tokens, and how it is checked against the files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from steel_megatron.data.strict_json import SHA256, Rule, from_json, list_of, shown, whole
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors

FORMAT = "steel-megatron-indexed-2"
"""Name and version of the manifest."""
OWN_FIELDS = ("format", "documents", "tokens", "dtype", "max_id", "block_bytes", "blocks", "content")
"""What the writer records by itself; everything else comes from who uses it."""

_EARLIER = "steel-megatron-indexed-1"
_COUNTS = ("documents", "tokens", "text_bytes")
"""What an entry of the inputs counts; the rest of it identifies the file."""
_BLOCK_BYTES = Rule(lambda value: whole(8).holds(value) and value % 8 == 0, "a multiple of 8")
_NUMBER = Rule(lambda value: type(value) is int, "a whole number")
_OBJECT = Rule(lambda value: isinstance(value, dict), "an object")
_DIGESTS = list_of(SHA256, "a list of SHA-256 digests")
_BLOCKS = Rule(
    lambda value: isinstance(value, dict) and all(map(_DIGESTS.holds, value.values())), "SHA-256 digests by file"
)
_TOKENIZER = Rule(
    lambda value: isinstance(value, dict) and type(value.get("vocab_size", 0)) is int,
    "an object whose vocab_size is a whole number",
)


@dataclass(frozen=True)
class _Fields:
    """The fields of a manifest that this library reads; others are left to who recorded them."""

    dtype: str
    documents: int
    max_id: Annotated[int, _NUMBER]
    block_bytes: Annotated[int, _BLOCK_BYTES]
    blocks: Annotated[Mapping[str, Sequence[str]], _BLOCKS]
    content: Annotated[str, SHA256]
    tokenizer: Annotated[Mapping[str, Any], _TOKENIZER] = dataclasses.field(default_factory=dict)
    inputs: Annotated[Sequence[Mapping[str, Any]], list_of(_OBJECT, "a list of objects")] = ()


def content_of(dtype: str, blocks: Mapping[str, Sequence[str]]) -> str:
    """The identity of a corpus' tokens and documents, whatever its path: hex SHA-256 over dtype and block digests.

    Args:
        dtype: name of the token dtype.
        blocks: hex digests of the blocks of ``bin`` and ``idx``.
    """
    lines = [f"dtype {dtype}", *(f"{name} {digest}" for name in ("bin", "idx") for digest in blocks[name])]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_manifest(path: Path, found: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Read a manifest and check it against the files it describes.

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
    where = f"manifest {path} is damaged"
    _check_files(from_json(_Fields, manifest, where, strict=False), where, sizes)
    return manifest


def _check_files(manifest: _Fields, where: str, sizes: Mapping[str, int]) -> None:
    """Hold the fields of a manifest against the files and against each other."""
    blocks = manifest.blocks
    if not {"bin", "idx"} <= set(blocks) <= set(sizes):
        raise DataError(f"{where}: blocks is of {', '.join(blocks) or 'no file'}; it must be of bin and idx")
    for name, digests in blocks.items():
        count = -(-sizes[name] // manifest.block_bytes)
        if len(digests) != count:
            raise DataError(f"{where}: blocks has {len(digests)} digests for {name}; it must have {count}")
    content = content_of(manifest.dtype, blocks)
    if manifest.content != content:
        raise DataError(f"{where}: content is {manifest.content}; it must be {content}, which its blocks give")
    if "rows" in blocks:
        counts: list[Any] = [entry.get("documents") for entry in manifest.inputs]
        if not all(map(whole().holds, counts)) or sum(counts) != manifest.documents:
            raise DataError(
                f"{where}: inputs is of files with {shown(counts)} documents; it must be of files with "
                f"{manifest.documents:,} documents together"
            )


def merged_extra(manifests: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What the manifest of merged corpora says in addition to what the writer records.

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
