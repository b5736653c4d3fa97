"""Checkpoints resume under any layout, and what is not whole is passed over."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.config import CheckpointConfig, ModelConfig, ParallelConfig
from steel_megatron.errors import CheckpointError, SteelError
from steel_megatron.files import sha256_of
from steel_megatron.train import checkpoint
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, MODEL, PROCESSES, compare, small_run, train

ALONE = ParallelConfig()


def layout(name: str) -> tuple[ParallelConfig, int]:
    return (ALONE, 1) if name == "alone" else (LAYOUTS[name], PROCESSES[name])


@pytest.fixture(scope="module")
def uninterrupted() -> list[Any]:
    return run_distributed(train, 1, small_run(ALONE, steps=8))[0]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("alone", "alone"),
        ("tp2", "pp2"),
        ("pp2", "tp2"),
        ("alone", "ep2"),
        ("ep2", "tp2"),
        ("dp2", "tp2 pp2"),
        ("tp2 pp2", "dp2"),
        ("tp2 ep2", "alone"),
    ],
)
def test_resume_equals_no_stop(before: str, after: str, tmp_path: Path, uninterrupted: list[Any]) -> None:
    for name, first, last in ((before, 1, 4), (after, 5, 8)):
        parallel, processes = layout(name)
        run = small_run(parallel, str(tmp_path), steps=8)
        results = run_distributed(train, processes, run, first, last, first == 1, first != 1)
        compare([rank[:-1] for rank in results], uninterrupted[first - 1 : last])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoints after steps 2 and 4."""
    directory = tmp_path_factory.mktemp("run")
    run_distributed(train, 1, small_run(ALONE, str(directory)), 1, 2, True)
    run_distributed(train, 1, small_run(ALONE, str(directory)), 3, 4, True, True)
    return directory / "checkpoints"


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def newest_step(checkpoints: Path) -> int | None:
    info = checkpoint.newest(checkpoints)
    return None if info is None else info.step


def test_whole_checkpoints_are_found(checkpoints: Path) -> None:
    info = checkpoint.newest(checkpoints)
    assert info is not None and info.has_optimizer
    assert (info.step, info.consumed_samples, info.model) == (4, 32, MODEL)
    assert newest_step(checkpoints.with_name("nothing here")) is None


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "run.yaml", "steel.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped bit"])
def test_damaged_checkpoints_are_passed_over(checkpoints: Path, name: str, damage: str) -> None:
    file = checkpoints / "step_00000004" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert newest_step(checkpoints) == 2


def test_unfinished_folders_are_no_checkpoints(checkpoints: Path) -> None:
    os.rename(checkpoints / "step_00000004", checkpoints / ".step_00000004.partial")
    (checkpoints / "step_00000006").mkdir()
    assert newest_step(checkpoints) == 2


def test_a_manifest_of_another_kind_is_refused(checkpoints: Path) -> None:
    manifest = checkpoints / "step_00000004" / "steel.json"
    whole = json.loads(manifest.read_text())
    for content in ([], None, 3, {"format": 1}, {**whole, "step": 5}, {**whole, "consumed_samples": 1}):
        manifest.write_text(json.dumps(content))
        assert newest_step(checkpoints) == 2


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


def text(value: str) -> bytes:
    """A string in pickle's words."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


# Asks for `os.system` as an attribute of a module that an index may name classes of.
DOTTED = (
    b"\x80\x04"
    + text("torch.distributed.checkpoint.filesystem")
    + text("os.system")
    + b"\x93"
    + text("true")
    + b"\x85R."
)


@pytest.mark.parametrize("content", [pickle.dumps(Payload()), DOTTED], ids=["plain", "dotted"])
def test_an_index_that_would_execute_something_is_refused(checkpoints: Path, content: bytes) -> None:
    folder = checkpoints / "step_00000004"
    (folder / ".metadata").write_bytes(content)
    manifest = json.loads((folder / "steel.json").read_text())
    manifest["files"][".metadata"] = {"bytes": len(content), "sha256": sha256_of(folder / ".metadata")}
    manifest["sha256"] = checkpoint._manifest_checksum(manifest)
    (folder / "steel.json").write_text(json.dumps(manifest))
    assert checkpoint.read_info(folder).step == 4
    with pytest.raises(CheckpointError, match=r"asks for .*system, which no checkpoint"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_experts": 2}, {"vocab_size": 90}])
def test_another_model_is_refused_by_name(checkpoints: Path, change: dict[str, int]) -> None:
    info = checkpoint.read_info(checkpoints / "step_00000004")
    with pytest.raises(CheckpointError, match=next(iter(change))):
        checkpoint.check_model(info, dataclasses.replace(MODEL, **change))


def test_what_weights_do_not_depend_on_may_change(checkpoints: Path) -> None:
    info = checkpoint.read_info(checkpoints / "step_00000004")
    checkpoint.check_model(info, dataclasses.replace(MODEL, routing_mode="merged", block_length=4, sequence_length=8))


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.read_info(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"steel\.json"):
        checkpoint.read_info(tmp_path)


def read_back(directory: str, model: ModelConfig) -> dict[str, list[int]]:
    from steel_megatron.parallel.topology import initialize

    initialize(ALONE)
    info = checkpoint.newest(Path(directory))
    assert info is not None
    keys = ["decoder.layers.mlp.experts.up", "embedding.word_embeddings.weight", "decoder.layers.mlp.phi"]
    return {key: list(tensor.shape) for key, tensor in checkpoint.read_tensors(info, keys).items()}


def test_tensors_can_be_read_without_the_model(saved: Path) -> None:
    shapes = run_distributed(read_back, 1, str(saved), MODEL)[0]
    assert shapes == {
        "decoder.layers.mlp.experts.up": [4, 4, 2, 24, 32],
        "embedding.word_embeddings.weight": [128, 32],
        "decoder.layers.mlp.phi": [4, 32, 4, 2],
    }


def failure_of_save(engine: Any) -> str:
    try:
        checkpoint.save(engine, 0)
    except SteelError as error:
        return str(error)
    return "no error"


def save_on_full_disk(run: CheckpointConfig) -> str:
    """Saves where only a small file fits; returns the error's message."""
    import resource

    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train.engine import Engine

    engine = Engine(small_run(ALONE, run.directory), initialize(ALONE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return failure_of_save(engine)


def test_a_save_that_fails_leaves_the_earlier_checkpoint(checkpoints: Path) -> None:
    config = CheckpointConfig(directory=str(checkpoints.parent))
    message = run_distributed(save_on_full_disk, 1, config)[0]
    assert "could not write the checkpoint" in message
    assert newest_step(checkpoints) == 4


def save_with_a_first_process_that_cannot(directory: str) -> str:
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train.engine import Engine

    run = small_run(LAYOUTS["dp2"], directory)
    topology = initialize(run.parallel)
    engine = Engine(run, topology)
    if topology.is_first_process:

        def fail(*args: object) -> None:
            raise OSError(28, "No space left on device")

        checkpoint.replace_folder = fail  # type: ignore[assignment]
    return failure_of_save(engine)


def test_a_save_that_fails_on_one_process_fails_on_all(tmp_path: Path) -> None:
    messages = run_distributed(save_with_a_first_process_that_cannot, 2, str(tmp_path), timeout=50)
    assert "No space left on device" in messages[0] and "process 0 could not go on" in messages[1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == []
