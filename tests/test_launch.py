"""The command line under torchrun and under Slurm's variables, as users start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steel_megatron.config import dump_yaml
from steel_megatron.parallel.topology import free_port
from tests.train.small_run import LAYOUTS, small_run
from tests.train.test_loop import write_corpus

pytestmark = pytest.mark.slow

COMMAND = ["-m", "steel_megatron", "pretrain", "--config", "run.yaml", "--data.train", "[corpus]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a corpus and the settings of a run with tensor parallel 2."""
    write_corpus(tmp_path / "corpus", 30, 0)
    (tmp_path / "run.yaml").write_text(dump_yaml(small_run(LAYOUTS["tp2"], "run", steps=2)))
    return tmp_path


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD"))}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def run(folder: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, *COMMAND], cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


def test_torchrun(folder: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run(folder, *launcher)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step      2 of 2") == 1  # one process speaks
    assert "Warning" not in done.stderr.replace("UserWarning: failed to load", "")
    assert (folder / "run/checkpoints/step_00000002/steel.json").is_file()


def test_slurm_variables(folder: Path) -> None:
    job = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, *COMMAND],
            cwd=folder,
            env=environment(**job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [task.communicate(timeout=120)[1] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "training TP2 PP1 EP1 DP1" in outputs[0] and "training TP2" not in outputs[1]


def test_a_second_job_on_the_same_folder_is_refused(folder: Path) -> None:
    from steel_megatron.errors import CheckpointError
    from steel_megatron.files import exclusive_lock

    (folder / "run.yaml").write_text(dump_yaml(small_run(LAYOUTS["dp2"], "run", steps=2)))
    with exclusive_lock(folder / "run" / "run", CheckpointError):
        done = run(folder, sys.executable)
    assert done.returncode == 2
    assert done.stderr.startswith("error: another job is writing to run/run")
    assert not (folder / "run").exists()  # the holder left nothing, and the refused job wrote nothing


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_batch_script_starts_one_task_per_gpu(tmp_path: Path) -> None:
    program(tmp_path / "srun", 'echo "OMP_NUM_THREADS=$OMP_NUM_THREADS $*"')
    script = Path(__file__).resolve().parents[1] / "examples/slurm/pretrain.sbatch"
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "8"}
    words = ["bash", str(script), "recipe.yaml", "--training.micro_batch_size", "4"]
    done = subprocess.run(words, env=environment(**variables) | variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        *("OMP_NUM_THREADS=8", "--kill-on-bad-exit=0", "--wait=60", "--cpus-per-task=8"),
        *("python", "-m", "steel_megatron", "pretrain", "--config", "recipe.yaml", "--training.micro_batch_size", "4"),
    ]
    assert subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False).returncode != 0


@pytest.mark.parametrize(("code", "restarts", "queued"), [(75, 0, 1), (76, 99, 1), (76, 100, 0), (2, 0, 0), (0, 0, 0)])
def test_the_batch_script_comes_again_if_that_helps(tmp_path: Path, code: int, restarts: int, queued: int) -> None:
    program(tmp_path / "srun", f"exit {code}")
    program(tmp_path / "scontrol", 'echo "$*"')
    script = Path(__file__).resolve().parents[1] / "examples/slurm/pretrain.sbatch"
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    words = ["bash", str(script), "recipe.yaml"]
    done = subprocess.run(words, env=environment() | variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "requeue 7\n" * queued)
