"""A Slurm cluster of three nodes for all tests of this folder, and what jobs over Slurm need of the data tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.data.conftest import sp_model as sp_model
from tests.slurm.cluster import Cluster, cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as found:
        yield found


@pytest.fixture
def inside(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for commands of Slurm that this process gives."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    return slurm
