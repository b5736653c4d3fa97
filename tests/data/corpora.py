"""Small indexed corpora: ours and megatron-core's."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from steel_megatron.data.indexed.checksums import BLOCK_BYTES
from steel_megatron.data.indexed.writer import IndexedWriter

DOCUMENTS = [[5, 6, 7], [1], [], [65_000, 2, 3, 4], list(range(3000))]


def write(
    prefix: Path,
    documents: Sequence[Sequence[int]] = DOCUMENTS,
    dtype: type = np.uint16,
    block_bytes: int = BLOCK_BYTES,
    rows: Sequence[int] | None = None,
    overwrite: bool = False,
    **manifest: object,
) -> str:
    """A corpus of the library's; ``rows`` needs ``inputs``."""
    with IndexedWriter(prefix, dtype, overwrite, block_bytes=block_bytes) as writer:
        for number, document in enumerate(documents):
            writer.add_documents(np.array(document, np.int64), [len(document)], rows and rows[number : number + 1])
        writer.finalize(manifest)
    return str(prefix)


def write_megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: type = np.uint16) -> str:
    """Megatron's own builder; a document is a list of sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        flat = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(flat, dtype=torch.int64), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def inputs(*documents: int) -> list[dict[str, object]]:
    """What a manifest says of input files that gave so many documents each."""
    return [
        {"path": f"in{number}.jsonl", "source": "text", "documents": count, "tokens": 10 * count, "text_bytes": count}
        for number, count in enumerate(documents)
    ]


def content(prefix: str | Path) -> dict[str, bytes]:
    """All files of a folder's corpus by suffix."""
    folder, name = Path(prefix).parent, Path(prefix).name
    return {path.name.removeprefix(name): path.read_bytes() for path in folder.iterdir() if path.name.startswith(name)}


FILE_LIMIT = 4096
"""Bytes a file may have in :func:`limited`."""


def limited(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that can write no larger file than FILE_LIMIT; that fails as a full disk does."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT)),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
