"""What a job does next when a step of it has ended, from the exit code and the run's events alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from steel_megatron.errors import ExitCode
from steel_megatron.events import Event

Action = Literal["again", "requeue", "exit"]


@dataclass(frozen=True)
class Decision:
    """What the batch script does.

    Attributes:
        action: start a step again in this allocation, ask Slurm to requeue the job, or end.
        code: what the script exits with if it ends.
        cause: why, for the events.
    """

    action: Action
    code: int
    cause: str


def decide(
    code: int,
    events: Sequence[Event],
    allocation: tuple[str, int],
    *,
    max_faults: int,
    terminated: bool = False,
    cancelled: bool = False,
    time_is_up: bool = False,
) -> Decision:
    """What to do after a step.

    A preemption and the time limit may come any number of times. A crash or a lost node may come ``max_faults`` times
    without a new checkpoint in between; a step that fails is first started again in this allocation.

    Args:
        code: the step's exit code.
        events: of the run so far; the fault of this step is not among them.
        allocation: the job's id, and how often it was requeued.
        max_faults: crashes and lost nodes to allow.
        terminated: whether Slurm asked the batch script to end.
        cancelled: whether the user asked the run to stop for good.
        time_is_up: whether the job's time limit is reached.
    """
    if code == ExitCode.FINISHED:
        return Decision("exit", code, "finished")
    if code == ExitCode.WRONG_INPUT:
        return Decision("exit", code, "cannot continue")
    if cancelled:
        return Decision("exit", ExitCode.STOPPED if code != ExitCode.STOPPED else code, "cancelled")
    if terminated:  # Slurm requeues or cancels by itself, but not at the time limit
        return Decision("requeue", code, "time limit") if time_is_up else Decision("exit", code, "ended by Slurm")
    if code == ExitCode.STOPPED:
        return Decision("requeue", code, "time limit or signal")
    faults = faults_without_checkpoint(events, allocation[0])
    cause = "no nodes" if code == ExitCode.NO_NODES else "crash"
    if len(faults) >= max_faults:
        return Decision("exit", ExitCode.GIVEN_UP, cause)
    failed_here = any(allocation_of(fault) == allocation for fault in faults)
    if code == ExitCode.NO_NODES or failed_here:
        return Decision("requeue", code, cause)
    return Decision("again", code, cause)


def faults_without_checkpoint(events: Sequence[Event], job: str) -> list[Event]:
    """The faults of a job since the run's newest checkpoint, in order; one that is submitted again begins anew.

    Args:
        events: of the run so far.
        job: the job's id.
    """
    found: list[Event] = []
    for event in events:
        if event["event"] == "save":
            found = []
        elif event["event"] == "fault" and allocation_of(event)[0] == job:
            found.append(event)
    return found


def lost_without_word(events: Sequence[Event], allocation: tuple[str, int]) -> bool:
    """Whether an earlier allocation of this job ended without a word: its first node was lost.

    Args:
        events: of the run so far.
        allocation: the job's id, and how often it was requeued by now.
    """
    job, restart = allocation
    before = [event for event in events if allocation_of(event) == (job, restart - 1)]
    told = {"requeue", "end", "terminated"}
    ended = any(event["event"] in told or (event["event"] == "stop") for event in before)
    return any(event["event"] == "begin" for event in before) and not ended


def allocation_of(event: Event) -> tuple[str, int]:
    """The job's id, and how often it was requeued before this event."""
    restart = event.get("restart", 0)
    return str(event.get("job", "")), restart if isinstance(restart, int) else 0
