"""The log of events: whole lines, whatever happens to a machine."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from steel_megatron import events


def test_events_have_time_job_and_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "7", "RESTART_COUNT": "2", "STEP_ID": "3", "STEP_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "run").mkdir()
    events.record(tmp_path / "run", "save", step=5, loss=None)
    (found,) = events.read(tmp_path / "run")
    assert found.pop("time") > 1e9 and found.pop("host")
    assert found == {"event": "save", "job": "7", "restart": 2, "step_id": "3", "nodes": "n[1-2]", "step": 5}
    monkeypatch.delenv("SLURM_STEP_ID")
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-4]")
    events.record(tmp_path / "run", "begin")
    assert events.read(tmp_path / "run")[1]["nodes"] == "n[1-4]"


def test_a_torn_line_is_left_out_and_ends(tmp_path: Path) -> None:
    events.record(tmp_path, "start")
    with (tmp_path / events.FILE).open("ab") as file:
        file.write(b'{"time": 1.0, "event": "sa')
    events.record(tmp_path, "resume")
    assert [event["event"] for event in events.read(tmp_path)] == ["start", "resume"]
    assert json.loads((tmp_path / events.FILE).read_text().splitlines()[-1])["event"] == "resume"


@pytest.mark.parametrize("line", ["[]", "{}", '{"event": 1, "time": 1.0}', '{"event": "a"}', "[" * 100_000])
def test_lines_that_are_no_events_are_left_out(line: str, tmp_path: Path) -> None:
    (tmp_path / events.FILE).write_text(line + "\n")
    assert events.read(tmp_path) == []


def test_a_log_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / events.FILE).mkdir()
    with caplog.at_level(logging.WARNING):
        events.record(tmp_path, "save", step=3)
    assert "events.jsonl cannot be written" in caplog.text and '"step": 3' in caplog.text
    events.record(tmp_path / "removed", "save")
    assert not (tmp_path / "removed").exists() and events.read(tmp_path / "removed") == []
