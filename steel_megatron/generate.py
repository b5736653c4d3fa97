"""Text from a model: a checkpoint of this library, or an exported Hugging Face folder.

Both ways compute every new token from the whole text before it or an equal cached state, so greedy decoding gives
the same tokens from both. Here a checkpoint is run without a cache: right in every routing mode, and meant for
looking at samples; serve from the exported folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from steel_megatron.config import ModelConfig, ParallelConfig, TokenizerKind
from steel_megatron.data.tokenizer import Tokenizer, load_tokenizer
from steel_megatron.errors import CheckpointError, ConfigError
from steel_megatron.parallel.topology import initialize
from steel_megatron.platform import prepare

NextLogits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: tokens to add, at most; the end-of-document token ends a text earlier.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are drawn from; 0 for all.
        seed: of the draws.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not self.temperature >= 0 or self.top_k < 0:
            raise ConfigError(
                f"max_new_tokens = {self.max_new_tokens} must be at least 1, temperature = {self.temperature} and "
                f"top_k = {self.top_k} at least 0"
            )


@dataclass(frozen=True)
class Generation:
    """A text and what a model made of it.

    Attributes:
        prompt: the text it began with.
        text: prompt and continuation.
        new_tokens: ids of the continuation, without the end-of-document token.
    """

    prompt: str
    text: str
    new_tokens: list[int]


def generate(
    model: Path, prompts: Sequence[str], sampling: Sampling, tokenizer: tuple[TokenizerKind, str] | None = None
) -> list[Generation]:
    """Continue texts.

    Args:
        model: a checkpoint's folder (``step_...``), or an exported Hugging Face folder.
        prompts: the texts, none of them empty.
        sampling: how tokens are chosen.
        tokenizer: its kind and path; None takes the one that the model was trained or exported with.

    Raises:
        CheckpointError: the folder is neither.
        ConfigError: a prompt has no token, or prompt and new tokens are longer than the model's sequences.
    """
    if (model / "config.json").is_file():
        next_logits, settings = _exported(model)
        loaded = load_tokenizer(*(tokenizer or ("huggingface", str(model))))
    else:
        next_logits, settings = _checkpoint(model)
        loaded = load_tokenizer(*(tokenizer or _tokenizer_of_run(model)))
    return [_continue(prompt, next_logits, settings, loaded, sampling) for prompt in prompts]


def _continue(
    prompt: str, next_logits: NextLogits, model: ModelConfig, tokenizer: Tokenizer, sampling: Sampling
) -> Generation:
    ids = tokenizer.encode(prompt)
    start = len(ids)
    if not ids or start + sampling.max_new_tokens > model.sequence_length:
        raise ConfigError(
            f"the prompt {prompt[:40]!r} has {start} tokens; with {sampling.max_new_tokens} new ones there must be at "
            f"least 2 and at most sequence_length = {model.sequence_length}"
        )
    generator = torch.Generator().manual_seed(sampling.seed)
    while len(ids) < start + sampling.max_new_tokens:
        logits = next_logits(torch.tensor([ids]))[: model.vocab_size].float().cpu()
        token = _choose(logits, sampling, generator)
        if token == tokenizer.eod_id:
            break
        ids.append(token)
    return Generation(prompt, tokenizer.decode(ids), ids[start:])


def _choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return int(torch.multinomial((logits / sampling.temperature).softmax(-1), 1, generator=generator))


def _checkpoint(path: Path) -> tuple[NextLogits, ModelConfig]:
    """The library's own model, in this one process."""
    prepare()  # before megatron-core is imported
    from steel_megatron.model.spec import build_model
    from steel_megatron.train import checkpoint

    info = checkpoint.read_info(path)
    checkpoint.verify(path)
    topology = initialize(ParallelConfig())
    if topology.launch.world_size != 1:
        raise ConfigError(f"generate runs in one process; this launch has {topology.launch.world_size}")
    stage = build_model(info.model, topology)
    checkpoint.load_weights(stage, info, info.model)
    stage.eval()

    @torch.no_grad()
    def next_logits(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.to(topology.device)
        positions = torch.arange(tokens.size(1), device=topology.device).unsqueeze(0)
        return stage(tokens, positions, None)[0, -1]

    return next_logits, info.model


def _exported(path: Path) -> tuple[NextLogits, ModelConfig]:
    """The exported model's own code, without transformers' generation."""
    from steel_megatron.hf.mapping import config_from_hf
    from steel_megatron.hf.modeling_steel import SteelForCausalLM

    model = SteelForCausalLM.from_pretrained(path)
    model.eval()

    @torch.no_grad()
    def next_logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, use_cache=False).logits[0, -1]

    return next_logits, config_from_hf(json.loads((path / "config.json").read_text(encoding="utf-8")), str(path))


def _tokenizer_of_run(path: Path) -> tuple[TokenizerKind, str]:
    """The tokenizer named in the settings beside a checkpoint."""
    import yaml

    try:
        data = yaml.safe_load((path / "run.yaml").read_text(encoding="utf-8"))["data"]
        kind, tokenizer_path = data["tokenizer_kind"], data["tokenizer_path"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        kind = tokenizer_path = None
    if kind is None or tokenizer_path is None:
        raise CheckpointError(f"{path} does not say which tokenizer it was trained with; name it with --tokenizer_path")
    return kind, tokenizer_path
