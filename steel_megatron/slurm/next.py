"""``python -m steel_megatron.slurm.next``: what a batch script asks. It imports nothing that is slow.

``begin`` at its start, ``usable`` and ``nodes`` for the nodes of a step, ``after`` a step, ``terminated`` when Slurm
asks it to end. What it prints is for the script; messages go to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from steel_megatron import events
from steel_megatron.errors import ExitCode, TrainingError
from steel_megatron.files import disk_errors
from steel_megatron.log import exit_code, get_logger
from steel_megatron.slurm import nodes
from steel_megatron.slurm.life import allocation_of, decide, faults_without_checkpoint, lost_without_word

logger = get_logger(__name__)

STOP_FOR_GOOD = "slurm_cancelled"
"""The file in the run's folder with the id of the job that the user has cancelled."""
_NEARLY = 5.0
"""Seconds before the time limit from which on Slurm's signal is taken to mean it."""


def main(words: Sequence[str] | None = None) -> int:
    """Answer the script.

    Args:
        words: of the command line; None for ``sys.argv``.

    Returns:
        the exit code: 0, or what the script ends or continues with.
    """
    options = _parser().parse_args(words)
    code: int | None = None

    def answer() -> None:
        nonlocal code
        code = {"begin": begin, "usable": usable, "nodes": chosen, "after": after, "terminated": terminated}[
            options.question
        ](Path(options.run), options)

    return exit_code(answer) or code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="steel_megatron.slurm.next", description=__doc__)
    parser.add_argument("question", choices=("begin", "usable", "nodes", "after", "terminated"))
    parser.add_argument("--run", required=True, help="the run's folder")
    parser.add_argument("--max-faults", type=int, default=3)
    parser.add_argument("--code", type=int, default=0, help="exit code of the step")
    parser.add_argument("--terminated", default="no")
    parser.add_argument("--allocated", default="", help="nodes, with commas")
    parser.add_argument("--held", default="", help="those of them that the job still has; empty if nobody knows")
    parser.add_argument("--states", default="", help="NODE=STATE as sinfo says, with commas")
    parser.add_argument("--counts", default="1", help="numbers of nodes that the run can use, the best first")
    parser.add_argument("--checked", default="no", help="whether stdin has the reports of the preflight")
    return parser


def begin(run: Path, options: argparse.Namespace) -> int:
    """Take note of an allocation; GIVEN_UP if there were too many faults before it."""
    with disk_errors("make", run, TrainingError):
        run.mkdir(parents=True, exist_ok=True)
    known = events.read(run)
    allocation = _allocation()
    if lost_without_word(known, allocation):
        events.record(run, "fault", cause="node lost")
        known = events.read(run)
    events.record(run, "begin", allocated=int(os.environ.get("SLURM_JOB_NUM_NODES", "1")))
    faults = faults_without_checkpoint(known, _allocation()[0])
    if len(faults) <= options.max_faults:
        return 0
    events.record(run, "end", code=int(ExitCode.GIVEN_UP), cause=faults[-1]["cause"])
    logger.error(_given_up(run, len(faults), options.max_faults))
    return ExitCode.GIVEN_UP


def usable(run: Path, options: argparse.Namespace) -> int:
    """Print the nodes of the allocation that Slurm has not lost, and that are not excluded."""
    allocated = _names(options.allocated)
    found = nodes.usable(allocated, _names(options.held) or allocated, _states(options), nodes.excluded(run))
    for node, reason in found.left_out.items():
        logger.warning(f"not on {node}: {reason}")
    return _print(found.nodes)


def chosen(run: Path, options: argparse.Namespace) -> int:
    """Print the nodes for a step: as many as the run can use, of those whose reports are good."""
    candidates = _names(options.allocated)
    if options.checked == "yes":
        bad = nodes.judge(candidates, nodes.read_reports(sys.stdin.read()))
        for node, reason in bad.items():
            logger.warning(f"{node} is left out: {reason}")
            events.record(run, "excluded", node=node, reason=reason)
        nodes.exclude(run, bad)
        candidates = [node for node in candidates if node not in bad]
    counts = [int(count) for count in options.counts.split(",")]
    count = next((count for count in counts if count <= len(candidates)), None)
    if count is None:
        logger.error(f"{len(candidates)} nodes are healthy ({', '.join(candidates)}); the run needs {min(counts)}")
        return ExitCode.NO_NODES
    if count < counts[0]:
        logger.warning(f"{len(candidates)} nodes are healthy: the run continues with {count} instead of {counts[0]}")
    return _print(candidates[:count])


def after(run: Path, options: argparse.Namespace) -> int:
    """Print what to do after a step: ``again``, ``requeue``, or ``exit CODE``."""
    known = events.read(run)
    end = os.environ.get("SLURM_JOB_END_TIME", "0")
    time_is_up = end.isdecimal() and 0 < int(end) <= time.time() + _NEARLY
    terminated, job = options.terminated == "yes", os.environ.get("SLURM_JOB_ID", "")
    marker = run / STOP_FOR_GOOD
    cancelled = marker.is_file() and job in marker.read_text().split()
    decision = decide(
        options.code,
        known,
        _allocation(),
        max_faults=options.max_faults,
        terminated=terminated,
        cancelled=cancelled,
        time_is_up=time_is_up,
    )
    if decision.cause in ("crash", "no nodes"):
        lost = sorted(set(_names(options.allocated)) - set(_names(options.held))) if options.held else []
        cause = "node lost" if lost else decision.cause
        events.record(run, "fault", cause=cause, code=options.code, lost=lost or None)
    if decision.action == "exit":
        events.record(run, "end", code=int(decision.code), cause=decision.cause)
        if decision.code == ExitCode.GIVEN_UP:
            logger.error(
                _given_up(run, len(faults_without_checkpoint(known, _allocation()[0])) + 1, options.max_faults)
            )
    elif decision.action == "requeue":
        events.record(run, "requeue", cause=decision.cause)
    sys.stdout.write(f"exit {int(decision.code)}\n" if decision.action == "exit" else f"{decision.action}\n")
    return 0


def terminated(run: Path, options: argparse.Namespace) -> int:
    """Take note that Slurm asks the job to end, before it may be killed; if it has lost a node, that is why."""
    allocated = _names(options.allocated)
    lost = list(nodes.usable(allocated, allocated, _states(options), {}).left_out)
    told = [event for event in events.read(run) if event["event"] == "fault" and allocation_of(event) == _allocation()]
    events.record(run, "terminated")
    if lost and not any(set(event.get("lost", ())) & set(lost) for event in told):  # the step may have ended first
        events.record(run, "fault", cause="node lost", lost=lost)
    return 0


def _given_up(run: Path, faults: int, allowed: int) -> str:
    return (
        f"{faults} crashes or lost nodes of {run} without a new checkpoint; max_faults allows {allowed}. The cause is "
        "in the job's log; the same job can be submitted again"
    )


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _states(options: argparse.Namespace) -> dict[str, str]:
    return dict(one.split("=", 1) for one in _names(options.states) if "=" in one)


def _allocation() -> tuple[str, int]:
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID", ""), int(restart) if restart.isdecimal() else 0


def _print(found: Sequence[str]) -> int:
    if not found:
        logger.error("no node of the allocation is left")
        return ExitCode.NO_NODES
    sys.stdout.write(",".join(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
