"""Text generation from a checkpoint or an exported Hugging Face folder.

Both compute each new token from the whole preceding text, or from an equivalent cache, so greedy decoding gives the
same tokens. Both run the exported model code, which has a cache if the routing mode is causal. A checkpoint that this
code cannot compute (as top-k experts) is run by the library's own model, which reads the whole text for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from steel_megatron.config import ModelConfig, TokenizerKind, load_yaml
from steel_megatron.data.ledger.ledger import Ledger
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from steel_megatron.errors import CheckpointError, ConfigError, DataError
from steel_megatron.hf.convert import is_exported, read_config
from steel_megatron.hf.loading import load_model
from steel_megatron.hf.mapping import FFN_TYPES, config_from_hf, to_hf, why_not_exportable
from steel_megatron.parallel.topology import initialize_alone
from steel_megatron.platform import prepare, probe

if TYPE_CHECKING:
    from steel_megatron.train.checkpoint import CheckpointInfo

NextLogits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: maximum number of new tokens; an end-of-document token ends the text earlier.
        temperature: divides the logits; 0 is greedy decoding.
        top_k: sample only from the k likeliest tokens; 0 for all.
        seed: random seed for sampling.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.top_k < 0 or not 0 <= self.seed < 2**63:
            raise ConfigError(
                f"max_new_tokens = {self.max_new_tokens} must be at least 1, top_k = {self.top_k} at least 0, and "
                f"seed = {self.seed} from 0 to 2**63 - 1"
            )
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ConfigError(f"temperature = {self.temperature} must be 0, or from 0.001 to 1000")


@dataclass(frozen=True)
class Generation:
    """A prompt and its continuation.

    Attributes:
        prompt: the prompt.
        text: prompt and continuation.
        new_tokens: ids of the continuation, without the end-of-document token.
    """

    prompt: str
    text: str
    new_tokens: list[int]


def generate(
    model: Path, prompts: Sequence[str], sampling: Sampling, tokenizer: tuple[TokenizerKind, str] | None = None
) -> list[Generation]:
    """Continue prompts.

    Args:
        model: checkpoint folder (``step_...``) or exported Hugging Face folder.
        prompts: non-empty texts.
        sampling: how tokens are sampled.
        tokenizer: kind and path; None for the tokenizer that the model was trained or exported with.

    Raises:
        CheckpointError: the folder is neither a checkpoint nor an exported model.
        ConfigError: a prompt has no tokens, or prompt and new tokens exceed the model's sequence length.
    """
    # Check everything before loading the model.
    if is_exported(model):
        settings = config_from_hf(read_config(model), str(model / "config.json"))
        loaded = load_tokenizer(*(tokenizer or _tokenizer_of_folder(model)))
        load = partial(_load_exported, model)
    else:
        info = _read_checkpoint(model)
        settings = info.model
        loaded = load_tokenizer(*tokenizer) if tokenizer else _tokenizer_of_run(model)
        load = partial(_load_checkpoint, info)
    encoded = [_encode(prompt, settings, loaded, sampling) for prompt in prompts]
    next_logits = load()
    results = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        new = _continue(ids, next_logits, settings.vocab_size, loaded.eod_id, sampling)
        results.append(Generation(prompt, loaded.decode(ids + new), new))
    return results


def _encode(prompt: str, model: ModelConfig, tokenizer: Tokenizer, sampling: Sampling) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids or len(ids) + sampling.max_new_tokens > model.sequence_length:
        raise ConfigError(
            f"the prompt {prompt[:40]!r} has {len(ids)} tokens; with {sampling.max_new_tokens} new ones there must be "
            f"at least 2 and at most sequence_length = {model.sequence_length}"
        )
    if max(ids) >= model.vocab_size:
        raise ConfigError(
            f"the tokenizer gives token id {max(ids)} for {prompt[:40]!r}; the model has ids 0 to "
            f"{model.vocab_size - 1}: it was trained with another tokenizer"
        )
    return ids


def _continue(ids: list[int], next_logits: NextLogits, vocab_size: int, eod_id: int, sampling: Sampling) -> list[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    new: list[int] = []
    while len(new) < sampling.max_new_tokens:
        logits = next_logits(torch.tensor([ids + new]))[:vocab_size].float().cpu()
        token = _choose(logits, sampling, generator)
        if token == eod_id:
            break
        new.append(token)
    return new


def _choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return int(torch.multinomial((logits / sampling.temperature).softmax(-1), 1, generator=generator))


def _read_checkpoint(path: Path) -> CheckpointInfo:
    prepare()  # before megatron-core is imported
    from steel_megatron.train import checkpoint

    return checkpoint.read_info(path)


def _load_checkpoint(info: CheckpointInfo) -> NextLogits:
    """The model in a single process: by the exported code where that computes it, else the library's own."""
    if why_not_exportable(info.model) is None:
        return _load_exported(info.path)
    from steel_megatron.model.megatron_fields import without_ineffective_fields
    from steel_megatron.model.spec import build_model
    from steel_megatron.train import checkpoint

    checkpoint.verify(info.path)
    _check_shapes(info)
    topology = initialize_alone("generate")
    model = without_ineffective_fields(info.model)
    stage = build_model(model, topology)
    checkpoint.load_weights(stage, info, model)
    stage.eval()

    @torch.no_grad()
    def next_logits(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.to(topology.device)
        positions = torch.arange(tokens.size(1), device=topology.device).unsqueeze(0)
        return stage(tokens, positions, None)[0, -1]

    return next_logits


def _check_shapes(info: CheckpointInfo) -> None:
    """Compare a checkpoint's tensors with its settings, before a model of these takes memory.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    from steel_megatron.train import checkpoint

    shapes = checkpoint.tensor_shapes(info)
    if info.model.ffn in FFN_TYPES.values():
        to_hf({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, info.model)
        return
    name, wanted = "embedding.word_embeddings.weight", (info.model.padded_vocab_size, info.model.hidden_size)
    if shapes.get(name) != wanted:
        raise CheckpointError(f"{info.path}: {name} has shape {shapes.get(name)}; its settings say {wanted}")


def _load_exported(path: Path) -> NextLogits:
    model: torch.nn.Module = load_model(path)
    return with_cache(model.to(probe().device))


def with_cache(exported: torch.nn.Module) -> NextLogits:
    """Return a function from a text to its next-token logits that reuses the cache while the text only grows.

    Args:
        exported: an exported model; one that is not causal has no cache and recomputes each text.
    """
    from steel_megatron.hf.modeling_steel import CACHE

    seen, cache = torch.empty(1, 0, dtype=torch.int64), None

    @torch.no_grad()
    def next_logits(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal seen, cache
        length = seen.size(1)
        if cache is None or tokens.size(1) <= length or not torch.equal(tokens[:, :length], seen):
            length, cache = 0, None
        added = tokens[:, length:].to(next(exported.parameters()).device)
        out = exported(input_ids=added, logits_to_keep=1, use_cache=True, **{CACHE: cache})
        seen, cache = tokens, out.get(CACHE)
        return out.logits[0, -1]

    return next_logits


def _tokenizer_of_folder(path: Path) -> tuple[TokenizerKind, str]:
    """The tokenizer that was exported with a model."""
    if not any((path / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        raise CheckpointError(f"{path} was exported without a tokenizer; name it with --tokenizer_path")
    return "huggingface", str(path)


def _tokenizer_of_run(path: Path) -> Tokenizer:
    """The tokenizer named in the run.yaml of a checkpoint."""
    try:
        data = load_yaml((path / "run.yaml").read_text(encoding="utf-8"))["data"]
        kind, tokenizer_path = data["tokenizer_kind"], data["tokenizer_path"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError):
        kind = tokenizer_path = None
    if not isinstance(kind, str) or not isinstance(tokenizer_path, str):
        raise CheckpointError(
            f"{path / 'run.yaml'} does not say which tokenizer the model was trained with; name it with "
            "--tokenizer_path"
        )
    try:
        ledger = path / "ledger.json"
        fingerprint = Ledger.load(ledger).history.tokenizer if ledger.exists() else None
        return find_tokenizer(kind, tokenizer_path, path, fingerprint)  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(
            f"{error} (named in {path / 'run.yaml'}, relative to where the run was started; name it with "
            "--tokenizer_path)"
        ) from None
