"""The results as a table and a picture in docs/."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variants import BUDGET, EQUAL, VARIANTS, Variant

from steel_megatron.errors import DataError
from steel_megatron.files import write_atomically

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
DENSE = ("dense-swiglu", "dense-double")
"""The dense networks of equal FLOPs; the better one of a study is what its other rows are compared with."""
STUDIES = (("All variants", "", "ablation.png"), ("Some of them, trained for longer", "long", "ablation-long.png"))
"""Title, folder of the results below the output's, picture."""
GROUPS = {
    "baseline": "Baselines",
    "mode": "Soft-MoE: the modes as they are",
    "attempt": "Soft-MoE: attempts to get more out of a FLOP",
}


@dataclass(frozen=True)
class Row:
    """A variant and its results, one for each seed that is there."""

    variant: Variant
    results: list[dict[str, Any]]
    tokens_per_second: float | None

    def values(self, key: str) -> list[float]:
        """The values of one measurement, by seed."""
        return [result[key] for result in self.results]

    def mean(self, key: str) -> float:
        return statistics.fmean(self.values(key))

    @property
    def loss(self) -> float:
        return self.mean("causal_validation_loss")

    @property
    def affordable(self) -> bool:
        """Whether it is a language model that costs no more than the dense baseline."""
        return self.variant.model.causal and self.variant.flops <= BUDGET


def read_rows(output: Path, variants: list[Variant]) -> tuple[list[Row], list[str]]:
    """What the results folder holds: rows in the order of variants, and what failed.

    Raises:
        DataError: there is no result, results are not of one set of settings, or a file is damaged.
    """
    try:
        speed = json.loads((output / "speed.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        speed = {}
    rows, common = [], None
    for variant in variants:
        results = []
        for path in sorted((output / "results").glob(f"{variant.name}.*.json")):
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                settings = result["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is not a result ({error}); remove it and run again") from None
            shared = {key: settings[key] for key in ("optimizer", "data", "measured")}
            shared["training"] = {key: value for key, value in settings["training"].items() if key != "seed"}
            common = common or shared
            if shared != common:
                raise DataError(f"{path} was made with other settings than the results before it; run again")
            results.append(result)
        if results:
            rows.append(Row(variant, results, speed.get(variant.name)))
    if not rows:
        raise DataError(f"{output}/results holds no result; run the ablation first")
    failed = [f"{path.stem}: {path.read_text(encoding='utf-8')}" for path in sorted((output / "failed").glob("*.txt"))]
    return rows, failed


def write_report(output: Path, docs: Path, variants: list[Variant] = VARIANTS) -> None:
    """Replace what is between the two markers of DOCS/ablation.md, and draw DOCS/ablation.png (and ablation-long.png).

    Raises:
        DataError: there is no result, or the page has no markers.
    """
    parts = []
    for title, folder, picture in STUDIES:
        if folder and not list((output / folder / "results").glob("*.json")):
            continue
        rows, failed = read_rows(output / folder, variants)
        parts.append(f"### {title}\n\n{_results(rows, failed, picture)}")
        draw(rows, docs / picture)
    page = docs / "ablation.md"
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Ablation\n\n{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"{page} must hold {BEGIN} and, after it, {END}, once each: the table goes between them")
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    write_atomically(page, f"{head}{BEGIN}\n\n{''.join(parts)}{tail}".encode(), DataError)


def _reference(rows: list[Row]) -> Row | None:
    return min((row for row in rows if row.variant.name in DENSE), key=lambda row: row.loss, default=None)


def _results(rows: list[Row], failed: list[str], picture: str) -> str:
    reference = _reference(rows)
    result = rows[0].results[0]
    training, optimizer = result["settings"]["training"], result["settings"]["optimizer"]
    length = rows[0].variant.model.sequence_length
    lines = [
        f"{training['train_steps']:,} steps of {training['global_batch_size']} x {length} bytes, learning rate up to "
        f"{optimizer['lr']:g}, {result['validation_labels']:,} bytes of validation. ± is the "
        "standard deviation over seeds. Less than dense: the difference to the better of the two dense networks of "
        f"equal FLOPs ({reference.variant.title if reference else 'not there'}) with the same seed, mean over seeds.",
        "",
        "| feed-forward layer | parameters | without embeddings | MFLOPs per token | of dense | tokens/s "
        "| training loss | causal validation loss | less than dense | leak |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for group, title in GROUPS.items():
        members = [row for row in rows if row.variant.group == group]
        if members:
            lines.append(f"| **{title}** | | | | | | | | | |")
            lines += [_line(row, reference) for row in members]
    lines += ["", *_best(rows, reference), *_future(rows), f"![Causal validation loss by variant]({picture})", ""]
    lines += _missing(rows, failed)
    return "\n".join(lines) + "\n"


def _line(row: Row, reference: Row | None) -> str:
    result, flops = row.results[0], row.variant.flops
    speed = f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "-"
    mark = "" if row.variant.model.causal else " *"
    cells = [
        row.variant.title,
        f"{result['parameters']:,}",
        f"{result['non_embedding_parameters']:,}",
        f"{flops / 1e6:.3f}",
        f"{flops / BUDGET:.2f}{'' if BUDGET * EQUAL <= flops <= BUDGET else ' (not equal)'}",
        speed,
        f"{row.mean('train_loss'):.3f}{mark}",
        _with_spread(row.values("causal_validation_loss")) + mark,
        _less_than(row, reference),
        f"{max(row.values('leak')):.1g}",
    ]
    return f"| {' | '.join(cells)} |"


def _with_spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _differences(row: Row, reference: Row) -> list[float]:
    """How much lower the loss is than the dense baseline's of the same seed (the same samples in the same order)."""
    # A model that is not causal is measured at sampled positions only, so dense is compared with it there.
    key = "causal_validation_loss" if row.variant.model.causal else "causal_loss_at_samples"
    dense = {result["seed"]: result[key] for result in reference.results}
    return [dense[result["seed"]] - result[key] for result in row.results if result["seed"] in dense]


def _less_than(row: Row, reference: Row | None) -> str:
    if reference is None or row is reference:
        return "-"
    differences = _differences(row, reference)
    if not differences:
        return "-"
    spread = f" ± {statistics.stdev(differences):.3f}" if len(differences) > 1 else ""
    return f"{statistics.fmean(differences):+.3f}{spread}"


def _best(rows: list[Row], reference: Row | None) -> list[str]:
    """The causal Soft-MoE models that cost no more than the dense baseline, best first."""
    ranked = sorted(
        (row for row in rows if row.affordable and row.variant.model.ffn == "soft_moe"), key=lambda row: row.loss
    )
    if reference is None or not ranked:
        return []
    lines = [
        f"The causal Soft-MoE models at no more FLOPs than {reference.variant.title} ({reference.loss:.3f}), best "
        "first, with the number of seeds of which each was better than dense:",
        "",
    ]
    for row in ranked[:5]:
        differences = _differences(row, reference)
        better = sum(difference > 0 for difference in differences)
        lines.append(f"1. {row.variant.title}: {row.loss:.3f} ({better} of {len(differences)} seeds)")
    return [*lines, ""]


def _future(rows: list[Row]) -> list[str]:
    """What the models that see the future look like when they do, and when they do not."""
    shown = [row for row in rows if not row.variant.model.causal]
    if not shown:
        return []
    shown += [row for row in rows if row.variant.name in ("none", *DENSE)]
    labels = shown[0].results[0]["sampled_labels"]
    lines = [
        "\\* `sequence` is not causal: its training loss, and its validation loss as training computes it, come from a "
        f"layer that sees the whole sequence. From the prefix alone, at the same {labels:,} sampled positions for all:",
        "",
        "| feed-forward layer | validation loss as trained | causal loss at the samples | leak in logits (their std) |",
        "| --- | --: | --: | --: |",
    ]
    for row in shown:
        forward = _with_spread(row.values("forward_validation_loss"))
        causal = _with_spread(row.values("causal_loss_at_samples"))
        leak = f"{max(row.values('leak')):.1g} ({row.mean('logits_std'):.1f})"
        lines.append(f"| {row.variant.title} | {forward} | {causal} | {leak} |")
    return [*lines, ""]


def _missing(rows: list[Row], failed: list[str]) -> list[str]:
    """How many seeds stand behind the figures, and what failed."""
    usual = statistics.mode(len(row.results) for row in rows)
    others = [f"{row.variant.title} ({len(row.results)})" for row in rows if len(row.results) != usual]
    lines = [f"{'Most' if others else 'All'} figures are over {usual} seed{'s' if usual > 1 else ''}."]
    if others:
        lines.append(f"Over another number of seeds: {'; '.join(others)}.")
    lines += [f"Failed: {failure}." for failure in failed]
    return [*lines, ""]


def draw(rows: list[Row], picture: Path) -> None:
    """Every seed of every variant as a dot, best variants on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted((row for row in rows if row.variant.model.causal), key=lambda row: -row.loss)
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {"baseline": "black", "mode": "tab:blue", "attempt": "tab:orange"}
    for place, row in enumerate(shown):
        colour = colours[row.variant.group]
        over = row.variant.flops > BUDGET
        fill = colour if BUDGET * EQUAL <= row.variant.flops <= BUDGET else "white"
        values = row.values("causal_validation_loss")
        axes.plot(
            values,
            [place] * len(values),
            ">" if over else "o",
            color=colour,
            markerfacecolor=fill,
            markersize=5,
            clip_on=False,
        )
        axes.plot([row.loss], [place], "|", color=colour, markersize=12)
    reference = _reference(rows)
    if reference is not None:
        axes.axvline(reference.loss, color="grey", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(shown)), [row.variant.title for row in shown], fontsize=7)
    for label, row in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_color(colours[row.variant.group])
    axes.set_xlabel(
        "causal validation loss, nats per byte (one dot a seed, bar: mean, dashed: best dense of equal FLOPs)"
    )
    axes.set_title("filled: equal FLOPs per token; hollow: fewer; triangle: more", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
