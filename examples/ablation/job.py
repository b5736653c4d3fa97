"""One run of the ablation: train by the library's own loop, load the checkpoint, measure, write one JSON file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from steel_megatron.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PreprocessConfig,
    RunConfig,
    TrainingConfig,
)
from steel_megatron.data.ledger.loader import SequentialSamples
from steel_megatron.data.preprocessing.pipeline import preprocess
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from steel_megatron.errors import DataError, TrainingError
from steel_megatron.files import write_atomically
from steel_megatron.log import setup_logging
from steel_megatron.model.flops import training_flops_per_token
from steel_megatron.platform import prepare
from steel_megatron.report import read_scalars

CORPUS = Path(__file__).resolve().parents[1] / "quickstart/corpus"
END = "<|endoftext|>"
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """What all runs have in common.

    Attributes:
        output: folder of the results.
        steps: optimizer steps.
        batch: sequences of one step.
        lr: highest learning rate.
        eval_sequences: sequences of the validation corpus that count, at most.
        positions: sampled positions at which every model is also measured from the prefix alone.
    """

    output: Path
    steps: int
    batch: int
    lr: float
    eval_sequences: int
    positions: int


def prepare_corpus(folder: Path, largest_module: int) -> dict[str, Any]:
    """The quickstart's texts and modules of Python's standard library as bytes; made once.

    Args:
        folder: where the corpus goes.
        largest_module: bytes of the largest module to take, of those at the library's top level.

    Returns:
        the counts: documents, tokens, entropy of single bytes.
    """
    counts = folder / "corpus.json"
    if not counts.exists():
        code = folder / "code"
        shutil.rmtree(code, ignore_errors=True)
        code.mkdir(parents=True)
        for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            if 0 < module.stat().st_size <= largest_module:
                shutil.copyfile(module, code / module.name)
        _byte_tokenizer(folder / "tokenizer")
        report = preprocess(
            PreprocessConfig(
                inputs=[str(CORPUS), str(code)],
                output_prefix=str(folder / "corpus"),
                tokenizer_path=str(folder / "tokenizer"),
                valid_fraction=0.1,
                overwrite=True,
            )
        )
        write_atomically(counts, json.dumps(dataclasses.asdict(report), indent=1).encode(), DataError)
    loaded: dict[str, Any] = json.loads(counts.read_text(encoding="utf-8"))
    return loaded


def _byte_tokenizer(folder: Path) -> None:
    """A token for each byte, and one that ends a document."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({sign: n for n, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "tokenizer.json", tokenizer.to_str().encode(), DataError)
    write_atomically(folder / "tokenizer_config.json", json.dumps({"eos_token": END}).encode(), DataError)
    load_tokenizer("huggingface", folder)


def run_config(plan: Plan, model: ModelConfig, seed: int, directory: Path) -> RunConfig:
    """The settings of one run."""
    data = plan.output / "data"
    return RunConfig(
        model=model,
        data=DataConfig(
            train=[str(data / "corpus_train_text_document")],
            validation=[str(data / "corpus_valid_text_document")],
            tokenizer_path=str(data / "tokenizer"),
        ),
        optimizer=OptimizerConfig(lr=plan.lr, min_lr=plan.lr / 10, warmup_steps=max(1, plan.steps // 10)),
        training=TrainingConfig(
            train_steps=plan.steps,
            global_batch_size=plan.batch,
            micro_batch_size=plan.batch,
            seed=seed,
            log_interval=50,
            eval_interval=plan.steps,
            eval_steps=-(-plan.eval_sequences // plan.batch),
        ),
        checkpoint=CheckpointConfig(directory=str(directory), save_interval=plan.steps),
    )


def settings(plan: Plan, model: ModelConfig, seed: int) -> dict[str, Any]:
    """Everything that a result depends on; a result with other settings is made anew."""
    run = run_config(plan, model, seed, Path("unused"))
    data = hashlib.sha256((plan.output / "data/corpus_train_text_document.json").read_bytes()).hexdigest()
    return {
        "model": _changed(run.model),
        "optimizer": _changed(run.optimizer),
        "training": _changed(run.training),
        "measured": {"eval_sequences": plan.eval_sequences, "positions": plan.positions},
        "data": data,
    }


def _changed(config: Any) -> dict[str, Any]:
    """The fields that are not at their defaults: a setting that the library gets later makes no result stale."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }


def train_and_measure(plan: Plan, name: str, model: ModelConfig, seed: int, result: Path) -> None:
    """Do one run from the beginning and write its result; the process's own threads must be set before."""
    prepare()
    setup_logging()
    from steel_megatron.train.loop import pretrain

    directory = plan.output / "work" / f"{name}.{seed}"
    shutil.rmtree(directory, ignore_errors=True)
    run = run_config(plan, model, seed, directory)
    started = time.monotonic()
    summary = pretrain(run)
    seconds = time.monotonic() - started
    scalars = read_scalars(run.tensorboard_dir)
    losses = [value for _, value in scalars[f"train/{model.loss_name}"]]
    if len(losses) != plan.steps or summary.validation_loss is None:
        raise TrainingError(f"{directory} logged {len(losses)} of {plan.steps} steps")
    tail = max(1, plan.steps // 10)
    outcome = {
        "name": name,
        "seed": seed,
        "settings": settings(plan, model, seed),
        "flops_per_token": training_flops_per_token(model),
        "train_loss": statistics.fmean(losses[-tail:]),
        "train_curve": [statistics.fmean(losses[at : at + tail]) for at in range(0, plan.steps - tail + 1, tail)],
        "forward_validation_loss": summary.validation_loss,
        "training_seconds": seconds,
        **_measure(plan, run, summary.checkpoint),
    }
    if not all(math.isfinite(value) for value in outcome.values() if isinstance(value, float)):
        raise TrainingError(f"{name}, seed {seed}: a result is not finite: {outcome}")
    write_atomically(result, json.dumps(outcome, indent=1).encode(), DataError)
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def loaded_model(run: RunConfig, checkpoint: Path) -> Any:
    """The trained model in this process: the stage, and a function from tokens [B, T] to logits [B, T, V]."""
    from steel_megatron.model.spec import build_model
    from steel_megatron.parallel.topology import initialize_alone, shutdown
    from steel_megatron.train.checkpoint import load_weights
    from steel_megatron.train.checkpoint_manifest import read_info

    stage = build_model(run.model, initialize_alone("the ablation"))
    load_weights(stage, read_info(checkpoint), run.model)
    stage.eval()

    @torch.no_grad()
    def logits(tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.size(1)).expand(tokens.shape)
        output: torch.Tensor = stage(tokens, positions, None)[..., : run.model.vocab_size].float()
        return output

    yield stage, logits
    shutdown()


def _measure(plan: Plan, run: RunConfig, checkpoint: Path) -> dict[str, Any]:
    length = run.model.sequence_length
    validation = SequentialSamples(run.data.validation, length, vocab_size=run.model.vocab_size)
    count = min(len(validation), plan.eval_sequences)
    tokens = torch.from_numpy(np.stack([validation.sample(number) for number in range(count)]))
    with loaded_model(run, checkpoint) as (stage, logits):
        parameters = sum(parameter.numel() for parameter in stage.parameters())
        vocabulary = 2 * run.model.padded_vocab_size * run.model.hidden_size
        everywhere = torch.cat([_losses(logits(part[:, :-1]), part[:, 1:]) for part in tokens.split(8)])  # [N, T]
        ends = [length * (place + 1) // plan.positions for place in range(plan.positions)]
        if run.model.causal:
            at_samples = everywhere[:, [end - 1 for end in ends]]
        else:
            at_samples = _from_prefixes(logits, tokens, ends)
        scales = [weight.item() for name, weight in stage.named_parameters() if name.endswith("mlp.scale")]
        leak, spread = leak_of(logits, tokens[:4, :-1], run.model.vocab_size)
    return {
        "parameters": parameters,
        "non_embedding_parameters": parameters - vocabulary,
        "validation_labels": everywhere.numel(),
        "sampled_labels": at_samples.numel(),
        "causal_validation_loss": everywhere.mean().item() if run.model.causal else at_samples.mean().item(),
        "causal_loss_at_samples": at_samples.mean().item(),
        "routing_scales": scales,
        "leak": leak,
        "logits_std": spread,
    }


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def _from_prefixes(logits: Logits, tokens: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Losses [N, len(ends)] of the token after each prefix, from a forward pass that is given the prefix alone."""
    columns = []
    for end in ends:
        last = torch.cat([logits(part[:, :end])[:, -1:] for part in tokens.split(max(8, 4096 // end))])
        columns.append(_losses(last, tokens[:, end : end + 1]))
    return torch.cat(columns, dim=1)


def leak_of(logits: Logits, tokens: torch.Tensor, vocab_size: int) -> tuple[float, float]:
    """How far logits move when only later tokens change.

    Returns:
        the largest movement over four places from which on all tokens are replaced, and the logits' standard deviation.
    """
    before = logits(tokens)
    length, worst = tokens.size(1), 0.0
    for first in (1, length // 3, length // 2 + 1, length - 1):
        changed = tokens.clone()
        changed[:, first:] = (changed[:, first:] + 101) % vocab_size
        worst = max(worst, (logits(changed)[:, :first] - before[:, :first]).abs().max().item())
    return worst, before.std().item()
