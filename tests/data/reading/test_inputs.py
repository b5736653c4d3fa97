"""Which files are inputs: folders, links, patterns, addresses; and what is said of everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from steel_megatron.data.reading.documents import read_documents
from steel_megatron.data.reading.inputs import find_inputs, parse_inputs
from steel_megatron.errors import DataError

ROW = b'{"text": "x"}\n'


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ROW)


def names(folder: Path, given: str) -> list[str]:
    return [os.path.relpath(found.path, folder) for found in parse_inputs([given])]


def test_links_to_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "b.jsonl", "deep/c.jsonl")
    make(tmp_path / "corpus", "a.jsonl", "sub/d.jsonl")
    corpus = tmp_path / "corpus"
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "again").symlink_to("sub")  # the folder itself gives the names
    (tmp_path / "elsewhere/deep/circle").symlink_to(corpus)
    (corpus / "sub/self").symlink_to(".")
    expected = ["a.jsonl", "linked/b.jsonl", "linked/deep/c.jsonl", "sub/d.jsonl"]
    for given in (f"{corpus}", f"{corpus}/**", f"{corpus}/**/*.jsonl", f"{corpus}/../*orp*/**/*.jsonl"):
        assert names(corpus, given) == expected, given
    assert names(corpus, f"{corpus}/**/deep/*.jsonl") == ["linked/deep/c.jsonl"]
    circled = names(corpus, f"{corpus}/*/deep")  # all of it, once more by the way of the circle
    assert circled[0] == "linked/deep/c.jsonl" and len(circled) == 4
    found = find_inputs([str(corpus)]).left_out
    assert set(found) == {"links to folders that are read anyway"}
    assert found["links to folders that are read anyway"]["count"] == 3


def test_what_a_folder_holds_in_addition_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = ["B.JSONL", "a.jsonl", "c.ndjson", "d.jsonl.xz", "e.jsonl.bz2", "g.csv", "h.TXT.GZ", "i.json.LZ4", "j.tgz"]
    make(tmp_path, *known, "f.jsonl.1", "k.jsonl.old", "l", "m.jsonl~")
    make(tmp_path, ".hidden.jsonl", "__pycache__/x.py", ".git/y.py")
    os.mkfifo(tmp_path / "pipe.jsonl")
    expected = {
        "hidden": {"count": 3, "examples": [f"{tmp_path}/{name}" for name in (".git", ".hidden.jsonl", "__pycache__")]},
        "no regular files": {"count": 1, "examples": [f"{tmp_path}/pipe.jsonl"]},
        "of no known form": {
            "count": 4,
            "examples": [f"{tmp_path}/{name}" for name in ("f.jsonl.1", "k.jsonl.old", "l")],
        },
    }
    for given in (tmp_path, tmp_path / "**"):
        caplog.clear()
        found = find_inputs([str(given)])
        assert sorted(os.path.basename(entry.path) for entry in found.files) == known
        assert found.left_out == expected
        (message,) = [record for record in caplog.records if "left out" in record.message]
        assert message.levelname == "WARNING" and "4 of no known form (" in message.message
        assert "l, ...)" in message.message
    assert find_inputs([f"{tmp_path}/*.jsonl"]).left_out.keys() == {"no regular files"}
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")  # refused when it is read
    assert all(
        f"{tmp_path}/gone.jsonl" in [e.path for e in parse_inputs([given])]
        for given in (f"{tmp_path}", f"{tmp_path}/g*l")
    )


def test_what_another_input_names_is_not_left_out(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", ".hidden.jsonl")
    found = find_inputs([str(tmp_path), f"{tmp_path}/.hidden.jsonl"])
    assert len(found.files) == 2 and found.left_out == {}


def test_metadata_of_datasets_is_no_data(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    make(
        saved,
        "train/data-00000-of-00001.arrow",
        "train/cache-1234.arrow",
        "train/dataset_info.json",
        "dataset_dict.json",
    )
    make(tmp_path, "hub/README.md", "hub/data/train.parquet", "hub/dataset_infos.json", "notes/README.md", "notes/a.md")
    make(tmp_path, "c_text_document.bin", "c_text_document.idx", "c_text_document.json", "c_text_document.rows.npy")
    (saved / "train/state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    found = find_inputs([str(tmp_path)])
    assert [os.path.relpath(entry.path, tmp_path) for entry in found.files] == [
        "hub/data/train.parquet",
        "notes/README.md",
        "notes/a.md",
        "saved/train/data-00000-of-00001.arrow",
    ]
    assert {reason: entry["count"] for reason, entry in found.left_out.items()} == {
        "caches of a dataset": 1,
        "cards of a dataset": 1,
        "files of an indexed corpus": 4,
        "metadata of a dataset": 4,
    }
    assert parse_inputs([f"{tmp_path}/hub/dataset_infos.json"])  # who names a file gets it


def test_all_splits_of_a_dataset_are_read_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "train/data-0.arrow", "test/data-0.arrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(parse_inputs([str(tmp_path)])) == 2
    assert "the splits train, test, and all of them are read" in caplog.text and f"{tmp_path}/train" in caplog.text


def test_names_of_sources_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "date=2024/a.jsonl", "x/date=2025/b.jsonl")
    assert [found.path for found in parse_inputs(["date=202?/*.jsonl"])] == ["date=2024/a.jsonl"]
    assert [found.path for found in parse_inputs(["x/date=202?/*"])] == ["x/date=2025/b.jsonl"]
    with pytest.raises(DataError, match=r"there is no source 'dat'; known are .*, or module:Class"):
        parse_inputs(["dat=2024/*.jsonl"])


def test_a_source_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_poems.py").write_text(
        "from steel_megatron.data.reading.sources import Source\n"
        "class Poems(Source):\n    def text(self, row):\n        return ' / '.join(row['lines'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "a.jsonl"
    path.write_text('{"lines": ["a", "b"]}\n')
    (found,) = parse_inputs([f"my_poems:Poems={path}"])
    assert [document.text for document in read_documents(found.path, source=found.source)] == ["a / b"]
    with pytest.raises(DataError, match=r"no_such:X' cannot be imported .*PYTHONPATH"):
        parse_inputs([f"no_such:X={path}"])
    with pytest.raises(DataError, match="my_poems has no class Prose that is a"):
        parse_inputs([f"my_poems:Prose={path}"])


def test_an_address_on_this_machine_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path, "c/a.jsonl")
    for given in (f"file://{tmp_path}/c", "~/c/*.jsonl", "skypile=~/c"):
        assert [found.path for found in parse_inputs([given])] == [f"{tmp_path}/c/a.jsonl"]


@pytest.fixture
def bucket() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    files = {"a.jsonl": ROW, "b/c.csv": b"text\ny\n", "b/old.1": b"", ".hidden.jsonl": ROW, "dataset_infos.json": b"{}"}
    for name, content in files.items():
        system.pipe(f"/bucket/{name}", content)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def test_remote_addresses(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    for given in (bucket, f"{bucket}/**"):
        found = find_inputs([given])
        assert [entry.path for entry in found.files] == ["memory:///bucket/a.jsonl", "memory:///bucket/b/c.csv"]
        assert {reason: entry["count"] for reason, entry in found.left_out.items()} == {
            "hidden": 1,
            "metadata of a dataset": 1,
            "of no known form": 1,
        }
    texts = [document.text for entry in found.files for document in read_documents(entry.path)]
    assert texts == ["x", "y"]
    with pytest.raises(DataError, match=r"'memory://bucket/none\*' matches no file"):
        parse_inputs([f"{bucket}/none*"])
    with pytest.raises(DataError, match=r"cannot read memory://bucket/none\.jsonl"):
        list(read_documents(f"{bucket}/none.jsonl"))
    with pytest.raises(DataError, match=r"cannot read nosuch://a\.jsonl: Protocol not known: nosuch"):
        list(read_documents("nosuch://a.jsonl"))


def test_a_driver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(address: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"cannot read s3://b/\*\.jsonl: Install s3fs to access S3"):
        parse_inputs(["s3://b/*.jsonl"])
