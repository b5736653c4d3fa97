"""What a job takes for its inputs, and settings that it refuses at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.preprocessing.step import ChunkSizes
from steel_megatron.data.reading import chunks
from steel_megatron.errors import ConfigError, DataError
from tests.data.configured import preprocess
from tests.data.conftest import make_texts, write_jsonl
from tests.data.jobs import files_in


def paths_of(prefix: str | Path) -> list[str]:
    manifest = open_indexed(prefix).manifest
    assert manifest is not None
    return [entry["path"] for entry in manifest["inputs"]]


@pytest.mark.parametrize("form", ["{0}", "{0}/*.json*", "{0}/sub/../"])
@pytest.mark.parametrize("options", [{}, {"valid_fraction": 0.3}, {"shard_size": 500}])
def test_a_job_does_not_read_what_it_writes_itself(
    tmp_path: Path, sp_model: Path, form: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    source = write_jsonl(folder / "x.jsonl", make_texts(40))
    write_jsonl(folder / "zh_text_documents.json", ["looks like one of its files, and is not"])
    whole = source.read_bytes()
    source.write_bytes(whole + b"broken\n")
    options = {**options, "report": folder / "counts.json", "pace": ChunkSizes(2000)}
    with pytest.raises(DataError, match=r"row 41.*is kept"):
        preprocess([form.format(folder)], folder / "zh", "sentencepiece", sp_model, **options)
    options["on_bad_row"] = "skip"
    with caplog.at_level("INFO"):
        first = preprocess([form.format(folder)], folder / "zh", "sentencepiece", sp_model, **options)
    assert (first.documents, first.skipped) == (41, 1)
    before = files_in(folder)
    assert {"zh_skipped.jsonl", "counts.json", "x.jsonl"} < set(before)
    with caplog.at_level("INFO"):
        assert preprocess([form.format(folder)], folder / "zh", "sentencepiece", sp_model, **options) == first
    assert "zh.report.json is left out" in caplog.text
    preprocess([form.format(folder)], folder / "zh", "sentencepiece", sp_model, overwrite=True, **options)
    assert {name: content for name, content in files_in(folder).items() if name != "counts.json"} == {
        name: content for name, content in before.items() if name != "counts.json"
    }


def test_what_a_job_writes_may_not_be_named_as_an_input(tmp_path: Path, sp_model: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["text"])
    report = preprocess([str(source)], tmp_path / "c", "sentencepiece", sp_model)
    for own in (f"{report.outputs['train']}.json", f"{tmp_path}/c.report.json"):
        with pytest.raises(DataError, match="this very job writes"):
            preprocess([str(source), own], tmp_path / "c", "sentencepiece", sp_model)
    with pytest.raises(DataError, match=r"x\.jsonl is a file that this very job writes"):
        preprocess([str(source)], tmp_path / "d", "sentencepiece", sp_model, report=source)
    assert source.read_text() == '{"text": "text"}\n'


def test_a_file_under_two_names_is_read_once(tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(5))
    (tmp_path / "b.jsonl").symlink_to(source)
    os.link(source, tmp_path / "c.jsonl")
    write_jsonl(tmp_path / "d.jsonl", make_texts(5))  # the same content is another file
    names = ["a.jsonl", str(source), "sub/../a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl", "."]
    report = preprocess(names, "out/c", "sentencepiece", sp_model)
    assert report.documents == 10 and paths_of(report.outputs["train"]) == ["a.jsonl", "d.jsonl"]
    with pytest.raises(DataError, match=r"b\.jsonl is named as text and as firefly"):
        preprocess(["a.jsonl", "firefly=b.jsonl"], "out/d", "sentencepiece", sp_model)


def test_a_text_file_that_is_too_large_is_refused_at_once(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["text"])
    with (tmp_path / "b.txt").open("wb") as file:
        file.truncate(chunks.LONGEST_ROW + 1)
    for policy in ("stop", "skip"):
        with pytest.raises(DataError, match=r"b\.txt has 1,073,741,825 bytes; .* one document, of at most"):
            preprocess([str(tmp_path)], tmp_path / "out" / "c", "sentencepiece", sp_model, on_bad_row=policy)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [180, 225, 245, 256, 300])
def test_a_prefix_that_is_too_long(tmp_path: Path, sp_model: Path, length: int) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(ConfigError, match="choose a shorter prefix"):
        preprocess([str(source)], tmp_path / "out" / ("n" * length), "sentencepiece", sp_model)
    assert not (tmp_path / "out").exists()
    preprocess([str(source)], tmp_path / "out" / ("n" * 170), "sentencepiece", sp_model)


def test_another_end_of_document(tmp_path: Path, hf_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["text"])
    ends = {}
    for token in (None, "<s>"):
        prefix = preprocess([str(source)], tmp_path / f"{token}", "huggingface", hf_folder, eod_token=token).outputs
        ends[token] = int(open_indexed(prefix["train"]).document(0)[-1])
    assert ends[None] == 2 and ends["<s>"] == 1
    with pytest.raises(DataError, match="nothing"):
        preprocess([str(source)], tmp_path / "c", "huggingface", hf_folder, eod_token="nothing")


@pytest.mark.parametrize("form", ["{0}", "{0}/**/*.jsonl"])
def test_the_folder_of_an_unfinished_job_is_no_input(
    tmp_path: Path, sp_model: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What it cleaned so far would come in a second time; a folder of that name that is no job's is read."""
    for folder, plan in (
        ("raw", None),
        ("clean.partial", {"format": "steel_megatron cleaning job 2"}),
        ("my.partial", {}),
    ):
        (tmp_path / "data" / folder).mkdir(parents=True)
        write_jsonl(tmp_path / "data" / folder / "x.jsonl", make_texts(10))
        if plan is not None:
            (tmp_path / "data" / folder / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "data" / "my.partial" / "plan.json").unlink()
    with caplog.at_level("INFO"):
        report = preprocess([form.format(tmp_path / "data")], tmp_path / "out" / "c", "sentencepiece", sp_model)
    assert report.documents == 20 and "clean.partial is left out of the inputs: an unfinished job" in caplog.text
