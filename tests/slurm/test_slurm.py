"""What runs over Slurm, on a real cluster of three nodes that this machine plays."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from steel_megatron.cli import main
from steel_megatron.config import DataConfig, dump_yaml
from steel_megatron.data.cleaning import pipeline as clean
from steel_megatron.data.ledger.ledger import Ledger
from steel_megatron.data.preprocessing import step as preprocess_step
from steel_megatron.errors import DataError
from tests import needs
from tests.data.cleaning.test_pipeline import content
from tests.data.configured import clean_corpus, preprocess
from tests.data.conftest import make_texts, write_jsonl
from tests.data.jobs import files_in, mixed_inputs
from tests.slurm.cluster import Cluster
from tests.train.small_run import LAYOUTS
from tests.train.test_loop import make_run, write_corpus

pytestmark = [needs.slurm.mark, pytest.mark.timeout(280), pytest.mark.slow]
PRETRAIN = Path(__file__).resolve().parents[2] / "examples/slurm/pretrain.sbatch"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(clean, "UNIT_BYTES", 60_000)
    path = tmp_path / "recipe.yaml"
    path.write_text("kind: text\noperators: [text_length_filter: {min_len: 40}, document_deduplicator]\n")
    return path


def test_cleaning_gives_the_same_bytes(inside: Cluster, recipe: Path, tmp_path: Path) -> None:
    sources = [str(write_jsonl(tmp_path / f"{number}.jsonl", make_texts(20, seed=number % 2))) for number in range(3)]
    clean_corpus(recipe, sources, tmp_path / "local")
    options = {"slurm_partition": "cpu", "slurm_memory_gb": 1, "slurm_poll_seconds": 0.5, "workers": 2}
    clean_corpus(recipe, sources, tmp_path / "over", executor="slurm", **options)
    assert content(tmp_path / "over") == content(tmp_path / "local")

    Path(sources[1]).write_text('{"text": 3}\n')
    with pytest.raises(DataError, match=r"1.jsonl, row 1, byte 0: key 'text' holds a int"):
        clean_corpus(recipe, sources, tmp_path / "failed", executor="slurm", **options)
    assert not (tmp_path / "failed").exists()
    with pytest.raises(DataError, match="sbatch refused the job"):
        clean_corpus(
            recipe, sources, tmp_path / "refused", executor="slurm", **{**options, "slurm_partition": "nowhere"}
        )


def test_preprocess_gives_the_same_bytes(
    inside: Cluster, sp_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess_step, "UNIT_BYTES", 1)
    inputs = mixed_inputs(tmp_path, 60)
    options = {"slurm_partition": "cpu", "slurm_memory_gb": 1, "slurm_poll_seconds": 0.5, "workers": 4, "tasks": 4}
    for name, where in {"local": {}, "over": {"executor": "slurm", **options}}.items():
        settings = {"on_bad_row": "skip", "valid_fraction": 0.2, "shard_size": 3000, **where}
        preprocess(inputs, tmp_path / name / "c", "sentencepiece", sp_model, **settings)
    assert files_in(tmp_path / "over") == files_in(tmp_path / "local")


def test_a_cancelled_array_is_submitted_again(
    inside: Cluster, sp_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first task cancels the whole array; the second call does what is left, with the bytes of one process."""
    monkeypatch.setattr(preprocess_step, "UNIT_BYTES", 1)
    inputs = mixed_inputs(tmp_path, 40)
    cancels = f'if mkdir {tmp_path}/cancelled; then scancel "$SLURM_ARRAY_JOB_ID"; sleep 60; fi; export PATH='
    setup = f'{cancels}"{Path(sys.executable).parent}:$PATH"'
    options = {"slurm_partition": "cpu", "slurm_memory_gb": 1, "slurm_poll_seconds": 0.3, "workers": 4, "tasks": 4}
    settings = {"on_bad_row": "skip", "shard_size": 3000}
    over = {**settings, **options, "executor": "slurm", "slurm_setup": setup}
    with pytest.raises(DataError, match="run the same command again to resume"):
        preprocess(inputs, tmp_path / "over" / "c", "sentencepiece", sp_model, **over)
    preprocess(inputs, tmp_path / "over" / "c", "sentencepiece", sp_model, **over)
    preprocess(inputs, tmp_path / "local" / "c", "sentencepiece", sp_model, **settings)
    assert files_in(tmp_path / "over") == files_in(tmp_path / "local")


def test_a_killed_driver_of_cleaning_is_started_again(
    inside: Cluster, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the tasks that its first call submitted, under which nothing is removed, and submits no others."""
    monkeypatch.undo()  # of the small units, which a driver in its own process does not have
    monkeypatch.setenv("SLURM_CONF", inside.environment["SLURM_CONF"])
    recipe.write_text("kind: text\noperators: [text_length_filter: {min_len: 40}]\n")
    sources = [str(write_jsonl(tmp_path / f"{number}.jsonl", make_texts(20, seed=number))) for number in range(2)]
    clean_corpus(recipe, sources, tmp_path / "local")
    setup = f'touch {tmp_path}/begun; export PATH="{Path(sys.executable).parent}:$PATH"; sleep 6'
    options = {"slurm_memory_gb": 1, "slurm_partition": "cpu", "slurm_setup": setup, "workers": 2}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    tool = [sys.executable, str(PRETRAIN.parents[2] / "tools" / "clean_corpus.py"), str(recipe), *words]
    driver = subprocess.Popen([*tool, "--executor=slurm", f"--output={tmp_path / 'over'}", "--sources", *sources])
    try:
        wait_for(lambda: (tmp_path / "begun").exists(), 60)
    finally:
        driver.kill()
        driver.wait()
    at_work = tmp_path / "over.partial" / "tmp" / "of-a-task"
    at_work.mkdir(parents=True)
    with pytest.raises(DataError, match=r"Slurm still runs \d+ for .*over.partial; end it \(scancel \d+\)"):
        clean_corpus(recipe, sources, tmp_path / "over")
    kept: list[bool] = []
    options["slurm_poll_seconds"] = 0.5
    with pytest.MonkeyPatch.context() as patched:
        sleep = time.sleep
        patched.setattr(time, "sleep", lambda seconds: (kept.append(at_work.exists()), sleep(seconds))[1])
        clean_corpus(recipe, sources, tmp_path / "over", executor="slurm", **options)
    assert kept and all(kept)
    assert content(tmp_path / "over") == content(tmp_path / "local")
    names = inside.run("squeue", "--states=all", "--noheader", "--format=%A %j").splitlines()
    jobs = dict(line.split() for line in names)  # one line for each task of an array
    last = jobs[max(jobs, key=int)]
    assert last.startswith("clean-clean-") and list(jobs.values()).count(last) == 1


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Return when something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_text(path: Path, text: str, seconds: float) -> None:
    """Return when a log has a text."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, path.read_text() if path.exists() else f"no {path.name}"
        time.sleep(0.2)


def test_a_requeued_run_goes_on_with_the_data_that_came(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_corpus(tmp_path / name, 200, seed) for seed, name in enumerate(("first", "second")))
    run = make_run(DataConfig(train=[first]), tmp_path / "run", LAYOUTS["tp2"], train_steps=100_000)
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    slurm.environment["PYTHON"] = sys.executable
    words = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = slurm.run("sbatch", "--parsable", *words, str(PRETRAIN), "run.yaml", cwd=tmp_path)
    log = tmp_path / f"steel-{job}.log"
    wait_for_text(log, "step      8 of", 120)
    assert main(["data", "append", str(tmp_path / "run/ledger.json"), second]) == 0
    assert "from where the run resumes: add second" in capsys.readouterr().out
    slurm.run("scontrol", "requeue", job)
    slurm.wait(job, "PENDING", 90)
    stopped = int(re.findall(r"asked to stop: step (\d+) is saved", log.read_text())[0])
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait two minutes
    wait_for_text(log, f"step {stopped + 40:6d} of", 90)
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED", 90)

    steps = [int(step) for step in re.findall(r"^step +(\d+) of", log.read_text(), re.MULTILINE)]
    assert steps == list(range(1, steps[-1] + 1))  # the log goes on, and no step comes twice
    size = run.training.global_batch_size
    settled = Ledger.load(tmp_path / "run/ledger.json")
    assert [event.at for event in settled.history.events] == [0, size * stopped]
    corpora = []
    for step in (stopped, *range(stopped + 1, stopped + 41)):
        assert (
            main(["data", "show", str(tmp_path / "run/ledger.json"), "--step", str(step), "--json_output", "true"]) == 0
        )
        corpora.append({json.loads(line)["corpus"] for line in capsys.readouterr().out.splitlines()})
    assert corpora[0] == {"first"} and set.union(*corpora[1:]) == {"first", "second"}
