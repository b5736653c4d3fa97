"""Which partial slots each of the processes that share sequences computes, sends and merges.

The slots of a block are a mean over an interval of tokens. The chunks of tokens that processes hold cut this interval
into spans; over a span, one process computes partial slots (:mod:`steel_megatron.model.routing.split`). Plans are
arithmetic on positions, the same on all processes, and made on the CPU.

    chunk     consecutive tokens on one process: one or two of each sequence (called pieces in SequenceSplit)
    span      what a chunk holds of a block's interval, (first token, token after the last)
    sent      of a span: tokens in other chunks read a block that it is part of, so its partial slots are gathered
    set       gathered partial slots that a block merges: a prefix in block_causal, all of a document in sequence

A chunk sends at most two spans of a sequence (``block_causal``: the tail of the last document, and what of it a block
holds that ends here but is read further on; where blocks end with chunks these are the same), so that S * (d + 1)
numbers are sent for a chunk, whatever its number of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from steel_megatron.ops.plan import BlockPlan, block_plan
from steel_megatron.parallel.sequence import SequenceSplit, TokenRange

Span = TokenRange


@dataclass(frozen=True)
class SplitPlan:
    """The blocks that one process's tokens read, and the spans it computes. N is 1 or B, as in the whole plan.

    Attributes:
        starts: int64 [N, I]; span i is over the process's own tokens starts[i] <= t < ends[i], counted from its first.
        ends: int64 [N, I].
        sent: int64 [N, X], the spans whose partial slots other processes may need; I where there is none.
        sets: bool [N, D, ranks * X], sets of sent spans of all processes; set 0 is empty.
        own_span: int64 [N, R], the span that each block takes and nobody sends; I if none.
        set_of_block: int64 [N, R], the set of sent spans that each block takes as well.
        block_of_token: int64 [N, L], ascending; which of the R blocks each of the process's tokens reads.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    sent: torch.Tensor
    sets: torch.Tensor
    own_span: torch.Tensor
    set_of_block: torch.Tensor
    block_of_token: torch.Tensor

    def filled_up(self, blocks: int) -> SplitPlan:
        """The same with empty blocks at the end, that nobody reads, until there are ``blocks``."""
        missing = blocks - self.own_span.size(1)
        return dataclasses.replace(
            self,
            own_span=F.pad(self.own_span, (0, missing), value=self.starts.size(1)),
            set_of_block=F.pad(self.set_of_block, (0, missing)),
        )

    def to(self, device: torch.device) -> SplitPlan:
        """The same on another device."""
        return SplitPlan(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class _CutSequence:
    """The blocks of one sequence, cut at the borders of all processes' chunks."""

    def __init__(self, plan: BlockPlan, row: int, split: SequenceSplit) -> None:
        intervals = zip(plan.starts[row].tolist(), plan.ends[row].tolist(), strict=True)
        blocks = torch.arange(plan.starts.size(1))
        read = plan.block_of_token[row].contiguous()
        first = torch.searchsorted(read, blocks).tolist()
        last = torch.searchsorted(read, blocks, right=True).tolist()
        # Blocks that nobody reads fill up the plan's shorter rows.
        self.intervals = {k: interval for k, interval in enumerate(intervals) if first[k] < last[k]}
        self.read = read
        self.spans: list[list[Span]] = []  # by chunk, ascending
        self.sent: list[list[Span]] = []
        self.spans_of_block: dict[int, list[tuple[int, Span, bool]]] = {k: [] for k in self.intervals}
        for chunk, (start, stop) in enumerate(piece for held in split.ranges for piece in held):
            spans, all_sent = set(), set()
            for k, (low, high) in self.intervals.items():
                span = (max(low, start), min(high, stop))
                if span[0] < span[1]:
                    sent = first[k] < start or last[k] > stop  # a token in another chunk reads the block
                    self.spans_of_block[k].append((chunk, span, sent))
                    spans.add(span)
                    if sent:
                        all_sent.add(span)
            self.spans.append(sorted(spans))
            self.sent.append(sorted(all_sent))

    def blocks_of(self, held: tuple[TokenRange, ...]) -> list[int]:
        """The blocks that the tokens of some chunks read, ascending."""
        read = [self.read[start:stop].unique().tolist() for start, stop in held if start < stop]
        return sorted({k for blocks in read for k in blocks})


def split_plan(plan: BlockPlan, split: SequenceSplit, rank: int, *, equal_blocks: bool) -> SplitPlan:
    """What one of the processes that share sequences does of a plan for whole sequences.

    Args:
        plan: the blocks of whole sequences; its tensors are looked at on the CPU.
        split: who holds which tokens.
        rank: this process's number among those that share a sequence.
        equal_blocks: fill up with empty blocks until all processes have equally many.
    """
    cut = [_CutSequence(plan, number, split) for number in range(len(plan.starts))]
    per_chunk = max(len(sent) for row in cut for sent in row.sent)
    held = split.ranges[rank]
    counts = [len(row.blocks_of(chunks)) for row in cut for chunks in (split.ranges if equal_blocks else [held])]
    blocks = max(counts)
    spans = max(1, max(sum(map(len, _held(row.spans, split, rank))) for row in cut))
    rows = [_row_of_rank(row, split, rank, per_chunk, spans) for row in cut]
    sets = torch.zeros(
        len(rows), max(len(row.sets) for row in rows), split.ranks * len(held) * per_chunk, dtype=torch.bool
    )
    for number, row in enumerate(rows):
        for set_number, members in enumerate(row.sets):
            sets[number, set_number, list(members)] = True
    positions = split.positions(rank)
    read = plan.block_of_token[:, positions].contiguous()
    for number, row in enumerate(rows):
        read[number] = torch.searchsorted(torch.tensor(row.blocks), read[number].clone())
    return SplitPlan(
        starts=_stack([row.starts for row in rows], spans, len(positions)),
        ends=_stack([row.ends for row in rows], spans, len(positions)),
        sent=_stack([row.sent for row in rows], len(held) * per_chunk, spans),
        sets=sets,
        own_span=_stack([row.own_span for row in rows], blocks, spans),
        set_of_block=_stack([row.set_of_block for row in rows], blocks, 0),
        block_of_token=read,
    )


@dataclass(frozen=True)
class _RowOfRank:
    """One row of a :class:`SplitPlan` as lists."""

    blocks: list[int]
    starts: list[int]
    ends: list[int]
    sent: list[int]
    sets: list[tuple[int, ...]]
    own_span: list[int]
    set_of_block: list[int]


def _held(by_chunk: list[list[Span]], split: SequenceSplit, rank: int) -> list[list[Span]]:
    """The entries of this process's chunks."""
    each = len(split.ranges[rank])
    return by_chunk[rank * each : (rank + 1) * each]


def _row_of_rank(cut: _CutSequence, split: SequenceSplit, rank: int, per_chunk: int, none: int) -> _RowOfRank:
    held = split.ranges[rank]
    index: dict[Span, int] = {}  # spans of this process
    starts: list[int] = []
    ends: list[int] = []
    sent: list[int] = []
    offset = 0
    for (start, stop), spans, sent_spans in zip(
        held, _held(cut.spans, split, rank), _held(cut.sent, split, rank), strict=True
    ):
        for span in spans:
            index[span] = len(starts)
            starts.append(span[0] - start + offset)
            ends.append(span[1] - start + offset)
        sent += [index[span] for span in sent_spans] + [none] * (per_chunk - len(sent_spans))
        offset += stop - start
    blocks = cut.blocks_of(held)
    sets: dict[tuple[int, ...], int] = {(): 0}
    own_span, set_of_block = [], []
    for k in blocks:
        members = tuple(
            chunk * per_chunk + cut.sent[chunk].index(span) for chunk, span, is_sent in cut.spans_of_block[k] if is_sent
        )
        set_of_block.append(sets.setdefault(members, len(sets)))
        own = [index[span] for _, span, is_sent in cut.spans_of_block[k] if not is_sent]
        assert len(own) <= 1, "a block that tokens of several chunks read has no span of its own"
        own_span.append(own[0] if own else none)
    return _RowOfRank(blocks, starts, ends, sent, list(sets), own_span, set_of_block)


def _stack(rows: list[list[int]], width: int, fill: int) -> torch.Tensor:
    """int64 [rows, width], the shorter ones filled up."""
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width)


@functools.lru_cache(maxsize=64)
def split_plan_of_one_document(
    split: SequenceSplit, rank: int, block_length: int | None, equal_blocks: bool, device: torch.device
) -> SplitPlan:
    """The plan where every sequence is one document.

    Args:
        split: who holds which tokens.
        rank: this process's number among those that share a sequence.
        block_length: of ``block_causal``; None for ``sequence``.
        equal_blocks: as in :func:`split_plan`.
        device: where the plan's tensors are.
    """
    whole = block_plan(split.length, block_length, torch.device("cpu"))
    return split_plan(whole, split, rank, equal_blocks=equal_blocks).to(device)
