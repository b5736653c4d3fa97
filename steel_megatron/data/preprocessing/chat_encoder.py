"""Conversations and preference pairs -> token ids and labels: what worker processes of ``sft prepare`` do."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steel_megatron.config.chat import ChatKind, LabelledTokens, Truncation
from steel_megatron.data.indexed.labels import LABEL, LABELS_KEY, SECOND, SHORTENED, TOKENS_KEY
from steel_megatron.data.preprocessing.encoder import (
    TRAIN,
    VALID,
    Documents,
    Encoded,
    Encoder,
    Skipped,
    SkippedTo,
    Task,
)
from steel_megatron.data.reading.chunks import BadRow
from steel_megatron.data.reading.conversations import Chat, Turn
from steel_megatron.data.reading.documents import check_unicode, converted
from steel_megatron.data.reading.sources import Dialogue, Source
from steel_megatron.data.reading.text_batch import TextBatch
from steel_megatron.data.tokenizing.chat_template import ChatTemplate


@dataclass(frozen=True)
class Example:
    """One document: a conversation, or the two of a pair one after the other."""

    ids: np.ndarray
    """int32 [tokens]."""
    labels: np.ndarray
    """Bits of :mod:`~steel_megatron.data.indexed.labels`, int32 [tokens]."""
    text: str
    """What was said, by which its split is chosen."""


@dataclass(frozen=True)
class ChatSettings:
    """What decides the ids and labels of a conversation, but for the tokenizer."""

    kind: ChatKind
    max_tokens: int
    """Tokens of the longest document."""
    truncation: Truncation
    train_on: LabelledTokens


@dataclass(frozen=True)
class ChatEncoder(Encoder):
    """How conversations become ids and labels."""

    chat: ChatSettings = ChatSettings("sft", 2, "drop", "assistant")

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's template."""
        return ChatTemplate(self.tokenizer)

    def encode(self, task: Task) -> Encoded:
        """Parse, render and encode.

        Raises:
            DataError: a bad row, where those stop the job.
        """
        found: list[tuple[int, int, Example]] = []
        skipped: list[Skipped] = []
        for number, source, chunk in task.pieces:
            reader = self.sources[TOKENS_KEY][source]
            on_skip = SkippedTo(skipped, number, TOKENS_KEY)
            make = functools.partial(self.example_of, reader)
            found += [(row, number, one) for row, one in converted(chunk, make, self.on_bad_row, on_skip)]
        documents = {}
        valid = self._valid(TextBatch.of([one.text for _, _, one in found]))
        for split, which in ((VALID, valid), (TRAIN, ~valid)):
            chosen = [one for one, wanted in zip(found, which.tolist(), strict=True) if wanted]
            for key in (TOKENS_KEY, LABELS_KEY) if chosen else ():
                documents[split, key] = self._documents(chosen, key)
        return Encoded(documents, skipped)

    def _documents(self, chosen: Sequence[tuple[int, int, Example]], key: str) -> Documents:
        rows, inputs = (np.array(column, dtype=np.int64) for column in list(zip(*chosen, strict=True))[:2])
        examples = [one for _, _, one in chosen]
        ids = np.concatenate([one.ids if key == TOKENS_KEY else one.labels for one in examples])
        lengths = np.array([len(one.ids) for one in examples], dtype=np.int64)
        sizes = np.array([len(one.text.encode()) for one in examples], dtype=np.int64)
        return Documents(ids.astype(self.dtype), lengths, rows, inputs, sizes)

    def example_of(self, source: Source, value: object) -> Example | None:
        """The document of a row; None for one without any text.

        Raises:
            BadRow: it is no conversation (or no pair), is too long, or nothing of it would be trained on.
        """
        dialogue = source.text_of(value)
        if not isinstance(dialogue, Dialogue) or dialogue.chat is None:
            if dialogue == Dialogue(""):
                return None
            raise BadRow("the row is a text, not a conversation")
        chat = dialogue.chat
        if bool(chat.rejected) != (self.chat.kind == "pairs"):
            what, wanted = ("a pair", "a conversation") if chat.rejected else ("a conversation", "a pair")
            raise BadRow(f"the row is {what} where {wanted} was expected")
        text = "\n".join(f"{turn.role}: {turn.content}" for turn in (*chat.turns, *chat.rejected))
        check_unicode(text)
        ids, labels = self._pair(chat) if chat.rejected else self._conversation(chat.turns, self.chat.max_tokens)
        return Example(ids, labels, text)

    def _pair(self, chat: Chat) -> tuple[np.ndarray, np.ndarray]:
        """Both conversations, of which only the last answers are labels."""
        halves = [self.template.encode(turns, only_last=True) for turns in (chat.turns, chat.rejected)]
        for number, (_, said) in enumerate(halves):
            if not said[1:].any():
                raise BadRow(f"the {('chosen', 'rejected')[number]} answer has no token")
        ids, said = (np.concatenate(parts) for parts in zip(*halves, strict=True))
        labels = np.where(said, LABEL, 0).astype(np.int32)
        if len(ids) > self.chat.max_tokens:
            raise BadRow(f"both conversations have {len(ids):,} tokens together, more than {self.chat.max_tokens:,}")
        labels[len(halves[0][0])] |= SECOND
        return ids, labels

    def _conversation(self, turns: Sequence[Turn], most: int) -> tuple[np.ndarray, np.ndarray]:
        ids, said = self.template.encode(turns)
        shortened = len(ids) > most
        if shortened:
            ids, said = self._shortened(turns, ids, said, most)
        labels = np.where(said, LABEL, 0).astype(np.int32)
        if not labels[1:].any():
            raise BadRow("no word of the assistant is left" if shortened else "the assistant's words are no token")
        if self.chat.train_on == "all":
            labels[:] = LABEL
        if shortened:
            labels[-1] |= SHORTENED
        return ids, labels

    def _shortened(
        self, turns: Sequence[Turn], ids: np.ndarray, said: np.ndarray, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the policy leaves of a conversation that is too long."""
        if self.chat.truncation == "drop":
            raise BadRow(f"it has {len(ids):,} tokens, more than {most:,}")
        if self.chat.truncation == "oldest_turns":
            system, left = list(turns[:1] if turns[0].role == "system" else ()), list(turns)
            left = left[len(system) :]
            while any(turn.role == "user" for turn in left[1:]):
                del left[0]
                while left[0].role != "user":
                    del left[0]
                ids, said = self.template.encode([*system, *left])
                if len(ids) <= most:
                    return ids, said
            raise BadRow(f"its last turns alone have {len(ids):,} tokens, more than {most:,}")
        if self.chat.truncation == "answer":
            return ids[:most], said[:most]
        end = ids[np.flatnonzero(said)[-1]]
        ids, said = ids[:most].copy(), said[:most].copy()
        if said[-1]:  # cut within an answer, which is told to end here
            ids[-1] = end
        return ids, said


def chat_source(source: str) -> str:
    """The source of inputs of conversations: where none is named, the form is told by the columns."""
    return "chat" if source == "text" else source
