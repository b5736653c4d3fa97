"""Checkpoints to Hugging Face folders and back: what other packages call."""

from __future__ import annotations

from steel_megatron.hf.exporting import DTYPES, export_hf
from steel_megatron.hf.folder import read_weights
from steel_megatron.hf.importing import import_hf
from steel_megatron.hf.paths import parse_size, read_config
from steel_megatron.hf.upcycling import Upcycling

__all__ = [
    "DTYPES",
    "Upcycling",
    "export_hf",
    "import_hf",
    "parse_size",
    "read_config",
    "read_weights",
]
