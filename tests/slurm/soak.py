"""Random faults on one run over Slurm, and whether it ends as an undisturbed one.

``python -m tests.slurm.soak --faults 50 --seed 1``
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from steel_megatron import events
from steel_megatron.slurm.status import status_of
from tests.slurm.cluster import Cluster, cluster
from tests.slurm.jobs import Submitted, assert_equal, submit

STEPS_PER_FAULT = 40
FAULTS = ("kill", "stop", "requeue", "node lost")
SECONDS = 240.0
"""For a launch to come, whatever happened to the one before."""


def soak(found: Cluster, folder: Path, faults: int, seed: int, tell: Callable[[str], None]) -> float:
    """Do something bad to a run again and again, and compare its end with that of an undisturbed run.

    Each kind of fault comes once before the first comes again, in random order, after a random number of steps.

    Args:
        found: three nodes; the run takes two.
        folder: for the run; the current folder.
        faults: how many.
        seed: of what happens when.
        tell: gets a line for each.

    Returns:
        the goodput.

    Raises:
        AssertionError: a step's loss, or a weight or a part of the optimizer's state at the end, differs in any bit.
    """
    source = random.Random(seed)
    steps = STEPS_PER_FAULT * (faults + 1)
    job = submit(found, folder, "dp2", steps, 5, spare_nodes=1, max_faults=1000)
    order: list[str] = []
    for number in range(faults):
        order = order or source.sample(FAULTS, len(FAULTS))
        _await_launch(job, number + 1, source.randint(1, 10))
        kind = order.pop()
        tell(f"{number + 1}: {kind}, in launch {number + 1} after {job.steps_of_launches()[-1]} steps")
        _do(job, kind, source)
    _await_launch(job, faults + 1, 1)
    found.wait(job.job, "COMPLETED", 60 + steps / 2)
    assert_equal(job)
    goodput = status_of(events.read(job.folder)).goodput
    assert goodput is not None
    tell(f"{faults} faults, {steps} steps: bit-equal to the undisturbed run, goodput {goodput:.1%}")
    return goodput


def _await_launch(job: Submitted, launch: int, steps: int) -> None:
    """Return when a launch has done some steps; a job that waits in the queue is started at once."""
    deadline = time.monotonic() + SECONDS
    while len(counts := job.steps_of_launches()) < launch or counts[launch - 1] < steps:
        shown = job.cluster.run("scontrol", "--oneliner", "show", "job", job.job)
        assert time.monotonic() < deadline, (job.log[-2000:], shown)
        if "JobState=PENDING" in shown and "Restarts=0 " not in shown and "Reason=BeginTime" in shown:
            job.cluster.run("scontrol", "update", f"JobId={job.job}", "StartTime=now")
        time.sleep(0.2)


def _do(job: Submitted, kind: str, source: random.Random) -> None:
    found = job.cluster
    if kind == "kill":
        source.choice(job.ranks()).kill()
    elif kind == "stop":
        found.run("scancel", "--signal=TERM", job.job)
    elif kind == "requeue":
        found.run("scontrol", "requeue", job.job)
    else:
        ranks = {process.environ()["SLURMD_NODENAME"] for process in job.ranks()}
        (node,) = ranks - {found.nodes[0]}  # without the first one, where the script runs, the job is over
        found.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=soak")
        time.sleep(1)
        found.run("scontrol", "update", f"NodeName={node}", "State=RESUME")


def main() -> None:
    """Start a Slurm, and do as many faults as asked for."""
    parser = argparse.ArgumentParser(description="Does random faults to a run over Slurm, and compares its result.")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    options = parser.parse_args()
    os.environ |= {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        (folder / "slurm").mkdir()
        os.chdir(folder)
        with cluster(folder / "slurm", nodes=3) as found:
            os.environ["SLURM_CONF"] = found.environment["SLURM_CONF"]
            soak(found, folder, options.faults, options.seed, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
