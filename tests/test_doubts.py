"""Settings that make no sense together are told, each in one line; those of the examples are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from steel_megatron.cli import main
from steel_megatron.config import CleanConfig, PreprocessConfig, RunConfig, doubts, from_dict, job_doubts, to_dict
from tests.data.corpora import write

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "examples").glob("*/pretrain*.yaml"))
DENSE: dict[str, Any] = {"model": {"ffn": "dense"}, "training": {"train_steps": 1000}}


def of(**sections: dict[str, Any]) -> list[str]:
    """The doubts of a run of 1,000 steps."""
    run = {name: {**DENSE.get(name, {}), **sections.get(name, {})} for name in {*DENSE, *sections}}
    return doubts(from_dict(RunConfig, run, "here"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_raise_none(recipe: Path) -> None:
    run = from_dict(RunConfig, yaml.safe_load(recipe.read_text(encoding="utf-8")), str(recipe))
    assert doubts(run) == []
    assert doubts(from_dict(RunConfig, to_dict(run), "again")) == []


@pytest.mark.parametrize(
    ("section", "beyond", "within", "message"),
    [
        ("optimizer", {"warmup_steps": 4000}, {"warmup_steps": 1000}, "4000 is over .* = 1000, .* ends at 25% of"),
        ("optimizer", {"lr": 0.0}, {"lr": 1e-9}, "lr is 0, so no step changes the weights"),
        (
            "optimizer",
            {"decay_steps": 100},
            {"decay_steps": 101},
            "decay_steps = 100 is not over .* = 100, so",
        ),
        (
            "optimizer",
            {"wsd_decay_steps": 5},
            {"wsd_decay_steps": 5, "lr_schedule": "wsd"},
            "is cosine, not",
        ),
        (
            "optimizer",
            {"lr_schedule": "constant", "min_lr": 1e-5},
            {"lr_schedule": "linear", "min_lr": 1e-5},
            "min_lr = 1e-05 has no effect: lr_schedule is constant",
        ),
        ("training", {"log_interval": 1001}, {"log_interval": 1000}, "log_interval = 1001 is over .* only at the end"),
        ("training", {"routing_metrics_interval": 1001}, {"routing_metrics_interval": 1000}, "never measured"),
        ("training", {"spike_window": 9}, {"spike_window": 9, "skip_spikes": 3.0}, "spike_window has no effect: skip_"),
        (
            "training",
            {"skip_spikes": 3.0, "spike_window": 1000},
            {"skip_spikes": 3.0, "spike_window": 999},
            "skip_spikes never skips a step",
        ),
        (
            "checkpoint",
            {"save_interval": 1001},
            {"save_interval": 1000},
            "= 1001 is over .* only at its end",
        ),
        (
            "data",
            {"train": ["a"], "validation": ["a"]},
            {"train": ["a"], "validation": ["b"]},
            "has a, which",
        ),
        ("training", {"objective": "sft"}, {"objective": "next_token"}, "init_from is not set, so sft begins with"),
    ],
)
def test_each_is_told_beyond_its_bound(
    section: str, beyond: dict[str, Any], within: dict[str, Any], message: str
) -> None:
    assert of(**{section: within}) == []
    (line,) = of(**{section: beyond})
    assert re.search(message, line), line


def test_finetuning_from_a_checkpoint_raises_none() -> None:
    start = {"init_from": "runs/a/checkpoints/step_00000001"}
    assert of(training={"objective": "sft_per_sample"}, checkpoint=start) == []
    assert len(of(training={"objective": "sft_per_sample"})) == 1


def test_a_validation_that_never_comes_needs_something_to_validate_on() -> None:
    assert of(training={"eval_interval": 2000}) == []
    (line,) = of(training={"eval_interval": 2000}, data={"validation": {"zh": ["z"]}})
    assert line == "training.eval_interval = 2000 is over train_steps = 1000, so the run is validated only at the end"


def test_of_jobs() -> None:
    recipe = {"recipe": "r.yaml"}
    assert job_doubts(CleanConfig(**recipe)) == []
    assert job_doubts(CleanConfig(**recipe, executor="slurm", slurm_partition="p", slurm_time="1:00")) == []
    told = job_doubts(CleanConfig(**recipe, slurm_partition="p"))
    assert told == ["slurm_partition has no effect: executor is local"]
    job: dict[str, Any] = {"inputs": ["a"], "output_prefix": "b", "tokenizer_path": "c", "seed": 3}
    assert job_doubts(PreprocessConfig(**job, valid_fraction=0.1)) == []
    assert job_doubts(PreprocessConfig(**job)) == [
        "seed has no effect: it splits off validation documents, and valid_fraction is 0"
    ]


def test_epochs_of_a_domain_without_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = str(tmp_path / "ledger.json")
    first, second = (write(tmp_path / name, [[place] * 40] * 3) for place, name in enumerate(("one", "two"), 1))
    assert main(["data", "create", ledger, first, "--sequence_length", "8"]) == 0
    append = ["data", "append", ledger, second, "--domain", "code", "--epochs", "2"]
    capsys.readouterr()
    assert main([*append, "--mixture", "default=1", "code=0"]) == 0
    line = "two is not read, whatever its epochs: the mixture gives its domain code the weight 0; change it with"
    assert capsys.readouterr().err.startswith(line)
    assert main(["data", "reweight", ledger, "one", "--epochs", "3"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["data", "reweight", ledger, "two", "--epochs", "3"]) == 0
    assert capsys.readouterr().err.startswith(line)
    assert main(["data", "mixture", ledger, "default=1", "code=1"]) == 0
    assert main(["data", "reweight", ledger, "two", "--epochs", "4"]) == 0
    assert capsys.readouterr().err == ""
