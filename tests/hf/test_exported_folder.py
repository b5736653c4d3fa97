"""What an exported folder holds beside its weights, and what a conversion needs of memory."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from steel_megatron.config import ModelConfig, RunConfig, TrainingConfig, dump_yaml
from steel_megatron.data.ledger.changes import add
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.ledger import dumps
from steel_megatron.data.ledger.records import Corpus
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from steel_megatron.errors import DataError
from steel_megatron.hf import convert, exporting, mapping
from tests.distributed import run_distributed
from tests.hf.test_convert import small_tokenizer
from tests.hf.test_mapping import BASE, random_tensors

DENSE = dataclasses.replace(
    BASE, ffn="dense", ffn_activation="swiglu", routing_mode=None, shared_expert_intermediate_size=0
)


def published(model: ModelConfig, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(random_tensors(model), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(mapping.config_to_hf(model)))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint, and everything that a run leaves there."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    saved = convert.import_hf(published(BASE, run.with_name("published")), run / "checkpoints" / "step_00000007")
    tokenizer = load_tokenizer("huggingface", small_tokenizer(run.with_name("tokenizer")))
    settings = RunConfig(model=BASE, training=TrainingConfig(train_steps=987))
    (saved / "run.yaml").write_text(dump_yaml(settings))
    corpus = Corpus("wiki", "/data/wiki", "ab" * 32, "zh", 30, 4001, tokenizer.fingerprint)
    (saved / "ledger.json").write_text(dumps(History(8, 1234).then(add, [corpus], None)))
    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_scalar("train/loss", 3.25, 0)
        writer.add_scalar("train/loss", 1.5, 8)  # after the checkpoint
    (run / "audit.json").write_text(json.dumps({"path": str(saved), "verdict": "causal"}))
    return run


def test_the_model_card_says_what_is_known(run_folder: Path, tmp_path: Path) -> None:
    saved = run_folder / "checkpoints" / "step_00000007"
    convert.export_hf(saved, tmp_path / "hf", ("huggingface", str(run_folder.with_name("tokenizer"))))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# tiny, step 0" in card and "train_steps: 987" in card and "trust_remote_code=True" in card
    assert "`SteelForCausalLM`, with the code in this folder, because no stock architecture has Soft-MoE" in card
    assert f"| wiki | zh | 30 | 4,001 | `{'ab' * 8}` |" in card
    assert "| train/loss | 0 | 3.2500 |" in card and "1.5000" not in card
    assert "## Audit\n\ncausal" in card and "Not causal" not in card
    assert re.search(r"compared on 64 tokens in float32: they differ by at most [\d.e-]+", card)


def test_the_other_auto_classes_load_the_folder(run_folder: Path, tmp_path: Path) -> None:
    saved = run_folder / "checkpoints" / "step_00000007"
    exported = convert.export_hf(saved, tmp_path / "hf", ("huggingface", str(run_folder.with_name("tokenizer"))))
    ids = torch.randint(1, 100, (2, 9), generator=torch.Generator().manual_seed(2))  # 0 pads
    full, base = (
        kind.from_pretrained(exported, trust_remote_code=True).eval() for kind in (AutoModelForCausalLM, AutoModel)
    )
    with torch.no_grad():
        expected = full.model(ids).last_hidden_state
        assert torch.equal(base(ids).last_hidden_state, expected)
    labelled = AutoModelForSequenceClassification.from_pretrained(exported, num_labels=3, trust_remote_code=True).eval()
    out = labelled(ids, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(out.logits, labelled.score(expected[:, -1]))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2])))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in labelled.parameters())
    padded = torch.nn.functional.pad(ids, (0, 4))
    with torch.no_grad():
        scores = labelled(padded, attention_mask=(padded != 0).long()).logits
    torch.testing.assert_close(scores, out.logits.detach(), atol=1e-4, rtol=0)


def test_a_model_card_without_a_run(tmp_path: Path) -> None:
    model = dataclasses.replace(BASE, routing_mode="sequence")
    saved = convert.import_hf(published(model, tmp_path / "in"), tmp_path / "checkpoint")
    card = (convert.export_hf(saved, tmp_path / "hf") / "README.md").read_text()
    assert "**Not causal**" in card
    assert not any(f"## {part}" in card for part in ("Training", "Data", "Losses", "Audit"))


def test_an_audit_of_another_checkpoint_is_no_verdict(run_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(run_folder, run)
    (run / "audit.json").write_text(json.dumps({"path": "elsewhere/step_00000001", "verdict": "causal"}))
    card = (convert.export_hf(run / "checkpoints" / "step_00000007", tmp_path / "hf") / "README.md").read_text()
    assert "## Audit" not in card and "## Losses" in card


def test_another_tokenizer_than_the_corpora_s_is_refused(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = run_folder / "checkpoints" / "step_00000007"
    other = tmp_path / "other"
    shutil.copytree(run_folder.with_name("tokenizer"), other)
    stored = json.loads((other / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer: Any = ("huggingface", str(other))
    with pytest.raises(DataError, match=r"texts would get other ids.*--allow_other_tokenizer true"):
        convert.export_hf(saved, tmp_path / "hf", tokenizer)
    assert not (tmp_path / "hf").exists()
    notes: list[str] = []
    monkeypatch.setattr(exporting.logger, "warning", notes.append)
    convert.export_hf(saved, tmp_path / "hf", tokenizer, allow_other_tokenizer=True)
    assert len(notes) == 1 and "has the fingerprint" in notes[0]


def peak_growth(action: Any) -> int:
    """Bytes by which a call makes this process larger at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def growths(small: Path, large: Path, output: Path) -> tuple[int, int, int]:
    """Of a process by import and export, and by as much memory as all tensors: in one that has no free memory yet."""
    convert.export_hf(convert.import_hf(small, output / "one"), output / "two")  # imports everything
    saved, exported = output / "checkpoint", output / "hf"
    total = (large / "model.safetensors").stat().st_size
    return (
        peak_growth(lambda: convert.import_hf(large, saved)),
        peak_growth(lambda: convert.export_hf(saved, exported)),
        peak_growth(lambda: torch.ones(total // 4).sum()),
    )


@pytest.mark.slow
def test_a_conversion_needs_memory_for_its_largest_tensors(tmp_path: Path) -> None:
    small = published(DENSE, tmp_path / "small")
    model = dataclasses.replace(
        DENSE, num_layers=40, hidden_size=256, ffn_hidden_size=1024, vocab_size=2000, sequence_length=16
    )
    folder = published(model, tmp_path / "large")
    total = (folder / "model.safetensors").stat().st_size
    largest = 2048 * 256 * 4
    allowed = 2 * largest + 40 * 10**6
    assert total > 3.5 * allowed
    imported, exported, whole = run_distributed(growths, 1, small, folder, tmp_path)[0]
    assert imported < allowed
    assert exported < allowed
    assert whole > allowed  # what the others would show
