"""Supervised finetuning: packed equals unpacked, every layout and cut of a global batch equals one process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from steel_megatron.cli import main
from steel_megatron.config import ParallelConfig
from steel_megatron.hf.convert import export_hf
from steel_megatron.hf.texts import texts_of_folder
from tests.data.corpora import write
from tests.layouts.pool import Pool
from tests.layouts.sft_runs import MODES, documents_of, prepared, pretrained, run_of, sft_run, train, train_all
from tests.train.small_run import LAYOUTS, PROCESSES, Trained, compare

ALONE = ParallelConfig()
SHARED = [mode for mode in MODES if mode != "top_k_moe"]  # which keeps no documents apart over several processes
_KNOWN: dict[str, list[Trained]] = {}


def one_process(pool: Pool, modes: list[str], objective: str) -> list[list[Trained]]:
    missing = [mode for mode in modes if mode + objective not in _KNOWN]
    runs = [sft_run(ALONE, mode, objective) for mode in missing]
    for mode, trained in zip(missing, pool.run(train_all, 1, runs)[0] if missing else [], strict=True):
        _KNOWN[mode + objective] = trained
    return [_KNOWN[mode + objective] for mode in modes]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "sft_per_sample"])
def test_packed_equals_unpacked(objective: str, pool: Pool) -> None:
    """In loss and in the gradient of every tensor, in every mode."""
    runs = [sft_run(ALONE, mode, objective) for mode in MODES]
    unpacked = pool.run(train_all, 1, runs, "alone")[0]
    for ours, theirs in zip(one_process(pool, list(MODES), objective), unpacked, strict=True):
        compare([ours], theirs)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2 pp2", "tp2 ep2", "cp2 dp2", "cp2 tp2 sp", "dp2"])
def test_layouts_equal_one_process(layout: str, pool: Pool) -> None:
    for objective in ("sft", "sft_per_sample"):
        modes = [mode for mode in SHARED if not ("ep2" in layout and mode == "dense")]
        runs = [sft_run(LAYOUTS[layout], mode, objective) for mode in modes]
        by_rank = pool.run(train_all, PROCESSES[layout], runs)
        for number, theirs in enumerate(one_process(pool, modes, objective)):
            compare([results[number] for results in by_rank], theirs)


@pytest.mark.slow
def test_one_trajectory_for_all_cuts_of_a_global_batch(pool: Pool) -> None:
    """20 steps; micro batches with few labels weigh as little as they should."""
    whole = pool.run(train, 1, sft_run(ALONE, "token", micro=8, steps=20))[0]
    cuts = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 4), (4, 2)]
    for processes, micro in cuts:
        for ours in pool.run(train, processes, sft_run(ALONE, "token", micro=micro, steps=20)):
            for step, (found, expected) in enumerate(zip(ours, whole, strict=True)):
                assert found.loss == pytest.approx(expected.loss, rel=1e-5), (processes, micro, step)
                assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4), (processes, micro, step)
    labels = [sum(int(own.sum()) for _, own in documents_of(step)) for step in range(20)]
    assert len(set(labels)) > 5  # global batches of different sizes


@pytest.mark.slow
def test_a_run_from_conversations_to_a_chat(pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses and validation are the same alone, with TP2 x PP2, and after a stop; its export says the same."""
    prefix = prepared(tmp_path)
    whole = pool.run(pretrained, 1, run_of(prefix, tmp_path / "whole", ALONE))[0]
    assert not isinstance(whole, str) and len(whole[0]) == 6 and whole[0][-1] < whole[0][0]
    first = pool.run(pretrained, 1, run_of(prefix, tmp_path / "cut", ALONE, stop_after_step=3))[0]
    second = pool.run(pretrained, 1, run_of(prefix, tmp_path / "cut", ALONE))[0]
    assert (first[0] + second[0], second[1]) == whole
    for ours in pool.run(pretrained, 4, run_of(prefix, tmp_path / "layout", LAYOUTS["tp2 pp2"])):
        assert ours[0] == pytest.approx(whole[0], rel=1e-5) and ours[1] == pytest.approx(whole[1], rel=1e-5)
    assert main(["data", "show", str(tmp_path / "whole" / "ledger.json"), "--step", "1"]) == 0
    # A tokenizer without a template of its own.
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    settings |= {"chat_template": None}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000006"
    exported = export_hf(checkpoint, tmp_path / "hf", ("huggingface", str(tmp_path / "tokenizer")))
    texts = texts_of_folder(exported, chat=True)
    assert texts.render([{"role": "user", "content": "Hi?"}], True).startswith("<|im_start|>user\nHi?")
    one = ["generate", "--chat", "--prompts", "Hi?", "--max_new_tokens", "4", "--model"]
    capsys.readouterr()
    assert main([*one, str(exported)]) == 0
    said = capsys.readouterr().out
    assert main([*one, str(checkpoint), "--tokenizer_path", str(tmp_path / "tokenizer")]) == 0
    assert capsys.readouterr().out == said


@pytest.mark.slow
def test_corpora_of_the_other_kind_are_refused(pool: Pool, tmp_path: Path) -> None:
    prefix = prepared(tmp_path)
    plain = write(tmp_path / "plain", [list(range(100))] * 20)
    refused = pool.run(pretrained, 1, run_of(prefix, tmp_path / "a", ALONE, "next_token"))[0]
    assert "data.validation have labels, but training.objective = next_token takes none" in refused
    refused = pool.run(pretrained, 1, run_of(plain, tmp_path / "b", ALONE))[0]
    assert "data.validation have no labels, but training.objective = sft takes them" in refused
    run = run_of(prefix, tmp_path / "c", ALONE)
    apart = dataclasses.replace(run.data, reset_at_eod=False)
    refused = pool.run(pretrained, 1, dataclasses.replace(run, data=apart))[0]
    assert "data.reset_at_eod is false; set it to true" in refused
    short = dataclasses.replace(run, model=dataclasses.replace(run.model, sequence_length=40))
    assert "more than the 40 of a sequence" in pool.run(pretrained, 1, short)[0]
