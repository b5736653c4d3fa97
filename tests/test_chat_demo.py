"""make demo-chat: its texts become corpora without loss, its settings follow each other, its steps run in tiny form."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.cli import _parse, main
from steel_megatron.config import RunConfig, doubts, from_dict
from steel_megatron.data.tokenizing.training import train_tokenizer
from tests.layouts.pool import Pool

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples/quickstart"
sys.path.insert(0, str(FOLDER))

import chat_demo  # noqa: E402
import demo  # noqa: E402

TINY = [
    *("--model.num_layers", "2", "--model.hidden_size", "32", "--model.ffn_hidden_size", "16"),
    *("--model.vocab_size", "3000", "--training.train_steps", "2", "--optimizer.warmup_steps", "1"),
    *("--checkpoint.save_interval", "2"),
]


def settings(command: str) -> dict[str, Any]:
    """What a command reads from the demo's files."""
    options = ["--config", demo.CONFIG, "--config", f"examples/quickstart/{command}.yaml"]
    return _parse([command, *options])[1]


def test_texts_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = [json.loads(line) for line in (FOLDER / "chat/conversations.jsonl").read_text("utf-8").splitlines()]
    first = [row["messages"][0]["content"] for row in rows if len(row["messages"]) == 2]
    assert len(rows) == 72 and len(first) == len(set(first)) and set(chat_demo.QUESTIONS) <= set(first)
    finetuned, preferred = settings("sft"), settings("dpo")
    assert finetuned["checkpoint"]["init_from"] == f"{demo.RUN}/model/checkpoints/step_{demo.STEPS:08d}"
    last = f"{finetuned['checkpoint']['directory']}/checkpoints/step_{finetuned['training']['train_steps']:08d}"
    assert preferred["checkpoint"]["init_from"] == last
    for options in (finetuned, preferred):
        run = from_dict(RunConfig, options, "the demo")
        assert run.model.sequence_length == int(chat_demo.MOST_TOKENS) and doubts(run) == []


@pytest.mark.slow
def test_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command runs, in tiny form; the two that train, on two processes."""
    pool = Pool()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    (tmp_path / demo.RUN).mkdir(parents=True)
    train_tokenizer([str(FOLDER / "corpus")], demo.RUN / "tokenizer", 3000)
    steel = ["--tokenizer_kind", "sentencepiece", "--tokenizer_path", str(demo.RUN / "tokenizer.model")]
    corpus = str(demo.RUN / "data/corpus")
    assert main(["preprocess", "--inputs", str(FOLDER / "corpus"), "--output_prefix", corpus, *steel]) == 0
    first = ["pretrain", "--config", demo.CONFIG, *TINY, "--data.validation", "[]"]
    begin = [*first, "--data.train", f"{corpus}_text_document", "--parallel.tensor_model_parallel_size", "1"]
    assert pool.run(in_folder, 1, tmp_path, begin) == [0]
    starts = {"sft": demo.RUN / "model", "dpo": demo.RUN / "sft"}
    commands: list[str] = []

    def run(*words: str, capture: bool = False) -> str:
        words = words[words.index("steel_megatron") + 1 :]
        commands.append(words[0] if words[1].startswith("--") else f"{words[0]} {words[1]}")
        if commands[-1] in starts:
            start = ["--checkpoint.init_from", str(starts[words[0]] / "checkpoints/step_00000002")]
            assert pool.run(in_folder, 2, tmp_path, [*words, *TINY, *start]) == [0, 0]
            return ""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(words) == 0
        return said.getvalue() or "(nothing)"

    monkeypatch.setattr(demo, "run", run)
    assert chat_demo.demo(time.monotonic()) == 0
    assert commands == ["sft prepare", "dpo prepare", "sft inspect", "sft", "dpo", *["generate"] * 6]
    checkpoint = tmp_path / demo.RUN / "dpo/checkpoints/step_00000002"
    assert json.loads((checkpoint / "steel.json").read_text())["layout"].startswith("TP1 PP2")
    pool.close()


def in_folder(folder: Path, words: list[str]) -> int:
    """A command's exit code, on one of several processes."""
    os.chdir(folder)
    return main(words)
