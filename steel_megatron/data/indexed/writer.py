"""Writing Megatron's indexed format: document by document, in bounded memory, atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from steel_megatron.data.indexed.checksums import BLOCK_BYTES, BlockHasher, scan_blocks
from steel_megatron.data.indexed.format import (
    BIN,
    DTYPES,
    HEADER,
    IDX,
    MAGIC,
    MANIFEST,
    ROWS,
    ROWS_HEADER_BYTES,
    SUFFIXES,
    mapped,
    partial,
    rows_header,
)
from steel_megatron.data.indexed.manifest import FORMAT, OWN_FIELDS, content_of
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, exclusive_lock, remove, sync_folder, with_suffix

_CHUNK = 1 << 20
"""Elements handled at a time when an index is written, bytes when one is read again."""


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
    """Close a file that nobody counts on; what a full disk does not take of its buffer is of no interest."""
    with suppress(OSError):
        file.close()


class IndexedWriter:
    """Writes one corpus; memory does not grow with it.

    Nothing appears under the final names before :meth:`finalize`. The writer is a context manager: left without that,
    it removes what it wrote.

    Args:
        prefix: path of the corpus without a suffix.
        dtype: how ids are stored, see :func:`~steel_megatron.data.indexed.dataset.token_dtype`.
        overwrite: whether a corpus that is there may be replaced.
        block_bytes: size of the blocks that checksums are kept of; a multiple of 8.

    Raises:
        DataError: a corpus is there and may not be replaced, another job is writing it, or the disk refuses.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: np.dtype[Any] | type[np.integer[Any]],
        overwrite: bool = False,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        assert codes, f"{self.dtype} is no dtype for token ids"
        assert block_bytes > 0 and block_bytes % 8 == 0, block_bytes
        self._code = codes[0]
        self.documents = self.tokens = 0
        self.max_id = -1
        self._final = {suffix: with_suffix(prefix, suffix) for suffix in SUFFIXES}
        self._files: dict[str, IO[bytes]] = {}
        self._finished = False
        self._whole = True  # tokens and lengths are in step; not within or after a write that was cut short
        self._hasher = BlockHasher(block_bytes)
        with ExitStack() as opened:  # closes again what was opened when a later step fails
            self._open = opened
            opened.enter_context(exclusive_lock(prefix, DataError))
            opened.callback(self._remove_partial)
            refuse_existing(self.prefix, overwrite)
            self._remove_partial()  # of a job that was killed
            self._begin(BIN, b"")
            self._begin(IDX, bytes(HEADER.size))
            self._open = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document.

        Raises:
            DataError: an id does not fit the dtype, or the disk is full.
        """
        self.add_documents(np.asarray(ids), [len(ids)])

    def add_documents(
        self, ids: np.ndarray, lengths: Sequence[int] | np.ndarray, rows: Sequence[int] | np.ndarray | None = None
    ) -> None:
        """Append documents that lie one after the other.

        Args:
            ids: all their ids [tokens].
            lengths: tokens of each document [documents].
            rows: the row of each document in its input file, from 1 [documents]; for all documents of a corpus or
                for none. :meth:`finalize` then needs ``inputs`` that count the documents of each file.

        Raises:
            DataError: an id does not fit the dtype, a document is too long, or the disk is full.
        """
        sizes = np.asarray(lengths, dtype=np.int64)
        assert int(sizes.sum()) == len(ids), (int(sizes.sum()), len(ids))
        self.add_tokens(ids)
        self.add_lengths(sizes, rows)

    def add_tokens(self, ids: np.ndarray) -> None:
        """Append tokens [tokens] whose documents :meth:`add_lengths` tells; for :func:`merge`."""
        if len(ids):
            low, high, top = int(ids.min()), int(ids.max()), int(np.iinfo(self.dtype).max)
            if low < 0 or high > top:
                raise DataError(
                    f"token id {low if low < 0 else high} does not fit {self.dtype} (0 to {top}) of {self.prefix}"
                )
            self.max_id = max(self.max_id, high)
        content = np.ascontiguousarray(ids, dtype=self.dtype).view(np.uint8).data
        self._whole = False
        self._write(BIN, content)
        self._hasher.update(content)
        self.tokens += len(ids)

    def add_lengths(self, sizes: np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Append documents by their lengths, int64 [documents], and their rows [documents]; for :func:`merge`."""
        longest = int(sizes.max(initial=0))
        if longest > np.iinfo(np.int32).max:
            raise DataError(f"a document of {longest:,} tokens is too long for the format (2,147,483,647 at most)")
        if rows is not None and ROWS not in self._files and not self.documents:
            self._begin(ROWS, bytes(ROWS_HEADER_BYTES))
        assert (rows is None) == (ROWS not in self._files) or not len(sizes), "rows: for all documents or for none"
        if rows is not None:
            numbers = np.asarray(rows, dtype=np.int64)
            assert len(numbers) == len(sizes) and int(numbers.min(initial=1)) >= 1, "rows: one for each, from 1"
            self._write(ROWS, numbers.tobytes())
        self._write(IDX, sizes.astype(np.int32).tobytes())
        self.documents += len(sizes)
        self._whole = True

    def _write(self, suffix: str, content: bytes | memoryview) -> None:
        with disk_errors("write", self._final[suffix], DataError):
            self._files[suffix].write(content)

    def _begin(self, suffix: str, head: bytes) -> None:
        path = self._final[suffix]
        with disk_errors("write", path, DataError):
            self._files[suffix] = partial(path).open("w+b")
        self._open.callback(_close_unwritten, self._files[suffix])
        self._write(suffix, head)

    def finalize(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the corpus and give it its final names, the manifest last.

        A corpus that is replaced loses its manifest and index first. A crash in between leaves a manifest under
        its temporary name only, which :func:`~steel_megatron.data.indexed.dataset.open_indexed` refuses as unfinished.

        Args:
            manifest: what to record in addition to the counts and checksums, such as the tokenizer and the inputs.

        Returns:
            the manifest as written.

        Raises:
            DataError: the disk is full.
        """
        assert self._whole and not self._finished, "finalize() of a write that was cut short, or twice"
        assert not set(manifest) & set(OWN_FIELDS), set(manifest) & set(OWN_FIELDS)
        if ROWS in self._files:
            counted = sum(entry["documents"] for entry in manifest["inputs"])
            assert counted == self.documents, f"inputs have {counted} documents, {self.documents} were written"
            self._complete(ROWS, rows_header(self.documents))
        self._write_positions()
        self._complete(IDX, HEADER.pack(MAGIC, 1, self._code, self.documents, self.documents + 1))
        self._complete(BIN, b"")
        blocks = {"bin": self._hasher.blocks, "idx": self._digests(IDX)}
        content = content_of(self.dtype.name, blocks)
        if ROWS in self._files:
            blocks["rows"] = self._digests(ROWS)
        written = {
            "format": FORMAT,
            "documents": self.documents,
            "tokens": self.tokens,
            "dtype": self.dtype.name,
            "max_id": self.max_id,
            "content": content,
            **manifest,
            "block_bytes": self._hasher.block_bytes,
            "blocks": blocks,
        }
        self._begin(MANIFEST, json.dumps(written, indent=2, ensure_ascii=False).encode() + b"\n")
        self._complete(MANIFEST, b"")
        self._commit()
        return written

    def _complete(self, suffix: str, head: bytes) -> None:
        """Put the head of a file where its place was kept, and everything on the disk."""
        with disk_errors("write", self._final[suffix], DataError):
            self._files[suffix].seek(0)
            self._files[suffix].write(head)
            _close_synced(self._files[suffix])

    def _digests(self, suffix: str) -> list[str]:
        path = partial(self._final[suffix])
        with disk_errors("read", path, DataError):
            size = path.stat().st_size
        blocks = scan_blocks(path, size, self._hasher.block_bytes)
        return [block.digest for block in blocks]

    def _write_positions(self) -> None:
        """Complete the index behind the lengths that are already in it."""
        file = self._files[IDX]
        with disk_errors("write", self._final[IDX], DataError):
            file.flush()
            lengths = mapped(file, np.dtype(np.int32), HEADER.size, self.documents)
            file.seek(0, os.SEEK_END)
            position = 0
            for start in range(0, self.documents, _CHUNK):
                sizes = lengths[start : start + _CHUNK].astype(np.int64) * self.dtype.itemsize
                ends = position + np.cumsum(sizes)
                file.write((ends - sizes).tobytes())
                position = int(ends[-1])
            for start in range(0, self.documents + 1, _CHUNK):
                file.write(np.arange(start, min(start + _CHUNK, self.documents + 1), dtype=np.int64).tobytes())
        assert position == self.tokens * self.dtype.itemsize, (position, self.tokens)

    def _commit(self) -> None:
        folder = self._final[BIN].parent
        with disk_errors("rename", self._final[BIN], DataError), ExitStack() as failing:
            for suffix in (MANIFEST, IDX, ROWS):
                self._final[suffix].unlink(missing_ok=True)
            sync_folder(folder)
            for path in self._final.values():  # the manifest goes first: callbacks run in reverse
                failing.callback(remove, path)
            for suffix in SUFFIXES:
                if suffix == MANIFEST:
                    sync_folder(folder)  # it vouches for the others, so it must not be there without them
                if suffix in self._files:
                    partial(self._final[suffix]).replace(self._final[suffix])
            sync_folder(folder)
            failing.pop_all()
        self._finished = True
        self._open.close()

    def _remove_partial(self) -> None:
        for path in self._final.values():
            remove(partial(path))
