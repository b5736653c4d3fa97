"""Several indexed corpora as one, without loading them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_megatron.data.indexed.checksums import BLOCK_BYTES, BlockHasher
from steel_megatron.data.indexed.dataset import IndexedCorpus, check_digests, open_indexed, scan_file
from steel_megatron.data.indexed.format import BIN, IDX, ROWS
from steel_megatron.data.indexed.manifest import merged_extra
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors
from steel_megatron.log import get_logger

_PIECE = 1 << 22
"""Bytes copied at a time."""
_CHUNK = 1 << 20
"""Documents handled at a time."""

logger = get_logger(__name__)


def merge(
    prefixes: Sequence[str | Path],
    output: str | Path,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, Any]:
    """Write several corpora as one, in the given order, in bounded memory.

    The ``.bin`` and ``.idx`` are those that writing all documents at once would have given. What has checksums is
    compared with them while copying: new ones must not vouch for damaged tokens.

    Args:
        prefixes: corpora of one dtype and, as far as their manifests say, one tokenizer.
        output: prefix of the new corpus.
        overwrite: whether a corpus at ``output`` may be replaced.
        on_bytes: called with the bytes of each piece of tokens that was copied.
        block_bytes: see :class:`~steel_megatron.data.indexed.writer.IndexedWriter`.

    Returns:
        The manifest of the new corpus.

    Raises:
        DataError: the corpora do not fit together, one is damaged, or the output cannot be written.
    """
    corpora = [open_indexed(prefix) for prefix in prefixes]
    if not corpora:
        raise DataError("merge needs at least one corpus")
    if Path(output).resolve() in (Path(prefix).resolve() for prefix in prefixes):
        raise DataError(f"{output} is to be merged into itself; choose another output, or leave it out of the inputs")
    dtypes = {corpus.dtype: corpus.prefix for corpus in corpora}
    if len(dtypes) > 1:
        found = ", ".join(f"{dtype} in {prefix}" for dtype, prefix in dtypes.items())
        raise DataError(f"corpora of different dtypes cannot be merged: {found}")
    extra = merged_extra([(corpus.prefix, corpus.manifest or {}) for corpus in corpora])
    without = [corpus.prefix for corpus in corpora if corpus.rows is None]
    if without and len(without) < len(corpora):
        logger.warning(f"{', '.join(without)} do not say where their documents came from; nor will {output}")
    with IndexedWriter(output, corpora[0].dtype, overwrite, block_bytes=block_bytes) as writer:
        for corpus in corpora:
            _copy_tokens(corpus, writer, on_bytes)
            _copy_documents(corpus, writer, with_rows=not without)
        return writer.finalize(extra)


def _copy_tokens(corpus: IndexedCorpus, writer: IndexedWriter, on_bytes: Callable[[int], None] | None) -> None:
    path, left = corpus.path(BIN), corpus.files[BIN]
    hasher = BlockHasher(corpus.manifest["block_bytes"]) if corpus.manifest is not None else None
    buffer = bytearray(min(_PIECE, left))
    with disk_errors("read", path, DataError), path.open("rb") as file:
        while left:
            piece = memoryview(buffer)[: min(_PIECE, left)]
            if file.readinto(piece) != len(piece):
                raise DataError(f"{path} was cut short while it was read")
            if hasher is not None:
                hasher.update(piece)
            writer.add_tokens(np.frombuffer(piece, corpus.dtype))
            left -= len(piece)
            if on_bytes:
                on_bytes(len(piece))
    if hasher is not None:
        check_digests(corpus, BIN, hasher.blocks)


def _copy_documents(corpus: IndexedCorpus, writer: IndexedWriter, with_rows: bool) -> None:
    if corpus.manifest is not None:
        for suffix in (IDX, ROWS) if with_rows else (IDX,):
            scan_file(corpus, suffix)
    for at in range(0, corpus.documents, _CHUNK):
        rows = corpus.rows[at : at + _CHUNK] if with_rows and corpus.rows is not None else None
        writer.add_lengths(corpus.sizes[at : at + _CHUNK], rows)
