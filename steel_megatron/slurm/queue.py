"""Slurm's commands that submit, list and end the jobs of a run."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steel_megatron.errors import ConfigError
from steel_megatron.slurm.script import comment_of

_CAUSES = {
    "partition": ("partition",),
    "account": ("account", "partition"),
    "qos": ("qos",),
    "feature": ("constraint",),
    "gres": ("gpus_per_node",),
    "generic resource": ("gpus_per_node",),
    "time": ("time", "partition"),
    "node count": ("nodes", "spare_nodes", "partition"),
    "more nodes": ("nodes", "spare_nodes", "partition"),
    "node configuration": ("nodes", "gpus_per_node", "processes_per_node", "partition"),
}
"""What is in a message of sbatch, and the options that may be meant by it."""


@dataclass(frozen=True)
class Job:
    """A job of a run that is queued or runs.

    Attributes:
        id: its number.
        state: such as ``RUNNING``.
        used: time since its start, as Slurm writes it.
        left: time until its limit.
        nodes: names of its nodes; empty if it waits.
        reason: why it waits.
    """

    id: str
    state: str
    used: str
    left: str
    nodes: str
    reason: str


def submit(script: str, origins: Mapping[str, tuple[str, str]], words: Sequence[str] = ()) -> str:
    """Submit a batch script.

    Args:
        script: its text.
        origins: options with their values and where each comes from, for the message.
        words: further options of sbatch.

    Returns:
        the job's id.

    Raises:
        ConfigError: sbatch is not here, or refuses it; the message is Slurm's, with the options that it may mean.
    """
    done = _run(["sbatch", "--parsable", *words], script)
    if done.returncode == 0:
        return done.stdout.strip().split(";")[0]
    said = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines())
    raise ConfigError(f"sbatch refused the job: {said}{meant(said, origins)}")


def meant(message: str, origins: Mapping[str, tuple[str, str]]) -> str:
    """The options that a message of sbatch may mean, in brackets; empty if there are none.

    Args:
        message: what sbatch says.
        origins: options with their values and where each comes from.
    """
    names = [name for word, names in _CAUSES.items() if word in message.lower() for name in names]
    found = [
        f"{name} is {origins[name][0]}, from {origins[name][1]}" for name in dict.fromkeys(names) if name in origins
    ]
    return f" ({'; '.join(found)})" if found else ""


def jobs_of(run: str | Path) -> list[Job]:
    """The jobs of a run that are queued or run.

    Args:
        run: the run's folder.

    Raises:
        ConfigError: squeue is not here, or does not answer.
    """
    done = _run(["squeue", "--noheader", "--format=%A|%T|%M|%L|%N|%r|%k"])
    if done.returncode != 0:
        raise ConfigError(f"Slurm does not say which jobs there are: {done.stderr.strip()}")
    found = []
    for line in done.stdout.splitlines():
        *values, comment = line.split("|", 6)
        if comment == comment_of(run):
            found.append(Job(*values))
    return found


def command(words: Sequence[str]) -> None:
    """Run a command of Slurm.

    Raises:
        ConfigError: it is not here or fails; the message is its own.
    """
    done = _run(words)
    if done.returncode != 0:
        raise ConfigError(f"{' '.join(words)} failed: {done.stderr.strip()}")


def _run(words: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{words[0]} is not on this machine; give the command where Slurm is") from None
