"""Whole cleaning jobs: counts that agree, the same bytes however they are run, and faults on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard

from steel_megatron.data.cleaning import pipeline as clean
from steel_megatron.data.cleaning import result as results
from steel_megatron.data.cleaning.funnel import table
from steel_megatron.data.cleaning.steps import CleanUnits, SampleTexts, WriteKept
from steel_megatron.data.reading.sources import Dialogue
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import exclusive_lock
from steel_megatron.jobs import run
from tests.data.configured import clean_corpus
from tests.data.conftest import make_texts, write_jsonl
from tests.data.jobs import wait_for, wait_gone

SMALL = 140_000
ROOT = Path(__file__).resolve().parents[3]
RECIPE = """
kind: text
operators:
  - clean_email_mapper
  - remove_repeat_sentences_mapper
  - text_length_filter: {min_len: 10}
  - special_characters_filter: {max_ratio: 0.5}
  - perplexity_filter: {model: train, max_quantile: 0.97, order: 2}
  - document_deduplicator
  - document_simhash_deduplicator
"""


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units so small that each of the corpora's files is one."""
    monkeypatch.setattr(clean, "UNIT_BYTES", SMALL)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of two sources; copies and near copies within a file and across."""
    folder = tmp_path_factory.mktemp("raw")
    texts = make_texts(160, seed=4)
    long = " ".join(dict.fromkeys(" ".join(make_texts(60, seed=8)).split()))
    for number in range(4):
        some = texts[40 * number : 40 * number + 40]
        some += [texts[5], some[7].upper(), "short", "!!!???,,,...;;;::: a", long + f" {number}"]
        write_jsonl(folder / f"{number}.jsonl", [*some, "写信给 a.b@c.com 就行了，谢谢大家！"])
    return folder


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a job that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(clean, "UNIT_BYTES", SMALL)
        clean_corpus(folder / "recipe.yaml", inputs(corpus), folder / "out")
    assert len(list((folder / "out" / "skypile").iterdir())) == 2  # a file each
    return folder / "out"


def rows(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.rglob("*.jsonl.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as file:
            found += [json.loads(line) for line in file]
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a result."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def inputs(corpus: Path) -> list[str]:
    return [f"skypile={corpus}/[01].jsonl", f"text={corpus}/[23].jsonl"]


def test_every_document_is_kept_once_or_quarantined_once(whole: Path, corpus: Path) -> None:
    quarantined = rows(whole / "quarantine")
    kept = rows(whole / "skypile") + rows(whole / "text")
    wanted = [(f"{corpus}/{number}.jsonl", row) for number in range(4) for row in range(1, 47)]
    assert sorted((row["path"], row["row"]) for row in kept + quarantined) == sorted(wanted)

    raw = {(row["path"], row["row"]): row for row in kept + quarantined}
    first = f"{corpus}/0.jsonl"
    assert "operator" not in raw[first, 6] and "operator" not in raw[first, 45]  # the first ones of their copies
    assert raw[first, 46]["text"] == "写信给  就行了，谢谢大家！"
    for number in range(4):
        path = f"{corpus}/{number}.jsonl"
        assert raw[path, 41]["operator"] == "document_deduplicator"
        assert raw[path, 41]["original"] == {"path": first, "row": 6}
        assert raw[path, 42]["operator"] in ("document_deduplicator", "perplexity_filter")
        assert (raw[path, 43]["operator"], raw[path, 43]["value"]) == ("text_length_filter", 5)
        assert raw[path, 44]["operator"] == "special_characters_filter"
        if number:
            assert raw[path, 45]["operator"] == "document_simhash_deduplicator"
            assert raw[path, 45]["original"] == {"path": first, "row": 45} and raw[path, 45]["value"] <= 4


def test_the_report_agrees_with_the_files(whole: Path, corpus: Path) -> None:
    report = json.loads((whole / "funnel.json").read_text())
    assert (whole / "funnel.png").read_bytes().startswith(b"\x89PNG")
    for row in report["operators"]:
        found = rows(whole / "quarantine" / row["operator"])
        assert row["documents_dropped"] == len(found)
        for source, counts in row["sources"].items():
            of_source = [entry for entry in found if entry["source"] == source]
            assert counts["documents_dropped"] == len(of_source)
            assert counts["bytes_dropped"] == sum(len(entry["text"].encode()) for entry in of_source)
            assert [(sample["path"], sample["row"]) for sample in counts["samples"]] == [
                (entry["path"], entry["row"]) for entry in of_source[:3]
            ]
    kept = rows(whole / "skypile") + rows(whole / "text")
    totals = report["totals"]
    assert totals["bytes_kept"] == sum(len(entry["text"].encode()) for entry in kept)
    assert totals["documents_in"] == 4 * 46 == len(kept) + totals["documents_dropped"]
    by_name = {row["operator"]: row for row in report["operators"]}
    mail = by_name["clean_email_mapper"]
    assert (mail["documents_changed"], mail["documents_halved"]) == (4, 0)
    assert [len(counts["changes"]) for counts in mail["sources"].values()] == [2, 2]
    assert mail["sources"]["text"]["changes"][0] == {
        "path": f"{corpus}/2.jsonl",
        "row": 46,
        "before": "写信给 a.b@c.com 就行了，谢谢大家！",
        "after": "写信给  就行了，谢谢大家！",
    }
    assert all(not counts["changes"] for counts in by_name["text_length_filter"]["sources"].values())
    assert by_name["text_length_filter"]["settings"] == {"min_len": 10, "max_len": None}
    lines = table(report).splitlines()
    assert lines[1].split() == ["read", "184", "0", "0", f"{totals['bytes_in'] / 1e6:.2f}", "100.0%"]
    assert lines[-1].split()[:4] == ["all", "184", str(totals["documents_dropped"]), str(len(kept))]


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_the_result_does_not_depend_on_tasks_and_workers(
    recipe: Path, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    clean_corpus(recipe, inputs(corpus), tmp_path / "one", tasks=1)
    assert content(tmp_path / "one") == content(whole)
    clean_corpus(recipe, inputs(corpus), tmp_path / "three", tasks=3, workers=2)
    assert content(tmp_path / "three") == content(whole)


@pytest.mark.slow
def test_parts_of_a_file_are_the_file(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = make_texts(600, seed=5)
    source = write_jsonl(tmp_path / "a.jsonl", ["\n".join(texts[row : row + 6]) for row in range(595)])
    assert 4 << 20 < source.stat().st_size < 12 << 20  # some chunks of a megabyte
    operators = "[perplexity_filter: {model: none}, text_length_filter: {min_len: 1000}, document_deduplicator]"
    recipe.write_text(f"kind: text\noperators: {operators}")
    monkeypatch.setattr(clean, "UNIT_BYTES", 1 << 30)
    clean_corpus(recipe, [str(source)], tmp_path / "whole")
    monkeypatch.setattr(clean, "UNIT_BYTES", source.stat().st_size // 2)
    clean_corpus(recipe, [str(source)], tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "text").iterdir())) == 3

    def by_row(folder: str) -> list[dict[str, Any]]:
        return sorted(rows(tmp_path / folder / "text"), key=lambda row: row["row"])

    assert by_row("whole") == by_row("parts")
    reports = [json.loads((tmp_path / folder / "funnel.json").read_text()) for folder in ("whole", "parts")]
    assert reports[0] == reports[1]
    assert [row["operator"] for row in reports[0]["operators"] if row["left_out"]] == ["perplexity_filter"]


def test_small_files_are_done_together(
    recipe: Path, corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean, "UNIT_BYTES", 1 << 20)
    recipe.write_text(RECIPE.replace("model: train", f"model: {whole}/language_model"))
    clean_corpus(recipe, inputs(corpus), tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.zst")}
    assert {"skypile/000000.jsonl.zst", "text/000001.jsonl.zst"} <= names  # sources stay apart
    assert not {name for name in names if not name.endswith(("/000000.jsonl.zst", "/000001.jsonl.zst"))}
    for folder in ("skypile", "text", "quarantine/document_deduplicator", "quarantine/text_length_filter"):
        assert rows(tmp_path / "out" / folder) == rows(whole / folder)
    assert (tmp_path / "out" / "funnel.json").read_text().replace(f"{whole}/language_model", "train") == (
        whole / "funnel.json"
    ).read_text()


def test_dialogues_stay_dialogues(recipe: Path, tmp_path: Path) -> None:
    said = [
        ("我的邮箱是 a@b.com 对吗？", "是的，您的邮箱就是这个，没有错。"),
        ("谢谢你的帮助。", "不用客气，随时可以再来问我。"),
    ]
    text = Dialogue.of(said).text
    source = tmp_path / "a.jsonl"
    entries = [{"text": text, "dialogue": True}, {"text": text}, {"text": "no template at all", "dialogue": True}]
    source.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    recipe.write_text("kind: text\noperators: [clean_email_mapper, text_length_filter: {max_len: 130}]")
    clean_corpus(recipe, [str(source)], tmp_path / "out")
    (kept,) = rows(tmp_path / "out" / "text")
    assert kept["dialogue"] is True and kept["text"] == text.replace("a@b.com", "")
    plain, broken = sorted(rows(tmp_path / "out" / "quarantine"), key=lambda row: row["row"])
    assert plain["operator"] == "text_length_filter" and "dialogue" not in plain  # here the marks count
    assert broken["operator"] == "read" and "not in the dialogue template" in broken["reason"]


def test_bad_rows_stop_or_are_quarantined(recipe: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(40))
    with source.open("a") as file:
        file.write('{"text": \n{"text": ""}\n')
    with pytest.raises(DataError, match=r"a.jsonl, row 41, byte \d+: .*on_bad_row = skip"):
        clean_corpus(recipe, [str(source)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"a.jsonl, row 41"):
        clean_corpus(recipe, [str(source)], tmp_path / "out", workers=2)  # the message survives its process
    result = clean_corpus(recipe, [str(source)], tmp_path / "out", on_bad_row="skip", overwrite=True)
    assert result.documents_in == 42
    skipped = rows(tmp_path / "out" / "quarantine" / "read")
    assert [(row["row"], row["text"]) for row in skipped] == [(41, '{"text": '), (42, '{"text": ""}')]
    assert skipped[1]["reason"] == "empty"


def test_a_mapper_that_takes_most_of_a_text_is_counted(recipe: Path, tmp_path: Path) -> None:
    lines = ["甲乙丙丁。" * 9, "甲乙丙丁。戊己庚辛。", "子丑寅卯。辰巳午未。子丑寅卯。"]
    source = write_jsonl(tmp_path / "a.jsonl", lines)
    recipe.write_text("kind: text\noperators: [remove_repeat_sentences_mapper]")
    result = clean_corpus(recipe, [str(source)], tmp_path / "out")
    (_, row) = result.report["operators"]
    assert (row["documents_changed"], row["documents_halved"]) == (2, 1)
    assert [change["after"] for change in row["sources"]["text"]["changes"]] == ["甲乙丙丁。", "子丑寅卯。辰巳午未。"]


def test_a_source_that_loses_all(recipe: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    empty = tmp_path / "b.jsonl"
    empty.touch()
    recipe.write_text("kind: text\noperators: [text_length_filter: {min_len: 9}, document_deduplicator]")
    result = clean_corpus(recipe, [str(source), f"skypile={empty}"], tmp_path / "out")
    assert (result.documents_in, result.documents_kept) == (2, 0)
    assert result.report["totals"]["sources"]["skypile"]["documents_in"] == 0


def test_a_model_trained_before(recipe: Path, corpus: Path, whole: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("model: train", f"model: {whole}/language_model"))
    again = clean_corpus(recipe, inputs(corpus), tmp_path / "again")
    assert again.report["totals"] == json.loads((whole / "funnel.json").read_text())["totals"]
    recipe.write_text(RECIPE.replace("model: train", "model: nowhere"))
    with pytest.raises(DataError, match="nowhere holds no language model"):
        clean_corpus(recipe, inputs(corpus), tmp_path / "third")
    recipe.write_text(RECIPE.replace("model: train", "model: train, train_on: wiki"))
    with pytest.raises(
        ConfigError, match=r"train_on names 'wiki', which is no source of this job; it has skypile, text"
    ):
        clean_corpus(recipe, inputs(corpus), tmp_path / "third")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "names no sources"),
        ({"output": None}, "names no output folder"),
        ({"sources": ["nowhere*.jsonl"]}, r"'nowhere\*.jsonl' matches no file"),
        ({"tokenizer": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_options(recipe: Path, corpus: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"sources": inputs(corpus), "output": tmp_path / "out", **change}
    with pytest.raises((ConfigError, DataError), match=message):
        clean_corpus(recipe, **options)
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(
    recipe: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.write_text("kind: text\noperators: [fix_unicode_mapper, clean_html_mapper, words_num_filter]")
    find_spec: Callable[..., Any] = clean.importlib.util.find_spec
    monkeypatch.setattr(
        clean.importlib.util, "find_spec", lambda name: None if name in ("ftfy", "rjieba") else find_spec(name)
    )
    with pytest.raises(
        DataError, match=r"ftfy \(for fix_unicode_mapper\), rjieba \(for words_num_filter\); pip install"
    ):
        clean_corpus(recipe, inputs(corpus), tmp_path / "out")
    monkeypatch.setattr(clean.importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
    table_file = tmp_path / "a.parquet"
    table_file.touch()
    with pytest.raises(DataError, match=r"not installed: pyarrow \(for a.parquet\); pip install"):
        clean_corpus(recipe, [*inputs(corpus), str(table_file)], tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_is_told_in_bytes(
    recipe: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    told: list[tuple[str, float | None, str]] = []
    read: list[float] = []

    class Shown:
        def advance(self, amount: float = 1, note: str = "") -> None:
            read.append(amount)

    @contextmanager
    def progress(description: str, total: float | None = None, unit: str = "it") -> Iterator[Shown]:
        told.append((description, total, unit))
        yield Shown()

    monkeypatch.setattr(run, "progress", progress)
    recipe.write_text("kind: text\noperators: [text_length_filter]")
    size = sum(path.stat().st_size for path in corpus.iterdir())
    monkeypatch.setattr(clean, "UNIT_BYTES", size // 6)  # so that each file is read in parts
    clean_corpus(recipe, inputs(corpus), tmp_path / "out", workers=workers)
    assert told == [("clean", pytest.approx(size, abs=8), "bytes")]
    assert sum(read) == pytest.approx(size)


def test_an_output_is_not_overwritten_by_accident(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    recipe.write_text("kind: text\noperators: [text_length_filter]")
    clean_corpus(recipe, inputs(corpus)[:1], tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(DataError, match=r"out exists; choose another output, or replace it"):
        clean_corpus(recipe, inputs(corpus)[:1], tmp_path / "out")
    with exclusive_lock(tmp_path / "out", DataError), pytest.raises(DataError, match="another job is writing"):
        clean_corpus(recipe, inputs(corpus)[:1], tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == before
    clean_corpus(recipe, inputs(corpus)[1:], tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "skypile").exists() and (tmp_path / "out" / "text").exists()


# A step of the job stands still before or after its third unit, in whatever process works on that.
STILL = """
from pathlib import Path
from steel_megatron.data.cleaning import steps
import os, signal
whole = steps.{step}.work

def work(self, number):
    done = {after} and whole(self, number)
    if number == 2:
        Path({reached!r}).write_text(str(os.getpid()))
        signal.pause()
    return done if {after} else whole(self, number)

steps.{step}.work = work
"""


def tool(recipe: Path, corpus: Path, output: Path, *options: str, begin: str = "") -> list[str]:
    """The command line of a job; ``begin`` is code that each of its processes runs first."""
    script = (
        f"{begin}\nimport sys\nsys.path.insert(0, {str(ROOT / 'tools')!r})\nimport clean_corpus\n"
        f"from steel_megatron.data.cleaning import pipeline\npipeline.UNIT_BYTES = {SMALL}\n"
        "if __name__ == '__main__': sys.exit(clean_corpus.exit_code(clean_corpus.main))"
    )
    launcher = output.with_suffix(".launch.py")
    launcher.write_text(script)
    return [sys.executable, str(launcher), str(recipe), "--sources", *inputs(corpus), "--output", str(output), *options]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def standing_still(command: list[str], reached: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A job, and the process that stands still in it; none of them is left."""
    job = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(job, reached)
        worker = int(reached.read_text())
        assert worker != job.pid
        yield job, worker
    finally:
        job.kill()
        job.communicate()
    wait_gone([worker])


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_kills_leave_nothing_and_the_same_command_goes_on(
    recipe: Path, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    moments = [("SampleTexts", True), ("CleanUnits", False), ("CleanUnits", True), ("WriteKept", True)]
    for step, after in moments:
        reached = tmp_path / "reached"
        still = STILL.format(step=step, after=after, reached=str(reached))
        command = tool(recipe, corpus, tmp_path / "out", "--workers", "2", begin=still)
        with standing_still(command, reached) as (job, _):
            job.send_signal(signal.SIGKILL)
        reached.unlink()
        assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    clean_corpus(recipe, inputs(corpus), tmp_path / "out", workers=2)
    assert content(tmp_path / "out") == content(whole)
    left = {path.name for path in tmp_path.iterdir()} - {"out", "recipe.yaml", "out.launch.py", "out.lock"}
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_job_says_so_and_resumes(
    recipe: Path, corpus: Path, whole: Path, tmp_path: Path, number: int, code: int
) -> None:
    reached = tmp_path / "reached"
    still = STILL.format(step="CleanUnits", after=True, reached=str(reached))
    with standing_still(tool(recipe, corpus, tmp_path / "out", "--workers", "2", begin=still), reached) as (job, _):
        job.send_signal(number)
        assert job.stderr is not None
        errors = job.stderr.read()
        assert job.wait(60) == code, errors
    assert "stopped. Units that are done are kept in" in errors and "Traceback" not in errors
    assert list((tmp_path / "out.partial" / "done" / "clean").iterdir())
    clean_corpus(recipe, inputs(corpus), tmp_path / "out", workers=2)
    assert content(tmp_path / "out") == content(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "tasks"), [("sample", None), ("clean", 2), ("deduplicate", None)])
def test_completed_units_are_not_done_again(
    recipe: Path,
    corpus: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    tasks: int | None,
) -> None:
    """Interrupted after two units of a step, for any number of tasks then and now."""
    kind = {"sample": SampleTexts, "clean": CleanUnits, "deduplicate": WriteKept}[step]
    work = kind.work
    done: list[int] = []

    def interrupted(self: Any, number: int) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        work(self, number)
        done.append(number)

    monkeypatch.setattr(kind, "work", interrupted)
    with pytest.raises(KeyboardInterrupt):
        clean_corpus(recipe, inputs(corpus), tmp_path / "out")
    assert done == [0, 1]
    markers = sorted((tmp_path / "out.partial" / "done" / step).iterdir())
    assert [path.name for path in markers] == ["000000.json", "000001.json"]
    done.clear()
    monkeypatch.setattr(kind, "work", lambda self, number: (work(self, number), done.append(number))[0])
    clean_corpus(recipe, inputs(corpus), tmp_path / "out", tasks=tasks)
    assert done == [2, 3]
    assert content(tmp_path / "out") == content(whole)


def test_an_interrupted_job_resumes_only_as_it_was(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "plan.json").write_text(json.dumps({"format": results.PLAN_FORMAT}))
    recipe.write_text("kind: text\noperators: [text_length_filter]")
    with pytest.raises(DataError, match=r"out.partial holds an unfinished job.* this one: kind was None, is text"):
        clean_corpus(recipe, inputs(corpus), tmp_path / "out")
    clean_corpus(recipe, inputs(corpus), tmp_path / "out", overwrite=True)
    assert not partial.exists()


@pytest.mark.parametrize("published", [False, True])
def test_a_kill_around_the_last_rename(
    recipe: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: bool
) -> None:
    replace = results.replace_folder
    recipe.write_text("kind: text\noperators: [text_length_filter]")

    def killed(partial: Path, final: Path) -> None:
        if published:
            replace(partial, final)
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "replace_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        clean_corpus(recipe, inputs(corpus), tmp_path / "out")
    assert (tmp_path / "out").exists() == published
    monkeypatch.setattr(results, "replace_folder", replace)
    result = clean_corpus(recipe, inputs(corpus), tmp_path / "out")
    assert result.report == json.loads((tmp_path / "out" / "funnel.json").read_text())
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_full_disk_is_an_error_and_the_job_goes_on_later(
    recipe: Path, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    """No file can grow beyond 12 kB, as if the disk were full: the arrays of the model are larger."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))"
    command = tool(recipe, corpus, tmp_path / "out", begin=limit)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "error: cannot write" in done.stderr and not (tmp_path / "out").exists()
    command = tool(recipe, corpus, tmp_path / "out")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "out: 184 documents in = " in done.stderr and done.stdout.startswith("operator ")
    assert content(tmp_path / "out") == content(whole)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_killed_worker_fails_the_job(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    still = STILL.format(step="CleanUnits", after=False, reached=str(tmp_path / "reached"))
    command = tool(recipe, corpus, tmp_path / "out", "--workers", "2", begin=still)
    with standing_still(command, tmp_path / "reached") as (job, worker):
        os.kill(worker, signal.SIGKILL)
        _, said = job.communicate(timeout=60)
    assert job.returncode == 2 and "a worker process was killed" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
