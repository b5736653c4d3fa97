"""The audit finds leaks where there are some, of the size they have, and none where there are none."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.audit.decoding import cached_decoding
from steel_megatron.cli import main
from steel_megatron.config import ModelConfig, ParallelConfig, to_dict
from steel_megatron.errors import ConfigError, SteelError
from steel_megatron.hf.modeling_steel import CACHE
from steel_megatron.model.causality import audit_model, default_positions
from tests.distributed import run_distributed
from tests.hf import golden
from tests.train.small_run import MODEL, small_run, train

LENGTH = 24
MODES = ("token", "block_causal", "merged", "sequence")


def toy(mix: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """A model of one layer: ``mix`` on the ids themselves, as numbers [N, T, 1]."""

    def forward(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = mix(ids.double().unsqueeze(-1))
        return {"layer 1": hidden, "logits": torch.cat((hidden, -2 * hidden), -1)}

    return forward


def running_mean(x: torch.Tensor) -> torch.Tensor:
    return x.cumsum(1) / torch.arange(1, x.size(1) + 1).view(1, -1, 1)


def test_a_running_mean_is_causal() -> None:
    found = audit_model(toy(running_mean), vocab_size=50, length=LENGTH)
    assert not found.leaks and found.verdict == "causal"
    assert [movement.largest for movement in found.movements] == [0.0, 0.0]


def test_a_mean_over_everything_leaks_by_what_one_can_compute() -> None:
    # Of two ids the other one is the replacement: one changed token moves the mean by 1 / T, the logits by 2 / T.
    found = audit_model(toy(lambda x: x + x.mean(1, keepdim=True)), vocab_size=2, length=LENGTH, positions=[5, 23])
    hidden, logits = found.movements
    assert hidden.by_position[5][0] == pytest.approx(1 / LENGTH)
    assert hidden.by_position[23] == pytest.approx((1 / LENGTH, 1 / LENGTH))
    assert hidden.by_position[5][1] <= (LENGTH - 5) / LENGTH
    assert logits.largest == pytest.approx(2 * hidden.largest) and logits.changed == hidden.changed
    assert found.leaks and found.verdict.startswith(f"leaks ({logits.largest:.3g} in the logits, std ")


@pytest.mark.parametrize("edge", [8, 16])
def test_a_leak_at_the_edge_of_a_block_is_found_and_placed(edge: int) -> None:
    def peek(x: torch.Tensor) -> torch.Tensor:
        y = running_mean(x).clone()
        y[:, edge - 1] += x[:, edge]  # the last token of a block sees the first of the next
        return y

    found = audit_model(toy(peek), vocab_size=50, length=LENGTH, positions=default_positions(LENGTH, 8))
    logits = found.movements[-1]
    assert found.leaks and (logits.changed, logits.moved) == (edge, edge - 1)
    assert {first for first, sizes in logits.by_position.items() if sizes[0] > 0} == {edge}
    assert not audit_model(toy(peek), vocab_size=50, length=LENGTH, positions=[edge + 1]).leaks


def test_a_leak_that_the_logits_do_not_show() -> None:
    def forward(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = ids.double().unsqueeze(-1)
        return {"layer 1": x + x.flip(1), "logits": x}

    found = audit_model(forward, vocab_size=9, length=LENGTH)
    assert found.leaks and "in the layer 1" in found.verdict


def test_rounding_is_no_leak() -> None:
    leak = toy(lambda x: x + 1e-8 * x.mean(1, keepdim=True))
    assert not audit_model(leak, vocab_size=50, length=LENGTH).leaks
    assert audit_model(leak, vocab_size=50, length=LENGTH, tolerance=0.0).leaks


@pytest.mark.parametrize(("size", "leaks"), [(1e-3, True), (1e-4, True), (1e-6, False)])
def test_a_leak_is_what_is_larger_than_rounding_of_many_layers(size: float, leaks: bool) -> None:
    """In standard deviations; a leak of a thousandth is one that a training finds."""
    found = audit_model(toy(lambda x: x + size * x.flip(1)), vocab_size=50, length=LENGTH)
    assert size < found.movements[-1].relative < 5 * size
    assert found.leaks == leaks


class Counting:
    """Stands for an exported model: its logits tell the sum of the real tokens so far.

    Args:
        forgetful: it takes padding for tokens where it decodes with a cache.
    """

    def __init__(self, forgetful: bool) -> None:
        self.forgetful = forgetful

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool, **cache: torch.Tensor
    ) -> Any:
        real = attention_mask[:, -input_ids.size(1) :]
        counted = torch.ones_like(real) if use_cache and self.forgetful else real
        sums = (input_ids * counted).cumsum(1).double() + cache.get(CACHE, torch.zeros(len(input_ids), 1))
        shown = sums.where(real.bool(), float(use_cache))  # what a model computes for padding is of no interest
        return Answer({CACHE: sums[:, -1:]}, torch.stack((shown, -shown), -1))


class Answer(dict[str, torch.Tensor]):
    def __init__(self, cache: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
        super().__init__(cache)
        self.logits = logits


def test_decoding_is_audited_on_padded_texts_as_well() -> None:
    ids = torch.randint(1, 50, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    for forgetful in (False, True):
        found = cached_decoding(Counting(forgetful), ids, [4, 9])  # type: ignore[arg-type]
        assert (found.largest > 0) == forgetful


def test_values_that_are_not_finite() -> None:
    with pytest.raises(SteelError, match="layer 1 have values that are not finite"):
        audit_model(toy(lambda x: x / 0), vocab_size=50, length=LENGTH)


def test_what_cannot_be_audited() -> None:
    for settings_ in ({"length": 1}, {"vocab_size": 1}, {"texts": 0}, {"positions": [0]}, {"positions": [LENGTH]}):
        with pytest.raises(ConfigError, match="audit"):
            audit_model(toy(running_mean), **{"vocab_size": 50, "length": LENGTH, **settings_})  # type: ignore[arg-type]


@given(length=st.integers(2, 300), block=st.one_of(st.none(), st.integers(1, 150)))
@settings(deadline=None)
def test_positions(length: int, block: int | None) -> None:
    positions = default_positions(length, block)
    assert positions == sorted(set(positions))
    assert positions[0] == 1 and positions[-1] == length - 1
    for edge in (block, 2 * block) if block else ():
        assert {edge - 1, edge, edge + 1} & set(range(1, length)) <= set(positions)


# From here on, whole models; each in a process of its own, as megatron-core's groups are the process's.


def audit_all(paths: list[Path], breaking: str = "", **options: Any) -> list[Any]:
    """The reports on several models; ``breaking`` is a mistake to be made in the code first."""
    from steel_megatron.audit import audit

    if breaking:
        BREAKING[breaking]()
    return [audit(path, **options) for path in paths]


def leak_in_the_library() -> None:
    """The last token of a block of 8 sees the next token."""
    from steel_megatron.model.soft_moe import ParallelSoftMoE

    forward = ParallelSoftMoE.forward

    def leaking(self: Any, hidden_states: torch.Tensor, *rest: Any, **more: Any) -> tuple:
        output, bias = forward(self, hidden_states, *rest, **more)
        output = output.clone()
        output[7:-1:8] += 0.01 * hidden_states[8::8][: len(output[7:-1:8])]
        return output, bias

    ParallelSoftMoE.forward = leaking  # type: ignore[method-assign]


def wrong_state() -> None:
    """Decoding counts one token too few."""
    from steel_megatron.hf.modeling_steel import SteelSoftMoE

    for name in ("_block_causal", "_merged"):
        whole = getattr(SteelSoftMoE, name)

        def forgetful(self: Any, x: Any, real: Any, keep: bool, whole: Any = whole) -> Any:
            y, state = whole(self, x, real, keep)
            if state is not None:
                state.count = state.count - 1
            return y, state

        setattr(SteelSoftMoE, name, forgetful)


def other_export() -> None:
    """The exported code adds its shared expert at another size."""
    from steel_megatron.hf.modeling_steel import SteelSoftMoE

    forward = SteelSoftMoE.forward

    def other(self: Any, x: Any, *rest: Any) -> Any:
        y, state = forward(self, x, *rest)
        return y + 0.05 * self.shared_expert(x), state

    SteelSoftMoE.forward = other  # type: ignore[method-assign]


BREAKING = {"library": leak_in_the_library, "state": wrong_state, "export": other_export}


def write_settings(folder: Path, **model: Any) -> Path:
    path = folder / f"{model.get('routing_mode')}-{model.get('ffn')}.yaml"
    path.write_text(yaml.safe_dump(to_dict(dataclasses.replace(MODEL, **model))), encoding="utf-8")
    return path


@pytest.mark.slow
def test_settings_in_every_mode(tmp_path: Path) -> None:
    paths = [
        write_settings(tmp_path, routing_mode=mode, slot_input=mix, ffn=ffn)
        for mode, mix, ffn in [(mode, "raw", "soft_moe") for mode in MODES] + [("sequence", "normalized", "dense")]
    ]
    reports = run_distributed(audit_all, 1, paths)[0]
    assert [report.verdict for report in reports[:3]] == ["causal"] * 3
    sequence, dense = reports[3:]
    assert sequence.leaks and sequence.library.movements[-1].largest > 0.05
    assert dense.passed and dense.library.movements[0].name == "layer 1"
    for report in reports:
        assert report.passed != report.leaks and report.kind == "settings"
        assert [one.name for one in report.library.movements] == [*(f"layer {n}" for n in range(1, 5)), "logits"]
        assert report.exported.agreement.largest < 1e-4
        assert (report.exported.decoding.largest < 1e-4) == report.passed
        assert {7, 8, 9, 15, 16, 17} <= set(report.positions) or report.model.routing_mode in ("token", "sequence")


def test_baselines_without_an_exported_form(tmp_path: Path) -> None:
    paths = [
        write_settings(tmp_path, ffn="none", routing_mode=None),
        write_settings(tmp_path, ffn="top_k_moe", ffn_activation="swiglu", routing_mode=None),
    ]
    further = write_settings(tmp_path, routing_mode="merged", megatron={"softmax_scale": 0.1})
    reports = run_distributed(audit_all, 1, [*paths, further])[0]
    for report in reports:
        assert report.passed and report.exported is None and report.library.movements[-1].std > 0.1
    assert "alone, without decoding: the exported model code does not know model.megatron.softmax_scale = 0.1" in (
        reports[-1].to_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("breaking", "verdict"),
    [
        ("library", "leaks ("),
        ("state", "causal, but decoding with a cache gives other logits ("),
        ("export", "causal, but the exported code gives other logits ("),
    ],
)
def test_mistakes_are_found(breaking: str, verdict: str, tmp_path: Path) -> None:
    paths = [write_settings(tmp_path, routing_mode=mode) for mode in ("block_causal", "merged")]
    for report in run_distributed(audit_all, 1, paths, breaking)[0]:
        assert report.verdict.startswith(verdict) and not report.passed
        assert report.leaks == (breaking == "library")
        if breaking == "library":
            sizes = report.library.movements[0].by_position
            assert {first for first, (alone, _) in sizes.items() if alone > 0} == {8, 16}
            assert not report.exported.causality.leaks


def train_and_audit(folder: Path) -> dict[str, Any]:
    reports = {}
    for mode in ("merged", "sequence"):
        run = small_run(ParallelConfig(), str(folder / mode), steps=2, routing_mode=mode)
        train(run, last=2, save=True)
        reports[mode] = audit_all([run.checkpoints_dir / "step_00000002"])[0]
        reports[f"{mode}, two layers"] = audit_all([run.checkpoints_dir / "step_00000002"], layers=2)[0]
    reports["earlier version"] = audit_all([as_an_earlier_version(run.checkpoints_dir / "step_00000002")])[0]
    return reports


def as_an_earlier_version(path: Path) -> Path:
    """With a field of megatron-core that nothing reads, and old names of settings."""
    from steel_megatron.train import checkpoint, checkpoint_info

    manifest = json.loads((path / checkpoint.MANIFEST).read_text(encoding="utf-8"))
    model = manifest["model"]
    model["megatron"] = {"qk_layernorm": True}
    model |= {old: model.pop(new) for old, new in ModelConfig.RENAMED.items()}
    manifest["sha256"] = checkpoint.manifest_checksum(manifest)
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    info = checkpoint.read_info(path)
    checkpoint_info.check_model(info, dataclasses.replace(info.model, megatron={}), resumes=True)
    return path


@pytest.mark.slow
def test_checkpoints(tmp_path: Path) -> None:
    reports = run_distributed(train_and_audit, 1, tmp_path)[0]
    assert reports["merged"].verdict == "causal" and reports["merged"].kind == "checkpoint"
    assert reports["sequence"].verdict.startswith("leaks (")
    earlier = reports["earlier version"]
    assert earlier.library == reports["sequence"].library and earlier.model.megatron == {}
    for mode in ("merged", "sequence"):
        whole, part = (reports[name].library.movements for name in (mode, f"{mode}, two layers"))
        assert len(whole) == 5 and len(part) == 3
        assert part[1].largest == pytest.approx(whole[1].largest, rel=1e-3, abs=1e-9)


@pytest.mark.slow
def test_the_published_models() -> None:
    paths = [golden.FOLDER / name for name in golden.NAMES]
    tiny, slots, swiglu, dense = run_distributed(audit_all, 1, paths)[0]
    assert dense.verdict == "causal" and dense.kind == "Hugging Face folder"
    for report in (tiny, slots, swiglu):
        assert report.verdict.startswith("leaks (") and report.exported.causality.leaks
    # The fixtures' own figure: the last token alone moves logits by up to 0.39 in two texts; their deviation is 1.53.
    logits = tiny.library.movements[-1]
    assert logits.std == pytest.approx(1.53, abs=0.05)
    assert 0.2 < logits.by_position[tiny.length - 1][0] < 0.8
    assert tiny.exported.agreement.largest < 1e-4
    # One token at a time, the way the published code does it, is another model.
    assert tiny.exported.decoding.largest > 1 and tiny.exported.decoding.same_choice < 0.5


def run_audit(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "steel_megatron", "audit", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    causal, leaking = (write_settings(tmp_path, routing_mode=mode) for mode in ("block_causal", "sequence"))
    done = run_audit(str(causal), "--positions", "3", "8", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "verdict: causal"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "causal" and report["passed"] and report["positions"] == [3, 8]
    assert len(report["library"]["movements"]) == 5
    done = run_audit(str(leaking), "--length", "12")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1].startswith("verdict: leaks (") and "12 tokens" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("- a\n- b\n", (), "it holds list"),
        ("model: {hidden_size: many}\n", (), "hidden_size"),
        ("model: {hiden_size: 3}\n", (), "hiden_size"),
        ("\t:[", (), "neither a model's folder nor YAML"),
        ("{routing_mode: merged}\n", ("--length", "1"), "length = 1"),
        ("{routing_mode: merged}\n", ("--length", "99999"), "2 to sequence_length = 2048"),
        ("{routing_mode: merged}\n", ("--positions", "0"), "position 0 cannot be audited"),
        ("{routing_mode: merged}\n", ("--layers", "9"), "layers = 9"),
        ("{routing_mode: merged}\n", ("--tolerance", "-1"), "tolerance = -1"),
        ("{routing_mode: merged, num_layers: 999, hidden_size: 65536}\n", (), "--layers N; one has"),
    ],
)
def test_bad_input(
    content: str, options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    assert main(["audit", str(path), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ") and captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_folders_that_are_no_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert main(["audit", str(path)]) == 2
        assert str(path) in capsys.readouterr().err


def test_the_recipes_say_what_they_are(tmp_path: Path) -> None:
    """A run's YAML has the model as a section."""
    from steel_megatron.audit.sources import open_subject

    root = Path(__file__).resolve().parents[1]
    subject = open_subject(root / "examples/quickstart/pretrain.yaml", 0)
    assert isinstance(subject.model, ModelConfig) and subject.model.causal and subject.kind == "settings"
    assert not open_subject(root / "examples/steel_1b/pretrain.yaml", 0).model.causal
