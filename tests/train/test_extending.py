"""The examples of docs/extending.md train."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.config import DataConfig, RunConfig
from tests.distributed import run_distributed
from tests.train.test_loop import make_run, write_corpus

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs/extending.md"


def trained(run: RunConfig) -> tuple[Any, Any]:
    """A run with the page's callback and objective: the summary, and what the callback found."""
    from steel_megatron.train.loop import pretrain

    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    callback = names["LowestLoss"]()
    return pretrain(run, callbacks=[callback]), callback.lowest


def test_the_examples_of_the_page(tmp_path: Path) -> None:
    data = DataConfig(train=[write_corpus(tmp_path / "t", 60, 0)], validation=[write_corpus(tmp_path / "v", 12, 1)])
    run = make_run(data, tmp_path / "run", train_steps=2, eval_interval=1)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = dataclasses.replace(run.model, megatron=recompute)
    run = dataclasses.replace(run, model=model, training=dataclasses.replace(run.training, objective="z_loss"))
    summary, lowest = run_distributed(trained, 1, run)[0]
    assert lowest == (pytest.approx(summary.validation_loss), 2) and summary.finished
