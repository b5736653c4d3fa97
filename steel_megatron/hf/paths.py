"""What can be said of the folders and sizes that a conversion is given before anything large is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steel_megatron.errors import CheckpointError

REPORT = "conversion.json"
"""What a conversion says of itself, next to the weights."""
MARKS = (REPORT, "modeling_steel.py")
"""What shows that a folder is an earlier output, which may be replaced."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_config(folder: Path) -> dict[str, Any]:
    """What a model folder's config.json holds.

    Raises:
        CheckpointError: the file cannot be read, is not JSON or holds no object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder} is not a model's folder: {path.name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold an object; it holds a {type(config).__name__}")
    return config


def check_output(output: Path, overwrite: bool, source: Path, marks: tuple[str, ...]) -> None:
    """Refuse an output that would change or replace what it must not.

    Args:
        output: the folder to make; a path without links, as is ``source``.
        overwrite: whether an earlier output may be replaced.
        source: the folder that is converted.
        marks: files of which every earlier output of this kind holds one.

    Raises:
        CheckpointError: the output lies in the source or around it, is there already, or is something else.
    """
    if source == output or source in output.parents:
        raise CheckpointError(f"the output {output} lies inside {source}, which it would change; choose another")
    if output in source.parents:
        raise CheckpointError(f"the output {output} holds {source}, which it would replace; choose another")
    if not output.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{output} is already there; choose another name, or give --overwrite true")
    known = output.is_dir() and (any((output / mark).is_file() for mark in marks) or not any(output.iterdir()))
    if not known:
        raise CheckpointError(
            f"{output} is already there and is not an earlier output (it has no {' or '.join(marks)}), so it is not "
            "replaced; choose another name, or remove it yourself"
        )


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``, ``500MB``, ``2GiB``, or a plain number.

    Raises:
        CheckpointError: it is none.
    """
    upper = text.strip().upper()
    unit = next((unit for unit in UNITS if upper.endswith(unit)), "")
    number = upper.removesuffix(unit).strip()
    try:
        size = int(float(number) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise CheckpointError(f"max_shard_size is {text!r}; it must be a size such as 5GB, 500MB or 2GiB")
    return size
