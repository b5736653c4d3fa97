"""examples/steel_1b/sft: settings are the paper's and the release's, and one command makes table 3 of small sets."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.cli import _parse, main
from steel_megatron.config import ParallelConfig, RunConfig, doubts, dump_yaml, from_dict
from tests.evaluation.benchmarks import write_benchmarks
from tests.fixtures.make_tokenizer import SPECIAL, VOCABULARY, make_tokenizer
from tests.layouts.pool import Pool
from tests.train.small_run import small_run

FOLDER = Path(__file__).resolve().parents[1] / "examples/steel_1b/sft"
sys.path.insert(0, str(FOLDER))

import table3  # noqa: E402


def settings(command: str, name: str) -> RunConfig:
    words = ["--config", str(table3.MODEL), "--config", str(FOLDER / f"{name}.yaml")]
    run: RunConfig = from_dict(RunConfig, _parse([command, *words, "--checkpoint.init_from", "start"])[1], name)
    return run


@pytest.mark.parametrize(
    ("name", "lr", "batch", "length", "weight_decay"),
    [
        ("train_paper", 2e-5, 256, 2048, 0.0),
        ("train_released", 3e-5, 256, 768, 0.0),
        ("dpo_paper", 5e-6, 128, 2048, 0.05),
        ("dpo_released", 5e-6, 128, 3072, 0.1),
    ],
)
def test_settings(name: str, lr: float, batch: int, length: int, weight_decay: float) -> None:
    run = settings("dpo" if "dpo" in name else "sft", name)
    assert (run.optimizer.lr, run.optimizer.min_lr, run.optimizer.lr_schedule) == (lr, 0.0, "cosine")
    assert (run.training.global_batch_size, run.optimizer.weight_decay) == (batch, weight_decay)
    assert run.model.sequence_length == length and run.dpo.beta == 0.1
    assert run.num_micro_batches(8) > 0 and doubts(run) == []
    if name.startswith("train"):
        assert table3.SETTINGS[name.removeprefix("train_")].tokens == length


def raw_sets(folder: Path) -> None:
    """A small set for each part of the recipes."""

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    zh = [{"instruction": f"第{number}个数是什么？", "output": "我不知道。"} for number in range(20)]
    en = [{"instruction": f"What is number {number}?", "output": "I do not know."} for number in range(20)]
    write("infinity", zh + en)
    for name in ("code_feedback", "webinstruct", "openhermes"):
        write(name, [{**row, "instruction": f"{name}: {row['instruction']}"} for row in en])
    write(
        "wanjuan",
        [{"q_main": f"{n}是单数吗？", "option_a": "是", "option_b": "不是", "std_ans": "A"} for n in range(9)],
    )
    write("english_mcq", [{"question": f"Is {n} odd?", "choices": ["yes", "no"], "answer": n % 2} for n in range(9)])


def in_process(words: list[str]) -> int:
    return main(words)


@pytest.mark.slow
def test_small_sets_become_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_sets(tmp_path / "raw")
    make_tokenizer(tmp_path / "tokenizer")
    write_benchmarks(tmp_path / "benchmarks")
    tiny = small_run(ParallelConfig(), str(tmp_path / "start"), num_layers=2, vocab_size=VOCABULARY + len(SPECIAL))
    tiny = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, train_steps=1))
    (tmp_path / "model.yaml").write_text(dump_yaml(tiny), encoding="utf-8")
    corpus = str(tmp_path / "plain")
    tokenizer = ["--tokenizer_path", str(tmp_path / "tokenizer")]
    texts = ["--inputs", str(tmp_path / "raw/infinity.jsonl"), "--json_keys", "output"]
    assert main(["preprocess", *texts, "--output_prefix", corpus, *tokenizer]) == 0
    pool = Pool()
    begin = ["pretrain", "--config", str(tmp_path / "model.yaml"), "--data.train", f"{corpus}_output_document"]
    assert pool.run(in_process, 1, begin) == [0]
    commands: list[str] = []

    def run(*words: str) -> None:
        command = list(words[words.index("steel_megatron") + 1 :])
        commands.append(" ".join(command[: 1 if command[0] == "evaluate" else 2]))
        assert pool.run(in_process, 1, command) == [0]

    monkeypatch.setattr(table3, "run", run)
    monkeypatch.setitem(table3.SETTINGS, "paper", table3.Settings(epochs=4, tokens=96))
    words = ["--raw", str(tmp_path / "raw"), "--start", str(tmp_path / "start/checkpoints/step_00000001")]
    words += [*("--tokenizer", str(tmp_path / "tokenizer")), "--benchmarks", str(tmp_path / "benchmarks")]
    words += ["--output", str(tmp_path / "out"), "--model", str(tmp_path / "model.yaml")]
    words += ["--mixtures", "zh_en20", "zh_en20_mcq", "--tasks", "cmmlu_arts", "--", "--optimizer.warmup_steps", "0"]
    assert table3.main(words) == 0
    assert commands == ["sft build", "sft prepare", "sft train", "evaluate"] * 2
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[-3:]] == ["mixture", "zh_en20", "zh_en20_mcq"]
    scores = json.loads((tmp_path / "out/table3.json").read_text())
    assert all(0 <= one["cmmlu_arts"] <= 100 for one in scores.values())
    shown = (tmp_path / "out/paper/zh_en20_mcq/conversations.report.yaml").read_text("utf-8")
    assert "english_mcq" in shown and "share of en" in shown
    # What is done is not repeated.
    commands.clear()
    assert table3.main(words) == 0 and commands == ["sft train", "evaluate"] * 2
    pool.close()


def test_missing_sets_are_named_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw_sets(tmp_path / "raw")
    (tmp_path / "raw/webinstruct.jsonl").unlink()
    words = ["--raw", str(tmp_path / "raw"), "--start", "a", "--tokenizer", "b", "--benchmarks", "c"]
    assert table3.main([*words, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'raw'} has no file or folder webinstruct\n"
    assert not (tmp_path / "out").exists()
