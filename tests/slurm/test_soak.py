"""Random faults on one run over Slurm: a short form of ``python -m tests.slurm.soak``."""

from __future__ import annotations

from pathlib import Path

import pytest

from steel_megatron import events
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
    found = events.read(tmp_path / "run")
    kinds = [event["event"] for event in found]
    assert kinds.count("start") + kinds.count("resume") == len(FAULTS) + 1
    assert kinds.count("begin") == 3  # a killed process and a lost node are no reason for a requeue
    assert sorted(event["cause"] for event in found if event["event"] == "fault") == ["crash", "node lost"]
