"""Which nodes of an allocation a run uses: not those that Slurm has lost, that are excluded or that fail a check."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steel_megatron.errors import ConfigError, TrainingError
from steel_megatron.files import write_atomically

FILE = "excluded_nodes.json"
EXCLUDED_SECONDS = 24 * 3600.0
"""How long a node that failed a check is left out; by then somebody may have repaired it."""
LOST_STATES = ("down", "fail", "unk", "no_respond", "power")
"""What the states of nodes begin with that run nothing; a node that is drained ends its jobs first."""
CLOCK_SECONDS = 10.0
"""How far a node's clock may be from the median of all."""
SLOW_SHARE = 1 / 3
"""A node with less than this share of the median bandwidth is slow."""


@dataclass(frozen=True)
class Usable:
    """Nodes of an allocation.

    Attributes:
        nodes: those that may be used, in order.
        left_out: why each other one may not.
    """

    nodes: list[str]
    left_out: dict[str, str]


def usable(
    allocated: Sequence[str], held: Sequence[str], states: Mapping[str, str], excluded: Mapping[str, str]
) -> Usable:
    """The nodes that Slurm has and that are not excluded.

    Args:
        allocated: names of all nodes of the allocation as it began.
        held: those that the job still has.
        states: what sinfo says of each.
        excluded: why each excluded node is.
    """
    left_out = {}
    for node in allocated:
        state = states.get(node, "").lower()
        if node not in held:
            left_out[node] = "it failed, and Slurm has taken it from the job"
        elif state.startswith(LOST_STATES) or state.endswith("*"):
            left_out[node] = f"Slurm says that it is {state}"
        elif node in excluded:
            left_out[node] = excluded[node]
    return Usable([node for node in allocated if node not in left_out], left_out)


def excluded(run: Path, now: float | None = None) -> dict[str, str]:
    """Why each node is excluded that still is.

    Args:
        run: the run's folder.
        now: seconds since the epoch; None for the clock's.
    """
    now = time.time() if now is None else now
    return {node: entry["reason"] for node, entry in _entries(run).items() if entry["until"] > now}


def exclude(run: Path, reasons: Mapping[str, str]) -> None:
    """Exclude nodes for a day.

    Args:
        run: the run's folder.
        reasons: by node.

    Raises:
        TrainingError: the folder cannot be written.
    """
    if not reasons:
        return
    now = time.time()
    known = {node: entry for node, entry in _entries(run).items() if entry["until"] > now}
    known |= {node: {"reason": why, "since": now, "until": now + EXCLUDED_SECONDS} for node, why in reasons.items()}
    write_atomically(run / FILE, json.dumps(known, indent=1, ensure_ascii=False).encode(), TrainingError)


def _entries(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / FILE).read_bytes())
        return {str(node): {"reason": str(one["reason"]), "since": float(one["since"]), "until": float(one["until"])}
                for node, one in found.items()}  # fmt: skip
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{run / FILE} cannot be read ({error}); correct or remove it") from None


def read_reports(text: str) -> dict[str, dict[str, Any]]:
    """The reports of nodes in the output of the check, whatever else is in it.

    Args:
        text: lines; a report is one line of JSON.
    """
    found = {}
    for line in text.splitlines():
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(report, dict) and isinstance(report.get("node"), str):
            found[report["node"]] = report
    return found


def judge(nodes: Sequence[str], reports: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Why each node that fails does.

    A node is held against the others: its versions against what most have, its clock and its bandwidth against the
    median.

    Args:
        nodes: those that were to report.
        reports: by node: ``problems``, and where they are known ``versions``, ``clock`` (seconds since the epoch, all
            at one moment) and ``bandwidth`` (bytes/s).

    Raises:
        ConfigError: all nodes have the same problem, which is then none of the nodes, or none gave a report.
    """
    if not any(node in reports for node in nodes):
        raise ConfigError("no node gave a report of its check; the job's log says why")
    bad: dict[str, list[str]] = {node: [] for node in nodes}
    problems = {node: list(reports[node].get("problems", [])) for node in nodes if node in reports}
    common = set.intersection(*map(set, problems.values())) if problems else set()
    if common and len(problems) == len(nodes):
        raise ConfigError(f"on {'all nodes' if len(nodes) > 1 else nodes[0]}: {'; '.join(sorted(common))}")
    for node in nodes:
        bad[node] += problems.get(node, ["it gave no report; the job's log may say why"])
    for node, why in _other_versions({node: reports[node].get("versions", {}) for node in problems}).items():
        bad[node].append(why)
    clocks = {node: float(reports[node]["clock"]) for node in problems if "clock" in reports[node]}
    for node, clock in clocks.items():
        apart = clock - statistics.median(clocks.values())
        if abs(apart) > CLOCK_SECONDS:
            bad[node].append(f"its clock is {apart:+.0f} s from the others'")
    rates = {node: float(reports[node]["bandwidth"]) for node in problems if "bandwidth" in reports[node]}
    for node, rate in rates.items():
        median = statistics.median(rates.values())
        if len(rates) > 2 and rate < SLOW_SHARE * median:
            bad[node].append(f"its link is slow: {rate / 1e9:.2f} GB/s, the median is {median / 1e9:.2f} GB/s")
    return {node: "; ".join(whys) for node, whys in bad.items() if whys}


def _other_versions(versions: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What each node has another version of than most nodes; of two halves, the one that comes first is right."""
    found: dict[str, list[str]] = {}
    for name in sorted({name for own in versions.values() for name in own}):
        (usual, _), *_ = Counter(own.get(name, "none") for own in versions.values()).most_common(1)
        for node, own in versions.items():
            if own.get(name, "none") != usual:
                found.setdefault(node, []).append(f"it has {name} {own.get(name, 'none')}, the others {usual}")
    return {node: "; ".join(whys) for node, whys in found.items()}
