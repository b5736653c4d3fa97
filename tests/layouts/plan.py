"""The cases that are run: few, and every pair of features meets in one of them."""

from __future__ import annotations

from functools import cache

from steel_megatron.errors import ConfigError
from tests.layouts.features import FEATURES, ROUNDED, Case, case_of
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
