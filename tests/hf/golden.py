"""Reading the golden values of the published model; tests/fixtures/golden/README.md says what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "golden"
NAMES = ("steel_tiny", "steel_slots2", "steel_swiglu", "dense_senet")


def read(name: str) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """The configuration, and the tensors of ``model``, ``io`` and ``grads``."""
    folder = FOLDER / name
    config = json.loads((folder / "config.json").read_text())
    return config, {kind: load_file(folder / f"{kind}.safetensors") for kind in ("model", "io", "grads")}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs|."""
    return float((ours - theirs).norm() / theirs.norm())
