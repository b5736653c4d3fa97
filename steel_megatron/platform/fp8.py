"""What a machine lacks for matrix products in FP8."""

from __future__ import annotations

import importlib.util

import torch

from steel_megatron.platform.probe import probe

CAPABILITY = (8, 9)
"""The first GPUs with FP8 (Ada; Hopper is 9.0)."""


def missing_for_fp8() -> list[str]:
    """What is missing here, in words; empty where matrix products in FP8 run."""
    missing = []
    if probe().device.type != "cuda":
        missing.append("a GPU")
    elif (own := torch.cuda.get_device_capability()) < CAPABILITY:
        missing.append(f"a GPU of compute capability 8.9 or above (this one has {own[0]}.{own[1]})")
    if importlib.util.find_spec("transformer_engine") is None:
        missing.append('transformer-engine (pip install --no-build-isolation "steel-megatron[cuda]")')
    return missing
