"""Fixtures that every test may use."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

from tests.needs import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401 (pytest finds its hooks here)

hypothesis.settings.register_profile("no_deadline", deadline=None)  # machines are shared, and slow at times
hypothesis.settings.load_profile("no_deadline")

if (
    "STEEL_TEST_CACHE" not in os.environ
):  # no test reads or fills the user's cache folder; processes that it starts share
    os.environ["STEEL_TEST_CACHE"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="steel-test-cache-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


class _Capabilities(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@pytest.fixture
def file_modes_hold() -> Iterator[None]:
    """What a file's mode forbids is forbidden in this process, also when root runs the tests."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call, for this thread
    before = (_Capabilities * 2)()
    assert libc.capget(header, before) == 0, os.strerror(ctypes.get_errno())
    without = (_Capabilities * 2).from_buffer_copy(before)
    without[0].effective &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, without) == 0, os.strerror(ctypes.get_errno())
    yield
    assert libc.capset(header, before) == 0, os.strerror(ctypes.get_errno())
