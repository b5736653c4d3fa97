"""Lets megatron-core run where there is no CUDA device.

megatron-core names CUDA in many places: it asks for the current CUDA device, makes tensors there, keeps CUDA
random states and checks that parameters are CUDA tensors. On a machine without one, :func:`install` hands
megatron-core's modules a stand-in for the ``torch`` module that answers these with the CPU. Everybody else's
``torch`` stays as it is, with two exceptions on ``torch.Tensor`` that act only when megatron-core's own code
calls them (methods cannot be handed out by module). Nothing else in the library patches anything.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

# The parts of megatron-core that this library uses, imported so that each can be given the stand-in.
MODULES = (
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.parallel_state",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.moe.router",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.transformer_layer",
)

FACTORIES = ("arange", "as_tensor", "empty", "full", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``factory`` with a CUDA device argument turned into the CPU, and without pinned memory."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # for faster copies to a device that is not there
        return factory(*args, **kwargs)

    return make


class _Overlay(types.ModuleType):
    """A module that answers some names itself and leaves the others to the module behind it."""

    def __init__(self, behind: types.ModuleType, **own: Any) -> None:
        super().__init__(behind.__name__, behind.__doc__)
        self.__dict__.update(own)
        self.__dict__["_behind"] = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_behind"], name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for synchronisation, cache and profiler-range calls, which a CPU does not need."""


class _Stream:
    """Stands for the one stream of work that a CPU has, and for an event in it; nothing has to wait."""

    def wait_stream(self, stream: _Stream) -> None:
        """Nothing to wait for."""

    def record_event(self) -> _Stream:
        """What can be waited for."""
        return self

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _stand_in() -> _Overlay:
    stream = _Stream()
    cuda = _Overlay(
        torch.cuda,
        current_device=lambda: "cpu",
        synchronize=_nothing,
        empty_cache=_nothing,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        nvtx=_Overlay(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing),
        stream=lambda stream=None: contextlib.nullcontext(),
        Stream=lambda *args, **kwargs: stream,
        current_stream=lambda device=None: stream,
    )
    return _Overlay(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in FACTORIES})


def _already_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _optimizers_of_torch() -> None:
    """Let megatron-core update with torch's optimizers, also where transformer-engine or apex is installed.

    It takes theirs wherever they can be imported, as on the login node of a cluster; they need a GPU.
    """
    from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_l2_norm, local_multi_tensor_scale

    many = {"multi_tensor_applier": local_multi_tensor_applier, "multi_tensor_scale_impl": local_multi_tensor_scale}
    theirs = {"HAVE_APEX_OR_TE": False, "USING_TE_OPTIMIZER": False, "USING_APEX_OPTIMIZER": False}
    for name, own in (
        ("", {"Adam": torch.optim.AdamW, "SGD": torch.optim.SGD, "USING_PYTORCH_OPTIMIZER": True}),
        (".distrib_optimizer", {"Adam": torch.optim.Adam, **theirs}),
        (".optimizer", many),
        (".clip_grads", {**many, "l2_norm_impl": local_multi_tensor_l2_norm}),
    ):
        module = importlib.import_module(f"megatron.core.optimizer{name}")
        missing = own.keys() - module.__dict__.keys()
        assert not missing, f"{module.__name__} has no {', '.join(sorted(missing))} any more"
        module.__dict__.update(own)


def _called_from_megatron(depth: int = 2) -> bool:
    return str(sys._getframe(depth).f_globals.get("__name__", "")).startswith("megatron.core")


def _patch_tensor_methods() -> None:
    plain_type, plain_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The optimizer sorts parameters by this string and refuses those that are not on CUDA."""
        if dtype is not None:
            return plain_type(self, dtype, *args, **kwargs)
        name = plain_type(self)
        return name.replace("torch.", "torch.cuda.", 1) if _called_from_megatron() else name

    def to_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_from_megatron() else plain_cuda(self, *args, **kwargs)

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = to_cuda  # type: ignore[method-assign,assignment]


@functools.cache
def install() -> None:
    """Put the stand-in into megatron-core's modules; a second call does nothing.

    A name that a newer megatron-core no longer has fails here, loudly, rather than later.
    """
    assert not torch.cuda.is_available(), "the stand-in is for machines without a CUDA device"
    for name in MODULES:
        importlib.import_module(name)
    stand_in = _stand_in()
    patched = 0
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = stand_in
            patched += 1
    assert patched >= len(MODULES), f"only {patched} modules of megatron-core import torch by that name"

    random = sys.modules["megatron.core.tensor_parallel.random"]
    for accessor in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        assert hasattr(random, accessor), f"megatron.core.tensor_parallel.random has no {accessor} any more"
    # These two reach below torch.cuda, into its generators.
    random.__dict__["_get_cuda_rng_state"] = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random.__dict__["_set_cuda_rng_state"] = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # Numbers of tokens for each process: only what comes from a CUDA device would be turned into what torch takes.
    dispatcher = sys.modules["megatron.core.transformer.moe.token_dispatcher"]
    assert hasattr(dispatcher, "maybe_move_tensor_to_cpu"), (
        f"{dispatcher.__name__} moves no tensors to the CPU any more"
    )
    dispatcher.__dict__["maybe_move_tensor_to_cpu"] = _already_on_cpu
    # The router takes transformer-engine's matrix product where it is, by a name that is only there if it is.
    sys.modules["megatron.core.transformer.moe.moe_utils"].__dict__["te_general_gemm"] = None
    _optimizers_of_torch()
    _patch_tensor_methods()
