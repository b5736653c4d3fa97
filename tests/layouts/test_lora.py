"""Runs that train adapters: what they compute is peft's, what they save resumes, and their base stays as it is."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steel_megatron.cli import main
from steel_megatron.config import LoraConfig, ParallelConfig, RunConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.hf.adapters import published_adapters
from steel_megatron.hf.convert import export_hf
from steel_megatron.train import checkpoint
from tests.hf.launched import Pieces, pieces
from tests.layouts import test_dpo as pairs
from tests.layouts.features import BASE
from tests.layouts.following import whole_tensors
from tests.layouts.pool import Pool
from tests.layouts.sft_runs import MODES, prepared, pretrained, run_of
from tests.train.small_run import LAYOUTS, PROCESSES, own_batches

ALONE = ParallelConfig()
LORA = LoraConfig(rank=4, alpha=6.0)
EXPORTED = {mode: fields for mode, fields in MODES.items() if mode != "top_k_moe"}
EXPORTED |= {"stock": {"ffn": "dense", "routing_mode": None, "ffn_activation": "swiglu"}}
EXPORT = ["export-hf", "--checkpoint"]
CHANGED = {"linear_qkv", "linear_proj", "up", "down"}
STEP_3, STEP_6 = (f"step_{step:08d}" for step in (3, 6))


def adapted(run: RunConfig, origin: Path, lora: LoraConfig = LORA, **model: Any) -> RunConfig:
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **model),
        checkpoint=dataclasses.replace(run.checkpoint, init_from=str(origin)),
        lora=lora,
    )


def save_initial_weights(run: RunConfig) -> None:
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint_save
    from steel_megatron.train.engine import Engine

    checkpoint_save.save(Engine(run, initialize(ALONE)), 0)


def with_random_adapters(run: RunConfig) -> tuple[torch.Tensor, float, Pieces, dict[str, int]]:
    """Adapters that add something, saved: the tokens of a micro batch, its loss, the adapters' gradients, and bytes."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint_save
    from steel_megatron.train.checkpoint_plan import memory_of
    from steel_megatron.train.engine import Engine, minimised
    from steel_megatron.train.loop import _load_origin

    topology = initialize(ALONE)
    engine = Engine(run, topology)
    _load_origin(run, engine)
    generator = torch.Generator().manual_seed(1)
    for name, weight in engine.stage.named_parameters():
        if name.endswith("lora_B"):
            weight.data.normal_(0.0, 0.1, generator=generator)
    engine.optimizer.reload_model_params()
    (batch, *_) = own_batches(run, 1, topology)
    loss = minimised(engine.accumulate_gradients([batch])).mean
    checkpoint_save.save(engine, 0)
    trained = {weight.data_ptr(): weight.main_grad for weight in engine.stage.parameters() if weight.requires_grad}
    held = pieces([engine.stage], lambda weight: trained.get(weight.data_ptr(), torch.zeros(1)).clone())
    whole, own = (sum(one.numel() for one in tensors) for tensors in (engine.stage.parameters(), trained.values()))
    sizes = {
        **vars(memory_of(engine, 0)),
        "parameters": whole,
        "adapters": own,
    }
    adapters = {label: one for label, one in held.items() if "lora_" in label}
    return torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1), loss, adapters, sizes


@pytest.mark.slow
@pytest.mark.parametrize("mode", EXPORTED)
def test_loss_logits_and_gradients_are_those_of_peft(mode: str, pool: Pool, tmp_path: Path) -> None:
    """On the exported base; merged and separate exports agree, and what is frozen has no gradients and no state."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, run = (
        dataclasses.replace(
            BASE,
            model=dataclasses.replace(BASE.model, **EXPORTED[mode]),
            checkpoint=dataclasses.replace(BASE.checkpoint, directory=str(tmp_path / name)),
        )
        for name in ("base", "adapted")
    )
    origin, path = (one.checkpoints_dir / "step_00000000" for one in (base, run))
    pool.run(save_initial_weights, 1, base)
    run = adapted(run, origin)
    tokens, loss, held, sizes = pool.run(with_random_adapters, 1, run)[0]
    pool.run(export_hf, 1, origin, tmp_path / "hf")
    pool.run(export_hf, 1, path, tmp_path / "merged")
    assert main([*EXPORT, str(path), "--output", str(tmp_path / "peft"), "--adapters", "separate"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    model: Any = PeftModel.from_pretrained(exported, tmp_path / "peft", is_trainable=True)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    labels = torch.where(torch.arange(tokens.size(1) - 1) % 5 == 4, -100, tokens[:, 1:])  # as of own_batches
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-5)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    with torch.no_grad():
        difference = merged(input_ids=tokens[:, :-1], use_cache=False).logits - logits
    assert difference.abs().max() < 1e-5 * logits.abs().max()
    ours = published_adapters(whole_tensors([held]), run.model)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    expected = {name.replace(".default", ""): weight.grad for name, weight in trained.items()}
    assert expected.keys() == ours.keys() and len(ours) > 8
    norm = torch.cat([one.flatten() for one in expected.values()]).norm()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= 1e-5 * (gradient.norm() + norm), name
    room = sizes["adapters"] + 1024  # padding
    assert sizes["gradients"] <= 4 * room and sizes["optimizer"] <= 8 * room + 4096  # and counters
    assert sizes["weights"] >= 4 * sizes["parameters"] > 16 * room


@dataclasses.dataclass(frozen=True)
class Start:
    """A corpus, and a run on it of 6 steps.

    Attributes:
        prefix: of the corpus.
        folder: with the tokenizer.
        checkpoints: of the run.
        validation: the loss after step 3.
    """

    prefix: str
    folder: Path
    checkpoints: Path
    validation: float


@pytest.fixture(scope="module")
def start(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Start:
    folder = tmp_path_factory.mktemp("start")
    prefix = prepared(folder)
    first = pool.run(pretrained, 1, run_of(prefix, folder / "base", ALONE, stop_after_step=3))[0]
    pool.run(pretrained, 1, run_of(prefix, folder / "base", ALONE))
    return Start(prefix, folder, folder / "base" / "checkpoints", first[1])


def replies(model: Path, tokenizer: Path) -> list[int]:
    """The tokens that a model goes on with."""
    from steel_megatron.generate import generate
    from steel_megatron.ops.sampling import Sampling

    return generate(model, ["Hi?"], Sampling(max_new_tokens=6), ("huggingface", str(tokenizer)))[0].new_tokens


def loaded(path: Path, parallel: ParallelConfig) -> Pieces:
    """A process's part of the weights that a checkpoint gives a model without adapters."""
    from steel_megatron.model.spec import build_model
    from steel_megatron.parallel.topology import initialize

    info = checkpoint.read_info(path)
    stage = build_model(info.model, initialize(parallel))
    checkpoint.load_weights(stage, info, info.model)
    return pieces([stage], lambda weight: weight.detach().clone())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_is_saved_resumed_moved_and_used(pool: Pool, start: Start, tmp_path: Path) -> None:
    origin, tokenizer = start.checkpoints / STEP_3, start.folder / "tokenizer"
    before = {file.name: file.read_bytes() for file in origin.iterdir()}

    def run(name: str, layout: str = "", **training: Any) -> RunConfig:
        parallel = LAYOUTS.get(layout, ALONE)
        return adapted(run_of(start.prefix, tmp_path / name, parallel, **training), origin)

    whole = pool.run(pretrained, 1, run("whole"))[0]
    assert not isinstance(whole, str) and whole[1] < start.validation, whole
    first = pool.run(pretrained, 1, run("run", stop_after_step=3))[0]
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    second = pool.run(pretrained, 1, run("run"))[0]
    assert (first[0] + second[0], second[1]) == whole
    for ours in pool.run(pretrained, PROCESSES["tp2 pp2"], run("moved", "tp2 pp2")):
        assert ours[0] == pytest.approx(second[0], rel=1e-5) and ours[1] == pytest.approx(whole[1], rel=1e-5)
    assert {file.name: file.read_bytes() for file in origin.iterdir()} == before
    path = tmp_path / "run" / "checkpoints" / STEP_6
    size, of_base = (sum(file.stat().st_size for file in one.glob("*.distcp")) for one in (path, origin))
    assert size < of_base / 3
    # The same model in all its forms.
    exported = ["--output", str(tmp_path / "hf"), "--tokenizer_path", str(tokenizer)]
    assert main([*EXPORT, str(path), *exported]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Low-rank adapters of the checkpoint" in card and "rank: 4" in card
    said = pool.run(replies, 1, path, tokenizer)[0]
    assert said and pool.run(replies, 1, tmp_path / "hf", tokenizer)[0] == said
    one, unadapted = (whole_tensors(pool.run(loaded, 1, of, ALONE)) for of in (path, origin))
    two = whole_tensors(pool.run(loaded, 2, path, LAYOUTS["tp2"]))
    ours = checkpoint.read_tensors(checkpoint.read_info(path), list(one))
    changed = [name for name in one if not torch.equal(one[name], unadapted[name])]
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], ours[name]) for name in one)
    assert {name.split(".")[-2 if name.endswith("weight") else -1] for name in changed} == CHANGED
    assert main(["checkpoint", "plan", str(path)]) == 0
    assert main(["checkpoint", "reshard", str(path), str(tmp_path / "anew")]) == 0
    assert main(["checkpoint", "compare", str(path), str(tmp_path / "anew")]) == 0
    assert checkpoint.read_info(tmp_path / "anew").base == checkpoint.read_info(path).base
    # A run on top of it, whose base is the model with these adapters.
    on_top = pool.run(pretrained, 1, adapted(run("again", stop_after_step=1), path))[0]
    assert not isinstance(on_top, str) and on_top[0][0] < whole[0][0]


@pytest.mark.slow
def test_another_base_and_other_adapters_are_refused(pool: Pool, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "base" / "checkpoints"
    shutil.copytree(start.folder / "base", tmp_path / "base")
    run = adapted(run_of(start.prefix, tmp_path / "run", ALONE, stop_after_step=3), folder / STEP_3)
    pool.run(pretrained, 1, run)
    on = adapted(run_of(start.prefix, tmp_path / "run", ALONE), folder / STEP_3)
    for lora in (dataclasses.replace(LORA, rank=2), LoraConfig()):
        refused = pool.run(pretrained, 1, dataclasses.replace(on, lora=lora))[0]
        assert "was saved with lora.rank = 4" in refused
    refused = pool.run(pretrained, 1, adapted(on, folder / STEP_6))[0]
    assert f"holds adapters of the checkpoint {folder / STEP_3}" in refused
    refused = pool.run(pretrained, 1, adapted(run_of(start.prefix, tmp_path / "base", ALONE), folder / STEP_3))[0]
    assert "was saved with lora.rank = None" in refused
    info = checkpoint.read_info(tmp_path / "run" / "checkpoints" / STEP_3)
    assert info.lora == LORA and info.base is not None
    shutil.rmtree(folder / STEP_3)
    shutil.copytree(folder / STEP_6, folder / STEP_3)
    with pytest.raises(CheckpointError, match=r"holds adapters alone, .*\(checksum .*They fit no other weights"):
        checkpoint.weight_files(info)
    shutil.rmtree(folder / STEP_3)
    with pytest.raises(CheckpointError, match=r"holds adapters alone, .* there is no folder"):
        checkpoint.weight_files(info)


@pytest.mark.slow
def test_the_reference_of_preferences_is_the_model_without_adapters(pool: Pool, tmp_path: Path) -> None:
    """Also where it is computed once more, after the adapters have learned something."""
    prefix = pairs.prepared(tmp_path)
    origin = pairs.origin_of(tmp_path, pool)

    def run(name: str, layout: str = "", **training: Any) -> RunConfig:
        return adapted(pairs.run_on_pairs(prefix, tmp_path / name, layout, "sigmoid", origin, **training), origin)

    full = pairs.run_on_pairs(prefix, tmp_path / "full", "", "sigmoid", origin, stop_after_step=1)
    stored = [pool.run(pretrained, 1, one)[0] for one in (full, run("whole"))]
    whole = stored[1]
    assert not isinstance(whole, str), whole
    assert whole[0][0] == pytest.approx(stored[0][0][0], rel=1e-6) and whole[0] != stored[0][0]
    values = [np.load(tmp_path / name / "reference" / "0.npy") for name in ("full", "whole")]
    assert np.allclose(*values, rtol=1e-6)
    first = pool.run(pretrained, 1, run("cut", stop_after_step=3))[0]
    shutil.rmtree(tmp_path / "cut" / "reference")
    second = pool.run(pretrained, 1, run("cut"))[0]
    assert (first[0] + second[0], second[1]) == whole
    for ours in pool.run(pretrained, PROCESSES["tp2 pp2"], run("layout", "tp2 pp2")):
        assert ours[0] == pytest.approx(whole[0], rel=1e-5) and ours[1] == pytest.approx(whole[1], rel=1e-5)
