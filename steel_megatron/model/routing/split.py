"""Routing where several processes share each sequence: means of tokens are merged, tokens stay where they are.

The slots of a block are a softmax-weighted mean over the tokens of an interval. Cut at the borders of the pieces that
processes hold, it is a mean of the parts' means, weighted by the parts' sums of exponentials. Of a part, the
log-sum-exp z_p of its logits and the mean s_p are all that another process needs, d + 1 numbers for each slot:

    z = log(sum over p of exp(z_p))        s = sum over p of exp(z_p - z) s_p

Every process computes the parts in its own pieces by the ordinary dispatch, one more "block" for each that others need;
those are gathered, and each process merges what the blocks of its own tokens take. In ``block_causal`` that is a prefix
over pieces in the order of the sequence, in ``sequence`` it is all of them; with packed documents, those of the same
document. All of it is autograd on slots, in float32 or wider.

What a process exports for each of its pieces are at most two parts a sequence (``block_causal``: the tail of the last
document, and what of it a block holds that ends here but is read further on; where blocks end with pieces these are the
same), so that S * (d + 1) numbers travel for a piece, whatever its number of tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from steel_megatron.ops import Routing, expert_weights, mixed_tokens, reference
from steel_megatron.ops.plan import BlockPlan, block_plan
from steel_megatron.ops.soft_moe import backend_of
from steel_megatron.parallel.collectives import gather_parts
from steel_megatron.parallel.sequence import Piece, SequenceSplit


@dataclass(frozen=True)
class LocalPlan:
    """The blocks that one process's tokens read, and the parts it computes. N is 1 or B, as in the whole plan.

    Attributes:
        starts: int64 [N, I]; part i is over the process's own tokens starts[i] <= t < ends[i], counted from its first.
        ends: int64 [N, I].
        exported: int64 [N, X], the parts that other processes may need; I where there is none.
        sets: bool [N, D, ranks * X], sets of exported parts of all processes; set 0 is empty.
        own_part: int64 [N, R], the part that each block takes itself; I if none.
        set_of_block: int64 [N, R], the set of exported parts that each block takes as well.
        block_of_token: int64 [N, L], ascending; which of the R blocks each of the process's tokens reads.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    exported: torch.Tensor
    sets: torch.Tensor
    own_part: torch.Tensor
    set_of_block: torch.Tensor
    block_of_token: torch.Tensor


class _Row:
    """The blocks of one sequence, cut at the borders of all processes' pieces."""

    def __init__(self, plan: BlockPlan, row: int, split: SequenceSplit) -> None:
        spans = zip(plan.starts[row].tolist(), plan.ends[row].tolist(), strict=True)
        blocks = torch.arange(plan.starts.size(1))
        read = plan.block_of_token[row].contiguous()
        first = torch.searchsorted(read, blocks).tolist()
        last = torch.searchsorted(read, blocks, right=True).tolist()
        # Blocks that nobody reads fill up the plan's shorter rows.
        self.spans = {k: span for k, span in enumerate(spans) if first[k] < last[k]}
        self.read = read
        self.pieces = [piece for held in split.pieces for piece in held]
        self.parts: list[list[Piece]] = []  # by piece, ascending
        self.exports: list[list[Piece]] = []
        self.taken: dict[int, list[tuple[int, Piece, bool]]] = {k: [] for k in self.spans}  # piece, part, exported
        for number, (start, stop) in enumerate(self.pieces):
            parts, exports = set(), set()
            for k, (low, high) in self.spans.items():
                part = (max(low, start), min(high, stop))
                if part[0] < part[1]:
                    exported = first[k] < start or last[k] > stop  # a token elsewhere reads the block
                    self.taken[k].append((number, part, exported))
                    parts.add(part)
                    if exported:
                        exports.add(part)
            self.parts.append(sorted(parts))
            self.exports.append(sorted(exports))

    def blocks_of(self, held: tuple[Piece, ...]) -> list[int]:
        """The blocks that the tokens of some pieces read, ascending."""
        read = [self.read[start:stop].unique().tolist() for start, stop in held if start < stop]
        return sorted({k for blocks in read for k in blocks})


def local_plan(plan: BlockPlan, split: SequenceSplit, rank: int, *, equal_blocks: bool) -> LocalPlan:
    """What one of the processes that share sequences does of a plan for whole sequences.

    Args:
        plan: the blocks of whole sequences; its tensors are looked at on the CPU.
        split: who holds which tokens.
        rank: this process's number among those that share a sequence.
        equal_blocks: fill up with empty blocks until all processes have equally many.
    """
    rows = [_Row(plan, number, split) for number in range(len(plan.starts))]
    per_piece = max(len(exports) for row in rows for exports in row.exports)
    held = split.pieces[rank]
    counts = [len(row.blocks_of(pieces)) for row in rows for pieces in (split.pieces if equal_blocks else [held])]
    blocks = max(counts)
    parts = max(1, max(sum(map(len, _held(row.parts, split, rank))) for row in rows))
    local = [_local_row(row, split, rank, per_piece, parts) for row in rows]
    sets = max(len(row.sets) for row in local)
    members = torch.zeros(len(rows), sets, split.ranks * len(held) * per_piece, dtype=torch.bool)
    for row, one in enumerate(local):
        for number, members_of_set in enumerate(one.sets):
            members[row, number, list(members_of_set)] = True
    positions = split.positions(rank)
    read = plan.block_of_token[:, positions].contiguous()
    for row, one in enumerate(local):
        read[row] = torch.searchsorted(torch.tensor(one.blocks), read[row].clone())
    return LocalPlan(
        starts=_stack([one.starts for one in local], parts, len(positions)),
        ends=_stack([one.ends for one in local], parts, len(positions)),
        exported=_stack([one.exported for one in local], len(held) * per_piece, parts),
        sets=members,
        own_part=_stack([one.own_part for one in local], blocks, parts),
        set_of_block=_stack([one.set_of_block for one in local], blocks, 0),
        block_of_token=read,
    )


@dataclass(frozen=True)
class _LocalRow:
    """One row of a :class:`LocalPlan` as lists."""

    blocks: list[int]
    starts: list[int]
    ends: list[int]
    exported: list[int]
    sets: list[tuple[int, ...]]
    own_part: list[int]
    set_of_block: list[int]


def _held(by_piece: list[list[Piece]], split: SequenceSplit, rank: int) -> list[list[Piece]]:
    """The entries of this process's pieces."""
    each = len(split.pieces[rank])
    return by_piece[rank * each : (rank + 1) * each]


def _local_row(row: _Row, split: SequenceSplit, rank: int, per_piece: int, none: int) -> _LocalRow:
    held = split.pieces[rank]
    index: dict[Piece, int] = {}  # parts of this process
    starts: list[int] = []
    ends: list[int] = []
    exported: list[int] = []
    offset = 0
    for (start, stop), parts, exports in zip(
        held, _held(row.parts, split, rank), _held(row.exports, split, rank), strict=True
    ):
        for part in parts:
            index[part] = len(starts)
            starts.append(part[0] - start + offset)
            ends.append(part[1] - start + offset)
        exported += [index[part] for part in exports] + [none] * (per_piece - len(exports))
        offset += stop - start
    blocks = row.blocks_of(held)
    sets: dict[tuple[int, ...], int] = {(): 0}
    own_part, set_of_block = [], []
    for k in blocks:
        taken = tuple(
            piece * per_piece + row.exports[piece].index(part) for piece, part, shared in row.taken[k] if shared
        )
        set_of_block.append(sets.setdefault(taken, len(sets)))
        own = [index[part] for _, part, shared in row.taken[k] if not shared]
        assert len(own) <= 1, "a block that tokens of several pieces read has no part of its own"
        own_part.append(own[0] if own else none)
    return _LocalRow(blocks, starts, ends, exported, list(sets), own_part, set_of_block)


def _stack(rows: list[list[int]], width: int, fill: int) -> torch.Tensor:
    """int64 [rows, width], the shorter ones filled up."""
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width)


@functools.lru_cache(maxsize=64)
def local_plan_of_one_document(
    split: SequenceSplit, rank: int, block_length: int | None, equal_blocks: bool, device: torch.device
) -> LocalPlan:
    """The plan where every sequence is one document.

    Args:
        split: who holds which tokens.
        rank: this process's number among those that share a sequence.
        block_length: of ``block_causal``; None for ``sequence``.
        equal_blocks: as in :func:`local_plan`.
        device: where the plan's tensors are.
    """
    whole = block_plan(split.length, block_length, torch.device("cpu"))
    plan = local_plan(whole, split, rank, equal_blocks=equal_blocks)
    return LocalPlan(**{name: tensor.to(device) for name, tensor in vars(plan).items()})


def dispatch_split(
    x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor, mix: str, plan: LocalPlan, group: dist.ProcessGroup
) -> tuple[torch.Tensor, Routing]:
    """Mix the tokens of all processes that share sequences into the slots of the blocks that this one's tokens read.

    Sends exported * S * (d + 1) numbers for each sequence forward and receives those of all; backward the same.

    Args:
        x: [B, L, d], this process's tokens.
        phi: [d, E, P].
        scale: [1].
        mix: ``raw`` or ``normalized``.
        plan: this process's plan.
        group: the processes that share the sequences, in the order of the plan's split.

    Returns:
        slots [B, R, E, P, d] in the type of ``x``, 0 for blocks that fill up, and what ``combine`` needs. Gradients of
        ``phi`` and ``scale`` are partial: those of the process's own tokens.
    """
    parts, logits = partial_means(x, phi, scale, mix, plan)
    everyones = None
    if plan.exported.size(1):
        everyones = gather_parts(_take(parts, plan.exported), group)
    slots = merge_parts(parts, everyones, plan)
    return slots.to(x.dtype).unflatten(2, phi.shape[1:]), Routing(logits, plan.block_of_token)


def partial_means(
    x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor, mix: str, plan: LocalPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts that a process computes from its own tokens, in float32 or wider.

    Returns:
        [B, I + 1, S, d + 1], mean and log-sum-exp of the plan's parts and of one that is empty; and logits [B, L, S].
    """
    keys = reference.slot_keys(phi, scale)
    tokens = reference.wide(x)  # so that slots come in float32 as well
    means, logits, lse = backend_of(tokens).dispatch(tokens, keys, plan.starts, plan.ends, mix == "normalized")
    return F.pad(torch.cat((means, lse.unsqueeze(-1)), dim=-1), (0, 0, 0, 0, 0, 1)), logits


def merge_parts(parts: torch.Tensor, everyones: torch.Tensor | None, plan: LocalPlan) -> torch.Tensor:
    """The slots of a process's blocks.

    Args:
        parts: [B, I + 1, S, d + 1], what this process computed.
        everyones: [ranks, B, X, S, d + 1], what all processes export; None if that is nothing.
        plan: this process's plan.

    Returns:
        [B, R, S, d]
    """
    nothing = parts.size(1) - 1
    own, own_exists = _take(parts, plan.own_part), plan.own_part != nothing
    if everyones is None:
        return own[..., :-1] * own_exists[..., None, None]
    sums = _merge(everyones.transpose(0, 1).flatten(1, 2), plan.sets)
    pairs = torch.stack((own, _take(sums, plan.set_of_block)), dim=2).flatten(0, 1)  # [B * R, 2, S, d + 1]
    exist = torch.stack((own_exists, plan.set_of_block != 0), dim=-1).expand(len(parts), -1, -1)
    return _merge(pairs, exist.flatten(0, 1).unsqueeze(1)).view(own.shape)[..., :-1]


def _take(parts: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[B, M, S, d + 1], the parts with these numbers; index [N, M]."""
    if len(index) == 1:
        return parts[:, index[0]]
    return parts[torch.arange(len(parts), device=parts.device).unsqueeze(1), index]


def _merge(parts: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    """Merge sets of parts.

    Args:
        parts: [B, Q, S, d + 1], mean and log-sum-exp of each part.
        sets: bool [B or 1, D, Q], the parts of each set.

    Returns:
        [B, D, S, d + 1]: mean and log-sum-exp of each set; for an empty one 0 and less than any logit.
    """
    means, lse = parts[..., :-1], parts[..., -1]
    members = sets.unsqueeze(-1)
    # Parts outside the set may be empty, with minus infinity: they must not get into softmax or its gradient.
    lse_of_members = torch.where(members, lse.unsqueeze(1), reference.LEAST)  # [B, D, Q, S]
    weights = lse_of_members.softmax(2) * members
    merged = torch.einsum("bdqs,bqsc->bdsc", weights, means)
    return torch.cat((merged, lse_of_members.logsumexp(2).unsqueeze(-1)), dim=-1)


def merge_weights_split(
    x: torch.Tensor,
    phi: torch.Tensor,
    scale: torch.Tensor,
    *,
    mix: str,
    block_length: int,
    split: SequenceSplit,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """:func:`steel_megatron.ops.merge_weights` for this process's segments.

    A segment is computed with the routing of the mean of the segment before. Where that one lies on another process,
    the mean comes from there: one vector for each piece and sequence.

    Args:
        x: [B, L, d], this process's tokens; its pieces begin and end with segments.
        phi: [d, E, P].
        scale: [1].
        mix: what the mean is taken of.
        block_length: tokens of a segment.
        split: who holds which tokens.
        group: the processes that share the sequences.

    Returns:
        [B, L / block_length, E] in float32 or wider.
    """
    mixed = mixed_tokens(reference.wide(x), mix)
    means = mixed.unflatten(1, (-1, block_length)).mean(2)
    held = split.pieces[group.rank()]
    offsets, total = [], 0
    for start, stop in held:
        offsets.append(total)
        total += (stop - start) // block_length
    # The last segment's mean of each piece; of an empty piece nobody asks for it.
    last = [
        max(0, offset + (stop - start) // block_length - 1) for offset, (start, stop) in zip(offsets, held, strict=True)
    ]
    everyones = gather_parts(means[:, last], group)  # [ranks, B, pieces, d]
    # The first token stands at the end. All are one tensor, so that backward reaches the collective on every process.
    known = torch.cat((everyones.transpose(0, 1).flatten(1, 2), mixed[:, :1]), dim=1)
    before = []
    for offset, (start, stop) in zip(offsets, held, strict=True):
        if start < stop:
            before.append(known[:, [_ending_at(start, split)]])
            before.append(means[:, offset : offset + (stop - start) // block_length - 1])
    return expert_weights(torch.cat(before, dim=1), phi, scale)


def _ending_at(position: int, split: SequenceSplit) -> int:
    """The number of the piece that ends at a position, counted over all processes; one past the last for position 0."""
    ends = [stop if start < stop else -1 for held in split.pieces for start, stop in held]
    return ends.index(position) if position else len(ends)
