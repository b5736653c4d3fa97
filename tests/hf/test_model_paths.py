"""A run's folder, a checkpoint and an exported folder are taken alike; a run starts from each with the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steel_megatron.audit.sources import open_subject
from steel_megatron.config import ModelConfig, ParallelConfig
from steel_megatron.errors import CheckpointError, ConfigError, SteelError
from steel_megatron.hf.convert import Upcycling, export_hf, import_hf
from steel_megatron.hf.folder import ModelFolder
from steel_megatron.hf.texts import texts_of_folder, tokenizer_named
from steel_megatron.train.model_path import find_checkpoint, find_model
from tests.evaluation.benchmarks import write_model
from tests.hf.test_stock import make
from tests.layouts.pool import Pool

pytestmark = pytest.mark.slow

LAYOUTS = {
    "TP2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "EP2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "PP2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "FSDP2": (2, ParallelConfig(fsdp=True)),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported folders: Soft-MoE, top-k experts and dense; and a run of the first with two checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder)
    make("qwen2", folder / "dense")
    import_hf(folder / "dense", folder / "moe", upcycling=Upcycling(to="top_k_moe", num_experts=4))
    export_hf(folder / "moe", folder / "top_k")
    for step in (1, 2):
        import_hf(folder / "hf", folder / "run" / "checkpoints" / f"step_0000000{step}")
    return folder


def test_what_a_path_names(folder: Path) -> None:
    steps = folder / "run" / "checkpoints"
    assert find_model(folder / "run").path == steps / "step_00000002"
    assert find_model(steps / "step_00000001").path == steps / "step_00000001"
    assert find_model(folder / "hf").path == folder / "hf" and find_model(folder / "hf").info is None
    assert open_subject(folder / "run", 0).kind == "checkpoint"
    with pytest.raises(CheckpointError, match="hf is a Hugging Face folder; name a run's folder or a"):
        find_checkpoint(folder / "hf")
    for name, why in (
        ("nowhere", "there is no folder"),
        (".", "is neither a checkpoint"),
        ("hf/config.json", "no folder"),
    ):
        with pytest.raises(CheckpointError, match=why):
            find_model(folder / name)


def test_a_run_s_tokenizer_is_that_of_its_corpora(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    with pytest.raises(CheckpointError, match="does not say which tokenizer the model was trained with"):
        tokenizer_named("huggingface", str(tmp_path / "run"))
    data = f"data: {{tokenizer_kind: huggingface, tokenizer_path: {folder / 'tokenizer'}}}\n"
    (tmp_path / "run" / "checkpoints" / "step_00000002" / "run.yaml").write_text(data)
    places = (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000002", folder / "hf", folder / "tokenizer")
    found = [tokenizer_named("huggingface", str(path)).fingerprint for path in places]
    assert len(set(found)) == 1


def test_a_damaged_tokenizer_of_a_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"hf cannot be read: EOF.*; name one with --tokenizer_path"):
        texts_of_folder(tmp_path / "hf")


def test_a_damaged_checkpoint_of_a_run_is_passed_over(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    next((steps / "step_00000002").glob("*.distcp")).write_bytes(b"")
    assert find_model(tmp_path / "run").path == steps / "step_00000001"
    (steps / "step_00000001" / "steel.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint .* the newest is step_00000002: .*distcp has 0"):
        find_model(tmp_path / "run")


def loaded(paths: list[Path], model: ModelConfig, parallel: ParallelConfig) -> list[list[torch.Tensor]]:
    """This process's parameters after each of these models was loaded into them."""
    from steel_megatron.hf.starting import start_from_folders
    from steel_megatron.model.spec import build_chunks
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train.engine import Engine
    from steel_megatron.train.initial_weights import open_initial
    from tests.train.small_run import small_run

    start_from_folders()
    topology = initialize(parallel)
    if parallel.fsdp:
        chunks = Engine(replace(small_run(parallel, "none"), model=model), topology).chunks
    else:
        chunks = build_chunks(model, topology)
    found: list[list[torch.Tensor]] = []
    for path in paths:
        origin = open_initial(str(path))
        origin.verify()
        for chunk in chunks:
            with torch.no_grad():
                own = [getattr(one, "_local_tensor", one) for one in chunk.parameters()]
                for one in own:
                    one.fill_(7.0)
            origin.load(chunk, model)
            found.append([one.detach().clone() for one in own])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_starts_from_any_of_them_with_the_same_weights(layout: str, folder: Path, pool: Pool) -> None:
    processes, parallel = LAYOUTS[layout]
    model = find_checkpoint(folder / "run").model
    paths = [folder / "run", folder / "hf"]
    for from_run, from_folder in pool.run(loaded, processes, paths, model, parallel):
        assert from_run and all(map(torch.equal, from_run, from_folder))
        assert not any((one == 7.0).any() for one in from_run)


@pytest.mark.parametrize(("name", "parts"), [("top_k", "moe"), ("dense", None)])
def test_stock_models_are_started_from(name: str, parts: str | None, folder: Path, pool: Pool, tmp_path: Path) -> None:
    origin = folder / parts if parts else import_hf(folder / name, tmp_path / "checkpoint")
    model = replace(find_checkpoint(origin).model, sequence_length=16)
    (found,) = pool.run(loaded, 1, [origin, folder / name], model, ParallelConfig())
    assert all(map(torch.equal, *found))


def message(paths: list[Path], model: ModelConfig) -> str:
    try:
        loaded(paths, model, ParallelConfig())
    except SteelError as error:
        return str(error)
    return "nothing was refused"


def without_reader(path: Path) -> str:
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import initial_weights

    initialize(ParallelConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial_weights, "openers", [])
        with pytest.raises(ConfigError) as refused:
            initial_weights.open_initial(str(path))
    return str(refused.value)


def test_what_a_run_cannot_start_from(folder: Path, pool: Pool, tmp_path: Path) -> None:
    model = ModelFolder(folder / "hf").model
    other = replace(model, ffn_hidden_size=2 * model.ffn_hidden_size)
    (said,) = pool.run(message, 1, [folder / "hf"], other)
    assert "hf was saved with model.ffn_hidden_size = " in said
    shutil.copytree(folder / "hf", tmp_path / "hf")
    config: dict[str, Any] = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    (said,) = pool.run(message, 1, [tmp_path / "hf"], model)
    assert "has no tensor model.layers." in said
    assert "start with steel_megatron.pretrain" in pool.run(without_reader, 1, folder / "hf")[0]
