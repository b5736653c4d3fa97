"""Uneven pipeline stages, stages without layers, and stages of several chunks compute what one process computes."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from steel_megatron.config import CheckpointConfig, DataConfig, ParallelConfig, RunConfig
from steel_megatron.errors import SteelError
from steel_megatron.report import read_scalars
from tests.distributed import run_distributed
from tests.hf.launched import Pieces
from tests.train.small_run import compare, own_batches, small_run, train
from tests.train.test_loop import make_run, outcome, write_corpus

ALONE = ParallelConfig()
UNEVEN = ParallelConfig(pipeline_model_parallel_size=2, pipeline_layers=[1, 3])
ENDS_ALONE = ParallelConfig(pipeline_model_parallel_size=4, pipeline_layers=[0, 3, 1, 0])
INTERLEAVED = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
UNEVEN_CHUNKS = dataclasses.replace(INTERLEAVED, pipeline_layers=[0, 3, 1, 0])
FOUR_BY_TWO = ParallelConfig(
    pipeline_model_parallel_size=4,
    virtual_pipeline_model_parallel_size=2,
    pipeline_layers=[0, 1, 1, 1, 1, 1, 1, 0],
)
THREE_CHUNKS = ParallelConfig(
    pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3, pipeline_layers=[0, 1, 1, 1, 1, 0]
)

# Only one of the stages has experts.
EMBEDDING_ALONE = ParallelConfig(pipeline_model_parallel_size=2, pipeline_layers=[0, 4], expert_model_parallel_size=2)


@dataclasses.dataclass(frozen=True)
class Followed:
    """Loss and gradient norm of each step, the loss of an evaluation, and this process's weights at the end."""

    figures: list[float]
    weights: Pieces


def follow(runs: dict[str, RunConfig]) -> dict[str, Followed]:
    """Train each run."""
    from steel_megatron.parallel.topology import initialize

    found = {}
    for name, run in runs.items():
        topology = initialize(run.parallel)
        from steel_megatron.model.weights import sharded_weights
        from steel_megatron.train.engine import Engine, minimised

        engine = Engine(run, topology)
        figures: list[float] = []
        for step in range(1, run.training.train_steps + 1):
            done = engine.step(own_batches(run, step, topology))
            figures += (done.loss, done.grad_norm)
        figures.append(minimised(engine.evaluate(own_batches(run, 0, topology))).mean)
        weights = {
            f"{one.key}|{','.join(map(str, one.global_offset))}|{one.prepend_axis_num}": one.data.detach().clone()
            for one in sharded_weights(*engine.chunks).values()
        }
        found[name] = Followed(figures, weights)
    return found


def assert_equal(ranks: list[Followed], one: Followed) -> None:
    """Processes of a layout against one process alone: all figures, and every weight, none of them missing."""
    for rank in ranks:
        assert rank.figures == pytest.approx(one.figures, rel=1e-5)
    seen = dict.fromkeys(one.weights, 0)
    for rank in ranks:
        for place, weight in rank.weights.items():
            key, offset, prepended = place.split("|")
            layer, inside = (offset.split(",")[: int(prepended)], offset.split(",")[int(prepended) :])
            whole = f"{key}|{','.join([*layer, *('0' for _ in inside)])}|{prepended}"
            box = tuple(slice(int(start), int(start) + size) for start, size in zip(inside, weight.shape, strict=True))
            # The biases of lowest frequency of keys have next to no gradient, and Adam makes steps of its rounding.
            atol = 1e-3 if key.endswith("linear_qkv.bias") else 1e-5
            torch.testing.assert_close(weight, one.weights[whole][box], rtol=1e-5, atol=atol, msg=place)
            seen[whole] += weight.numel()
    for whole, count in seen.items():
        assert count >= one.weights[whole].numel(), f"no process has all of {whole}"


@cache
def alone(steps: int, layers: int = 4) -> Followed:
    return run_distributed(follow, 1, {"": small_run(ALONE, steps=steps, num_layers=layers)})[0][""]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [2, 4])
def test_twenty_steps_equal_one_process(processes: int) -> None:
    layouts = {
        2: {"uneven": UNEVEN, "interleaved": INTERLEAVED, "uneven chunks": UNEVEN_CHUNKS, "three": THREE_CHUNKS},
        4: {"ends alone": ENDS_ALONE},
    }[processes]
    runs = {name: small_run(parallel, steps=20) for name, parallel in layouts.items()}
    if processes == 4:
        runs["four by two"] = small_run(FOUR_BY_TWO, steps=20, num_layers=6)
    by_rank = run_distributed(follow, processes, runs, timeout=250)
    for name, run in runs.items():
        assert_equal([rank[name] for rank in by_rank], alone(20, run.model.num_layers))


def several(runs: dict[str, RunConfig]) -> dict[str, list[Any]]:
    return {name: train(run) for name, run in runs.items()}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_other_networks_in_chunks_equal_one_process() -> None:
    """The gradient of every tensor; with dropout, packed documents and layers that are computed again."""
    variants: dict[str, dict[str, Any]] = {
        "token": {"routing_mode": "token", "slots_per_expert": 1},
        "merged": {"routing_mode": "merged"},
        "sequence": {"routing_mode": "sequence"},
        "dense": {"ffn": "dense", "routing_mode": None},
        "top_k_moe": {"ffn": "top_k_moe", "ffn_activation": "swiglu", "routing_mode": None},
        "dropout": {"hidden_dropout": 0.3, "attention_dropout": 0.2},
        "documents": {},
        "documents again": {"hidden_dropout": 0.3},
    }

    def runs(parallel: ParallelConfig) -> dict[str, RunConfig]:
        made = {name: small_run(parallel, steps=2, **model) for name, model in variants.items()}
        for name in ("documents", "documents again"):
            made[name] = dataclasses.replace(made[name], data=DataConfig(reset_at_eod=True))
        return made

    chunks = runs(UNEVEN_CHUNKS)
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = dataclasses.replace(chunks["documents again"].model, megatron=again)
    chunks["documents again"] = dataclasses.replace(chunks["documents again"], model=model)
    ones = run_distributed(several, 1, runs(ALONE), timeout=150)[0]
    by_rank = run_distributed(several, 2, chunks, timeout=150)
    for name in variants:
        compare([rank[name] for rank in by_rank], ones[name])


def resaved(runs: list[RunConfig], origin: Path) -> None:
    """Load the newest checkpoint of a run's folder, and save it again under other layouts."""
    for run in runs:
        from steel_megatron.parallel.topology import initialize

        topology = initialize(run.parallel)
        from steel_megatron.train import checkpoint, checkpoint_save
        from steel_megatron.train.engine import Engine

        engine = Engine(run, topology)
        info = checkpoint.newest(origin / "checkpoints")
        assert info is not None
        checkpoint.load(engine, info)
        checkpoint_save.save(engine, info.consumed_samples)


def hashes(folders: list[Path]) -> list[dict[str, str]]:
    """Of the weights and the optimizer's state in checkpoints."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint

    initialize(ALONE)
    found = []
    for folder in folders:
        info = checkpoint.newest(folder / "checkpoints")
        assert info is not None
        names = [name for name in checkpoint.tensor_names(info) if not name.startswith("random.")]
        tensors = checkpoint.read_tensors(info, names)
        found.append({key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in tensors.items()})
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_checkpoints_move_between_pipelines_bit_by_bit(tmp_path: Path) -> None:
    first = small_run(UNEVEN_CHUNKS, str(tmp_path / "first"), steps=3)
    steps = run_distributed(train, 2, first, 1, 2, True)
    compare([rank[:-1] for rank in steps], run_distributed(train, 1, small_run(ALONE, steps=2))[0][:-1])
    layouts = {
        1: {"alone": ALONE},
        2: {"uneven": UNEVEN, "three": THREE_CHUNKS, "tensors": ParallelConfig(tensor_model_parallel_size=2)},
        4: {"ends alone": ENDS_ALONE, "embedding alone": EMBEDDING_ALONE},
    }
    folders = [tmp_path / "first"]
    for processes, named in layouts.items():
        runs = [small_run(parallel, str(tmp_path / name), steps=3) for name, parallel in named.items()]
        run_distributed(resaved, processes, runs, folders[0])
        folders += [tmp_path / name for name in named]
    original, *copies = run_distributed(hashes, 1, folders)[0]
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in original)
    for folder, copy in zip(folders[1:], copies, strict=True):
        assert copy == original, folder.name
    # From one process to chunks, and on.
    resumed = dataclasses.replace(first, checkpoint=dataclasses.replace(first.checkpoint, directory=str(folders[1])))
    third = run_distributed(train, 2, resumed, 3, 3, False, True)
    compare(third, run_distributed(train, 1, small_run(ALONE, steps=3))[0][2:])


def outcomes(runs: list[RunConfig]) -> list[Any]:
    return [outcome(run) for run in runs]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_runs_in_chunks_through_the_loop(tmp_path: Path) -> None:
    """Validation of a number of micro batches that the schedule does not take, routing metrics of all layers, and
    weights of another run to begin with."""
    data = DataConfig(
        train=[write_corpus(tmp_path / "train", 60, 0)], validation=[write_corpus(tmp_path / "valid", 12, 1)]
    )
    chunks = dataclasses.replace(INTERLEAVED, pipeline_layers=[0, 1, 1, 0])
    summaries, scalars = [], []
    for name, parallel, processes in (("alone", ALONE, 1), ("chunks", chunks, 2)):
        run = make_run(data, tmp_path / name, parallel, routing_metrics_interval=2, global_batch_size=4, eval_steps=100)
        begun = make_run(data, tmp_path / f"{name}, begun", parallel, train_steps=1)
        origin = CheckpointConfig(
            directory=begun.checkpoint.directory, init_from=str(tmp_path / "alone/checkpoints/step_00000006")
        )
        begun = dataclasses.replace(begun, checkpoint=origin)
        summaries.append(run_distributed(outcomes, processes, [run, begun], timeout=200)[-1])
        scalars.append(read_scalars(run.tensorboard_dir))
    for theirs, ours in zip(*summaries, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
        assert ours.validation_loss == pytest.approx(theirs.validation_loss, rel=1e-5)
    measured = [name for name in scalars[0] if name.startswith("routing/layer_02/")]
    assert measured and scalars[1].keys() == scalars[0].keys()
    for name in scalars[0]:
        if name.startswith("routing/"):
            values = [[value for _, value in one[name]] for one in scalars]
            assert values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-6), name


def poisoned(run: RunConfig) -> tuple[str, str, str]:
    """What a run says of an infinite weight in the third layer, of a loss that overflows, and of its only stage."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train.engine import Engine

    messages = []
    for place in ("forward", "backward"):
        engine = Engine(run, topology)
        for chunk in engine.chunks:
            for layer in chunk.decoder.layers:
                if layer.layer_number == 3 and place == "forward":
                    layer.mlp.experts.up.data.fill_(float("inf"))
                elif layer.layer_number == 3:
                    layer.mlp.phi.register_hook(lambda gradient: gradient * float("nan"))
        try:
            engine.step(own_batches(run, 1, topology))
        except SteelError as error:
            messages.append(str(error))
    try:
        str(engine.stage)
    except SteelError as error:
        messages.append(str(error))
    return messages[0], messages[1], messages[2]


def test_where_numbers_fail_in_chunks() -> None:
    run = small_run(INTERLEAVED, steps=1)
    for forward, backward, stage in run_distributed(poisoned, 2, run):
        assert "the weight decoder.layers.0.mlp.experts.up of layer 3" in forward
        assert "the gradient of decoder.layers.0.mlp.phi (layer 3)" in backward
        assert "each process has 2 model chunks" in stage and "use chunks" in stage


def test_a_number_of_micro_batches_that_does_not_fit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    run = small_run(INTERLEAVED, str(tmp_path / "run"))
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, global_batch_size=6))
    expected = "3 micro batches of a step (training.global_batch_size 6 / (micro_batch_size 2 x data-parallel size 1))"
    for message, groups in run_distributed(refused, 2, run):
        assert message.startswith(expected) and "pipeline_model_parallel_size = 2" in message
        assert not groups
    assert not (tmp_path / "run").exists()


def refused(run: RunConfig) -> tuple[str, bool]:
    message = str(outcome(run))
    return message, torch.distributed.is_initialized()
