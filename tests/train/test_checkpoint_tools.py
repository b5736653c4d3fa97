"""List, verify, plan, reshard and compare: what the commands on checkpoints say and write."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from steel_megatron.cli import main
from steel_megatron.config import ParallelConfig, RunConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.train import checkpoint, checkpoint_reshard, checkpoint_tensors
from steel_megatron.train.checkpoint_compare import compare
from steel_megatron.train.checkpoint_list import list_checkpoints
from steel_megatron.train.checkpoint_plan import memory_of, simulated_engine
from steel_megatron.train.checkpoint_tensors import Box, TensorFiles
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, PROCESSES, small_run, train

LAYOUT = "tp2 pp2"
INTERLEAVED = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)


def of(name: str, directory: str = "unused", **training: Any) -> RunConfig:
    run = small_run(LAYOUTS[name], directory, steps=4)
    return dataclasses.replace(run, training=dataclasses.replace(run.training, **training))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoint of step 2, saved by four processes."""
    directory = tmp_path_factory.mktemp("run")
    run_distributed(train, PROCESSES[LAYOUT], of(LAYOUT, str(directory)), 1, 2, True)
    shutil.copy(directory / "checkpoints/step_00000002/run.yaml", directory / "kept.yaml")
    return directory


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def step2(folder: Path) -> Path:
    return folder / "checkpoints/step_00000002"


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """A command's exit code, and its output or its one line of error."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    if code == 2:
        assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured
    return code, captured.out + captured.err


# ---- list and verify ----


def test_the_list_hides_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = folder / "checkpoints"
    for name in ("step_00000004", ".step_00000006.partial", "set_aside/step_00000008"):
        shutil.copytree(inside / "step_00000002", inside / name)
    (inside / "step_00000004/__1_0.distcp").unlink()
    (inside / ".step_00000006.partial/steel.json").unlink()
    found = {one.step: one for one in list_checkpoints(folder)}
    assert {step: one.state for step, one in found.items()} == {
        2: "whole",
        4: "damaged",
        6: "half-written",
        8: "whole",
    }
    assert found[2].layout == "TP2 PP2 EP1 DP1" and found[2].finite is True and found[6].finite is None
    assert found[2].bytes == sum(file.stat().st_size for file in found[2].path.iterdir())
    code, out = said(capsys, "checkpoint", "list", folder)
    table, _, notes = out.partition("\n\n")
    assert code == 0 and all(len(line) <= 80 for line in table.splitlines())
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [(row[0], row[-2], row[-1]) for row in rows] == [
        ("2", "yes", "yes"),
        ("4", "damaged", "yes"),
        ("6", "half-written", "unknown"),
        ("8", "yes", "yes"),
    ]
    assert "step_00000004/__1_0.distcp is missing" in notes and "step_00000008 (set aside)" in notes
    code, out = said(capsys, "checkpoint", "list", inside, "--json_output", "true")
    assert code == 0 and [one["step"] for one in json.loads(out)] == [2, 4, 6, 8]


def test_norms_that_are_not_finite_show_in_the_list(step2: Path) -> None:
    manifest = json.loads((step2 / "steel.json").read_text())
    manifest["norms"][next(iter(manifest["norms"]))] = math.inf
    manifest["sha256"] = checkpoint.manifest_checksum(manifest)
    (step2 / "steel.json").write_text(json.dumps(manifest))
    assert [one.finite for one in list_checkpoints(step2.parent)] == [False]
    manifest["format"] = 1
    del manifest["norms"]
    manifest["sha256"] = checkpoint.manifest_checksum(manifest)
    (step2 / "steel.json").write_text(json.dumps(manifest))
    assert [one.finite for one in list_checkpoints(step2.parent)] == [None]


def test_folders_without_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = said(capsys, "checkpoint", "list", tmp_path)
    assert code == 2 and f"{tmp_path} holds no checkpoints" in line
    code, line = said(capsys, "checkpoint", "list", tmp_path / "nowhere")
    assert code == 2 and "there is no folder" in line


def test_verify_names_the_damaged_file(step2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(capsys, "checkpoint", "verify", step2)
    assert code == 0 and "is whole: step 2, weights and optimizer" in out and "4 processes" in out
    flip(step2 / "__3_1.distcp", -1)
    code, line = said(capsys, "checkpoint", "verify", step2)
    assert code == 2 and "__3_1.distcp is damaged" in line
    (step2 / "__3_1.distcp").unlink()
    code, line = said(capsys, "checkpoint", "verify", step2)
    assert code == 2 and "__3_1.distcp is missing" in line


# ---- plan ----


def measured(run: RunConfig) -> int:
    """Bytes of all tensors that making the engine has left in memory, without states of random generators."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train.engine import Engine

    topology = initialize(run.parallel)

    def storages() -> dict[int, torch.UntypedStorage]:
        gc.collect()
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.dtype != torch.uint8]
        return {one.untyped_storage()._cdata: one.untyped_storage() for one in tensors}

    before = storages()
    engine = Engine(run, topology)
    left = [one.nbytes() for place, one in storages().items() if place not in before]
    assert engine.step_number == 0
    return sum(left)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "model"),
    [
        ("tp2 pp2", "float32", {}),
        ("cp2 tp2 sp ep2", "bfloat16", {}),
        ("tp2 sp ep2", "bfloat16", {"ffn": "top_k_moe", "ffn_activation": "swiglu"}),
        ("interleaved", "float32", {}),
    ],
)
def test_the_planned_memory_is_what_a_run_holds(name: str, precision: str, model: dict[str, Any]) -> None:
    run = dataclasses.replace(of(LAYOUT, precision=precision), parallel=LAYOUTS.get(name, INTERLEAVED))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **model))
    world_size = PROCESSES.get(name, 2)
    planned = []
    for rank in range(world_size):
        with simulated_engine(run, rank, world_size) as engine:
            planned.append(memory_of(engine, rank))
    found = run_distributed(measured, world_size, run)
    for one, total in zip(planned, found, strict=True):  # the rest: the rotary embedding's frequencies, some scalars
        assert 0 <= total - one.total - 4 * run.model.head_dim // 2 < 64, (one, total)
    size = {"float32": 4, "bfloat16": 2}[precision]
    assert all(one.gradients * size == one.weights * 4 for one in planned)  # gradients are kept in float32
    stages = run.parallel.pipeline_model_parallel_size
    for first in range(0, world_size, world_size // stages):  # plan() shows it for its stage
        others = [one.total for one in planned[first : first + world_size // stages]]
        assert max(others) - planned[first].total < 64, others  # a counter of 4 bytes for each parameter of a rank


def test_a_plan_is_told_before_a_job_is_queued(step2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("checkpoint", "plan", step2)
    code, out = said(capsys, *words)
    assert code == 0 and "loads under TP2 PP2 EP1 DP1, 4 processes\nand resumes.\n" in out
    other = ("--parallel.pipeline_model_parallel_size", "1", "--processes", "2")
    code, out = said(capsys, *words, *other)
    assert code == 0 and "loads under TP2 PP1 EP1 DP1, 2 processes" in out and "seeded anew" in out
    code, out = said(capsys, *words, *other, "--json_output", "true")
    (stage,) = json.loads(out)["stages"]
    assert stage["weights"] == stage["gradients"] > 0 and stage["total"] == sum(
        stage[name] for name in ("weights", "gradients", "optimizer")
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "3"], "a launch of 3 processes does not fit tensor x pipeline parallel = 2 x 2 = 4"),
        (["--processes", "0"], "processes is 0; it must be at least 1"),
        (["--parallel.pipeline_model_parallel_size", "3"], "num_layers = 4 is not divisible by"),
        (["--processes", "32"], "global_batch_size = 8 is not divisible by"),
        (["--model.norm_epsilon", "0.1"], "was saved with model.norm_epsilon = 1e-06, this run has 0.1"),
        (["--model.hidden_size", "64"], "was saved with model.hidden_size = 32, this run has 64"),
    ],
)
def test_what_cannot_load_is_refused_by_the_numbers(
    words: list[str], message: str, step2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = said(capsys, "checkpoint", "plan", step2, *words)
    assert code == 2 and message in line
    code, line = said(capsys, "checkpoint", "reshard", step2, step2.parent / "out", *words)
    assert code == 2 and message in line and not (step2.parent / "out").exists()


def test_a_run_yaml_of_another_version_is_named(step2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (step2 / "run.yaml").read_text()
    other = text.replace("hidden_size", "hiden_size", 1)
    (step2 / "run.yaml").write_text(other + "#" * (len(text) - len(other)))
    code, line = said(capsys, "checkpoint", "plan", step2)
    assert code == 2 and f"{step2 / 'run.yaml'}: unknown key 'hiden_size' in ModelConfig" in line


# ---- reshard ----


def load_and_save(run: RunConfig, origin: Path) -> None:
    """Save a checkpoint again, under another layout."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint_save
    from steel_megatron.train.engine import Engine

    engine = Engine(run, initialize(run.parallel))
    info = checkpoint.read_info(origin)
    checkpoint.load(engine, info)
    checkpoint_save.save(engine, info.consumed_samples)


def in_files(folder: Path) -> dict[str, set[tuple[str, Box]]]:
    """The parts of tensors that each process wrote, without the random states."""
    from steel_megatron.train.checkpoint_index import read_index

    index, found = read_index(folder / ".metadata"), {}
    sizes = {name: dict(facts.boxes) for name, facts in TensorFiles(folder).tensors.items()}
    for one, place in index.storage_data.items():
        if not one.fqn.startswith("random."):
            box = (tuple(one.offset), sizes[one.fqn][tuple(one.offset)])
            found.setdefault(place.relative_path.split("_")[2], set()).add((one.fqn, box))
    return found


@pytest.mark.slow
def test_a_resharded_checkpoint_is_what_the_other_layout_saves(
    step2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "other/checkpoints/step_00000002"
    with pytest.raises(CheckpointError, match=r"precision|elements of"):
        checkpoint_reshard.reshard(checkpoint.read_info(step2), out, of("dp2", precision="bfloat16"), 2)
    code, text = said(
        capsys, "checkpoint", "reshard", step2, out, "--processes", "2",
        *("--parallel.tensor_model_parallel_size", "1", "--parallel.pipeline_model_parallel_size", "1"),
    )  # fmt: skip
    assert code == 0 and "step 2 as saved by TP1 PP1 EP1 DP2, 2 processes" in text
    saved_by_a_run = of("dp2", str(tmp_path / "run_dp2"))
    run_distributed(load_and_save, 2, saved_by_a_run, step2)
    real = saved_by_a_run.checkpoints_dir / "step_00000002"
    assert in_files(out) == in_files(real) != in_files(step2)
    assert compare(step2, out).differences == [] and compare(out, real).differences == []
    checkpoint.verify(out)
    manifest, original = (checkpoint.read_manifest(path) for path in (out, step2))
    assert manifest["layout"] == "TP1 PP1 EP1 DP2" and manifest["consumed_samples"] == original["consumed_samples"]
    assert manifest["norms"] == pytest.approx(
        {key: norm for key, norm in original["norms"].items() if not key.startswith("random.")}, rel=1e-6
    )
    assert "pipeline_model_parallel_size: 1" in (out / "run.yaml").read_text()
    resumed = of("dp2", str(tmp_path / "other"))
    straight = run_distributed(train, 2, saved_by_a_run, 3, 4, False, True)
    again = run_distributed(train, 2, resumed, 3, 4, False, True)
    assert [one.loss for one in again[0][:2]] == [one.loss for one in straight[0][:2]]


@pytest.mark.slow
def test_experts_of_other_kinds_and_interleaved_stages_are_resharded(tmp_path: Path) -> None:
    top_k = {"ffn": "top_k_moe", "ffn_activation": "swiglu", "routing_mode": None}
    before, after = (
        small_run(parallel, str(tmp_path / name), steps=4, **top_k)
        for name, parallel in (("before", LAYOUTS["tp2 sp ep2"]), ("after", INTERLEAVED))
    )
    run_distributed(train, 4, before, 1, 1, True)
    info = checkpoint.read_info(before.checkpoints_dir / "step_00000001")
    made = checkpoint_reshard.reshard(info, tmp_path / "made", after, 2)
    run_distributed(load_and_save, 2, after, info.path)
    real = after.checkpoints_dir / "step_00000001"
    assert in_files(made.path) == in_files(real) != in_files(info.path)
    assert compare(info.path, made.path).differences == [] and compare(made.path, real).differences == []


def test_a_reshard_is_there_whole_or_not_at_all(
    step2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", ("checkpoint", "reshard", step2)
    (step2 / "run.yaml").unlink()  # an imported checkpoint has none
    flip(step2 / "__2_0.distcp", -1)
    code, line = said(capsys, *words, out)
    assert code == 2 and "run.yaml is missing" in line
    shutil.copy(step2.parent.parent / "kept.yaml", step2 / "run.yaml")
    code, line = said(capsys, *words, out)
    assert code == 2 and "__2_0.distcp is damaged" in line
    flip(step2 / "__2_0.distcp", -1)
    for inside, message in ((step2 / "inside", "lies inside"), (step2, "is already there")):
        code, line = said(capsys, *words, inside)
        assert code == 2 and message in line
    written = []
    plain = checkpoint_reshard.write_file

    def fails_later(path: Path, tensors: Any) -> Any:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path)
        return plain(path, tensors)

    monkeypatch.setattr(checkpoint_reshard, "write_file", fails_later)
    code, line = said(capsys, *words, out)
    assert code == 2 and f"cannot write {out}" in line and "No space left" in line and len(written) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---- reading parts, and compare ----


def crafted(folder: Path, tensors: Mapping[str, Sequence[tuple[tuple[int, ...], torch.Tensor]]], info: Path) -> Path:
    """A checkpoint with these parts of tensors, by their offsets; the rest is another checkpoint's."""
    folder.mkdir()
    parts = {
        checkpoint_reshard._Part(name, (offset, tuple(tensor.shape))): tensor
        for name, own in tensors.items()
        for offset, tensor in own
    }
    numbers = checkpoint_reshard._numbered([list(parts)])
    written = checkpoint_reshard.write_file(
        folder / "__0_0.distcp", [(numbers[part], tensor) for part, tensor in parts.items()]
    )
    facts = {
        name: checkpoint_tensors.TensorFacts(
            tuple(max(o[axis] + t.shape[axis] for o, t in own) for axis in range(own[0][1].dim())), own[0][1].dtype, ()
        )
        for name, own in tensors.items()
    }
    files = type("Facts", (), {"tensors": facts})()
    checkpoint_reshard.write_index(folder, checkpoint_reshard._index(files, [list(parts)]), written)
    manifest = checkpoint.read_manifest(info)
    for name in ("common.pt", "metadata.json"):
        shutil.copy(info / name, folder / name)
    kept = {key: value for key, value in manifest.items() if key not in ("files", "norms", "sha256")}
    checkpoint_reshard.write_manifest(folder, kept, written)
    return folder


def test_differences_are_named_with_their_size(step2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = torch.arange(24.0).view(4, 6)
    changed = whole.clone()
    changed[3, 5], changed[0, 1] = 23.5, 1.25
    same = {"same": [((0, 0), whole)]}
    a = crafted(
        tmp_path / "a", same | {"w": [((0, 0), whole)], "gone": [((0,), whole[0])], "s": [((0,), whole[0])]}, step2
    )
    in_parts = {
        "same": [((0, 0), whole[:, :2].contiguous()), ((0, 2), whole[:, 2:].contiguous())],  # another layout's
        "w": [((0, 0), changed[:1]), ((1, 0), changed[1:])],
        "new": [((0,), whole[0])],
        "s": [((0,), whole[0, :3])],
        "random.torch": [((0, 0), torch.zeros(1, 8, dtype=torch.uint8))],  # no part of the model
    }
    b = crafted(tmp_path / "b", in_parts, step2)
    code, out = said(capsys, "checkpoint", "compare", a, b)
    assert code == 1 and out.splitlines()[2:] == [
        "gone",
        "    only in A (6 elements)",
        "new",
        "    only in B (6 elements)",
        "s",
        "    shape [6] in A, [3] in B",
        "w",
        "    2 of 24 elements differ, by at most 0.5 (0.0213 of the largest)",
        "4 of 5 tensors differ",
    ]
    code, out = said(capsys, "checkpoint", "compare", a, b, "--tolerance", "0.03", "--json_output", "true")
    assert code == 1 and [one["name"] for one in json.loads(out)["differences"]] == ["gone", "new", "s"]
    code, out = said(capsys, "checkpoint", "compare", a, a)
    assert code == 0 and out.endswith("0 of 4 tensors differ\n")
    code, line = said(capsys, "checkpoint", "compare", a, b, "--tolerance", "-1")
    assert code == 2 and "tolerance is -1.0; it must be 0 or more" in line
    flip(b / "__0_0.distcp", -1)
    code, line = said(capsys, "checkpoint", "compare", a, b)
    assert code == 2 and f"{b / '__0_0.distcp'} is damaged" in line


def test_types_are_compared_as_well(step2: Path, tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    a = crafted(tmp_path / "a", {"w": [((0,), whole)]}, step2)
    b = crafted(tmp_path / "b", {"w": [((0,), whole.bfloat16())]}, step2)
    (one,) = compare(a, b).differences
    assert (one.kind, one.a, one.b, one.elements, one.max_abs) == ("dtype", "float32", "bfloat16", 0, 0.0)


def test_no_more_of_a_tensor_is_read_than_a_piece(step2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1))
    parts = [((0, 0, 0), whole[:, :2].contiguous()), ((0, 2, 0), whole[:, 2:].mT.contiguous().mT)]  # not as in memory
    files = TensorFiles(crafted(tmp_path / "a", {"w": parts, "scalar": [((), whole[0, 0, 0])]}, step2))
    monkeypatch.setattr(checkpoint_tensors, "PIECE", 10)
    found, counted = torch.zeros_like(whole), torch.zeros(whole.shape)
    for offsets, sizes in files.pieces("w"):
        assert math.prod(sizes) <= 10
        place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        found[place] = files.read("w", (offsets, sizes))
        counted[place] += 1
    assert torch.equal(found, whole) and bool((counted == 1).all())
    assert torch.equal(files.read("w", ((1, 1, 2), (2, 3, 4))), whole[1:, 1:4, 2:6])  # out of both parts
    assert torch.equal(files.read("scalar", ((), ())), whole[0, 0, 0])
    with pytest.raises(CheckpointError, match="lacks 7 of 14 elements of w"):
        files.read("w", ((2, 4, 0), (1, 2, 7)))
