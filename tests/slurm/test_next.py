"""What a batch script asks and gets, in the order of a job's life; no Slurm is needed."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from steel_megatron import events
from steel_megatron.slurm.next import STOP_FOR_GOOD, main


@pytest.fixture(autouse=True)
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "7", "JOB_NUM_NODES": "3", "JOB_NODELIST": "n[1-3]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("RESTART_COUNT", "STEP_ID", "JOB_END_TIME"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)


Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Asks, and gives the exit code and the answer."""

    def run(*words: str) -> tuple[int, str]:
        code = main([*words, "--run", str(tmp_path)])
        return int(code), capsys.readouterr().out.strip()

    return run


def kinds(run: Path) -> list[str]:
    return [event["event"] for event in events.read(run)]


def test_a_crash_loop(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask("begin", "--max-faults", "2") == (0, "")
    assert ask("after", "--code", "137", "--max-faults", "2") == (0, "again")
    assert ask("after", "--code", "76", "--max-faults", "2") == (0, "requeue")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert ask("begin", "--max-faults", "2") == (0, "")
    assert ask("after", "--code", "1", "--max-faults", "2") == (0, "exit 93")
    assert kinds(tmp_path) == ["begin", "fault", "fault", "requeue", "begin", "fault", "end"]
    assert [event["code"] for event in events.read(tmp_path) if event["event"] == "fault"] == [137, 76, 1]
    assert events.read(tmp_path)[0]["allocated"] == 3


def test_first_nodes_that_are_lost_again_and_again(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert ask("begin", "--max-faults", "2") == (0, "")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert ask("begin", "--max-faults", "2") == (93, "")
    assert [event["cause"] for event in events.read(tmp_path) if event["event"] == "fault"] == ["node lost"] * 3
    events.record(tmp_path, "save", step=3)
    assert ask("begin", "--max-faults", "2")[0] == 0


def test_the_cause_of_a_fault(ask: Ask, tmp_path: Path) -> None:
    ask("after", "--code", "76", "--allocated", "n1,n2", "--held", "n1,n2,n3")
    ask("after", "--code", "76", "--allocated", "n1,n2", "--held", "n1,n3")
    ask("after", "--code", "76", "--allocated", "n1,n2")  # squeue did not answer
    found = [(event["cause"], event.get("lost")) for event in events.read(tmp_path) if event["event"] == "fault"]
    assert found == [("crash", None), ("node lost", ["n2"]), ("crash", None)]


def test_a_job_that_slurm_requeues_for_a_lost_node(ask: Ask, tmp_path: Path) -> None:
    ask("terminated", "--allocated", "n1,n2", "--states", "n1=mixed,n2=allocated")
    ask("terminated", "--allocated", "n1,n2", "--states", "n1=mixed,n2=down")
    assert kinds(tmp_path) == ["terminated", "terminated", "fault"]
    assert events.read(tmp_path)[2]["lost"] == ["n2"]
    ask("terminated", "--allocated", "n1,n2", "--states", "n1=mixed,n2=down")
    assert kinds(tmp_path).count("fault") == 1  # it counts once


def test_stops(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask("after", "--code", "75") == (0, "requeue")
    assert ask("terminated") == (0, "")
    assert ask("after", "--code", "75", "--terminated", "yes") == (0, "exit 75")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time())))
    assert ask("after", "--code", "75", "--terminated", "yes") == (0, "requeue")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "0")  # unlimited
    assert ask("after", "--code", "75", "--terminated", "yes") == (0, "exit 75")
    (tmp_path / STOP_FOR_GOOD).write_text("6 7")
    assert ask("after", "--code", "75") == (0, "exit 75")
    (tmp_path / STOP_FOR_GOOD).write_text("6")  # another job
    assert ask("after", "--code", "75") == (0, "requeue")
    assert ask("after", "--code", "0") == (0, "exit 0")
    assert "fault" not in kinds(tmp_path)


def test_nodes(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = "n1=mixed,n2=allocated,n3=down*"
    assert ask("usable", "--allocated", "n1,n2,n3", "--states", states) == (0, "n1,n2")
    assert ask("usable", "--allocated", "n1,n2", "--held", "n1", "--states", states) == (0, "n1")
    assert ask("usable", "--allocated", "n3", "--states", states) == (69, "")
    assert ask("nodes", "--allocated", "n1,n2,n3", "--counts", "2,1") == (0, "n1,n2")
    assert ask("nodes", "--allocated", "n1", "--counts", "2,1") == (0, "n1")
    assert ask("nodes", "--allocated", "n1", "--counts", "4,2") == (69, "")
    reports = [{"node": "n1", "problems": ["/dev/shm has less than 64 MiB free"]}, {"node": "n2", "problems": []}]
    text = "\n".join(map(json.dumps, reports))
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert ask("nodes", "--allocated", "n1,n2", "--counts", "2,1", "--checked", "yes") == (0, "n2")
    assert ask("usable", "--allocated", "n1,n2") == (0, "n2")  # n1 is excluded from now on
    (found,) = events.read(tmp_path)
    assert (found["event"], found["node"], found["reason"]) == ("excluded", "n1", reports[0]["problems"][0])
    monkeypatch.setattr("sys.stdin", io.StringIO("{}"))
    assert ask("nodes", "--allocated", "n2", "--checked", "yes") == (2, "")
