"""The processes that the cases share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.layouts.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes that stay for all cases."""
    pool = Pool()
    yield pool
    pool.close()
