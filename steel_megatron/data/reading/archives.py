"""Archives of many documents -> chunks of rows: tar files of WebDataset, WARC and WET files of crawls."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from steel_megatron.data.reading import chunks
from steel_megatron.data.reading.chunks import BadRow, FileOffset, NoDocument, RawChunk, too_long
from steel_megatron.data.reading.compression import Content, Damaged
from steel_megatron.data.reading.html import CRAWLED_TEXT
from steel_megatron.data.reading.tables import Cell, MadeRow, holds, made_chunks

_BLOCK = tarfile.BLOCKSIZE
KEY = "__key__"
"""The name of a sample in a row of a tar file."""
_OF_CRAWL = ("conversion", "response", "resource")
"""The types of records that may be documents."""


def tar_chunks(
    path: str, content: Content, start: FileOffset, chunk_bytes: int, columns: Sequence[str] | None
) -> Iterator[RawChunk]:
    """The samples of a tar file: what its consecutive files hold whose paths differ behind the first dot only.

    Args:
        path: the file, for messages.
        content: its decompressed content.
        start: where to begin; the ``end`` of an earlier chunk.
        chunk_bytes: about as many bytes are in a chunk; a longer row is one of its own.
        columns: the columns that are needed; None for all.

    Raises:
        Damaged: the archive is truncated or damaged.
    """
    content.move_to(start.offset)

    def rows() -> Iterator[MadeRow]:
        sample: dict[str, Cell] = {}
        problem: BadRow | None = None
        row = start.row
        for offset, member, read in _members(content, start.offset):
            folder, slash, name = member.name.rpartition("/")
            if not member.isfile() or name.startswith("."):
                continue
            stem, _, ending = name.partition(".")
            key = folder + slash + stem
            if sample and sample[KEY] != key:
                row += 1
                yield problem or sample, FileOffset(row, offset)
                sample, problem = {}, None
            sample[KEY] = key
            wanted = columns is None or any(holds(ending, column) for column in columns)
            if wanted and member.size > chunks.LONGEST_ROW:
                problem = BadRow(f"{member.name}: {too_long(member.size)}")
            sample[ending] = read() if wanted and not problem else None
        if sample:
            yield problem or sample, FileOffset(row + 1, content.offset)

    yield from made_chunks(path, rows(), start, chunk_bytes, json_columns=("json",))


def _members(content: Content, base: int) -> Iterator[tuple[int, tarfile.TarInfo, Any]]:
    """The members of one tar file, or of several that follow each other: offset, member, and what reads it."""
    blocks = _Blocks(content)
    while blocks.find_next():
        base = content.offset - _BLOCK
        try:
            with tarfile.open(fileobj=blocks, mode="r|", bufsize=_BLOCK) as archive:  # type: ignore[call-overload]
                for member in archive:
                    yield base + member.offset, member, lambda of=member, archive=archive: _content_of(archive, of)
                    archive.members = []  # it keeps them all
        except (tarfile.TarError, EOFError) as error:
            raise Damaged(str(error)) from error
        if not blocks.ended_well:
            raise Damaged("the archive has no end")


def _content_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member
    try:
        return file.read()
    except tarfile.TarError as error:
        raise Damaged(f"{member.name}: {error}") from error


class _Blocks:
    """The blocks of a tar file, one by one, so that nothing behind its end is taken."""

    def __init__(self, content: Content) -> None:
        self._content, self._held = content, b""
        self.ended_well = False
        """Whether the last block was of zeros, as at the end of an archive."""

    def find_next(self) -> bool:
        """Whether another archive follows, behind the zeros at the end of one."""
        while block := self._read():
            if block.strip(b"\0"):
                self._held = block
                return True
        return False

    def read(self, size: int) -> bytes:
        """The next block."""
        assert size == _BLOCK, size
        block, self._held = self._held or self._read(), b""
        self.ended_well = len(block) == _BLOCK and not block.strip(b"\0")
        return block

    def _read(self) -> bytes:
        block = b""
        while len(block) < _BLOCK and (more := self._content.read(_BLOCK - len(block))):
            block += more
        return block


def warc_chunks(path: str, content: Content, start: FileOffset, chunk_bytes: int) -> Iterator[RawChunk]:
    """The records of a crawl that may be documents: ``url``, ``date``, ``content_type`` and ``text``.

    Args:
        path: the file, for messages.
        content: its decompressed content.
        start: where to begin; the ``end`` of an earlier chunk.
        chunk_bytes: about as many bytes are in a chunk; a longer row is one of its own.

    Raises:
        Damaged: the file is truncated or damaged.
    """
    from warcio.archiveiterator import WARCIterator
    from warcio.exceptions import ArchiveLoadFailed

    content.move_to(start.offset)

    def rows() -> Iterator[MadeRow]:
        row = start.row
        records = WARCIterator(content)
        try:
            for record in records:
                made = _crawled(record) if record.rec_type in _OF_CRAWL else None
                records.read_to_end()
                if records.err_count or getattr(record.raw_stream, "limit", 0):
                    raise Damaged(f"the record at byte {start.offset + records.get_record_offset()} has another length")
                if made is not None:
                    row += 1
                    yield made, FileOffset(row, start.offset + records.offset)
        except ArchiveLoadFailed as error:
            raise Damaged(str(error)) from error

    yield from made_chunks(path, rows(), start, chunk_bytes, crawled=True)


def _crawled(record: Any) -> dict[str, Cell] | BadRow:
    """A record as a row, or why it is none; HTML is left to those who parse."""
    kind, headers = record.content_type or "", record.rec_headers
    if record.length is not None and record.length > chunks.LONGEST_ROW:
        return BadRow(too_long(record.length))
    if record.http_headers is not None:
        status = record.http_headers.get_statuscode()
        if not status.startswith("2"):
            return NoDocument(f"a response of status {status}")
        kind = record.http_headers.get_header("Content-Type") or ""
    if record.rec_type != "conversion" and not kind.lower().startswith(CRAWLED_TEXT):
        return NoDocument(f"content of type {kind.partition(';')[0].strip() or 'unknown'}")
    text = record.content_stream().read()
    url, date = headers.get_header("WARC-Target-URI"), headers.get_header("WARC-Date")
    return {"url": url, "date": date, "content_type": kind, "text": text}
