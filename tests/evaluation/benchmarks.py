"""Benchmarks written for the tests, in the layouts in which C-Eval, CMMLU, MMLU and GSM8K are published."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet

from steel_megatron.config import ModelConfig
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from steel_megatron.evaluation.subjects import CATEGORIES
from tests.fixtures.make_tokenizer import SPECIAL, VOCABULARY, make_tokenizer

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    num_experts=2,
    routing_mode="token",
    vocab_size=VOCABULARY + len(SPECIAL),
    sequence_length=512,
    init_method_std=0.2,
)
Question = tuple[str, list[str], int]


def questions(seed: int, count: int) -> list[Question]:
    """Sums with four options and the number of the right one."""
    found = []
    for number in range(count):
        a, b = 3 + seed % 11 + number, 2 + (seed * 7 + number) % 9
        right = (seed + number) % 4
        found.append((f"{a}加{b}等于多少？", [str(a + b + option - right) for option in range(4)], right))
    return found


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_ceval(folder: Path, subjects: Iterable[str]) -> None:
    for seed, subject in enumerate(sorted(subjects)):
        for split, count in (("dev", 5), ("val", 3)):
            rows = [
                [number, question, *options, "ABCD"[right]]
                for number, (question, options, right) in enumerate(questions(seed + len(split + subject), count))
            ]
            write_csv(folder / split / f"{subject}_{split}.csv", [["id", "question", *"ABCD", "answer"], *rows])


def write_cmmlu(folder: Path, subjects: Iterable[str]) -> None:
    for seed, subject in enumerate(sorted(subjects)):
        for split, count in (("dev", 5), ("test", 3)):
            rows = [
                [number, question, *options, "ABCD"[right]]
                for number, (question, options, right) in enumerate(questions(seed + 3 * len(split), count))
            ]
            write_csv(folder / split / f"{subject}.csv", [["", "Question", *"ABCD", "Answer"], *rows])


def write_mmlu(folder: Path, subject: str, layout: str) -> None:
    """As in the authors' archive (CSV without a header), or as on the Hub (parquet)."""
    for split, count in (("dev", 5), ("test", 4)):
        found = questions(len(subject) + count, count)
        if layout == "csv":
            rows = [[question, *options, "ABCD"[right]] for question, options, right in found]
            write_csv(folder / "data" / split / f"{subject}_{split}.csv", rows)
        else:
            (folder / subject).mkdir(parents=True, exist_ok=True)
            table = [
                {"question": question, "subject": subject, "choices": options, "answer": right}
                for question, options, right in found
            ]
            path = folder / subject / f"{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)


def write_gsm8k(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 5), ("test", 3)):
        lines = [
            {"question": f"Tom has {a} apples and buys {count}. How many?", "answer": f"{a}+{count}.\n#### {a + count}"}
            for a in range(2, 2 + count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def write_benchmarks(folder: Path) -> Path:
    """All of them: C-Eval whole, of the others a subject or two."""
    write_ceval(folder / "ceval-exam", set().union(*CATEGORIES["ceval"].values()))
    write_cmmlu(folder / "cmmlu", ["arts", "logical"])
    write_mmlu(folder / "mmlu", "anatomy", "csv")
    write_mmlu(folder / "mmlu", "virology", "parquet")
    write_gsm8k(folder / "gsm8k")
    return folder


def write_model(folder: Path, mode: str = "token") -> Path:
    """An exported folder with random weights and a tokenizer."""
    import dataclasses

    import torch
    from safetensors.torch import save_file

    from steel_megatron.hf import modeling_steel
    from steel_megatron.hf.configuration_steel import SteelConfig
    from steel_megatron.hf.mapping import config_to_hf

    make_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer("huggingface", folder / "tokenizer")
    torch.manual_seed(0)
    model = dataclasses.replace(MODEL, routing_mode=mode)
    tensors = modeling_steel.SteelForCausalLM(SteelConfig(**config_to_hf(model))).state_dict()
    config = {
        "architectures": ["SteelForCausalLM"],
        "model_type": "steel",
        "auto_map": {
            "AutoConfig": "configuration_steel.SteelConfig",
            "AutoModelForCausalLM": "modeling_steel.SteelForCausalLM",
        },
        "dtype": "float32",
        **config_to_hf(model),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eod_id,
        "pad_token_id": VOCABULARY,
    }
    (folder / "hf").mkdir()
    tokenizer.save_pretrained(folder / "hf")
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "hf" / "model.safetensors")
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    for name in ("configuration_steel.py", "modeling_steel.py"):
        shutil.copyfile(Path(modeling_steel.__file__).with_name(name), folder / "hf" / name)
    return folder / "hf"
