"""What events say of a run; no Slurm is needed."""

from __future__ import annotations

from typing import Any

import pytest

from steel_megatron.slurm.status import count_nodes, status_of


def event(time: float, kind: str, restart: int = 0, **facts: Any) -> dict[str, Any]:
    return {"time": time, "event": kind, "job": "7", "restart": restart, "nodes": "n[1-2]", **facts}


def start(time: float, step: int, restart: int = 0) -> dict[str, Any]:
    kind = "resume" if step else "start"
    return event(time, kind, restart, step=step, of=100, tokens_per_step=1000, layout="TP2")


FAULTY = [
    event(0, "begin", allocated=3),
    start(10, 0),
    event(20, "progress", step=10, step_seconds=10.0, loss=3.0, tokens_per_second=1000.0),
    event(40, "save", step=20, step_seconds=20.0, loss=2.5, tokens_per_second=1000.0),
    event(50, "progress", step=30, step_seconds=30.0, loss=2.4, tokens_per_second=1000.0),
    event(60, "fault", cause="crash"),
    start(70, 20),
    event(90, "save", step=40, step_seconds=20.0, loss=2.0, tokens_per_second=500.0),
    event(90, "stop", step=40, step_seconds=20.0, reason="signal"),
    event(100, "requeue", cause="time limit"),
    event(1000, "begin", 1, allocated=3),
    start(1010, 40, 1),
    event(1020, "progress", 1, step=45, step_seconds=10.0, loss=1.9, tokens_per_second=500.0),
]


def test_steps_that_were_done_again_count_once() -> None:
    found = status_of(FAULTY)
    assert (found.step, found.steps, found.checkpoint, found.loss) == (45, 100, 40, 1.9)
    assert found.allocations == 2 and found.faults == {"crash": 1} and found.requeues == {"time limit": 1}
    # Steps up to 20 of the first launch, all of the others; on two nodes, of the three that were allocated.
    assert found.counted_seconds == 2 * (20 + 20 + 10)
    assert found.allocated_seconds == 3 * (100 + 20)
    assert found.goodput == pytest.approx(100 / 360)
    assert found.eta_seconds == 55 * 1000 / 500 and found.ended is None
    assert status_of(FAULTY, now=1080.0).allocated_seconds == 3 * (100 + 80)


def test_a_resume_between_two_points_counts_its_share() -> None:
    events = [*FAULTY[:3], event(40, "progress", step=20, step_seconds=30.0), start(50, 15)]
    assert status_of(events).counted_seconds == 2 * 20.0  # ten steps in 10 s, and half of ten steps in 20 s


def test_the_end() -> None:
    stopped = [*FAULTY, event(1030, "stop", 1, step=45, step_seconds=10.0, reason="signal")]
    assert status_of(stopped).ended == "signal" and status_of(stopped).eta_seconds is None
    assert status_of([*stopped, event(1031, "end", 1, code=75, cause="cancelled")]).ended == "cancelled (exit code 75)"
    assert status_of([*stopped, event(2000, "begin", 2)]).ended is None  # it has come again


def test_a_run_outside_of_slurm_and_none() -> None:
    events = [{"time": time, **facts} for time, facts in ((0.0, {"event": "start", "step": 0, "of": 9}),
              (8.0, {"event": "save", "step": 4, "step_seconds": 6.0}), (50.0, {"event": "resume", "step": 4, "of": 9}),
              (60.0, {"event": "stop", "step": 9, "step_seconds": 9.0, "reason": "finished"}))]  # fmt: skip
    found = status_of(events)
    assert found.allocated_seconds == 8 + 10 and found.counted_seconds == 6 + 9
    assert status_of([]).goodput is None


@pytest.mark.parametrize(
    ("names", "number"),
    [("", 1), ("gpu1", 1), ("gpu1,login", 2), ("gpu[03-07]", 5), ("gpu[03-07,9],login1", 7), ("r[1-2]n[01-10]", 20)],
)
def test_nodes_are_counted(names: str, number: int) -> None:
    assert count_nodes(names) == number
