"""Text generation from a checkpoint or an exported Hugging Face folder.

Both compute each new token from the whole preceding text, or from an equivalent cache, so greedy decoding gives the
same tokens. Both run the exported model code, which has a cache if the routing mode is causal. A checkpoint that this
code cannot compute (as top-k experts) is run by the library's own model, which reads the whole text for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from steel_megatron.config import ModelConfig, ParallelConfig, Sampling, TokenizerKind
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from steel_megatron.errors import ConfigError
from steel_megatron.hf.convert import read_config
from steel_megatron.hf.loading import load_model, load_parts
from steel_megatron.hf.mapping import config_from_hf, why_not_exportable
from steel_megatron.hf.texts import (
    Texts,
    finetuned,
    texts_of_folder,
    texts_of_tokenizer,
    tokenizer_of_folder,
    tokenizer_of_run,
)
from steel_megatron.ops.sampling import choose
from steel_megatron.parallel.topology import initialize, initialize_alone
from steel_megatron.platform import probe
from steel_megatron.train.checkpoint_info import CheckpointInfo
from steel_megatron.train.model_path import find_model

NextLogits = Callable[[torch.Tensor], torch.Tensor]
OnText = Callable[[str], None]
"""Gets a continuation piece by piece, as far as it is certain."""


@dataclass(frozen=True)
class Generation:
    """A prompt and its continuation.

    Attributes:
        prompt: the prompt.
        text: prompt and continuation, up to a stop string.
        new_tokens: ids of the continuation, without the end-of-document token; those of a stop string are among them.
    """

    prompt: str
    text: str
    new_tokens: list[int]


def generate(
    model: Path,
    prompts: Sequence[str],
    sampling: Sampling,
    tokenizer: tuple[TokenizerKind, str] | None = None,
    parallel: ParallelConfig | None = None,
    on_text: OnText = lambda text: None,
) -> list[Generation]:
    """Continue prompts; under a launch, every process calls it and gets the same.

    Args:
        model: a run's folder, whose newest checkpoint is taken; a checkpoint's (``step_...``); or an exported one.
        prompts: non-empty texts.
        sampling: how tokens are sampled.
        tokenizer: kind and path; None for the tokenizer that the model was trained or exported with.
        parallel: the layout of a checkpoint's model; None for one process.
        on_text: gets each prompt, and its continuation as it is made; a line break at the end.

    Raises:
        CheckpointError: the folder is none of these.
        ConfigError: a prompt has no tokens, or prompt and new tokens exceed the model's sequence length.
    """
    # Check everything before loading the model.
    settings, texts, load = _opened(model, tokenizer, parallel, chat=False)
    encoded = [_encode(prompt, settings, texts, sampling) for prompt in prompts]
    next_logits = load()
    results = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        on_text(prompt)
        reply = _Reply(texts.decode, sampling.stop, on_text)
        new = _continue(ids, next_logits, settings.vocab_size, texts.ends, sampling, reply)
        results.append(Generation(prompt, reply.end(new, texts.decode(ids + new)), new))
        on_text("\n")
    return results


def chat(
    model: Path,
    turns: Iterable[str],
    sampling: Sampling,
    tokenizer: tuple[TokenizerKind, str] | None = None,
    parallel: ParallelConfig | None = None,
    on_text: OnText = lambda text: None,
) -> Iterator[str]:
    """Reply to each turn of the user in one conversation, in the model's chat template.

    Args:
        model, sampling, tokenizer, parallel: as for :func:`generate`.
        turns: what the user says; the next one is asked for after the reply. Empty ones are passed over.
        on_text: gets each reply as it is made.

    Yields:
        The replies.

    Raises:
        ConfigError: the model has no chat template, or the conversation exceeds the model's sequence length.
    """
    settings, texts, load = _opened(model, tokenizer, parallel, chat=True)
    next_logits, messages = load(), list[dict[str, str]]()
    for turn in turns:
        if not turn.strip():
            continue
        messages.append({"role": "user", "content": turn})
        ids = _encode(texts.render(messages, True), settings, texts, sampling)
        reply = _Reply(texts.decode, sampling.stop, on_text)
        new = _continue(ids, next_logits, settings.vocab_size, texts.ends, sampling, reply)
        messages.append({"role": "assistant", "content": reply.end(new, texts.decode(new))})
        yield messages[-1]["content"]


def _opened(
    model: Path, tokenizer: tuple[TokenizerKind, str] | None, parallel: ParallelConfig | None, *, chat: bool
) -> tuple[ModelConfig, Texts, Callable[[], NextLogits]]:
    """A model's settings and tokenizer, and what loads it."""
    found = find_model(model)
    model, info = found.path, found.info
    if info is None:
        if parallel not in (None, ParallelConfig()):
            raise ConfigError(f"{model} is an exported folder, which one process decodes; cut its checkpoint instead")
        settings = config_from_hf(read_config(model), str(model / "config.json"))
        if chat and tokenizer is None:
            return settings, texts_of_folder(model, chat=True), partial(_load_exported, model)
        loaded = load_tokenizer(*(tokenizer or tokenizer_of_folder(model)))
        return settings, texts_of_tokenizer(loaded, chat), partial(_load_exported, model)
    loaded = load_tokenizer(*tokenizer) if tokenizer else tokenizer_of_run(model)
    texts = texts_of_tokenizer(loaded, chat, finetuned(model))
    return info.model, texts, partial(_load_checkpoint, info, parallel or ParallelConfig())


class _Reply:
    """A continuation while it is made: shown piece by piece, and ended by a stop string.

    Args:
        decode: the text of ids.
        stops: strings that end it.
        on_text: gets what is certain of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str], on_text: OnText) -> None:
        self._decode, self._stops, self._on_text = decode, stops, on_text
        self._shown = ""

    def __call__(self, new: list[int]) -> bool:
        """Take note of the tokens so far; whether a stop string ends them."""
        text = self._decode(new)
        cut = self._cut(text)
        if cut == len(text):
            # What may become another character, or the beginning of a stop string, is shown later.
            cut = len(text.rstrip("\ufffd"))
            cut -= max(
                (size for stop in self._stops for size in range(len(stop)) if text[:cut].endswith(stop[:size])),
                default=0,
            )
            self._show(text[:cut])
            return False
        return True

    def end(self, new: list[int], text: str) -> str:
        """Show what is left.

        Args:
            new: the tokens.
            text: a text that ends with theirs.

        Returns:
            ``text`` up to the stop string.
        """
        own = self._decode(new)
        cut = self._cut(own)
        self._show(own[:cut])
        return text[: len(text) - (len(own) - cut)]

    def _cut(self, text: str) -> int:
        return min([at for stop in self._stops if (at := text.find(stop)) >= 0], default=len(text))

    def _show(self, text: str) -> None:
        if text.startswith(self._shown) and len(text) > len(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text


def _encode(prompt: str, model: ModelConfig, tokenizer: Texts, sampling: Sampling) -> list[int]:
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


def _continue(
    ids: list[int],
    next_logits: NextLogits,
    vocab_size: int,
    ends: Collection[int],
    sampling: Sampling,
    is_done: Callable[[list[int]], bool] = lambda new: False,
) -> list[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    new: list[int] = []
    while len(new) < sampling.max_new_tokens:
        logits = next_logits(torch.tensor([ids + new]))[:vocab_size].float().cpu()
        token = choose(logits, ids + new, sampling, generator)
        if token in ends:
            break
        new.append(token)
        if is_done(new):
            break
    return new


def _load_checkpoint(info: CheckpointInfo, parallel: ParallelConfig) -> NextLogits:
    """In this process by the exported code where that computes it; else by the library's own model, of which every
    process of the launch holds a part."""
    alone = parallel == ParallelConfig()
    if alone and why_not_exportable(info.model) is None:
        return _load_exported(info.path)
    from steel_megatron.model.forward import launched_forward, next_logits_of

    topology = initialize_alone("generate") if alone else initialize(parallel)
    if topology.data_parallel_size > 1:
        raise ConfigError(
            f"generate needs {topology.launch.world_size // topology.data_parallel_size} processes for this layout; "
            f"this launch has {topology.launch.world_size}"
        )
    return next_logits_of(launched_forward(*load_parts(info, topology), topology))


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
