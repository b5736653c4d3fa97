"""A model behind the harness's interface: likelihoods in batches, greedy replies, answers kept for later runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from steel_megatron.config import ModelConfig
from steel_megatron.errors import ConfigError
from steel_megatron.evaluation.answers import Answers, key_of
from steel_megatron.hf.texts import Texts
from steel_megatron.model.forward import Forward, launched_forward, next_logits_of, replicas
from steel_megatron.parallel.agreement import first_process_bytes
from steel_megatron.parallel.topology import Topology

_KEPT_AFTER = 4096
"""Requests after which their answers are written, so that a killed run does not begin anew."""


@dataclass
class Share:
    """The part of the work that this process does, and how it gets the rest."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def all(self, own: list[Any]) -> list[Any]:
        """The results of all processes, each process's in turn as :meth:`of` dealt them."""
        if self.size == 1:
            return own
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, own, group=self.group)
        return [parts[number % self.size][number // self.size] for number in range(sum(map(len, parts)))]

    def of(self, work: list[Any]) -> list[Any]:
        """This process's part."""
        return work[self.rank :: self.size]


@dataclass
class Counts:
    """What the harness does not report.

    Attributes:
        computed: requests that the model answered.
        reused: requests with an answer from an earlier run.
        cut: prompts that lost their beginning, being longer than the model's sequences.
    """

    computed: int = 0
    reused: int = 0
    cut: set[str] = field(default_factory=set)


class EvaluatedModel(TemplateLM):
    """A model that every process of a launch calls with the same requests.

    Args:
        forward: logits at places of texts.
        next_logits: logits of a text's next token, for replies.
        texts: the model's tokenizer.
        settings: the model's; in a causal one, texts of different lengths may share a batch.
        batch_size: texts that are computed together.
        fingerprint: of all that decides about answers.
        answers: those of earlier runs, on rank 0.
        share: which part of the work is this process's.
    """

    def __init__(
        self,
        forward: Forward,
        next_logits: Callable[[torch.Tensor], torch.Tensor],
        texts: Texts,
        *,
        settings: ModelConfig,
        batch_size: int,
        fingerprint: str,
        answers: Answers | None = None,
        share: Share | None = None,
    ) -> None:
        super().__init__()
        self._forward, self._next_logits, self._texts = forward, next_logits, texts
        self._max_length, self._vocab_size, self._batch_size = settings.sequence_length, settings.vocab_size, batch_size
        self._padded, self.fingerprint = settings.causal, fingerprint
        self.answers, self._share = answers, share or Share()
        self.counts = Counts()

    @classmethod
    def launched(
        cls,
        chunks: Sequence[Any],
        settings: ModelConfig,
        topology: Topology,
        texts: Texts,
        *,
        batch_size: int,
        fingerprint: str,
    ) -> EvaluatedModel:
        """A model that the processes of a launch hold together.

        Args:
            chunks: this process's parts of it, in evaluation mode.
            topology: the process groups.
            settings, texts, batch_size, fingerprint: as for the class.
        """
        forward = launched_forward(chunks, settings, topology)
        return cls(
            forward,
            next_logits_of(forward),
            texts,
            settings=settings,
            batch_size=batch_size,
            fingerprint=fingerprint,
            share=Share(*replicas(topology)),
        )

    @property
    def eot_token_id(self) -> int:
        """A token that ends a reply."""
        return min(self._texts.ends)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that stands alone."""
        return self._texts.first_id

    @property
    def tokenizer_name(self) -> str:
        """Of the harness's own caches, which are not used."""
        return self.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text."""
        return self._texts.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation."""
        return self._texts.render(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is the greedy one."""
        own = super().loglikelihood
        found = self._answered("loglikelihood", requests, lambda some: own(some, disable_tqdm=True))
        return [(value, greedy) for value, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's sequence length."""
        return self._answered("rolling", requests, self._rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy replies, each up to one of its stop strings."""
        return self._answered("generate", requests, self._replies)

    def _answered(self, kind: str, requests: list[Instance], compute: Callable[[list[Instance]], list[Any]]) -> Any:
        """Answers to requests, those of earlier runs included; equal requests are computed once."""
        keys = [key_of(self.fingerprint, kind, request.args) for request in requests]
        known = self._known(keys)
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        self.counts.reused += len(known)
        self.counts.computed += len(missing)
        todo = list(missing.items())
        for start in range(0, len(todo), _KEPT_AFTER):
            some = todo[start : start + _KEPT_AFTER]
            fresh = compute([request for _, request in some])
            new = dict(zip([key for key, _ in some], fresh, strict=True))
            if self.answers is not None:
                self.answers.write(new)
            known |= new
        return [known[key] for key in keys]

    def _known(self, keys: list[str]) -> dict[str, Any]:
        """Answers of earlier runs, the same on all processes: rank 0 reads them."""
        found = self.answers.read(keys) if self.answers is not None else {}
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return found
        known: dict[str, Any] = json.loads(first_process_bytes(json.dumps(found).encode()))
        return known

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Likelihoods of tokens; requests whose texts differ in the last token alone share a forward pass."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, ((context, continuation), before, after) in enumerate(requests):
            self._check(context, continuation, before, after)
            groups.setdefault((*before, *after[:-1]), []).append(number)
        inputs = sorted(groups, key=lambda ids: (-len(ids), ids))
        batches = list(self._batches(inputs))
        results = [self._scored(batch, groups, requests) for batch in self._share.of(batches)]
        found = {number: score for batch in self._share.all(results) for number, score in batch}
        return [found[number] for number in range(len(requests))]

    def _check(self, context: str, continuation: str, before: list[int], after: list[int]) -> None:
        self._check_ids(before + after)
        if not after or len(after) > self._max_length:
            raise ConfigError(
                f"the continuation {continuation[:40]!r} has {len(after)} tokens; it must have at least 1 and at most "
                f"the model's {self._max_length}"
            )
        if len(before) + len(after) > self._max_length + 1:
            self.counts.cut.add(context)

    def _check_ids(self, ids: list[int]) -> None:
        if ids and max(ids) >= self._vocab_size:
            raise ConfigError(
                f"the tokenizer gives token id {max(ids)}; the model has ids 0 to {self._vocab_size - 1}: it was "
                "trained with another tokenizer"
            )

    def _batches(self, inputs: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Batches of neighbours; of equal lengths where a token sees what stands after it."""
        batch: list[tuple[int, ...]] = []
        for ids in inputs:
            if len(batch) == self._batch_size or (batch and not self._padded and len(batch[0]) != len(ids)):
                yield batch
                batch = []
            batch.append(ids)
        if batch:
            yield batch

    def _scored(
        self, batch: list[tuple[int, ...]], groups: dict[tuple[int, ...], list[int]], requests: list[Any]
    ) -> list[tuple[int, tuple[float, bool]]]:
        """Scores of the requests of a batch's inputs, by the requests' numbers."""
        inputs = [list(ids[-self._max_length :]) for ids in batch]
        counts = [max(len(requests[number][2]) for number in groups[ids]) for ids in batch]
        places = [
            (row, position)
            for row, (ids, count) in enumerate(zip(inputs, counts, strict=True))
            for position in range(len(ids) - count, len(ids))
        ]
        scores = []
        logs = self._forward(inputs, places).log_softmax(-1).split(counts)
        for ids, log_probabilities in zip(batch, logs, strict=True):
            greedy = log_probabilities.argmax(-1)
            for number in groups[ids]:
                after = torch.tensor(requests[number][2])
                value = log_probabilities[-len(after) :].gather(-1, after[:, None]).sum()
                scores.append((number, (float(value), bool((greedy[-len(after) :] == after).all()))))
        return scores

    def _rolling(self, requests: list[Instance]) -> list[float]:
        totals = []
        for request in requests:
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self._max_length,
                    context_len=1,
                ),
            )
            parts = self._loglikelihood_tokens([(("", ""), before, after) for before, after in windows])
            totals.append(sum(value for value, _ in parts))
        return totals

    def _replies(self, requests: list[Instance]) -> list[str]:
        work = [self._prompt(*request.args) for request in requests]  # first all of it: all processes refuse the same
        return self._share.all([self._reply(*one) for one in self._share.of(work)])

    def _prompt(self, context: str, settings: dict[str, Any]) -> tuple[list[int], int, list[str]]:
        """A prompt's ids, the most tokens of its reply, and what ends it."""
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        most = int(settings.get("max_gen_toks", settings.get("max_new_tokens", 256)))
        if settings.get("do_sample") or settings.get("temperature"):
            raise ConfigError(f"a task asks for sampled replies ({settings}); only greedy ones are evaluated")
        if most >= self._max_length:
            raise ConfigError(
                f"replies of up to {most} tokens leave no room for a prompt in the model's sequences of "
                f"{self._max_length}; lower --max_new_tokens"
            )
        ids = self.tok_encode(context)
        self._check_ids(ids)
        if len(ids) > self._max_length - most:
            self.counts.cut.add(context)
            ids = ids[-(self._max_length - most) :]
        return ids, most, stops

    def _reply(self, ids: list[int], most: int, stops: list[str]) -> str:
        """One greedy reply."""
        new: list[int] = []
        while len(new) < most:
            token = int(self._next_logits(torch.tensor([ids + new]))[: self._vocab_size].argmax())
            if token in self._texts.ends:
                break
            new.append(token)
            text = self._texts.decode(new)
            if any(stop in text for stop in stops):
                break
        text = self._texts.decode(new)
        for stop in stops:
            text = text.split(stop)[0]
        return text
