"""From published weights to checkpoints and back, through the library's own training forward and backward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steel_megatron.config import ParallelConfig, RunConfig, TrainingConfig
from steel_megatron.errors import CheckpointError, SteelError
from steel_megatron.hf import convert, mapping
from steel_megatron.train import checkpoint
from tests.distributed import run_distributed
from tests.hf import golden

LAYOUTS = {
    "alone": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "ep2": (2, ParallelConfig(expert_model_parallel_size=2)),
}


def refused(action: str, *args: Any, **kwargs: Any) -> str:
    """Calls a function of ``convert`` that must raise; returns the message."""
    try:
        getattr(convert, action)(*args, **kwargs)
    except SteelError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module", params=golden.NAMES)
def imported(
    request: pytest.FixtureRequest, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A golden model and the checkpoint that was imported from it."""
    output = tmp_path_factory.mktemp(request.param) / "imported"
    run_distributed(convert.import_hf, 1, shared_dir / "golden" / request.param, output)
    return request.param, output


def training_gradients(
    path: Path, parallel: ParallelConfig, io: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the training forward, and this process's gradients by name and offset in the checkpoint's tensors."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(parallel)
    from steel_megatron.model.spec import build_model
    from steel_megatron.model.weights import sharded_weights
    from steel_megatron.train.engine import Engine
    from steel_megatron.train.objective import Batch

    info = checkpoint.read_info(path)
    batch = len(io["input_ids"])
    run = RunConfig(
        model=info.model,
        parallel=parallel,
        training=TrainingConfig(micro_batch_size=batch, global_batch_size=batch * topology.data_parallel_size),
    )
    stage = build_model(info.model, topology)
    checkpoint.load_weights(stage, info, info.model)
    engine = Engine(run, topology, stage)
    labels = io["labels"]
    # Data-parallel processes all see the same batch: their mean is the fixture's.
    loss, _ = engine.accumulate_gradients([Batch(io["input_ids"], labels, torch.ones(labels.shape))])
    gather_gradients(engine.model)
    by_storage = {parameter.data_ptr(): parameter.main_grad for parameter in stage.parameters()}
    return loss, {
        f"{sharded.key}|{','.join(map(str, sharded.global_offset))}|{sharded.prepend_axis_num}": by_storage[
            sharded.data.data_ptr()
        ].clone()
        for sharded in sharded_weights(stage).values()
    }


def gather_gradients(model: Any) -> None:
    """Every process's part of the reduced gradients, on all: the distributed optimizer reduces to one part each."""
    import torch.distributed as dist

    for buffer in [*model.buffers, *model.expert_parallel_buffers]:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def assemble(parts: list[dict[str, torch.Tensor]], model: Any) -> dict[str, torch.Tensor]:
    """Whole gradients under published names from the processes' pieces."""
    whole = {
        rule.key: torch.zeros((model.num_layers, *rule.shape) if rule.per_layer else rule.shape)
        for rule in mapping.rules(model)
    }
    for part in parts:
        for label, piece in part.items():
            key, offsets, prepended = label.split("|")
            place = [int(number) for number in offsets.split(",")]
            shape = [1] * int(prepended) + list(piece.shape)
            index = tuple(slice(start, start + size) for start, size in zip(place, shape, strict=True))
            whole[key][index] = piece.view(shape)
    return mapping.to_hf(whole, model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_the_published_model(layout: str, imported: tuple[str, Path], shared_dir: Path) -> None:
    name, path = imported
    config, tensors = golden.read(shared_dir, name)
    model = mapping.config_from_hf(config, name)
    processes, parallel = LAYOUTS[layout]
    if model.ffn == "dense" and layout == "ep2":
        return  # a dense model has no experts to share; the configuration refuses it
    results = run_distributed(training_gradients, processes, path, parallel, tensors["io"])
    expected_loss = tensors["io"]["loss"].item()
    for loss, _ in results:
        assert loss == pytest.approx(expected_loss, rel=1e-6)
    gradients = assemble([part for _, part in results], model)
    for key, expected in tensors["grads"].items():
        assert golden.relative_error(gradients[key], expected) < 1e-4, key


def test_export_gives_back_the_same_bits_and_transformers_loads_it(
    imported: tuple[str, Path], shared_dir: Path, tmp_path: Path
) -> None:
    name, path = imported
    _, tensors = golden.read(shared_dir, name)
    exported = tmp_path / "exported"
    run_distributed(convert.export_hf, 1, path, exported)
    again = load_file(exported / "model.safetensors")
    assert again.keys() == tensors["model"].keys()
    for key, tensor in tensors["model"].items():
        assert torch.equal(again[key], tensor) and again[key].dtype == tensor.dtype, key
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        logits = model(tensors["io"]["input_ids"]).logits
    torch.testing.assert_close(logits, tensors["io"]["logits"], atol=1e-4, rtol=0)


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """A small model's published folder, made here."""
    from tests.hf.test_mapping import BASE, random_tensors

    folder = tmp_path / "published"
    folder.mkdir()
    save_file(random_tensors(BASE), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(mapping.config_to_hf(BASE)))
    return folder


def test_a_folder_in_several_files(small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(small_folder / "model.safetensors")
    monkeypatch.setattr(convert, "MAX_SHARD_BYTES", 20_000)
    convert._write_weights(tmp_path, tensors)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    again = convert._read_weights(tmp_path)
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"names {files[1]}, which is not there"):
        convert._read_weights(tmp_path)


@pytest.mark.parametrize("damage", ["not finite", "missing tensor", "truncated", "pickle", "no config", "bad config"])
def test_folders_that_cannot_be_imported(small_folder: Path, tmp_path: Path, damage: str) -> None:
    weights = small_folder / "model.safetensors"
    tensors = load_file(weights)
    expected = {"truncated": "is damaged", "pickle": "which can execute anything", "no config": "config.json"}
    if damage == "not finite":
        tensors["lm_head.weight"][3, 4] = float("nan")
        save_file(tensors, weights)
        expected[damage] = "lm_head.weight holds values that are not finite"
    elif damage == "missing tensor":
        del tensors["model.norm.weight"]
        save_file(tensors, weights)
        expected[damage] = "has no tensor model.norm.weight"
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "pickle":
        weights.rename(small_folder / "pytorch_model.bin")
    elif damage == "no config":
        (small_folder / "config.json").unlink()
    else:
        (small_folder / "config.json").write_text("{")
        expected[damage] = "config.json is not JSON"
    assert expected[damage] in refused("import_hf", small_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def convert_twice(folder: Path, output: Path) -> list[str]:
    """Imports and exports with overwriting asked for and not; returns the messages."""
    convert.import_hf(folder, output / "checkpoint")
    messages = [refused("import_hf", folder, output / "checkpoint")]
    convert.import_hf(folder, output / "checkpoint", overwrite=True)
    convert.export_hf(output / "checkpoint", output / "hf", dtype="bfloat16")
    messages.append(refused("export_hf", output / "checkpoint", output / "hf"))
    convert.export_hf(output / "checkpoint", output / "hf", dtype="bfloat16", overwrite=True)
    messages.append(refused("export_hf", output / "checkpoint", output / "checkpoint" / "hf"))
    messages.append(refused("export_hf", output / "hf", output / "again"))
    return messages


def test_outputs_are_replaced_only_when_asked(small_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    messages = run_distributed(convert_twice, 1, small_folder, output)[0]
    assert "is already there" in messages[0] and "is already there" in messages[1]
    assert "lies inside" in messages[2] and "steel.json" in messages[3]
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint", "hf"]
    assert load_file(output / "hf/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    checkpoint.verify(output / "checkpoint")


def test_weights_only_checkpoints_say_so(small_folder: Path, tmp_path: Path) -> None:
    run_distributed(convert.import_hf, 1, small_folder, tmp_path / "out")
    info = checkpoint.read_info(tmp_path / "out")
    assert not info.has_optimizer and info.step == 0
    shutil.rmtree(tmp_path / "out")
