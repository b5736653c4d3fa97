"""The commands that have to do with models: pretrain, export-hf, import-hf, generate, audit."""

from __future__ import annotations

import sys
from typing import Literal

from steel_megatron.config import RunConfig, TokenizerKind, import_routing_code
from steel_megatron.errors import DataError


def pretrain(run: RunConfig) -> None:
    """Train a model, or go on where its folder stands; alone, under torchrun or under srun."""
    from steel_megatron.platform import prepare

    prepare()  # before megatron-core is imported
    from steel_megatron.train.loop import pretrain as train

    train(run)


def export_hf(
    checkpoint: str,
    output: str,
    tokenizer_path: str | None = None,
    tokenizer_kind: TokenizerKind = "huggingface",
    dtype: Literal["float32", "bfloat16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Turn a checkpoint into a Hugging Face folder: weights, settings, tokenizer and the model's code.

    Args:
        checkpoint: the checkpoint's folder (step_...).
        output: the folder to make.
        tokenizer_path: the tokenizer's folder or file, to be exported with the model.
        tokenizer_kind: what it is.
        dtype: type of the exported weights; as saved if not given.
        overwrite: whether to replace an earlier folder of that name.
    """
    from pathlib import Path

    from steel_megatron.hf.convert import export_hf as run

    tokenizer = (tokenizer_kind, tokenizer_path) if tokenizer_path else None
    run(Path(checkpoint), Path(output), tokenizer, dtype, overwrite=overwrite)


def import_hf(folder: str, output: str, overwrite: bool = False) -> None:
    """Turn a Hugging Face folder into a checkpoint to start from (checkpoint.init_from).

    Args:
        folder: the model's folder, with config.json and safetensors files.
        output: the checkpoint to make.
        overwrite: whether to replace an earlier checkpoint of that name.
    """
    from pathlib import Path

    from steel_megatron.hf.convert import import_hf as run

    run(Path(folder), Path(output), overwrite=overwrite)


def generate(
    model: str,
    prompts: list[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    tokenizer_path: str | None = None,
    tokenizer_kind: TokenizerKind = "huggingface",
    json_output: bool = False,
    routing_code: str | None = None,
) -> None:
    """Continue texts with a checkpoint or an exported folder.

    Args:
        model: a checkpoint's folder (step_...) or a Hugging Face folder.
        prompts: the texts to continue.
        max_new_tokens: tokens to add, at most.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are drawn from; 0 for all.
        seed: of the draws.
        tokenizer_path: the tokenizer's folder or file; the model's own if not given.
        tokenizer_kind: what it is.
        json_output: one JSON object per text, with the ids of the new tokens, in place of the text.
        routing_code: module that registers the checkpoint's routing mode, if that is no part of the library.
    """
    import dataclasses
    import json
    from pathlib import Path

    from steel_megatron.generate import Sampling
    from steel_megatron.generate import generate as run

    if routing_code:
        import_routing_code(routing_code)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    tokenizer = (tokenizer_kind, tokenizer_path) if tokenizer_path else None
    for result in run(Path(model), prompts, sampling, tokenizer):
        line = json.dumps(dataclasses.asdict(result), ensure_ascii=False) if json_output else result.text + "\n"
        sys.stdout.write(line + "\n")


def audit(
    path: str,
    length: int | None = None,
    positions: list[int] = [],  # noqa: B006 (read by the parser, never changed)
    seed: int = 0,
    tolerance: float | None = None,
    layers: int | None = None,
    json: str | None = None,
    routing_code: str | None = None,
) -> int:
    """Find out whether a model's tokens see later ones, layer by layer, and whether it decodes what it computes.

    The exit code is 0 if it is causal, 1 if it leaks or computes different things in different ways.

    Args:
        path: a checkpoint's folder (step_...), a Hugging Face folder, or a YAML file with settings.
        length: tokens of the random texts; two blocks and some more if not given.
        positions: tokens to change; if not given, the first, the last, and those inside and at the edges of blocks.
        seed: of texts and replacements, and of the weights where settings are audited.
        tolerance: movement in standard deviations that counts as rounding; 1e-5 if not given.
        layers: audit the first layers only, of a model that does not fit into memory.
        json: file for the figures.
        routing_code: module that registers the checkpoint's routing mode, if that is no part of the library.
    """
    import os
    from json import dumps
    from pathlib import Path

    from steel_megatron.files import write_atomically
    from steel_megatron.platform import prepare

    if routing_code:
        import_routing_code(routing_code)
    if json and os.path.isdir(json):
        raise DataError(f"the report {json} is a folder; name a file")
    prepare()  # before megatron-core is imported
    from steel_megatron.audit import audit as run

    report = run(Path(path), length=length, positions=positions, seed=seed, tolerance=tolerance, layers=layers)
    if json:
        write_atomically(json, (dumps(report.to_dict(), indent=1) + "\n").encode(), DataError)
    sys.stdout.write(report.to_text())
    return 0 if report.passed else 1
