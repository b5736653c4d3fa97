"""A job that is interrupted goes on to the same bytes, and never mixes with another job."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.preprocessing.encoder import Documents, Encoded, Position, Skipped
from steel_megatron.data.preprocessing.job import ChunkSizes, Run
from steel_megatron.data.preprocessing.journal import Journal, SkippedRows, examine
from steel_megatron.data.preprocessing.report import PreprocessReport
from steel_megatron.data.preprocessing.shards import ShardedWriter
from steel_megatron.data.reading.documents import Input, SkippedRow
from steel_megatron.errors import DataError
from tests.data.configured import preprocess
from tests.data.conftest import make_texts, write_jsonl
from tests.data.jobs import files_in, mixed_inputs
from tests.file_system import watched

FILES = ("bin", "idx", "json", "rows.npy")


def run_with(inputs: list[str], prefix: Path, model: Path, **options: Any) -> PreprocessReport:
    return preprocess(
        inputs, prefix, "sentencepiece", model, **{"on_bad_row": "skip", "valid_fraction": 0.2, **options}
    )


def interrupt_at(monkeypatch: pytest.MonkeyPatch, writes: int, moment: str) -> None:
    """Interrupt ``before`` or ``after`` that many tasks are written (within a write, signals wait).

    When ``killed``, it is after the write, and nothing can be noted any more.
    """
    write, left = Run.write, writes

    def counted(run: Run, result: Encoded, end: Position) -> bool:
        nonlocal left
        left -= 1
        if left < 0 and moment == "before":
            raise KeyboardInterrupt
        full = write(run, result, end)
        if left < 0:
            if moment == "killed":
                monkeypatch.setattr(Run, "note", refuse)
            raise KeyboardInterrupt
        return full

    def refuse(run: Run) -> None:
        raise DataError("nothing can be noted any more")

    monkeypatch.setattr(Run, "write", counted)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    interrupts=st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["before", "after", "killed"])), max_size=5),
    chunk_bytes=st.sampled_from([300, 3000, 1 << 20]),
    journal_bytes=st.sampled_from([0, 2000, 1 << 30]),
    shard_size=st.sampled_from([None, 300, 3000]),
    overwrite=st.booleans(),
)
def test_an_interrupted_job_writes_the_same_bytes(
    sp_model: Path,
    interrupts: list[tuple[int, str]],
    chunk_bytes: int,
    journal_bytes: int,
    shard_size: int | None,
    overwrite: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs = mixed_inputs(root, 18)
        whole = run_with(inputs, root / "whole" / "c", sp_model, shard_size=shard_size)
        options: dict[str, Any] = {
            "shard_size": shard_size,
            "overwrite": overwrite,
            "pace": ChunkSizes(chunk_bytes, journal_bytes),
        }
        for writes, moment in interrupts:
            with pytest.MonkeyPatch.context() as patch:
                interrupt_at(patch, writes, moment)
                try:
                    run_with(inputs, root / "out" / "c", sp_model, **options)
                    break
                except KeyboardInterrupt:
                    left = files_in(root / "out")
                    assert not left or "c.progress.json" in left
        else:
            done = run_with(inputs, root / "out" / "c", sp_model, **options)
            assert (done.sources, done.documents, done.skipped) == (whole.sources, whole.documents, whole.skipped)
            assert done.unigram_entropy == whole.unigram_entropy
        assert files_in(root / "out") == files_in(root / "whole")


@pytest.fixture
def half_done(tmp_path: Path, sp_model: Path) -> list[str]:
    """The inputs of a job that was interrupted at ``out/c``."""
    inputs = mixed_inputs(tmp_path, 60)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 25, "after")
        run_with(inputs, tmp_path / "out" / "c", sp_model, pace=ChunkSizes(1000))
    assert "c.progress.json" in files_in(tmp_path / "out")
    return inputs


def test_another_job_is_refused_until_it_is_told_to_discard(
    tmp_path: Path, sp_model: Path, hf_folder: Path, half_done: list[str]
) -> None:
    prefix, left = tmp_path / "out" / "c", files_in(tmp_path / "out")
    other: dict[str, dict[str, Any]] = {
        "settings.seed was 0, is 1": {"seed": 1},
        "settings.valid_fraction was 0.2, is 0.5": {"valid_fraction": 0.5},
        "settings.append_eod was True, is False": {"append_eod": False},
        "shard_size was None, is 100": {"shard_size": 100},
        r"keys was \['text'\], is \['body'\]": {"json_keys": ["body"]},
    }
    for message, options in other.items():
        with pytest.raises(DataError, match=f"unfinished job that is not this one: {message}.*overwrite"):
            run_with(half_done, prefix, sp_model, **options)
    with pytest.raises(DataError, match=r"tokenizer\.kind was sentencepiece, is huggingface"):
        preprocess(half_done, prefix, "huggingface", hf_folder, valid_fraction=0.2)
    with pytest.raises(DataError, match=r"c\.jsonl is no longer among the inputs"):
        run_with(half_done[:2], prefix, sp_model)
    with pytest.raises(DataError, match="the inputs come in another order"):
        run_with(half_done[::-1], prefix, sp_model)
    os.utime(half_done[0])
    with pytest.raises(DataError, match=r"a\.jsonl: mtime_ns was"):
        run_with(half_done, prefix, sp_model)
    assert files_in(tmp_path / "out") == left, "a refused job changes nothing"
    run_with(half_done, prefix, sp_model, seed=1, overwrite=True)
    run_with(half_done, tmp_path / "whole" / "c", sp_model, seed=1)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_damage_between_two_runs_is_found(tmp_path: Path, sp_model: Path, half_done: list[str]) -> None:
    prefix, left = tmp_path / "out" / "c", files_in(tmp_path / "out")
    damages = {
        "c.progress.json": (left["c.progress.json"][:-40], "cannot be used"),
        "c_train_text_document.bin.partial": (b"\xff" + left["c_train_text_document.bin.partial"][1:], "damaged"),
        "c_valid_text_document.idx.partial": (left["c_valid_text_document.idx.partial"][:36], "shorter than"),
        "c_skipped.jsonl.partial": (left["c_skipped.jsonl.partial"][:-1], "shorter than"),
    }
    for name, (content, message) in damages.items():
        (tmp_path / "out" / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            run_with(half_done, prefix, sp_model)
        (tmp_path / "out" / name).write_bytes(left[name])
    assert files_in(tmp_path / "out") == left
    run_with(half_done, prefix, sp_model)
    run_with(half_done, tmp_path / "whole" / "c", sp_model)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_overwrite_begins_a_damaged_job_anew(tmp_path: Path, sp_model: Path, half_done: list[str]) -> None:
    (tmp_path / "out" / "c.progress.json").write_text("{}")
    run_with(half_done, tmp_path / "out" / "c", sp_model, overwrite=True)
    run_with(half_done, tmp_path / "whole" / "c", sp_model)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_a_finished_shard_that_was_replaced_is_noticed(tmp_path: Path, sp_model: Path) -> None:
    inputs, prefix = mixed_inputs(tmp_path, 60), tmp_path / "out" / "c"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 12, "after")
        run_with(inputs, prefix, sp_model, shard_size=1000, pace=ChunkSizes(1000))
    run_with(inputs, tmp_path / "other" / "c", sp_model, append_eod=False, shard_size=1000)
    for suffix in ("bin", "idx", "json", "rows.npy"):
        name = f"c_train_text_document_00000.{suffix}"
        assert (tmp_path / "out" / name).exists()
        (tmp_path / "out" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(DataError, match=r"document_00000, a shard of the interrupted job, was replaced"):
        run_with(inputs, prefix, sp_model, shard_size=1000)


def test_a_bad_row_keeps_what_is_done_and_skip_goes_on(tmp_path: Path, sp_model: Path) -> None:
    inputs, out = mixed_inputs(tmp_path, 60), tmp_path / "out"
    with pytest.raises(DataError, match=r"a\.jsonl, row 21, byte \d+: key 'text' holds null.*the same command goes on"):
        run_with(inputs, out / "c", sp_model, on_bad_row="stop", pace=ChunkSizes(1000))
    assert len(files_in(out)["c_train_text_document.bin.partial"]) > 100
    run_with(inputs, out / "c", sp_model, workers=2, pace=ChunkSizes(1000))
    run_with(inputs, tmp_path / "whole" / "c", sp_model)
    assert files_in(out) == files_in(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"valid_fraction": 0.0}, {"shard_size": None}, {"json_keys": ["input"]}])
def test_overwrite_leaves_nothing_of_an_unfinished_job(tmp_path: Path, sp_model: Path, options: dict[str, Any]) -> None:
    inputs = mixed_inputs(tmp_path, 60)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 25, "after")
        run_with(inputs, tmp_path / "out" / "c", sp_model, shard_size=600, pace=ChunkSizes(1000))
    left = files_in(tmp_path / "out")
    assert {"c_train_text_document_00000.bin", "c_valid_text_document_00000.json", "c_skipped.jsonl.partial"} <= set(
        left
    )
    (tmp_path / "out" / "cc_train_text_document_00000.bin").touch()  # of another job
    other = {"shard_size": 600, **options}
    others = [f"{tmp_path}/c.jsonl"] if "json_keys" in options else inputs
    report = run_with(others, tmp_path / "out" / "c", sp_model, overwrite=True, **other)
    written = {
        f"{Path(shard).name}.{suffix}" for shards in report.shards.values() for shard in shards for suffix in FILES
    }
    assert set(files_in(tmp_path / "out")) == {*written, "c_skipped.jsonl", "cc_train_text_document_00000.bin"}


@pytest.mark.parametrize("shard_size", [None, 20_000])
def test_a_discarded_job_leaves_the_corpus_that_it_was_to_replace(
    tmp_path: Path, sp_model: Path, shard_size: int | None
) -> None:
    inputs, out = mixed_inputs(tmp_path, 60), tmp_path / "out"
    run_with(inputs, out / "c", sp_model, shard_size=shard_size)
    finished = files_in(out)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3, "after")
        run_with(inputs, out / "c", sp_model, shard_size=shard_size, overwrite=True, pace=ChunkSizes(1000))
    run_with(inputs, out / "c", sp_model, valid_fraction=0.0, overwrite=True)
    assert finished.items() <= files_in(out).items()


def test_overwrite_of_the_same_job_begins_anew_only_when_it_was_not_begun_so(
    tmp_path: Path, sp_model: Path, half_done: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for expected in ("discarding the unfinished job", "going on with the job"):
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt), caplog.at_level("INFO"):
            interrupt_at(patch, 3, "after")
            run_with(half_done, tmp_path / "out" / "c", sp_model, overwrite=True, pace=ChunkSizes(1000))
        assert expected in caplog.text


@pytest.mark.parametrize("failing", [1, 2])
def test_a_write_to_one_of_two_outputs_is_not_noted(tmp_path: Path, sp_model: Path, failing: int) -> None:
    """In a task with documents for both, the first output fails, or the second when the first has its part already."""
    inputs, add, write = mixed_inputs(tmp_path, 60), ShardedWriter.add, Run.write
    calls = tasks = 0

    def counted(run: Run, result: Encoded, end: Position) -> bool:
        nonlocal calls, tasks
        calls, tasks = 0, tasks + (len(result.documents) == 2)
        return write(run, result, end)

    def fail_later(writer: ShardedWriter, documents: Documents) -> bool:
        nonlocal calls
        calls += 1
        if tasks == 2 and calls == failing:
            raise DataError("no room")
        return add(writer, documents)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(DataError, match=r"no room\. What is written so far is kept"),
    ):
        patch.setattr(Run, "write", counted)
        patch.setattr(ShardedWriter, "add", fail_later)
        run_with(inputs, tmp_path / "out" / "c", sp_model, valid_fraction=0.5, pace=ChunkSizes(8000, 0))
    run_with(inputs, tmp_path / "out" / "c", sp_model, valid_fraction=0.5)
    run_with(inputs, tmp_path / "whole" / "c", sp_model, valid_fraction=0.5)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["after", "killed"])
def test_what_was_written_after_the_last_note_is_written_again(tmp_path: Path, sp_model: Path, moment: str) -> None:
    # One task fills several shards and skips rows; the second try must not stumble over them.
    inputs, options = mixed_inputs(tmp_path, 60), {"shard_size": 600, "pace": ChunkSizes(20_000)}
    for writes in (0, 1, 2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, writes, moment)
            run_with(inputs, tmp_path / "out" / "c", sp_model, **options)
    run_with(inputs, tmp_path / "out" / "c", sp_model, **options)
    run_with(inputs, tmp_path / "whole" / "c", sp_model, **options)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_an_input_that_grows_meanwhile_is_noticed(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, write = write_jsonl(tmp_path / "corpus.jsonl", make_texts(5)), Run.write

    def grow(run: Run, result: Encoded, end: Position) -> bool:
        with source.open("ab") as file:
            file.write(b'{"text": "more"}\n')
        return write(run, result, end)

    monkeypatch.setattr(Run, "write", grow)
    with pytest.raises(DataError, match=r"corpus\.jsonl changed while it was read"):
        preprocess([str(source)], tmp_path / "out" / "c", "sentencepiece", sp_model, pace=ChunkSizes(100))


def test_what_is_noted_is_on_the_disk_and_so_is_the_result(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each note vouches for the files beside it; a power failure must not leave it without them."""
    inputs, note, noted = mixed_inputs(tmp_path, 60), Journal.write, 0
    (tmp_path / "out").mkdir()
    with watched(tmp_path / "out") as watch:

        def checked(journal: Journal, content: Any) -> None:
            nonlocal noted
            noted += 1
            assert [name for name in watch.unsynced() if not name.endswith(".lock")] == []
            note(journal, content)

        monkeypatch.setattr(Journal, "write", checked)
        run_with(inputs, tmp_path / "out" / "c", sp_model, pace=ChunkSizes(4000, 4000))
    assert watch.faults == [] and noted > 4
    gone = [place for place, call in enumerate(watch.order()) if call == "unlink c.progress.json"]
    assert gone[0] > max(place for place, call in enumerate(watch.order()) if call.startswith("replace"))


def test_the_list_of_skipped_rows_is_synced_before_it_gets_its_name(tmp_path: Path) -> None:
    with watched(tmp_path) as watch:
        rows = SkippedRows(str(tmp_path / "c"))
        rows.add([Skipped(0, "text", SkippedRow("a.jsonl", 1, "broken"))])
        rows.commit()
    assert not watch.faults and watch.order()[-1] == "fsync ."


def test_a_fingerprint_is_of_size_and_both_ends(tmp_path: Path) -> None:
    path, sample = tmp_path / "a.jsonl", 1 << 16
    for size in (0, 5, sample, sample + 7, 2 * sample, 2 * sample + 9):
        content = bytes(range(251)) * (size // 251 + 1)
        path.write_bytes(content[:size])
        tail = content[max(size - sample, sample) : size]  # what the head has not
        expected = hashlib.sha256(b"%d\n" % size + content[: min(size, sample)] + tail)
        assert examine(Input(path, "text")).fingerprint == expected.hexdigest(), size


def test_what_a_kill_left_of_the_journal_goes(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "c"))
    (tmp_path / "c.progress.json.123.partial").touch()  # a process was killed while it wrote the journal
    (tmp_path / "cc.progress.json.123.partial").touch()
    journal.path.touch()
    journal.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["cc.progress.json.123.partial"]
