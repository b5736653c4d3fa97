"""A batch script from a template and settings."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from steel_megatron.errors import ConfigError
from steel_megatron.slurm.profile import Profile, SlurmConfig, read_profile, shell_word, without_defaults
from steel_megatron.train.time_limit import slurm_seconds

TEMPLATE = Path(__file__).with_name("templates") / "pretrain.sbatch"
COMMANDS = {"sft": "sft train", "sft_per_sample": "sft train", "dpo": "dpo train"}
"""By objective; any other one is pretrain's."""
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def render(config: SlurmConfig) -> str:
    """The batch script of a run, checked against its layout and global batch.

    Args:
        config: the run and its job.

    Raises:
        ConfigError: the nodes do not fit the run, or profile or template cannot be used.
    """
    profile = read_profile(config.profile) if config.profile else Profile()
    path = Path(config.template).expanduser() if config.template else TEMPLATE
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"template {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return fill(template, values_of(config, profile), str(path))


def fill(template: str, values: Mapping[str, str], origin: str) -> str:
    """Put values in the place of ``{{names}}``.

    Args:
        template: the text.
        values: by name.
        origin: where the text comes from, for messages.

    Raises:
        ConfigError: there is no such value.
    """
    lines = []
    for number, line in enumerate(template.splitlines(), 1):
        for name in _PLACEHOLDER.findall(line):
            if name not in values:
                raise ConfigError(f"{origin}, line {number}: there is no {{{{{name}}}}}; there are {', '.join(values)}")
        filled = _PLACEHOLDER.sub(lambda found: values[found[1]], line)
        if filled.strip() or not line.strip():  # a placeholder without a value leaves no empty line
            lines.append(filled)
    return "\n".join(lines) + "\n"


def values_of(config: SlurmConfig, profile: Profile) -> dict[str, str]:
    """What a template can name, as text.

    Args:
        config: the run and its job.
        profile: of the site.

    Raises:
        ConfigError: the nodes do not fit the run, or the time is none.
    """
    container, cores = profile.container, profile.cpus_per_process or 1
    variables = {
        "OMP_NUM_THREADS": str(cores),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }  # the latter: for megatron-core's TP
    if profile.interface:
        variables |= {"NCCL_SOCKET_IFNAME": profile.interface, "GLOO_SOCKET_IFNAME": profile.interface}
    setup = [*(f"module load {shell_word(one)}" for one in profile.modules), *profile.setup]
    setup += [f"export {name}={shell_word(value)}" for name, value in {**variables, **profile.environment}.items()]
    python = [*(container.prefix if container else []), profile.python]
    srun_words = " ".join(map(shell_word, container.srun_words)) if container else ""
    own_node = 'srun --overlap --nodes 1 --ntasks 1 --nodelist "$SLURMD_NODENAME" "${in_container[@]}" '
    return {
        "directives": "\n".join(f"#SBATCH {word}" for word in _directives(config, profile, cores)),
        "folder": shell_word(os.getcwd()),
        "setup": "\n".join(setup),
        "settings": json.dumps(without_defaults(config.run), indent=1, ensure_ascii=False),
        "run_folder": shell_word(config.checkpoint.directory),
        "srun_words": srun_words,
        "python": " ".join(map(shell_word, python)),
        "cpus_per_process": str(cores),
        "next_prefix": own_node if srun_words else "",
        "node_counts": ",".join(map(str, config.fitting_nodes())),
        "processes": str(config.processes),
        "gpus": str(config.gpus_per_node),
        "command": COMMANDS.get(config.training.objective, "pretrain"),
        "max_faults": str(config.max_faults),
        "check": "check" if config.preflight else "true",
        "checked": "yes" if config.preflight else "no",
    }


def _directives(config: SlurmConfig, profile: Profile, cores: int) -> list[str]:
    _, most = config.node_range
    words = [
        f"--job-name={config.job_name or Path(os.path.abspath(config.checkpoint.directory)).name}",
        f"--comment={comment_of(config.checkpoint.directory)}",
        f"--nodes={most + config.spare_nodes}",
        f"--ntasks-per-node={config.processes}",
        f"--cpus-per-task={cores}",
    ]
    words += [f"--gpus-per-node={config.gpus_per_node}"] if config.gpus_per_node else []
    words += [f"--{name}={value}" for name, (value, _) in config.asked_of_slurm(profile).items()]
    if config.time is not None:
        seconds = slurm_seconds(config.time)
        if not seconds:
            raise ConfigError(f"time is {config.time!r}; it must be a time as sbatch takes it, such as 24:00:00")
        words += [f"--time={config.time}", f"--signal=TERM@{int(min(300, seconds / 10))}"]
    # Slurm requeues a job that has lost a node; one that can do without it is kept, unless it was the script's own.
    words += ["--no-kill"] if config.spare_nodes or len(config.fitting_nodes()) > 1 else []
    words += ["--requeue", "--output=%x-%j.log", "--open-mode=append", *profile.sbatch]
    return words


def comment_of(run_folder: str | Path) -> str:
    """The comment by which the jobs of a run are found.

    Args:
        run_folder: the run's folder.
    """
    return f"steel-megatron:{os.path.abspath(run_folder)}"
