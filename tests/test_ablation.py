"""examples/ablation: its variants are what their names say, its measurements can fail, its driver can be stopped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples/ablation"
sys.path.insert(0, str(FOLDER))

import job  # noqa: E402
import table  # noqa: E402
from variants import BUDGET, EQUAL, VARIANTS  # noqa: E402

from steel_megatron.errors import DataError  # noqa: E402

pytestmark = pytest.mark.slow

BY_NAME = {variant.name: variant for variant in VARIANTS}


def test_every_asked_variant_is_there() -> None:
    assert len(BY_NAME) == len(VARIANTS) and len({variant.title for variant in VARIANTS}) == len(VARIANTS)
    wanted = {"none", "dense-swiglu", "dense-double", "top2-parameters", "merged16", "merged64", "merged256"}
    for mix in ("raw", "normalized"):
        wanted |= {f"sequence-{mix}", f"token-{mix}"}
        wanted |= {f"block{length}{shared}-{mix}" for length in (16, 64, 256) for shared in ("", "-shared")}
    assert wanted <= set(BY_NAME)
    for name, variant in BY_NAME.items():
        model = variant.model
        assert variant.group in table.GROUPS and re.fullmatch(r"[a-z0-9.-]+", name)
        assert model.causal == (not name.startswith("sequence"))
        assert ("shared" in name) == (model.shared_expert_intermediate_size > 0)
        assert model.sequence_length > max(model.block_length, 256)
        if model.ffn == "soft_moe":
            mode = {"sequence": "sequence", "block": "block_causal", "token": "token", "merged": "merged"}
            assert model.routing_mode == mode[re.match(r"[a-z]+", name).group()]  # type: ignore[union-attr]
            assert model.slot_input == ("normalized" if name.endswith("normalized") else "raw")
            lengths = re.findall(r"^(?:block|merged)(\d+)", name)
            assert not lengths or model.block_length == int(lengths[0])


def test_flops_are_equal_where_the_table_says_so() -> None:
    equal = {name for name, variant in BY_NAME.items() if EQUAL * BUDGET <= variant.flops <= BUDGET}
    assert BY_NAME["dense-double"].flops == BUDGET
    assert {"dense-swiglu", "dense-double", "top2-flops", "token-raw", "merged16", "merged64", "merged256"} <= equal
    assert {name for name in BY_NAME if "shared" in name} <= equal
    assert {variant.name for variant in VARIANTS if variant.flops > BUDGET} == {"top2-parameters"}


def test_top_2_has_the_parameters_of_the_soft_mixture() -> None:
    def in_experts(name: str) -> int:
        model = BY_NAME[name].model
        matrices = 4 if model.ffn_activation == "double_swiglu" else 3
        return matrices * model.hidden_size * model.ffn_hidden_size * model.num_experts

    assert in_experts("top2-parameters") == pytest.approx(in_experts("block64-raw"), rel=0.01)
    assert in_experts("top2-flops") == pytest.approx(in_experts("block64-raw"), rel=0.03)


def running_mean(tokens: torch.Tensor, ahead: int) -> torch.Tensor:
    """Logits [B, T, 16] from the mean of one-hot tokens up to ``ahead`` places after each position."""
    one_hot = torch.nn.functional.one_hot(tokens, 16).double()
    if ahead:
        one_hot = torch.cat((one_hot[:, ahead:], one_hot[:, -1:].expand(-1, ahead, -1)), dim=1)
    counts = torch.arange(1, tokens.size(1) + 1).view(1, -1, 1)
    return (one_hot.cumsum(1) / counts).float() * 3


def test_a_leak_is_found_however_far_it_looks_ahead() -> None:
    tokens = torch.randint(0, 16, (4, 60), generator=torch.Generator().manual_seed(0))
    leak, spread = job.leak_of(lambda ids: running_mean(ids, 0), tokens, 16)
    assert leak == 0 and spread > 0
    assert job.leak_of(lambda ids: running_mean(ids, 1), tokens, 16)[0] > 0.01


def test_losses_from_prefixes_are_those_of_a_forward_pass_where_a_model_is_causal() -> None:
    tokens = torch.randint(0, 16, (5, 41), generator=torch.Generator().manual_seed(0))
    ends = [1, 10, 20, 40]
    everywhere = job._losses(running_mean(tokens[:, :-1], 0), tokens[:, 1:])
    torch.testing.assert_close(
        job._from_prefixes(lambda ids: running_mean(ids, 0), tokens, ends), everywhere[:, [end - 1 for end in ends]]
    )
    # One that reads the answer does well in a forward pass, and not from the prefix alone.
    seeing = job._losses(running_mean(tokens[:, :-1], 1) * 40, tokens[:, 1:])[:, [0]]
    blind = job._from_prefixes(lambda ids: running_mean(ids, 1) * 40, tokens, ends)[:, [0]]
    assert seeing[tokens[:, 1] != tokens[:, 0]].mean() < 1 < blind[tokens[:, 1] != tokens[:, 0]].mean()


def synthetic(name: str, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    training = {"seed": seed, "train_steps": 40, "global_batch_size": 2}
    result = {
        "name": name,
        "seed": seed,
        "settings": {"optimizer": {"lr": 0.1}, "training": training, "data": "d", "measured": {}, "model": {}},
        "train_loss": loss - 0.1,
        "forward_validation_loss": loss - 0.5,
        "parameters": 1234,
        "non_embedding_parameters": 1000,
        "sampled_labels": 7,
        "validation_labels": 1024,
        "causal_validation_loss": loss,
        "causal_loss_at_samples": loss,
        "leak": 0.0,
        "logits_std": 1.0,
    }
    return {**result, **changes}


def write(output: Path, *results: dict[str, Any]) -> None:
    (output / "results").mkdir(parents=True, exist_ok=True)
    for result in results:
        (output / "results" / f"{result['name']}.{result['seed']}.json").write_text(json.dumps(result))


def test_the_table_goes_between_the_markers_and_says_what_came_out(tmp_path: Path) -> None:
    output, docs = tmp_path / "runs", tmp_path / "docs"
    docs.mkdir()
    page = docs / "ablation.md"
    page.write_text(f"# Before\n\n{table.BEGIN}\nold\n{table.END}\n\nAfter: as it was.\n")
    write(output, *(synthetic("dense-double", seed, 2.0 + 0.1 * seed) for seed in (1, 2, 3)))
    write(output, *(synthetic("merged64", seed, 1.9 + 0.1 * seed) for seed in (1, 2, 3)))
    write(output, *(synthetic("dense-swiglu", seed, 2.9) for seed in (1, 2, 3)))
    write(output, synthetic("merged16", 1, 2.5), synthetic("sequence-raw", 1, 3.0, leak=4.0))
    (output / "speed.json").write_text(json.dumps({"merged64": 12345.6}))
    (output / "failed").mkdir()
    (output / "failed/none.2.txt").write_text("exit code 1: out of luck")
    for _ in range(2):  # a second report replaces the first
        table.write_report(output, docs)
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith(f"{table.END}\n\nAfter: as it was.\n") and "old" not in text
    first_table = text.split("\\* `sequence`")[0]
    lines = {line.split(" | ")[0].strip("| "): line for line in first_table.splitlines() if line.startswith("|")}
    assert "2.100 ± 0.100 | +0.100 ± 0.000 | 0 |" in lines["merged K=64"] and "12,346" in lines["merged K=64"]
    assert "2.200 ± 0.100 | - | 0 |" in lines["dense double SwiGLU"]
    assert "| 2.500 | -0.400 |" in lines["merged K=16"]
    assert "1. merged K=64: 2.100 (3 of 3 seeds)\n1. merged K=16: 2.500 (0 of 1 seeds)" in text
    # What is not causal is marked, and never among the best.
    assert "| 3.000 * | -0.900 | 4 |" in text and "1. sequence" not in text
    assert "Most figures are over 3 seeds." in text
    assert "Over another number of seeds: sequence, raw (1); merged K=16 (1)." in text
    assert "Failed: none.2: exit code 1: out of luck." in text
    assert (docs / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "40 steps of 2 x 512 bytes, learning rate up to 0.1, 1,024 bytes of validation" in text
    assert "trained for longer" not in text and not (docs / "ablation-long.png").exists()
    write(output / "long", synthetic("dense-double", 1, 1.5), synthetic("merged64", 1, 1.25))
    table.write_report(output, docs)
    short, long = page.read_text().split("### Some of them, trained for longer")
    assert "1. merged K=64: 2.100 (3 of 3 seeds)" in short and "1. merged K=64: 1.250 (1 of 1 seeds)" in long
    assert (docs / "ablation-long.png").exists()


def test_a_page_without_markers_or_mixed_results_are_refused(tmp_path: Path) -> None:
    output, docs = tmp_path / "runs", tmp_path / "docs"
    with pytest.raises(DataError, match="holds no result"):
        table.write_report(output, docs)
    write(output, synthetic("dense-double", 1, 2.0))
    docs.mkdir()
    (docs / "ablation.md").write_text("no place for a table")
    with pytest.raises(DataError, match="must hold <!-- results: begin -->"):
        table.write_report(output, docs)
    assert (docs / "ablation.md").read_text() == "no place for a table"
    other = synthetic("merged64", 1, 2.0)
    other["settings"]["optimizer"] = {"lr": 0.2}
    write(output, other)
    with pytest.raises(DataError, match=r"merged64.1.json was made with other settings"):
        table.read_rows(output, VARIANTS)
    (output / "results/merged64.1.json").write_text('{"name": "mer')
    with pytest.raises(DataError, match=r"merged64.1.json is not a result"):
        table.read_rows(output, VARIANTS)


def ablation(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(FOLDER / "run.py"),
        "--quick",
        "--output",
        str(output),
        "--docs",
        str(output / "docs"),
    ]
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=280)


def test_the_driver_trains_reports_and_goes_on(tmp_path: Path) -> None:
    # A run that cannot make its folder fails; it is reported, and the others are done.
    (tmp_path / "work").mkdir()
    (tmp_path / "work/sequence-raw.1").write_text("in the way")
    first = ablation(tmp_path, "--no-speed", "--jobs", "1")
    assert first.returncode == 1, first.stderr
    assert re.search(r"sequence-raw\.1 in \d+ s: FAILED, exit code 1: .*sequence-raw\.1", first.stdout), first.stdout
    done = tmp_path / "results/dense-double.1.json"
    before = done.stat().st_mtime_ns
    assert "Failed: sequence-raw.1" in (tmp_path / "docs/ablation.md").read_text()
    (tmp_path / "work/sequence-raw.1").unlink()
    second = ablation(tmp_path)
    assert second.returncode == 0, second.stderr + second.stdout
    assert "3 runs, 2 of them done before" in second.stdout and done.stat().st_mtime_ns == before
    text = (tmp_path / "docs/ablation.md").read_text()
    assert "Failed" not in text and list((tmp_path / "failed").iterdir()) == []
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert set(results) == {"dense-double.1", "sequence-raw.1", "top2-flops.1"}
    assert results["sequence-raw.1"]["leak"] > 0.01 and results["dense-double.1"]["leak"] == 0
    assert results["top2-flops.1"]["leak"] < 1e-5
    dense = results["dense-double.1"]
    assert dense["forward_validation_loss"] == pytest.approx(dense["causal_validation_loss"], abs=1e-5)
    hidden = BY_NAME["dense-double"].model.hidden_size
    assert dense["parameters"] - dense["non_embedding_parameters"] == 2 * 257 * hidden
    assert dense["settings"]["training"]["train_steps"] == 4 and len(dense["train_curve"]) == 4
    assert not any((tmp_path / "work").glob("*.1"))
    # Other settings make results stale.
    third = ablation(tmp_path, "--no-speed", "--variants", "dense-double", "--lr", "0.001")
    assert "1 runs, 0 of them done before" in third.stdout
