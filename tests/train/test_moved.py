"""Nothing in a run's folder depends on where it lies: runs that were moved, with their data and without."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.config import DataConfig, RunConfig, dump_yaml
from steel_megatron.data.ledger.ledger import Ledger
from steel_megatron.data.tokenizing.sentencepiece_training import train_sentencepiece
from steel_megatron.data.tokenizing.tokenizer import SentencePieceTokenizer
from steel_megatron.errors import DataError, SteelError
from steel_megatron.hf.texts import tokenizer_of_run
from steel_megatron.log import setup_logging
from tests.data.corpora import write
from tests.distributed import run_distributed
from tests.train.small_run import small_run
from tests.train.test_loop import ALONE, losses, make_run, write_corpus


def _in(folder: Path, run: RunConfig) -> Path:
    """Train in a folder; the last checkpoint's path."""
    from steel_megatron.train.loop import pretrain

    os.chdir(folder)
    return folder / pretrain(run).checkpoint


def _journey(root: Path) -> dict[str, list[tuple[int, float]]]:
    """The losses of a run that goes on where it was, was moved with its data, and without, by the place."""
    first, whole, data, alone = (root / name for name in ("first", "whole", "data", "alone"))
    (first / "data").mkdir(parents=True)
    write_corpus(first / "data/train", 60, 0)
    write_corpus(first / "data/appended", 60, 2)
    write_corpus(first / "data/valid", 12, 1)
    settings = DataConfig(train=["data/train", str(first / "data/appended")], validation=["data/valid"])
    run = make_run(settings, Path("runs/a"), stop_after_step=2)
    weights = _in(first, make_run(settings, Path("runs/weights"), train_steps=1))
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, init_from=str(weights)))
    half = _in(first, run)
    assert half.name == "step_00000002"
    for target in (whole, alone):
        shutil.copytree(first, target)
        shutil.rmtree(target / "runs/weights")  # which only a new run needs
    shutil.copytree(first / "data", data / "corpora")
    shutil.rmtree(alone / "data")
    rest = dataclasses.replace(run, training=dataclasses.replace(run.training, stop_after_step=None))
    _in(first, rest)
    found = {"first": losses(rest)}
    shutil.rmtree(first)
    _in(whole, dataclasses.replace(rest, data=dataclasses.replace(settings, train=["data/train", "data/appended"])))
    found["whole"] = losses(rest)
    named = dataclasses.replace(
        settings,
        train=[str(data / "corpora/train"), str(data / "corpora/appended")],
        validation=[str(data / "corpora/valid")],
    )
    there = dataclasses.replace(rest.checkpoint, directory=str(alone / "runs/a"))
    rest = dataclasses.replace(rest, data=named, checkpoint=there)
    _in(root, rest)
    found["alone"] = losses(rest)
    assert [one.prefix for one in Ledger.load(alone / "runs/a/ledger.json").history.corpora] == named.train
    assert [one.prefix for one in Ledger.load(whole / "runs/a/ledger.json").history.corpora] == [
        "../../data/train",
        "../../data/appended",
    ]
    return found


def _removed(root: Path) -> tuple[str, list[str]]:
    """What a run says whose folder is removed after its first step, and what is there afterwards."""
    from steel_megatron.train.callbacks import Callback
    from steel_megatron.train.loop import pretrain

    class Remover(Callback):
        def after_step(self, run: Any, result: Any) -> None:
            if result.step == 1:
                # At once, for TensorBoard's thread may write a file while a folder is emptied.
                (root / "run").rename(root / "gone")
                shutil.rmtree(root / "gone")

    data = DataConfig(train=[write_corpus(root / "train", 60, 0)])
    try:
        pretrain(make_run(data, root / "run", train_steps=2), [Remover()])
    except SteelError as error:
        return str(error), sorted(path.name for path in root.glob("*"))
    return "", []


def _taken_over(root: Path) -> tuple[str, list[str]]:
    """What a run says whose lease another machine has taken over, and its checkpoints."""
    from steel_megatron.train.callbacks import Callback
    from steel_megatron.train.loop import pretrain

    class Taker(Callback):
        def after_step(self, run: Any, result: Any) -> None:
            (root / "run" / "run.lease").write_text('{"host": "node7", "process": 12}')

    data = DataConfig(train=[write_corpus(root / "train", 60, 0)])
    try:
        pretrain(make_run(data, root / "run", train_steps=2), [Taker()])
    except SteelError as error:
        return str(error), [path.name for path in root.glob("run/checkpoints/*")]
    return "", []


@pytest.mark.slow
def test_a_run_whose_lease_was_taken_over_ends(tmp_path: Path) -> None:
    said, checkpoints = run_distributed(_taken_over, 1, tmp_path)[0]
    assert f"process 12 on node7 has taken over {tmp_path}/run" in said and not checkpoints
    assert (tmp_path / "run" / "run.lease").exists()  # the other's


@pytest.mark.slow
def test_a_folder_that_is_removed_ends_the_run(tmp_path: Path) -> None:
    said, left = run_distributed(_removed, 1, tmp_path)[0]
    assert f"{tmp_path}/run was removed or moved while the run was under way" in said and "step 2 is not saved" in said
    assert left == ["train.bin", "train.idx", "train.json"]


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_moved_to(tmp_path: Path) -> None:
    found = run_distributed(_journey, 1, tmp_path)[0]
    assert [step for step, _ in found["first"]] == [1, 2, 3, 4, 5, 6]
    assert found["whole"] == found["alone"] == found["first"]


def test_a_tokenizer_is_found_around_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging()
    texts = ["The moon has tides.", "def f(x): return x + 1"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    wanted = SentencePieceTokenizer(train_sentencepiece(texts * 10, Path("old/tokenizer"), vocab_size=300))
    write(tmp_path / "corpus", [[1] * 20], tokenizer={"vocab_size": 300, "fingerprint": wanted.fingerprint})
    step = tmp_path / "new/runs/a/checkpoints/step_00000001"
    step.mkdir(parents=True)
    Ledger.create(["corpus"], 10, 1).save(step / "ledger.json")
    data = DataConfig(tokenizer_kind="sentencepiece", tokenizer_path="old/tokenizer.model")
    run = dataclasses.replace(small_run(ALONE, "runs/a"), data=data)
    (step / "run.yaml").write_text(dump_yaml(run))
    assert tokenizer_of_run(step).fingerprint == wanted.fingerprint
    shutil.move("old/tokenizer.model", "kept.model")
    with pytest.raises(
        DataError, match=r"tokenizer old/tokenizer.model does not exist .*name it with --tokenizer_path"
    ):
        tokenizer_of_run(step)
    other = SentencePieceTokenizer(train_sentencepiece(texts[:1] * 10, Path("new/tokenizer"), vocab_size=290))
    assert other.fingerprint != wanted.fingerprint
    with pytest.raises(DataError, match=rf"another one \({other.fingerprint}, recorded is {wanted.fingerprint}\)"):
        tokenizer_of_run(step)
    (tmp_path / "new/old").mkdir()
    shutil.copyfile("kept.model", "new/old/tokenizer.model")
    assert tokenizer_of_run(step).fingerprint == wanted.fingerprint
    assert "was moved: it is read from" in capsys.readouterr().err
    shutil.copyfile("new/tokenizer.model", "old/tokenizer.model")
    assert tokenizer_of_run(step).fingerprint == other.fingerprint  # named by the settings
    assert f"has the fingerprint {other.fingerprint}; the corpora were made with" in capsys.readouterr().err
