"""Inputs of every form become the same corpus: with any number of workers and tasks, and after an interruption."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import fsspec
import pytest

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.preprocessing.step import ChunkSizes
from steel_megatron.errors import DataError
from tests.data.configured import clean_corpus, preprocess
from tests.data.conftest import make_texts
from tests.data.forms import arrow_of, csv_of, through_pipe, warc_of
from tests.data.jobs import files_in

PACE = ChunkSizes(3000)


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_forms(folder: Path, texts: list[str], bad: str = "") -> list[str]:
    """The same texts in many forms, one after the other; one of them has a bad row in its middle."""
    folder.mkdir()
    half = len(texts) // 2
    table = csv_of(texts)
    cut = table.index(b"\r\n%d," % half) + 2
    crawl = [*texts[:half], b"\xff".decode("latin-1"), *texts[half:]]
    contents = {
        "a.csv.gz": gzip.compress(table[:cut] + b"alone\r\n" + table[cut:] if bad == "a.csv.gz" else table),
        "b.arrow": arrow_of([*texts[:half], None, *texts[half:]] if bad == "b.arrow" else texts, False),
        "d.wet": warc_of(crawl, False).replace(b"\xc3\xbf", b"\xff\xff") if bad == "d.wet" else warc_of(texts, False),
        "e.NDJSON.bz2": bz2.compress(lines_of(texts[:half]) + b"{\n" * (bad == "e") + lines_of(texts[half:])),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with fsspec.open(f"memory://{folder.name}/f.jsonl", "wb") as file:
        file.write(lines_of(texts))
    return [str(folder), f"memory://{folder.name}/*.jsonl"]


def documents(prefix: str) -> list[list[int]]:
    corpus = open_indexed(prefix)
    return [corpus.document(number).tolist() for number in range(corpus.documents)]


def test_forms_give_the_corpus_of_lines(tmp_path: Path, sp_model: Path) -> None:
    texts = make_texts(30)
    inputs = write_forms(tmp_path / "forms", texts)
    (tmp_path / "lines.jsonl").write_bytes(lines_of(texts * 5))
    plain = preprocess([f"{tmp_path}/lines.jsonl"], tmp_path / "plain", "sentencepiece", sp_model)
    found = preprocess(inputs, tmp_path / "c", "sentencepiece", sp_model, pace=PACE)
    assert documents(found.outputs["train"]) == documents(plain.outputs["train"]) and found.documents == 150


@pytest.mark.parametrize("bad", ["a.csv.gz", "b.arrow", "d.wet", "e"])
def test_a_job_resumes_in_the_middle_of_every_form(tmp_path: Path, sp_model: Path, bad: str) -> None:
    inputs = write_forms(tmp_path / f"forms_{bad}", make_texts(30), bad)
    options = {"on_bad_row": "skip", "pace": PACE}
    expected = preprocess(inputs, tmp_path / "one/c", "sentencepiece", sp_model, **options)
    assert (expected.documents, expected.skipped) == (150, 1)
    with pytest.raises(DataError, match=r"row 16.*is kept"):
        preprocess(inputs, tmp_path / "two/c", "sentencepiece", sp_model, pace=PACE)
    preprocess(inputs, tmp_path / "two/c", "sentencepiece", sp_model, **options)
    one, two = files_in(tmp_path / "one"), files_in(tmp_path / "two")
    assert {name: one[name] for name in one if "report" not in name} == {
        name: two[name] for name in two if "report" not in name
    }


@pytest.mark.slow
def test_forms_give_the_same_bytes_with_workers_and_tasks(tmp_path: Path, sp_model: Path) -> None:
    inputs = write_forms(tmp_path / "forms", make_texts(30))[:1]
    made = {}
    for name, options in {"one": {}, "workers": {"workers": 3}, "tasks": {"tasks": 2, "workers": 2}}.items():
        preprocess(inputs, tmp_path / name / "c", "sentencepiece", sp_model, pace=PACE, **options)
        made[name] = {file: content for file, content in files_in(tmp_path / name).items() if "report" not in file}
    assert made["one"] == made["workers"] == made["tasks"]


@pytest.mark.parametrize("name", ["pipe", "a.csv.gz"])
def test_a_pipe_gives_the_corpus_of_a_file_and_resumes(tmp_path: Path, sp_model: Path, name: str) -> None:
    texts = make_texts(60)
    content = lines_of(texts) if name == "pipe" else gzip.compress(csv_of(texts))
    bad = lines_of([*texts[:40], *texts[41:]]).replace(lines_of([texts[41]]), lines_of([texts[41]])[:-3] + b"\n", 1)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "a.jsonl").write_bytes(lines_of(texts))
    expected = preprocess([f"{tmp_path}/file"], tmp_path / "file/c", "sentencepiece", sp_model)
    through_pipe(tmp_path / name, content)
    found = preprocess([f"{tmp_path}/{name}"], tmp_path / "out/c", "sentencepiece", sp_model, pace=PACE)
    assert documents(found.outputs["train"]) == documents(expected.outputs["train"])
    if name != "pipe":
        return
    (tmp_path / name).unlink()
    through_pipe(tmp_path / name, bad)
    with pytest.raises(DataError, match=r"pipe, row 41, byte .*is kept"):
        preprocess([f"{tmp_path}/{name}"], tmp_path / "again/c", "sentencepiece", sp_model, pace=PACE)
    (tmp_path / name).unlink()
    writer = through_pipe(tmp_path / name, bad)
    options = {"on_bad_row": "skip", "pace": PACE}
    again = preprocess([f"{tmp_path}/{name}"], tmp_path / "again/c", "sentencepiece", sp_model, **options)
    assert (again.documents, again.skipped) == (58, 1)
    writer.join(10)
    assert not writer.is_alive()


def test_what_reads_twice_takes_no_pipe(tmp_path: Path, sp_model: Path) -> None:
    for run in (
        lambda path: preprocess([path], tmp_path / "c", "sentencepiece", sp_model, tasks=2),
        lambda path: clean_corpus("examples/steel_1b/clean_code.yaml", [path], tmp_path / "d", tokenizer=sp_model),
    ):
        path = tmp_path / "pipe"
        through_pipe(path, b"x")
        with pytest.raises(DataError, match=r"pipe is a stream, which can be read once; .*: store it in a file first"):
            run(str(path))
        with path.open("rb") as reader:  # let the writer go
            reader.read()
        path.unlink()


def test_what_is_left_out_is_in_report_and_manifest(tmp_path: Path, sp_model: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines_of(["one text"]))
    (folder / "a.jsonl.1").touch()
    (folder / ".hidden").touch()
    report = preprocess([str(folder)], folder / "c", "sentencepiece", sp_model)
    manifest = open_indexed(report.outputs["train"]).manifest
    expected = {
        "hidden": {"count": 1, "examples": [f"{folder}/.hidden"]},
        "of no known form": {"count": 1, "examples": [f"{folder}/a.jsonl.1"]},
    }
    assert manifest is not None and manifest["left_out"] == report.left_out == expected
    assert f"left out of the inputs: 1 hidden ({folder}/.hidden); 1 of no known form (" in report.summary()
    assert preprocess([str(folder)], folder / "c", "sentencepiece", sp_model) == report
