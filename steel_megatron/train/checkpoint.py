"""Checkpoints that are either whole or not there.

A checkpoint is a folder ``step_00001234`` written by megatron-core's dist_checkpointing under a temporary name,
synced to disk, listed with sizes and checksums in ``steel.json`` and only then given its final name. It holds
weights, optimizer state, random states, the step and the samples consumed, and loads under any TP, PP, EP and DP.
Loading executes nothing: settings are JSON, and the one pickled index of torch's format is checked first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import queue
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from steel_megatron.config import (
    ModelConfig,
    RunConfig,
    dump_yaml,
    from_dict,
    refuse_unknown_routing_code,
    to_dict,
)
from steel_megatron.data.ledger.ledger import Ledger, dumps
from steel_megatron.errors import CheckpointError
from steel_megatron.files import replace_folder, sha256_of
from steel_megatron.log import get_logger
from steel_megatron.model.weights import sharded_weights
from steel_megatron.parallel.agreement import on_rank0
from steel_megatron.train.checkpoint_index import check_index
from steel_megatron.train.engine import Engine
from steel_megatron.train.optimizer_state import sharded_state

logger = get_logger(__name__)

# A save's results come back to the process that made it, so a queue of this process is enough. megatron-core's own is
# in a manager process, which imports the main script again (this fails without a main guard) and outlives a killed run.
filesystem_async._results_queue = queue.Queue()

FORMAT = 1
MANIFEST = "steel.json"
NOT_COMPUTED = {"sequence_length", "init_method_std", "expert_init_method_std", "routing_scale_init"}
NOT_COMPUTED |= {"moe_aux_loss_coeff", "identical_expert_init"}
"""Settings of a model that do not change what given weights compute: these may always differ from a checkpoint's."""
ROUTING = {"routing_mode", "slot_input", "block_length", "moe_top_k"}
"""How tokens reach experts: a new run may choose it anew for the weights it begins with."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What ``steel.json`` says.

    Attributes:
        path: the checkpoint's folder.
        step: optimizer steps done.
        consumed_samples: training sequences read so far.
        model: the model's settings.
        layout: the layout that saved it, such as ``TP2 PP1 EP1 DP1``.
        world_size: number of processes that saved it.
        has_optimizer: whether it can be resumed, or holds weights only.
        data_fingerprint: of what the ledger says of those samples; empty if there was no ledger.
    """

    path: Path
    step: int
    consumed_samples: int
    model: ModelConfig
    layout: str
    world_size: int
    has_optimizer: bool
    data_fingerprint: str


def _sharded_random_state() -> ShardedTensor:
    """The state of torch's generator, one row for each process. Nothing draws from it while a model trains yet."""
    row = torch.get_rng_state().unsqueeze(0)
    return ShardedTensor.from_rank_offsets(
        "random.torch", row, (0, dist.get_rank(), dist.get_world_size()), replica_id=0
    )


def _state(engine: Engine, *, is_loading: bool, with_random_state: bool) -> dict[str, Any]:
    model = sharded_weights(engine.stage)
    state = {
        "model": model,
        "optimizer": sharded_state(engine.optimizer, model, is_loading=is_loading),
    }
    if with_random_state:
        state["random"] = _sharded_random_state()
    return state


def path_of(run: RunConfig, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run.checkpoints_dir / f"step_{step:08d}"


def save(engine: Engine, consumed_samples: int, ledger: Ledger | None = None) -> Path:
    """Save a run's state as ``checkpoints/step_...``, with its ledger; every process calls it.

    Args:
        engine: the run's engine, between two steps.
        consumed_samples: training sequences read so far.
        ledger: the run's; None if it has none.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it cannot be written (disk full, folder read-only). What was there before stays.
    """
    run = engine.run
    state = _state(engine, is_loading=False, with_random_state=True)
    final = write_checkpoint(
        state,
        path_of(run, engine.step_number),
        model=run.model,
        step=engine.step_number,
        consumed_samples=consumed_samples,
        layout=engine.topology.describe(),
        ledger=ledger,
        run=run,
    )
    if engine.topology.is_rank0 and run.checkpoint.keep_last is not None:
        # Later ones than this can only be damaged ones that a resume passed over; they do not count.
        older = sorted(path for path in run.checkpoints_dir.glob("step_*") if path.name < final.name)
        for path in older[: max(0, len(older) - (run.checkpoint.keep_last - 1))]:
            shutil.rmtree(path, ignore_errors=True)  # one that cannot be removed is no reason to stop training
    return final


def write_checkpoint(
    state: dict[str, Any],
    final: Path,
    *,
    model: ModelConfig,
    step: int,
    consumed_samples: int,
    layout: str,
    ledger: Ledger | None = None,
    run: RunConfig | None = None,
) -> Path:
    """Write a sharded state as the folder ``final``, which appears only when it is whole; every process calls it.

    Args:
        state: sharded tensors under ``model`` and, for a checkpoint to resume from, ``optimizer`` and ``random``.
        final: the folder; replaced if it is there.
        model: the model's settings.
        step: optimizer steps done.
        consumed_samples: training sequences read so far.
        layout: the layout that saves it, such as ``TP2 PP1 EP1 DP1``.
        ledger: saved with it; None for no ledger.
        run: the run's settings, saved with it; None for no run.

    Returns:
        ``final``

    Raises:
        CheckpointError: it cannot be written. What was there before stays.
    """
    partial = final.with_name(f".{final.name}.partial")
    manifest = {
        "format": FORMAT,
        "step": step,
        "consumed_samples": consumed_samples,
        "layout": layout,
        "world_size": dist.get_world_size(),
        "has_optimizer": "optimizer" in state,
        "data_fingerprint": ledger.history.fingerprint(consumed_samples) if ledger else "",
        "model": to_dict(model),
    }
    # What the first process does alone fails on all of them, or the others would wait for it.
    on_rank0(lambda: _begin(partial, final))
    with _disk_errors(final, partial):
        dist_checkpointing.save(state, str(partial))
    on_rank0(lambda: _finish(partial, final, manifest, run, ledger))
    return final


def _reason(error: BaseException) -> str:
    """The last line of an error: megatron-core's begin with the tracebacks of all processes."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _disk_errors(final: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, CheckpointException, CheckpointingException) as error:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise CheckpointError(
            f"could not write the checkpoint {final}: {_reason(error)}; earlier ones are untouched"
        ) from error


def _begin(partial: Path, final: Path) -> None:
    """An empty temporary folder; what killed saves left beside it goes. (The caller holds the folder's lock.)"""
    with _disk_errors(final, partial):
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in (*final.parent.glob(".step_*.partial"), *final.parent.glob(".step_*.old")):
            if left.name != f".{final.name}.old":  # replace_folder knows what to do with that
                shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Over everything that a manifest says, but for the checksum itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _finish(partial: Path, final: Path, manifest: dict[str, Any], run: RunConfig | None, ledger: Ledger | None) -> None:
    """Settings, ledger, checksums, final name."""
    with _disk_errors(final, partial):
        if run is not None:
            (partial / "run.yaml").write_text(dump_yaml(run), encoding="utf-8")
        if ledger is not None:
            (partial / "ledger.json").write_text(dumps(ledger.history), encoding="utf-8")
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        facts = {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
        }
        manifest = {**manifest, "files": facts}
        content = json.dumps({**manifest, "sha256": _manifest_checksum(manifest)}, indent=1)
        (partial / MANIFEST).write_text(content, encoding="utf-8")
        replace_folder(partial, final)


def read_info(path: Path) -> CheckpointInfo:
    """Read and check a checkpoint's manifest and the sizes of its files.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
        ConfigError: its routing mode is code that has not been imported.
    """
    manifest = _read_manifest(path)
    for name, facts in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            there = "is missing" if size is None else f"has {size:,} bytes"
            raise CheckpointError(f"{file} {there}; the checkpoint was saved with {facts['bytes']:,} bytes of it")
    refuse_unknown_routing_code(manifest["model"].get("routing_mode"), str(path / MANIFEST))
    return CheckpointInfo(
        path=path,
        step=manifest["step"],
        consumed_samples=manifest["consumed_samples"],
        model=from_dict(ModelConfig, manifest["model"], str(path / MANIFEST)),
        layout=manifest["layout"],
        world_size=manifest["world_size"],
        has_optimizer=manifest["has_optimizer"],
        data_fingerprint=manifest["data_fingerprint"],
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint: its {MANIFEST} cannot be read ({error.strerror}); name a folder step_..."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path / MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != _manifest_checksum(manifest):
        raise CheckpointError(f"{path / MANIFEST} is damaged: its checksum is not the one it was saved with")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}; this version reads format {FORMAT}")
    return manifest


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its checksum, and make sure that loading it executes nothing.

    Raises:
        CheckpointError: a file differs, or its index names something that does not belong there.
    """
    for name, facts in _read_manifest(path)["files"].items():
        if sha256_of(path / name) != facts["sha256"]:
            raise CheckpointError(f"{path / name} is damaged: its checksum is not the one it was saved with")
    check_index(path / ".metadata")


def newest(checkpoints: Path) -> CheckpointInfo | None:
    """The newest whole checkpoint of a run; damaged ones are named in the log and passed over."""
    for path in sorted(checkpoints.glob("step_*"), reverse=True):
        try:
            info = read_info(path)
            verify(path)
        except CheckpointError as error:
            logger.warning(f"passing over {path.name}: {error}")
            continue
        return info
    return None


def check_model(info: CheckpointInfo, model: ModelConfig, *, resumes: bool) -> None:
    """Raise a CheckpointError that names the first setting of a checkpoint's model that ``model`` must share.

    Args:
        info: the checkpoint.
        model: the settings that its weights are wanted for.
        resumes: whether a run goes on, so that nothing it computes may change; weights that a new run begins with may
            be routed in another way.
    """
    free = NOT_COMPUTED if resumes else NOT_COMPUTED | ROUTING
    for field in dataclasses.fields(ModelConfig):
        name = {"num_query_groups": "query_groups", "megatron": "megatron_computing"}.get(field.name, field.name)
        saved, wanted = getattr(info.model, name), getattr(model, name)
        if field.name not in free and saved != wanted:
            raise CheckpointError(
                f"{info.path} was saved with model.{field.name} = {saved}, this run has {wanted}; "
                "use the checkpoint's settings or another checkpoint.directory"
            )


@contextmanager
def _loading_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException, CheckpointingException) as error:
        raise CheckpointError(f"could not load the checkpoint {path}: {_reason(error)}") from error


def load(engine: Engine, info: CheckpointInfo) -> None:
    """Bring an engine to where a checkpoint left off, under whatever layout; every process calls it.

    Raises:
        CheckpointError: the checkpoint is of another model, or holds weights only.
    """
    check_model(info, engine.run.model, resumes=True)
    if not info.has_optimizer:
        raise CheckpointError(f"{info.path} holds weights only and cannot be resumed; use checkpoint.init_from")
    # Random states belong to processes; with another number of them there is nothing to give them back to.
    same_world = info.world_size == dist.get_world_size()
    wanted = _state(engine, is_loading=True, with_random_state=same_world)
    with _loading_errors(info.path):
        state = dist_checkpointing.load(wanted, str(info.path), validate_access_integrity=False)
    _set_weights(engine.stage, state["model"])
    if same_world:
        torch.set_rng_state(state["random"][0])
    engine.resume_at(info.step, state["optimizer"])


def load_weights(stage: GPTModel, info: CheckpointInfo, model: ModelConfig) -> None:
    """Load a checkpoint's weights into one pipeline stage; every process calls it.

    Args:
        stage: this process's part of the model.
        info: the checkpoint, saved under any layout.
        model: the settings of the stage's model.

    Raises:
        CheckpointError: the checkpoint's settings differ in one that :func:`check_model` holds equal.
    """
    check_model(info, model, resumes=False)
    state = dist_checkpointing.load({"model": sharded_weights(stage)}, str(info.path), validate_access_integrity=False)
    _set_weights(stage, state["model"])


def _set_weights(stage: GPTModel, tensors: dict[str, torch.Tensor]) -> None:
    outcome = stage.load_state_dict(tensors, strict=False)
    missing = [name for name in outcome.missing_keys if not name.endswith("_extra_state")]
    assert not missing and not outcome.unexpected_keys, (missing, outcome.unexpected_keys)


def read_tensors(info: CheckpointInfo, keys: list[str]) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint by name, on the CPU, without building the model.

    Raises:
        CheckpointError: the checkpoint has no tensor of that name.
    """
    available = dist_checkpointing.load_tensors_metadata(str(info.path))
    missing = [key for key in keys if key not in available]
    if missing:
        raise CheckpointError(f"{info.path} has no tensor {missing[0]!r}")
    wanted = {key: available[key] for key in keys}
    return dist_checkpointing.load(wanted, str(info.path), validate_access_integrity=False)
