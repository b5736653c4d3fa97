"""The folder of a cleaning job: what it never removes, and kills at every step of its end."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.data.cleaning import funnel
from steel_megatron.data.cleaning import pipeline as clean
from steel_megatron.data.cleaning import result as results
from steel_megatron.data.cleaning.result import PLAN_FORMAT
from steel_megatron.data.cleaning.unit_files import UnitFiles, rows_of
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.jobs import slurm
from tests.data.cleaning.test_pipeline import content
from tests.data.configured import clean_corpus
from tests.data.conftest import make_texts, write_jsonl
from tests.file_system import killed_before, watched


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("kind: text\noperators: [text_length_filter: {min_len: 20}]\n")
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with two files."""
    (tmp_path / "raw").mkdir()
    for seed in range(2):
        write_jsonl(tmp_path / "raw" / f"{seed}.jsonl", make_texts(10, seed=seed))
    return tmp_path / "raw"


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of so small a job."""
    monkeypatch.setattr(funnel, "draw", lambda report, picture: picture.write_bytes(b""))


def test_the_rest_of_a_job_whose_removal_was_cut_short_goes(recipe: Path, raw: Path, tmp_path: Path) -> None:
    clean_corpus(recipe, [str(raw)], tmp_path / "out")
    (tmp_path / ".out.partial.removed" / "cleaned").mkdir(parents=True)
    with pytest.raises(DataError, match="out exists"):
        clean_corpus(recipe, [str(raw)], tmp_path / "out")
    assert not (tmp_path / ".out.partial.removed").exists()


@pytest.mark.parametrize("lost", ["output/text/000000.jsonl.zst", "done/clean/000000.json", "signatures/000000.npy"])
@pytest.mark.parametrize("size", [None, 5])
def test_what_a_job_has_lost_is_noticed(
    recipe: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, size: int | None
) -> None:
    """Files of units that are done, gone or cut short between two runs."""
    if lost.startswith("signatures"):
        recipe.write_text("kind: text\noperators: [document_deduplicator]\n")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if lost.startswith("signatures"):
            patch.setattr(clean.FindDuplicates, "work", killed)
        else:
            patch.setattr(results, "replace_folder", killed)
        clean_corpus(recipe, [str(raw)], tmp_path / "out")
    path = tmp_path / "out.partial" / lost
    path.write_bytes(path.read_bytes()[:size]) if size else path.unlink()
    if not size and lost.startswith("done"):  # the unit is done again
        clean_corpus(recipe, [str(raw)], tmp_path / "out")
        return
    with pytest.raises(DataError, match=rf"{lost}.* is lost or damaged .*; remove .*out\.partial to start anew"):
        clean_corpus(recipe, [str(raw)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_unit_whose_documents_are_gone_is_cleaned_again(
    recipe: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody removes the marker of the last step, whose input goes when it is done."""
    recipe.write_text("kind: text\noperators: [document_deduplicator]\n")
    clean_corpus(recipe, [str(raw)], tmp_path / "whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(results, "replace_folder", killed)
        clean_corpus(recipe, [str(raw)], tmp_path / "out")
    (tmp_path / "out.partial" / "done" / "deduplicate" / "000000.json").unlink()
    clean_corpus(recipe, [str(raw)], tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("output", ["raw", "raw/0.jsonl", "keep"])
def test_what_is_no_result_is_never_replaced(
    recipe: Path, raw: Path, tmp_path: Path, output: str, overwrite: bool
) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "funnel.json").write_text('{"format": "of somebody else"}')
    before = content(tmp_path)
    with pytest.raises(DataError, match=r"is in|exists; choose|is no result of cleaning"):
        clean_corpus(recipe, [f"{raw}/*.jsonl"], tmp_path / output, overwrite=overwrite)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["zh_text_document.bin", "text/notes.txt", "mine/000000.jsonl.zst", "quarantine/x"])
def test_a_result_with_something_else_in_it_is_not_replaced(recipe: Path, raw: Path, tmp_path: Path, name: str) -> None:
    clean_corpus(recipe, [str(raw)], tmp_path / "out")
    clean_corpus(recipe, [str(raw)], tmp_path / "out", overwrite=True)
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("precious")
    with pytest.raises(DataError, match=f"{name} is no result of cleaning"):
        clean_corpus(recipe, [str(raw)], tmp_path / "out", overwrite=True)
    assert foreign.read_text() == "precious"


def test_what_comes_while_a_job_runs_is_not_replaced(
    recipe: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(report: object, picture: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")

    monkeypatch.setattr(funnel, "draw", draw)
    with pytest.raises(DataError, match=r"out is no result of cleaning"):
        clean_corpus(recipe, [f"{raw}/*.jsonl"], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("plan", [None, '{"format": "my plan"}', "[]"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_others_is_not_worked_in(
    recipe: Path, raw: Path, tmp_path: Path, plan: str | None, overwrite: bool
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    if plan is not None:
        (tmp_path / "out.partial" / "plan.json").write_text(plan)
    with pytest.raises(DataError, match=r"out.partial, where this job would work, .* none of ours; move it away"):
        clean_corpus(recipe, [str(raw)], tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


def test_a_folder_of_others_is_no_finished_job(recipe: Path, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    for name in ("plan.json", "finished"):
        (tmp_path / "out.partial" / name).write_text("{}")
    with pytest.raises(DataError, match="none of ours; move it away"):
        clean_corpus(recipe, [str(raw)], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.partial" / "finished").exists()


def test_an_empty_folder_of_a_job_is_used(recipe: Path, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "plan.json.123.partial").write_text("{")  # killed while the plan was written
    (tmp_path / "out").mkdir()
    clean_corpus(recipe, [str(raw)], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "funnel.json").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("pattern", ["raw", "r*", "skypile=raw/", "raw/**/*.jsonl*", "*", "**/raw/*"])
@pytest.mark.parametrize("output", ["raw/out", "raw/deep/out"])
def test_an_output_that_is_searched_for_input_is_refused(
    recipe: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe.rename("recipe.json")  # a known format, for the pattern "*"
    with pytest.raises(DataError, match=rf"{output} is where the input '{pattern.replace('*', '.')}.* is searched"):
        clean_corpus("recipe.json", [pattern], output)
    assert sorted(path.name for path in raw.iterdir()) == ["0.jsonl", "1.jsonl"]


def test_inputs_in_the_output_are_refused(recipe: Path, raw: Path, tmp_path: Path) -> None:
    clean_corpus(recipe, [f"{raw}/*.jsonl"], raw / "out")  # files of the folder alone: "out" is not among them
    before = content(raw)
    with pytest.raises(
        DataError, match=r"input .*raw/out/text/000000.jsonl.zst is in .*raw/out, which this job writes"
    ):
        clean_corpus(recipe, [f"{raw}/out/text/*"], raw / "out", overwrite=True)
    assert content(raw) == before


def test_an_output_without_a_name(recipe: Path, raw: Path) -> None:
    with pytest.raises(ConfigError, match="names no output folder"):
        clean_corpus(recipe, [str(raw)], "")


def test_a_link_to_a_folder_is_that_folder(recipe: Path, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    clean_corpus(recipe, [str(raw)], tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "funnel.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_kill_at_each_step_of_the_end(
    recipe: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result replaces an earlier one; killed anywhere, the same command ends with the whole result."""
    sources, output, publish = [f"{raw}/*.jsonl"], tmp_path / "out", clean.publish
    clean_corpus(recipe, sources, tmp_path / "whole")
    clean_corpus(recipe, [f"{raw}/0.jsonl"], tmp_path / "old")
    old, whole = content(tmp_path / "old"), content(tmp_path / "whole")

    def run() -> None:
        clean_corpus(recipe, sources, output, overwrite=True)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    # All but the end is done beforehand, so that the steps that are counted are those of the end.
    shutil.copytree(tmp_path / "old", output)
    monkeypatch.setattr(clean, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(clean, "publish", publish)
    (tmp_path / "begun").mkdir()
    for name in ("out", "out.partial"):
        (tmp_path / name).rename(tmp_path / "begun" / name)
    for step in itertools.chain(range(1, 25), itertools.count(25, 5)):  # then only the removal of many files is left
        shutil.copytree(tmp_path / "begun", tmp_path, dirs_exist_ok=True)
        came = killed_before(step, run)
        aside = tmp_path / ".out.old"
        assert content(output if output.exists() else aside) in (old, whole), step
        run()
        assert content(output) == whole, step
        left = {path.name for path in tmp_path.iterdir()}
        assert not left - {"raw", "recipe.yaml", "whole", "old", "begun", "out", "out.lock"}, step
        shutil.rmtree(output)
        if not came:
            break
    assert step > 20


def test_what_a_unit_writes_is_on_the_disk_when_it_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    folders = ("output/text", "output/quarantine/x")
    with watched(tmp_path) as watch, UnitFiles(tmp_path, "000000") as files:
        for number in range(2000):
            files.write(folders[number % 2], {"row": number, "text": f"{number:0>300}"})
        assert not (tmp_path / "output").exists()
        files.commit()
    assert not watch.faults and sum(call.name == "replace" for call in watch.calls) == 2
    for first, folder in enumerate(folders):
        rows = list(rows_of(tmp_path / folder / "000000.jsonl.zst"))
        assert [row["row"] for row in rows] == list(range(first, 2000, 2))


@pytest.mark.slow
def test_a_finished_job_is_no_other_job(
    recipe: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "remove_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        clean_corpus(recipe, [f"{raw}/0.jsonl"], tmp_path / "out")
    monkeypatch.undo()
    before = content(tmp_path / "out.partial")
    recipe.write_text("kind: text\noperators: [text_length_filter: {min_len: 100000}]\n")
    with pytest.raises(DataError, match="out exists"):
        clean_corpus(recipe, [f"{raw}/0.jsonl"], tmp_path / "out")
    for name, found in before.items():  # as the kill left it
        (tmp_path / "out.partial" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out.partial" / name).write_bytes(found)
    result = clean_corpus(recipe, [f"{raw}/0.jsonl"], tmp_path / "out", overwrite=True)
    assert result.documents_kept == 0


@pytest.mark.parametrize("change", ["age", "model", "package"])
def test_an_interrupted_job_resumes_only_with_what_decides_the_result(
    recipe: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    recipe.write_text("kind: text\noperators: [perplexity_filter: {train_characters: 100000}]\n")
    clean_corpus(recipe, [str(raw)], tmp_path / "first")
    model = tmp_path / "first" / "language_model"
    recipe.write_text(f"kind: text\noperators: [fix_unicode_mapper, perplexity_filter: {{model: {model}}}]\n")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(results, "replace_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        clean_corpus(recipe, [str(raw)], tmp_path / "out")
    refused = pytest.raises(
        DataError,
        match=r"unfinished job that is not this one: .*(on_bad_row|text_key|mtime_ns|language_model|packages)",
    )
    options: list[dict[str, Any]] = [{"on_bad_row": "skip"}, {"text_key": "content"}]
    for option in options:
        with refused:
            clean_corpus(recipe, [str(raw)], tmp_path / "out", **option)
    if change == "age":
        os.utime(raw / "1.jsonl", (0, 0))
    elif change == "model":
        weights = model / "0_1_weights.npy"
        content_before = weights.read_bytes()
        weights.write_bytes(content_before[:-1] + bytes([content_before[-1] ^ 1]))
    else:
        version = results.importlib.metadata.version
        monkeypatch.setattr(
            results.importlib.metadata, "version", lambda name: "0" if name == "ftfy" else version(name)
        )
    with refused:
        clean_corpus(recipe, [str(raw)], tmp_path / "out")


def test_a_name_that_is_not_utf_8(recipe: Path, raw: Path, tmp_path: Path) -> None:
    """As in archives that were packed under a Chinese Windows."""
    for number, place in enumerate(("a", "b")):
        path = os.fsencode(raw) + b"/" + place.encode() + "数据".encode("gbk") + b".jsonl"
        (raw / f"{number}.jsonl").rename(os.fsdecode(path))
        with open(path, "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"text": "一二三四五六七八九十一二三四五六七八九十。又说 a@b.cn"}) + '\n{"text": 3}\n'
            )
    operators = "[clean_email_mapper, text_length_filter: {min_len: 20}, document_deduplicator]"
    recipe.write_text(f"kind: text\noperators: {operators}\n")
    with pytest.raises(DataError, match="row 12, byte"):
        clean_corpus(recipe, [str(raw)], tmp_path / "out")
    result = clean_corpus(recipe, [str(raw)], tmp_path / "out", on_bad_row="skip", overwrite=True)
    by_name = {row["operator"]: row["sources"]["text"] for row in result.report["operators"]}
    shown = [*by_name["read"]["samples"], *by_name["clean_email_mapper"]["changes"]]
    assert {Path(sample["path"]).name for sample in shown} == {r"a\xca\xfd\xbe\xdd.jsonl", r"b\xca\xfd\xbe\xdd.jsonl"}
    (copy,) = by_name["document_deduplicator"]["samples"]
    assert copy["reason"].endswith(r"a\xca\xfd\xbe\xdd.jsonl, row 11")


def test_slurm_tasks_that_live_are_not_disturbed(
    recipe: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(results, "replace_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        clean_corpus(recipe, [str(raw)], tmp_path / "out")
    partial = tmp_path / "out.partial"
    name = slurm.slurm_name(partial, "clean", "clean")
    assert slurm.slurm_name(partial, "clean", "clean") == name
    (partial / "tmp" / "node-1-000000").mkdir(parents=True)
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/bash\n[[ "$*" == *--name=*{name}* ]] && echo 17\n')
    squeue.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for options in ({}, {"overwrite": True}, {"on_bad_row": "skip", "overwrite": True}):
        with pytest.raises(DataError, match=r"Slurm still runs 17 for .*out.partial; end it \(scancel 17\), or give"):
            clean_corpus(recipe, [str(raw)], tmp_path / "out", **options)
    clean_corpus(recipe, [str(raw)], tmp_path / "other")
    over_slurm = {"executor": "slurm", "slurm_partition": "cpu"}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(results, "replace_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        clean_corpus(recipe, [str(raw)], tmp_path / "out", **over_slurm)
    assert (partial / "tmp" / "node-1-000000").exists()
    squeue.write_text("#!/bin/bash\necho down >&2; exit 1\n")
    with pytest.raises(DataError, match=r"Slurm does not say whether jobs work on .*out.partial: down"):
        clean_corpus(recipe, [str(raw)], tmp_path / "out")
    squeue.write_text("#!/bin/bash\n")
    clean_corpus(recipe, [str(raw)], tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "other") and not partial.exists()


def test_the_format_of_a_plan_is_told(tmp_path: Path, recipe: Path, raw: Path) -> None:
    """An older version's job is one of ours."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "plan.json").write_text(json.dumps({"format": PLAN_FORMAT[:-1] + "1"}))
    with pytest.raises(DataError, match="holds an unfinished job that is not this one: format was"):
        clean_corpus(recipe, [str(raw)], tmp_path / "out")
    clean_corpus(recipe, [str(raw)], tmp_path / "out", overwrite=True)
