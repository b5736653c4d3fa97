"""Steps that are skipped: which, what they leave, and that a resume and another layout decide alike."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steel_megatron.cli import main
from steel_megatron.config import DataConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.errors import CheckpointError, SteelError
from steel_megatron.train import bad_steps
from steel_megatron.train.bad_steps import BadSteps
from steel_megatron.train.loop import pretrain
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, own_batches, small_run
from tests.train.test_loop import make_run
from tests.train.test_random_states import hashes

NAN, SPIKE = 21, 19
"""Documents that ruin a step, by their number in a corpus."""


def oracle(losses: list[float], norms: list[float], deviations: float, window: int) -> list[bool]:
    """Which steps are skipped, by the definition."""
    accepted: list[tuple[float, float]] = []
    skipped = []
    for pair in zip(losses, norms, strict=True):
        bad = not all(map(math.isfinite, pair))
        if not bad and len(accepted) >= window:
            last = np.array(accepted[-window:])
            bad = bool((np.array(pair) > last.mean(0) + deviations * last.std(0)).any())
        skipped.append(bad)
        if not bad:
            accepted.append(pair)
    return skipped


def test_decisions_follow_the_definition_and_survive_a_checkpoint(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    losses, norms = random.normal(3, 0.1, 300), random.normal(1, 0.2, 300)
    losses[random.integers(0, 300, 12)] += 0.5
    norms[random.integers(0, 300, 12)] *= 4
    losses[[20, 100]], norms[[60, 101]] = np.nan, np.inf
    training = TrainingConfig(skip_non_finite_steps=2, skip_spikes=2.5, spike_window=16, skip_spikes_in_a_row=4)
    wanted = oracle(losses.tolist(), norms.tolist(), 2.5, 16)
    assert 20 < sum(wanted) < 60
    policy, found = BadSteps(training), []
    for step, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True), 1):
        found.append(policy.why_skip(step, loss, norm, 5) is not None)
        assert policy.too_many is None
        (tmp_path / bad_steps.FILE).write_text(bad_steps.dumps(policy.history))
        policy = BadSteps(training)
        policy.restore(bad_steps.load(tmp_path))
    assert found == wanted
    assert [one.step for one in policy.history.skipped] == [step for step, bad in enumerate(wanted, 1) if bad]
    assert policy.history.skipped[[one.step for one in policy.history.skipped].index(21)].loss == "nan"


def test_too_many_in_a_row_end_the_run() -> None:
    training = TrainingConfig(skip_non_finite_steps=2, skip_spikes=3.0, spike_window=2, skip_spikes_in_a_row=1)
    policy = BadSteps(training)

    def ends(*steps: tuple[float, float, int]) -> list[str | None]:
        return [(policy.why_skip(1, *step), policy.too_many)[1] for step in steps]

    nan, good, empty = (math.nan, 1.0, 4), (1.0, 1.0, 4), (0.0, 0.0, 0)
    assert ends(nan, nan, good, nan, empty, nan, nan) == [None] * 6 + ["training.skip_non_finite_steps is 2"]
    policy = BadSteps(training)
    high = (9.0, 1.0, 4)
    assert ends(high, good, high, good, high, (1.0, math.inf, 4), high)[-1] is None  # high ones are accepted at first
    policy = BadSteps(training)
    assert ends(good, good, high, good, high, empty, high) == [None] * 6 + ["training.skip_spikes_in_a_row is 1"]
    assert ends((1.0, 9.0, 4))[0] is not None


def test_a_checkpoint_of_an_earlier_version_has_no_history(tmp_path: Path) -> None:
    assert bad_steps.load(tmp_path) == bad_steps.History()


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("{", "Expecting"),
        ('{"losses": [1.0]}', "1 losses and 0 grad_norms"),
        ('{"losses": [NaN], "grad_norms": [1.0]}', "losses is [nan]; it must be a list of finite numbers"),
        ('{"skipped": [{"step": 0, "why": "", "loss": 1, "grad_norm": 1}]}', "step is 0"),
        ('{"skipped": [{"step": 1, "why": "", "loss": 1, "grad_norm": 1, "documents": {"a": 1}}]}', "documents"),
        ('{"other": 1}', "unknown field 'other'"),
    ],
)
def test_a_damaged_history_is_named(tmp_path: Path, content: str, wrong: str) -> None:
    (tmp_path / bad_steps.FILE).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(wrong)) as raised:
        bad_steps.load(tmp_path)
    assert str(tmp_path / bad_steps.FILE) in str(raised.value) and "\n" not in str(raised.value)


def skipping(run: RunConfig, **training: Any) -> RunConfig:
    settings = {"skip_non_finite_steps": 1, **training}
    return dataclasses.replace(run, training=dataclasses.replace(run.training, **settings))


def weights_after(run: RunConfig) -> list[bool]:
    """Whether a skipped step leaves what a run without it has, before and after a checkpoint."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint, checkpoint_save
    from steel_megatron.train.engine import Engine

    topology = initialize(run.parallel)

    def weights(engine: Engine) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in engine.stage.parameters()]

    skips, plain = Engine(run, topology), Engine(run, topology)
    skips.step(own_batches(run, 1, topology))
    before = weights(skips)
    # The embedding's gradient goes to main_grad itself: no hook sees it.
    ruin = skips.stage.decoder.final_layernorm.weight.register_hook(lambda gradient: gradient * math.nan)
    skipped = skips.step(own_batches(run, 2, topology)).skipped
    assert skipped is not None and skipped.startswith("the gradient's norm is nan"), skipped
    ruin.remove()
    unchanged = all(torch.equal(*pair) for pair in zip(before, weights(skips), strict=True))
    checkpoint_save.save(skips, 16)
    resumed = Engine(run, topology)
    checkpoint.load(resumed, checkpoint.read_info(checkpoint.path_of(run, 2)))
    for engine in (skips, resumed):
        assert engine.step(own_batches(run, 3, topology)).step == 3
    for step in (1, 3):
        plain.step(own_batches(run, step, topology))
    same = [
        all(torch.equal(*pair) for pair in zip(weights(one), weights(plain), strict=True)) for one in (skips, resumed)
    ]
    return [unchanged, *same]


def test_a_skipped_step_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither in the weights nor in Adam's means and count, where the rate stays the same."""
    run = skipping(small_run(ParallelConfig(), str(tmp_path), num_layers=1))
    run = dataclasses.replace(run, optimizer=OptimizerConfig(lr=3e-3, warmup_steps=0, lr_schedule="constant"))
    assert run_distributed(weights_after, 1, run)[0] == [True, True, True]


def write_corpus(prefix: Path, documents: int) -> str:
    """Documents that count up to 89, each with a token in its middle that tells its number: 100 and that."""
    random = np.random.default_rng(5)
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(documents):
            tokens = (random.integers(0, 90) + np.arange(25)) % 90
            tokens[12] = 100 + number
            writer.add_document(tokens)
        writer.finalize({})
    return str(prefix)


def ruining(run: RunConfig) -> dict[str, Any]:
    """A run whose loss is not finite, or large, where a token says so: what it lost and told, and its checkpoint."""
    from steel_megatron.train.objective import OBJECTIVES, NextToken

    class Ruined(NextToken):
        def token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            losses = super().token_losses(logits, labels)
            factor = torch.where((labels == 100 + SPIKE).any(), 9.0, 1.0)
            return losses.masked_fill(labels == 100 + NAN, math.nan) * factor

    OBJECTIVES["ruined"] = Ruined
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("steel_megatron").addHandler(handler)
    try:
        summary, error = pretrain(run), ""
    except SteelError as raised:
        summary, error = None, str(raised)
    told = [line for line in lines if "is skipped" in line]
    losses = [] if summary is None else list(summary.losses)
    return {"losses": losses, "error": error, "told": told, "path": summary and summary.checkpoint}


def carried(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / bad_steps.FILE).read_text())["skipped"]


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(train=[write_corpus(tmp_path_factory.mktemp("corpora") / "bad", 100)])


def ruined_run(data: DataConfig, folder: Path, layout: str = "alone", **training: Any) -> RunConfig:
    parallel = ParallelConfig() if layout == "alone" else LAYOUTS[layout]
    settings = {"train_steps": 12, "objective": "ruined", "skip_spikes": 6.0, "spike_window": 3, **training}
    run = skipping(make_run(data, folder, parallel), **settings)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, vocab_size=200),
        checkpoint=dataclasses.replace(run.checkpoint, save_interval=100),
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_resume_and_other_layouts_skip_the_same_steps(ruined: DataConfig, tmp_path: Path) -> None:
    straight = ruined_run(ruined, tmp_path / "straight")
    one = run_distributed(ruining, 1, straight)[0]
    skipped = carried(one["path"])
    assert [bool(re.match("the (loss|gradient's norm) is", entry["why"])) for entry in skipped] == [True, True]
    steps = [entry["step"] for entry in skipped]
    (ill,) = [entry for entry in skipped if entry["loss"] == "nan"]
    (high,) = [entry for entry in skipped if entry["loss"] != "nan"]
    assert NAN in ill["documents"]["bad"] and SPIKE in high["documents"]["bad"]
    assert high["loss"] > 2 * one["losses"][0]
    for entry, line in zip(skipped, one["told"], strict=True):
        first = 8 * (entry["step"] - 1)
        assert entry["samples"] == [first, first + 8]
        assert line.startswith(
            f"step {entry['step']} is skipped, nothing was updated: {entry['why']}; samples {first} to"
        )
        assert line.endswith(bad_steps.in_words(entry["documents"]))

    # Stopped between the two, or before both, and resumed under other layouts.
    for number, (before, processes, after, processes_after) in enumerate(
        (("alone", 1, "alone", 1), ("dp2", 2, "pp2", 2))
    ):
        run = ruined_run(ruined, tmp_path / str(number), before, stop_after_step=max(steps) - 1)
        first = run_distributed(ruining, processes, run)[0]
        rest = run_distributed(ruining, processes_after, ruined_run(ruined, tmp_path / str(number), after))
        together = first["losses"] + rest[0]["losses"]
        other = carried(rest[0]["path"])
        if number == 0:
            assert repr(together) == repr(one["losses"]) and other == skipped
            names = ("straight", str(number))
            ours, theirs = run_distributed(
                hashes, 1, [tmp_path / name / "checkpoints/step_00000012" for name in names]
            )[0]
            assert ours == theirs
        assert together == pytest.approx(one["losses"], rel=1e-5, nan_ok=True)
        for name in ("step", "samples", "documents"):
            assert [entry[name] for entry in other] == [entry[name] for entry in skipped]
        assert all(rank["losses"] == pytest.approx(rest[0]["losses"], nan_ok=True) for rank in rest)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_step_that_ends_the_run_is_left_out_by_hand(
    ruined: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [ruined_run(ruined, tmp_path / name, skip_non_finite_steps=0, skip_spikes=None) for name in ("a", "b")]
    runs.append(ruined_run(ruined, tmp_path / "c", "dp2", skip_non_finite_steps=0, skip_spikes=None))
    runs = [dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save_interval=1)) for run in runs]
    ended = [run_distributed(ruining, 1, runs[0])[0], None, run_distributed(ruining, 2, runs[2])[1]]
    for run, found in ((runs[0], ended[0]), (runs[2], ended[2])):
        assert found is not None
        step = int(re.match(r"step (\d+): the loss is nan", found["error"])[1])  # type: ignore[index]
        first = 8 * (step - 1)
        assert f"data skip {run.ledger_path} --samples {first}:{first + 8}" in found["error"]
        assert "\n" not in found["error"] and re.search(rf"are of documents bad .*\b{NAN}\b.*\. To", found["error"])
        main(["data", "skip", str(run.ledger_path), "--samples", f"{first}:{first + 8}"])
        assert f"skipped: samples {first} to {first + 7}" in capsys.readouterr().out
    rest = [run_distributed(ruining, 1, runs[0])[0], run_distributed(ruining, 2, runs[2])[0]]
    (entry,) = carried(rest[0]["path"])
    assert entry["why"] == "none of its labels counts" and entry["step"] == step and carried(rest[1]["path"]) == [entry]
    assert rest[0]["losses"][0] == 0.0 and len(rest[0]["losses"]) == 13 - step
    assert rest[0]["losses"] == pytest.approx(rest[1]["losses"], rel=1e-5)
