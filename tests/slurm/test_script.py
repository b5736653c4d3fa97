"""Batch scripts and what is wrong with settings; no Slurm is needed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from steel_megatron.cli import main
from steel_megatron.slurm.queue import meant

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "examples/quickstart/pretrain.yaml")


def rendered(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["slurm", "render", "--config", CONFIG, *options]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["slurm", "render", "--config", CONFIG, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_script_asks_for_what_was_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = rendered(capsys, "--nodes=2", "--gpus-per-node=2", "--spare-nodes=1", "--time=24:00:00", "--partition=gpu")
    words = directives(script)
    for word in ("--nodes=3", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=24:00:00", "--partition=gpu"):
        assert word in words
    assert "--signal=TERM@300" in words and "--requeue" in words and "--no-kill" in words
    assert "--counts 2 " in script and "{{" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0

    script = rendered(capsys, "--nodes=1-2", "--processes_per_node=2", "--time=10", "--preflight=false")
    words = directives(script)
    assert "--nodes=2" in words and "--signal=TERM@60" in words
    assert not any(word.startswith(("--gpus", "--gres")) for word in words)
    assert "--no-kill" in words and "--no-kill" not in directives(rendered(capsys, "--nodes=2"))
    # Tensor parallel 2 and a global batch of 8 in micro batches of 4: one or two copies of the model.
    assert "--counts 2,1 --checked no" in script
    assert "--counts 4,2 --checked yes" in rendered(capsys, "--nodes=1-4", "--processes_per_node=1")


def test_the_settings_are_those_that_were_checked(capsys: pytest.CaptureFixture[str]) -> None:
    script = rendered(capsys, "--processes_per_node=2", "--training.train_steps=7", "--model.routing_mode=token")
    settings = json.loads(script.split("END_OF_SETTINGS'\n")[1].split("\nEND_OF_SETTINGS")[0])
    assert settings["training"]["train_steps"] == 7 and settings["model"]["routing_mode"] == "token"
    assert "nodes" not in settings and "precision" not in settings["training"]  # a default
    assert '-m steel_megatron pretrain --config "$settings"' in script
    assert "steel_megatron sft train" in rendered(capsys, "--processes_per_node=2", "--training.objective=sft")


def test_a_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "account: nlp\npartition: gpu\nsbatch: [--exclusive]\ncpus_per_process: 8\nmodules: [cuda/12.6]\n"
        "setup: [source env/bin/activate]\nenvironment: {NCCL_IB_HCA: mlx5, NCCL_DEBUG: 1}\ninterface: ib0\n"
        "container: {kind: pyxis, image: steel.sqsh, mounts: [/data, '/runs:/r']}\n"
    )
    script = rendered(capsys, "--processes_per_node=2", f"--profile={site}", "--partition=other")
    words = directives(script)
    assert "--account=nlp" in words and "--partition=other" in words and "--exclusive" in words
    assert "--partition=gpu" not in words and "--cpus-per-task=8" in words
    for line in ("module load cuda/12.6", "source env/bin/activate", "export NCCL_IB_HCA=mlx5", "export NCCL_DEBUG=1"):
        assert f"\n{line}\n" in script
    assert "export GLOO_SOCKET_IFNAME=ib0\n" in script and "export OMP_NUM_THREADS=8\n" in script
    assert "in_container=(--container-image=steel.sqsh --container-mounts=/data:/data,/runs:/r)" in script
    assert "next() { srun --overlap " in script
    site.write_text("container: {kind: apptainer, image: steel.sif, mounts: [/data]}\npython: python3\n")
    script = rendered(capsys, "--processes_per_node=2", f"--profile={site}")
    assert "python=(apptainer exec --nv --bind=/data steel.sif python3)" in script and "in_container=()" in script


def test_a_template(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    template = tmp_path / "own.sbatch"
    template.write_text("#!/bin/bash\n{{directives}}\n{{python}} on {{node_counts}}\n")
    assert rendered(capsys, "--processes_per_node=2", f"--template={template}").endswith("\npython on 1\n")
    template.write_text("#!/bin/bash\n{{pyton}}\n")
    assert f"{template}, line 2: there is no {{{{pyton}}}}; there are directives, " in refused(
        capsys, "--processes_per_node=2", f"--template={template}"
    )
    assert "template nowhere cannot be read: No such file" in refused(
        capsys, "--processes_per_node=2", "--template=nowhere"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--nodes=3"],
            "3 nodes x 1 processes: a launch of 3 processes does not fit tensor x pipeline parallel = 2 x 1",
        ),
        (["--nodes=6"], "6 nodes x 1 processes: training.global_batch_size = 8 is not divisible by"),
        (["--nodes=two"], "nodes is 'two'; it must be a number such as 4, or FEWEST-MOST"),
        (["--nodes=4-2"], "nodes is '4-2'; it must be"),
        (["--nodes=0"], "nodes is '0'; it must be"),
        (["--nodes=2", "--time=tomorrow"], "time is 'tomorrow'; it must be a time as sbatch takes it"),
        (["--nodes=2", "--spare_nodes=-1"], "spare_nodes"),
        (["--nodes=2", "--profile=none.yaml"], "profile none.yaml cannot be read: No such file or directory"),
    ],
)
def test_wrong_settings(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion: gpu\n", "unknown key 'partion' in Profile; it has account, partition"),
        ("cpus_per_process: 0\n", "cpus_per_process"),
        ("container: {kind: docker, image: x}\n", "container: kind is 'docker'; it must be one of pyxis, apptainer"),
        ("container: {kind: pyxis}\n", "image"),
        ("- partition\n", "must hold lines such as 'partition: gpu'"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_wrong_profiles(text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(text)
    error = refused(capsys, "--processes_per_node=2", f"--profile={site}")
    assert message in error and "site.yaml" in error


def test_the_options_that_a_message_of_sbatch_may_mean() -> None:
    origins = {"partition": ("gpu", "profile site.yaml"), "gpus_per_node": ("8", "--gpus_per_node")}
    assert meant("invalid partition specified: gpu", origins) == " (partition is gpu, from profile site.yaml)"
    assert (
        meant("Invalid generic resource (gres) specification", origins) == " (gpus_per_node is 8, from --gpus_per_node)"
    )
    assert meant("Invalid qos specification", origins) == ""


def test_without_slurm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    for words in (["submit", "--config", CONFIG, "--processes_per_node=2"], ["status", "run"], ["cancel", "run"]):
        assert main(["slurm", *words]) == 2
        assert "squeue is not on this machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
