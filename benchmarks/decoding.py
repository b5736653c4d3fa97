"""Decoding in tokens per second: the command's way against transformers' own, and a cache against none.

    python benchmarks/decoding.py [--hidden 256] [--layers 4] [--lengths 128 512 1024] [--tokens 16] [--rounds 3]

Per causal routing mode and prompt length: one text, greedy, random weights. First both ways must give the same tokens;
then they run in turn, so that whatever else the machine does hits both, and the ratio is the median over the rounds'
ratios. The prompt's own computation, which both need once, is not timed. ``state`` is what routing keeps for one
text in all layers: it does not grow with the text; attention's keys and values (``kv``) do. ``sequence`` is missing:
it is not causal, so there is nothing to cache, and every token costs what recomputing costs here.

The second table has what `steel-megatron generate` does with a checkpoint and with the folder exported from it beside
transformers' own ``generate`` on that folder, after the prompt of the first length. All must give the same tokens.
Loading is not timed, the prompt's computation is. The ratios are those of the command's speeds to transformers'.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from steel_megatron.config import ModelConfig, Sampling
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from steel_megatron.generate import generate
from steel_megatron.hf import mapping
from steel_megatron.hf.configuration_steel import SteelConfig
from steel_megatron.hf.convert import export_hf, import_hf
from steel_megatron.hf.folder import write_json
from steel_megatron.hf.modeling_steel import CACHE, SteelCache, SteelForCausalLM
from tests.fixtures.make_tokenizer import make_tokenizer
from tests.fixtures.texts import CORPUS, corpus

MODES = ("block_causal", "merged", "token")
WAYS = ("checkpoint", "exported folder", "transformers")


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


def on_disk(mode: str, root: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """A checkpoint with random weights and the folder exported from it, with a tokenizer."""
    make_tokenizer(root / "tokenizer")
    tokenizer = "huggingface", str(root / "tokenizer")
    model = ModelConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_attention_heads=4,
        ffn_hidden_size=arguments.hidden,
        vocab_size=load_tokenizer("huggingface", root / "tokenizer").vocab_size,
        sequence_length=arguments.lengths[0] + arguments.tokens,
        ffn="dense" if mode == "dense" else "soft_moe",
        routing_mode=None if mode == "dense" else mode,
        block_length=arguments.block_length,
    )
    torch.manual_seed(0)
    config = mapping.config_to_hf(model)
    drawn = SteelForCausalLM(SteelConfig(**config | {"initializer_range": arguments.hidden**-0.5}))
    drawn.save_pretrained(root / "drawn")
    write_json(root / "drawn" / "config.json", config | {"model_type": "steel"})
    found = {"checkpoint": import_hf(root / "drawn", root / "checkpoint")}
    found["exported folder"] = found["transformers"] = export_hf(root / "checkpoint", root / "hf", tokenizer)
    return found


def by_command(path: Path, prompt: str, tokenizer: Path, count: int) -> tuple[float, list[int]]:
    """Seconds from the moment that a model is loaded, and its tokens."""
    times: list[float] = []
    (found,) = generate(
        path,
        [prompt],
        Sampling(max_new_tokens=count),
        ("huggingface", str(tokenizer)),
        on_text=lambda text: times.append(time.perf_counter()),
    )
    return times[-1] - times[0], found.new_tokens


@torch.no_grad()
def compare_ways(mode: str, arguments: argparse.Namespace) -> None:
    """Print one row of the second table."""
    with tempfile.TemporaryDirectory() as name:
        root, count, length = Path(name), arguments.tokens, arguments.lengths[0]
        paths = on_disk(mode, root, arguments)
        tokenizer = load_tokenizer("huggingface", root / "tokenizer")
        words = "".join(text for path in sorted(CORPUS.glob("*.jsonl")) for text in corpus(path.stem))
        prompt = tokenizer.decode(tokenizer.encode(words[: 8 * length])[: length - 8])
        ids = torch.tensor([tokenizer.encode(prompt)])
        theirs = AutoModelForCausalLM.from_pretrained(paths["transformers"], trust_remote_code=True)

        def by_transformers() -> list[int]:
            found = theirs.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.size(1) :].tolist()
            return [token for token in found if token != tokenizer.eod_id]

        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for round_number in range(arguments.rounds + 1):
            results = {way: by_command(paths[way], prompt, root / "tokenizer", count) for way in WAYS[:2]}
            results["transformers"] = timed(by_transformers)
            if len({tuple(tokens) for _, tokens in results.values()}) != 1:
                sys.exit(f"error: {mode}: the tokens differ: { {way: tokens for way, (_, tokens) in results.items()} }")
            for way, (one, _) in results.items():
                if round_number:  # the first one only compares
                    seconds[way].append(one)
        made = len(results["transformers"][1])
        row = "".join(f"{made / statistics.median(seconds[way]):>17.1f}" for way in WAYS)
        for way in WAYS[:2]:
            pairs = zip(seconds["transformers"], seconds[way], strict=True)
            row += f"{statistics.median(theirs / ours for theirs, ours in pairs):>8.2f}x"
        print(f"{mode:<14}{row}", flush=True)


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
    logging.disable_progress_bar()
    print(
        f"{arguments.layers} layers, hidden size {arguments.hidden}, 6 experts, K = {arguments.block_length}, float32, "
        f"{arguments.threads} thread(s); {arguments.tokens} greedy tokens after each prompt\n"
    )
    print(f"{'mode':<14}{'prompt':>8}{'recomputing /s':>16}{'cached /s':>14}{'ratio':>12}{'state MB':>12}{'kv MB':>9}")
    for mode in MODES:
        model = build(mode, arguments)
        for length in arguments.lengths:
            measure(mode, length, model, arguments)
    print(f"\n{'tokens/s':<14}" + "".join(f"{way:>17}" for way in WAYS) + f"{'ratios':>14}")
    for mode in (*MODES, "dense"):
        compare_ways(mode, arguments)


if __name__ == "__main__":
    main()
