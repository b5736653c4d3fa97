"""The commands of post-training: sft and dpo."""

from __future__ import annotations

import dataclasses

from steel_megatron.config import BadRowPolicy, PrepareConfig, RunConfig, TokenizerKind
from steel_megatron.errors import ConfigError
from steel_megatron.streams import say


def sft_build(
    recipe: str,
    output: str,
    sources: list[str] = [],  # noqa: B006 (read by the parser, never changed)
    on_bad_row: BadRowPolicy = "stop",
    overwrite: bool = False,
) -> None:
    """Make one file of conversations, or of pairs, from published sets: questions, languages, a ratio of languages.

    Args:
        recipe: YAML file, such as examples/steel_1b/sft/zh_en20.yaml.
        output: file to write, .jsonl; OUTPUT.report.yaml says what became of each row.
        sources: files, folders or patterns of the recipe's parts, as PART=PATTERN; default: the recipe's own.
        on_bad_row: stop at a broken row, or skip it and list it in the report.
        overwrite: replace an existing file.
    """
    from pathlib import Path

    from steel_megatron.data.building.build import build
    from steel_megatron.data.building.recipe import load_recipe

    say(build(load_recipe(recipe, sources), Path(output), on_bad_row, overwrite).summary(Path(output)))


def sft_prepare(config: PrepareConfig) -> None:
    """Encode conversations into an indexed corpus with labels. Repeat the command to resume after a kill."""
    from steel_megatron.data.preprocessing.chat import prepare

    say(prepare(config, "sft"))


def sft_inspect(
    prefix: str,
    tokenizer_path: str,
    tokenizer_kind: TokenizerKind = "huggingface",
    document: list[int] = [0],  # noqa: B006 (read by the parser, never changed)
    html: str | None = None,
) -> None:
    """Print conversations or pairs of a corpus with the tokens that are predicted in green, or in [[ ]] (NO_COLOR).

    Args:
        prefix: corpus path without .bin or .idx.
        tokenizer_path: tokenizer folder or file that the corpus was made with.
        tokenizer_kind: kind of the tokenizer.
        document: numbers of the conversations, from 0.
        html: file for the same as a web page.
    """
    import os
    import sys
    from pathlib import Path

    from steel_megatron.data.preprocessing.chat import inspect
    from steel_megatron.data.tokenizing.tokenizer import load_tokenizer

    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    tokenizer = load_tokenizer(tokenizer_kind, tokenizer_path)
    for shown in inspect(prefix, tokenizer, document, color, Path(html) if html else None):
        say(shown)


def sft(run: RunConfig) -> int:
    """Finetune a model on corpora of sft prepare, or resume; alone, under torchrun or under srun.

    It is pretrain with training.objective = sft (or sft_per_sample) and whole, packed conversations; the exit code is
    pretrain's.
    """
    return _train(run, ("sft", "sft_per_sample"))


def dpo_prepare(config: PrepareConfig) -> None:
    """Encode preference pairs into an indexed corpus with labels. Repeat the command to resume after a kill."""
    from steel_megatron.data.preprocessing.chat import prepare

    say(prepare(config, "pairs"))


def dpo(run: RunConfig) -> int:
    """Optimize preferences on corpora of dpo prepare (DPO, IPO), or resume; alone, under torchrun or under srun.

    The model to start from and to refer to is checkpoint.init_from. It is pretrain with training.objective = dpo and
    whole, packed pairs; the exit code is pretrain's.
    """
    return _train(run, ("dpo",))


def _train(run: RunConfig, objectives: tuple[str, ...]) -> int:
    """Train on whole documents, by the first objective if the run names none."""
    from steel_megatron.cli.models import pretrain

    named = run.training.objective
    if named not in ("next_token", *objectives):
        raise ConfigError(f"training.objective is {named!r}; it must be one of {', '.join(objectives)}")
    training = dataclasses.replace(run.training, objective=named if named in objectives else objectives[0])
    data = dataclasses.replace(run.data, reset_at_eod=True)
    return pretrain(dataclasses.replace(run, training=training, data=data))
