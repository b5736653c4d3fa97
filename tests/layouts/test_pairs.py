"""The plan leaves no pair out."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steel_megatron.errors import ConfigError
from tests.layouts.features import FEATURES, ROUNDED, parse
from tests.layouts.pairs import Planner, Row, goals_of, met
from tests.layouts.plan import fast, planned, processes_of

Table = dict[str, list[str]]


VALUE = st.tuples(st.integers(0, 5), st.integers(0, 3))


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    refused=st.lists(st.tuples(st.tuples(st.integers(0, 5), st.integers(1, 3)), VALUE), max_size=4),
)
def test_rows_meet_all_pairs_that_can_be(
    sizes: list[int], refused: list[tuple[tuple[int, int], tuple[int, int]]]
) -> None:
    """Against every row that there is; two values of different factors may refuse each other."""
    factors = {f"f{number}": [f"v{value}" for value in range(size)] for number, size in enumerate(sizes)}
    together = [{(f"f{factor}", f"v{value}") for factor, value in pair} for pair in refused if pair[0][0] != pair[1][0]]

    def cost(row: Row) -> float | None:
        return None if any(pair <= set(row.items()) for pair in together) else 1.0

    rows, impossible = Planner(factors, cost).cover(goals_of(factors, 2))
    assert all(cost(row) is not None for row in rows)
    every = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    can_be = {goal for row in every if cost(row) is not None for goal in met(row) if len(goal) == 2}
    assert can_be <= {goal for row in rows for goal in met(row)}
    assert set(impossible) == set(goals_of(factors, 2)) - can_be


def test_ten_choices_of_three_take_few_rows() -> None:
    """The best plans that are known have 14 rows."""
    factors = {f"f{number}": ["a", "b", "c"] for number in range(10)}
    rows, impossible = Planner(factors, lambda row: 1.0).cover(goals_of(factors, 2))
    assert len(rows) <= 20 and not impossible


def test_every_feature_is_planned_and_every_pair_exactly() -> None:
    """A pair that no case has is refused by the settings, whatever else the run is."""
    cases, impossible = planned()
    assert len({case.id for case in cases}) == len(cases) and all(parse(case.id).row == case.row for case in cases)
    assert {(name, value) for name, values in FEATURES.items() for value in values} == {
        one for case in cases for one in case.row.items()
    }
    exact = [case.row for case in cases if not ROUNDED.intersection(case.row.items())]
    wide = {goal for case in cases for goal in met(case.row) if ROUNDED.intersection(goal)}
    seen = wide | {goal for row in exact for goal in met(row)}
    factors = {name: list(values) for name, values in FEATURES.items()}
    assert {goal for goal in goals_of(factors, 2) if goal not in seen} == set(impossible)
    generator = random.Random(0)
    for goal in impossible:
        rows = [{name: generator.choice(values) for name, values in factors.items()} | dict(goal) for _ in range(50)]
        assert not any(map(processes_of, rows)), goal


def test_the_fast_cases_have_every_feature_that_two_processes_allow() -> None:
    assert len(fast()) <= 9 and all(case.processes <= 2 for case in fast())
    left = {one for case in planned()[0] if case.processes <= 2 for one in case.row.items()} - ROUNDED
    assert left == {one for case in fast() for one in case.row.items()}


@pytest.mark.parametrize("name", ["token-TP3", "token-SP", "TP4-PP4", ""])
def test_ids_that_are_no_cases_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        parse(name)
