"""A step of SFT, packed, against trl's SFTTrainer, and of DPO with stored references against its DPOTrainer.

    python benchmarks/sft.py [--hidden 256] [--layers 4] [--documents 32] [--rounds 5]

Both sides have the same exported model, the same texts and one thread, each in a process of its own. A step is the same
global batch for both: here packed into sequences of --length tokens, one at a time; in trl micro batches of 8, its
default, each padded to its longest text, with neither activation checkpointing nor bfloat16. trl's side is its own
``compute_loss``, a backward pass and torch's fused AdamW; DPOTrainer gets stored log-probabilities of the reference.

First both must find the same loss. Then they take steps in turn, so that whatever else the machine does hits both, and
the ratio is the median over the rounds' ratios of processor time. Answer tokens are those that are predicted, of chosen
and rejected answers with DPO. Memory is by how much each process grew at most, after its imports. Lengths are
log-normal, as in published sets: most texts are short, a few are many times as long.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

KINDS = ("sft", "dpo")
SIDES = ("packed", "trl")
MICRO_BATCH = 8
LR = 1e-5
Text = tuple[np.ndarray, np.ndarray]
"""Token ids and which of them are predicted."""


def texts(arguments: argparse.Namespace, seed: int, kind: str) -> list[list[Text]]:
    """The documents of a step: one text each, or the two of a pair that begin alike."""
    random = np.random.default_rng(seed)

    def drawn(median: float, most: int) -> np.ndarray:
        size = int(np.clip(random.lognormal(np.log(median), 0.8), 8, most))
        return random.integers(0, arguments.vocabulary, size)

    most = arguments.length // (4 if kind == "dpo" else 2)
    made = []
    for _ in range(arguments.documents):
        prompt = drawn(60, most)
        answers = [drawn(100, most) for _ in range(2 if kind == "dpo" else 1)]
        made.append(
            [(np.concatenate([prompt, said]), np.arange(len(prompt) + len(said)) >= len(prompt)) for said in answers]
        )
    return made


def references(count: int) -> np.ndarray:
    """Log-probabilities of a reference, float32 [pairs, 2]; which ones changes nothing in the work to do."""
    return np.linspace(-900, -300, 2 * count, dtype=np.float32).reshape(-1, 2)


def packed(documents: list[list[Text]], length: int) -> list[tuple[np.ndarray, ...]]:
    """Tokens, starts, labels and documents of each sequence, int64 [1, length + 1]."""
    from steel_megatron.data.sampling.whole import best_fit

    sizes = np.array([sum(len(ids) for ids, _ in document) for document in documents])
    longest = np.argsort(-sizes, kind="stable")
    places = best_fit(sizes[longest], length)
    sequences = []
    for place in range(int(places.max()) + 1):
        tokens, starts, labels = (np.zeros((1, length + 1), dtype=np.int64) for _ in range(3))
        owners, end = np.full((1, length + 1), -1), 0
        for number in longest[places == place].tolist():
            for ids, said in documents[number]:
                own = slice(end, end + len(ids))
                tokens[0, own], labels[0, own], starts[0, own], owners[0, own] = ids, said, end, number
                end += len(ids)
        starts[0, end:] = end
        sequences.append((tokens, starts, labels, owners))
    return sequences


def our_step(kind: str, folder: Path, arguments: argparse.Namespace) -> Callable[[int], float]:
    """A step by this library, as a function of its seed; gives the loss."""
    from steel_megatron.platform import prepare

    prepare()
    import torch

    from steel_megatron.config import CheckpointConfig, DataConfig, OptimizerConfig, RunConfig, TrainingConfig
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint
    from steel_megatron.train.engine import Engine

    info = checkpoint.read_info(folder / "checkpoint")
    run = RunConfig(
        model=info.model,
        data=DataConfig(reset_at_eod=True),
        optimizer=OptimizerConfig(lr=LR, warmup_steps=0, lr_schedule="constant", weight_decay=0.0, clip_grad=0.0),
        training=TrainingConfig(objective=kind, train_steps=10_000),
        checkpoint=CheckpointConfig(directory=str(folder / "unused")),
    )
    topology = initialize(run.parallel)
    engine = Engine(run, topology)
    objective: Any = engine.objective
    checkpoint.load_weights(engine.stage, info, run.model)
    engine.optimizer.reload_model_params()
    if kind == "dpo":
        objective.reference = {0: torch.from_numpy(references(arguments.documents)).double()}

    def step(seed: int) -> float:
        sequences = packed(texts(arguments, seed, kind), arguments.length)
        batches = [objective.batch(one[0], one[1], None, topology, one[2], one[3]) for one in sequences]
        return engine.step(batches).loss

    return step


def their_step(kind: str, folder: Path, arguments: argparse.Namespace) -> Callable[[int], float]:
    """The same by trl."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    common = {"output_dir": str(folder / "trl"), "report_to": [], "use_cpu": True, "bf16": False}
    common |= {"gradient_checkpointing": False}
    given = {
        "model": AutoModelForCausalLM.from_pretrained(folder / "exported", trust_remote_code=True),
        "processing_class": AutoTokenizer.from_pretrained(folder / "tokenizer"),
    }
    trainer: Any
    if kind == "sft":
        rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
        trainer = SFTTrainer(args=SFTConfig(**common), train_dataset=rows, **given)
    else:
        rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        settings = DPOConfig(beta=0.1, precompute_ref_log_probs=True, **common)
        trainer = DPOTrainer(args=settings, train_dataset=rows, **given)
    model = trainer.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def padded(own: list[Text]) -> dict[str, torch.Tensor]:
        size = max(len(ids) for ids, _ in own)
        ids, attended, said = (torch.zeros(len(own), size, dtype=torch.int64) for _ in range(3))
        for row, (tokens, labels) in enumerate(own):
            ids[row, : len(tokens)], attended[row, : len(tokens)] = torch.from_numpy(tokens), 1
            said[row, : len(tokens)] = torch.from_numpy(labels.astype(np.int64))
        return {"input_ids": ids, "attention_mask": attended, "completion_mask": said}

    def step(seed: int) -> float:
        documents = texts(arguments, seed, kind)
        labels = torch.tensor(sum(int(said.sum()) for document in documents for _, said in document))
        total = 0.0
        for at in range(0, len(documents), MICRO_BATCH):
            part = documents[at : at + MICRO_BATCH]
            batch = padded([document[side] for side in range(len(part[0])) for document in part])
            if kind == "sft":
                said = batch.pop("completion_mask")
                batch["labels"] = batch["input_ids"].masked_fill(said == 0, -100)
                loss = trainer.compute_loss(model, batch, num_items_in_batch=labels)
            else:
                known = torch.from_numpy(references(len(documents)))[at : at + MICRO_BATCH]
                batch |= {"ref_chosen_logps": known[:, 0], "ref_rejected_logps": known[:, 1]}
                loss = trainer.compute_loss(model, batch) * len(part) / len(documents)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def work(side: str, kind: str, folder: Path, arguments: argparse.Namespace, answers: Connection) -> None:
    """A process: its steps by their seeds, each with its loss and processor time; at the end, by how much it grew."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for one in (datasets, transformers.logging):
        one.disable_progress_bar()
    imported(side)
    before = memory("VmRSS")
    step = (our_step if side == "packed" else their_step)(kind, folder, arguments)
    while (seed := answers.recv()) is not None:
        began = time.process_time()
        loss = step(seed)
        answers.send((loss, time.process_time() - began))
    answers.send(memory("VmHWM") - before)


def imported(side: str) -> None:
    """Import what a side needs, which is not to count as its memory; and forget the highest use so far."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    if side == "packed":
        from steel_megatron.platform import prepare

        prepare()
        import steel_megatron.train.engine  # noqa: F401
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**10


def measure(kind: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Print the answer tokens per second and the memory of both."""
    context = multiprocessing.get_context("spawn")
    ends, processes = {}, []
    for side in SIDES:
        ends[side], other = context.Pipe()
        processes.append(context.Process(target=work, args=(side, kind, folder, arguments, other), daemon=True))
        processes[-1].start()

    def both(seed: int) -> dict[str, tuple[float, float]]:
        found = {}
        for side in SIDES if seed % 2 else SIDES[::-1]:
            ends[side].send(seed)
            found[side] = ends[side].recv()
        return found

    first = both(0)  # of untrained copies
    ours, theirs = (first[side][0] for side in SIDES)
    if abs(ours - theirs) > 1e-5 * abs(theirs):
        raise SystemExit(f"error: {kind}: the losses differ: {ours} packed, {theirs} by trl")
    rounds = [both(seed) for seed in range(1, arguments.rounds + 1)]
    for side in SIDES:
        ends[side].send(None)
    grown = {side: ends[side].recv() for side in SIDES}
    for process in processes:
        process.join()
    labels = [
        sum(int(said.sum()) for document in texts(arguments, seed, kind) for _, said in document)
        for seed in range(1, arguments.rounds + 1)
    ]
    speeds = {
        side: statistics.median(count / one[side][1] for count, one in zip(labels, rounds, strict=True))
        for side in SIDES
    }
    ratio = statistics.median(one["trl"][1] / one["packed"][1] for one in rounds)
    print(f"{kind}: loss {ours:.6f} both ways")
    for side in SIDES:
        print(f"  {side:8}{speeds[side]:>10,.0f} answer tokens/s {grown[side]:>10,.0f} MiB")
    print(f"  {ratio:.2f}x the speed, {grown['packed'] / grown['trl']:.2f}x the memory", flush=True)


def make_model(folder: Path, arguments: argparse.Namespace) -> None:
    """An exported folder with random weights, the checkpoint that it becomes, and a tokenizer for trl."""
    import torch

    from steel_megatron.config import ModelConfig
    from steel_megatron.hf import mapping
    from steel_megatron.hf.configuration_steel import SteelConfig
    from steel_megatron.hf.convert import import_hf
    from steel_megatron.hf.modeling_steel import SteelForCausalLM
    from tests.fixtures.make_tokenizer import make_tokenizer

    settings = ModelConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_attention_heads=4,
        ffn_hidden_size=arguments.hidden,
        num_experts=4,
        routing_mode="token",
        vocab_size=arguments.vocabulary,
        sequence_length=arguments.length,
        init_method_std=arguments.hidden**-0.5,
    )
    torch.manual_seed(0)
    SteelConfig.register_for_auto_class()
    SteelForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model = SteelForCausalLM(SteelConfig(**mapping.config_to_hf(settings)))
    model.save_pretrained(folder / "exported")
    make_tokenizer(folder / "tokenizer")
    import_hf(folder / "exported", folder / "checkpoint")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed sequence")
    parser.add_argument("--documents", type=int, default=32, help="conversations, or pairs, of a step")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), arguments)
        for kind in arguments.kinds:
            measure(kind, Path(folder), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
