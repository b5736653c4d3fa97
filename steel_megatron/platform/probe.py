"""Which device, backend and optional parts are here. Probed once; nothing else in the library asks."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import torch

from steel_megatron.log import get_logger
from steel_megatron.platform.compiling import compiled_at_first_call

logger = get_logger(__name__)

# Dense bfloat16 peak of one device in FLOP/s, from the vendor's data sheets; the longest matching name counts.
PEAK_BFLOAT16 = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "A10": 125e12,
}


@dataclass(frozen=True)
class Platform:
    """What was found.

    Attributes:
        device: where tensors live.
        backend: torch.distributed's backend for that device.
        peak_flops: dense bfloat16 FLOP/s of one device, None where the device is not in the table.
        transformer_engine: transformer-engine's version; None where it is not installed or no GPU is there.
        apex_norm: whether NVIDIA's apex is installed with its kernels for norms, and a GPU is there.
        apex_gradients: the same for its kernel that accumulates the gradients of matrices.
    """

    device: torch.device
    backend: str
    peak_flops: float | None
    transformer_engine: str | None
    apex_norm: bool
    apex_gradients: bool


@cache
def probe() -> Platform:
    """Look at the machine, once per process."""
    if not torch.cuda.is_available():
        return Platform(torch.device("cpu"), "gloo", None, None, False, False)
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    # A launcher may show each process only its own device.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    name = torch.cuda.get_device_name(device)
    matching = [key for key in PEAK_BFLOAT16 if key in name]
    return Platform(
        device=device,
        backend="nccl",
        peak_flops=PEAK_BFLOAT16[max(matching, key=len)] if matching else None,
        transformer_engine=version("transformer-engine") if _is_there("transformer_engine") else None,
        # The package registry's "apex" is another project; only NVIDIA's has these extensions.
        apex_norm=_is_there("apex") and _is_there("fused_layer_norm_cuda"),
        apex_gradients=_is_there("fused_weight_gradient_mlp_cuda"),
    )


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@cache
def prepare() -> Platform:
    """Make megatron-core ready for this machine; called before any of its parts is used."""
    # megatron-core warns of each optional package it misses, of its own deprecations, and reads .grad of views.
    # (The module that the last one names is decided by torch's C++ side.)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated|Please use DTensor", category=FutureWarning
    )
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    with compiled_at_first_call():
        import megatron.core.optimizer  # noqa: F401

    for noisy in ("megatron.core", "torch.distributed", "torch.distributed.checkpoint"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    platform = probe()
    if platform.device.type == "cpu":
        from steel_megatron.platform import cpu

        cpu.install()
    return platform
