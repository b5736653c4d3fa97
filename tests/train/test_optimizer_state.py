"""The optimizer's state on disk: boxes of whole tensors, whoever held which range of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from steel_megatron.config import RunConfig
from steel_megatron.train.optimizer_state import MAIN_WEIGHTS, boxes
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, own_batches, small_run


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (3, 1, 4), (4, 3, 1)])
def test_any_range_of_a_tensor_is_a_few_boxes_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel() + 1):
        for end in range(start, whole.numel() + 1):
            found = list(boxes(shape, start, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)
            inside = [
                whole[tuple(slice(at, at + size) for at, size in zip(*box, strict=True))].flatten() for box in found
            ]
            assert torch.cat([torch.empty(0), *inside]).tolist() == list(range(start, end))


def hand_over(run: RunConfig) -> list[dict[str, torch.Tensor]]:
    """The float32 weights in the checkpoints of a run in bfloat16, of one in float32 that resumes it, and back."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint, checkpoint_save
    from steel_megatron.train.engine import Engine

    topology = initialize(run.parallel)
    found: list[dict[str, torch.Tensor]] = []
    info = None
    for number, precision in enumerate(("bfloat16", "float32", "bfloat16")):
        own: Any = dataclasses.replace(
            run,
            training=dataclasses.replace(run.training, precision=precision),
            checkpoint=dataclasses.replace(run.checkpoint, directory=f"{run.checkpoint.directory}/{number}"),
        )
        engine = Engine(own, topology)
        if info is None:
            engine.step(own_batches(own, 1, topology))
        else:
            checkpoint.load(engine, info)
        info = checkpoint.read_info(checkpoint_save.save(engine, 8))
        assert info.has_main_weights == (precision == "bfloat16")
        weights = checkpoint.tensor_names(info)
        main = {name.removeprefix(MAIN_WEIGHTS): name for name in weights if name.startswith(MAIN_WEIGHTS)}
        names = main or {name: name for name in weights if not name.startswith(("optimizer.", "random."))}
        tensors = checkpoint.read_tensors(info, list(names.values()))
        found.append({key: tensors[name] for key, name in names.items()})
    return found


def test_float32_weights_are_handed_over_between_precisions_and_are_stored_once(tmp_path: Path) -> None:
    """Two processes hold halves of the optimizer's state, which end inside of tensors."""
    mixed, full, again = run_distributed(hand_over, 2, small_run(LAYOUTS["dp2"], str(tmp_path), num_layers=1))[0]
    assert mixed.keys() == full.keys() == again.keys() and len(mixed) > 10
    for key, tensor in mixed.items():
        assert tensor.dtype == full[key].dtype == torch.float32
        assert torch.equal(tensor, full[key]) and torch.equal(tensor, again[key]), key
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in mixed.values())
