"""Runs that are jobs of the tests' Slurm."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import psutil
import pytest

from steel_megatron import events
from steel_megatron.cli import main
from steel_megatron.config import DataConfig, RunConfig, dump_yaml
from steel_megatron.slurm.queue import jobs_of
from steel_megatron.train.checkpoint_compare import compare
from steel_megatron.train.loop import pretrain
from tests.distributed import run_distributed
from tests.slurm.cluster import Cluster
from tests.train.small_run import LAYOUTS
from tests.train.test_loop import losses, make_run, write_corpus


@dataclasses.dataclass
class Submitted:
    """A run that is a job.

    Attributes:
        cluster: where it runs.
        run: its settings.
        job: the id of its job.
        options: of `slurm submit`.
    """

    cluster: Cluster
    run: RunConfig
    job: str
    options: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.run.checkpoint.directory)

    @property
    def log(self) -> str:
        """What it and its batch script have written."""
        path = self.folder.parent / f"{self.folder.name}-{self.job}.log"
        return path.read_text() if path.exists() else ""

    def of(self, *kinds: str) -> list[events.Event]:
        """Its events of some kinds."""
        return [event for event in events.read(self.folder) if event["event"] in kinds]

    def wait(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Return when something is so; the status can be read meanwhile."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.log[-3000:], events.read(self.folder))
            with redirect_stdout(io.StringIO()) as shown:
                assert main(["slurm", "status", str(self.folder), "--json_output"]) == 0
            assert json.loads(shown.getvalue())["step"] <= self.run.training.train_steps
            time.sleep(0.2)

    def wait_for_steps(self, launch: int, steps: int = 5) -> None:
        """Return when a launch, counted from 1, has done some steps."""

        def done() -> bool:
            counts = self.steps_of_launches()
            return len(counts) >= launch and counts[launch - 1] >= steps

        self.wait(done)

    def steps_of_launches(self) -> list[int]:
        """How many steps each launch has done so far."""
        counts: list[int] = []
        for line in self.log.splitlines():
            if line.startswith("training "):
                counts.append(0)
            elif re.match(r"step +\d+ of", line):
                counts[-1] += 1
        return counts

    def ranks(self) -> list[psutil.Process]:
        """Its training processes."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                if "pretrain" in words and f'"directory": "{self.folder}"' in words[-1] and words[0] == sys.executable:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def start_again_now(self, requeues: int = 1) -> None:
        """Let Slurm start the job at once when it was requeued so often; it would wait two minutes."""
        restarted = f"Restarts={requeues} "
        self.wait(lambda: restarted in self.cluster.run("scontrol", "--oneliner", "show", "job", self.job))
        self.cluster.wait(self.job, "PENDING", 90)
        # In the second in which its credential was revoked, a node would refuse the job.
        self.cluster.run("scontrol", "update", f"JobId={self.job}", "StartTime=now+3seconds")


def submit(cluster: Cluster, folder: Path, layout: str, steps: int, save_interval: int, **options: object) -> Submitted:
    """Submit a small run by the command.

    Args:
        cluster: where to.
        folder: for its corpus, settings and folder; the current one.
        layout: of two processes.
        steps: of the whole run.
        save_interval: steps between two checkpoints.
        options: of `slurm submit`, in place of two nodes without a check.
    """
    if not (folder / "corpus.bin").exists():
        write_corpus(folder / "corpus", 200, 0)
    if not (folder / "site.yaml").exists():
        (folder / "site.yaml").write_text(f"python: {sys.executable}\npartition: cpu\n")
    run = make_run(DataConfig(train=[str(folder / "corpus")]), folder / "run", LAYOUTS[layout], train_steps=steps)
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save_interval=save_interval))
    (folder / "run.yaml").write_text(dump_yaml(run))
    given = {"nodes": 2, "profile": "site.yaml", "preflight": "false", **options}
    words = ["slurm", "submit", "--config=run.yaml", *(f"--{name}={value}" for name, value in given.items())]
    assert main(words) == 0
    (job,) = jobs_of(run.checkpoint.directory)
    return Submitted(cluster, run, job.id, words)


def without_slurm(submitted: Submitted) -> RunConfig:
    """The same run in as many processes of this machine, straight through."""
    folder = submitted.folder.with_name("straight")
    checkpoint = dataclasses.replace(submitted.run.checkpoint, directory=str(folder))
    straight = dataclasses.replace(submitted.run, checkpoint=checkpoint)
    run_distributed(pretrain, 2, straight)
    return straight


def assert_equal(submitted: Submitted) -> None:
    """The last checkpoint is that of the straight run, and no step's loss is missing or another."""
    straight = without_slurm(submitted)
    last = f"checkpoints/step_{submitted.run.training.train_steps:08d}"
    assert not compare(submitted.folder / last, Path(straight.checkpoint.directory) / last).differences
    assert losses(submitted.run) == losses(straight)


def assert_close(submitted: Submitted, steps: int) -> None:
    """The losses of the first steps are those of the straight run, but for rounding; later it grows."""
    found, straight = losses(submitted.run), losses(without_slurm(submitted))
    assert [step for step, _ in found] == [step for step, _ in straight]
    assert [loss for _, loss in found[:steps]] == pytest.approx([loss for _, loss in straight[:steps]], rel=1e-5)
