"""Fixtures of the data tests that jobs need too."""

from tests.data.conftest import sp_model as sp_model
