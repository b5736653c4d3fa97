"""Executors other than this machine's own: Slurm's commands by stand-ins that run the scripts, and a local Ray."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path

import pytest

from steel_megatron.config import ExecutionConfig
from steel_megatron.data.cleaning import executors, stages
from steel_megatron.data.cleaning import pipeline as clean
from steel_megatron.data.cleaning.job import Job, Stage, Unit
from steel_megatron.data.cleaning.recipe import Recipe
from steel_megatron.errors import DataError
from tests.data.cleaning.test_pipeline import content
from tests.data.configured import clean_corpus
from tests.data.conftest import make_texts, write_jsonl

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
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_slurm_gives_the_same_bytes(
    recipe: Path, sources: list[str], slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "BYTES_A_DOCUMENT", 1 << 28)
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

    monkeypatch.setattr(executors, "live_jobs", live_jobs)
    options = {"executor": "slurm", "slurm_partition": "cpu", "tasks": 1, "slurm_poll_seconds": 0.01}
    clean_corpus(recipe, sources, tmp_path / "out", **options)
    assert next(answers, None) is None and (tmp_path / "out" / "funnel.json").exists()


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A stage of two units, which cannot be done."""
    monkeypatch.setattr(Stage, "name", "clean", raising=False)
    units = tuple(Unit({f"{number}.jsonl": number}, "text", 1) for number in range(2))
    return Stage(Job(Recipe(kind="text", operators=()), units, tmp_path))


@pytest.mark.parametrize(("needed", "asked"), [(1, 4), (4 << 30, 4), ((4 << 30) + 1, 5)])
def test_slurm_is_asked_for_enough_memory(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, asked: int
) -> None:
    monkeypatch.setattr(Stage, "memory", lambda self: needed)
    execution = ExecutionConfig(executor="slurm", slurm_partition="cpu")
    assert executors._executor(stage, execution, 1, tmp_path / "logs").mem_per_cpu_gb == asked


def test_a_failure_of_an_earlier_call_is_not_told_again(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "clean-000000.json").write_text('{"message": "the disk is full"}')

    def fails(*_: object) -> None:  # in another process, as over Slurm
        (tmp_path / "failures" / "clean-000001.json").write_text('{"message": "row 3 is broken"}')

    monkeypatch.setattr(executors, "_run", fails)
    with pytest.raises(DataError, match="row 3 is broken"):
        executors.run_stage(stage, ExecutionConfig())


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
def test_ray_gives_the_same_bytes(recipe: Path, sources: list[str], tmp_path: Path) -> None:
    import ray  # which takes seconds, so not at the top

    clean_corpus(recipe, sources, tmp_path / "local")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        clean_corpus(recipe, sources, tmp_path / "over_ray", executor="ray", workers=2)
    finally:
        ray.shutdown()
    assert content(tmp_path / "over_ray") == content(tmp_path / "local")
    report = json.loads((tmp_path / "over_ray" / "funnel.json").read_text())
    assert report["totals"]["documents_in"] == 60


def test_no_ray(recipe: Path, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DataError, match=r"executor ray needs the package ray .*pip install 'steel-megatron\[ray\]'"):
        clean_corpus(recipe, sources, tmp_path / "out", executor="ray")
