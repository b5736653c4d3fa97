"""Scores of benchmarks: by subject, by category, and their averages; as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from steel_megatron.evaluation.subjects import CATEGORIES, PUBLISHED, PUBLISHED_COLUMNS

WIDTH = 80
_FIRST = ("acc", "exact_match,flexible-extract", "exact_match", "acc_norm")
"""The metric that stands for a task, the first one that it has."""


@dataclass(frozen=True)
class Score:
    """A share of right answers, or another mean.

    Attributes:
        value: the mean.
        stderr: its standard error; None where it is not known.
        questions: how many it is over.
    """

    value: float
    stderr: float | None
    questions: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"value": self.value, "stderr": self.stderr, "questions": self.questions}


def macro(scores: Iterable[Score]) -> Score:
    """The mean over subjects, each with the same weight, as C-Eval and CMMLU report it."""
    listed = list(scores)
    count = len(listed)
    stderr = None if any(one.stderr is None for one in listed) else _root(one.stderr or 0.0 for one in listed) / count
    return Score(sum(one.value for one in listed) / count, stderr, sum(one.questions for one in listed))


def micro(scores: Iterable[Score]) -> Score:
    """The mean over questions, as the harness's groups report it."""
    listed = list(scores)
    total = sum(one.questions for one in listed)
    value = sum(one.value * one.questions for one in listed) / total
    unknown = any(one.stderr is None for one in listed)
    stderr = None if unknown else _root((one.stderr or 0.0) * one.questions for one in listed) / total
    return Score(value, stderr, total)


def _root(values: Iterable[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


@dataclass(frozen=True)
class BenchmarkScores:
    """The scores of one benchmark.

    Attributes:
        name: as it was asked for.
        subjects: for each subject its metrics by name.
        categories: names of subjects by category.
    """

    name: str
    subjects: dict[str, dict[str, Score]]
    categories: dict[str, list[str]]

    @classmethod
    def of(
        cls, name: str, results: Mapping[str, Mapping[str, Any]], questions: Mapping[str, int], own: dict[str, Any]
    ) -> BenchmarkScores:
        """From what the harness reports.

        Args:
            name: of the benchmark.
            results: by the harness's names of tasks, what it calls ``metric,filter`` and ``metric_stderr,filter``.
            questions: by the same names.
            own: the harness's groups of these tasks.
        """
        subjects = {}
        prefix = _common(results)
        for task, found in results.items():
            metrics = {}
            for key, value in found.items():
                metric, _, kept = key.partition(",")
                if isinstance(value, float | int) and kept and not metric.endswith("_stderr"):
                    error = found.get(f"{metric}_stderr,{kept}")
                    known = isinstance(error, float | int) and math.isfinite(error)
                    label = metric if kept == "none" else key
                    metrics[label] = Score(float(value), float(error) if known else None, questions[task])  # type: ignore[arg-type]
            subjects[task.removeprefix(prefix)] = metrics
        table = {label: [one.removeprefix(prefix) for one in names] for label, names in own.items()}
        for label, names in CATEGORIES.get(name, {}).items():
            table[label] = [subject for subject in subjects if subject in names]
        return cls(name, subjects, {label: names for label, names in table.items() if names})

    @property
    def metric(self) -> str:
        """The metric that stands for the benchmark."""
        there = next(iter(self.subjects.values()))
        return next((name for name in _FIRST if name in there), next(iter(there)))

    @property
    def metrics(self) -> list[str]:
        """All metrics; the one that stands for the benchmark first."""
        there = next(iter(self.subjects.values()))
        return [self.metric, *(name for name in there if name != self.metric)]

    def over(self, subjects: Iterable[str], metric: str | None = None) -> list[Score]:
        """The scores of some subjects."""
        return [self.subjects[subject][metric or self.metric] for subject in subjects]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""

        def averages(subjects: list[str]) -> dict[str, Any]:
            return {
                metric: {kind.__name__: kind(self.over(subjects, metric)).to_dict() for kind in (macro, micro)}
                for metric in self.metrics
            }

        return {
            "metric": self.metric,
            "all": averages(list(self.subjects)),
            "categories": {label: averages(names) for label, names in self.categories.items()},
            "subjects": {
                subject: {metric: score.to_dict() for metric, score in metrics.items()}
                for subject, metrics in self.subjects.items()
            },
        }


def _common(names: Iterable[str]) -> str:
    """What all names begin with, up to ``_`` or ``-``: the harness puts the benchmark's name first."""
    listed = list(names)
    if len(listed) == 1:
        benchmark, line, subject = listed[0].partition("_")
        return benchmark + line if subject else ""
    shared = ""
    for letters in zip(*listed, strict=False):
        if len(set(letters)) > 1:
            break
        shared += letters[0]
    return shared[: shared.rfind("_") + 1]


def table(found: list[BenchmarkScores]) -> str:
    """All scores in percent, with standard errors, in lines of at most 80 characters."""
    lines = []
    for one in found:
        columns = one.metrics[:2]
        lines += [f"{one.name}, in percent", _row("", [_short(name) for name in columns], "questions")]
        for subject in one.subjects if len(one.subjects) > 1 else ():
            lines.append(_scores_row(f"  {subject}", [one.subjects[subject][name] for name in columns]))
        for label, names in one.categories.items():
            lines.append(_scores_row(f"mean of {label}", [macro(one.over(names, name)) for name in columns]))
        every = list(one.subjects)
        lines.append(_scores_row("mean of subjects", [macro(one.over(every, name)) for name in columns]))
        lines.append(_scores_row("mean of questions", [micro(one.over(every, name)) for name in columns]))
        lines.append("")
    return "\n".join(lines + _published(found)).rstrip("\n")


def _published(found: list[BenchmarkScores]) -> list[str]:
    """The paper's table 4, beside what was measured."""
    own = {one.name: f"{100 * macro(one.over(one.subjects)).value:.2f}" for one in found}
    if not own.keys() & set(PUBLISHED_COLUMNS):
        return []
    rows = [("this model", [own.get(name, "-") for name in PUBLISHED_COLUMNS])]
    rows += [(name, [f"{value:.2f}" for value in values]) for name, values in PUBLISHED.items()]
    head = f"{'published (Steel-LLM, table 4)':<36}" + "".join(f"{name:>12}" for name in PUBLISHED_COLUMNS)
    return [head, *(f"  {name:<34}" + "".join(f"{value:>12}" for value in values) for name, values in rows)]


def _scores_row(label: str, scores: list[Score]) -> str:
    cells = [
        f"{100 * one.value:6.2f}" + (f" ±{100 * one.stderr:5.2f}" if one.stderr is not None else "       ")
        for one in scores
    ]
    return _row(label, cells, f"{scores[0].questions:,}")


def _row(label: str, cells: list[str], last: str) -> str:
    text = label if len(label) <= 36 else label[:35] + "…"
    return (f"{text:<36}" + "".join(f"{cell:>16}" for cell in cells)).ljust(68) + f"{last:>12}"


def _short(metric: str) -> str:
    return metric.replace("exact_match,", "")
