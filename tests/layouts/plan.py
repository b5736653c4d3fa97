"""The cases that are run: few, and every pair of features meets in one of them."""

from __future__ import annotations

from functools import cache

from steel_megatron.errors import ConfigError
from tests.layouts.features import FEATURES, MOVED, ROUNDED, Case, case_of
from tests.layouts.pairs import Goal, Planner, Row, goals_of, met


def processes_of(row: Row) -> float | None:
    """Of the run that a row stands for; None if the settings do not accept it."""
    try:
        return case_of(row).processes
    except ConfigError:
        return None


def _exact() -> dict[str, list[str]]:
    """The features without those that are compared within wide bounds."""
    return {name: [value for value in values if (name, value) not in ROUNDED] for name, values in FEATURES.items()}


@cache
def fast() -> list[Case]:
    """Every feature once that two processes allow."""

    def small(row: Row) -> float | None:
        processes = processes_of(row)
        return processes if processes is not None and processes <= 2 else None

    return [case_of(row) for row in Planner(_exact(), small).cover(goals_of(_exact(), 1))[0]]


@cache
def planned() -> tuple[list[Case], list[Goal]]:
    """All cases, and the pairs that the settings refuse.

    A pair is compared exactly in one of them; wide bounds are only for what has them with everything else.
    """
    rows, impossible = [case.row for case in fast()], []
    wide = {name: list(values) for name, values in FEATURES.items()}
    for factors, goals in (
        (_exact(), goals_of(_exact(), 2)),
        (wide, (goal for goal in goals_of(wide, 2) if ROUNDED.intersection(goal))),
    ):
        known = {goal for row in rows for goal in met(row)}
        found, refused = Planner(factors, processes_of).cover(goal for goal in goals if goal not in known)
        rows += found
        impossible += refused
    return [case_of(row) for row in rows], impossible


@cache
def moves() -> list[tuple[Case, Case]]:
    """Layouts that save and layouts that load: every value of one side meets every value of the other.

    The network and the precision are the same on both sides, and meet all values of either side.
    """
    sides = ("from", "to")
    # The other modes have the tensors of the first.
    factors = {"mode": ["block_causal", "dense", "top_k_moe"], "precision": list(FEATURES["precision"])}
    factors |= {f"{side} {name}": list(FEATURES[name]) for side in sides for name in MOVED}

    def cases(row: Row) -> list[Case]:
        neutral = {name: next(iter(values)) for name, values in FEATURES.items()}
        network = {name: row[name] for name in ("mode", "precision")}
        return [case_of(neutral | network | {name: row[f"{side} {name}"] for name in MOVED}) for side in sides]

    def processes(row: Row) -> float | None:
        try:
            return sum(case.processes for case in cases(row))
        except ConfigError:
            return None

    def across(goal: Goal) -> bool:
        one, other = (name.split()[0] for name, _ in goal)
        return one != other

    rows, _ = Planner(factors, processes).cover(goal for goal in goals_of(factors, 2) if across(goal))
    return [(cases(row)[0], cases(row)[1]) for row in rows]
