"""Texts as files of many forms."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import lz4.frame
import pyarrow
import zstandard
from warcio.warcwriter import WARCWriter

Pack = Callable[[bytes], bytes]
PACKED: dict[str, Pack] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".lz4": lz4.frame.compress,
}


def in_two(pack: Pack, content: bytes) -> bytes:
    """Two frames, as appending to such a file makes them."""
    return pack(content[: len(content) // 2]) + pack(content[len(content) // 2 :])


def csv_of(texts: list[str], **options: str) -> bytes:
    lines = io.StringIO()
    writer = csv.writer(lines, **options)  # type: ignore[arg-type]
    writer.writerows([["n", "text"], *([number, text] for number, text in enumerate(texts))])
    return lines.getvalue().encode()


def tar_of(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def samples_of(texts: list[str]) -> bytes:
    members = {}
    for number, text in enumerate(texts):
        name = f"文件夹/{'long' * 30}/{number:04d}"
        members[f"{name}.json"] = json.dumps({"n": number, "text": text}).encode()
        members[f"{name}.jpg"] = b"\xff\xd8"
        members[f"{name}.txt"] = text.encode()
    return tar_of(members)


def warc_of(texts: list[str], packed: bool = True) -> bytes:
    content = io.BytesIO()
    writer = WARCWriter(content, gzip=packed)
    writer.write_record(writer.create_warcinfo_record("a.warc", {"software": "x"}))
    for number, text in enumerate(texts):
        record = writer.create_warc_record(
            f"http://e.org/{number}", "conversion", payload=io.BytesIO(text.encode()), warc_content_type="text/plain"
        )
        writer.write_record(record)
    return content.getvalue()


def arrow_of(texts: Sequence[str | None], in_file: bool) -> bytes:
    table = pyarrow.table({"n": range(len(texts)), "text": texts})
    content = io.BytesIO()
    with (pyarrow.ipc.new_file if in_file else pyarrow.ipc.new_stream)(content, table.schema) as writer:
        for batch in table.to_batches(3):
            writer.write_batch(batch)
    return content.getvalue()


def through_pipe(path: Path, content: bytes) -> threading.Thread:
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,), daemon=True)
    writer.start()
    return writer
