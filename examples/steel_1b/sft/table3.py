"""Table 3 of the paper: build, prepare, finetune and evaluate its five mixtures; scores next to the paper's.

    python examples/steel_1b/sft/table3.py --raw raw --start runs/steel_1b/checkpoints/step_01070000 \\
        --tokenizer data/qwen_tokenizer --benchmarks benchmarks --output runs/table3 --processes 8

RAW holds a file or folder for each part of the recipes, by its name: infinity, wanjuan, code_feedback, webinstruct,
openhermes, english_mcq. Every step is one of the library's commands and is printed. What is done is not repeated, and
training resumes, so the same command continues after an interruption. Options of ``sft train`` follow behind ``--``.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.sampling.whole import whole_samples

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER.parent / "pretrain.yaml"
PAPER = {
    "full": (32.35, 26.32, 25.50),
    "zh": (38.57, 33.48, 23.26),
    "zh_en100": (39.21, 33.20, 26.73),
    "zh_en20": (40.43, 35.86, 26.75),
    "zh_en20_mcq": (41.90, 36.08, 30.82),
}
"""Scores of each mixture on C-Eval, CMMLU and MMLU."""
TASKS = ("ceval", "cmmlu", "mmlu")


@dataclass(frozen=True)
class Settings:
    """How long is trained, on how long conversations."""

    epochs: int
    tokens: int


SETTINGS = {"paper": Settings(4, 2048), "released": Settings(5, 768)}


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder with the published sets, by the parts' names")
    parser.add_argument("--start", type=Path, required=True, help="checkpoint to finetune")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder with the benchmarks as published")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--settings", choices=SETTINGS, default="paper", help="the paper's, or the released script's")
    parser.add_argument("--mixtures", nargs="+", choices=PAPER, default=list(PAPER), help="default: all five")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="default: ceval cmmlu mmlu")
    parser.add_argument("--model", type=Path, default=MODEL, help="YAML file with the model's settings")
    parser.add_argument("--processes", type=int, default=1, help="training processes on this machine")
    parser.add_argument("options", nargs="*", help="options of sft train, behind --")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    given = parse(words)
    if missing := sorted({part for name in given.mixtures for part in parts_of(name) if not path_of(given.raw, part)}):
        print(f"error: {given.raw} has no file or folder {', '.join(missing)}", file=sys.stderr)
        return 2
    scores = {name: mixture(given, name) for name in given.mixtures}
    (given.output / "table3.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(table(scores, given.tasks))
    return 0


def parts_of(name: str) -> list[str]:
    """The parts of a mixture's recipe."""
    return list(yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))["parts"])


def path_of(raw: Path, part: str) -> Path | None:
    """The folder of a part, or its file."""
    return next((path for path in (raw / part, *sorted(raw.glob(f"{part}.*"))) if path.exists()), None)


def mixture(given: argparse.Namespace, name: str) -> dict[str, float]:
    """Take one mixture from published sets to scores; the mean of each task's subjects, in percent."""
    settings, folder = SETTINGS[given.settings], given.output / given.settings / name
    conversations, corpus = folder / "conversations.jsonl", folder / "corpus"
    if not conversations.exists():
        sources = [f"{part}={path_of(given.raw, part)}" for part in parts_of(name)]
        recipe = str(FOLDER / f"{name}.yaml")
        steel("sft", "build", recipe, "--sources", *sources, "--output", str(conversations), "--on_bad_row", "skip")
    tokenizer, most = str(given.tokenizer), str(settings.tokens)
    prepared = [*("--output_prefix", str(corpus), "--tokenizer_path", tokenizer, "--max_tokens", most)]
    prefix = f"{corpus}_messages_document"
    if not Path(f"{prefix}.json").exists():
        rules = ("--truncation", "answer", "--on_bad_row", "skip")
        steel("sft", "prepare", "--inputs", str(conversations), *prepared, *rules)
    last = train(given, settings, prefix, folder / "run")
    results = folder / "scores.json"
    steel(
        *("evaluate", str(last), "--tasks", *given.tasks, "--data", str(given.benchmarks), "--chat"),
        *("--json", str(results)),
    )
    found = json.loads(results.read_text(encoding="utf-8"))["tasks"]
    return {task: 100 * one["all"][one["metric"]]["macro"]["value"] for task, one in found.items()}


def train(given: argparse.Namespace, settings: Settings, prefix: str, folder: Path) -> Path:
    """Finetune for the settings' epochs; the last checkpoint."""
    recipe = FOLDER / f"train_{given.settings}.yaml"
    batch = yaml.safe_load(recipe.read_text(encoding="utf-8"))["training"]["global_batch_size"]
    steps = math.ceil(settings.epochs * whole_samples(open_indexed(prefix), settings.tokens) / batch)
    words = ["sft", "train", "--config", str(given.model), "--config", str(recipe), "--data.train", prefix]
    words += ["--data.validation", "[]", "--data.tokenizer_path", str(given.tokenizer)]
    words += ["--model.sequence_length", str(settings.tokens), "--training.train_steps", str(steps)]
    words += ["--checkpoint.directory", str(folder), "--checkpoint.init_from", str(given.start), *given.options]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(given.processes)]
    run(*(launcher if given.processes > 1 else []), "-m", "steel_megatron", *words)
    return max((folder / "checkpoints").glob("step_*"))


def table(scores: dict[str, dict[str, float]], tasks: Sequence[str]) -> str:
    """Scores, with the paper's in brackets where it has them."""
    lines = [f"{'mixture':14}" + "".join(f"{task:>18}" for task in tasks)]
    for name, found in scores.items():
        paper = dict(zip(TASKS, PAPER[name], strict=True))
        cells = (f"{found[task]:.2f}" + (f" ({paper[task]:.2f})" if task in paper else "") for task in tasks)
        lines.append(f"{name:14}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def steel(*words: str) -> None:
    """One of the library's commands."""
    run("-m", "steel_megatron", *words)


def run(*words: str) -> None:
    """Run a Python program; if it fails, so does this one."""
    print(f"$ python {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    sys.exit(main())
