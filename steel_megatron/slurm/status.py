"""How a run is doing, from its events alone: steps, speed, faults, and the share of time in steps that count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from steel_megatron.events import Event
from steel_megatron.slurm.life import allocation_of


@dataclass
class Status:
    """A run so far.

    Attributes:
        step: the last step that is known to be done.
        steps: of the whole run.
        checkpoint: step of the newest checkpoint.
        loss: of the last step that is known.
        tokens_per_second: of the launch that is or was last under way.
        eta_seconds: until the last step at this speed; None if nobody knows.
        allocations: how often a job began.
        requeues: by cause.
        faults: by cause.
        ended: why it ended; None if it has not.
        allocated_seconds: node-seconds of all allocations.
        counted_seconds: node-seconds in steps that count: not those that were done again.
        goodput: the share of the second in the first; None before there is any.
    """

    step: int = 0
    steps: int = 0
    checkpoint: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    allocations: int = 0
    requeues: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    ended: str | None = None
    allocated_seconds: float = 0.0
    counted_seconds: float = 0.0

    @property
    def goodput(self) -> float | None:
        """See above."""
        return self.counted_seconds / self.allocated_seconds if self.allocated_seconds else None


@dataclass
class _Launch:
    """A launch of the run: where it began, how many nodes it had, and points (steps done, seconds in steps)."""

    first: int
    nodes: int
    points: list[tuple[int, float]]

    def seconds_until(self, step: int) -> float:
        """Seconds in steps up to this one; between two points they are taken for equally long."""
        before = self.points[0]
        for point in self.points:
            if point[0] >= step:
                share = (step - before[0]) / (point[0] - before[0]) if point[0] > before[0] else 1.0
                return before[1] + share * (point[1] - before[1]) if step > before[0] else before[1]
            before = point
        return before[1]


def status_of(events: Sequence[Event], now: float | None = None) -> Status:
    """Sum up events.

    Args:
        events: of a run, in order.
        now: time for an allocation that has not ended, in seconds since the epoch; None for that of its last event.
    """
    found, tokens_per_step = Status(), 0
    launches: list[_Launch] = []
    for event in events:
        kind = event["event"]
        if kind in ("start", "resume"):
            found.step, found.steps, found.ended = event.get("step", 0), event.get("of", 0), None
            tokens_per_step = event.get("tokens_per_step", 0)
            launches.append(_Launch(found.step, count_nodes(event.get("nodes", "")), [(found.step, 0.0)]))
        elif kind in ("progress", "save", "stop") and launches:
            step = event.get("step", 0)
            found.step = max(found.step, step)
            found.loss = event.get("loss", found.loss)
            found.tokens_per_second = event.get("tokens_per_second", found.tokens_per_second)
            launches[-1].points.append((step, event.get("step_seconds", 0.0)))
            if kind == "save":
                found.checkpoint = max(found.checkpoint or 0, step)
        if kind == "stop":
            found.ended = event.get("reason")
        elif kind == "end":
            found.ended = f"{event.get('cause')} (exit code {event.get('code')})"
        elif kind == "begin":
            found.allocations, found.ended = found.allocations + 1, None
    found.requeues = dict(Counter(event.get("cause", "") for event in events if event["event"] == "requeue"))
    found.faults = dict(Counter(event.get("cause", "") for event in events if event["event"] == "fault"))
    found.allocated_seconds = _allocated(events, None if found.ended else now)
    for number, launch in enumerate(launches):
        launch.points.sort()
        resumed = min((later.first for later in launches[number + 1 :]), default=launch.points[-1][0])
        found.counted_seconds += launch.nodes * launch.seconds_until(min(resumed, launch.points[-1][0]))
    if found.tokens_per_second and tokens_per_step and found.ended is None:
        found.eta_seconds = (found.steps - found.step) * tokens_per_step / found.tokens_per_second
    return found


def _allocated(events: Sequence[Event], now: float | None) -> float:
    """Node-seconds of all allocations; a launch outside of a job is one as well."""
    spans: dict[object, list[float]] = {}
    nodes: dict[object, int] = {}
    number = 0
    for event in events:
        key: object = allocation_of(event)
        if not event.get("job"):
            number += event["event"] in ("start", "resume")
            key = number
        spans.setdefault(key, []).append(event["time"])
        nodes[key] = max(nodes.get(key, 1), event.get("allocated", count_nodes(event.get("nodes", ""))))
    if now is not None and spans:
        spans[next(reversed(spans))].append(now)
    return sum(nodes[key] * (max(times) - min(times)) for key, times in spans.items())


def count_nodes(node_list: str) -> int:
    """The number of hosts of a Slurm node list, such as 6 of ``gpu[03-07],login``; 1 of an empty one.

    Args:
        node_list: as Slurm writes it.
    """
    total = 0
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        count = 1
        for inside in re.findall(r"\[([^\]]*)\]", name):
            count *= sum(_size(part) for part in inside.split(","))
        total += count
    return max(total, 1)


def _size(part: str) -> int:
    first, dash, last = part.partition("-")
    return int(last) - int(first) + 1 if dash and first.isdecimal() and last.isdecimal() else 1
