"""Writing Megatron's indexed format: document by document, in bounded memory, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from steel_megatron.data.indexed import DTYPES, FORMAT, HEADER, MAGIC, SUFFIXES, mapped, open_indexed, partial
from steel_megatron.errors import DataError
from steel_megatron.files import (
    disk_errors,
    exclusive_lock,
    remove,
    sha256_of,
    sync_folder,
    with_suffix,
)

_CHUNK = 1 << 20
"""Elements handled at a time when an index is written."""


def refuse_existing(prefix: str | Path, overwrite: bool) -> None:
    """Raise a DataError when a file of a corpus is there and may not be replaced."""
    found = [path for suffix in SUFFIXES if (path := with_suffix(prefix, suffix)).exists()]
    if found and not overwrite:
        raise DataError(f"{found[0]} exists already; choose another prefix, or allow it to be replaced with overwrite")


def _close_synced(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _close_unwritten(file: IO[bytes]) -> None:
    """Close a file that is to be removed; what a full disk does not take of its buffer is of no interest."""
    with suppress(OSError):
        file.close()


class IndexedWriter:
    """Writes one corpus; memory does not grow with it.

    Nothing appears under the final names before :meth:`commit`. The writer is a context manager: left without a
    commit, it removes what it wrote.

    Args:
        prefix: path of the corpus without a suffix.
        dtype: how ids are stored, see :func:`token_dtype`.
        overwrite: whether a corpus that is there may be replaced.

    Raises:
        DataError: a corpus is there and may not be replaced, another job is writing it, or the disk refuses.
    """

    def __init__(
        self, prefix: str | Path, dtype: np.dtype[Any] | type[np.integer[Any]], overwrite: bool = False
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        assert codes, f"{self.dtype} is no dtype for token ids"
        self._code = codes[0]
        self.documents = self.tokens = 0
        self.max_id = -1
        self._final = [with_suffix(prefix, suffix) for suffix in SUFFIXES]
        self._manifest: dict[str, Any] = {}
        self._prepared = self._committed = False
        self._bin_hash = hashlib.sha256()
        self._open = ExitStack()
        with ExitStack() as opened:  # closes again what was opened when a later step fails
            opened.enter_context(exclusive_lock(prefix, DataError))
            refuse_existing(self.prefix, overwrite)
            opened.callback(self._remove_partial)
            with disk_errors("write", self._final[0], DataError):
                self._bin = partial(self._final[0]).open("wb")
                opened.callback(_close_unwritten, self._bin)
                self._idx = partial(self._final[1]).open("wb")
                opened.callback(_close_unwritten, self._idx)
                self._idx.write(bytes(HEADER.size))
            self._open = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        if exception_type is not None or not self._committed:
            self.discard()

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document.

        Raises:
            DataError: an id does not fit the dtype, or the disk is full.
        """
        self.add_documents(np.asarray(ids), [len(ids)])

    def add_documents(self, ids: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Append documents that lie one after the other.

        Args:
            ids: all their ids [tokens].
            lengths: tokens of each document [documents].

        Raises:
            DataError: an id does not fit the dtype, a document is too long, or the disk is full.
        """
        sizes = np.asarray(lengths, dtype=np.int64)
        assert int(sizes.sum()) == len(ids), (int(sizes.sum()), len(ids))
        self._append_tokens(ids)
        self._append_lengths(sizes)

    def _append_tokens(self, ids: np.ndarray) -> None:
        if len(ids):
            low, high, top = int(ids.min()), int(ids.max()), int(np.iinfo(self.dtype).max)
            if low < 0 or high > top:
                raise DataError(
                    f"token id {low if low < 0 else high} does not fit {self.dtype} (0 to {top}) of {self.prefix}"
                )
            self.max_id = max(self.max_id, high)
        content = np.ascontiguousarray(ids, dtype=self.dtype).view(np.uint8).data
        self._bin_hash.update(content)
        with disk_errors("write", self._final[0], DataError):
            self._bin.write(content)
        self.tokens += len(ids)

    def _append_lengths(self, sizes: np.ndarray) -> None:
        longest = int(sizes.max(initial=0))
        if longest > np.iinfo(np.int32).max:
            raise DataError(f"a document of {longest:,} tokens is too long for the format (2,147,483,647 at most)")
        with disk_errors("write", self._final[1], DataError):
            self._idx.write(sizes.astype(np.int32).tobytes())
        self.documents += len(sizes)

    def prepare(self, manifest: Mapping[str, Any]) -> None:
        """Complete all three files on disk, still under their temporary names.

        Args:
            manifest: what to record beside the counts and checksums, such as the tokenizer and the inputs.

        Raises:
            DataError: the disk is full.
        """
        with disk_errors("write", self._final[0], DataError):
            _close_synced(self._bin)
        with disk_errors("write", self._final[1], DataError):
            self._write_positions()
            _close_synced(self._idx)
            idx_hash = sha256_of(partial(self._final[1]))
        self._manifest = {
            "format": FORMAT,
            "documents": self.documents,
            "tokens": self.tokens,
            "dtype": self.dtype.name,
            "max_id": self.max_id,
            "sha256": {"bin": self._bin_hash.hexdigest(), "idx": idx_hash},
            **manifest,
        }
        with disk_errors("write", self._final[2], DataError), partial(self._final[2]).open("wb") as file:
            file.write(json.dumps(self._manifest, indent=2, ensure_ascii=False).encode() + b"\n")
            _close_synced(file)
        self._prepared = True

    def _write_positions(self) -> None:
        """Complete the index behind the lengths that are already in it."""
        self._idx.flush()
        lengths = mapped(partial(self._final[1]), np.dtype(np.int32), HEADER.size, self.documents)
        position = 0
        for start in range(0, self.documents, _CHUNK):
            sizes = lengths[start : start + _CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = position + np.cumsum(sizes)
            self._idx.write((ends - sizes).tobytes())
            position = int(ends[-1])
        for start in range(0, self.documents + 1, _CHUNK):
            self._idx.write(np.arange(start, min(start + _CHUNK, self.documents + 1), dtype=np.int64).tobytes())
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, 1, self._code, self.documents, self.documents + 1))

    def commit(self) -> None:
        """Give the prepared files their final names, the manifest last.

        A corpus that is replaced loses its manifest and index first. A crash on the way leaves a manifest under
        its temporary name only, which :func:`open_indexed` refuses as unfinished.
        """
        assert self._prepared, "commit() before prepare()"
        bin_path, idx_path, manifest_path = self._final
        with disk_errors("rename", bin_path, DataError):
            manifest_path.unlink(missing_ok=True)
            idx_path.unlink(missing_ok=True)
            sync_folder(bin_path.parent)
            self._committed = True  # the old corpus is gone; discard() may remove the final names
            for path in self._final:
                partial(path).replace(path)
            sync_folder(bin_path.parent)
        self._open.close()

    def discard(self) -> None:
        """Remove everything this writer wrote, also after :meth:`commit` (when a corpus beside it failed)."""
        if self._committed:
            for path in reversed(self._final):
                remove(path)
        self._open.close()

    def _remove_partial(self) -> None:
        for path in self._final:
            remove(partial(path))

    def finalize(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the corpus and give it its final names; returns the manifest as written."""
        self.prepare(manifest)
        self.commit()
        return self._manifest


def merge(prefixes: Sequence[str | Path], output: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write several corpora as one, in the given order, in bounded memory.

    Args:
        prefixes: corpora of one dtype and, as far as their manifests say, one tokenizer.
        output: prefix of the new corpus.
        overwrite: whether a corpus at ``output`` may be replaced.

    Returns:
        The manifest of the new corpus.

    Raises:
        DataError: the corpora do not fit together, one is damaged, or the output cannot be written.
    """
    corpora = [open_indexed(prefix) for prefix in prefixes]
    if not corpora:
        raise DataError("merge needs at least one corpus")
    dtypes = {corpus.dtype: corpus.prefix for corpus in corpora}
    if len(dtypes) > 1:
        found = ", ".join(f"{dtype} in {prefix}" for dtype, prefix in dtypes.items())
        raise DataError(f"corpora of different dtypes cannot be merged: {found}")
    manifests = [corpus.manifest or {} for corpus in corpora]
    tokenizers = {json.dumps(found["tokenizer"]): found["tokenizer"] for found in manifests if "tokenizer" in found}
    if len(tokenizers) > 1:
        raise DataError(f"corpora of {len(tokenizers)} different tokenizers cannot be merged: {', '.join(tokenizers)}")
    with IndexedWriter(output, corpora[0].dtype, overwrite) as writer:
        for corpus in corpora:
            for at in range(0, corpus.tokens, _CHUNK):
                writer._append_tokens(corpus.flat[at : at + _CHUNK])
            for at in range(0, corpus.documents, _CHUNK):
                writer._append_lengths(corpus.sizes[at : at + _CHUNK])
        extra: dict[str, Any] = {"inputs": [entry for found in manifests for entry in found.get("inputs", [])]}
        if len(tokenizers) == 1 and all("tokenizer" in found for found in manifests):
            extra["tokenizer"] = next(iter(tokenizers.values()))
        return writer.finalize(extra)
