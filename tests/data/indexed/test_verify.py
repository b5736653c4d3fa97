"""Verifying a corpus: every flipped bit, every id that is none, and where they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed.checksums import BlockHasher, scan_blocks
from steel_megatron.data.indexed.dataset import content_hash, open_indexed, verify
from steel_megatron.errors import DataError
from tests.data.corpora import DOCUMENTS, inputs, write, write_megatron


def test_verify_finds_a_flipped_bit_in_any_byte(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3], [4], [5, 6]], block_bytes=64, rows=[1, 2, 3], inputs=inputs(3))
    report = verify(prefix, vocab_size=7)
    assert (report.documents, report.tokens, report.max_id, report.checksums) == (3, 6, 6, True)
    for suffix in (".bin", ".idx", ".rows.npy"):
        path = Path(prefix + suffix)
        content = bytearray(path.read_bytes())
        for at in range(len(content)):
            content[at] ^= 1 << at % 8
            path.write_bytes(content)
            with pytest.raises(DataError, match=r"x\.(bin|idx|rows)"):
                verify(prefix, workers=1)
            content[at] ^= 1 << at % 8
        path.write_bytes(content)
    verify(prefix)


@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, 6015), bit=st.integers(0, 7), workers=st.sampled_from([1, 2, 5]))
def test_the_message_tells_file_and_bytes(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int, workers: int
) -> None:
    prefix = write(tmp_path_factory.mktemp("any") / "x", block_bytes=64)
    path = Path(f"{prefix}.bin")
    content = bytearray(path.read_bytes())
    assert len(content) == 6016
    content[at] ^= 1 << bit
    path.write_bytes(content)
    first = at // 64 * 64
    with pytest.raises(DataError, match=rf"x\.bin has changed .* 1 of 94 .* bytes {first:,} to {first + 63:,} "):
        verify(prefix, workers=workers)


def test_all_bytes_are_counted(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", block_bytes=64, rows=range(1, 6), inputs=inputs(5))
    counted: list[int] = []
    verify(prefix, on_bytes=counted.append)
    corpus = open_indexed(prefix)
    assert sum(counted) == sum(corpus.files.values()) == 6016 + 34 + 5 * 4 + 5 * 8 + 6 * 8 + 128 + 5 * 8
    assert max(counted) == 64


def test_ids_over_the_vocabulary(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours", block_bytes=64, tokenizer={"vocab_size": 65_000})
    theirs = write_megatron(tmp_path / "theirs", [[document] for document in DOCUMENTS])
    message = r"token id 65000 \(in document 3\), but the vocabulary has ids 0 to 64999"
    with pytest.raises(DataError, match=message):  # of its own tokenizer
        verify(ours)
    assert verify(ours, vocab_size=65_001).max_id == verify(theirs).max_id == 65_000
    with pytest.raises(DataError, match=message):
        verify(theirs, vocab_size=65_000)


def test_negative_ids_belong_to_no_vocabulary(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "x", [[[1, 2]], [[-3]]], np.int32)
    with pytest.raises(DataError, match=r"token id -3 \(in document 1\)"):
        verify(prefix)


def test_a_largest_id_that_is_not_the_largest(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x")
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_id": 9}))
    with pytest.raises(DataError, match="max_id is 9, the largest id is 65000"):
        verify(prefix)


def test_the_hash_of_the_content_knows_no_path_and_needs_no_manifest(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours", about="something", rows=range(1, 6), inputs=inputs(5))
    theirs = write_megatron(tmp_path / "theirs", [[document] for document in DOCUMENTS])
    shutil.copytree(tmp_path, tmp_path / "copy")
    prefixes = [ours, theirs, tmp_path / "copy" / "ours", tmp_path / "copy" / "theirs"]
    assert len({content_hash(open_indexed(prefix)) for prefix in prefixes}) == 1
    others = [
        write(tmp_path / "other", [*DOCUMENTS[:-1], list(range(1, 3001))]),
        write(tmp_path / "cut", [DOCUMENTS[0] + DOCUMENTS[1], *DOCUMENTS[2:]]),
        write(tmp_path / "wide", DOCUMENTS, np.int32),
    ]
    assert len({content_hash(open_indexed(prefix)) for prefix in [ours, *others]}) == 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=8), st.sampled_from([8, 16, 64]), st.integers(1, 4))
def test_hashing_while_writing_is_hashing_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], block_bytes: int, workers: int
) -> None:
    hasher = BlockHasher(block_bytes)
    for piece in pieces:
        hasher.update(memoryview(piece))
    path = tmp_path_factory.mktemp("any") / "x"
    whole = b"".join(pieces)
    path.write_bytes(whole)
    counted: list[int] = []
    blocks = scan_blocks(path, len(whole), block_bytes, np.dtype(np.int8), counted.append, workers)
    assert [block.digest for block in blocks] == hasher.blocks
    assert sum(counted) == len(whole)
    if whole:
        values = np.frombuffer(whole, np.int8)
        assert (min(block.low for block in blocks), max(block.high for block in blocks)) == (values.min(), values.max())


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(100))
    with pytest.raises(DataError, match=f"{path} ends at byte 100"):
        scan_blocks(path, 200, 64)
