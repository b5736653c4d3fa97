"""Fixtures of the data tests that jobs over Slurm need too."""

from tests.data.conftest import sp_model as sp_model
