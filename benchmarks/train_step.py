"""A training step of the library against the same step written with transformers and torch: seconds and memory.

    python benchmarks/train_step.py [--sizes small large] [--models sequence merged dense] [--rounds 5] [--json FILE]
    python benchmarks/train_step.py --growth        # over lengths, layers, vocabulary, micro batch; what fits in 8 GiB
    python benchmarks/train_step.py --command-line  # tokens/s in the log of `steel-megatron pretrain` as well

A step is forward, backward, clipping and torch's fused AdamW (foreach off), on random tokens, in one process. The peer
of ``sequence`` is the exported model in transformers, and that of ``merged`` and ``dense`` the stock Qwen2 of the same
shape: what ``merged`` computes for each token costs as much. ``dense`` is also timed against the GPTModel of
megatron-core with its local layers, which this library is built from. Weights, data and threads are the same. First the
losses of three steps are held to be the same (of ``merged`` those of its exported model, because Qwen2 computes
something else); then both sides train in turn, so that whatever else the machine does hits both, and the ratio is the
median over the rounds' ratios, theirs / ours: above 1 the library is faster. With one thread it is that of processor
time. Memory is what a process of its own has resident at most, beyond its libraries: weights, gradients and optimizer
state included. In bfloat16 the library keeps float32 weights as well, and its peer does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from steel_megatron.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    dump_yaml,
)

Step = Callable[[], float]
"""Trains on the batch and gives its loss."""
OURS, EXPORTED, STOCK, MEGATRON = "ours", "exported", "Qwen2", "GPTModel"
START = "import sys; from steel_megatron.cli import main; sys.exit(main())"
LR, WEIGHT_DECAY, CLIP = 1e-4, 0.1, 1.0


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        model: ``sequence``, ``merged`` or ``dense``.
        batch: sequences.
        threads: of torch.
    """

    model: str
    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int
    length: int
    batch: int
    precision: str = "float32"
    threads: int = 1
    recompute: bool = False

    @property
    def config(self) -> ModelConfig:
        """The library's settings."""
        soft = self.model != "dense"
        return ModelConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            ffn="soft_moe" if soft else "dense",
            routing_mode=self.model if soft else None,
            ffn_activation="double_swiglu" if self.model == "sequence" else "swiglu",
            ffn_hidden_size=self.inner if soft else 6 * self.inner,
            vocab_size=self.vocabulary,
            sequence_length=self.length,
        )

    @property
    def run(self) -> RunConfig:
        """The settings of a run that takes as long as it is left."""
        size = {"micro_batch_size": self.batch, "global_batch_size": self.batch}
        return RunConfig(
            model=self.config,
            optimizer=OptimizerConfig(
                lr=LR, warmup_steps=0, lr_schedule="constant", weight_decay=WEIGHT_DECAY, clip_grad=CLIP, epsilon=1e-8
            ),
            parallel=ParallelConfig(recompute="full" if self.recompute else "none"),
            training=TrainingConfig(precision=self.precision, train_steps=10**6, **size),  # type: ignore[arg-type]
        )

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [B, T + 1]."""
        shape = self.batch, self.length + 1
        return torch.randint(0, self.vocabulary, shape, generator=torch.Generator().manual_seed(1))

    @property
    def peer(self) -> str:
        """What the library is timed against."""
        return EXPORTED if self.model == "sequence" else STOCK


SIZES: dict[str, dict[str, Any]] = {
    "small": {"layers": 4, "hidden": 256, "heads": 4, "inner": 64, "vocabulary": 32_000, "length": 512, "batch": 1},
    "large": {"layers": 8, "hidden": 448, "heads": 8, "inner": 224, "vocabulary": 32_000, "length": 1024, "batch": 2},
}
"""19M and 54M parameters in mode ``sequence``."""
WIDE = {"layers": 2, "hidden": 256, "heads": 4, "inner": 64, "vocabulary": 151_936, "length": 512, "batch": 2}


def ours(case: Case, copied: bool = True) -> tuple[Step, dict[str, torch.Tensor]]:
    """The library's step, and its first weights by published name, if they are to be copied."""
    warnings.filterwarnings("ignore", module="megatron")  # optional packages that are not here
    from steel_megatron.parallel.topology import initialize

    topology = initialize(case.run.parallel)
    from steel_megatron.hf.mapping import to_hf
    from steel_megatron.model.weights import sharded_weights
    from steel_megatron.train.engine import Engine
    from steel_megatron.train.objective import NextToken

    engine, whole = Engine(case.run, topology), {}
    for one in sharded_weights(*engine.chunks).values() if copied else ():
        whole.setdefault(one.key, {})[one.global_offset[: one.prepend_axis_num]] = one.data.detach().clone()
    tensors = {
        key: next(iter(layers.values())) if () in layers else torch.stack([layers[place] for place in sorted(layers)])
        for key, layers in whole.items()
    }
    batch = NextToken.batch(case.tokens.numpy(), None, None, topology)
    return lambda: engine.step([batch]).loss, to_hf(tensors, case.config) if copied else {}


def plain(case: Case, weights: dict[str, torch.Tensor] | None, kind: str) -> Step:
    """The same step with a model of transformers, with the weights given, or its own first ones."""
    import transformers

    from steel_megatron.hf.configuration_steel import SteelConfig
    from steel_megatron.hf.mapping import config_to_hf
    from steel_megatron.hf.modeling_steel import SteelForCausalLM

    settings = {**config_to_hf(case.config), "attn_implementation": "sdpa", "use_cache": False}
    torch.manual_seed(0)
    if kind == EXPORTED:
        model: Any = SteelForCausalLM(SteelConfig(**settings))
    elif kind == STOCK:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
    else:
        model = megatrons(case)
    if weights is not None:
        model.load_state_dict(weights)
    model.to(getattr(torch, case.precision)).train()
    if case.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = list(model.parameters())
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=_betas(case), eps=1e-8, foreach=False, fused=True)
    ids, labels = case.tokens[:, :-1].contiguous(), case.tokens[:, 1:].contiguous()

    def loss_of_batch() -> torch.Tensor:
        if kind != MEGATRON:
            return F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1).float(), labels.flatten())
        positions = torch.arange(case.length).expand_as(ids)
        later = torch.ones(1, 1, case.length, case.length, dtype=torch.bool).triu(1)
        losses: torch.Tensor = model(ids, positions, later, labels=labels)
        return losses.mean()

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=False)
        optimizer.step()
        return loss.item()

    return step


def megatrons(case: Case) -> torch.nn.Module:
    """megatron-core's own model of a dense shape."""
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from steel_megatron.parallel.topology import initialize_alone

    initialize_alone("this benchmark")
    # Its attention keeps random numbers of a GPU for dropout, of which there is none here.
    tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=contextlib.nullcontext)
    config = TransformerConfig(
        num_layers=case.layers,
        hidden_size=case.hidden,
        num_attention_heads=case.heads,
        ffn_hidden_size=case.config.ffn_hidden_size,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bf16=case.precision == "bfloat16",
        params_dtype=getattr(torch, case.precision),
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=case.vocabulary,
        max_sequence_length=case.length,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


def _betas(case: Case) -> tuple[float, float]:
    return case.run.optimizer.beta1, case.run.optimizer.beta2


def resident(field: str) -> float:
    """MiB of this process's memory: ``VmRSS`` now, ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_memory(case: Case, kind: str) -> float:
    """MiB that two steps need at most, beyond libraries; for a process of its own."""
    torch.set_num_threads(case.threads)
    tiny = replace(case, layers=1, hidden=16, heads=2, inner=8, vocabulary=128, length=16)  # imports what there is
    before = 0.0
    for one in (tiny, case):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest is now what it is at present
        step = ours(one, copied=False)[0] if kind == OURS else plain(one, None, kind)
        for _ in range(2):
            step()
    return resident("VmHWM") - before


def apart(function: Callable[..., float], *arguments: Any) -> float:
    """What a function gives in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def hold_equal(case: Case, first: Step, second: Step) -> None:
    """Three steps of both must have the same losses."""
    tolerance = 2e-5 if case.precision == "float32" else 1e-2
    for number in range(3):
        own, other = first(), second()
        if not abs(own / other - 1) < tolerance:
            sys.exit(f"error: {case}: the loss of step {number + 1} is {own:.6f} here and {other:.6f} there")


def measure(case: Case, rounds: int, peer: str | None = None) -> dict[str, Any]:
    """A row of the table, against the case's peer or another."""
    torch.set_num_threads(case.threads)
    peer = peer or case.peer
    own, weights = ours(case)
    same = EXPORTED if case.model != "dense" else STOCK
    twin = plain(case, weights, same)
    hold_equal(case, own, twin)
    theirs = twin if same == peer else plain(case, None, peer)
    theirs()
    seconds: list[tuple[float, float]] = []
    clock = time.process_time if case.threads == 1 else time.perf_counter
    for _ in range(rounds):
        pair = []
        for step in (own, theirs):
            started = clock()
            step()
            pair.append(clock() - started)
        seconds.append((pair[0], pair[1]))
    row = {**asdict(case), "peer": peer, "seconds": statistics.median(pair[0] for pair in seconds)}
    row["peer_seconds"] = statistics.median(pair[1] for pair in seconds)
    row["ratio"] = statistics.median(pair[1] / pair[0] for pair in seconds)
    torch.distributed.destroy_process_group()
    row["mib"], row["peer_mib"] = (apart(peak_memory, case, kind) for kind in (OURS, peer))
    return row


def longest(case: Case, kind: str, gib: int) -> str:
    """How many tokens of one sequence fit, by what the second half of this case's length takes."""
    half, whole = (apart(peak_memory, replace(case, length=length), kind) for length in (case.length // 2, case.length))
    per_token = (whole - half) / (case.length - case.length // 2)
    tokens = case.length + (gib * 1024 - whole) / per_token
    how = f"{case.model}, {kind}{', recompute full' if case.recompute else ''}"
    return f"{how}: {1024 * per_token:,.1f} KiB per token, {tokens:,.0f} tokens in {gib} GiB"


def command_line(case: Case, steps: int) -> dict[str, Any]:
    """Tokens a second in the log of a run by the command line, against a loop of transformers' model."""
    from steel_megatron.data.indexed.writer import IndexedWriter

    torch.set_num_threads(case.threads)
    with tempfile.TemporaryDirectory() as folder:
        with IndexedWriter(Path(folder) / "corpus", np.uint16) as writer:
            random = np.random.default_rng(0)
            for _ in range(steps + 2):
                writer.add_document(random.integers(0, case.vocabulary, case.batch * (case.length + 1)))
            writer.finalize({})
        run = case.run
        run = replace(
            run,
            data=DataConfig(train=[f"{folder}/corpus"]),
            training=replace(run.training, train_steps=steps, log_interval=1),
            checkpoint=replace(run.checkpoint, directory=f"{folder}/run"),
        )
        (Path(folder) / "run.yaml").write_text(dump_yaml(run), encoding="utf-8")
        command = [sys.executable, "-c", START, "pretrain", "--config", f"{folder}/run.yaml"]
        environment = {"OMP_NUM_THREADS": str(case.threads)}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    found = [float(one.replace(",", "")) for one in re.findall(r"([\d,]+) tokens/s", done.stdout + done.stderr)]
    if done.returncode or len(found) < steps:
        sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    theirs = plain(case, None, case.peer)
    theirs()
    speeds = []
    for _ in range(steps):
        started = time.perf_counter()
        theirs()
        speeds.append(case.batch * case.length / (time.perf_counter() - started))
    row = {**asdict(case), "peer": f"{case.peer}, no loader", "tokens_per_second": statistics.median(found[2:])}
    return {**row, "peer_tokens_per_second": statistics.median(speeds)}


def grown(base: Case) -> list[Case]:
    """The base with one of its sizes larger and larger."""
    sizes = {
        "length": (512, 1024, 2048, 4096, 8192, 16_384),
        "layers": (2, 4, 8, 16),
        "vocabulary": (8_000, 32_000, 151_936),
        "batch": (1, 2, 4, 8),
    }
    return [replace(base, **{name: value}) for name, values in sizes.items() for value in values]


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    what = f"{row['model']:<9}{row['layers']:>3} x {row['hidden']:<4} V {row['vocabulary']:<7}"
    what += (
        f"[{row['batch']}, {row['length']}]".ljust(11) + f"{row['precision']:<9}{row['threads']:>2}  {row['peer']:<9}"
    )
    if "tokens_per_second" in row:
        own, other = row["tokens_per_second"], row["peer_tokens_per_second"]
        print(f"{what} {own:>8,.0f} {other:>8,.0f} tokens/s {own / other:>6.2f}", flush=True)
        return
    line = f"{what} {row['seconds']:>8.3f} {row['peer_seconds']:>8.3f} {row['ratio']:>6.2f}"
    if "mib" in row:
        line += f" {row['mib']:>8,.0f} {row['peer_mib']:>8,.0f} {row['mib'] / row['peer_mib']:>6.2f}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--models", nargs="+", choices=["sequence", "merged", "dense"], default=["sequence", "merged", "dense"]
    )
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--growth", action="store_true", help="one size after the other larger, instead of the table")
    parser.add_argument("--longest", type=int, default=16_384, help="of --growth: no sequence is longer")
    parser.add_argument("--command-line", action="store_true", help="tokens/s of a run by the command line as well")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    shapes = [SIZES[name] for name in arguments.sizes]
    if arguments.growth:
        cases = [
            case
            for model in arguments.models
            for case in grown(Case(model=model, **{**SIZES["small"], "threads": arguments.threads[-1]}))
            if case.length <= arguments.longest
        ]
    else:
        cases = [
            Case(model=model, precision=precision, threads=threads, **shape)
            for shape in shapes
            for model in arguments.models
            for precision in arguments.precisions
            for threads in arguments.threads
        ]
        cases += [Case(model=model, threads=arguments.threads[-1], **WIDE) for model in arguments.models if shapes]
    print(f"{'':<56}{'seconds':>8} {'peer':>8} {'ratio':>6} {'MiB':>8} {'peer':>8} {'ratio':>6}")
    rows = []
    for case in cases:
        for peer in (None, MEGATRON) if case.model == "dense" and not arguments.growth else (None,):
            rows.append(measure(case, arguments.rounds, peer))
            show(rows[-1])
    for model in arguments.models if arguments.growth else ():
        long = Case(model=model, **{**SIZES["small"], "length": arguments.longest})
        for case, kind in ((long, OURS), (replace(long, recompute=True), OURS), (long, long.peer)):
            print(longest(case, kind, 8), flush=True)
    if arguments.command_line:
        for model in arguments.models:
            small = {**SIZES["small"], "vocabulary": 8_000, "inner": 288}
            rows.append(command_line(Case(model=model, threads=arguments.threads[-1], **small), 12))
            show(rows[-1])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
