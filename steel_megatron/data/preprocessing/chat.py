"""``sft prepare`` and ``dpo prepare``: conversations and pairs to indexed corpora with labels, and a look at one."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from steel_megatron.config.chat import ChatKind, PrepareConfig
from steel_megatron.data.indexed.dataset import IndexedCorpus, open_indexed, refuse_other_tokenizer
from steel_megatron.data.indexed.labels import LABEL, LABELS_KEY, SECOND, SHORTENED, TOKENS_KEY, has_labels, open_labels
from steel_megatron.data.preprocessing.chat_encoder import ChatSettings
from steel_megatron.data.preprocessing.corpora import corpora_at
from steel_megatron.data.preprocessing.pipeline import preprocess
from steel_megatron.data.tokenizing.tokenizer import Tokenizer
from steel_megatron.errors import DataError

_CHUNK = 1 << 20
"""Labels that are read at a time."""
_LABEL, _END = "\x1b[32m", "\x1b[0m"
"""Green, and no colour."""
_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>pre {{ white-space: pre-wrap }} mark {{ background: #bfecc4 }} hr {{ border-top: 1px dashed }}</style>
<p>{title}. Marked: tokens that are predicted.</p><pre>{body}</pre>
"""


def prepare(config: PrepareConfig, kind: ChatKind) -> str:
    """Encode conversations, or pairs; resumes as ``preprocess`` does.

    Args:
        config: the job.
        kind: of rows that are expected.

    Returns:
        what was done, for people.

    Raises:
        DataError: as for :func:`~steel_megatron.data.preprocessing.pipeline.preprocess`.
    """
    settings = ChatSettings(kind, config.max_tokens, config.truncation, config.train_on)
    report = preprocess(config.job([TOKENS_KEY, LABELS_KEY]), chat=settings)
    lines = [report.summary()]
    splits = ("_train", "_valid") if config.valid_fraction else ("",)
    for split in splits:
        for prefix in corpora_at(f"{config.output_prefix}{split}_{TOKENS_KEY}_document"):
            labels = open_labels(open_indexed(prefix))
            predicted, shortened = _counts(labels)
            lines.append(
                f"{prefix}: {labels.documents:,} {'pairs' if kind == 'pairs' else 'conversations'}, {predicted:,} of "
                f"{labels.tokens:,} tokens predicted, {shortened:,} shortened ({config.truncation})"
            )
    return "\n".join(lines)


def _counts(labels: IndexedCorpus) -> tuple[int, int]:
    """Tokens that are predicted, and documents that were shortened."""
    chunks = [labels.flat[at : at + _CHUNK] for at in range(0, labels.tokens, _CHUNK)]
    return tuple(sum(int(((chunk & bit) > 0).sum()) for chunk in chunks) for bit in (LABEL, SHORTENED))  # type: ignore


def inspect(
    prefix: str, tokenizer: Tokenizer, documents: Sequence[int], color: bool, html_file: Path | None = None
) -> Iterator[str]:
    """Documents of a corpus with labels, for people.

    Args:
        prefix: of the corpus.
        tokenizer: its own.
        documents: numbers of the documents.
        color: whether predicted tokens are green; otherwise they are in ``[[`` and ``]]``.
        html_file: written with the same; None for none.

    Raises:
        DataError: the corpus has no labels or no such document, or was made with another tokenizer.
    """
    corpus = open_indexed(prefix)
    if not has_labels(corpus):
        raise DataError(f"{prefix} has no labels; make one that has with steel-megatron sft prepare")
    refuse_other_tokenizer(corpus, tokenizer.fingerprint)
    labels, pages = open_labels(corpus), []
    for number in documents:
        if not 0 <= number < corpus.documents:
            raise DataError(f"document is {number}; {prefix} has the documents 0 to {corpus.documents - 1:,}")
        runs = list(_runs(corpus.document(number), labels.document(number), tokenizer))
        origin = corpus.origin(number)
        where = f"{prefix}, document {number}" + (f" ({origin.path}, row {origin.row})" if origin else "")
        begin, end = (_LABEL, _END) if color else ("[[", "]]")
        shown = "".join(
            ("\n--- rejected ---\n" if second else "") + (f"{begin}{text}{end}" if label else text)
            for text, label, second in runs
        )
        pages.append((where, runs))
        yield f"{where}, {len(corpus.document(number)):,} tokens\n{shown}\n"
    if html_file is not None:
        from steel_megatron.files import write_atomically

        text = "".join(_PAGE.format(title=html.escape(where), body=_as_html(runs)) for where, runs in pages)
        write_atomically(html_file, text.encode(), DataError)


def _runs(ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[str, bool, bool]]:
    """Texts of tokens that follow each other and are all predicted or not, and whether a rejected text begins."""
    same = np.flatnonzero(np.diff(labels & LABEL) | (labels[1:] & SECOND)) + 1
    names = {index: name for name, index in tokenizer.control_tokens.items()}
    for part in np.split(np.arange(len(ids)), same):
        texts, plain = [], list[int]()
        for index in ids[part].tolist():
            if index in names:
                texts += [tokenizer.decode(plain), names[index]]
                plain = []
            else:
                plain.append(index)
        text = "".join([*texts, tokenizer.decode(plain)])
        yield text, bool(labels[part[0]] & LABEL), bool(labels[part[0]] & SECOND)


def _as_html(runs: Sequence[tuple[str, bool, bool]]) -> str:
    return "".join(
        ("<hr>" if second else "") + (f"<mark>{html.escape(text)}</mark>" if label else html.escape(text))
        for text, label, second in runs
    )
