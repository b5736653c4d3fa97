"""Decoding with a cache against computing the whole text again for every token, in tokens per second.

    python benchmarks/decoding.py [--hidden 256] [--layers 4] [--lengths 128 512 1024] [--tokens 16] [--rounds 3]

Per causal routing mode and prompt length: one text, greedy, random weights. First both ways must give the same tokens;
then they run in turn, so that whatever else the machine does hits both, and the ratio is the median over the rounds'
ratios. The prompt's own computation, which both need once, is not timed. ``state`` is what routing keeps for one
text in all layers: it does not grow with the text; attention's keys and values (``kv``) do. ``sequence`` is missing:
it is not causal, so there is nothing to cache, and every token costs what recomputing costs here.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from typing import Any

import torch

from steel_megatron.hf.configuration_steel import SteelConfig
from steel_megatron.hf.modeling_steel import CACHE, SteelCache, SteelForCausalLM

MODES = ("block_causal", "merged", "token")


def build(mode: str, arguments: argparse.Namespace) -> SteelForCausalLM:
    """A model with random weights, large enough that its choices are no ties."""
    torch.manual_seed(0)
    config = SteelConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        expert_intermediate_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        routing_mode=mode,
        slot_input="raw",
        routing_block_length=arguments.block_length,
        initializer_range=arguments.hidden**-0.5,
    )
    return SteelForCausalLM(config).eval()


def with_cache(model: SteelForCausalLM, first: torch.Tensor, cache: SteelCache, count: int) -> list[int]:
    """``count`` tokens after ``first``, which the prompt that ``cache`` holds gave."""
    tokens = [first]
    while len(tokens) <= count:
        out = model(tokens[-1], logits_to_keep=1, use_cache=True, **{CACHE: cache})
        tokens.append(out.logits[:, -1:].argmax(-1))
    return [int(token) for token in tokens[1:]]


def recomputing(model: SteelForCausalLM, text: torch.Tensor, count: int) -> list[int]:
    """``count`` tokens after ``text``."""
    length = text.size(1)
    for _ in range(count):
        logits = model(text, logits_to_keep=1, use_cache=False).logits
        text = torch.cat((text, logits[:, -1:].argmax(-1)), 1)
    return text[0, length:].tolist()


def timed(step: Any, *inputs: Any) -> tuple[float, list[int]]:
    """Seconds, and the result."""
    started = time.perf_counter()
    result = step(*inputs)
    return time.perf_counter() - started, result


def sizes(cache: SteelCache) -> tuple[int, int]:
    """Bytes of the routing states, and of keys and values."""
    states = [value for state in cache.routing if state is not None for value in vars(state).values()]
    parts = [part for value in states for part in (value if isinstance(value, tuple) else (value,))]
    keys_and_values = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(part.nbytes for part in parts if part is not None), sum(tensor.nbytes for tensor in keys_and_values)


@torch.no_grad()
def measure(mode: str, length: int, model: SteelForCausalLM, arguments: argparse.Namespace) -> None:
    """Print one row."""
    count = arguments.tokens
    prompt = torch.randint(arguments.vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
    out = model(prompt, logits_to_keep=1, use_cache=True)
    first, cache = out.logits[:, -1:].argmax(-1), out[CACHE]
    text = torch.cat((prompt, first), 1)
    cached_seconds, plain_seconds = [], []
    for round_number in range(arguments.rounds + 1):
        own = copy.deepcopy(cache)
        seconds, cached = timed(with_cache, model, first, own, count)
        plain, again = timed(recomputing, model, text, count)
        if cached != again:
            sys.exit(f"error: {mode}, prompt of {length}: {cached} with a cache, {again} without")
        if round_number:  # the first one only compares
            cached_seconds.append(seconds)
            plain_seconds.append(plain)
    ratio = statistics.median(plain / fast for plain, fast in zip(plain_seconds, cached_seconds, strict=True))
    state, keys = sizes(own)
    speeds = [count / statistics.median(seconds) for seconds in (plain_seconds, cached_seconds)]
    figures = f"{speeds[0]:>16.1f}{speeds[1]:>14.1f}{ratio:>11.1f}x{state / 1e6:>12.2f}{keys / 1e6:>9.2f}"
    print(f"{mode:<14}{length:>8}{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("vocabulary", 8000), ("block-length", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024], help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="one token's matrices are too small for more")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.layers} layers, hidden size {arguments.hidden}, 6 experts, K = {arguments.block_length}, float32, "
        f"{arguments.threads} thread(s); {arguments.tokens} greedy tokens after each prompt\n"
    )
    print(f"{'mode':<14}{'prompt':>8}{'recomputing /s':>16}{'cached /s':>14}{'ratio':>12}{'state MB':>12}{'kv MB':>9}")
    for mode in MODES:
        model = build(mode, arguments)
        for length in arguments.lengths:
            measure(mode, length, model, arguments)


if __name__ == "__main__":
    main()
