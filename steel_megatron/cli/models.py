"""The model commands: pretrain, export-hf, import-hf, generate, audit."""

from __future__ import annotations

import sys
from typing import Literal

from steel_megatron.cli.early import check_report, check_run, check_tokenizer
from steel_megatron.cli.evaluation import need_harness
from steel_megatron.config import RunConfig, TokenizerKind, import_routing_code
from steel_megatron.errors import ConfigError, DataError, ExitCode, LostRankError
from steel_megatron.log import get_logger, report_error
from steel_megatron.streams import say

logger = get_logger(__name__)


def pretrain(run: RunConfig) -> int:
    """Train a model, or resume from its newest checkpoint; alone, under torchrun or under srun.

    The exit code is 0 if the run has come to its end, 75 if a signal stopped it and the same command resumes it.
    """
    import os

    check_run(run)
    # A lost process is told in a line; torch would warn of its connections with 20 lines of C++ each.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from steel_megatron.platform import prepare

    prepare()  # before megatron-core is imported
    from steel_megatron.hf.starting import start_from_folders
    from steel_megatron.train.loop import pretrain as train
    from steel_megatron.train.stop_signal import ignore_stop_signals, stop_with_launcher

    callbacks = []
    if run.evaluation.tasks:
        need_harness("evaluation.tasks")
        from steel_megatron.evaluation.in_loop import TaskScores

        callbacks.append(TaskScores(run))
    start_from_folders()
    stop_with_launcher()
    try:
        summary = train(run, callbacks)
    except LostRankError as error:
        code = report_error(error)
        sys.stdout.flush()
        os._exit(code)  # C++ aborts the end of a process that has broken connections
    if not summary.stopped:
        return ExitCode.FINISHED
    ignore_stop_signals()
    return ExitCode.STOPPED


def export_hf(
    checkpoint: str,
    output: str,
    tokenizer_path: str | None = None,
    tokenizer_kind: TokenizerKind = "huggingface",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str = "5GB",
    allow_other_tokenizer: bool = False,
    adapters: Literal["merged", "separate"] = "merged",
    overwrite: bool = False,
) -> None:
    """Export a checkpoint as a Hugging Face folder: weights, config, tokenizer and model card.

    Args:
        checkpoint: checkpoint folder (step_...), or a run's (its newest checkpoint).
        output: folder to create.
        tokenizer_path: tokenizer folder or file, to export with the model.
        tokenizer_kind: kind of the tokenizer.
        dtype: dtype of the exported weights; default: as saved.
        max_shard_size: largest file of weights, such as 5GB or 500MB.
        allow_other_tokenizer: export a tokenizer other than the one that made the run's corpora.
        adapters: of a run with adapters, export the model with them in its weights, or them alone in peft's format.
        overwrite: replace an existing folder.
    """
    from pathlib import Path

    from steel_megatron.hf.paths import MARKS, check_output, parse_size
    from steel_megatron.train.model_path import find_checkpoint

    max_shard_bytes = parse_size(max_shard_size)
    source = find_checkpoint(checkpoint).path
    check_output(Path(output).resolve(), overwrite, source.resolve(), MARKS)
    check_tokenizer(tokenizer_path)
    from steel_megatron.hf.convert import export_hf as run

    tokenizer = (tokenizer_kind, tokenizer_path) if tokenizer_path else None
    run(
        source,
        Path(output),
        tokenizer,
        dtype,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        allow_other_tokenizer=allow_other_tokenizer,
        separate_adapters=adapters == "separate",
    )


def import_hf(
    folder: str,
    output: str,
    upcycle: Literal["merged", "token", "block_causal", "sequence", "top_k_moe"] | None = None,
    num_experts: int | None = None,
    slots_per_expert: int | None = None,
    block_length: int | None = None,
    moe_top_k: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
) -> None:
    """Convert a Hugging Face folder (Steel, Qwen2, Llama) to a checkpoint to start from (checkpoint.init_from).

    Args:
        folder: model folder with config.json and safetensors files.
        output: checkpoint to create.
        upcycle: make the dense model a mixture of experts, each a copy of its feed-forward network: Soft-MoE with this
            routing mode, or top_k_moe.
        num_experts: experts of a layer, with upcycle; default: 8.
        slots_per_expert: slots of each expert, with upcycle; default: 1.
        block_length: tokens of a block or segment, with upcycle; default: 64.
        moe_top_k: experts for each token, with upcycle top_k_moe; default: 2.
        seed: random seed of the routing weights, with upcycle; default: 0.
        overwrite: replace an existing checkpoint.
    """
    from pathlib import Path

    from steel_megatron.hf.paths import check_output, read_config
    from steel_megatron.train.checkpoint_manifest import MANIFEST

    options = {
        "num_experts": num_experts,
        "slots_per_expert": slots_per_expert,
        "block_length": block_length,
        "moe_top_k": moe_top_k,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if given and upcycle is None:
        raise ConfigError(f"{next(iter(given))} is given without upcycle, which says what the model becomes")
    without_effect = ("slots_per_expert", "block_length") if upcycle == "top_k_moe" else ("moe_top_k",)
    if unused := [name for name in without_effect if name in given]:
        raise ConfigError(f"{unused[0]} has no effect with upcycle {upcycle}; leave it out")
    read_config(Path(folder))
    check_output(Path(output).resolve(), overwrite, Path(folder).resolve(), (MANIFEST,))
    from steel_megatron.hf.convert import Upcycling
    from steel_megatron.hf.convert import import_hf as run

    upcycling = None if upcycle is None else Upcycling(to=upcycle, **given)
    run(Path(folder), Path(output), overwrite=overwrite, upcycling=upcycling)


def generate(
    model: str,
    prompts: list[str] = [],  # noqa: B006 (read by the parser, never changed)
    prompts_file: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: list[str] = [],  # noqa: B006
    seed: int = 0,
    stream: bool = False,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    tokenizer_path: str | None = None,
    tokenizer_kind: TokenizerKind = "huggingface",
    json_output: bool = False,
    routing_code: str | None = None,
) -> None:
    """Continue prompts with a checkpoint or an exported folder, or chat with it.

    Args:
        model: checkpoint folder (step_...), run folder (its newest checkpoint), or Hugging Face folder.
        prompts: texts to continue; with --chat, what the user says one after the other.
        prompts_file: file with further prompts: one a line, or in .jsonl objects with a "prompt".
        chat: hold a conversation in the model's chat template; without prompts, with the lines of stdin.
        max_new_tokens: maximum number of new tokens.
        temperature: divides the logits; 0 is greedy decoding.
        top_k: sample only from the k likeliest tokens; 0 for all.
        top_p: sample only from the likeliest tokens that have this probability together.
        min_p: sample only from tokens with at least this share of the likeliest one's probability.
        repetition_penalty: makes tokens that are in the text less likely; 1 for none.
        stop: strings that end a continuation before them.
        seed: random seed for sampling.
        stream: print tokens as they come.
        tensor_model_parallel_size: processes that share the matrices of a checkpoint's layers.
        pipeline_model_parallel_size: processes that share a checkpoint's layers.
        tokenizer_path: tokenizer folder or file; default: the model's own.
        tokenizer_kind: kind of the tokenizer.
        json_output: print one JSON object per prompt, with the ids of the new tokens.
        routing_code: module that registers the checkpoint's routing mode, if it is not one of the library's.
    """
    import dataclasses
    import json
    import os
    from pathlib import Path

    from steel_megatron.cli.prompts import read_prompts, turns_of_stdin
    from steel_megatron.config import ParallelConfig, Sampling
    from steel_megatron.log import launched_rank
    from steel_megatron.parallel.launch import read_launch
    from steel_megatron.train.model_path import find_model

    if json_output and (chat or stream):
        raise ConfigError("--json_output prints whole results; leave out --chat and --stream")
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
    )
    for name in sampling.without_effect:
        value = getattr(sampling, name)
        logger.warning(f"{name} = {value} has no effect: temperature is 0, so the likeliest token is taken")
    asked = [*prompts, *(read_prompts(Path(prompts_file)) if prompts_file else [])]
    if not asked and (not chat or prompts_file):
        raise ConfigError("there is no prompt; name one with --prompts or --prompts_file, or chat with --chat")
    if not asked and read_launch(os.environ).world_size > 1:
        raise ConfigError("one process alone can chat over stdin; give the turns with --prompts or --prompts_file")
    tokenizer = (tokenizer_kind, tokenizer_path) if tokenizer_path else None
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
    )
    check_tokenizer(tokenizer_path)
    if routing_code:
        import_routing_code(routing_code)
    named = find_model(model).path
    from steel_megatron.generate import chat as converse
    from steel_megatron.generate import generate as run

    def show(text: str) -> None:
        if launched_rank() == 0:
            sys.stdout.write(text)
            sys.stdout.flush()

    if chat:
        for _ in converse(named, asked or turns_of_stdin(), sampling, tokenizer, parallel, show):
            show("\n")
        return
    on_text = {"on_text": show} if stream else {}
    for result in run(named, asked, sampling, tokenizer, parallel, **on_text):
        line = json.dumps(dataclasses.asdict(result), ensure_ascii=False) if json_output else result.text + "\n"
        show("" if stream else line + "\n")


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
    """Test layer by layer whether tokens see later tokens, and whether decoding equals the forward pass.

    The exit code is 0 if the model is causal, 1 if it leaks or if its implementations disagree.

    Args:
        path: checkpoint folder (step_...), run folder (its newest checkpoint), Hugging Face folder, or YAML file with
            settings.
        length: tokens of the random texts; default: two blocks and some more.
        positions: tokens to change; default: the first, the last, and those inside and at the edges of blocks.
        seed: seed of texts and replacements, and of the weights if settings are audited.
        tolerance: movement in standard deviations that counts as rounding; default: 1e-5.
        layers: audit only the first layers, for a model that does not fit into memory.
        json: file for the figures.
        routing_code: module that registers the checkpoint's routing mode, if it is not one of the library's.
    """
    import os
    from json import dumps
    from pathlib import Path

    from steel_megatron.files import write_atomically
    from steel_megatron.train.model_path import find_model

    check_report(json)
    if routing_code:
        import_routing_code(routing_code)
    named = Path(path) if os.path.isfile(path) else find_model(path).path
    from steel_megatron.platform import prepare

    prepare()  # before megatron-core is imported
    from steel_megatron.audit import audit as run

    report = run(named, length=length, positions=positions, seed=seed, tolerance=tolerance, layers=layers)
    if json:
        write_atomically(json, (dumps(report.to_dict(), indent=1) + "\n").encode(), DataError)
    say(report.to_text().rstrip("\n"))
    return 0 if report.passed else 1
