"""Random faults on one run over Slurm: a short form of ``python -m tests.slurm.soak``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import needs
from tests.slurm.cluster import Cluster
from tests.slurm.soak import FAULTS, soak

pytestmark = [needs.slurm.mark, pytest.mark.timeout(900), pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


def test_each_kind_of_fault_leaves_the_run_bit_equal(
    inside: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    said: list[str] = []
    assert 0 < soak(inside, tmp_path, len(FAULTS), 1, said.append) < 1
    assert len(said) == len(FAULTS) + 1
