"""Preference optimization: packed pairs equal plain formulas, layouts and resumed runs one process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steel_megatron.config import DpoConfig, ParallelConfig, PrepareConfig, RunConfig
from steel_megatron.data.indexed.labels import LABEL
from steel_megatron.hf import convert
from tests.fixtures.make_tokenizer import make_tokenizer
from tests.hf.launched import Pieces, pieces
from tests.layouts.following import whole_tensors
from tests.layouts.pool import Pool
from tests.layouts.sft_runs import pretrained, run_of
from tests.train import small_run

ALONE = ParallelConfig()
ALL = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2)
LAYOUTS = {**small_run.LAYOUTS, "tp2 pp2 cp2": ALL}
PROCESSES = {**small_run.PROCESSES, "tp2 pp2 cp2": 8}
SETTINGS = {
    "sigmoid": DpoConfig(beta=0.3, label_smoothing=0.1, sft_weight=0.2),
    "ipo": DpoConfig(loss="ipo", beta=0.5),
}


def prepared(folder: Path) -> str:
    """A corpus of pairs, and one of their chosen answers next to it; the prefix of the first."""
    from steel_megatron.data.preprocessing.chat import prepare

    make_tokenizer(folder / "tokenizer")
    said = ("One.", "Two and a half.", "Nobody knows that.", "Ask me again tomorrow, please.")
    rows = [
        {
            "prompt": f"How much is {number}?",
            "chosen": said[number % 4],
            "rejected": said[(number + 1 + number % 3) % 4],
        }
        for number in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    for name, kind in (("pairs", "pairs"), ("chats", "sft")):
        names = {"output_prefix": str(folder / name), "tokenizer_path": str(folder / "tokenizer"), "max_tokens": 192}
        prepare(PrepareConfig(inputs=[str(folder / f"{name}.jsonl")], **names), kind)
    return f"{folder / 'pairs'}_messages_document"


def run_on_pairs(
    prefix: str, directory: Path, layout: str, kind: str, origin: Path | None, **training: Any
) -> RunConfig:
    run = run_of(prefix, directory, LAYOUTS.get(layout, ALONE), "dpo", **training)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, sequence_length=192),
        checkpoint=dataclasses.replace(run.checkpoint, init_from=origin and str(origin)),
        dpo=SETTINGS[kind],
    )


def origin_of(folder: Path, pool: Pool) -> Path:
    """A checkpoint to start from: of a model that was finetuned on the chosen answers."""
    run = run_on_pairs(
        str(folder / "chats_messages_document"), folder / "origin", "", "sigmoid", None, stop_after_step=3
    )
    found = pool.run(
        pretrained, 1, dataclasses.replace(run, training=dataclasses.replace(run.training, objective="sft"))
    )
    assert not isinstance(found[0], str), found
    return folder / "origin" / "checkpoints" / "step_00000003"


def references(pairs: int) -> torch.Tensor:
    """Log-probabilities that a reference might give, float64 [pairs, 2]."""
    return torch.linspace(-9, -3, 2 * pairs).view(-1, 2).double()


def first_loss_and_gradients(run: RunConfig, prefix: str, alone: bool) -> tuple[float, dict[str, torch.Tensor], Pieces]:
    """Of one global batch of all pairs after an update: by the objective, or by the plain formula on single texts."""
    from steel_megatron.data.indexed.dataset import open_indexed
    from steel_megatron.data.indexed.labels import SECOND, open_labels
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from torch.nn.functional import logsigmoid

    from steel_megatron.data.ledger.loader import WholeSamples, read_samples
    from steel_megatron.train import checkpoint
    from steel_megatron.train.engine import Engine
    from steel_megatron.train.objective.dpo import Dpo

    engine, objective = Engine(run, topology), None
    objective = engine.objective
    assert isinstance(objective, Dpo)
    origin = checkpoint.read_info(Path(str(run.checkpoint.init_from)))
    corpus = open_indexed(prefix)
    labels = open_labels(corpus)
    values = references(corpus.documents)
    objective.reference = {0: values}
    checkpoint.load_weights(engine.stage, origin, run.model)
    if not alone:
        samples = WholeSamples([corpus], run.model.sequence_length)
        arrays = [read_samples(samples, [number], True) for number in range(len(samples))]
        batches = [objective.batch(one[0], one[1], None, topology, one[2], one[3]) for one in arrays]
        loss = next(iter(engine.accumulate_gradients(batches).values())).mean
    else:
        for model in engine.models:
            model.train()
            model.zero_grad_buffer()
        losses = []
        for number in range(corpus.documents):
            ids, flags = corpus.document(number).astype(np.int64), labels.document(number)
            cut = int(np.flatnonzero(flags & SECOND)[0])
            sums, means = [], []
            for part in (slice(0, cut), slice(cut, None)):
                tokens, mask = torch.from_numpy(ids[part])[None], torch.from_numpy(flags[part] & LABEL)[None, 1:]
                objective.documents.set(None)
                logits = engine.stage(tokens, torch.arange(tokens.size(1))[None], None)[:, :-1, : run.model.vocab_size]
                log_probs = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0] * mask
                sums.append(log_probs.sum())
                means.append(mask.sum())
            ratios = [sums[side] - values[number, side].float() for side in (0, 1)]
            settings = run.dpo
            if settings.loss == "ipo":
                delta = ratios[0] / means[0] - ratios[1] / means[1]
                losses.append((delta - 1 / (2 * settings.beta)) ** 2)
            else:
                margin = settings.beta * (ratios[0] - ratios[1])
                smooth = settings.label_smoothing
                losses.append(-(1 - smooth) * logsigmoid(margin) - smooth * logsigmoid(-margin))
                losses[-1] = losses[-1] - settings.sft_weight * sums[0] / means[0]
        total = torch.stack(losses).mean()
        total.backward()
        loss = total.item()
    gradients = {name: weight.main_grad.clone() for name, weight in engine.stage.named_parameters()}
    by_storage = {weight.data_ptr(): weight.main_grad for weight in engine.stage.parameters()}
    return loss, gradients, pieces([engine.stage], lambda weight: by_storage[weight.data_ptr()].clone())


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_packed_pairs_equal_the_formula_on_single_texts(kind: str, pool: Pool, tmp_path: Path) -> None:
    prefix = prepared(tmp_path)
    run = run_on_pairs(prefix, tmp_path / "run", "", kind, origin_of(tmp_path, pool))
    loss, gradients, _ = pool.run(first_loss_and_gradients, 1, run, prefix, False)[0]
    expected, plain, _ = pool.run(first_loss_and_gradients, 1, run, prefix, True)[0]
    assert loss == pytest.approx(expected, rel=1e-5)
    whole = torch.cat([gradient.flatten() for gradient in plain.values()]).norm()
    for name, gradient in plain.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * (gradient.norm() + whole), name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["tp2 pp2 cp2", "cp2 dp2"])
def test_layouts_and_a_resumed_run_equal_one_process(layout: str, pool: Pool, tmp_path: Path) -> None:
    prefix = prepared(tmp_path)
    origin = origin_of(tmp_path, pool)
    whole = pool.run(pretrained, 1, run_on_pairs(prefix, tmp_path / "one", "", "sigmoid", origin))[0]
    assert not isinstance(whole, str), whole
    smooth = SETTINGS["sigmoid"]
    assert len(whole[0]) == 6 and whole[0][-1] < whole[0][0] and whole[1] is not None
    assert whole[0][0] > 0.69 and smooth.sft_weight  # log 2 and the chosen answers' cross entropy
    for ours in pool.run(
        pretrained, PROCESSES[layout], run_on_pairs(prefix, tmp_path / "all", layout, "sigmoid", origin)
    ):
        assert not isinstance(ours, str), ours
        assert ours[0] == pytest.approx(whole[0], rel=1e-5) and ours[1] == pytest.approx(whole[1], rel=1e-5)
    first = pool.run(pretrained, 1, run_on_pairs(prefix, tmp_path / "cut", "", "sigmoid", origin, stop_after_step=3))[0]
    shutil.rmtree(tmp_path / "cut" / "reference")  # it is computed again
    second = pool.run(pretrained, 1, run_on_pairs(prefix, tmp_path / "cut", "", "sigmoid", origin))[0]
    assert (first[0] + second[0], second[1]) == whole
    # Another reference than the stored one, or none.
    manifest = origin.parent / "step_00000009"
    shutil.copytree(tmp_path / "one" / "checkpoints" / "step_00000006", manifest)
    refused = pool.run(pretrained, 1, run_on_pairs(prefix, tmp_path / "one", "", "sigmoid", manifest))[0]
    assert "holds log-probabilities of another reference" in refused
    refused = pool.run(pretrained, 1, run_on_pairs(prefix, tmp_path / "none", "", "sigmoid", None))[0]
    assert "needs checkpoint.init_from" in refused


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("settings", [DpoConfig(beta=0.3), SETTINGS["ipo"]], ids=["sigmoid", "ipo"])
def test_loss_and_gradients_equal_trl(settings: DpoConfig, pool: Pool, tmp_path: Path) -> None:
    """DPOTrainer's own loss on the exported model, the same pairs padded to one length."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from steel_megatron.data.indexed.dataset import open_indexed
    from steel_megatron.data.indexed.labels import SECOND, open_labels
    from steel_megatron.hf import mapping

    prefix = prepared(tmp_path)
    run = dataclasses.replace(
        run_on_pairs(prefix, tmp_path / "run", "", "sigmoid", origin_of(tmp_path, pool)), dpo=settings
    )
    loss, _, held = pool.run(first_loss_and_gradients, 1, run, prefix, False)[0]
    ours = mapping.to_hf(whole_tensors([held]), run.model)
    exported = tmp_path / "exported"
    pool.run(convert.export_hf, 1, Path(str(run.checkpoint.init_from)), exported)
    models = [AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True) for _ in range(2)]
    corpus = open_indexed(prefix)
    labels = open_labels(corpus)
    texts: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for number in range(corpus.documents):
        ids, flags = corpus.document(number).astype(np.int64), labels.document(number)
        cut = int(np.flatnonzero(flags & SECOND)[0])
        for side, part in enumerate((slice(0, cut), slice(cut, None))):
            texts[side].append((ids[part], flags[part] & LABEL))
    rows = [*texts[0], *texts[1]]
    shape = len(rows), max(len(ids) for ids, _ in rows)
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask", "completion_mask")}
    for row, (ids, mask) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.from_numpy(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["completion_mask"][row, : len(ids)] = torch.from_numpy(mask)
    reference = references(corpus.documents).float()
    batch |= {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=settings.beta, loss_type=[settings.loss], report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=models[0],
        ref_model=models[1],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    trainer.precompute_ref_logps = True  # the batch has them
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-5)
    expected = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    assert expected.keys() == ours.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * (gradient.norm() + whole), name
