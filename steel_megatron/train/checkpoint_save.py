"""Saves that are either whole or not there, and that training need not wait for.

A thread copies the state to memory of this machine (:mod:`.checkpoint_copy`); only the next update waits for it. Other
threads write the copy to a folder with a temporary name (:mod:`.checkpoint_writer`). When all processes are done, all
of them together finish it between two steps: settings, index and checksums are written, and the folder gets its final
name. A state with a number that is not finite gets none.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.metadata import Metadata

from steel_megatron.config import ModelConfig, RunConfig, dump_yaml, to_dict
from steel_megatron.data.ledger.ledger import Ledger, dumps
from steel_megatron.errors import CheckpointError
from steel_megatron.files import replace_folder
from steel_megatron.parallel.agreement import any_rank, on_rank0, raise_if_any_rank_failed
from steel_megatron.train import bad_steps
from steel_megatron.train.checkpoint import path_of, reason, sharded_engine
from steel_megatron.train.checkpoint_checksums import ALGORITHM, checksum_of
from steel_megatron.train.checkpoint_copy import Copy, HostMemory
from steel_megatron.train.checkpoint_manifest import (
    BACKENDS,
    FORMAT,
    FORMAT_OF_ADAPTERS,
    MANIFEST,
    manifest_checksum,
)
from steel_megatron.train.checkpoint_writer import Planner, ShardWriter, Written, write_index
from steel_megatron.train.engine import Engine


class Saver:
    """Saves of a run, one after the other; every process calls its methods together.

    Args:
        run: the run's settings.
        copies: whether to write from copies, so that training may go on; None for ``checkpoint.async_save``.

    Attributes:
        seconds: from the beginning to the end of the last save that is finished; None before the first.
        longest_seconds: of the longest one.
    """

    def __init__(self, run: RunConfig, *, copies: bool | None = None) -> None:
        self._run = run
        self._planner = Planner()
        self._memory = HostMemory() if (run.checkpoint.async_save if copies is None else copies) else None
        self._under_way: _Save | None = None
        self._began = 0.0
        self.seconds: float | None = None
        self.longest_seconds: float | None = None

    @property
    def doing(self) -> str:
        """What is under way, for a message."""
        return f", with {self._under_way.final.name} being saved" if self._under_way else ""

    def begin(self, engine: Engine, consumed_samples: int, ledger: Ledger | None = None) -> Path | None:
        """Begin to save a run's state as ``checkpoints/step_...``, with its ledger.

        It is the state of now that is saved: the engine's next update waits until it is copied.

        Args:
            engine: the run's engine, between two steps.
            consumed_samples: training sequences read so far.
            ledger: the run's; None if it has none.

        Returns:
            the folder of an earlier save that was still under way, and was finished first.

        Raises:
            CheckpointError: it cannot be written (disk full, folder read-only). What was there before stays.
        """
        earlier = self.finish()
        self._began = time.monotonic()
        run = self._run
        final = path_of(run, engine.step_number)
        history = ledger.history if ledger else None  # later changes make a new one
        skipped = bad_steps.dumps(engine.bad_steps.history)
        facts = _facts(run.model, engine.step_number, consumed_samples, engine.topology.describe())
        if history is not None:
            facts["data_fingerprint"] = history.fingerprint(consumed_samples)
        if run.lora.rank is not None:
            assert engine.base is not None, "its weights were loaded"
            base = {"path": str(engine.base.path), "sha256": engine.base.sha256}
            facts |= {"format": FORMAT_OF_ADAPTERS, "lora": to_dict(run.lora), "base": base}
        state = sharded_engine(engine)
        self._under_way = _begin_save(
            state,
            final,
            {**facts, "resume_from": run.checkpoint.resume_from},
            self._planner,
            lambda: (
                {"run.yaml": dump_yaml(run), bad_steps.FILE: skipped}
                | ({"ledger.json": dumps(history)} if history else {})
            ),
            self._memory,
            _steady_storages(engine, state),
            read_back=run.checkpoint.keep_last is not None,  # an older one goes for it
        )
        engine.before_update = self.wait_for_copy
        return earlier

    def wait_for_copy(self) -> None:
        """Return when weights and the optimizer's state may change; this process alone may call it."""
        if self._under_way is not None and self._under_way.copy is not None:
            self._under_way.copy.wait()

    def poll(self) -> Path | None:
        """Finish the save under way if it is written on all processes; returns its folder if so."""
        if self._under_way is None or any_rank(not self._under_way.writer.is_done):
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for the save under way, and give it its name; returns its folder, None if there was none.

        Raises:
            CheckpointError: it could not be written. What was there before stays.
        """
        save = self._under_way
        if save is None:
            return None
        try:
            _finish_save(save)
        except CheckpointError:
            self._under_way = None
            raise
        self._under_way = None
        self.seconds = time.monotonic() - self._began
        self.longest_seconds = max(self.seconds, self.longest_seconds or 0.0)
        if dist.get_rank() == 0:
            _remove_old(self._run, save.final)
        return save.final

    def give_up(self) -> None:
        """Leave the save under way unfinished; this process alone may call it."""
        save, self._under_way = self._under_way, None
        if save is not None:
            if save.copy is not None:
                save.copy.give_up()
            save.writer.give_up()


def save(engine: Engine, consumed_samples: int, ledger: Ledger | None = None) -> Path:
    """Save a run's state and wait for it; every process calls it.

    Args:
        engine: the run's engine, between two steps.
        consumed_samples: training sequences read so far.
        ledger: the run's; None if it has none.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it cannot be written (disk full, folder read-only). What was there before stays.
    """
    saver = Saver(engine.run, copies=False)
    saver.begin(engine, consumed_samples, ledger)
    path = saver.finish()
    assert path is not None
    return path


@dataclass(frozen=True)
class _Save:
    """A save whose tensors are being written.

    Attributes:
        final: the folder's name when it is whole.
        partial: its name until then.
        facts: what the manifest says, but for the files.
        index: of all tensors; on the first process only.
        writer: writes this process's tensors.
        copy: of the tensors, which it writes from; None if it writes the run's own.
    """

    final: Path
    partial: Path
    facts: dict[str, Any]
    index: Metadata | None
    writer: ShardWriter
    copy: Copy | None


def _facts(model: ModelConfig, step: int, consumed_samples: int, layout: str) -> dict[str, Any]:
    """What a manifest says of a run without a ledger."""
    return {**model_facts(model, step, consumed_samples), "layout": layout, "world_size": dist.get_world_size()}


def model_facts(model: ModelConfig, step: int, consumed_samples: int) -> dict[str, Any]:
    """What a manifest says of a model without data, whoever saves it.

    Args:
        model: the model's settings.
        step: optimizer steps done.
        consumed_samples: training sequences read so far.
    """
    return {
        "format": FORMAT,
        "step": step,
        "consumed_samples": consumed_samples,
        "data_fingerprint": "",
        # What computed it is no property of the weights.
        "model": {name: value for name, value in to_dict(model).items() if name != "implementation"},
    }


def _begin_save(
    state: dict[str, Any],
    final: Path,
    facts: dict[str, Any],
    planner: Planner,
    texts: Callable[[], dict[str, str]] = dict,
    memory: HostMemory | None = None,
    steady: Container[int] = (),
    *,
    read_back: bool = False,
) -> _Save:
    """Make the folder and begin to write to it, from copies in ``memory`` if there is one.

    Args:
        state: sharded tensors, by kind.
        final: the folder's name when it is whole.
        facts: what the manifest says of the run.
        planner: says who writes what.
        texts: the files next to the tensors, by name; called in a thread.
        memory: where the tensors are copied to before they are written.
        steady: storages that stay as they are until the copy's ``wait`` returns.
        read_back: whether to read each file again from the disk, and compare.
    """
    partial = final.with_name(f".{final.name}.partial")
    optimizer = state.get("optimizer")
    facts = {
        **facts,
        "has_optimizer": optimizer is not None,
        "has_main_weights": any(key.startswith("param.") for key in optimizer or ()),
    }
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    tensors, index = planner.plan(sharded)
    # What the first process does alone fails on all of them, or the others would wait for it.
    on_rank0(lambda: _begin(partial, final))
    copy = Copy(memory, tensors, steady) if memory is not None else None
    own = {item.index: tensor for item, tensor in tensors}
    settings = (lambda: write_settings(partial, common, texts())) if dist.get_rank() == 0 else None
    items, given = [item for item, _ in tensors], copy.result if copy is not None else lambda: own
    return _Save(final, partial, facts, index, ShardWriter(partial, items, given, settings, read_back=read_back), copy)


def _steady_storages(engine: Engine, state: dict[str, Any]) -> set[int]:
    """Addresses of memory that only an update changes: optimized weights and the optimizer's state, but no buffers."""
    weights = (one.data for model in engine.models for one in model.parameters() if one.requires_grad)
    means = (one.data for one in state["optimizer"].values())
    return {tensor.untyped_storage().data_ptr() for tensors in (weights, means) for tensor in tensors}


def _finish_save(save: _Save) -> None:
    """Wait until all processes have written, and give the folder its name."""

    def own() -> Written:
        with _disk_errors(save.final, save.partial):
            try:
                return save.writer.result()
            except CheckpointError as error:
                shutil.rmtree(save.partial, ignore_errors=True)
                step = save.facts["step"]
                raise CheckpointError(
                    f"no checkpoint of step {step} is made: {error}; earlier ones are untouched"
                ) from None

    written: list[Any] = [None] * dist.get_world_size()
    is_rank0 = dist.get_rank() == 0
    dist.gather_object(raise_if_any_rank_failed(own), written if is_rank0 else None)
    on_rank0(lambda: _finish(save.partial, save.final, save.facts, save.index, written))


@contextmanager
def _disk_errors(final: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise CheckpointError(
            f"could not write the checkpoint {final}: {reason(error)}; earlier ones are untouched"
        ) from error


def _begin(partial: Path, final: Path) -> None:
    """An empty temporary folder; what killed saves left next to it is removed. (The caller holds the folder's lock.)"""
    with _disk_errors(final, partial):
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in (*final.parent.glob(".step_*.partial"), *final.parent.glob(".step_*.old")):
            if left.name != f".{final.name}.old":  # replace_folder knows what to do with that
                shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()


def write_settings(partial: Path, common: dict[str, Any], texts: dict[str, str]) -> None:
    """Write what megatron-core expects next to the tensors.

    Args:
        partial: the checkpoint's folder, under its temporary name.
        common: what is no tensor.
        texts: further files by name.
    """
    torch.save(common, partial / "common.pt")
    (partial / "metadata.json").write_text(json.dumps(BACKENDS), encoding="utf-8")
    for name, text in texts.items():
        (partial / name).write_text(text, encoding="utf-8")


def _finish(partial: Path, final: Path, facts: dict[str, Any], index: Metadata | None, written: list[Written]) -> None:
    """Index, checksums, final name."""
    together = Written()
    for own in written:
        together.add(own)
    with _disk_errors(final, partial):
        if index is not None:
            write_index(partial, index, together)
        write_manifest(partial, facts, together)
        replace_folder(partial, final)


def write_manifest(folder: Path, facts: Mapping[str, Any], written: Written) -> None:
    """Write ``steel.json`` into a folder that holds everything else.

    Args:
        folder: the checkpoint's, under its temporary name.
        facts: what it says of the run.
        written: what was written of the tensors.

    Raises:
        OSError: a file is not there as it was written.
    """
    files = sorted(folder.iterdir())
    for name, one in written.files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != one["bytes"]:
            raise OSError(f"{folder / name} is not there as it was written")
    found = written.files | {
        path.name: {"bytes": path.stat().st_size, ALGORITHM: checksum_of(path)}
        for path in files
        if path.name not in written.files
    }
    norms = {key: math.sqrt(square) for key, square in sorted(written.squares.items())}
    manifest = {**facts, "norms": norms, "files": found}
    content = json.dumps({**manifest, "sha256": manifest_checksum(manifest)}, indent=1)
    (folder / MANIFEST).write_text(content, encoding="utf-8")


def _remove_old(run: RunConfig, final: Path) -> None:
    if run.checkpoint.keep_last is None:
        return
    # Later ones than this can only be damaged ones that a resume passed over; they do not count.
    older = sorted(path for path in run.checkpoints_dir.glob("step_*") if path.name < final.name)
    for path in older[: max(0, len(older) - (run.checkpoint.keep_last - 1))]:
        shutil.rmtree(path, ignore_errors=True)  # one that cannot be removed is no reason to stop training
