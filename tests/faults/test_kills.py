"""A run that is killed again and again ends as if nothing had happened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.harness import Campaign


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_runs_end_bit_for_bit_as_undisturbed_ones(tmp_path: Path) -> None:
    kills, seed = (int(os.environ.get(name, default)) for name, default in (("KILLS", "6"), ("KILLS_SEED", "1")))
    campaign = Campaign(tmp_path, kills, seed)
    campaign.run()
    assert campaign.done == kills
