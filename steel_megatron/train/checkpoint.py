"""Checkpoints that are either whole or not there.

A checkpoint is a folder ``step_00001234`` in the format of megatron-core's dist_checkpointing, written under a
temporary name (:mod:`.checkpoint_save`), synced to disk, listed with sizes and checksums in ``steel.json`` and only
then given its final name. It holds weights, optimizer state, random states, the step and the samples consumed, and
loads under any TP, PP, EP and DP.
Loading executes nothing: settings are JSON, and the one pickled index of torch's format is checked first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from steel_megatron.config import ModelConfig, RunConfig
from steel_megatron.errors import CheckpointError, SteelError
from steel_megatron.files import disk_errors, sync_folder
from steel_megatron.log import get_logger
from steel_megatron.model.lora import is_adapter
from steel_megatron.model.weights import sharded_weights, storable
from steel_megatron.train import bad_steps, random_states
from steel_megatron.train.checkpoint_adapters import MergedFiles, WeightFiles
from steel_megatron.train.checkpoint_checksums import compare_checksums
from steel_megatron.train.checkpoint_index import check_metadata
from steel_megatron.train.checkpoint_info import CheckpointInfo, check_adapters, check_model
from steel_megatron.train.checkpoint_manifest import (
    FORMAT,
    FORMAT_OF_ADAPTERS,
    MANIFEST,
    manifest_checksum,
    read_info,
    read_manifest,
)
from steel_megatron.train.checkpoint_reader import fill
from steel_megatron.train.checkpoint_tensors import TensorFiles
from steel_megatron.train.engine import Engine
from steel_megatron.train.model_path import base_at
from steel_megatron.train.optimizer_state import MAIN_WEIGHTS, OptimizerState

logger = get_logger(__name__)

__all__ = [
    "FORMAT",
    "FORMAT_OF_ADAPTERS",
    "MANIFEST",
    "CheckpointInfo",
    "manifest_checksum",
    "read_info",
    "read_manifest",
]


def sharded_engine(engine: Engine) -> dict[str, Any]:
    """All of an engine's state, where it lies in memory; every process calls it."""
    model = sharded_weights(*engine.chunks)
    state = OptimizerState(engine.optimizer, model)
    return {"model": storable(_saved(engine, model)), "optimizer": state.sharded, "random": random_states.sharded()}


def _saved(engine: Engine, weights: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """The weights that a run's checkpoints hold: all, or its adapters, since all others are those of their base."""
    if engine.run.lora.rank is None:
        return weights
    return {name: one for name, one in weights.items() if is_adapter(one.key)}


def path_of(run: RunConfig, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run.checkpoints_dir / f"step_{step:08d}"


def reason(error: BaseException) -> str:
    """The last line of an error: megatron-core's begin with the tracebacks of all processes."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def verify(path: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compare the files of a checkpoint with their checksums, and make sure that loading it executes nothing.

    Args:
        path: the checkpoint's folder.
        rank: of this process.
        world_size: how many processes share the files; alone, one compares all.

    Raises:
        CheckpointError: a file differs, or its index names something that does not belong there.
    """
    manifest = read_manifest(path)
    compare_checksums(path, manifest["files"], rank, world_size)
    if rank == 0:
        check_metadata(path, manifest.get("norms", {}))


def newest(checkpoints: Path, check: Callable[[Path], None] = verify) -> CheckpointInfo | None:
    """The newest whole checkpoint of a run; damaged ones are named in the log and passed over."""
    for path in sorted(checkpoints.glob("step_*"), reverse=True):
        try:
            info = read_info(path)
            check(path)
        except CheckpointError as error:
            logger.warning(f"passing over {path.name}: {error}")
            continue
        return info
    return None


def go_back(run: RunConfig, step: int, check: Callable[[Path], None] = verify) -> CheckpointInfo:
    """The checkpoint of a step, with later ones set aside.

    Once a run that went back has saved, it is the newest checkpoint: the same command may be started many times.

    Args:
        run: the run's settings.
        step: of the checkpoint.
        check: verifies a checkpoint.

    Raises:
        CheckpointError: there is none of that step, or it is damaged. Nothing was moved.
    """
    path, there = path_of(run, step), sorted(run.checkpoints_dir.glob("step_*"))
    later = [one for one in there if one.name > path.name]
    if any(_went_back_to(one) == step for one in later) and (info := newest(run.checkpoints_dir, check)) is not None:
        logger.info(f"the run went back to step {step} before; its newest checkpoint is of step {info.step}")
        return info
    if path not in there:
        steps = ", ".join(str(int(one.name[5:])) for one in there if one.name[5:].isdecimal()) or "none"
        raise CheckpointError(
            f"checkpoint.resume_from is {step}, but {run.checkpoints_dir} has checkpoints of these steps: {steps}"
        )
    info = read_info(path)
    check(path)
    aside = run.checkpoints_dir / "set_aside"
    with disk_errors("set aside checkpoints in", aside, CheckpointError):
        for one in later:
            aside.mkdir(exist_ok=True)
            names = (one.name + (f".{number}" if number else "") for number in itertools.count())
            one.replace(next(aside / name for name in names if not (aside / name).exists()))
            sync_folder(aside)
            sync_folder(run.checkpoints_dir)
    if later:
        logger.warning(f"going back to step {step}; set aside in {aside}: {', '.join(one.name for one in later)}")
    return info


def _went_back_to(path: Path) -> int | None:
    """The step that the run had gone back to which saved a checkpoint."""
    try:
        step: int | None = read_manifest(path).get("resume_from")
    except CheckpointError:
        return None
    return step


@contextmanager
def _loading_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except SteelError:
        raise
    except (OSError, CheckpointException, CheckpointingException) as error:
        raise CheckpointError(f"could not load the checkpoint {path}: {reason(error)}") from error
    except Exception as error:  # crafted tensor files
        kind = type(error).__name__
        raise CheckpointError(f"could not load the checkpoint {path}: {kind}: {reason(error)}") from error


def load(engine: Engine, info: CheckpointInfo) -> None:
    """Bring an engine to where a checkpoint left off, under whatever layout; every process calls it.

    Raises:
        CheckpointError: the checkpoint is of another model, or holds weights only.
    """
    check_model(info, engine.run.model, resumes=True)
    check_adapters(info, engine.run.lora)
    if not info.has_optimizer:
        raise CheckpointError(f"{info.path} holds weights only and cannot be resumed; use checkpoint.init_from")
    engine.before_update()
    model = sharded_weights(*engine.chunks)
    state = OptimizerState(engine.optimizer, model)
    wanted: dict[str, Any] = {"optimizer": state.sharded}
    # Random states belong to processes; with another number of them there is nothing to give them back to.
    wanted["random"] = _saved_random_states(info) if info.world_size == dist.get_world_size() else {}
    main, later, model = state.main_weights, {}, storable(_saved(engine, model))
    if info.has_main_weights and not main:  # saved by a run in bfloat16: its weights are rounded
        model = {name: replace(one, key=MAIN_WEIGHTS + one.key) for name, one in model.items()}
    elif main and not info.has_main_weights:  # saved by a run in float32, which needs no copies
        wanted["optimizer"] = {name: one for name, one in state.sharded.items() if name not in main}
        later = {name: replace(one, key=one.key.removeprefix(MAIN_WEIGHTS)) for name, one in main.items()}
    with _loading_errors(info.path):
        for tensors in ({"model": model, **wanted}, {"main": later}):  # they are filled where they lie
            if any(tensors.values()):
                fill(tensors, info.path)
    random_states.seed_all(engine.run.training.seed, info.step, engine.topology)  # those that are not saved
    random_states.put_back({name: one.data[0] for name, one in wanted["random"].items()})
    engine.bad_steps.restore(bad_steps.load(info.path))
    engine.resume_at(info.step, state)


def _saved_random_states(info: CheckpointInfo) -> dict[str, ShardedTensor]:
    """The random states that a checkpoint has: older ones have torch's, and other devices have others."""
    with _loading_errors(info.path):
        saved = dist_checkpointing.load_tensors_metadata(str(info.path))
    own = random_states.sharded()
    return {
        name: one
        for name, one in own.items()
        if one.key in saved and tuple(saved[one.key].global_shape) == tuple(one.global_shape)
    }


def load_weights(stage: GPTModel, info: CheckpointInfo, model: ModelConfig) -> None:
    """Load a checkpoint's weights into one model chunk; every process calls it.

    Args:
        stage: this process's part of the model, or one of its parts.
        info: the checkpoint, saved under any layout.
        model: the settings of the stage's model.

    Raises:
        CheckpointError: the checkpoint's settings differ in one that :func:`check_model` holds equal.
    """
    check_model(info, model, resumes=False)
    weights = sharded_weights(stage)
    own = sum(getattr(one, "_local_tensor", one).numel() for one in stage.parameters())  # of sharded ones, the shard
    assert sum(one.data.numel() for one in weights.values()) == own
    weights = storable({name: one for name, one in weights.items() if not is_adapter(one.key)})
    if info.base is None:
        with _loading_errors(info.path):
            fill({"model": weights}, info.path)
        return
    files = weight_files(info)
    with torch.no_grad():
        for one in weights.values():
            shape = (1,) * one.prepend_axis_num + tuple(one.local_shape)
            one.data.copy_(files.read(one.key, (tuple(one.global_offset), shape)).view(one.data.shape))


def weight_files(info: CheckpointInfo) -> WeightFiles:
    """The weights of a checkpoint's model, with its adapters in them, to be read a part at a time.

    Raises:
        CheckpointError: it holds adapters, and what they were trained on is damaged, missing or another one by now.
    """
    files = TensorFiles(info.path)
    if info.base is None:
        return files
    try:
        info.base.check(base_at(info.base.path), info.path)
        verify(info.base.path)
        base = read_info(info.base.path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{info.path} holds adapters alone, and not the weights that they adapt: {error}"
        ) from None
    return MergedFiles(weight_files(base), files, info.lora, info.model)


def tensor_names(info: CheckpointInfo) -> list[str]:
    """The names of all tensors of a checkpoint."""
    return list(tensor_shapes(info))


def tensor_shapes(info: CheckpointInfo) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a checkpoint by name; of one with adapters, those of the model that it makes."""
    if info.base is not None:
        return {name: facts.shape for name, facts in weight_files(info).tensors.items()}
    with _loading_errors(info.path):
        found = dist_checkpointing.load_tensors_metadata(str(info.path))
        return {name: tuple(tensor.global_shape) for name, tensor in found.items()}


def read_tensors(info: CheckpointInfo, keys: list[str]) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint's model by name, on the CPU, without building the model.

    Raises:
        CheckpointError: the checkpoint has no tensor of that name.
    """
    files = weight_files(info) if info.base is not None else None
    with _loading_errors(info.path):
        available = files.tensors if files else dist_checkpointing.load_tensors_metadata(str(info.path))
    missing = [key for key in keys if key not in available]
    if missing:
        raise CheckpointError(f"{info.path} has no tensor {missing[0]!r}")
    if files:
        return {key: files.read(key, ((0,) * len(shape := files.tensors[key].shape), shape)) for key in keys}
    wanted = {key: available[key] for key in keys}
    with _loading_errors(info.path):
        return dist_checkpointing.load(wanted, str(info.path), validate_access_integrity=False)
