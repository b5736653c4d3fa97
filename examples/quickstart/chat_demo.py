"""Post-training of the quickstart's model on two cores: SFT, DPO, and replies before and after.

Run it with ``make demo-chat`` after ``make demo``. Each step is one of the library's commands and is printed, so that
you can repeat it by hand. Results are in runs/quickstart/ next to the model's; a second run starts over.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from demo import CONFIG, ROOT, RUN, STEPS, locked, steel, title, torchrun

from steel_megatron.report import read_scalars

FOLDER = Path("examples/quickstart")
ROWS = FOLDER / "chat"
TOKENIZER = ("--tokenizer_kind", "sentencepiece", "--tokenizer_path", str(RUN / "tokenizer.model"))
QUESTIONS = ("天空为什么是蓝色的？", "明天会下雨吗？", "Who are you?")
MOST_TOKENS = "256"  # model.sequence_length of pretrain.yaml


def main() -> int:
    os.chdir(ROOT)
    pretrained = RUN / f"model/checkpoints/step_{STEPS:08d}"
    if not pretrained.is_dir():
        print(f"error: {pretrained} is missing; run make demo first", file=sys.stderr)
        return 2
    with locked() as free:
        return demo(time.monotonic()) if free else 2


def demo(started: float) -> int:
    for name in ("chat", "sft", "dpo"):
        shutil.rmtree(RUN / name, ignore_errors=True)
    title("1. Conversations and preference pairs become corpora with labels")
    prepare("sft", "conversations.jsonl")
    prepare("dpo", "pairs.jsonl")
    steel("sft", "inspect", str(RUN / "chat/sft_messages_document"), *TOKENIZER, "--document", "10", "48")
    title("2. SFT: packed conversations, tensor parallel 2")
    finetuned = train("sft")
    title("3. DPO: packed pairs against the finetuned model, pipeline parallel 2")
    optimized = train("dpo")
    title("4. Replies after SFT")
    replies = [reply(finetuned, question) for question in QUESTIONS]
    title("   and after DPO")
    replies += [reply(optimized, question) for question in QUESTIONS]
    title("Summary")
    for name, terms in (("sft", ("loss",)), ("dpo", ("loss", "margin", "accuracy"))):
        curves = read_scalars(RUN / name / "tensorboard")
        for term in terms:
            (_, first), *_, (_, last) = curves[f"train/{term}"]
            print(f"{name} {term:9} {first:.3f} at the first step, {last:.3f} at the last")
    print(f"checkpoints   {finetuned}, {optimized}")
    print(f"{time.monotonic() - started:.0f} seconds in all. A model this small has learnt its answers by heart.")
    return 0 if all(replies) else 1


def prepare(command: str, rows: str) -> None:
    """Make the corpus of ``sft`` or ``dpo``."""
    prefix = str(RUN / "chat" / command)
    steel(
        command,
        "prepare",
        "--inputs",
        str(ROWS / rows),
        "--output_prefix",
        prefix,
        *TOKENIZER,
        "--max_tokens",
        MOST_TOKENS,
    )


def train(command: str) -> Path:
    """Train by ``sft`` or ``dpo``; the last checkpoint."""
    torchrun(command, "--config", CONFIG, "--config", str(FOLDER / f"{command}.yaml"))
    return max((RUN / command / "checkpoints").glob("step_*"))


def reply(checkpoint: Path, question: str) -> str:
    """What a checkpoint replies, printed."""
    words = ("--max_new_tokens", "60", "--prompts", question)
    said = steel("generate", "--model", str(checkpoint), "--chat", *words, capture=True).strip()
    print(said)
    return said


if __name__ == "__main__":
    sys.exit(main())
