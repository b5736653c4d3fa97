"""Merging corpora: the same bytes as writing all documents at once."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed.dataset import Origin, open_indexed, verify
from steel_megatron.data.indexed.merge import merge
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.errors import DataError
from tests.data.corpora import DOCUMENTS, content, inputs, write, write_megatron
from tests.file_system import killed_before


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 65_535), max_size=9), min_size=1, max_size=4).filter(any),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([8, 64, 1 << 26]),
)
def test_merge_equals_writing_at_once(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[list[int]]], block_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    about = {"tokenizer": {"fingerprint": "f"}, "append_eod": True}
    first, prefixes, files = 1, [], []
    for number, part in enumerate(parts):
        files.append({**inputs(len(part))[0], "path": str(number)})
        rows = range(first, first + len(part))
        # The blocks of the parts are not those of the whole.
        prefixes.append(write(folder / f"part{number}", part, np.uint16, 16, rows, inputs=files[-1:], **about))
        first += len(part)
    counted: list[int] = []
    manifest = merge(prefixes, folder / "merged" / "x", on_bytes=counted.append, block_bytes=block_bytes)
    whole = [document for part in parts for document in part]
    write(folder / "whole" / "x", whole, np.uint16, block_bytes, range(1, first), inputs=files, **about)
    merged, expected = content(folder / "merged" / "x"), content(folder / "whole" / "x")
    assert json.loads(merged.pop(".json")) == json.loads(expected.pop(".json")) == manifest
    assert merged == expected
    assert sum(counted) == len(merged[".bin"])
    assert verify(folder / "merged" / "x").documents == len(whole)


def test_shards_merge_to_what_was_not_cut(tmp_path: Path) -> None:
    """The entries of an input file that went into two shards become one again."""
    prefixes = []
    file = {"path": "a", "source": "text", "bytes": 99, "fingerprint": "f"}
    for number, (documents, rows, of) in enumerate(
        (
            ([[1], [2, 3]], [1, 2], [{**file, "documents": 2, "tokens": 3, "text_bytes": 7}]),
            ([[4], [5]], [5, 1], [{**file, "documents": 1, "tokens": 1, "text_bytes": 2}, *inputs(1)]),
        )
    ):
        prefixes.append(write(tmp_path / str(number), documents, rows=rows, inputs=of, split="train", number=number))
    manifest = merge(prefixes, tmp_path / "x")
    assert manifest["inputs"] == [{**file, "documents": 3, "tokens": 4, "text_bytes": 9}, *inputs(1)]
    assert manifest["split"] == "train" and "number" not in manifest
    corpus = open_indexed(tmp_path / "x")
    origins = [corpus.origin(document) for document in range(4)]
    assert origins == [*(Origin("a", "text", row) for row in (1, 2, 5)), Origin("in0.jsonl", "text", 1)]


def test_corpora_without_rows_or_manifest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("steel_megatron"), "propagate", True)
    ours = write(tmp_path / "ours", rows=range(1, 6), inputs=inputs(5), tokenizer={"fingerprint": "f"})
    theirs = write_megatron(tmp_path / "theirs", [[[1, 2], [3]], [[4]]])
    manifest = merge([ours, theirs], tmp_path / "x")
    assert "theirs do not say where their documents came from" in caplog.text
    assert "tokenizer" not in manifest and set(content(tmp_path / "x")) == {".bin", ".idx", ".json"}
    corpus = open_indexed(tmp_path / "x")
    assert [corpus.document(index).tolist() for index in range(7)] == [*DOCUMENTS, [1, 2, 3], [4]]


def test_merge_refuses_what_does_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1]], tokenizer={"fingerprint": "f"}, append_eod=True)
    write(tmp_path / "b", [[1]], tokenizer={"fingerprint": "g"}, append_eod=True)
    write(tmp_path / "c", [[1]], np.int32)
    write(tmp_path / "d", [[1]], tokenizer={"fingerprint": "f"}, append_eod=False)
    for names, message in (
        (("a", "b"), r"differ in tokenizer cannot be merged: .*\"f\"} in .*a, .*\"g\"} in .*b"),
        (("a", "c"), r"different dtypes cannot be merged: uint16 in .*a, int32 in .*c"),
        (("a", "d"), "differ in append_eod cannot be merged: true in .*a, false in .*d"),
        (("a", "none"), "No such file"),
        ((), "at least one"),
    ):
        with pytest.raises(DataError, match=message):
            merge([tmp_path / name for name in names], tmp_path / "out" / "x")
        assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="exists already"):
        merge([tmp_path / "a"], tmp_path / "d")
    with pytest.raises(DataError, match="merged into itself"):
        merge([tmp_path / "a"], tmp_path / "." / "a", overwrite=True)
    assert open_indexed(tmp_path / "a").tokens == 1


@pytest.mark.parametrize(("suffix", "at"), [(".bin", 70), (".idx", 66), (".rows.npy", 128)])
def test_merge_does_not_vouch_for_damage(tmp_path: Path, suffix: str, at: int) -> None:
    """A merged corpus gets new checksums; what the old ones find must not pass."""
    prefix = write(tmp_path / "x", [[1] * 50, [2] * 50], block_bytes=64, rows=[1, 2], inputs=inputs(2))
    path = Path(prefix + suffix)
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"x{suffix} "):
        merge([prefix], tmp_path / "out" / "y")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_merge(tmp_path: Path) -> None:
    """What is merged stays; what comes of it is the earlier corpus, nothing that opens, or all of the new one."""
    prefixes = [write(tmp_path / name, [[n, n]], rows=[1], inputs=inputs(1)) for n, name in enumerate("ab", start=1)]
    before = [content(prefix) for prefix in prefixes]
    merge(prefixes, tmp_path / "whole" / "x")
    whole = content(tmp_path / "whole" / "x")
    found = set()
    for number in itertools.count(1):
        out = tmp_path / str(number) / "x"
        write(out, [[3, 3], [4, 4]], rows=[1, 2], inputs=inputs(2))
        killed = killed_before(number, functools.partial(merge, prefixes, out, overwrite=True))
        try:
            first = tuple(open_indexed(out).document(0))
        except DataError:
            first = ()
        else:
            verify(out)
        found.add(first)
        merge(prefixes, out, overwrite=True)
        assert content(out) == whole and [content(prefix) for prefix in prefixes] == before
        if not killed:
            break
    assert found == {(3, 3), (), (1, 1)} and number > 10


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpora(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            for _ in range(8):
                writer.add_documents(np.arange(1 << 21) % 60_000, np.full(1 << 14, 128), np.arange(1, (1 << 14) + 1))
            writer.finalize({"inputs": inputs(1 << 17)})
    assert (tmp_path / "a.bin").stat().st_size == 1 << 25
    tracemalloc.start()
    try:
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 24
