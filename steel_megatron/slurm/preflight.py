"""``python -m steel_megatron.slurm.preflight``: whether a node can work on a run, one process on each node at once.

First each looks at itself, then all of them meet: they compare clocks, read what one of them has written, and measure
the links between them. Each prints its report as a line of JSON, which :mod:`steel_megatron.slurm.nodes` judges.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from steel_megatron.config import RunConfig, from_dict
from steel_megatron.config.loading import load_yaml
from steel_megatron.errors import SteelError
from steel_megatron.log import exit_code, get_logger

logger = get_logger(__name__)

MEETING_SECONDS = 40
"""How long to wait for the other nodes."""
LINK_BYTES = 16 << 20
"""What is sent over each link."""
SHM_BYTES = 64 << 20
"""What /dev/shm must have free: processes of a node hand tensors to each other there."""
GPU_BYTES_TAKEN = 2 << 30
"""More than this is no driver's overhead: another process has it."""
PACKAGES = ("steel-megatron", "torch", "megatron-core", "transformer-engine", "numpy")
_QUERY = "index,memory.used,ecc.errors.uncorrected.volatile.total,driver_version"


def main(words: Sequence[str] | None = None) -> int:
    """Check this node.

    Args:
        words: of the command line; None for ``sys.argv``.

    Returns:
        0 also where something is wrong: the report says so.
    """
    parser = argparse.ArgumentParser(prog="steel_megatron.slurm.preflight", description=__doc__)
    parser.add_argument("--config", required=True, help="settings of the run as YAML")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that this node must have")
    options = parser.parse_args(words)

    def check() -> None:
        run: RunConfig = from_dict(RunConfig, load_yaml(options.config), "--config")
        report = report_of(run, options.gpus)
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")

    return exit_code(check)


def report_of(run: RunConfig, gpus: int) -> dict[str, Any]:
    """What this node says of itself and of its links.

    Args:
        run: the run that it is to work on.
        gpus: GPUs that it must have.
    """
    folder = Path(run.checkpoint.directory)
    found = gpu_report() if gpus else None
    problems = [*folder_problems(folder), *data_problems(run)]
    if shutil.disk_usage("/dev/shm").free < SHM_BYTES:
        problems.append(f"/dev/shm has less than {SHM_BYTES >> 20} MiB free")
    if gpus:
        problems += ["nvidia-smi does not answer"] if found is None else gpu_problems(found, gpus)
    versions = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    if found:
        versions["driver"] = found[0][-1]
    report = {"node": os.environ.get("SLURMD_NODENAME", platform.node()), "problems": problems, "versions": versions}
    met = links(folder)
    return report | met | {"problems": problems + met.get("problems", [])}


def folder_problems(folder: Path) -> list[str]:
    """Whether the run's folder can be written, and has room for two checkpoints of the size of the newest one.

    Args:
        folder: the run's.
    """
    probe = folder / f".preflight-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        return [f"{folder} cannot be written: {error.strerror}"]
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in (folder / "checkpoints").glob("step_*")]
    free = shutil.disk_usage(folder).free
    if sizes and free < 2 * max(sizes):
        return [f"{folder} has {free / 1e9:.1f} GB free, two checkpoints have {2 * max(sizes) / 1e9:.1f} GB"]
    return []


def data_problems(run: RunConfig) -> list[str]:
    """Which files of the run's corpora cannot be read; whether they are right is seen when they are opened.

    Args:
        run: the run; once it has a ledger, its corpora may lie elsewhere, and are found when it starts.
    """
    if run.ledger_path.exists():
        return []
    prefixes = [*run.data.train, *(one for prefixes in run.data.validation_sets.values() for one in prefixes)]
    files = [Path(prefix + suffix) for prefix in prefixes for suffix in (".bin", ".idx")]
    return [f"{file} cannot be read" for file in files if not os.access(file, os.R_OK)]


def gpu_report() -> list[list[str]] | None:
    """What nvidia-smi says of each GPU: index, MiB in use, ECC errors, driver; None if it does not answer."""
    words = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return rows or None


def gpu_problems(rows: Sequence[Sequence[str]], wanted: int) -> list[str]:
    """What is wrong with the GPUs of a node.

    Args:
        rows: what :func:`gpu_report` gave; a GPU that has failed (an Xid error) has text in place of figures.
        wanted: how many there must be.
    """
    problems = [f"{len(rows)} GPUs are there, {wanted} are needed"] if len(rows) < wanted else []
    for index, used, errors, *_ in (row for row in rows if len(row) >= 3):
        if not used.isdecimal():
            problems.append(f"GPU {index} does not answer: {used}")
        elif int(used) << 20 > GPU_BYTES_TAKEN:
            problems.append(f"GPU {index} has {int(used):,} MiB in use by others")
        if errors.isdecimal() and int(errors):
            problems.append(f"GPU {index} has {int(errors)} uncorrected ECC errors")
    return problems + [f"nvidia-smi says: {' '.join(row)}" for row in rows if len(row) < 3]


def links(folder: Path) -> dict[str, Any]:
    """Meet the other nodes: this node's clock, what it reads of another's file, and the bandwidth of its links.

    Args:
        folder: the run's, which all must see.

    Returns:
        ``clock`` and ``bandwidth``, and further ``problems``; nothing if it is alone, or if the nodes did not meet.
    """
    import torch.distributed as dist

    from steel_megatron.parallel.topology import join, read_launch, shutdown
    from steel_megatron.platform import probe

    launch = read_launch(os.environ)
    if launch.world_size == 1:
        return {}
    try:
        join(launch, probe().backend, datetime.timedelta(seconds=MEETING_SECONDS))
        found = _compare(folder, launch.rank, launch.world_size)
        dist.barrier()
    except (SteelError, RuntimeError) as error:  # the node that did not come has no report
        logger.warning(f"the nodes did not meet: {' '.join(str(error).split())[:300]}")
        return {}
    finally:
        shutdown()
    return found


def _compare(folder: Path, rank: int, size: int) -> dict[str, Any]:
    import torch.distributed as dist

    name, problems = f".preflight-{uuid.uuid4().hex}", []
    written = [""]
    if rank == 0:
        with suppress(OSError):  # its report says so already
            (folder / name).write_text(name)
            written = [name]
    dist.broadcast_object_list(written, src=0)
    clock = time.time()  # right after a broadcast, so at one moment on all
    if written[0]:
        try:
            (folder / written[0]).read_text()
        except OSError as error:
            problems.append(f"it does not see what another node writes to {folder}: {error.strerror}")
    dist.barrier()
    if rank == 0:
        (folder / name).unlink(missing_ok=True)
    rates = [_exchange(other) for turn in range(3) if (other := partner(rank, size, turn)) != rank]
    return {"clock": clock, "bandwidth": max(rates), "problems": problems}


def partner(rank: int, size: int, turn: int) -> int:
    """Whom a node exchanges data with: the nodes form a ring, and no two links of a turn share a node.

    A slow node makes both of its links slow, so a node is as fast as the better one of its two.

    Args:
        rank: of the node.
        size: number of nodes.
        turn: 0 for links that begin at even nodes, 1 at odd ones, 2 for the last one of an odd number of nodes.

    Returns:
        the other node's rank; its own if it has no link in this turn.
    """
    if turn == 2:
        ends = {0: size - 1, size - 1: 0} if size % 2 else {}
        return ends.get(rank, rank)
    other = rank + 1 if rank % 2 == turn else rank - 1
    if size % 2 == 0:
        return other % size
    return other if 0 <= other < size else rank


def _exchange(partner: int) -> float:
    import torch
    import torch.distributed as dist

    from steel_megatron.platform import probe

    own = torch.zeros(LINK_BYTES, dtype=torch.uint8, device=probe().device)
    theirs, rates = torch.empty_like(own), []
    for _ in range(5):  # the first one opens the connection
        began = time.monotonic()
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, own, partner), dist.P2POp(dist.irecv, theirs, partner)]
        ):
            work.wait()
        theirs[-1].item()  # waits for a GPU
        rates.append(2 * LINK_BYTES / (time.monotonic() - began))
    return max(rates)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    sys.exit(main())
