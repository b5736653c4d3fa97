"""Callbacks see what they are promised, and a run works wherever Python runs."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.config import DataConfig, RunConfig, dump_yaml
from steel_megatron.errors import ConfigError, SteelError
from steel_megatron.report import read_scalars
from steel_megatron.train.loop import TrainingSummary, pretrain
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS
from tests.train.test_loop import make_run, write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("corpora")
    prefixes = {name: write_corpus(folder / name, 12, seed) for seed, name in enumerate(("zh", "code"))}
    sets = {name: [prefix] for name, prefix in prefixes.items()}
    return DataConfig(train=[write_corpus(folder / "train", 60, 5)], validation=sets)


def watched(run: RunConfig, fail_at: str | None = None) -> tuple[TrainingSummary | str, list[tuple[str, Any]]]:
    """A run with a callback that notes every call."""
    from steel_megatron.train.callbacks import Callback, RunView
    from steel_megatron.train.engine import StepResult

    seen: list[tuple[str, Any]] = []

    class Watch(Callback):
        def start(self, run: RunView) -> None:
            self.note("start", run.step)
            assert run.config.model.num_layers == 2 and run.model.config.num_layers == 2

        def before_step(self, run: RunView) -> None:
            self.note("before_step", run.step)

        def after_step(self, run: RunView, result: StepResult) -> None:
            assert result.step == run.step
            self.note("after_step", result.loss)

        def after_validation(self, run: RunView, losses: Mapping[str, float]) -> None:
            self.note("after_validation", dict(losses))

        def after_save(self, run: RunView, path: Path) -> None:
            self.note("after_save", path.name)

        def stop(self, run: RunView) -> None:
            self.note("stop", run.step)

        def note(self, name: str, value: Any) -> None:
            seen.append((name, value))
            if name == fail_at:
                raise SteelError(f"{name} failed")

    try:
        return pretrain(run, callbacks=[Watch()]), seen
    except SteelError as error:
        return str(error), seen


def test_hooks_come_in_order_with_what_they_promise(data: DataConfig, tmp_path: Path) -> None:
    run = make_run(data, tmp_path, train_steps=2, eval_interval=1, routing_metrics_interval=2)
    summary, seen = run_distributed(watched, 1, run)[0]
    names = [name for name, _ in seen]
    step = ["before_step", "after_step", "after_validation"]
    assert names == ["start", *step, *step, "after_save", "stop"]
    values = dict(seen)
    assert [value for name, value in seen if name == "after_step"] == list(summary.losses)
    assert values["after_save"] == "step_00000002" and values["stop"] == 2
    assert set(values["after_validation"]) == {"zh", "code"} and values["after_validation"] == summary.validation_losses
    assert summary.validation_loss == pytest.approx(sum(summary.validation_losses.values()) / 2)
    scalars = read_scalars(run.tensorboard_dir)
    for name, loss in summary.validation_losses.items():
        assert scalars[f"validation/{name}/loss"][-1] == (2, pytest.approx(loss, rel=1e-6))
    routing = {name: points for name, points in scalars.items() if name.startswith("routing/")}
    assert len(routing) == 2 * (4 + run.model.num_experts)
    assert all([step for step, _ in points] == [2] for points in routing.values())
    shares = [routing[f"routing/layer_01/share_of_expert_{number}"][0][1] for number in range(run.model.num_experts)]
    assert sum(shares) == pytest.approx(1.0, rel=1e-6)


def test_each_validation_set_is_what_it_is_alone(data: DataConfig, tmp_path: Path) -> None:
    run = make_run(data, tmp_path / "both", train_steps=1)
    both = run_distributed(watched, 1, run)[0][0].validation_losses
    assert abs(both["zh"] - both["code"]) > 1e-4
    assert isinstance(data.validation, dict)
    for name, prefixes in data.validation.items():
        alone = dataclasses.replace(data, validation=prefixes)
        summary = run_distributed(watched, 1, make_run(alone, tmp_path / name, train_steps=1))[0][0]
        assert summary.validation_loss == pytest.approx(both[name], rel=1e-6)


@pytest.mark.parametrize("fail_at", ["start", "after_step"])
def test_what_started_is_stopped_after_an_error(data: DataConfig, tmp_path: Path, fail_at: str) -> None:
    run = make_run(data, tmp_path, LAYOUTS["dp2"], train_steps=2)
    for message, seen in run_distributed(watched, 2, run, fail_at):
        assert message == f"{fail_at} failed"
        assert [name for name, _ in seen][-1] == ("start" if fail_at == "start" else "stop")


def test_routing_is_measured_alike_under_a_layout(data: DataConfig, tmp_path: Path) -> None:
    measured = []
    for name, processes in (("alone", 1), ("tp2 pp2", 4)):
        layout = LAYOUTS.get(name)
        run = make_run(data, tmp_path / name, *([layout] if layout else []), train_steps=1, routing_metrics_interval=1)
        run_distributed(watched, processes, run)
        scalars = read_scalars(run.tensorboard_dir)
        measured.append({key: points for key, points in scalars.items() if key.startswith("routing/")})
    assert measured[0].keys() == measured[1].keys() and measured[0]
    for key, ((_, value),) in measured[0].items():
        assert measured[1][key][0][1] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_routing_figures_by_hand() -> None:
    """Two tokens on two axes, a slot's key on each: every number can be written down."""
    from steel_megatron.train.callbacks.routing import routing_figures

    scale = math.log(3)
    figures = routing_figures(torch.eye(2).unsqueeze(0) * 5, torch.eye(2).unsqueeze(-1), torch.tensor([scale]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)  # softmax of (log 3, 0) is (3/4, 1/4)
    cosine = 2 * 0.75 * 0.25 / (0.75**2 + 0.25**2)
    torch.testing.assert_close(figures, torch.tensor([entropy, entropy, cosine, scale, 0.5, 0.5]).double())


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_routing_figures_stay_in_their_bounds(experts: int, slots: int, tokens: int) -> None:
    from steel_megatron.train.callbacks.routing import routing_figures

    generator = torch.Generator().manual_seed(experts * 100 + slots * 10 + tokens)
    x = torch.randn(2, tokens, 5, generator=generator)
    figures = routing_figures(x, torch.randn(5, experts, slots, generator=generator), torch.tensor([2.0]))
    assert bool(((figures[:2] >= 0) & (figures[:2] <= 1 + 1e-12)).all()) and abs(float(figures[2])) <= 1 + 1e-9
    assert float(figures[4:].sum()) == pytest.approx(1.0)


def in_a_thread(run: RunConfig) -> TrainingSummary:
    found: list[TrainingSummary] = []
    thread = threading.Thread(target=lambda: found.append(pretrain(run)))
    thread.start()
    thread.join()
    return found[0]


def test_a_run_in_a_thread(data: DataConfig, tmp_path: Path) -> None:
    assert run_distributed(in_a_thread, 1, make_run(data, tmp_path, train_steps=1))[0].finished


def nested(run: RunConfig) -> tuple[TrainingSummary, str]:
    """A run during which another one is begun, and what that says."""
    from steel_megatron.train.callbacks import Callback, RunView

    said: list[str] = []

    class Another(Callback):
        def start(self, run: RunView) -> None:
            try:
                pretrain(run.config)
            except ConfigError as error:
                said.append(str(error))

    return pretrain(run, callbacks=[Another()]), said[0]


def test_one_run_at_a_time(data: DataConfig, tmp_path: Path) -> None:
    summary, said = run_distributed(nested, 1, make_run(data, tmp_path, train_steps=1))[0]
    assert summary.finished and said.startswith("a run is under way in this process already")


def test_two_runs_in_a_script_without_a_main_guard(data: DataConfig, tmp_path: Path) -> None:
    """As in a notebook: one run after another in the same process, the second resumes; a refused one between them."""
    with_worker = dataclasses.replace(data, num_workers=1)
    run = make_run(with_worker, tmp_path / "run", train_steps=2, stop_after_step=1)
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    script = tmp_path / "script.py"
    script.write_text(
        "import dataclasses, yaml\n"
        "from steel_megatron.config import RunConfig, from_dict\n"
        "from steel_megatron.errors import SteelError\n"
        "from steel_megatron import pretrain\n"
        f"run = from_dict(RunConfig, yaml.safe_load(open({str(tmp_path / 'run.yaml')!r})), 'run.yaml')\n"
        "first = pretrain(run)\n"
        "try:\n"
        "    pretrain(dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, resume=False)))\n"
        "except SteelError as error:\n"
        "    print('refused')\n"
        "rest = pretrain(dataclasses.replace(run, training=dataclasses.replace(run.training, stop_after_step=None)))\n"
        "print(first.step, rest.step, rest.finished, len(first.losses), len(rest.losses))\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(script)], cwd=root, env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["refused", "1 2 True 1 1"]
    assert "Warning" not in done.stderr  # as megatron-core would give in a worker that imports it
