"""Who and where a process is, from the launcher's variables."""

from __future__ import annotations

import datetime
import os

import pytest

from steel_megatron.errors import ConfigError, SteelError
from steel_megatron.parallel.topology import (
    PORTS,
    Launch,
    alone,
    first_host,
    join,
    read_launch,
    refuse_without_srun,
    shutdown,
)
from tests.distributed import run_distributed


def test_torchrun_and_slurm_and_alone() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"}
    assert read_launch(torchrun) == Launch(3, 8, 1, "torchrun")
    assert read_launch(slurm) == Launch(5, 16, 2, "slurm")
    assert read_launch({**slurm, **torchrun}).origin == "torchrun"
    assert read_launch({}) == Launch(0, 1, 0, "alone")


def test_a_step_may_be_smaller_than_its_job() -> None:
    step = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"}
    assert read_launch(step) == Launch(0, 1, 0, "slurm")


def test_a_batch_script_outside_srun_is_alone() -> None:
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"}).origin == "alone"


def test_a_run_outside_srun_is_refused() -> None:
    refuse_without_srun({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"})
    refuse_without_srun({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "16"})
    refuse_without_srun({"RANK": "0", "WORLD_SIZE": "4", "SLURM_NTASKS": "16"})  # torchrun in a batch script
    with pytest.raises(ConfigError, match=r"has 16 tasks \(SLURM_NTASKS\), but srun, .* has not started this process"):
        refuse_without_srun({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"})


def test_nonsense_is_named() -> None:
    with pytest.raises(ConfigError, match="RANK='first' of the environment must be a number"):
        read_launch({"RANK": "first", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="RANK=2 of the environment is not below WORLD_SIZE=2"):
        read_launch({"RANK": "2", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-07,9],login1", "gpu03"),
        ("gpu[3,5]", "gpu3"),
        ("a1,gpu[03-07]", "a1"),
        ("rack[1-2]-ib", "rack1-ib"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def one_fails(failing: int) -> str:
    from steel_megatron.config import ParallelConfig
    from steel_megatron.parallel.agreement import any_rank, broadcast_from_rank0, raise_if_any_rank_failed
    from steel_megatron.parallel.topology import initialize

    topology = initialize(ParallelConfig())
    assert raise_if_any_rank_failed(lambda: 5) == 5
    assert any_rank(topology.launch.rank == 1)
    assert not any_rank(False)
    assert broadcast_from_rank0(10 + topology.launch.rank) == 10

    def action() -> None:
        if topology.launch.rank == failing:
            raise ConfigError("this file is not here")

    try:
        raise_if_any_rank_failed(action)
    except SteelError as error:
        return str(error)
    return "no error"


def test_what_fails_on_one_process_is_raised_on_all() -> None:
    messages = run_distributed(one_fails, 2, 1)
    assert messages[1] == "this file is not here"
    assert messages[0].startswith("process 1 failed")


def test_what_a_process_alone_sets_goes_with_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is started afterwards would look for its first process there."""
    shutdown()  # what another test may have left
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with alone("a test"):
        assert os.environ["MASTER_ADDR"] == "localhost" and int(os.environ["MASTER_PORT"]) in PORTS
    assert os.environ["MASTER_ADDR"] == "elsewhere" and "MASTER_PORT" not in os.environ


@pytest.mark.parametrize("address", [None, "localhost", "127.0.0.1"])
def test_a_step_on_several_nodes_does_not_meet_at_localhost(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    step |= {"MASTER_ADDR": address} if address else {}
    for name in [name for name in os.environ if name.startswith(("SLURM", "MASTER", "RANK", "WORLD"))]:
        monkeypatch.delenv(name)
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is .*, which is another machine on each of the 2 nodes"):
        join(read_launch(os.environ), "gloo", datetime.timedelta(seconds=1))
    shutdown()
