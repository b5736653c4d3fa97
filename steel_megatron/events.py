"""What happened to a run, one JSON line per event: ``events.jsonl`` in its folder.

The first process of the run writes ``start``, ``resume``, ``progress``, ``save`` and ``stop``; the batch script of a
Slurm job writes ``begin``, ``terminated``, ``fault``, ``requeue`` and ``end``.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steel_megatron.log import get_logger

logger = get_logger(__name__)

FILE = "events.jsonl"
Event = dict[str, Any]
_SLURM = {"job": "SLURM_JOB_ID", "restart": "SLURM_RESTART_COUNT", "step_id": "SLURM_STEP_ID"}


def record(folder: Path, event: str, **facts: Any) -> None:
    """Append an event, with time, host, and Slurm's job and nodes. A log is not worth a run: if that fails, it warns.

    Args:
        folder: the run's folder, which must be there: one that was removed under a run does not come back.
        event: its name.
        facts: what else the line says; what is None is left out.
    """
    line = {"time": round(time.time(), 3), "event": event, **_where(os.environ)}
    line |= {name: value for name, value in facts.items() if value is not None}
    text = json.dumps(line, ensure_ascii=False) + "\n"
    try:
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # a machine that went down in a write
            os.write(descriptor, (b"\n" if torn else b"") + text.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.warning(f"{folder / FILE} cannot be written ({error.strerror}); this is not in it: {text.strip()}")


def _where(environment: Mapping[str, str]) -> Event:
    found: Event = {"host": socket.gethostname()}
    if "SLURM_JOB_ID" in environment:
        found |= {name: environment.get(variable, "0") for name, variable in _SLURM.items() if name != "step_id"}
        found["restart"] = int(found["restart"]) if found["restart"].isdecimal() else 0
        if _SLURM["step_id"] in environment:
            found["step_id"] = environment[_SLURM["step_id"]]
        nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST"))
        found |= {"nodes": nodes} if nodes else {}
    return found


def read(folder: Path) -> list[Event]:
    """The events of a run in the order in which they were written; lines that are not whole are left out.

    Args:
        folder: the run's folder.
    """
    try:
        lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("time"), float):
            found.append(event)
    return found
