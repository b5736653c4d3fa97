"""What a job does next, by exit code and events alone; no Slurm is needed."""

from __future__ import annotations

from typing import Any

import pytest

from steel_megatron.errors import ExitCode
from steel_megatron.slurm.life import decide, faults_without_checkpoint, lost_without_word

HERE = ("7", 2)


def event(kind: str, restart: int = 2, job: str = "7", **facts: Any) -> dict[str, Any]:
    return {"event": kind, "time": 0.0, "job": job, "restart": restart, **facts}


FAULT = event("fault")
EARLIER = event("fault", restart=1)
SAVE = event("save")


@pytest.mark.parametrize(
    ("code", "events", "expected"),
    [
        (0, [FAULT] * 9, ("exit", 0)),
        (2, [], ("exit", 2)),
        (75, [FAULT] * 9, ("requeue", 75)),  # stops do not count
        (76, [], ("again", 76)),
        (137, [], ("again", 137)),
        (1, [], ("again", 1)),
        (76, [EARLIER], ("again", 76)),  # the first fault of this allocation
        (76, [FAULT], ("requeue", 76)),  # the second one
        (76, [FAULT, SAVE], ("again", 76)),
        (76, [EARLIER, EARLIER], ("again", 76)),
        (76, [EARLIER, EARLIER, FAULT], ("exit", 93)),
        (76, [EARLIER, SAVE, EARLIER, FAULT], ("requeue", 76)),
        (76, [event("fault", job="6")] * 5, ("again", 76)),  # of an earlier submission
        (69, [], ("requeue", 69)),  # no nodes: another step here would find none either
    ],
)
def test_by_exit_code_and_faults(code: int, events: list[dict[str, Any]], expected: tuple[str, int]) -> None:
    decision = decide(code, events, HERE, max_faults=3)
    assert (decision.action, decision.code) == expected


@pytest.mark.parametrize("code", [75, 76, 143])
def test_when_slurm_or_the_user_ends_it(code: int) -> None:
    assert decide(code, [], HERE, max_faults=3, terminated=True).action == "exit"  # Slurm requeues it, or does not
    timed = decide(code, [FAULT] * 9, HERE, max_faults=3, terminated=True, time_is_up=True)
    assert (timed.action, timed.cause) == ("requeue", "time limit")
    cancelled = decide(code, [], HERE, max_faults=3, cancelled=True)
    assert (cancelled.action, cancelled.code) == ("exit", ExitCode.STOPPED)
    assert decide(0, [], HERE, max_faults=3, terminated=True, cancelled=True).code == 0  # it had come to its end


def test_the_count_begins_anew_with_a_checkpoint_and_with_a_submission() -> None:
    events = [FAULT, SAVE, EARLIER, event("fault", job="6"), FAULT]
    assert faults_without_checkpoint(events, "7") == [EARLIER, FAULT]


def test_an_allocation_that_ended_without_a_word_was_lost() -> None:
    begun = [event("begin", restart=1), event("start", restart=1)]
    assert lost_without_word(begun, HERE)
    for word in ("requeue", "end", "terminated", "stop"):
        assert not lost_without_word([*begun, event(word, restart=1)], HERE)
    assert not lost_without_word(begun, ("7", 1))  # it is that one
    assert not lost_without_word(begun, ("8", 2))
    assert not lost_without_word([], HERE)
