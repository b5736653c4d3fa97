"""What a run does when it is asked to stop."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from steel_megatron.config import DataConfig, RunConfig, dump_yaml
from steel_megatron.errors import ExitCode
from steel_megatron.launch import _together
from steel_megatron.train.callbacks import Callback, RunView
from steel_megatron.train.engine import StepResult
from steel_megatron.train.loop import pretrain
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS
from tests.train.test_checkpoint_save import saving_run, steps, when_tensors_are_synced
from tests.train.test_loop import losses, outcome, write_corpus

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("corpora")
    return DataConfig(train=[write_corpus(folder / "train", 60, 0)], validation=[write_corpus(folder / "valid", 12, 1)])


class Asked(Callback):
    """Sends a signal to its own process twice, during a step and once more after it; notes what is done then."""

    def __init__(self, number: signal.Signals, step: int, rank: int = 0) -> None:
        self.number, self.step, self.events = number, step, list[str]()
        self.asks = int(os.environ["RANK"]) == rank

    def kill(self) -> None:
        if self.asks:
            os.kill(os.getpid(), self.number)

    def before_step(self, run: RunView) -> None:
        if run.step + 1 == self.step:
            self.kill()
            self.kill()

    def after_step(self, run: RunView, result: StepResult) -> None:
        if result.step == self.step:
            self.kill()

    def after_validation(self, run: RunView, losses: Any) -> None:
        self.events.append(f"validation {run.step}")

    def after_save(self, run: RunView, path: Path) -> None:
        self.events.append(f"saved {int(path.name[-8:])}")


def asked(runs: list[RunConfig], number: signal.Signals, step: int, rank: int) -> list[tuple[bool, bool, list[str]]]:
    """Of each run: whether it stopped, whether it is finished, and what was done in which order."""
    told = []
    for run in runs:
        callback = Asked(number, step, rank)
        # One comes while the tensors are written: by then nothing must be able to end the save.
        with when_tensors_are_synced(step, lambda _, callback=callback: callback.kill()):
            summary = pretrain(run, [callback])
        told.append((summary.stopped, summary.finished, callback.events))
    return told


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_after_the_step_and_nothing_else_comes_first(
    corpora: DataConfig, tmp_path: Path, number: signal.Signals
) -> None:
    run = saving_run(corpora, tmp_path)
    first, second = run_distributed(asked, 1, [run, run], number, 3, 0)[0]
    assert first == (True, False, ["saved 2", "saved 3"])  # step 3 is one that is validated
    assert second == (False, True, ["saved 4", "validation 6", "saved 6"])


def test_a_signal_in_the_last_step_lets_the_run_finish(corpora: DataConfig, tmp_path: Path) -> None:
    told = run_distributed(asked, 1, [saving_run(corpora, tmp_path)], signal.SIGTERM, 6, 0)[0]
    assert told == [(False, True, ["saved 2", "validation 3", "saved 4", "saved 6", "validation 6"])]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(corpora: DataConfig, tmp_path: Path) -> None:
    run, straight = (saving_run(corpora, tmp_path / name, LAYOUTS["dp2"]) for name in ("stopped", "straight"))
    for told in run_distributed(asked, 2, [run], signal.SIGINT, 3, 1):
        assert told == [(True, False, ["saved 2", "saved 3"])]
    assert all(summary.finished for summary in run_distributed(outcome, 2, run))
    run_distributed(outcome, 2, straight)
    assert losses(run) == losses(straight)


IMPATIENT = """
import sys, threading
from unittest import mock
from steel_megatron.log import setup_logging
from steel_megatron.train import stop_signal
setup_logging()
with mock.patch.object(stop_signal, "GRACE_SECONDS", float(sys.argv[1])), stop_signal.StopSignal():
    print("ready", flush=True)
    threading.Event().wait()
"""


def test_ctrl_c_again_after_some_time_ends_a_save_that_hangs() -> None:
    def interrupted(grace: float, second: signal.Signals) -> tuple[int | None, str]:
        words = [sys.executable, "-c", IMPATIENT, str(grace)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            said = process.stderr.readline()
            time.sleep(0.3)
            process.send_signal(second)
            try:
                code = process.wait(20 if grace < 1 and second == signal.SIGINT else 0.5)
            except subprocess.TimeoutExpired:
                code = None
                process.kill()
            return code, said + process.stderr.read()

    first = "SIGINT: the step under way is finished and saved, then the run stops; Ctrl-C again after"
    code, said = interrupted(0.2, signal.SIGINT)
    assert code == ExitCode.INTERRUPTED and said.startswith(first) and said.count("\n") == 2
    assert interrupted(60, signal.SIGINT) == (None, f"{first} 60 s ends it at once\n")
    assert interrupted(0.2, signal.SIGTERM)[0] is None


def wait_for_step(process: subprocess.Popen[str], step: int) -> list[psutil.Process]:
    """Read the log up to a step; returns the processes that train."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step") and int(line.split()[1]) >= step:
            return psutil.Process(process.pid).children()
    raise AssertionError(f"ended with {process.wait()}")


def launched(folder: Path, *launcher: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD"))}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "steel_megatron", "pretrain", "--config", "run.yaml"],
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def long_run(corpora: DataConfig, tmp_path: Path) -> RunConfig:
    run = saving_run(corpora, tmp_path / "run", LAYOUTS["dp2"])
    settings = {"train_steps": 100_000, "eval_interval": 100_000}
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, **settings))
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    return run


TORCHRUN = ["--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
def test_the_launcher_passes_signals_on_and_says_how_the_run_ended(long_run: RunConfig, tmp_path: Path) -> None:
    with launched(tmp_path, "steel_megatron.launch", *TORCHRUN) as process:
        ranks = wait_for_step(process, 3)
        process.send_signal(signal.SIGUSR1)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(60) == ExitCode.STOPPED, said
    assert "SIGUSR1: the step under way" in said and "Traceback" not in said
    stopped = int(said.split("asked to stop: step ")[1].split()[0])
    assert steps(long_run, stopped)[0].is_dir()
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_ranks_do_not_train_on_when_torchrun_is_gone(long_run: RunConfig, tmp_path: Path) -> None:
    with launched(tmp_path, "torch.distributed.run", *TORCHRUN) as process:
        ranks = wait_for_step(process, 3)
        process.send_signal(signal.SIGUSR1)  # torchrun does not know it
        assert process.wait(60) == -signal.SIGUSR1
        psutil.wait_procs(ranks, timeout=60)
        assert not any(rank.is_running() for rank in ranks)
        assert process.stderr is not None
        said = process.stderr.read()
    stopped = int(said.split("asked to stop: step ")[1].split()[0])
    assert steps(long_run, stopped)[0].is_dir()


def test_exit_codes_of_several_processes() -> None:
    assert _together([0, 0]) == ExitCode.FINISHED
    assert _together([75, 75]) == _together([0, 75]) == ExitCode.STOPPED
    assert _together([75, -9]) == _together([76, -9, 75]) == ExitCode.LOST
    assert _together([76, 2]) == _together([2, 76, 75]) == ExitCode.WRONG_INPUT
    assert _together([76, 1, -15]) == ExitCode.FAILED
