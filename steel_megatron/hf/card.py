"""The model card of an exported folder: what the checkpoint and its run say of the model, in Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from steel_megatron.config import ModelConfig, load_yaml
from steel_megatron.data.ledger.ledger import Ledger
from steel_megatron.errors import DataError

if TYPE_CHECKING:
    from steel_megatron.hf.compare import Agreement
    from steel_megatron.train.checkpoint_manifest import CheckpointInfo

AUDIT = "audit.json"
"""The audit's report, in the run's folder (``steel-megatron audit ... --json``)."""


def write_card(folder: Path, info: CheckpointInfo, architecture: str, reason: str | None, agreement: Agreement) -> None:
    """Write ``README.md``.

    Args:
        folder: the exported one.
        info: the checkpoint.
        architecture: the class that computes it.
        reason: why that is no stock one.
        agreement: of checkpoint and folder.
    """
    run = _recipe(info.path)
    name = run.get("name") or info.path.resolve().parent.parent.name
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {name}, step {info.step}",
        _architecture(info.model, architecture, reason),
        _loading(architecture, info.model),
        _training(info, run),
        _data(info.path, info.consumed_samples),
        _losses(info),
        _audit(info),
        _conversion(agreement),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _conversion(agreement: Agreement) -> str:
    return (
        f"## Conversion\n\nThe logits of checkpoint and folder were compared on {agreement.tokens} tokens in float32: "
        f"they differ by at most {agreement.largest_difference:.2g}, where the largest logit is "
        f"{agreement.largest_logit:.3g}."
    )


def _architecture(model: ModelConfig, architecture: str, reason: str | None) -> str:
    kind = f"{model.ffn}, {model.routing.name}" if model.routing is not None else model.ffn
    layers = (
        f"{model.num_layers} layers of width {model.hidden_size}, {model.num_attention_heads} heads in "
        f"{model.query_groups} groups, feed-forward layers: {kind} ({model.ffn_activation}, width "
        f"{model.ffn_hidden_size}), {model.vocab_size:,} token ids, sequences of {model.sequence_length:,} tokens."
    )
    stock = f"`{architecture}`" + (
        f", with the code in this folder, because {reason}." if reason else " of transformers."
    )
    not_causal = (
        ""
        if model.causal
        else (
            "\n\n**Not causal**: each token's output depends on later tokens of the text, so that its training loss is "
            "not that of a language model."
        )
    )
    return f"{stock}\n\n{layers}{not_causal}"


def _loading(architecture: str, model: ModelConfig) -> str:
    own = ", trust_remote_code=True" if architecture.startswith("Steel") else ""
    return (
        "## Loading\n\n    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'    model = AutoModelForCausalLM.from_pretrained("FOLDER"{own})\n'
        '    tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    )


def _recipe(path: Path) -> dict[str, Any]:
    """The run's settings; an empty dictionary for an imported checkpoint."""
    try:
        run = load_yaml((path / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return run if isinstance(run, dict) else {}


def _training(info: CheckpointInfo, run: dict[str, Any]) -> str:
    if not run:
        return ""
    kept = {part: run[part] for part in ("model", "training", "optimizer", "parallel") if part in run}
    recipe = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    tokens = info.consumed_samples * info.model.sequence_length
    return (
        f"## Training\n\n{info.step:,} steps, {info.consumed_samples:,} sequences, {tokens:,} tokens, on {info.layout}."
        f"\n\n```yaml\n{recipe}```"
    )


def _data(path: Path, consumed: int) -> str:
    """The corpora that the ledger lists, and how many samples came from each."""
    ledger = path / "ledger.json"
    if not ledger.exists():
        return ""
    try:
        history = Ledger.load(ledger).history
    except DataError as error:
        return f"## Data\n\nThe ledger cannot be read: {error}"
    rows = [
        f"| {corpus.name} | {corpus.domain} | {corpus.documents:,} | {corpus.tokens:,} | `{corpus.content[:16]}` |"
        for corpus in history.known()
    ]
    table = "\n".join(
        ["| corpus | domain | documents | tokens | content (SHA-256) |", "| --- | --- | --- | --- | --- |", *rows]
    )
    return f"## Data\n\n{table}\n\nThe first {consumed:,} samples of the ledger's order, seed {history.seed}."


def _losses(info: CheckpointInfo) -> str:
    """The last losses that the run wrote to TensorBoard up to this step."""
    folder = info.path.parent.parent / "tensorboard"
    if not folder.is_dir():
        return ""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    rows = []
    for tag in (tag for tag in sorted(events.Tags()["scalars"]) if "loss" in tag):
        values = [event for event in events.Scalars(tag) if event.step <= info.step]
        if values:
            rows.append(f"| {tag} | {values[-1].step} | {values[-1].value:.4f} |")
    if not rows:
        return ""
    return "## Losses\n\n" + "\n".join(["| what | step | value |", "| --- | --- | --- |", *rows])


def _audit(info: CheckpointInfo) -> str:
    """The verdict of an audit of this checkpoint, where its report lies in the run's folder."""
    try:
        report = json.loads((info.path.parent.parent / AUDIT).read_text(encoding="utf-8"))
        audited, verdict = Path(report["path"]), str(report["verdict"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    if audited.name != info.path.name:
        return ""
    return f"## Audit\n\n{verdict}"
