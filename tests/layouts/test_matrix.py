"""Every layout computes what one process computes, and loads what any other has saved.

The cases are planned (:mod:`tests.layouts.plan`). Each one can be run alone by its id, and so can any other that the
table of features allows: ``pytest "tests/layouts/test_matrix.py::test_equals_one_process[token-TP2-SP-PP2]"``.
"""

from __future__ import annotations

import itertools

import pytest

from tests.layouts import plan
from tests.layouts.features import ROUNDED, Case, parse
from tests.layouts.following import EXACT, WIDE, Record, compared, follow
from tests.layouts.pool import Pool, Task

_ALONE: dict[str, Record] = {}
"""What one process gives, by its settings."""
SHOWN = 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The planned cases, and those that are asked for by their ids."""
    if "case" not in metafunc.fixturenames:
        return
    quick = {case.id for case in plan.fast()}
    cases = {case.id: case for case in plan.planned()[0]}
    for word in metafunc.config.args:
        test, _, name = word.partition("[")
        if test.endswith("::test_equals_one_process") and name:
            cases.setdefault(name.removesuffix("]"), parse(name.removesuffix("]")))
    marks = {name: [] if name in quick else [pytest.mark.slow] for name in cases}
    metafunc.parametrize("case", [pytest.param(case, id=name, marks=marks[name]) for name, case in cases.items()])


def begin_alone(case: Case, pool: Pool) -> Task | None:
    """The run of a case in one process, if it has not run yet."""
    return None if repr(case.alone) in _ALONE else pool.start(follow, 1, case.alone)


def ended_alone(case: Case, task: Task | None) -> Record:
    """What one process gave."""
    if task is not None:
        _ALONE[repr(case.alone)] = task.results()[0]
    return _ALONE[repr(case.alone)]


@pytest.mark.timeout(280)
def test_equals_one_process(case: Case, pool: Pool) -> None:
    bounds = WIDE if ROUNDED.intersection(case.row.items()) else EXACT
    alone, together = begin_alone(case, pool), pool.start(follow, case.processes, case.run)
    ranks, one = together.results(), ended_alone(case, alone)
    wrong = [number for number in compared(ranks, one, bounds) if not number.error <= number.bound]
    assert not wrong, f"{case.id} on {case.processes} processes, {len(wrong)} numbers:\n" + "\n".join(
        map(str, itertools.islice(wrong, SHOWN))
    )
