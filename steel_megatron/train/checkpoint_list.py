"""What lies in a run's folder of checkpoints: whole ones, and what is left of others."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from steel_megatron.errors import CheckpointError, SteelError
from steel_megatron.train.checkpoint_manifest import MANIFEST, read_info, read_manifest

_NAME = re.compile(r"step_(\d+)(?:\.\d+)?|\.step_(\d+)\.(?:partial|old)")
_UNFINISHED = {
    ".partial": ("half-written", "a save is under way, or was cut short; a resume passes it over"),
    ".old": ("left over", "what a later save of the same step replaced; it can be removed when no job writes here"),
}
SET_ASIDE = "set_aside"
"""Where a run that went back keeps later checkpoints."""


@dataclass(frozen=True)
class Listed:
    """A checkpoint, or what is left of one.

    Attributes:
        path: its folder.
        step: by its name.
        layout: that saved it; empty if nothing says so.
        bytes: of all its files.
        saved: when it was finished, or last written to, in seconds since 1970.
        state: ``whole``, ``damaged``, ``half-written`` for a save that is under way or was cut short, or ``left over``.
        finite: whether the save found all numbers finite; None if it does not say (formats before 2).
        problem: what is wrong with it, in one line; empty for whole ones.
    """

    path: Path
    step: int
    layout: str
    bytes: int
    saved: float
    state: str
    finite: bool | None
    problem: str = ""


def list_checkpoints(folder: Path) -> list[Listed]:
    """The checkpoints of a run in the order of their steps; sizes are compared, checksums are not.

    Args:
        folder: the run's, or its ``checkpoints``.

    Raises:
        CheckpointError: there is no such folder, or it holds no checkpoint of any kind.
    """
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if not inside.is_dir():
        raise CheckpointError(f"there is no folder {folder}; name a run's folder (checkpoint.directory)")
    paths = [path for path in (*inside.iterdir(), *inside.glob(f"{SET_ASIDE}/*")) if _NAME.fullmatch(path.name)]
    found = [_look_at(path) for path in paths if path.is_dir()]
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoints (step_...); name a run's folder (checkpoint.directory)")
    return sorted(found, key=lambda one: (one.step, one.path.name.lstrip("."), str(one.path)))


def _look_at(path: Path) -> Listed:
    matched = _NAME.fullmatch(path.name)
    assert matched is not None
    files = [file.stat() for file in path.rglob("*") if file.is_file()]
    newest = max((file.st_mtime for file in files), default=path.stat().st_mtime)
    state, problem, layout, finite = "whole", "", "", None
    try:
        manifest = read_manifest(path)
        layout = manifest["layout"]
        finite = _finite(manifest.get("norms"))
        newest = (path / MANIFEST).stat().st_mtime
        read_info(path)
    except CheckpointError as error:
        state, problem = "damaged", str(error)
    except SteelError:  # routing code of the user's own, which is not looked at here
        pass
    if path.name.startswith("."):
        state, problem = _UNFINISHED[path.suffix]
    return Listed(
        path, int(matched[1] or matched[2]), layout, sum(file.st_size for file in files), newest, state, finite, problem
    )


def _finite(norms: object) -> bool | None:
    """What the norms that a save noted say."""
    if not isinstance(norms, dict) or not norms:
        return None
    return all(isinstance(norm, (int, float)) and math.isfinite(norm) for norm in norms.values())
