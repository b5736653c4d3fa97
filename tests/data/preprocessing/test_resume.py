"""An interrupted job resumes to the same bytes, and never mixes with another job."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.preprocessing import pipeline, segments
from steel_megatron.data.preprocessing import step as preprocess_step
from steel_megatron.data.preprocessing.corpora import ShardedWriter
from steel_megatron.data.preprocessing.encoder import Encoded, Position
from steel_megatron.data.preprocessing.inputs import examine
from steel_megatron.data.preprocessing.report import PreprocessReport
from steel_megatron.data.preprocessing.segments import SegmentWriter
from steel_megatron.data.preprocessing.step import ChunkSizes
from steel_megatron.data.reading.inputs import Input
from steel_megatron.errors import DataError
from tests.data.configured import preprocess
from tests.data.conftest import make_texts, write_jsonl
from tests.data.jobs import files_in, mixed_inputs, segments_in
from tests.file_system import killed_before, watched

FILES = ("bin", "idx", "json", "rows.npy")


def run_with(inputs: list[str], prefix: Path, model: Path, **options: Any) -> PreprocessReport:
    return preprocess(
        inputs, prefix, "sentencepiece", model, **{"on_bad_row": "skip", "valid_fraction": 0.2, **options}
    )


def interrupt_at(monkeypatch: pytest.MonkeyPatch, writes: int, moment: str) -> None:
    """Interrupt ``before`` or ``after`` that many tasks are written (within a write, signals wait).

    When ``killed``, it is after the write, and the segment is not closed any more.
    """
    write, left = SegmentWriter.add, writes

    def counted(segment: SegmentWriter, result: Encoded, end: Position) -> None:
        nonlocal left
        left -= 1
        if left < 0 and moment == "before":
            raise KeyboardInterrupt
        write(segment, result, end)
        if left < 0:
            if moment == "killed":
                monkeypatch.setattr(SegmentWriter, "close", refuse)
            raise KeyboardInterrupt

    def refuse(segment: SegmentWriter) -> None:
        raise DataError("nothing is closed any more")

    monkeypatch.setattr(SegmentWriter, "add", counted)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    interrupts=st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["before", "after", "killed"])), max_size=5),
    chunk_bytes=st.sampled_from([300, 3000, 1 << 20]),
    segment_bytes=st.sampled_from([0, 2000, 1 << 30]),
    shard_size=st.sampled_from([None, 300, 3000]),
    overwrite=st.booleans(),
)
def test_an_interrupted_job_writes_the_same_bytes(
    sp_model: Path,
    interrupts: list[tuple[int, str]],
    chunk_bytes: int,
    segment_bytes: int,
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
            "pace": ChunkSizes(chunk_bytes, segment_bytes),
        }
        for writes, moment in interrupts:
            with pytest.MonkeyPatch.context() as patch:
                interrupt_at(patch, writes, moment)
                try:
                    run_with(inputs, root / "out" / "c", sp_model, **options)
                    break
                except KeyboardInterrupt:
                    left = files_in(root / "out")
                    assert not left or "c.partial/plan.json" in left
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
    assert segments_in(tmp_path / "out")
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
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match=r"this one: units was \[\[0, 3\]\]"):
        patch.setattr(preprocess_step, "UNIT_BYTES", 1)  # as in another version of the library
        run_with(half_done, prefix, sp_model)
    os.utime(half_done[0])
    with pytest.raises(DataError, match=r"a\.jsonl: mtime_ns was"):
        run_with(half_done, prefix, sp_model)
    assert files_in(tmp_path / "out") == left, "a refused job changes nothing"
    run_with(half_done, prefix, sp_model, seed=1, overwrite=True)
    run_with(half_done, tmp_path / "whole" / "c", sp_model, seed=1)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("ending", [".json", ".0.ids", ".1.docs", ".skipped"])
def test_damage_between_two_runs_is_found_and_made_good(
    tmp_path: Path, sp_model: Path, half_done: list[str], ending: str
) -> None:
    prefix, left = tmp_path / "out" / "c", files_in(tmp_path / "out")
    name = next(name for name in left if name.startswith("c.partial/segments/") and name.endswith(ending))
    (tmp_path / "out" / name).write_bytes(b"\xff" + left[name][1:])
    if ending != ".json":
        with pytest.raises(DataError, match=r"is not what was written .*made again"):
            run_with(half_done, prefix, sp_model)
    run_with(half_done, prefix, sp_model)
    run_with(half_done, tmp_path / "whole" / "c", sp_model)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("lost", ["000001.0.ids", "000001.json", "000000.json", "*"])
def test_damage_in_a_unit_that_is_done_is_made_good(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr(preprocess_step, "UNIT_BYTES", 1)
    inputs, out = mixed_inputs(tmp_path, 60), tmp_path / "out"
    with pytest.raises(DataError, match=r"c\.jsonl, row 21.*is kept"):
        run_with([inputs[1], inputs[2]], out / "c", sp_model, on_bad_row="stop", pace=ChunkSizes(1000, 2000))
    assert (out / "c.partial" / "done" / "encode" / "000000.json").exists()
    for damaged in list((out / "c.partial" / "segments" / "000000").glob(lost)):
        damaged.unlink()
    if lost.endswith(".ids"):
        with pytest.raises(DataError, match=r"000001\.0\.ids is not what was written .*made again"):
            run_with([inputs[1], inputs[2]], out / "c", sp_model)
    run_with([inputs[1], inputs[2]], out / "c", sp_model)
    run_with([inputs[1], inputs[2]], tmp_path / "whole" / "c", sp_model)
    assert files_in(out) == files_in(tmp_path / "whole")


def test_the_rest_of_a_job_whose_removal_was_cut_short_goes(tmp_path: Path, sp_model: Path) -> None:
    inputs, rest = mixed_inputs(tmp_path, 18), tmp_path / "out" / ".c.partial.removed"
    run_with(inputs, tmp_path / "out" / "c", sp_model)
    (rest / "segments").mkdir(parents=True)
    run_with(inputs, tmp_path / "out" / "c", sp_model)  # is finished already
    assert not rest.exists()


def test_segments_lost_while_the_job_runs_are_noticed(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their skipped rows are read at the end."""
    inputs, out, finish = mixed_inputs(tmp_path, 60), tmp_path / "out", pipeline._encode

    def lose(*arguments: Any) -> None:
        finish(*arguments)
        (out / "c.partial" / "segments" / "000000" / "000000.json").unlink()

    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"segments/000000 has lost files.*made again"):
        patch.setattr(pipeline, "_encode", lose)
        run_with(inputs, out / "c", sp_model)
    run_with(inputs, out / "c", sp_model)
    run_with(inputs, tmp_path / "whole" / "c", sp_model)
    assert files_in(out) == files_in(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_at_any_moment_of_the_end(tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While corpora get their names in place of others: each is the old one, the new one, or not there."""
    inputs, out, saved = mixed_inputs(tmp_path, 30), tmp_path / "out", tmp_path / "saved"
    run_with(inputs, out / "c", sp_model, seed=1)
    run_with(inputs, tmp_path / "whole" / "c", sp_model)
    new, old = files_in(tmp_path / "whole"), files_in(out)
    monkeypatch.setattr(pipeline, "give_names", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_with(inputs, out / "c", sp_model, overwrite=True)
    monkeypatch.undo()
    assert old.items() <= files_in(out).items()
    shutil.copytree(out, saved)

    def work() -> None:
        run_with(inputs, out / "c", sp_model, overwrite=True)

    for number in itertools.count(1):
        killed = killed_before(number, work)
        for split in ("train", "valid"):
            with suppress(DataError):
                open_indexed(out / f"c_{split}_text_document")
                left = {name: data for name, data in files_in(out).items() if name.startswith(f"c_{split}")}
                assert left.items() <= old.items() or left.items() <= new.items(), number
        work()
        assert files_in(out) == new, number
        if not killed:
            break
        shutil.rmtree(out)
        shutil.copytree(saved, out)
    assert number > 25


def test_a_job_whose_folder_was_moved_is_completed_where_it_is(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = mixed_inputs(tmp_path, 30)
    run_with(inputs, tmp_path / "whole" / "c", sp_model)
    monkeypatch.setattr(pipeline, "give_names", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_with(inputs, tmp_path / "begun" / "c", sp_model)
    monkeypatch.undo()
    (tmp_path / "begun").rename(tmp_path / "out")
    run_with(inputs, tmp_path / "out" / "c", sp_model)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    assert not (tmp_path / "begun").exists()


def interrupted(*_: object) -> None:
    """Stands for a function that Ctrl-C interrupts."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("plan", [b"{}", b'{"format": "steel', b""])
def test_a_folder_without_a_plan_of_ours_is_never_removed(
    tmp_path: Path, sp_model: Path, half_done: list[str], plan: bytes
) -> None:
    (tmp_path / "out" / "c.partial" / "plan.json").write_bytes(plan)
    left = files_in(tmp_path / "out")
    with pytest.raises(DataError, match=r"c\.partial, where this job would work, .*none of ours; move it away"):
        run_with(half_done, tmp_path / "out" / "c", sp_model, overwrite=True)
    assert files_in(tmp_path / "out") == left


def test_a_corpus_that_came_meanwhile_is_not_replaced(
    tmp_path: Path, sp_model: Path, half_done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "out" / "c"
    run_with(half_done, tmp_path / "other" / "c", sp_model, seed=1)
    give_names, other = pipeline.give_names, files_in(tmp_path / "other")

    def come(*arguments: Any) -> PreprocessReport:
        for name, content in other.items():
            (tmp_path / "out" / name).write_bytes(content)
        return give_names(*arguments)

    monkeypatch.setattr(pipeline, "give_names", come)
    for _ in range(2):
        with pytest.raises(DataError, match=r"c_train_text_document\.bin exists already"):
            run_with(half_done, prefix, sp_model)
    assert other.items() <= files_in(tmp_path / "out").items()
    run_with(half_done, prefix, sp_model, overwrite=True)
    monkeypatch.undo()
    run_with(half_done, tmp_path / "whole" / "c", sp_model)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_an_unfinished_job_of_an_earlier_version_is_refused(tmp_path: Path, sp_model: Path) -> None:
    inputs, out = mixed_inputs(tmp_path, 30), tmp_path / "out"
    out.mkdir()
    (out / "c.progress.json").write_text('{"format": "steel-megatron-preprocess-2"}')
    (out / "c_train_text_document.bin.partial").touch()
    with pytest.raises(DataError, match=r"c\.progress\.json belongs to .* an earlier version.*--overwrite true"):
        run_with(inputs, out / "c", sp_model)
    run_with(inputs, out / "c", sp_model, overwrite=True)
    run_with(inputs, tmp_path / "whole" / "c", sp_model)
    assert files_in(out) == files_in(tmp_path / "whole")


def test_a_bad_row_keeps_what_is_done_and_skip_resumes(tmp_path: Path, sp_model: Path) -> None:
    inputs, out = mixed_inputs(tmp_path, 60), tmp_path / "out"
    with pytest.raises(DataError, match=r"a\.jsonl, row 21, byte \d+: key 'text' holds null.*the same command resumes"):
        run_with(inputs, out / "c", sp_model, on_bad_row="stop", pace=ChunkSizes(1000))
    assert segments_in(out) == ["c.partial/segments/000000/000000.json"]
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
    assert segments_in(tmp_path / "out")
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


def test_overwrite_resumes_the_same_job(
    tmp_path: Path, sp_model: Path, half_done: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What is done of it is as good as new; only what it was told to replace goes in the end."""
    segments = segments_in(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt), caplog.at_level("INFO"):
        interrupt_at(patch, 3, "after")
        run_with(half_done, tmp_path / "out" / "c", sp_model, overwrite=True, pace=ChunkSizes(1000))
    assert "resuming the interrupted job" in caplog.text
    assert set(segments) < set(segments_in(tmp_path / "out"))


@pytest.mark.parametrize("failing", ["segment", "corpus"])
def test_a_write_that_is_cut_short_is_not_kept(tmp_path: Path, sp_model: Path, failing: str) -> None:
    """In a task with documents for both corpora, the second write fails when the first has its part already.

    The segment has what earlier tasks gave; it is lost with the write, or kept when a corpus failed behind it.
    """
    inputs, calls, tasks, before = mixed_inputs(tmp_path, 60), 0, 0, -1
    kind, name = (SegmentWriter, "_write") if failing == "segment" else (ShardedWriter, "add")
    add, write = SegmentWriter.add, getattr(kind, name)

    def counted(segment: SegmentWriter, result: Encoded, end: Position) -> None:
        nonlocal calls, tasks, before
        calls, tasks, before = 0, tasks + (len(result.documents) == 2), len(segments_in(tmp_path / "out"))
        add(segment, result, end)

    def fail_later(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if tasks == 5 and calls == 2:
            raise DataError("no room")
        write(*arguments)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(DataError, match=r"no room\. What is written so far is kept"),
    ):
        patch.setattr(SegmentWriter, "add", counted)
        patch.setattr(kind, name, fail_later)
        run_with(inputs, tmp_path / "out" / "c", sp_model, valid_fraction=0.5, pace=ChunkSizes(8000, 20_000))
    assert len(segments_in(tmp_path / "out")) == before + (failing == "corpus")
    run_with(inputs, tmp_path / "out" / "c", sp_model, valid_fraction=0.5)
    run_with(inputs, tmp_path / "whole" / "c", sp_model, valid_fraction=0.5)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["after", "killed"])
def test_what_was_written_after_the_last_segment_is_written_again(tmp_path: Path, sp_model: Path, moment: str) -> None:
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
    source, write = write_jsonl(tmp_path / "corpus.jsonl", make_texts(5)), SegmentWriter.add

    def grow(segment: SegmentWriter, result: Encoded, end: Position) -> None:
        with source.open("ab") as file:
            file.write(b'{"text": "more"}\n')
        write(segment, result, end)

    monkeypatch.setattr(SegmentWriter, "add", grow)
    with pytest.raises(DataError, match=r"corpus\.jsonl changed while it was read"):
        preprocess([str(source)], tmp_path / "out" / "c", "sentencepiece", sp_model, pace=ChunkSizes(100))


def test_a_segment_and_the_result_are_on_the_disk_before_they_count(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each marker vouches for the files next to it; a power failure must not leave it without them."""
    inputs, write, markers = mixed_inputs(tmp_path, 60), segments.write_atomically, 0
    (tmp_path / "out").mkdir()
    mark = preprocess_step.EncodeUnits.mark

    def marked(step: preprocess_step.EncodeUnits, unit: int, content: bytes) -> None:
        assert not any((tmp_path / "out").glob("c.partial/tmp/*/*"))
        mark(step, unit, content)

    with watched(tmp_path / "out") as watch:

        def checked(path: Path, *more: Any) -> None:
            nonlocal markers
            markers += 1
            assert [name for name in watch.unsynced() if name.startswith("c.partial/segments")] == []
            write(path, *more)

        monkeypatch.setattr(segments, "write_atomically", checked)
        monkeypatch.setattr(preprocess_step.EncodeUnits, "mark", marked)
        run_with(inputs, tmp_path / "out" / "c", sp_model, pace=ChunkSizes(4000, 4000))
        monkeypatch.undo()
    assert [fault for fault in watch.faults if ".c.partial.removed" not in fault] == [] and markers > 4
    order = watch.order()
    assert order.index("replace .c.partial.removed") > max(
        place for place, call in enumerate(order) if call.startswith("replace c_") or call == "replace c.report.json"
    )


def test_a_fingerprint_is_of_size_and_both_ends(tmp_path: Path) -> None:
    path, sample = tmp_path / "a.jsonl", 1 << 16
    for size in (0, 5, sample, sample + 7, 2 * sample, 2 * sample + 9):
        content = bytes(range(251)) * (size // 251 + 1)
        path.write_bytes(content[:size])
        tail = content[max(size - sample, sample) : size]  # what the head has not
        expected = hashlib.sha256(b"%d\n" % size + content[: min(size, sample)] + tail)
        assert examine(Input(str(path), "text")).fingerprint == expected.hexdigest(), size
