"""Every layout computes what one process computes, and loads what any other has saved.

The cases are planned (:mod:`tests.layouts.plan`). Each one can be run alone by its id, and so can any other that the
table of features allows: ``pytest "tests/layouts/test_matrix.py::test_equals_one_process[token-TP2-SP-PP2]"``.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from steel_megatron.config import CheckpointConfig
from steel_megatron.train.optimizer_state import MAIN_WEIGHTS
from tests.layouts import plan
from tests.layouts.features import ROUNDED, Case, parse
from tests.layouts.following import EXACT, WIDE, Record, compared, follow, whole_tensors
from tests.layouts.pool import Pool, Task
from tests.layouts.saving import SAVED, State, load_and_train, save_and_train

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


@pytest.mark.timeout(600)
def test_equals_one_process(case: Case, pool: Pool) -> None:
    bounds = WIDE if ROUNDED.intersection(case.row.items()) else EXACT
    alone, together = begin_alone(case, pool), pool.start(follow, case.processes, case.run)
    ranks, one = together.results(), ended_alone(case, alone)
    wrong = [number for number in compared(ranks, one, bounds) if not number.error <= number.bound]
    assert not wrong, f"{case.id} on {case.processes} processes, {len(wrong)} numbers:\n" + "\n".join(
        map(str, itertools.islice(wrong, SHOWN))
    )


def everything(ranks: list[State], precision: str) -> dict[str, torch.Tensor]:
    """Whole weights and whole optimizer state; of rounded weights the float32 copies, which they have to follow."""
    weights, optimizer = (whole_tensors([getattr(state, part) for state in ranks]) for part in ("weights", "optimizer"))
    copies = {name: optimizer.pop(MAIN_WEIGHTS + name) for name in weights if MAIN_WEIGHTS + name in optimizer}
    assert all(torch.equal(weights[name], copy.to(getattr(torch, precision)).float()) for name, copy in copies.items())
    return weights | copies | optimizer


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("saves", "loads"), [pytest.param(*move, id=f"{move[0].id} to {move[1].id}") for move in plan.moves()]
)
def test_any_layout_loads_what_any_other_saved(saves: Case, loads: Case, pool: Pool, tmp_path: Path) -> None:
    """Bit by bit, and the run goes on as if it had not moved."""
    to_disk = CheckpointConfig(directory=str(tmp_path))
    first, second = (dataclasses.replace(case.run, checkpoint=to_disk) for case in (saves, loads))
    saved, loaded = pool.run(save_and_train, saves.processes, first), pool.run(load_and_train, loads.processes, second)
    before, after = everything(saved, saves.run.training.precision), everything(loaded, loads.run.training.precision)
    assert after.keys() == before.keys() and any(name.startswith("optimizer.state.exp_avg_sq.") for name in before)
    assert not [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert {step for state in saved + loaded for step in state.steps} == {SAVED}
    bounds = WIDE if ROUNDED.intersection(saves.row.items()) else EXACT
    for state in loaded:
        for ours, theirs in zip(state.losses, saved[0].losses, strict=True):
            assert ours == pytest.approx(theirs, rel=bounds.norm)
