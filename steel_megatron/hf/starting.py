"""Lets runs start from exported folders. Importing this is cheap; what reads a folder is imported when one is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steel_megatron.hf.initial_weights import ExportedWeights


def start_from_folders() -> None:
    """Let ``checkpoint.init_from`` name a Hugging Face folder, in all runs of this process."""
    from steel_megatron.train.initial_weights import openers

    openers[:] = [_open]


def _open(path: Path) -> ExportedWeights:
    from steel_megatron.hf.initial_weights import ExportedWeights

    return ExportedWeights(path)
