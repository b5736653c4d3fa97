"""steel_megatron: Soft-MoE language models, pretrained with tensor, pipeline, expert and data parallelism.

    from steel_megatron import RunConfig, SoftMoE, load_model, pretrain

Each name is imported when it is asked for, so that ``import steel_megatron`` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steel_megatron.config import RunConfig
    from steel_megatron.hf.loading import load_model
    from steel_megatron.model.layer import SoftMoE
    from steel_megatron.train.loop import pretrain

__version__ = "0.1.0"
__all__ = ["RunConfig", "SoftMoE", "load_model", "pretrain"]

_MODULES = {
    "RunConfig": "steel_megatron.config",
    "SoftMoE": "steel_megatron.model.layer",
    "load_model": "steel_megatron.hf.loading",
    "pretrain": "steel_megatron.train.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    if name == "pretrain":
        from steel_megatron.platform import prepare

        prepare()  # before megatron-core is imported
        from steel_megatron.hf.starting import start_from_folders

        start_from_folders()
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
