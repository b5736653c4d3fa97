"""What a job asks Slurm for: from options of the command, and from the profile of a site."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from steel_megatron.config import RunConfig, from_dict
from steel_megatron.config.checks import at_least, typed
from steel_megatron.config.loading import load_yaml
from steel_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Container:
    """The container that a job's tasks run in."""

    kind: Literal["pyxis", "apptainer"]
    """Through pyxis and enroot (srun --container-image), or through apptainer exec."""
    image: str
    """Image or file."""
    mounts: list[str] = field(default_factory=list)
    """Folders, as SOURCE or SOURCE:TARGET."""

    def __post_init__(self) -> None:
        typed(self)

    @property
    def srun_words(self) -> list[str]:
        """Options of srun."""
        if self.kind != "pyxis":
            return []
        mounts = ",".join(one if ":" in one else f"{one}:{one}" for one in self.mounts)
        return [f"--container-image={self.image}", *([f"--container-mounts={mounts}"] if mounts else [])]

    @property
    def prefix(self) -> list[str]:
        """Words before the command."""
        if self.kind != "apptainer":
            return []
        return ["apptainer", "exec", "--nv", *(f"--bind={one}" for one in self.mounts), self.image]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a site needs, the same for all of its jobs."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --exclusive."""
    cpus_per_process: int | None = None
    """Cores of each process, which are its threads (OMP_NUM_THREADS) as well."""
    modules: list[str] = field(default_factory=list)
    """Modules to load."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before anything else, such as the activation of an environment."""
    python: str = "python"
    """The interpreter that has the library, in the container if there is one."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables, such as NCCL_IB_HCA."""
    interface: str | None = None
    """Network interface that processes talk over (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)."""
    container: Container | None = None

    def __post_init__(self) -> None:
        typed(self)
        at_least(1, self, "cpus_per_process")


def read_profile(path: str) -> Profile:
    """Read the profile of a site.

    Args:
        path: YAML file.

    Raises:
        ConfigError: it cannot be read, has a key that is not known, or a value that is wrong.
    """
    try:
        values = load_yaml(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"profile {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"profile {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"profile {path} must hold lines such as 'partition: gpu'")
    environment = values.get("environment")
    if isinstance(environment, dict):  # a number needs no quotes
        values["environment"] = {
            name: value if isinstance(value, str) else str(value) for name, value in environment.items()
        }
    try:
        if isinstance(container := values.get("container"), dict):
            values["container"] = from_dict(Container, container, "container")
        profile: Profile = from_dict(Profile, values, "")
    except (ConfigError, TypeError) as error:  # the latter: a field without a default
        raise ConfigError(f"profile {path}: {error}") from None
    return profile


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(RunConfig):
    """A run as a job of Slurm."""

    nodes: str = "1"
    """Nodes, or FEWEST-MOST: MOST are asked for, and after a failure the run continues with fewer if its global batch
    allows."""
    gpus_per_node: int = 0
    """GPUs of each node, one process each; 0 for nodes without GPUs."""
    processes_per_node: int | None = None
    """Processes on each node; default: gpus_per_node, or 1 without GPUs."""
    spare_nodes: int = 0
    """Nodes to ask for beyond those, which take the place of nodes that fail."""
    time: str | None = None
    """Time limit, as sbatch takes it (24:00:00); the run saves before it and comes again. Default: the partition's."""
    profile: str | None = None
    """YAML file with what the site needs."""
    template: str | None = None
    """Batch script with {{placeholders}}; default: the library's."""
    job_name: str | None = None
    """Name of the job; default: that of the run's folder."""
    account: str | None = None
    """Account; default: the profile's. So for the next three."""
    partition: str | None = None
    """Partition."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    max_faults: int = 3
    """Crashes and lost nodes without a new checkpoint between them; one more ends the job with 93."""
    preflight: bool = True
    """Whether to check the nodes before each start, and leave out those that fail."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "gpus_per_node", "spare_nodes", "max_faults")
        at_least(1, self, "processes_per_node")
        self.node_range  # noqa: B018 (checks)

    @property
    def node_range(self) -> tuple[int, int]:
        """The fewest and the most nodes to train on.

        Raises:
            ConfigError: nodes is neither a number nor a range.
        """
        fewest, dash, most = self.nodes.partition("-")
        if not fewest.isdecimal() or (dash and not most.isdecimal()) or not 1 <= int(fewest) <= int(most or fewest):
            raise ConfigError(f"nodes is {self.nodes!r}; it must be a number such as 4, or FEWEST-MOST such as 2-4")
        return int(fewest), int(most or fewest)

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def run(self) -> RunConfig:
        """The run without what is Slurm's."""
        return RunConfig(**{one.name: getattr(self, one.name) for one in dataclasses.fields(RunConfig)})

    def fitting_nodes(self) -> list[int]:
        """The numbers of nodes that the run's layout and global batch allow, the largest first.

        Raises:
            ConfigError: the largest one is not among them.
        """
        fewest, most = self.node_range
        found = []
        for nodes in range(most, fewest - 1, -1):
            try:
                self.num_micro_batches(nodes * self.processes)
            except ConfigError as error:
                if nodes == most:
                    raise ConfigError(f"{nodes} nodes x {self.processes} processes: {error}") from None
                continue
            found.append(nodes)
        return found

    def asked_of_slurm(self, profile: Profile) -> dict[str, tuple[str, str]]:
        """Values of account, partition, qos and constraint, each with where it comes from."""
        found = {}
        for name in ("account", "partition", "qos", "constraint"):
            if (own := getattr(self, name)) is not None:
                found[name] = (own, f"--{name}")
            elif (of_site := getattr(profile, name)) is not None:
                found[name] = (of_site, f"profile {self.profile}")
        return found


def without_defaults(config: Any) -> dict[str, Any]:
    """The fields of a config that differ from their defaults, sections likewise.

    Args:
        config: a dataclass instance.
    """
    found: dict[str, Any] = {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if dataclasses.is_dataclass(value):
            if inner := without_defaults(value):
                found[one.name] = inner
        elif value != (one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default):
            found[one.name] = value
    return found


def shell_word(text: str) -> str:
    """A word for the shell, quoted where it must be."""
    return text if re.fullmatch(r"[\w./:=,@%+-]+", text) else shlex.quote(text)
