"""Which tokens each set of slots is a mean over, and which set each token reads: the blocks of a routing mode. And the
segments of mode ``merged``.

A sequence may hold several packed documents; each is then a sequence of its own. ``document_starts`` says so: for
every token, the position of the first token of its document. All of it is arithmetic on positions, the same for any
number of documents, and is made once for a batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from steel_megatron.errors import ConfigError


@dataclass(frozen=True)
class BlockPlan:
    """The blocks of a batch. N is 1 where all sequences have the same blocks, else B.

    Within a row, starts and ends ascend, and a block either goes on where the one before ended (the same start) or
    starts at or after that end. Rows with fewer blocks than R are filled up with empty ones at the end of the sequence.

    Attributes:
        starts: int64 [N, R]; slots k are a mean over the tokens starts[k] <= t < ends[k].
        ends: int64 [N, R].
        block_of_token: int64 [N, T], ascending; which block's slots each token reads.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    block_of_token: torch.Tensor

    def filled_up(self, blocks: int) -> BlockPlan:
        """The same with empty blocks at the end, that nobody reads, until there are ``blocks``."""
        missing, length = blocks - self.starts.size(1), self.block_of_token.size(1)
        starts, ends = (F.pad(tensor, (0, missing), value=length) for tensor in (self.starts, self.ends))
        return BlockPlan(starts, ends, self.block_of_token)


def is_refresh(position: torch.Tensor, block_length: int) -> torch.Tensor:
    """Whether slots are made anew before the token at this position of its document.

    At 1, 2, 4, ... below the block length, then after each block: the doubling at the start keeps the tokens of the
    first block from hanging on the very first token alone.
    """
    power_of_two = (position & (position - 1)) == 0
    return (position > 0) & torch.where(position < block_length, power_of_two, position % block_length == 0)


def check_document_starts(
    document_starts: torch.Tensor, batch: int, length: int, name: str = "document_starts"
) -> None:
    """Make sure that these are the document starts of [B, T] tokens.

    Args:
        document_starts: should be int64 [B, T]; values are checked on a CPU only.
        batch: B.
        length: T.
        name: what the message calls the tensor.

    Raises:
        ConfigError: the type or shape is wrong, or a value is neither its token's position nor the value before it.
    """
    if document_starts.shape != (batch, length) or document_starts.dtype != torch.int64:
        raise ConfigError(
            f"{name} is {document_starts.dtype} {list(document_starts.shape)}; it must be int64 "
            f"{[batch, length]}, the position of the first token of each token's document"
        )
    if document_starts.device.type != "cpu":
        return
    positions = torch.arange(length)
    before = torch.cat((torch.zeros_like(document_starts[:, :1]), document_starts[:, :-1]), dim=1)
    wrong = ((document_starts != positions) & (document_starts != before)).nonzero()
    if len(wrong):
        row, token = wrong[0].tolist()
        raise ConfigError(
            f"{name}[{row}, {token}] = {document_starts[row, token]}; it must be {token} (a document begins "
            f"here) or that of the token before, {before[row, token]}"
        )


def block_plan(
    length: int,
    block_length: int | None,
    device: torch.device,
    document_starts: torch.Tensor | None = None,
) -> BlockPlan:
    """The blocks of modes ``sequence`` (no block length: one block per document) and ``block_causal``.

    Args:
        length: T.
        block_length: tokens between two refreshes of the slots.
        device: where the plan's tensors are.
        document_starts: int64 [B, T]; None where every sequence is one document.
    """
    if document_starts is None:
        return _plan_of_one_document(length, block_length, device)
    return _plan(document_starts.to(device), block_length)


@functools.lru_cache(maxsize=64)
def _plan_of_one_document(length: int, block_length: int | None, device: torch.device) -> BlockPlan:
    return _plan(torch.zeros(1, length, dtype=torch.int64, device=device), block_length)


def _plan(document_starts: torch.Tensor, block_length: int | None) -> BlockPlan:
    rows, length = document_starts.shape
    tokens = torch.arange(length, device=document_starts.device).expand(rows, length)
    position = tokens - document_starts
    # A token opens a block if it is the first that reads it. The first token of a document has nothing before it and
    # reads slots made of itself.
    opens = position == 0
    if block_length is None:
        following = torch.where(opens, tokens, length).flip(1).cummin(1).values.flip(1)  # the start at or after a token
        end = torch.cat((following[:, 1:], torch.full_like(following[:, :1], length)), dim=1)
    else:
        end = torch.where(opens, tokens + 1, tokens)
        opens = opens | (is_refresh(position, block_length) & (position > 1))
    block_of_token = opens.long().cumsum(1) - 1
    blocks = int(block_of_token[:, -1].max()) + 1
    # Every token writes to its block's place, all but the opening ones to a place that is dropped.
    place = torch.where(opens, block_of_token, blocks)
    starts, ends = (
        torch.full((rows, blocks + 1), length, device=tokens.device).scatter(1, place, value)[:, :blocks].contiguous()
        for value in (document_starts, end)
    )
    return BlockPlan(starts, ends, block_of_token)


@dataclass(frozen=True)
class SegmentPlan:
    """The segments of a batch: pieces of up to a block length of tokens, which begin anew with each document.

    Rows with fewer segments than S are filled up with empty ones.

    Attributes:
        starts: int64 [B, S], position of the first token.
        lengths: int64 [B, S], number of tokens; 0 where there is no segment.
        follows: bool [B, S], whether the segment before belongs to the same document.
        total: M, segments of all sequences.
        longest: tokens of the longest segment.
        place_of_token: int64 [B, T], where each token is among the M * longest places of the M segments of all
            sequences, one segment after the other.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    follows: torch.Tensor
    total: int
    longest: int
    place_of_token: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """bool [B, S]: ``tensor[plan.real]`` of [B, S, ...] is [M, ...], without what rows are filled up with."""
        return self.lengths > 0

    def to(self, device: torch.device) -> SegmentPlan:
        """The same on another device."""
        starts, lengths, follows = (tensor.to(device) for tensor in (self.starts, self.lengths, self.follows))
        return SegmentPlan(starts, lengths, follows, self.total, self.longest, self.place_of_token.to(device))

    def to_segments(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, d] to [M, longest, d], zeros after the end of a segment."""
        places = tokens.new_zeros(self.total * self.longest, tokens.size(-1))
        filled = places.index_copy(0, self.place_of_token.flatten(), tokens.flatten(0, 1))
        return filled.view(self.total, self.longest, -1)

    def from_segments(self, results: torch.Tensor) -> torch.Tensor:
        """The way back of :meth:`to_segments`: [M, longest, d] to [B, T, d]."""
        return results.flatten(0, 1).index_select(0, self.place_of_token.flatten()).view(*self.place_of_token.shape, -1)


def segments_of_tokens(document_starts: torch.Tensor, block_length: int) -> torch.Tensor:
    """The number of each token's segment in its sequence: int64 [B, T], ascending.

    Args: as for :func:`segment_plan`.
    """
    position = torch.arange(document_starts.size(1), device=document_starts.device) - document_starts
    return (position % block_length == 0).long().cumsum(1) - 1


def segment_plan(document_starts: torch.Tensor, block_length: int) -> SegmentPlan:
    """The segments of mode ``merged`` where sequences hold several documents.

    Args:
        document_starts: int64 [B, T], for each token the position of the first token of its document.
        block_length: tokens of a segment; the last one of a document may be shorter.
    """
    rows, length = document_starts.shape
    tokens = torch.arange(length, device=document_starts.device).expand(rows, length)
    position = tokens - document_starts
    opens = position % block_length == 0
    segment = segments_of_tokens(document_starts, block_length)
    segments = int(segment[:, -1].max()) + 1
    empty = torch.zeros(rows, segments, dtype=torch.int64, device=tokens.device)
    lengths = empty.scatter_add(1, segment, torch.ones_like(segment))
    place = torch.where(opens, segment, segments)  # all tokens but the opening ones write to a place that is dropped
    wider = torch.zeros(rows, segments + 1, dtype=torch.int64, device=tokens.device)
    starts = wider.scatter(1, place, tokens)[:, :segments]
    follows = wider.scatter(1, place, position)[:, :segments] > 0
    of_row = segment[:, -1] + 1
    before = of_row.cumsum(0) - of_row  # segments of the rows before each row
    longest = int(lengths.max())
    place_of_token = (before.unsqueeze(1) + segment) * longest + position % block_length
    return SegmentPlan(starts, lengths, follows, int(of_row.sum()), longest, place_of_token)
