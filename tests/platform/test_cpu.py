"""megatron-core's modules see a stand-in for torch; nobody else does."""

from __future__ import annotations

import sys

import pytest
import torch

from steel_megatron.platform import prepare
from steel_megatron.platform.cpu import FACTORIES, MODULES, _optimizers_of_torch
from tests import needs

pytestmark = needs.no_gpu.mark


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    assert prepare().device.type == "cpu"


@pytest.mark.parametrize("name", MODULES)
def test_every_listed_module_of_megatron_core_is_still_there(name: str) -> None:
    assert name in sys.modules


def test_megatron_core_makes_its_tensors_on_the_cpu() -> None:
    stand_in = sys.modules["megatron.core.optimizer.distrib_optimizer"].torch
    assert stand_in is not torch
    assert stand_in.cuda.current_device() == "cpu"
    for name in FACTORIES:
        assert hasattr(torch, name)
    assert stand_in.zeros(2, device="cuda").device.type == "cpu"
    stand_in.cuda.synchronize()


def test_updates_are_torch_s_where_transformer_engine_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a login node it can be imported, and its optimizers cannot run."""
    names = ("Adam", "multi_tensor_applier", "multi_tensor_scale_impl", "l2_norm_impl", "HAVE_APEX_OR_TE")
    of_megatron = [module for name, module in sys.modules.items() if name.startswith("megatron.core.optimizer")]
    found = [(module, name) for module in of_megatron for name in names if name in vars(module)]
    own = [getattr(module, name) for module, name in found]
    for module, name in found:
        monkeypatch.setattr(module, name, "transformer-engine's")
    _optimizers_of_torch()
    assert [getattr(module, name) for module, name in found] == own and len(found) >= 8
    assert sys.modules["megatron.core.optimizer"].Adam is torch.optim.AdamW
    assert sys.modules["megatron.core.transformer.moe.moe_utils"].te_general_gemm is None


def test_random_states_go_to_the_cpu_generator() -> None:
    random = sys.modules["megatron.core.tensor_parallel.random"]
    before = torch.get_rng_state()
    state = random._get_cuda_rng_state()
    torch.rand(3)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.get_rng_state(), before)


def test_everybody_else_keeps_torch_as_it_is() -> None:
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1).cuda()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
