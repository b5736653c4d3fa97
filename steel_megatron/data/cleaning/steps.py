"""The steps of a cleaning job."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from steel_megatron.data.cleaning.deduplication import (
    BYTES_A_DOCUMENT,
    EXACT,
    KEPT,
    NEAR,
    SIGNATURE,
    VERDICT,
    find_duplicates,
)
from steel_megatron.data.cleaning.filters import Filter, Perplexity, Resources
from steel_megatron.data.cleaning.funnel import READ, FunnelCounts, UnitCounts, difference, dump_counts
from steel_megatron.data.cleaning.job import CleaningStep, Job, Unit
from steel_megatron.data.cleaning.language_model import LanguageModel
from steel_megatron.data.cleaning.mappers import Mapper
from steel_megatron.data.cleaning.texts import DocumentText, Lost
from steel_megatron.data.cleaning.unit_files import UnitFiles, damaged, load_array, rows_of, save_array, storable
from steel_megatron.data.reading.documents import Document, SkippedRow
from steel_megatron.jobs.step import marker
from steel_megatron.log import get_logger

logger = get_logger(__name__)

LONGEST = 2_000_000
"""Characters of a document beyond which it is dropped, unread or behind the mapper that made it so long: counting its
n-grams would fill the memory."""


@dataclass(frozen=True)
class Rejection:
    """Why a document is dropped."""

    value: float | None
    """The number that decided."""
    reason: str


def operate(text: DocumentText, operator: object, resources: Resources) -> Rejection | bool:
    """Apply a mapper or a filter to a text.

    Args:
        text: the text; a mapper changes it in place.
        operator: a :class:`Mapper` or a :class:`Filter`.
        resources: what filters need loaded.

    Returns:
        why the text is dropped, or else whether it was changed.
    """
    if isinstance(operator, Mapper):
        try:
            changed = text.apply(operator.apply)
        except Lost as lost:
            return Rejection(None, str(lost))
        if changed and (length := len(str(text))) > LONGEST:
            return Rejection(length, f"more than {LONGEST:,} characters")
        return changed
    assert isinstance(operator, Filter), operator
    value, (low, high) = operator.measure(text.sample(resources)), operator.bounds(resources)
    if low <= value <= high:
        return False
    side = f"below {low:.6g}" if value < low else f"above {high:.6g}"
    return Rejection(round(value, 6), f"{operator.measured}: {value:.6g}, {side}")


def _size(text: str) -> int:
    return len(text.encode())


def _place(at: Document | SkippedRow) -> dict[str, Any]:
    return {"path": storable(at.source), "row": at.row}


def _row(unit: Unit, at: Document | SkippedRow, text: str) -> dict[str, Any]:
    row = {"text": text, "source": unit.source, **_place(at)}
    return row | {"dialogue": True} if isinstance(at, Document) and at.dialogue else row


class _Cleaner:
    """Runs the operators of a job over the documents of one unit, with counts and quarantine."""

    def __init__(self, job: Job, number: int, files: UnitFiles) -> None:
        self.job, self.unit, self.files = job, job.units[number], files
        model = job.language_model
        self.resources = Resources(job.recipe.tokenizer, str(model) if model else None, self.unit.source)
        self.counts: UnitCounts = {READ: FunnelCounts()}
        self.operators = [
            (label, operator)
            for label, operator in zip(job.recipe.labels, job.recipe.operators, strict=True)
            if isinstance(operator, (Mapper, Filter))
            and not (isinstance(operator, Perplexity) and operator.model == "none")
        ]
        self.counts |= {label: FunnelCounts() for label, _ in self.operators}

    def kept(self) -> Iterator[tuple[Document, DocumentText]]:
        """The documents that all operators keep."""
        skipped: list[SkippedRow] = []
        for document in self.job.documents(self.unit, skipped):
            self._count_skipped(skipped)
            try:
                text = self._clean(document)
            except Exception as error:
                error.add_note(f"at {document.source}, row {document.row}")
                raise
            if text is not None:
                yield document, text
        self._count_skipped(skipped)

    def _count_skipped(self, skipped: list[SkippedRow]) -> None:
        for row in skipped:
            self.counts[READ].enter(_size(row.raw))
            self._drop(READ, row, row.raw, Rejection(None, row.reason))
        skipped.clear()

    def _clean(self, document: Document) -> DocumentText | None:
        size = _size(document.text)
        self.counts[READ].enter(size)
        problem = f"more than {LONGEST:,} characters" if len(document.text) > LONGEST else None
        try:
            text = DocumentText(document.text, document.dialogue and problem is None)
        except Lost as lost:
            problem = str(lost)
        if problem is not None:
            self._drop(READ, document, document.text, Rejection(None, problem))
            return None
        self.counts[READ].keep(size)
        for label, operator in self.operators:
            counts = self.counts[label]
            counts.enter(size)
            before = str(text) if counts.wants_changes and isinstance(operator, Mapper) else ""
            done = operate(text, operator, self.resources)
            if isinstance(done, Rejection):
                self._drop(label, document, str(text), done)
                return None
            if not done:
                counts.keep(size)
                continue
            after = str(text)
            was, size = size, _size(after)
            counts.keep(size, changed_from=was)
            if counts.wants_changes:
                place = {"file": self.unit.files[document.source], **_place(document)}
                counts.changes.append(place | difference(before, after))
        return text

    def _drop(self, label: str, at: Document | SkippedRow, text: str, why: Rejection) -> None:
        entry = _row(self.unit, at, text) | {"operator": label, "value": why.value, "reason": why.reason}
        self.files.write(f"output/quarantine/{label}", entry)
        self.counts[label].drop(_size(text), sample_of(entry, self.unit.files[at.source]))


def sample_of(entry: dict[str, Any], file: int) -> dict[str, Any]:
    """What the report shows of a quarantined row, and the number of its file to sort by."""
    return {"file": file, **{key: entry[key] for key in ("path", "row", "text", "value", "reason")}}


@dataclass(frozen=True)
class CleanUnits(CleaningStep):
    """Runs mappers and filters; writes what they keep, what they drop, and the signatures of what they keep."""

    name = "clean"

    def bytes_to_read(self) -> int:
        return sum(self.job.units[number].size for number in self.missing())

    def work(self, number: int) -> None:
        job, unit = self.job, self.job.units[number]
        exact, near = job.recipe.deduplicators()
        target = "cleaned" if job.deduplicates else f"output/{unit.source}"
        signatures = []
        with UnitFiles(job.folder, f"{number:06d}") as files:
            cleaner = _Cleaner(job, number, files)
            for document, text in cleaner.kept():
                files.write(target, _row(unit, document, str(text)))
                if job.deduplicates:
                    seen = text.sample(cleaner.resources).text
                    high, low = exact.hash(seen) if exact else (0, 0)
                    place = unit.files[document.source], document.row
                    signatures.append((*place, high, low, near.hash(seen) if near else 0))
            if job.deduplicates:
                save_array(job.folder / "signatures" / f"{number:06d}.npy", np.array(signatures, dtype=SIGNATURE))
            written = files.commit()
        self.mark(number, dump_counts(cleaner.counts, written))


@dataclass(frozen=True)
class FindDuplicates(CleaningStep):
    """Compares the signatures of all units; one unit of work."""

    name = "duplicates"

    @property
    def count(self) -> int:
        return 1

    def memory(self) -> int:
        signatures = (self.job.folder / "signatures").glob("*.npy")
        documents = sum(path.stat().st_size for path in signatures) // SIGNATURE.itemsize
        return (1 << 30) + documents * BYTES_A_DOCUMENT

    def work(self, number: int) -> None:
        job = self.job
        paths = [job.folder / "signatures" / f"{unit:06d}.npy" for unit in range(len(job.units))]
        arrays = [load_array(path, job.folder) for path in paths]
        sizes = [len(array) for array in arrays]
        signatures = np.concatenate(arrays)
        order = np.lexsort((signatures["row"], signatures["file"]))  # parts of one file alternate
        verdicts = np.empty(len(order), dtype=VERDICT)
        found = find_duplicates(signatures[order], *job.recipe.deduplicators())
        found["original"] = order[found["original"]]
        verdicts[order] = found
        # Of an original the report shows where it stands: its file and its row.
        where = signatures[["file", "row"]][verdicts["original"]]
        edges = np.cumsum([0, *sizes])
        for unit in range(len(job.units)):
            begin, end = edges[unit], edges[unit + 1]
            save_array(job.folder / "verdicts" / f"{unit:06d}.npy", verdicts[begin:end])
            save_array(job.folder / "originals" / f"{unit:06d}.npy", where[begin:end])
        self.mark(number)


@dataclass(frozen=True)
class WriteKept(CleaningStep):
    """Writes the documents that are no duplicates."""

    name = "deduplicate"

    def work(self, number: int) -> None:
        job, unit, name = self.job, self.job.units[number], f"{number:06d}"
        labels = job.recipe.labels[-sum(map(bool, job.recipe.deduplicators())) :]
        names = {
            kind: found.name for kind, found in zip((EXACT, NEAR), job.recipe.deduplicators(), strict=True) if found
        }
        verdicts = load_array(job.folder / "verdicts" / f"{name}.npy", job.folder)
        originals = load_array(job.folder / "originals" / f"{name}.npy", job.folder)
        paths = {file: storable(path) for other in job.units for path, file in other.files.items()}
        files_of = {storable(path): file for path, file in unit.files.items()}
        counts = {label: FunnelCounts() for label in labels}
        cleaned = job.folder / "cleaned" / f"{name}.jsonl.zst"
        if len(verdicts) and not cleaned.exists():
            raise damaged(cleaned, job.folder, "not there")
        with UnitFiles(job.folder, name) as files:
            for place, row in enumerate(rows_of(cleaned) if len(verdicts) else ()):
                size, kind = _size(row["text"]), int(verdicts["kind"][place])
                by = None if kind == KEPT else names[kind]
                for label in labels:
                    counts[label].enter(size)
                    if label == by:
                        break
                    counts[label].keep(size)
                if by is None:
                    files.write(f"output/{unit.source}", row)
                    continue
                file, at = originals[place].tolist()
                original = {"path": paths[file], "row": at}
                distance = int(verdicts["distance"][place])
                reason = f"{'same text as' if kind == EXACT else 'near'} {original['path']}, row {original['row']}"
                entry = row | {"operator": by, "value": distance, "reason": reason, "original": original}
                files.write(f"output/quarantine/{by}", entry)
                counts[by].drop(size, sample_of(entry, files_of[row["path"]]))
            written = files.commit()
        self.mark(number, dump_counts(counts, written))
        cleaned.unlink(missing_ok=True)


def forget_units_without_documents(job: Job) -> None:
    """Let units be cleaned again whose documents are gone before they are known to be written without duplicates.

    They go once they are written; somebody who then removes the marker of that wants the unit to be done again.
    """
    if not job.deduplicates:
        return
    for number in WriteKept(job).missing():
        done = marker(job.folder, CleanUnits.name, number)
        signatures = job.folder / "signatures" / f"{number:06d}.npy"
        cleaned = job.folder / "cleaned" / f"{number:06d}.jsonl.zst"
        if done.exists() and not cleaned.exists() and len(load_array(signatures, job.folder)):
            logger.warning(f"{cleaned} is not there: its unit is cleaned again")
            done.unlink()


def _trains_on(job: Job) -> list[int]:
    """The units from whose texts the language model learns."""
    operator = job.recipe.perplexity
    assert operator is not None
    names = [name.strip() for name in operator.train_on.split(",") if name.strip()]
    return [number for number, unit in enumerate(job.units) if not names or unit.source in names]


@dataclass(frozen=True)
class SampleTexts(CleaningStep):
    """Takes, from the begin of each unit, its share of the texts that the language model learns from."""

    name = "sample"

    def work(self, number: int) -> None:
        job, operator = self.job, self.job.recipe.perplexity
        assert operator is not None
        chosen = _trains_on(job)
        if number in chosen:
            share = job.units[number].size / max(sum(job.units[other].size for other in chosen), 1)
            wanted = math.ceil(operator.train_characters * share)
            steps = [
                step for step in job.recipe.operators if isinstance(step, (Mapper, Filter)) and step is not operator
            ]
            resources = Resources(job.recipe.tokenizer)
            with UnitFiles(job.folder, f"{number:06d}") as files:
                for document in job.documents(job.units[number], []):
                    text = _passed(document, steps, resources)
                    if text is not None:
                        files.write("sampled", {"text": text, "source": job.units[number].source})
                        wanted -= len(text)
                        if wanted <= 0:
                            break
                files.commit()
        self.mark(number)


def _passed(document: Document, steps: list[Mapper | Filter], resources: Resources) -> str | None:
    """What operators make of a document; None if one drops it."""
    if len(document.text) > LONGEST:
        return None
    try:
        text = DocumentText(document.text, document.dialogue)
    except Lost:
        return None
    if any(isinstance(operate(text, step, resources), Rejection) for step in steps):
        return None
    return text.sample(resources).text


@dataclass(frozen=True)
class TrainModel(CleaningStep):
    """Trains the language model; one unit of work."""

    name = "train"

    @property
    def count(self) -> int:
        return 1

    def work(self, number: int) -> None:
        job, operator = self.job, self.job.recipe.perplexity
        assert operator is not None and job.language_model is not None
        files = [job.folder / "sampled" / f"{unit:06d}.jsonl.zst" for unit in _trains_on(job)]
        texts = ((row["source"], row["text"]) for path in files if path.exists() for row in rows_of(path))
        LanguageModel.train(texts, operator.order).save(job.language_model)
        self.mark(number)


STEPS: tuple[type[CleaningStep], ...] = (SampleTexts, TrainModel, CleanUnits, FindDuplicates, WriteKept)
"""All steps that a job may have."""
