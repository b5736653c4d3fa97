"""What the commands on checkpoints print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steel_megatron.train.checkpoint_info import CheckpointInfo
from steel_megatron.train.checkpoint_list import Listed
from steel_megatron.train.model_path import find_checkpoint

if TYPE_CHECKING:
    from steel_megatron.train.checkpoint_compare import Difference


def verified(path: str) -> CheckpointInfo:
    """The checkpoint that a path names, whose files have all been compared with their checksums.

    Raises:
        CheckpointError: it is not whole, or a file is damaged.
    """
    info = find_checkpoint(path)
    from steel_megatron.platform import prepare

    prepare()  # before megatron-core is imported
    from steel_megatron.train.checkpoint import verify

    verify(info.path)
    return info


def table(found: list[Listed], now: float) -> str:
    """At most 80 columns wide, with what is wrong below."""
    lines = [f"{'step':>10}  {'layout':<26}{'size':>9}{'age':>7}  {'whole':<14}finite"]
    notes = []
    for one in found:
        whole = "yes" if one.state == "whole" else one.state
        finite = {True: "yes", False: "no", None: "unknown"}[one.finite]
        layout = one.layout if len(one.layout) <= 25 else one.layout.replace(" ", "")[:25]
        aside = " (set aside)" if one.path.parent.name == "set_aside" else ""
        size, age = size_text(one.bytes), _age(now - one.saved)
        lines.append(f"{one.step:>10}  {layout or '-':<26}{size:>9}{age:>7}  {whole:<14}{finite}")
        if one.problem or aside:
            notes.append(f"{one.path.name}{aside}{': ' if one.problem else ''}{one.problem}")
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def difference_text(one: Difference) -> str:
    """How a tensor differs, without its name."""
    if one.kind.startswith("only"):
        return f"{one.kind} ({one.of:,} elements)"
    sides = f"{one.kind} {one.a} in A, {one.b} in B" if one.a else ""
    if one.kind == "shape":
        return sides
    numbers = (
        f"{one.elements:,} of {one.of:,} elements differ, by at most {one.max_abs:.3g} "
        f"({one.max_rel:.3g} of the largest)"
    )
    return f"{sides}; {numbers}" if sides else numbers


def saved_by(info: CheckpointInfo) -> str:
    """Layout and number of processes."""
    return f"{info.layout}, {process_count(info.world_size)}"


def process_count(processes: int) -> str:
    """``1 process`` or ``8 processes``."""
    return "1 process" if processes == 1 else f"{processes:,} processes"


def size_text(size: float) -> str:
    """In decimal units, as disks and networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 1000 else f"{size:,.0f} TB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
