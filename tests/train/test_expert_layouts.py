"""Experts cut over processes of their own, and megatron-core's top-k experts, equal one process under every layout."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from steel_megatron.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from steel_megatron.errors import ConfigError
from tests.distributed import run_distributed
from tests.train.small_run import compare, small_run, train

TOP_2: dict[str, Any] = {
    "ffn": "top_k_moe",
    "ffn_activation": "swiglu",
    "routing_mode": None,
    # Large enough that a loss of the router which weighs differently shows.
    "moe_aux_loss_coeff": 0.1,
    "megatron": {"moe_z_loss_coeff": 0.05},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "block_causal": {},
    "sequence": {"routing_mode": "sequence"},
    "token": {"routing_mode": "token"},
    "merged": {"routing_mode": "merged", "block_length": 5},
    "swiglu": {"ffn_activation": "swiglu", "shared_expert_intermediate_size": 0},
    "top 2": TOP_2,
    "top 1, loss of sequences": {**TOP_2, "moe_top_k": 1, "moe_router_load_balancing_type": "seq_aux_loss"},
}
TOP = ("top 2", "top 1, loss of sequences")


def cut(
    tensor: int = 1, expert: int = 1, expert_tensor: int | None = None, *, sp: bool = False, pp: int = 1, cp: int = 1
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        sequence_parallel=sp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
    )


# Processes, and the layout.
TOP_LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "dp2": (2, cut()),
    "ep2": (2, cut(expert=2)),
    "cp2": (2, cut(cp=2)),
    "cp2 ep2": (2, cut(expert=2, cp=2)),
    "tp2 sp": (2, cut(2, sp=True)),
    "ep2 dp2": (4, cut(expert=2)),
    "tp2 sp ep2": (4, cut(2, 2, sp=True)),
    "cp2 tp2 sp": (4, cut(2, sp=True, cp=2)),
    "pp2 ep2": (4, cut(expert=2, pp=2)),
}
APART_LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "tp2 etp1 ep2": (2, cut(2, 2, 1)),
    "etp2": (2, cut(1, 1, 2)),
    "tp2 etp4": (4, cut(2, 1, 4)),
    "cp2 tp2 sp etp1 ep4": (4, cut(2, 4, 1, sp=True, cp=2)),
}
# Four query heads, and as many for keys and values: they can be cut in four.
WIDE = {"num_query_groups": 4}


def run_of(variant: str, parallel: ParallelConfig, steps: int = 2, packed: bool = False, **model: Any) -> RunConfig:
    run = small_run(parallel, steps=steps, **{**VARIANTS[variant], **WIDE, **model})
    return dataclasses.replace(run, data=DataConfig(reset_at_eod=packed))


def train_all(runs: list[RunConfig]) -> list[list[Any]]:
    return [train(run) for run in runs]


@cache
def alone(variant: str, steps: int, packed: bool = False) -> list[Any]:
    return run_distributed(train, 1, run_of(variant, ParallelConfig(), steps, packed))[0]


def hold_to_one_process(layout: tuple[int, ParallelConfig], variants: tuple[str, ...], packed: bool = False) -> None:
    processes, parallel = layout
    runs = [run_of(variant, parallel, packed=packed) for variant in variants]
    by_rank = run_distributed(train_all, processes, runs)
    for number, variant in enumerate(variants):
        compare([results[number] for results in by_rank], alone(variant, 2, packed))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", TOP_LAYOUTS)
def test_top_k_experts_equal_one_process(layout: str) -> None:
    """With their losses of load and logits, whose gradients are among those that are compared."""
    hold_to_one_process(TOP_LAYOUTS[layout], TOP)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", APART_LAYOUTS)
def test_documents_that_give_unequal_numbers_of_slots_equal_one_process(layout: str) -> None:
    hold_to_one_process(APART_LAYOUTS[layout], ("block_causal", "sequence", "merged"), packed=True)


def losses_by_size(run: RunConfig, sizes: list[int]) -> list[list[Any]]:
    return [
        train(dataclasses.replace(run, training=dataclasses.replace(run.training, micro_batch_size=size)))
        for size in sizes
    ]


@pytest.mark.slow
def test_the_loss_of_sequences_does_not_depend_on_the_micro_batch_size() -> None:
    of_sequences, of_micro_batches = (
        run_distributed(losses_by_size, 1, run_of(variant, ParallelConfig()), [1, 2, 8])[0]
        for variant in ("top 1, loss of sequences", "top 2")
    )
    for results in of_sequences[1:]:
        compare([results], of_sequences[0])
    assert of_micro_batches[0][0].grad_norm != pytest.approx(of_micro_batches[2][0].grad_norm, rel=1e-4)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def saved(run: RunConfig) -> None:
    train(run, 1, 2, save=True)


def saved_again(run: RunConfig, into: str) -> None:
    """Load the run's checkpoint and save it elsewhere, without a step."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint, checkpoint_save
    from steel_megatron.train.engine import Engine

    engine = Engine(run, initialize(run.parallel))
    info = checkpoint.newest(run.checkpoints_dir)
    assert info is not None
    checkpoint.load(engine, info)
    engine.run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, directory=into))
    checkpoint_save.save(engine, info.consumed_samples)


def tensors_of(folders: list[str]) -> list[dict[str, torch.Tensor]]:
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint

    initialize(ParallelConfig())
    found = []
    for folder in folders:
        info = checkpoint.newest(Path(folder) / "checkpoints")
        assert info is not None
        names = [name for name in checkpoint.tensor_names(info) if not name.startswith("random")]
        found.append(checkpoint.read_tensors(info, names))
    return found


ROUTES = [
    ("top 2", (1, cut()), (2, cut(2, 2, 1, sp=True))),
    ("top 2", (2, cut(2, sp=True)), (2, cut(expert=2))),
    ("top 2", (4, cut(2, 2, sp=True)), (1, cut())),
    ("block_causal", (2, cut(2, 2, 1)), (2, cut(2))),
    ("block_causal", (2, cut(1, 1, 2)), (2, cut(2, 1, 1, sp=True))),
]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("variant", "before", "after"), ROUTES)
def test_checkpoints_are_the_same_under_every_layout(
    variant: str, before: tuple[int, ParallelConfig], after: tuple[int, ParallelConfig], tmp_path: Path
) -> None:
    """Weights and optimizer state, bit by bit; and training resumes where it was."""
    first, second = (
        dataclasses.replace(
            run_of(variant, parallel, 4),
            checkpoint=dataclasses.replace(run_of(variant, parallel).checkpoint, directory=str(tmp_path / "before")),
        )
        for _, parallel in (before, after)
    )
    run_distributed(saved, before[0], first)
    run_distributed(saved_again, after[0], second, str(tmp_path / "after"))
    one, other = run_distributed(tensors_of, 1, [str(tmp_path / "before"), str(tmp_path / "after")])[0]
    assert one.keys() == other.keys()
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert tensor.count_nonzero() or "scale" in name, name
    resumed = run_distributed(train, after[0], second, 3, 4, False, True)
    compare([rank[:-1] for rank in resumed], alone(variant, 4)[2:4])


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        (TOP_2, cut(2), "tensor_model_parallel_size = 2 without sequence_parallel; with ffn = top_k_moe all 2"),
        (TOP_2, cut(expert=3), "num_experts = 4 is not divisible by expert_model_parallel_size = 3"),
        (TOP_2, cut(expert_tensor=5), "ffn_hidden_size = 24 is not divisible by expert_tensor_parallel_size = 5"),
        ({}, cut(2, expert_tensor=5), "ffn_hidden_size = 24 is not divisible by expert_tensor_parallel_size = 5"),
        ({"ffn": "dense"}, cut(2, expert_tensor=1), "expert_tensor_parallel_size = 1, but ffn = dense has no experts"),
        ({"ffn": "none"}, cut(expert=2), "expert_model_parallel_size = 2, but ffn = none has no experts to share"),
    ],
)
def test_what_cannot_be_cut_is_refused(model: dict[str, Any], parallel: ParallelConfig, message: str) -> None:
    if "ffn" in model and "ffn_activation" not in model:
        model = {**model, "routing_mode": None}
    with pytest.raises(ConfigError, match=message):
        small_run(parallel, **model)


def test_a_layout_of_experts_has_its_arithmetic() -> None:
    parallel = cut(2, 2, 1, sp=True, cp=2)
    assert parallel.describe(8) == "TP2 SP PP1 CP2 EP2 ETP1 DP2"
    assert cut(2, 2, 2).describe(4) == "TP2 PP1 EP2 DP2"  # what it is without being said
    assert cut(4, 8, 1).data_parallel_size(8) == 2
    with pytest.raises(ConfigError, match=r"= 1 x 3 = 3 does not divide the 4 processes .*= 2 x 1 x 2\)"):
        cut(2, 3, 1).data_parallel_size(8 // 2)
    with pytest.raises(ConfigError, match="expert_tensor_parallel_size is 0; it must be at least 1"):
        cut(expert_tensor=0)
    with pytest.raises(ConfigError, match="moe_router_load_balancing_type is 'global_aux_loss'; it must be"):
        ModelConfig(moe_router_load_balancing_type="global_aux_loss", ffn="dense")  # type: ignore[arg-type]
    # The experts' width is only cut over the processes that share them.
    RunConfig(
        model=dataclasses.replace(run_of("block_causal", cut()).model, ffn_hidden_size=9),
        parallel=cut(2, 2, 1),
        training=TrainingConfig(),
    )
