"""The copy of a state while training goes on: an update never gets into it, and training waits for nothing else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from steel_megatron.config import DataConfig, ParallelConfig, RunConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.train.callbacks import Callback, CopyFirst, RunView
from steel_megatron.train.checkpoint_copy import Copy, HostMemory
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, own_batches, small_run
from tests.train.test_checkpoint_save import hashes, saving_run, steps
from tests.train.test_loop import outcome, write_corpus

LIMIT = 10.0
"""Seconds after which a copy is made although nobody waits for it, so that a wrong wait fails and does not hang."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(train=[write_corpus(tmp_path_factory.mktemp("corpora") / "train", 60, 0)])


def in_the_copying_thread() -> bool:
    return threading.current_thread().name.startswith("checkpoint-copy")


@contextmanager
def held_copies() -> Iterator[list[str]]:
    """Copies stay in their first moment until somebody waits for them; notes waits and copies."""
    events, gate, take, wait = list[str](), threading.Event(), HostMemory.take, Copy.wait

    def late(self: HostMemory, item: Any, tensor: torch.Tensor) -> torch.Tensor:
        if in_the_copying_thread() and not gate.is_set():
            events.append("copy" if gate.wait(LIMIT) else "copy without a wait")
            gate.set()
        return take(self, item, tensor)

    def noted(self: Copy) -> None:
        events.append("wait")
        gate.set()
        wait(self)

    with mock.patch.object(HostMemory, "take", late), mock.patch.object(Copy, "wait", noted):
        yield events


def saved_in_a_step(run: RunConfig, other: RunConfig) -> tuple[list[str], bool]:
    """Saves a state twice, the second time with a step that comes before the copy; the events of that one."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint_save
    from steel_megatron.train.engine import Engine

    topology = initialize(run.parallel)
    engine = Engine(run, topology)
    engine.step(own_batches(run, 1, topology))
    checkpoint_save.save(engine, 8)
    saver, before = checkpoint_save.Saver(other), next(engine.stage.parameters()).detach().clone()
    with held_copies() as events, mock.patch.object(engine, "_run", wraps=engine._run) as computed:
        saver.begin(engine, 8)
        events.append("begun")
        prepare = engine.optimizer.prepare_grads
        engine.optimizer.prepare_grads = lambda: (events.append("backward"), prepare())[1]
        engine.step(own_batches(run, 2, topology))
        events.append("updated")
        saver.finish()
    assert computed.call_count == 1
    return list(dict.fromkeys(events)), bool(torch.equal(before, next(engine.stage.parameters())))


def test_training_computes_during_the_copy_and_updates_after_it(tmp_path: Path) -> None:
    run, other = (small_run(ParallelConfig(), str(tmp_path / name), num_layers=2) for name in ("run", "other"))
    events, same = run_distributed(saved_in_a_step, 1, run, other)[0]
    assert events == ["begun", "backward", "wait", "copy", "updated"] and not same
    straight, during = run_distributed(hashes, 1, [*steps(run, 1), *steps(other, 1)])[0]
    assert straight == during and len(straight) > 20


@pytest.mark.slow
def test_a_sharded_state_is_copied_before_any_process_updates_it(tmp_path: Path) -> None:
    run, other = (small_run(LAYOUTS["tp2"], str(tmp_path / name), num_layers=2) for name in ("run", "other"))
    for events, same in run_distributed(saved_in_a_step, 2, run, other):
        assert events == ["begun", "backward", "wait", "copy", "updated"] and not same
    straight, during = run_distributed(hashes, 1, [*steps(run, 1), *steps(other, 1)])[0]
    assert straight == during


class Doubler(Callback):
    """Doubles a weight after the save of step 2."""

    def before_step(self, run: RunView) -> None:
        if run.step == 2:
            next(run.model.parameters()).data.mul_(2)


def doubled(runs: list[RunConfig]) -> list[list[str]]:
    from steel_megatron.train.loop import pretrain

    found = []
    for run in runs:
        with held_copies() as events:
            pretrain(run, [Doubler()])
        found.append(events)
    return found


def test_callbacks_change_weights_after_the_copy(corpora: DataConfig, tmp_path: Path) -> None:
    runs = [saving_run(corpora, tmp_path / str(number), async_save=not number) for number in range(2)]
    events, straight = run_distributed(doubled, 1, runs)[0]
    assert events[:2] == ["wait", "copy"] and straight == []
    of_both = run_distributed(hashes, 1, [*steps(runs[0], 2, 4, 6), *steps(runs[1], 2, 4, 6)])[0]
    assert of_both[:3] == of_both[3:]


def test_only_hooks_of_later_callbacks_wait() -> None:
    waits = mock.Mock()
    run: Any = SimpleNamespace(engine=SimpleNamespace(before_update=waits))
    result: Any = None
    for later, count in (([], 0), ([Callback()], 0), ([Callback(), Doubler()], 1)):
        first = CopyFirst(later)
        first.start(run)
        first.before_step(run)
        first.after_step(run, result)
        first.after_validation(run, {})
        first.after_save(run, Path())
        first.stop(run)
        assert waits.call_count == count

    class All(Callback):
        def after_step(self, run: RunView, result: Any) -> None: ...
        def after_validation(self, run: RunView, losses: Any) -> None: ...
        def after_save(self, run: RunView, path: Path) -> None: ...

    first = CopyFirst([All()])
    first.before_step(run)
    first.after_step(run, result)
    first.after_validation(run, {})
    first.after_save(run, Path())
    assert waits.call_count == 1 + 3


def named(**tensors: torch.Tensor) -> list[tuple[Any, torch.Tensor]]:
    return [(SimpleNamespace(index=MetadataIndex(name)), tensor) for name, tensor in tensors.items()]


def addresses(*tensors: torch.Tensor) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_what_may_change_at_any_time_is_copied_at_once() -> None:
    weight, buffer = torch.arange(3.0), torch.arange(3.0)
    with held_copies() as events:
        copy = Copy(HostMemory(), named(weight=weight, buffer=buffer), addresses(weight))
        buffer.zero_()
        copy.wait()
        weight.zero_()
    found = {index.fqn: tensor.tolist() for index, tensor in copy.result().items()}
    assert found == {"weight": [0, 1, 2], "buffer": [0, 1, 2]} and events == ["wait", "copy"]


def test_what_a_forward_pass_changes_is_not_saved() -> None:
    weight = torch.nn.Parameter(torch.arange(3.0))
    with held_copies():
        copy = Copy(HostMemory(), named(weight=weight.detach()), addresses(weight))
        with torch.no_grad():
            weight.mul_(2)
        copy.wait()
    with pytest.raises(
        CheckpointError, match=r"^weight was changed while it was copied; callbacks may change it, forw"
    ):
        copy.result()


def test_a_copy_that_is_given_up_ends() -> None:
    weight, gate = torch.arange(3.0), threading.Event()
    take, taken = HostMemory.take, list[Any]()

    def late(self: HostMemory, item: Any, tensor: torch.Tensor) -> torch.Tensor:
        taken.append(gate.wait(LIMIT))
        return take(self, item, tensor)

    with mock.patch.object(HostMemory, "take", late):
        copy = Copy(HostMemory(), named(first=weight, second=weight), addresses(weight))
        threading.Timer(0.2, gate.set).start()
        copy.give_up()
    assert len(taken) <= 1
    with pytest.raises(CheckpointError, match="given up"):
        copy.result()


def short_of_memory(run: RunConfig) -> Any:
    """A run whose last rank has no memory for the copy of step 4."""
    take = HostMemory.take

    def failing(self: HostMemory, item: Any, tensor: torch.Tensor) -> torch.Tensor:
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if in_the_copying_thread() and is_last and steps(run, 2)[0].exists():
            raise MemoryError
        return take(self, item, tensor)

    with mock.patch.object(HostMemory, "take", failing):
        return outcome(run)


NO_MEMORY = (
    "no checkpoint of step {} is made: the state cannot be copied to memory of this machine (MemoryError); "
    "checkpoint.async_save: false saves without a copy; earlier ones are untouched"
)


def test_no_memory_for_the_copy_is_an_error_of_the_save(corpora: DataConfig, tmp_path: Path) -> None:
    run = saving_run(corpora, tmp_path)
    said = run_distributed(short_of_memory, 1, run)[0]
    assert said in (NO_MEMORY.format(4), NO_MEMORY.format(6))  # step 2 may get its name late
    assert sorted(run.checkpoints_dir.iterdir())[0] == steps(run, 2)[0]


@pytest.mark.slow
def test_no_memory_of_one_process_ends_all_with_a_line(corpora: DataConfig, tmp_path: Path) -> None:
    run = saving_run(corpora, tmp_path, LAYOUTS["dp2"])
    first, last = run_distributed(short_of_memory, 2, run)
    assert first.startswith("process 1 failed; see its own message") and last.startswith("no checkpoint of step")
