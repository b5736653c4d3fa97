"""The funnel report: what each operator took from each source, as JSON, as a table and as a picture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

READ = "read"
"""The first row of the funnel: rows that gave no document."""
SAMPLES = 3
_SHOWN_CHARACTERS = 300
_SHOWN_OF_CHANGE, _BEFORE_CHANGE = 150, 30
_SUMS = (
    "documents_in", "bytes_in", "documents_dropped", "bytes_dropped", "documents_changed", "documents_halved",
    "bytes_kept",
)  # fmt: skip


@dataclass
class FunnelCounts:
    """What one operator did to one source. Bytes are those of the texts in UTF-8."""

    documents_in: int = 0
    bytes_in: int = 0
    documents_dropped: int = 0
    bytes_dropped: int = 0
    """Bytes of the dropped documents; what mappers cut from documents that are kept is not included."""
    documents_changed: int = 0
    documents_halved: int = 0
    """Of the changed documents those that lost more than half of their bytes."""
    bytes_kept: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    """The first dropped documents in input order."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Of the first changed documents in input order what stood where the change begins, before and after."""

    @property
    def wants_changes(self) -> bool:
        """Whether more changes are to be shown."""
        return len(self.changes) < SAMPLES

    def enter(self, size: int) -> None:
        """Count a document that came to the operator."""
        self.documents_in += 1
        self.bytes_in += size

    def keep(self, size: int, changed_from: int | None = None) -> None:
        """Count a document that is kept, and the size it had before if it was changed."""
        self.bytes_kept += size
        if changed_from is not None:
            self.documents_changed += 1
            self.documents_halved += 2 * size < changed_from

    def drop(self, size: int, sample: Mapping[str, Any]) -> None:
        """Count a dropped document."""
        self.documents_dropped += 1
        self.bytes_dropped += size
        if len(self.samples) < SAMPLES:
            self.samples.append({**sample, "text": sample["text"][:_SHOWN_CHARACTERS]})

    def add(self, other: FunnelCounts) -> None:
        """Add the counts of another unit; samples come first that are first in the input."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.samples = _first([*self.samples, *other.samples])
        self.changes = _first([*self.changes, *other.changes])


def _first(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: (sample["file"], sample["row"]))[:SAMPLES]


def difference(before: str, after: str) -> dict[str, str]:
    """What two texts have from a little before the place where they begin to differ."""
    same = next((place for place, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None)
    begin = max((min(len(before), len(after)) if same is None else same) - _BEFORE_CHANGE, 0)
    return {"before": before[begin : begin + _SHOWN_OF_CHANGE], "after": after[begin : begin + _SHOWN_OF_CHANGE]}


UnitCounts = dict[str, FunnelCounts]
"""The counts of one unit by the label of the operator."""


def dump_counts(counts: UnitCounts, files: Mapping[str, int]) -> bytes:
    """The counts of a unit, and the bytes of each file that it wrote by its path, as JSON."""
    by_label = {label: asdict(value) for label, value in counts.items()}
    return json.dumps({"counts": by_label, "files": files}, ensure_ascii=False).encode()


def load_counts(content: bytes) -> tuple[UnitCounts, dict[str, int]]:
    """What :func:`dump_counts` wrote; earlier versions wrote no files."""
    found = json.loads(content)
    counts, files = (found["counts"], found["files"]) if "counts" in found else (found, {})
    return {label: FunnelCounts(**value) for label, value in counts.items()}, files


def merge(units: Iterable[tuple[str, UnitCounts]], operators: list[dict[str, Any]]) -> dict[str, Any]:
    """The funnel of a job.

    Args:
        units: source and counts of each unit.
        operators: for each, READ first: its ``operator`` (label), ``settings`` and ``left_out``.

    Returns:
        the report; the sums of documents agree from each operator to the next.
    """
    by_label: dict[str, dict[str, FunnelCounts]] = {entry["operator"]: {} for entry in operators}
    for source, counts in units:
        for label, value in counts.items():
            by_label[label].setdefault(source, FunnelCounts()).add(value)
    for label, sources in by_label.items():
        for source, counts_of in sources.items():
            for sample in [*counts_of.samples, *counts_of.changes]:
                del sample["file"]
            assert counts_of.documents_dropped <= counts_of.documents_in, (label, source)
    rows = []
    for entry in operators:
        sources = by_label[entry["operator"]]
        sums = {name: sum(getattr(counts, name) for counts in sources.values()) for name in _SUMS}
        rows.append({**entry, **sums, "sources": {name: asdict(counts) for name, counts in sources.items()}})
    return {"totals": _totals(rows), "operators": rows}


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Documents in = kept + dropped, of all and by source; asserted along the whole chain."""
    active = [row for row in rows if not row["left_out"]]
    totals: dict[str, Any] = {}
    for source in [None, *active[0]["sources"]]:
        chain = [row if source is None else row["sources"].get(source, asdict(FunnelCounts())) for row in active]
        for earlier, later in itertools.pairwise(chain):
            kept = earlier["documents_in"] - earlier["documents_dropped"]
            assert later["documents_in"] == kept, f"{source}: {later['documents_in']} documents came of {kept}"
        last = chain[-1]
        summary = {
            "documents_in": chain[0]["documents_in"],
            "documents_kept": last["documents_in"] - last["documents_dropped"],
            "documents_dropped": sum(counts["documents_dropped"] for counts in chain),
            "bytes_in": chain[0]["bytes_in"],
            "bytes_kept": last["bytes_kept"],
        }
        assert summary["documents_in"] == summary["documents_kept"] + summary["documents_dropped"], summary
        totals |= summary if source is None else {}
        if source is not None:
            totals.setdefault("sources", {})[source] = summary
    return totals


def table(report: Mapping[str, Any]) -> str:
    """The funnel as lines of text."""
    lines = [f"{'operator':36}{'documents in':>14}{'dropped':>10}{'changed':>10}{'MB kept':>10}{'of input':>10}"]
    whole = report["totals"]["bytes_in"] or 1
    for row in report["operators"]:
        if row["left_out"]:
            lines.append(f"{row['operator']:36}{'left out':>14}")
            continue
        lines.append(
            f"{row['operator']:36}{row['documents_in']:>14,}{row['documents_dropped']:>10,}{row['documents_changed']:>10,}"
            f"{row['bytes_kept'] / 1e6:>10,.2f}{row['bytes_kept'] / whole:>10.1%}"
        )
    lines.append("")
    lines.append(f"{'source':36}{'documents in':>14}{'dropped':>10}{'kept':>10}{'MB kept':>10}{'of input':>10}")
    totals = report["totals"]
    for name, row in [*totals.get("sources", {}).items(), ("all", totals)]:
        lines.append(
            f"{name:36}{row['documents_in']:>14,}{row['documents_dropped']:>10,}{row['documents_kept']:>10,}"
            f"{row['bytes_kept'] / 1e6:>10,.2f}{row['bytes_kept'] / (row['bytes_in'] or 1):>10.1%}"
        )
    return "\n".join(lines)


def draw(report: Mapping[str, Any], picture: Path) -> None:
    """Draw what is left behind each operator: one bar each, by source."""
    from matplotlib.figure import Figure

    rows = report["operators"]
    figure = Figure(figsize=(10, 1.5 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    sources = list(rows[0]["sources"])
    begin = [0.0] * len(rows)
    kept_before: dict[str, float] = {}
    for number, source in enumerate(sources):
        widths = []
        for row in rows:
            if not row["left_out"]:
                counts = row["sources"].get(source)
                kept_before[source] = counts["bytes_kept"] / 1e6 if counts else 0.0
            widths.append(kept_before.get(source, 0.0))
        axes.barh(places, widths, left=begin, label=source, color=f"C{number % 10}")
        begin = [left + width for left, width in zip(begin, widths, strict=True)]
    longest = max(begin) or 1.0
    for place, (row, width) in enumerate(zip(rows, begin, strict=True)):
        note = "left out" if row["left_out"] else f"{width / longest:.0%}"
        if row["documents_dropped"]:
            note += f", {row['documents_dropped']:,} dropped"
        axes.text(width + 0.01 * longest, place, note, va="center", fontsize=8)
    axes.set_yticks(places, [row["operator"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * longest)
    axes.set_xlabel("text kept behind the operator, MB")
    totals = report["totals"]
    axes.set_title(f"{totals['documents_kept']:,} of {totals['documents_in']:,} documents kept", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside lower center", ncols=5, frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
