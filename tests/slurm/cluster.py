"""A Slurm cluster of a few nodes on this machine: its own controller, daemons and folder; nothing of the system's."""

from __future__ import annotations

import getpass
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steel_megatron.parallel.topology import free_port

# Runs of jobs with the same number, of two clusters at once, would meet at the same port.
# The processes of a job meet at the name of its first node, so that is this machine's own. Slurm takes no localhost.
CONFIGURATION = """\
ClusterName=test
FirstJobId={first_job}
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
SlurmdTimeout=60
ReturnToService=1
MinJobAge=300
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={node} NodeHostname=this NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=16000\n"


class Cluster:
    """Commands to a cluster that runs.

    Args:
        folder: where its configuration and logs are.
        nodes: names of its nodes; the first is this machine's own.

    Attributes:
        daemons: the nodes' slurmd.
    """

    def __init__(self, folder: Path, nodes: list[str]) -> None:
        self.folder, self.nodes = folder, nodes
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
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

    def start(self, name: str, *words: str) -> None:
        """Start a daemon."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(words, env=self.environment, stdout=log, stderr=log)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self.start(node, "slurmd", "-D", "-N", node)


@contextmanager
def cluster(folder: Path, nodes: int = 2) -> Iterator[Cluster]:
    """A cluster for as long as the context lasts; its jobs end with it.

    Args:
        folder: where its configuration and logs are.
        nodes: their number.

    Raises:
        AssertionError: it does not start within half a minute.
    """
    (folder / "state").mkdir()
    name = socket.gethostname().partition(".")[0]
    names = [name, *(f"{name}-{number}" for number in range(2, nodes + 1))]
    values = {
        "controller": free_port(),
        "first_job": secrets.randbelow(50_000) + 1,
        "folder": folder,
        "user": getpass.getuser(),
    }
    lines = "".join(NODE.format(node=node, port=free_port()) for node in names)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values).replace("PartitionName", lines + "PartitionName"))
    found = Cluster(folder, names)
    try:
        found.start("slurmctld", "slurmctld", "-D", "-c")
        for node in names:
            found.start_node(node)
        deadline = time.monotonic() + 30
        while _idle_nodes(found) < nodes:
            logs = {path.name: path.read_text()[-2000:] for path in folder.glob("*.log")}
            assert time.monotonic() < deadline, f"the cluster did not start: {logs}"
            time.sleep(0.2)
        yield found
    finally:
        _end_jobs(found)
        for daemon in reversed(found.daemons.values()):
            daemon.terminate()
        for daemon in found.daemons.values():
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
