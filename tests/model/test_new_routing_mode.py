"""A routing mode from outside the package: the one of docs/new_routing_mode.md, trained, audited, saved and refused."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steel_megatron import load_model
from steel_megatron.cli import _parse, main
from steel_megatron.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, from_dict, routing
from steel_megatron.errors import CheckpointError, ConfigError
from steel_megatron.model.routing import RoutingMode, register_routing_mode, routing_mode
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, PROCESSES, compare, small_run, train

PAGE = Path(__file__).resolve().parents[2] / "docs/new_routing_mode.md"
CAUSAL, LEAKY = "my_lab.my_modes:running_mean", "my_lab.my_modes:whole_mean"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the Python path with the page's module; what it registers goes again."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab/my_modes.py").write_text("\n".join(blocks), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(routing._MODES)
    yield tmp_path
    routing._MODES.clear()
    routing._MODES.update(before)
    for name in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[name]


def train_and_audit(run: RunConfig, leaky: Path) -> dict[str, Any]:
    """Straight through and resumed; the audit of the checkpoint and of a mode that makes a wrong claim; an export."""
    whole = train(run)
    others = [
        train(dataclasses.replace(run, model=dataclasses.replace(run.model, routing_mode=mode)), last=1)
        for mode in ("sequence", "token")
    ]
    before = train(run, last=2, save=True)
    after = train(run, first=3, load=True)
    from steel_megatron.audit import audit
    from steel_megatron.hf.convert import export_hf

    path = run.checkpoints_dir / "step_00000002"
    lacks = f"the exported model code has no routing_mode = {CAUSAL}; it has sequence, block_causal"
    with pytest.raises(CheckpointError, match=f"{path} cannot be exported: {lacks}"):
        export_hf(path, path.parent / "exported")
    with pytest.raises(
        CheckpointError, match=f"{path} cannot be loaded as a transformers model: {lacks}.*generate and audit run this"
    ):
        load_model(path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["audit", str(leaky)]) == 1
    found = {"whole": whole, "others": others, "parts": before[:-1] + after}
    return found | {"audit": audit(path), "leaky": printed.getvalue()}


def audit_in_a_fresh_process(path: Path) -> list[tuple[int, str, str]]:
    results = []
    for options in ([], ["--routing_code", "my_lab.my_modes"]):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(["audit", str(path), *options])
        results.append((code, out.getvalue(), err.getvalue()))
        assert ("my_lab" in sys.modules) == bool(options)
    return results


def test_the_page_s_mode_trains_resumes_and_is_audited(lab: Path) -> None:
    run = small_run(ParallelConfig(), str(lab / "run"), steps=3, routing_mode=CAUSAL, slots_per_expert=1)
    assert run.model.causal and run.model.loss_name == "loss"
    leaky = lab / "leaky.yaml"
    (settings,) = re.findall(r"^    (\{routing_mode: .*\})$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    leaky.write_text(settings)
    found = run_distributed(train_and_audit, 1, run, leaky)[0]
    compare([found["parts"]], found["whole"], rel=1e-6)
    losses = [step.loss for step in found["whole"][:-1]]
    assert losses[2] < losses[0] - 0.01
    for other in found["others"]:  # not another mode under its name
        assert abs(other[0].loss - losses[0]) > 1e-5
    report = found["audit"]
    assert report.verdict == "causal" and report.exported is None
    assert (
        f"the library's own model alone, without decoding: the exported model code has no routing_mode = {CAUSAL}"
        in (report.to_text())
    )
    assert f"routing mode {LEAKY}\n" in found["leaky"]
    assert re.search(r"^verdict: leaks \(1\.\d+ in the logits, std 1", found["leaky"], re.MULTILINE)
    refused, audited = run_distributed(audit_in_a_fresh_process, 1, run.checkpoints_dir / "step_00000002")[0]
    assert refused[0] == 2 and len(refused[2].splitlines()) == 1
    assert f"has routing mode {CAUSAL}" in refused[2] and "--routing_code my_lab.my_modes" in refused[2]
    assert audited[0] == 0 and audited[1].endswith("verdict: causal\n"), audited


def test_the_page_s_mode_on_two_processes_equals_one(lab: Path) -> None:
    """Processes that get the settings from another one import the mode themselves."""
    results = {
        name: run_distributed(train, PROCESSES.get(name, 1), small_run(layout, steps=2, routing_mode=CAUSAL))
        for name, layout in (("alone", ParallelConfig()), ("tp2", LAYOUTS["tp2"]), ("ep2", LAYOUTS["ep2"]))
    }
    for name in ("tp2", "ep2"):
        compare(results[name], results["alone"][0])


def test_what_the_mode_cannot_do_is_refused_before_anything_starts(lab: Path) -> None:
    for parallel in (
        ParallelConfig(context_parallel_size=2),
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    ):
        with pytest.raises(ConfigError, match=f"routing_mode {CAUSAL} has no forward_split"):
            small_run(parallel, routing_mode=CAUSAL)
    for words in (["--model.routing_mode", CAUSAL], ["--model", f"{{routing_mode: {CAUSAL}}}"]):
        run = from_dict(RunConfig, _parse(["pretrain", *words])[1], "the command line")
        assert run.model.routing is routing_mode(CAUSAL)
    with pytest.raises(ConfigError, match=f"routing_mode {CAUSAL} has no forward_documents"):
        dataclasses.replace(run, data=DataConfig(reset_at_eod=True))
    # Either of the two alone, but not both at once.
    running_mean = type(routing_mode(CAUSAL))
    both = {"forward_split": running_mean.forward, "forward_documents": running_mean.forward}
    register_routing_mode(type("RunningMean", (running_mean,), {"__module__": running_mean.__module__, **both}))
    split = small_run(ParallelConfig(context_parallel_size=2), routing_mode=CAUSAL)
    with pytest.raises(ConfigError, match=r"context_parallel_size = 2 .* has no forward_split_documents"):
        dataclasses.replace(split, data=DataConfig(reset_at_eod=True))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("running_meen", "'running_meen'; it must be one of sequence, token, block_causal, merged"),
        ("my_lab.my_modes:running_meen", "must be one of .*, merged, running_mean, whole_mean, or module:name"),
        ("my_lab.my_mods:running_mean", "module my_lab.my_mods of a routing mode cannot be imported .*PYTHONPATH"),
        (":token", "'' is no name of a module"),
        ("../my_modes:running_mean", "'../my_modes' is no name of a module"),
    ],
)
def test_modes_that_are_not_there(lab: Path, mode: str, message: str) -> None:
    for ffn in ("soft_moe", "dense"):
        with pytest.raises(ConfigError, match=message):
            ModelConfig(routing_mode=mode, ffn=ffn)  # type: ignore[arg-type]


def test_what_is_no_mode_is_not_registered(lab: Path) -> None:
    running_mean = type(routing_mode(CAUSAL))
    for members, message in (
        ({"name": "mine"}, "lacks causal, forward, multiplications"),
        ({"name": "my mode", "causal": True}, "'my mode'; a routing mode's name has letters"),
        ({"name": "merged", "causal": True}, "'merged', which is steel_megatron.model.routing.merged.Merged"),
    ):
        base = RoutingMode if "lacks" in message else running_mean
        with pytest.raises(ConfigError, match=message):
            register_routing_mode(type("Mine", (base,), members))
    again = register_routing_mode(type("RunningMean", (running_mean,), {"__module__": running_mean.__module__}))
    assert type(routing_mode(CAUSAL)) is again  # a cell that is run twice
    assert not again.splits_sequences and not again.packs_documents
    of_fact = {"splits_sequences": "split", "packs_documents": "documents", "splits_documents": "split_documents"}
    for fact, name in of_fact.items():
        whole = type("Whole", (running_mean,), {f"forward_{name}": running_mean.forward})
        assert {one: getattr(whole, one) for one in of_fact} == {one: one == fact for one in of_fact}
