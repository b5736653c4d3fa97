"""The end of a job: what is reported, when, and what the same command does after it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from steel_megatron.cli import main
from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.preprocessing import pipeline as module
from steel_megatron.data.preprocessing.report import PreprocessReport
from steel_megatron.errors import DataError
from tests.data.configured import preprocess
from tests.data.conftest import make_texts, write_jsonl
from tests.data.jobs import files_in, mixed_inputs


def run_with(inputs: list[str], prefix: Path, model: Path, **options: Any) -> PreprocessReport:
    return preprocess(
        inputs, prefix, "sentencepiece", model, **{"on_bad_row": "skip", "valid_fraction": 0.2, **options}
    )


@pytest.mark.parametrize("shard_size", [None, 600])
def test_a_finished_job_says_so(
    tmp_path: Path, sp_model: Path, shard_size: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, out = mixed_inputs(tmp_path, 60), tmp_path / "out"
    first = run_with(inputs, out / "c", sp_model, shard_size=shard_size)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with caplog.at_level("INFO"):
        again = run_with(inputs, out / "c", sp_model, shard_size=shard_size, report=tmp_path / "report.json")
    assert again == first and "this very job is finished already" in caplog.text
    shards = first.shards["train"]
    where = f"{len(shards)} shards, {shards[0]} to {shards[-1]}" if shard_size else f"{out}/c_train_text_document"
    assert f"tokens in {where}\n" in first.summary()
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert json.loads((tmp_path / "report.json").read_text()) == asdict(first)
    for other in ({"append_eod": False}, {"shard_size": 700}, {"seed": 1}):
        with pytest.raises(DataError, match="exists already"):
            run_with(inputs, out / "c", sp_model, **{"shard_size": shard_size, **other})
    with pytest.raises(DataError, match="exists already"):
        run_with(inputs[:2], out / "c", sp_model, shard_size=shard_size)
    # Corpora that are no longer those of the report are none of its business.
    other = run_with(inputs, tmp_path / "other" / "c", sp_model, shard_size=shard_size, append_eod=False)
    for prefix in (first, other):
        assert open_indexed(prefix.shards["valid"][0]).documents
    for name, content in files_in(tmp_path / "other").items():
        (out / name).write_bytes(content)
    with pytest.raises(DataError, match="exists already"):
        run_with(inputs, out / "c", sp_model, shard_size=shard_size)


def test_a_job_under_the_prefix_of_another_is_refused(tmp_path: Path, sp_model: Path) -> None:
    """It would replace the report and the list of skipped rows of corpora that stay."""
    inputs, out = mixed_inputs(tmp_path, 30), tmp_path / "out"
    run_with(inputs, out / "c", sp_model)
    before, report = files_in(out), (out / "c.report.json").read_bytes()
    with pytest.raises(DataError, match=r"c\.report\.json is the report of another job .*settings\.valid_fraction was"):
        run_with(inputs, out / "c", sp_model, valid_fraction=0.0)
    assert files_in(out) == before and (out / "c.report.json").read_bytes() == report
    run_with(inputs, out / "c", sp_model, valid_fraction=0.0, overwrite=True)
    assert before.items() < files_in(out).items() and (out / "c.report.json").read_bytes() != report


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"format": "steel-megatron-preprocess-report-1", "job": 3}'])
def test_a_damaged_report_is_as_good_as_none(tmp_path: Path, sp_model: Path, damage: bytes) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", make_texts(5))
    preprocess([str(source)], tmp_path / "c", "sentencepiece", sp_model)
    (tmp_path / "c.report.json").write_bytes(damage)
    with pytest.raises(DataError, match="exists already"):
        preprocess([str(source)], tmp_path / "c", "sentencepiece", sp_model)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["report_of", "write_record", "give_names", "_write_report_to", "remove_folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_job_that_is_killed_when_its_corpora_are_complete_comes_to_its_end(
    tmp_path: Path, sp_model: Path, moment: str, overwrite: bool
) -> None:
    inputs = mixed_inputs(tmp_path, 30)
    whole = run_with(inputs, tmp_path / "whole" / "c", sp_model)
    options = {"overwrite": overwrite, "report": tmp_path / "report.json"}

    def killed(*_: object) -> None:
        raise SystemExit(143)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module, moment, killed)
        run_with(inputs, tmp_path / "out" / "c", sp_model, **options)
    named = moment in ("_write_report_to", "remove_folder")
    assert ("c_train_text_document.json" in files_in(tmp_path / "out")) == named
    report = run_with(inputs, tmp_path / "out" / "c", sp_model, **options)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    assert (report.sources, report.unigram_entropy) == (whole.sources, whole.unigram_entropy)
    assert json.loads((tmp_path / "report.json").read_text()) == asdict(report)


@pytest.mark.parametrize("name", ["in/b.jsonl", "in/notes.json", "out/c.report.json", "out/c.partial/plan.json"])
def test_a_report_replaces_only_a_report(tmp_path: Path, sp_model: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    for letter in "ab":
        write_jsonl(tmp_path / "in" / f"{letter}.jsonl", make_texts(5))
    (tmp_path / "in" / "notes.json").write_text('["precious"]')
    before = files_in(tmp_path / "in")
    with pytest.raises(DataError, match=r"is no report of preprocess|is a file that this job writes itself"):
        preprocess([f"{tmp_path}/in"], tmp_path / "out" / "c", "sentencepiece", sp_model, report=tmp_path / name)
    assert files_in(tmp_path / "in") == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("report", ["file/report.json", "/proc/nowhere/report.json", "folder"])
def test_a_report_that_cannot_be_written_is_refused_at_once(tmp_path: Path, sp_model: Path, report: str) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", make_texts(5))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="report"):
        preprocess([str(source)], tmp_path / "out" / "c", "sentencepiece", sp_model, report=tmp_path / report)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_documents_in_and_out_are_printed_whatever_the_rank(
    tmp_path: Path,
    sp_model: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    monkeypatch.setenv(variable, "1")
    inputs = ["--inputs", *mixed_inputs(tmp_path, 30), "--on_bad_row", "skip"]
    tokenizer = ["--tokenizer_kind", "sentencepiece", "--tokenizer_path", str(sp_model)]
    with caplog.at_level("INFO", logger="steel_megatron"):  # the command sets a level for its rank; this puts it back
        assert main(["preprocess", *inputs, *tokenizer, "--output_prefix", f"{tmp_path}/out/c"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("text, train: 30 documents, ") and lines[3] == "firefly: 1 skipped"
    assert lines[-2].startswith("44 documents in = 40 written + 4 skipped; ")


def test_texts_under_several_keys_are_not_called_documents(tmp_path: Path, sp_model: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "question", "a": "answer"}\n{"q": "question", "a": ""}\n')
    report = preprocess([f"{tmp_path}/a.jsonl"], tmp_path / "c", "sentencepiece", sp_model, json_keys=("q", "a"))
    assert "\n4 texts under 2 keys = 3 written + 1 skipped; " in report.summary()


def test_documents_without_a_token_make_no_corpus(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1}, unk_token="<unk>"))
    words.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    source = write_jsonl(tmp_path / "corpus.jsonl", ["\u200b", "\u200b"])
    for _ in range(2):
        with pytest.raises(DataError, match=r"no token of any of the 2 documents under key 'text'.*append_eod"):
            preprocess([str(source)], tmp_path / "out" / "c", "huggingface", tmp_path, append_eod=False)
        assert not (tmp_path / "out").exists()
    report = preprocess([str(source)], tmp_path / "out" / "c", "huggingface", tmp_path)
    assert (report.documents, report.tokens, report.unigram_entropy) == (2, 2, 0.0)
