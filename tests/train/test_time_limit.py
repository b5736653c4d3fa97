"""When a run must stop to have saved before its job's time is up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from steel_megatron.train.time_limit import TimeLimit, job_end, reserve, slurm_seconds


def test_two_steps_and_two_saves_are_reserved() -> None:
    assert reserve(10.0, 60.0, 86400.0) == 2 * 10 + 2 * 60 + 20
    assert reserve(10.0, None, 86400.0) == 2 * 10 + 300 + 20  # no save was measured yet
    assert reserve(1.0, None, 60.0) == 2 + 6 + 6  # a short job is not over at once


def test_it_is_up_when_less_is_left() -> None:
    limit = TimeLimit(end=10_000.0, now=0.0)
    assert not limit.is_up(10.0, 60.0, now=10_000 - 160.0)
    assert limit.is_up(10.0, 60.0, now=10_000 - 159.9)
    assert limit.is_up(10.0, None, now=10_000 - 339.9)
    assert not TimeLimit(None).is_up(1e9, 1e9)


def test_the_end_is_what_slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_end({}) is None
    assert job_end({"SLURM_JOB_END_TIME": "1795956216"}) == 1795956216.0
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_END_TIME": "0"}
    assert job_end({"SLURM_JOB_ID": "7"}) is None  # not in a step: nobody would ask for a save
    for said, left in (("1:02:03", 3723), ("2-00:00:01", 172_801), ("4:57", 297), ("UNLIMITED", None), ("", None)):
        squeue.write_text(f'#!/bin/sh\n[ "$2" = --jobs=7 ] && echo "{said}"\n')
        squeue.chmod(0o755)
        found = job_end(step)
        assert found is None if left is None else found == pytest.approx(time.time() + left, abs=60)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))  # as in a container
    assert job_end(step) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("30:15", 1815), ("24:00:00", 86400), ("2-12", 216_000), ("2-12:30", 217_800),
        ("1-00:00:05", 86405), ("0", 0), ("tomorrow", None), ("", None), ("1:2:3:4", None), ("a-1", None), ("-5", None),
    ],
)  # fmt: skip
def test_times_as_slurm_writes_them(text: str, seconds: float | None) -> None:
    assert slurm_seconds(text) == seconds
