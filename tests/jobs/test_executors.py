"""Executors other than this machine's own: Slurm's commands by stand-ins that run the scripts, and a local Ray."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.config import ExecutionConfig
from steel_megatron.data.cleaning import pipeline as clean
from steel_megatron.data.cleaning import steps
from steel_megatron.data.preprocessing import pipeline
from steel_megatron.data.preprocessing import step as preprocess_step
from steel_megatron.data.preprocessing.report import PreprocessReport
from steel_megatron.data.preprocessing.step import ChunkSizes
from steel_megatron.errors import DataError
from steel_megatron.jobs import cluster, run
from steel_megatron.jobs.step import JobStep, marker
from steel_megatron.signals import stop_signals
from tests.data.cleaning.test_pipeline import content
from tests.data.configured import clean_corpus, preprocess
from tests.data.conftest import make_texts, write_jsonl
from tests.data.jobs import files_in, mixed_inputs

RECIPE = "kind: text\noperators: [text_length_filter: {min_len: 40}, document_deduplicator]\n"

SBATCH = r"""#!/bin/bash
# Runs the tasks of an array at once, one after the other.
echo "$@" >> "$FAKE_SLURM/sbatch.log"
script="${@: -1}"
cp "$script" "$FAKE_SLURM/script.$(ls "$FAKE_SLURM" | wc -l)"
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
for task in $(seq 0 "$last"); do
    SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=node RUN_OFFSET=0 bash "$script" > "$FAKE_SLURM/task.$task.log" 2>&1
done
echo "Submitted batch job 1"
"""
SRUN = """#!/bin/bash
while [[ "$1" != launch_* ]]; do shift; done
exec "$@"
"""


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "UNIT_BYTES", 60_000)
    monkeypatch.setattr(preprocess_step, "UNIT_BYTES", 1)


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    return [str(write_jsonl(tmp_path / f"{number}.jsonl", make_texts(20, seed=number % 2))) for number in range(3)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands named like Slurm's, first on the path; also where they leave their logs."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, script in (
        ("sbatch", SBATCH),
        ("srun", SRUN),
        ("squeue", "#!/bin/bash\n"),
        ("scontrol", "#!/bin/bash\necho node\n"),
    ):
        (folder / name).write_text(script)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_slurm_gives_the_same_bytes(
    recipe: Path, sources: list[str], slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "BYTES_A_DOCUMENT", 1 << 28)
    clean_corpus(recipe, sources, tmp_path / "local")
    options = {"executor": "slurm", "slurm_partition": "cpu", "tasks": 2, "workers": 2, "slurm_poll_seconds": 0.01}
    report = clean_corpus(recipe, sources, tmp_path / "slurm_out", **options).report
    assert content(tmp_path / "slurm_out") == content(tmp_path / "local")
    scripts = [path.read_text() for path in slurm.glob("script.*")]
    assert len(scripts) == 3  # cleaning, comparison, writing; nothing else
    assert sum("#SBATCH --array=0-1%2" in script for script in scripts) == 2
    assert all("#SBATCH --partition=cpu" in script and "--qos" not in script for script in scripts)
    memory = {
        re.findall("--job-name=clean-([a-z]+)-", script)[0]: int(re.findall("--mem-per-cpu=([0-9]+)G", script)[0])
        for script in scripts
    }
    comparison = memory.pop("duplicates")  # which counts the heads of three files as some more documents
    compared = report["operators"][2]["documents_in"]
    assert memory == {"clean": 4, "deduplicate": 4}
    assert 1 + math.ceil(compared / 4) <= comparison <= 1 + math.ceil((compared + 30) / 4)


@pytest.mark.timeout(90)
def test_a_task_that_fails_on_slurm_says_why(recipe: Path, sources: list[str], slurm: Path, tmp_path: Path) -> None:
    Path(sources[1]).write_text('{"text": 3}\n')
    options = {"executor": "slurm", "slurm_partition": "cpu", "tasks": 1, "slurm_poll_seconds": 0.01}
    with pytest.raises(DataError, match=r"1.jsonl, row 1, byte 0: key 'text' holds a int"):
        clean_corpus(recipe, sources, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_controller_that_does_not_answer_is_asked_again(
    recipe: Path, sources: list[str], slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([DataError("no controller"), DataError("no controller")])

    def live_jobs(*asked: object) -> list[str]:
        for error in answers:
            raise error
        return []

    monkeypatch.setattr(cluster, "live_jobs", live_jobs)
    options = {"executor": "slurm", "slurm_partition": "cpu", "tasks": 1, "slurm_poll_seconds": 0.01}
    clean_corpus(recipe, sources, tmp_path / "out", **options)
    assert next(answers, None) is None and (tmp_path / "out" / "funnel.json").exists()


@dataclass(frozen=True)
class Words(JobStep):
    """A step of some units that write a word each."""

    at: Path
    broken: int | None = None
    units: int = 3
    job_name = "spell"
    name = "write"

    @property
    def folder(self) -> Path:
        return self.at

    @property
    def count(self) -> int:
        return self.units

    def work(self, number: int) -> None:
        if number == self.broken:
            raise DataError(f"unit {number} is broken")
        with (self.at / "words").open("a") as file:
            file.write(f"{number} ")
        self.mark(number)

    def words(self) -> list[str]:
        """What was written, sorted: the order of the tasks is free."""
        return sorted((self.at / "words").read_text().split())


@pytest.mark.parametrize(("tasks", "workers"), [(None, 1), (2, 1), (2, 2), (5, 3)])
def test_a_step_does_each_unit_and_resumes(tmp_path: Path, tasks: int | None, workers: int) -> None:
    execution = ExecutionConfig(tasks=tasks, workers=workers)
    with pytest.raises(DataError, match="unit 1 is broken"):
        run.run_step(Words(tmp_path, broken=1), execution)
    assert Words(tmp_path).missing()[0] == 1
    run.run_step(Words(tmp_path), execution)
    words = Words(tmp_path).words()  # a process that was ended may have done a unit and not marked it
    assert (words if workers == 1 else sorted(set(words))) == ["0", "1", "2"] and not Words(tmp_path).missing()
    run.run_step(Words(tmp_path, broken=1), execution)  # nothing is left to do


@dataclass(frozen=True)
class SlowWords(Words):
    """Its units take long, and end in an orderly way when they are told to."""

    def work(self, number: int) -> None:
        with stop_signals():
            (self.at / f"{number}.begun").touch()
            time.sleep(3)


def test_workers_that_are_told_to_end_begin_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool has handed out more tasks than are being done."""

    def interrupted(*_: object) -> None:
        while len(list(tmp_path.glob("*.begun"))) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_step(SlowWords(tmp_path, units=6), ExecutionConfig(workers=2))
    assert len(list(tmp_path.glob("*.begun"))) == 2


_AFTERWARDS = """
import multiprocessing, signal, sys
from pathlib import Path
from steel_megatron.config import ExecutionConfig
from steel_megatron.jobs.run import run_step
from tests.jobs.test_executors import Words

def blocked(path):
    Path(path).write_text(str(signal.pthread_sigmask(signal.SIG_BLOCK, [])))

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run_step(Words(folder), ExecutionConfig(tasks=2, workers=2))
    process = multiprocessing.get_context("forkserver").Process(target=blocked, args=(str(folder / "blocked"),))
    process.start()
    process.join()
"""


def test_processes_that_are_started_afterwards_can_be_stopped(tmp_path: Path) -> None:
    """Those of the same fork server, such as a run's, would never see the SIGTERM of a scheduler."""
    script, root = tmp_path / "script.py", str(Path(__file__).resolve().parents[2])
    script.write_text(_AFTERWARDS)
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, script, tmp_path], env=environment, check=True, timeout=60)
    assert (tmp_path / "blocked").read_text() == "set()"


_WITHOUT_ITS_SERVER = """
import os, signal, sys, threading
from pathlib import Path
from steel_megatron.config import ExecutionConfig
from steel_megatron.jobs.run import run_step
from steel_megatron.log import exit_code
from tests.jobs.test_executors import Words

class Kills(Words):
    def work(self, number):
        os.kill(os.getppid(), signal.SIGKILL)
        threading.Event().wait()

if __name__ == "__main__":
    sys.exit(exit_code(lambda: run_step(Kills(Path(sys.argv[1])), ExecutionConfig(tasks=2, workers=2))))
"""


def test_a_job_whose_fork_server_is_killed_ends_with_a_line_and_resumes(tmp_path: Path) -> None:
    script, root = tmp_path / "script.py", str(Path(__file__).resolve().parents[2])
    script.write_text(_WITHOUT_ITS_SERVER)
    environment = {**os.environ, "PYTHONPATH": root}
    job = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, timeout=120)
    said = job.stderr.decode()
    assert job.returncode == 2 and "error: a worker process was killed, perhaps for want of memory" in said, said
    assert "Traceback" not in said
    run.run_step(Words(tmp_path), ExecutionConfig())
    assert Words(tmp_path).words() == ["0", "1", "2"]


@pytest.mark.parametrize(("needed", "asked"), [(1, 4), (4 << 30, 4), ((4 << 30) + 1, 5)])
def test_slurm_is_asked_for_enough_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, asked: int
) -> None:
    monkeypatch.setattr(Words, "memory", lambda self: needed)
    execution = ExecutionConfig(executor="slurm", slurm_partition="cpu")
    assert cluster._executor(Words(tmp_path), execution, 1, tmp_path / "logs").mem_per_cpu_gb == asked


def test_a_failure_of_an_earlier_call_is_not_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "write-000000.json").write_text('{"message": "the disk is full"}')

    def fails(*_: object) -> None:  # in another process, as over Slurm
        (tmp_path / "failures" / "write-000001.json").write_text('{"message": "row 3 is broken"}')

    monkeypatch.setattr(run, "_run_here", fails)
    with pytest.raises(DataError, match="row 3 is broken"):
        run.run_step(Words(tmp_path), ExecutionConfig())


@pytest.mark.timeout(90)
def test_a_marker_that_is_gone_is_believed_not_datatrove(tmp_path: Path, slurm: Path) -> None:
    """What a unit wrote turned out to be damaged: its task runs again though datatrove has it as complete."""
    execution = ExecutionConfig(executor="slurm", slurm_partition="cpu", slurm_poll_seconds=0.01, tasks=1)
    step = Words(tmp_path / "job")
    step.at.mkdir()
    run.run_step(step, execution)
    marker(step.at, Words.name, 1).unlink()
    run.run_step(step, execution)
    assert step.words() == ["0", "1", "1", "2"]


def test_a_task_that_begins_elsewhere_finds_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    execution = ExecutionConfig(executor="slurm", slurm_partition="cpu")
    executor = cluster._executor(Words(Path("job")), execution, 1, Path("job/logs"))
    (task,) = executor.pipeline
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    task(rank=0, world_size=1)
    assert Words(tmp_path / "job").words() == ["0", "1", "2"]


def test_no_ray_cluster(recipe: Path, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray  # which takes seconds, so not at the top

    def refused(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster\nat all")

    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(DataError, match=r"cannot use Ray .*: Failed to connect to Ray cluster$"):
        clean_corpus(recipe, sources, tmp_path / "out", executor="ray")


def test_no_slurm(recipe: Path, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(DataError, match="executor slurm needs Slurm's commands, and sbatch is not on this machine"):
        clean_corpus(recipe, sources, tmp_path / "out", executor="slurm", slurm_partition="cpu")


def test_slurm_refuses(recipe: Path, sources: list[str], slurm: Path, tmp_path: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2; exit 1\n")
    with pytest.raises(DataError, match=r"sbatch refused the job \(exit code 1\)"):
        clean_corpus(recipe, sources, tmp_path / "out", executor="slurm", slurm_partition="cpu")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_ray_gives_the_same_bytes(recipe: Path, sources: list[str], sp_model: Path, tmp_path: Path) -> None:
    import ray  # which takes seconds, so not at the top

    clean_corpus(recipe, sources, tmp_path / "local")
    tokenize(tmp_path, sp_model, "local")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        clean_corpus(recipe, sources, tmp_path / "over_ray", executor="ray", workers=2)
        tokenize(tmp_path, sp_model, "ray", executor="ray", workers=2, tasks=2)
    finally:
        ray.shutdown()
    assert content(tmp_path / "over_ray") == content(tmp_path / "local")
    assert files_in(tmp_path / "tokens_ray") == files_in(tmp_path / "tokens_local")
    report = json.loads((tmp_path / "over_ray" / "funnel.json").read_text())
    assert report["totals"]["documents_in"] == 60


def tokenize(folder: Path, model: Path, name: str, **options: Any) -> PreprocessReport:
    """Preprocess three files of several kinds into ``tokens_NAME``."""
    files = [f"{folder}/a.jsonl", f"{folder}/b.jsonl.gz", f"firefly={folder}/c.jsonl"]
    inputs = (
        files if (folder / "c.jsonl").exists() else mixed_inputs(folder, 60)
    )  # which have another age when made anew
    options = {
        "on_bad_row": "skip",
        "valid_fraction": 0.2,
        "shard_size": 3000,
        "pace": ChunkSizes(1000, 3000),
        **options,
    }
    return preprocess(inputs, folder / f"tokens_{name}" / "c", "sentencepiece", model, **options)


ON_SLURM = {"executor": "slurm", "slurm_partition": "cpu", "slurm_poll_seconds": 0.01}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("tasks", [None, 2])
def test_preprocess_over_slurm_gives_the_same_bytes(
    sp_model: Path, slurm: Path, tmp_path: Path, tasks: int | None
) -> None:
    reports = [tokenize(tmp_path, sp_model, "local"), tokenize(tmp_path, sp_model, "slurm", tasks=tasks, **ON_SLURM)]
    assert files_in(tmp_path / "tokens_slurm") == files_in(tmp_path / "tokens_local")
    assert reports[0].sources == reports[1].sources and reports[0].unigram_entropy == reports[1].unigram_entropy
    (script,) = (path.read_text() for path in slurm.glob("script.*"))
    assert f"#SBATCH --array=0-{(tasks or 3) - 1}%" in script and "--job-name=preprocess-encode-" in script


def test_the_folder_of_submitted_tasks_stays(
    sp_model: Path, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before any task wrote something: they are still to come."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "_wait_for_slurm", interrupted)
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'Submitted batch job 1'\n")
    with pytest.raises(KeyboardInterrupt):
        tokenize(tmp_path, sp_model, "slurm", **ON_SLURM)
    assert (tmp_path / "tokens_slurm" / "c.partial" / "plan.json").exists()


@pytest.mark.parametrize(("tasks", "workers"), [(1, 1), (2, 2)])
def test_preprocess_by_tasks_of_this_machine_gives_the_same_bytes(
    sp_model: Path, tmp_path: Path, tasks: int, workers: int
) -> None:
    tokenize(tmp_path, sp_model, "local")
    tokenize(tmp_path, sp_model, "tasks", tasks=tasks, workers=workers)
    assert files_in(tmp_path / "tokens_tasks") == files_in(tmp_path / "tokens_local")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("unmarked", [(0,), (0, 1, 2)])
def test_a_job_moves_between_executors(
    sp_model: Path, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmarked: tuple[int, ...]
) -> None:
    """Done over Slurm but for the first unit, with or without the marks of the others; finished here."""
    tokenize(tmp_path, sp_model, "local")
    out = tmp_path / "tokens_moved"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "write_record", lambda *_: signal.raise_signal(signal.SIGINT))
        tokenize(tmp_path, sp_model, "moved", tasks=3, **ON_SLURM)
    for unit in unmarked:
        marker(out / "c.partial", "encode", unit).unlink()
    shutil.rmtree(out / "c.partial" / "segments" / "000000")
    kept = {name: data for name, data in files_in(out).items() if "/segments/00000" in name}
    assert any("/000001/" in name for name in kept)
    with pytest.raises(DataError, match=r"a\.jsonl, row 21, byte \d+: key 'text' holds null.*is kept"):
        tokenize(tmp_path, sp_model, "moved", on_bad_row="stop")
    assert kept.items() <= files_in(out).items()
    shutil.rmtree(out / "c.partial" / "segments" / "000000")
    tokenize(tmp_path, sp_model, "moved")
    assert files_in(out) == files_in(tmp_path / "tokens_local")


def test_no_ray(recipe: Path, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DataError, match=r"executor ray needs the package ray .*pip install 'steel-megatron\[ray\]'"):
        clean_corpus(recipe, sources, tmp_path / "out", executor="ray")
