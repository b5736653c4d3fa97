"""Checkpoints resume under any layout, and what is not whole is passed over."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from steel_megatron.config import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig
from steel_megatron.errors import CheckpointError, SteelError
from steel_megatron.files import sha256_of
from steel_megatron.train import checkpoint, checkpoint_checksums, checkpoint_save
from steel_megatron.train.checkpoint_checksums import checksum_of
from steel_megatron.train.checkpoint_index import read_index
from tests.distributed import run_distributed
from tests.file_system import full_disk_at, killed_before, watched
from tests.train.small_run import LAYOUTS, MODEL, PROCESSES, compare, own_batches, small_run, train

ALONE = ParallelConfig()


def layout(name: str) -> tuple[ParallelConfig, int]:
    return (ALONE, 1) if name == "alone" else (LAYOUTS[name], PROCESSES[name])


@pytest.fixture(scope="module")
def uninterrupted() -> list[Any]:
    return run_distributed(train, 1, small_run(ALONE, steps=8))[0]


@pytest.mark.slow
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


@pytest.mark.slow
def test_adam_with_coupled_decay_resumes_as_well(tmp_path: Path) -> None:
    base = small_run(ALONE, str(tmp_path), steps=4, num_layers=2)
    coupled = dataclasses.replace(base.optimizer, megatron={"decoupled_weight_decay": False})
    run = dataclasses.replace(base, optimizer=coupled)
    straight = run_distributed(train, 1, run)[0]
    run_distributed(train, 1, run, 1, 2, True)
    compare(run_distributed(train, 1, run, 3, 4, False, True), straight[2:])


def save_twice(run: RunConfig) -> None:
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train.engine import Engine

    topology = initialize(run.parallel)
    engine = Engine(run, topology)
    for step in (1, 2, 3, 4):
        engine.step(own_batches(run, step, topology))
        if step % 2 == 0:
            checkpoint_save.save(engine, step * run.training.global_batch_size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoints after steps 2 and 4."""
    directory = tmp_path_factory.mktemp("run")
    run_distributed(save_twice, 1, small_run(ALONE, str(directory)))
    return directory / "checkpoints"


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def newest_step(checkpoints: Path) -> int | None:
    info = checkpoint.newest(checkpoints)
    return None if info is None else info.step


def test_whole_checkpoints_are_found(checkpoints: Path) -> None:
    info = checkpoint.newest(checkpoints)
    assert info is not None and info.has_optimizer
    assert (info.step, info.consumed_samples, info.model) == (4, 32, MODEL)
    assert newest_step(checkpoints.with_name("nothing here")) is None


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "run.yaml", "steel.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "first bit", "last bit"])
def test_damaged_checkpoints_are_passed_over(checkpoints: Path, name: str, damage: str) -> None:
    file = checkpoints / "step_00000004" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        flip(file, 0 if damage == "first bit" else -1)
    assert newest_step(checkpoints) == 2
    if damage in ("missing", "truncated") and name != "steel.json":
        with pytest.raises(
            CheckpointError, match=rf"{file} (is missing|has {len(content) - 1:,} bytes); the checkpoint"
        ):
            checkpoint.read_info(file.parent)  # without reading all of it


def test_going_back_to_a_damaged_checkpoint_moves_nothing(checkpoints: Path) -> None:
    flip(checkpoints / "step_00000002" / "__0_0.distcp", -1)
    with pytest.raises(CheckpointError, match=r"step_00000002/__0_0\.distcp is damaged"):
        checkpoint.go_back(small_run(ALONE, str(checkpoints.parent)), 2)
    assert names(checkpoints) == ["step_00000002", "step_00000004"]


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


def with_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint whose manifest says something else, under a checksum that is right."""
    manifest = json.loads((folder / "steel.json").read_text())
    change(manifest)
    manifest["sha256"] = checkpoint.manifest_checksum(manifest)
    (folder / "steel.json").write_text(json.dumps(manifest))
    return folder


def test_checkpoints_of_earlier_versions_have_sha256_of_each_file(checkpoints: Path) -> None:
    newer, older = sorted(checkpoints.iterdir(), reverse=True)

    def earlier(manifest: dict[str, Any]) -> None:
        manifest["format"] = 1
        for name in manifest["files"]:
            file = newer / name
            manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}

    with_manifest(newer, earlier)
    assert newest_step(checkpoints) == 4
    flip(newer / "__0_0.distcp", -1)
    assert newest_step(checkpoints) == 2

    def later(manifest: dict[str, Any]) -> None:
        manifest["files"]["run.yaml"] = {"bytes": (older / "run.yaml").stat().st_size, "md9": "0"}

    with pytest.raises(CheckpointError, match=r"run\.yaml has a checksum that this version does not know: bytes, md9"):
        checkpoint.verify(with_manifest(older, later))
    with pytest.raises(CheckpointError, match="has format 4; this version reads formats 1, 2, 3"):
        checkpoint.verify(with_manifest(older, lambda manifest: manifest.update(format=4)))


def test_a_file_that_cannot_be_read_is_passed_over(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = checkpoint_checksums.checksum_of

    def broken(path: Path, *algorithm: str) -> str:
        if path == checkpoints / "step_00000004" / "__0_0.distcp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(path, *algorithm)

    monkeypatch.setattr(checkpoint_checksums, "checksum_of", broken)
    assert newest_step(checkpoints) == 2


def find_together(folder: Path) -> list[tuple[list[str], int | str | None]]:
    """Two processes look for a checkpoint, whole, then with one and then with all damaged: files read, and outcome."""
    import torch.distributed as dist

    from steel_megatron.parallel.topology import initialize

    is_rank0 = initialize(LAYOUTS["dp2"]).is_rank0
    plain, read, seen = checkpoint_checksums.checksum_of, [], []

    def checksum(path: Path, algorithm: str) -> str:
        read.append(f"{path.parent.name[-1]} {path.name}")
        return plain(path, algorithm)

    def find(check: Callable[[Path], None]) -> int:
        info = checkpoint.newest(folder, check)
        if info is None:
            raise CheckpointError("none is whole")
        return info.step

    checkpoint_checksums.checksum_of = checksum
    for damaged in (None, "step_00000004/__1_0.distcp", "step_00000002/.metadata"):
        if damaged and is_rank0:
            flip(folder / damaged, -1)
        dist.barrier()
        outcome: Any = None
        try:
            outcome = checkpoint_checksums.verified_by_all(find, checkpoint.verify)
        except SteelError as error:
            outcome = str(error)
        seen.append((sorted(read), outcome))
        read.clear()
    return seen


def test_processes_share_the_files_of_a_checkpoint_that_is_verified(checkpoints: Path) -> None:
    for folder in checkpoints.iterdir():
        (folder / "__0_1.distcp").rename(folder / "__1_0.distcp")
        index: Any = read_index(folder / ".metadata")
        for key, info in index.storage_data.items():
            if info.relative_path == "__0_1.distcp":
                index.storage_data[key] = dataclasses.replace(info, relative_path="__1_0.distcp")
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        content = (folder / ".metadata").stat().st_size, checksum_of(folder / ".metadata")

        def renamed(manifest: dict[str, Any], content: tuple[int, str] = content) -> None:
            files = manifest["files"]
            files["__1_0.distcp"] = files.pop("__0_1.distcp")
            files[".metadata"] = {"bytes": content[0], "xxh3_128": content[1]}

        with_manifest(folder, renamed)
    first, second = run_distributed(find_together, 2, checkpoints)
    others = [".metadata", "__0_0.distcp", "common.pt", "metadata.json", "run.yaml", "skipped_steps.json"]
    of_first = {step: [f"{step} {name}" for name in others] for step in (2, 4)}
    assert first[0] == (of_first[4], 4) and second[0] == (["4 __1_0.distcp"], None)
    # What one process finds passes the checkpoint over on all.
    assert first[1] == (of_first[2] + of_first[4], 2)
    assert second[1] == (["2 __1_0.distcp", "4 __1_0.distcp"], None)
    assert first[2][1] == "none is whole" and str(second[2][1]).startswith("process 0 failed")


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
    facts = {"bytes": len(content), "sha256": sha256_of(folder / ".metadata")}
    with_manifest(folder, lambda manifest: manifest["files"].update({".metadata": facts}))
    assert checkpoint.read_info(folder).step == 4
    with pytest.raises(CheckpointError, match=r"asks for .*system, which no checkpoint"):
        checkpoint.verify(folder)


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


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def failure_of_save(engine: Any) -> str:
    return message_of(lambda: checkpoint_save.save(engine, 0))


def read_with_a_flipped_bit(run: RunConfig, folder: Path) -> dict[str, str]:
    """What everything that reads weights says of a checkpoint with a flipped bit in them."""
    from types import SimpleNamespace

    from steel_megatron import generate
    from steel_megatron.audit.sources import open_subject
    from steel_megatron.hf.convert import export_hf
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import loop
    from steel_megatron.train.engine import Engine

    topology = initialize(run.parallel)
    engine, begun = Engine(run, topology), SimpleNamespace(begin=lambda *_: None)
    subject = open_subject(folder, 0)
    readers: dict[str, Callable[[], Any]] = {
        "start": lambda: loop._start(run, topology, engine, begun, begun),  # type: ignore[arg-type]
        "export": lambda: export_hf(folder, folder.parent / "exported"),
        "generate": lambda: generate._load_checkpoint(checkpoint.read_info(folder), run.parallel),
        "audit": subject.load,
        "audit without an exported form": lambda: subject.fill(engine.stage),
    }
    return {name: message_of(read) for name, read in readers.items()}


@pytest.mark.slow
def test_whoever_reads_weights_compares_them_with_their_checksums(checkpoints: Path, tmp_path: Path) -> None:
    folder = checkpoints / "step_00000004"
    file = folder / "__0_0.distcp"
    flip(file, file.stat().st_size // 2)
    run = small_run(ALONE, str(tmp_path / "new"))
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, init_from=str(folder)))
    said = run_distributed(read_with_a_flipped_bit, 1, run, folder)[0]
    assert said == dict.fromkeys(
        said, f"CheckpointError: {file} is damaged: its checksum is not the one it was saved with"
    )
    assert not (checkpoints / "exported").exists() and not (tmp_path / "new").exists()


def save_and_load(run: RunConfig) -> dict[str, Any]:
    """What saves do to the folder, also where the disk is full, and what a load brings back."""
    import torch

    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train.engine import Engine

    folder, seen = run.checkpoints_dir, {}
    engine = Engine(run, initialize(run.parallel))
    folder.mkdir(parents=True)
    for name in ("first", "again"):
        for left in ("partial", "old"):  # of saves that were killed
            (folder / f".step_00000099.{left}").mkdir()
            (folder / f".step_00000099.{left}" / "x").touch()
        with watched(folder) as watch:
            checkpoint_save.save(engine, 16)
        seen[name] = (watch.faults, watch.order()[-1], names(folder))
    failures = []
    for number in range(1, 1000):
        with full_disk_at(number):
            failures.append((failure_of_save(engine), names(folder), newest_step(folder)))
        if failures[-1][0] == "no error":
            break
    seen["failures"] = failures
    torch.manual_seed(5)
    torch.rand(3)
    state = torch.get_rng_state()
    checkpoint_save.save(engine, 24)
    torch.rand(3)
    info = checkpoint.newest(folder)
    assert info is not None and info.consumed_samples == 24
    for change in ({"rotary_base": 10_000}, {"routing_mode": "merged"}):
        other = dataclasses.replace(info, model=dataclasses.replace(info.model, **change))
        seen[f"load {change}"] = message_of(lambda: checkpoint.load(engine, other))  # noqa: B023
        seen[f"begin {change}"] = message_of(lambda: checkpoint.load_weights(engine.stage, other, run.model))  # noqa: B023
    checkpoint.load(engine, info)
    seen["random state"] = torch.equal(state, torch.get_rng_state())
    seen["plans"] = plans(engine)
    return seen


def plans(engine: Any) -> list[tuple[bool, bool, int]]:
    """Of two states with one layout, and of one with another: whether the plan is the first, its data new, its size."""
    import torch

    from steel_megatron.train.checkpoint_writer import Planner

    planner, seen, first = Planner(), [], None
    for number in range(3):
        torch.manual_seed(number)
        state = checkpoint.sharded_engine(engine)
        if number == 2:
            del state["optimizer"]
        tensors, index = planner.plan(state)
        row = next(tensor for item, tensor in tensors if item.index.fqn == "random.torch")
        first = first or index
        seen.append((index is first, torch.equal(row[0], torch.get_rng_state()), len(tensors)))
    return seen


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_what_saves_and_loads_do(tmp_path: Path) -> None:
    run = small_run(ALONE, str(tmp_path), num_layers=1)
    seen = run_distributed(save_and_load, 1, run)[0]
    step = "step_00000000"
    assert seen["first"] == ([], "fsync .", [step])
    assert seen["again"][0] == [] and seen["again"][2] == [step]
    *failures, last = seen["failures"]
    assert len(failures) > 5 and last == ("no error", [step], 0)
    for message, left, newest in failures:
        assert message.startswith(f"CheckpointError: could not write the checkpoint {tmp_path}/checkpoints/{step}: ")
        # The old one is aside between two renames, and until the second one is on the disk.
        assert (left, newest) in (([step], 0), ([f".{step}.old"], None), ([f".{step}.old", step], 0))
    assert seen["random state"]
    (*_, tensors), *later = seen["plans"]
    assert later == [(True, True, tensors), (False, True, mock.ANY)] and 0 < later[1][2] < tensors
    assert "model.rotary_base" in seen["load {'rotary_base': 10000}"]
    assert "model.rotary_base" in seen["begin {'rotary_base': 10000}"]
    assert "model.routing_mode" in seen["load {'routing_mode': 'merged'}"]
    assert seen["begin {'routing_mode': 'merged'}"] == "no error"


def test_a_save_begins_in_an_empty_folder(tmp_path: Path) -> None:
    """Under any name: an import may be called otherwise than a run's checkpoints."""
    (tmp_path / ".start.partial" / "inner").mkdir(parents=True)
    checkpoint_save._begin(tmp_path / ".start.partial", tmp_path / "start")
    assert list((tmp_path / ".start.partial").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
def test_a_kill_at_any_moment_leaves_whole_checkpoints(saved: Path, tmp_path: Path, step: int) -> None:
    """A save in place of a checkpoint, or a new one, is killed before each of its calls, and done again."""
    final, whole = tmp_path / f"step_{step:08d}", saved / "step_00000004"
    partial, manifest = final.with_name(f".{final.name}.partial"), json.loads((whole / "steel.json").read_text())
    manifest = {key: value for key, value in manifest.items() if key not in ("files", "sha256")} | {"step": step}

    def save() -> None:
        checkpoint_save._begin(partial, final)
        for file in whole.iterdir():
            if file.name != "steel.json":
                shutil.copy(file, partial)
        checkpoint_save._finish(partial, final, manifest, None, [])

    for number in itertools.count(1):
        shutil.rmtree(tmp_path)
        shutil.copytree(saved, tmp_path)
        killed = killed_before(number, save)
        found = sorted(tmp_path.glob("step_*"))
        for path in found:
            assert checkpoint.read_info(path).step == int(path.name[-8:])
            checkpoint.verify(path)
        assert len(found) >= 2 - (step == 4)
        save()
        assert newest_step(tmp_path) == step
        assert names(tmp_path) == sorted({"step_00000002", "step_00000004", final.name})
        if not killed:
            break
    assert number > 7


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
    assert newest_step(checkpoints) == 4 and names(checkpoints) == ["step_00000002", "step_00000004"]


def save_with_a_first_process_that_cannot(directory: str) -> str:
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train.engine import Engine

    run = small_run(LAYOUTS["dp2"], directory)
    topology = initialize(run.parallel)
    engine = Engine(run, topology)
    if topology.is_rank0:

        def fail(*args: object) -> None:
            raise OSError(28, "No space left on device")

        checkpoint_save.replace_folder = fail  # type: ignore[assignment]
    return failure_of_save(engine)


@pytest.mark.slow
def test_a_save_that_fails_on_one_process_fails_on_all(tmp_path: Path) -> None:
    messages = run_distributed(save_with_a_first_process_that_cannot, 2, str(tmp_path), timeout=50)
    assert "No space left on device" in messages[0] and "process 0 failed" in messages[1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == []


def test_tensors_are_read_however_they_were_saved(tmp_path: Path) -> None:
    """What lies in a file as it is wanted is read straight to its place; the rest is cut, turned or converted."""
    import torch
    import torch.distributed.checkpoint as dcp

    from steel_megatron.train.checkpoint_reader import _Reader

    table = torch.arange(24.0).view(4, 6)
    saved = {
        "same": table,
        "turned": table.t(),
        "with gaps": table.t(),
        "wide": table.double(),
        "whole": table.int(),
        "one": torch.tensor(3.0),
    }
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(tmp_path, thread_count=3), no_dist=True)
    wanted = {name: torch.zeros(tensor.shape) for name, tensor in saved.items()}
    wanted["same"], wanted["with gaps"] = torch.zeros(6, 4).t(), torch.zeros(4, 6).t()
    dcp.load(wanted, storage_reader=_Reader(tmp_path), no_dist=True)
    for name, tensor in saved.items():
        assert torch.equal(wanted[name], tensor.float()), name
    straight = {"same": torch.zeros(4, 6), "one": torch.zeros(())}
    with mock.patch.object(torch, "load", None):
        dcp.load(straight, storage_reader=_Reader(tmp_path), no_dist=True)
    assert torch.equal(straight["same"], table) and straight["one"] == 3
    (file,) = {
        place.relative_path
        for at, place in dcp.FileSystemReader(tmp_path).read_metadata().storage_data.items()
        if at.fqn == "same"
    }
    os.truncate(tmp_path / file, 1_000)
    with pytest.raises(dcp.api.CheckpointException):
        dcp.load(straight, storage_reader=_Reader(tmp_path), no_dist=True)
