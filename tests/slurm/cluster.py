"""A Slurm cluster of two nodes on this machine: its own controller, daemons and folder; nothing of the system's."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steel_megatron.parallel.topology import free_port

# The processes of a job meet at the name of its first node, so that is this machine's own. Slurm takes no localhost.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
KillWait=60
MinJobAge=300
NodeName={name} NodeHostname=this NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=16000
NodeName={name}-2 NodeHostname=this NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=16000
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Commands to a cluster that runs.

    Args:
        folder: where its configuration and logs are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """What a command of Slurm prints.

        Raises:
            AssertionError: it failed, or does not answer.
        """
        done = subprocess.run(
            words, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """State of a job, such as ``RUNNING``."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)["JobState"]

    def wait(self, job: str, state: str, seconds: float) -> None:
        """Return when a job has reached a state.

        Raises:
            AssertionError: it is in another in which it stays, or takes longer.
        """
        deadline = time.monotonic() + seconds
        while (now := self.state(job)) != state:
            assert now in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"job {job} is {now}, not {state}"
            assert time.monotonic() < deadline, f"job {job} is still {now} after {seconds:.0f} s"
            time.sleep(0.2)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster for as long as the context lasts; its jobs end with it.

    Raises:
        AssertionError: it does not start within half a minute.
    """
    controller, first, second = (free_port() for _ in range(3))
    (folder / "state").mkdir()
    name = socket.gethostname().partition(".")[0]
    values = {"controller": controller, "first": first, "second": second, "folder": folder}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values, name=name, user=getpass.getuser()))
    found = Cluster(folder)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(name: str, *words: str) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            daemons.append(subprocess.Popen(words, env=found.environment, stdout=log, stderr=log))

    try:
        start("slurmctld", "slurmctld", "-D", "-c")
        for node in (name, f"{name}-2"):
            start(node, "slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 30
        while _idle_nodes(found) < 2:
            logs = {path.name: path.read_text()[-2000:] for path in folder.glob("*.log")}
            assert time.monotonic() < deadline, f"the cluster did not start: {logs}"
            time.sleep(0.2)
        yield found
    finally:
        _end_jobs(found)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _idle_nodes(found: Cluster) -> int:
    words = ["sinfo", "--noheader", "--Node", "--format=%T"]
    listed = subprocess.run(words, env=found.environment, capture_output=True, text=True, timeout=60, check=False)
    return listed.stdout.split().count("idle")


def _end_jobs(found: Cluster) -> None:
    """Tasks outlive the daemons, so they are ended first."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        words = ["squeue", "--noheader", "--format=%A"]
        listed = subprocess.run(words, env=found.environment, capture_output=True, text=True, timeout=60, check=False)
        jobs = listed.stdout.split()
        if not jobs:
            return
        subprocess.run(["scancel", *jobs], env=found.environment, capture_output=True, timeout=60, check=False)
        time.sleep(0.3)
