"""megatron-core's modules see a stand-in for torch; nobody else does."""

from __future__ import annotations

import sys

import pytest
import torch

from steel_megatron.platform import prepare
from steel_megatron.platform.cpu import FACTORIES, MODULES
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
