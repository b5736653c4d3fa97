"""Runs as jobs of a real Slurm, from `slurm submit` to their end, through what happens to jobs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steel_megatron import events
from steel_megatron.cli import main
from steel_megatron.slurm.nodes import excluded as excluded_nodes
from steel_megatron.slurm.queue import jobs_of
from steel_megatron.slurm.script import TEMPLATE
from tests import needs
from tests.slurm import jobs
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Submitted, assert_close, assert_equal

pytestmark = [needs.slurm.mark, pytest.mark.timeout(600), pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def submit(inside: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Submitted]]:
    """Submits a run by the command; what is left of it ends with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(layout: str, steps: int, save_interval: int = 1000, **options: object) -> Submitted:
        return jobs.submit(inside, tmp_path, layout, steps, save_interval, **options)

    yield run
    for job in jobs_of(tmp_path / "run"):
        inside.run("scancel", job.id)


def test_preempted_twice_is_the_straight_run(submit: Callable[..., Submitted]) -> None:
    """A dependent job waits for the last step, and not for the first stop."""
    job = submit("tp2", 150)
    after = job.cluster.run(
        "sbatch", "--parsable", f"--dependency=afterok:{job.job}", "--output=/dev/null", "--wrap", "true"
    )
    for number in (1, 2):
        job.wait_for_steps(number)
        job.cluster.run("scontrol", "requeue", job.job)
        job.start_again_now(number)
    job.wait_for_steps(3)
    assert job.cluster.state(after) == "PENDING"
    job.cluster.wait(job.job, "COMPLETED", 120)
    job.cluster.wait(after, "COMPLETED", 60)
    assert [event["restart"] for event in job.of("begin")] == [0, 1, 2]
    assert not job.of("fault") and len(job.of("terminated")) == 2 and len(job.of("start", "resume")) == 3
    assert [event["reason"] for event in job.of("stop")] == ["signal", "signal", "finished"]
    assert_equal(job)


def test_cancelled_saves_and_does_not_come_again(
    submit: Callable[..., Submitted], capsys: pytest.CaptureFixture[str]
) -> None:
    job = submit("dp2", 100_000)
    after = job.cluster.run("sbatch", "--parsable", f"--dependency=afterok:{job.job}", "--wrap", "true")
    job.wait_for_steps(1)
    capsys.readouterr()
    assert main(job.options) == 2
    assert f"a run is under way in {job.folder}" in capsys.readouterr().err
    assert main(["slurm", "status", str(job.folder)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"job {job.job} RUNNING on ") and "of 100,000, loss" in shown and "goodput: " in shown
    assert main(["slurm", "cancel", str(job.folder)]) == 0
    job.cluster.wait(job.job, "FAILED", 90)
    assert [(event["code"], event["cause"]) for event in job.of("end")] == [(75, "cancelled")]
    (stop,) = job.of("stop")
    assert (job.folder / f"checkpoints/step_{stop['step']:08d}/steel.json").is_file()
    assert job.cluster.run("squeue", "--noheader", "--format=%T %r", f"--jobs={after}") in (
        "PENDING DependencyNeverSatisfied",
        "PENDING Dependency",
    )
    assert main(["slurm", "cancel", str(job.folder)]) == 2  # there is none any more
    job.cluster.run("scancel", after)


def test_it_saves_before_the_time_limit_without_a_signal(submit: Callable[..., Submitted], tmp_path: Path) -> None:
    """A template of the user's: a job whose end is nearer than the minute that is Slurm's shortest limit."""
    found, lines = re.subn(r"^ends=.*$", "ends=$(($(date +%s) + 20))", TEMPLATE.read_text(), flags=re.MULTILINE)
    assert lines == 1
    (tmp_path / "own.sbatch").write_text(found)
    job = submit("dp2", 100_000, template="own.sbatch")
    job.wait(lambda: bool(job.of("requeue")))
    (stop,) = job.of("stop")
    assert stop["reason"] == "time limit" and "SIGTERM" not in job.log
    assert [event["cause"] for event in job.of("requeue")] == ["time limit or signal"]
    job.cluster.wait(job.job, "PENDING", 60)
    assert main(["slurm", "cancel", str(job.folder)]) == 0
    job.cluster.wait(job.job, "CANCELLED", 60)


def test_a_crash_loop_ends_with_93(submit: Callable[..., Submitted], tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text(f'#!/bin/bash\n[ "$3" != pretrain ] || exit 1\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    (tmp_path / "broken.yaml").write_text(f"python: {broken}\n")
    job = submit("dp2", 10, profile="broken.yaml", max_faults=2)
    job.start_again_now()
    job.cluster.wait(job.job, "FAILED", 60)
    assert [event["event"] for event in events.read(job.folder)] == [
        *("submit", "begin", "fault", "fault", "requeue", "begin", "fault", "end")
    ]
    assert job.of("end")[0]["code"] == 93
    assert "3 crashes or lost nodes" in job.log and "max_faults allows 2" in job.log


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("partition", "nowhere", "partition specified: nowhere; .*(partition is nowhere, from --partition)"),
        ("gpus_per_node", 2, "generic resource.*(gpus_per_node is 2, from --gpus_per_node)"),
        ("constraint", "fast", "Invalid feature specification (constraint is fast, from --constraint)"),
    ],
)
def test_what_slurm_refuses_is_told_with_the_option(
    option: str,
    value: object,
    message: str,
    submit: Callable[..., Submitted],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    with pytest.raises(AssertionError):
        submit("dp2", 10, **{option: value})
    error = capsys.readouterr().err
    assert error.startswith("error: sbatch refused the job: ") and error.count("\n") == 1
    assert re.search(re.escape(message).replace(re.escape(".*"), ".*"), error), error
    assert not (tmp_path / "run").exists()


def test_a_bad_node_is_left_out_and_a_lost_one_replaced_by_fewer(
    submit: Callable[..., Submitted], inside: Cluster, tmp_path: Path
) -> None:
    """Three nodes: preflight leaves out one with another torch, then Slurm loses one, and the last one finishes."""
    first, odd, lost = inside.nodes
    (tmp_path / "other/torch-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "other/torch-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[ "${{SLURMD_NODENAME:-}}" != {odd} ] || export PYTHONPATH="{tmp_path}/other:$PYTHONPATH"\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (tmp_path / "site.yaml").write_text(f"python: {python}\n")
    job = submit("dp2", 100, 5, nodes="1-2", spare_nodes=1, preflight="true")
    job.wait_for_steps(1, 8)
    (excluded,) = job.of("excluded")
    assert excluded["node"] == odd and excluded["reason"].startswith("it has torch 1.0, the others 2.")
    assert excluded_nodes(job.folder) == {odd: excluded["reason"]}
    assert f"{odd} is left out: it has torch 1.0" in job.log
    inside.run("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    try:
        inside.wait(job.job, "COMPLETED", 200)
    finally:
        inside.run("scontrol", "update", f"NodeName={lost}", "State=RESUME")
    started, resumed = job.of("start", "resume")
    assert (started["processes"], started["layout"][-3:]) == (2, "DP2")
    assert (resumed["nodes"], resumed["processes"], resumed["layout"][-3:]) == (first, 1, "DP1")
    assert f"not on {lost}: it failed, and Slurm has taken it from the job" in job.log
    assert [(event["cause"], event["lost"]) for event in job.of("fault")] == [("node lost", [lost])]
    assert "the run continues with 1 instead of 2" in job.log
    assert resumed["step"] >= 5
    assert_close(job, resumed["step"] + 20)


def test_without_spare_nodes_slurm_requeues_and_the_lost_node_counts(
    submit: Callable[..., Submitted], inside: Cluster
) -> None:
    job = submit("dp2", 100_000, 5)
    job.wait_for_steps(1)
    inside.run("scontrol", "update", f"NodeName={inside.nodes[1]}", "State=DOWN", "Reason=test")
    try:
        job.wait(lambda: bool(job.of("terminated")) and job.of("fault") != [])
    finally:
        inside.run("scontrol", "update", f"NodeName={inside.nodes[1]}", "State=RESUME")
    assert [(event["cause"], event["lost"]) for event in job.of("fault")] == [("node lost", [inside.nodes[1]])]
    job.start_again_now()
    job.wait_for_steps(2, 1)
    assert [event["restart"] for event in job.of("begin")] == [0, 1] and len(job.of("resume")) == 1


def test_a_killed_slurmd_does_not_disturb_the_run(submit: Callable[..., Submitted], inside: Cluster) -> None:
    job = submit("pp2", 150)
    job.wait_for_steps(1)
    node = inside.nodes[1]
    inside.daemons[node].kill()
    inside.daemons[node].wait()
    job.wait_for_steps(1, 20)
    inside.start_node(node)
    inside.wait(job.job, "COMPLETED", 200)
    assert [event["event"] for event in job.of("start", "resume", "fault")] == ["start"]
    assert_equal(job)
