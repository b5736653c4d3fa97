"""Which nodes are used, from states and reports alone; no Slurm is needed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.config import DataConfig, ParallelConfig
from steel_megatron.errors import ConfigError
from steel_megatron.slurm import preflight
from steel_megatron.slurm.nodes import FILE, exclude, excluded, judge, read_reports, usable
from tests.distributed import run_distributed
from tests.train.test_loop import make_run, write_corpus

NODES = ["a", "b", "c", "d"]


def reports(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Good reports of four nodes; some with changes."""
    good = {"problems": [], "versions": {"torch": "2.13.0"}, "clock": 1e9, "bandwidth": 12e9}
    return {node: {"node": node, **good, **changes.get(node, {})} for node in NODES}


def test_nodes_that_slurm_has_lost_and_excluded_ones_are_left_out() -> None:
    states = {"a": "mixed", "b": "down*", "c": "mixed*", "d": "draining"}
    found = usable([*NODES, "e"], NODES, states, {"d": "its clock is +60 s from the others'"})
    assert found.nodes == ["a"]
    assert found.left_out == {
        "b": "Slurm says that it is down*",
        "c": "Slurm says that it is mixed*",
        "d": "its clock is +60 s from the others'",
        "e": "it failed, and Slurm has taken it from the job",
    }
    assert usable(NODES, NODES, {}, {}).nodes == NODES  # an sinfo that does not answer is no reason


@pytest.mark.parametrize(
    ("node", "change", "reason"),
    [
        ("a", {"problems": ["runs cannot be written: Read-only file system"]}, "runs cannot be written: Read-only"),
        ("a", {"versions": {"torch": "2.12.0"}}, "it has torch 2.12.0, the others 2.13.0"),
        ("c", {"versions": {}}, "it has torch none, the others 2.13.0"),
        ("b", {"clock": 1e9 - 17}, "its clock is -17 s from the others'"),
        ("d", {"bandwidth": 1e9}, "its link is slow: 1.00 GB/s, the median is 12.00 GB/s"),
    ],
)
def test_a_node_that_fails_is_named(node: str, change: dict[str, Any], reason: str) -> None:
    assert judge(NODES, reports()) == {}
    (found,) = judge(NODES, reports(**{node: change})).items()
    assert found[0] == node and found[1].startswith(reason)


def test_what_varies_is_no_reason() -> None:
    changes = {"a": {"clock": 1e9 + 9}, "b": {"bandwidth": 5e9}}
    assert judge(NODES, reports(**changes)) == {}
    slow = {node: {"node": node, "problems": [], "bandwidth": rate} for node, rate in (("a", 1e9), ("b", 9e9))}
    assert judge(["a", "b"], slow) == {}  # both have the same link


def test_a_node_without_a_report_and_a_problem_of_all() -> None:
    found = reports()
    del found["b"]
    assert judge(NODES, found) == {"b": "it gave no report; the job's log may say why"}
    everywhere = {node: {"problems": ["corpus.bin cannot be read"]} for node in NODES}
    with pytest.raises(ConfigError, match=r"on all nodes: corpus.bin cannot be read"):
        judge(NODES, reports(**everywhere))
    with pytest.raises(ConfigError, match="no node gave a report"):
        judge(NODES, {})


def test_reports_are_found_among_other_lines() -> None:
    text = 'module loaded\n{"node": "a", "problems": []}\n[1]\n{"other": 1}\n{"node": "b"'
    assert read_reports(text) == {"a": {"node": "a", "problems": []}}


def test_exclusions_expire(tmp_path: Path) -> None:
    assert excluded(tmp_path) == {}
    exclude(tmp_path, {"a": "slow"})
    exclude(tmp_path, {"b": "no disk"})
    assert excluded(tmp_path) == {"a": "slow", "b": "no disk"}
    assert excluded(tmp_path, time.time() + 23 * 3600) and not excluded(tmp_path, time.time() + 25 * 3600)
    entry = json.loads((tmp_path / FILE).read_text())["a"]
    assert entry["reason"] == "slow" and entry["until"] - entry["since"] == 24 * 3600
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"excluded_nodes.json cannot be read .*correct or remove it"):
        excluded(tmp_path)


def test_gpus() -> None:
    good = [[str(number), "600", "0", "550.54"] for number in range(8)]
    assert preflight.gpu_problems(good, 8) == []
    assert preflight.gpu_problems(good[:7], 8) == ["7 GPUs are there, 8 are needed"]
    taken = [*good[:7], ["7", "41213", "[N/A]", "550.54"]]
    assert preflight.gpu_problems(taken, 8) == ["GPU 7 has 41,213 MiB in use by others"]
    broken = [["0", "[GPU is lost]", "[GPU is lost]", "550.54"], ["1", "600", "3", "550.54"]]
    assert preflight.gpu_problems(broken, 2) == [
        "GPU 0 does not answer: [GPU is lost]",
        "GPU 1 has 3 uncorrected ECC errors",
    ]
    assert preflight.gpu_problems([["Unable to determine the device handle"]], 1) == [
        "nvidia-smi says: Unable to determine the device handle"
    ]


def test_folder_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(DataConfig(train=[write_corpus(tmp_path / "c", 3, 0), "gone"]), tmp_path / "run", ParallelConfig())
    assert preflight.data_problems(run) == ["gone.bin cannot be read", "gone.idx cannot be read"]
    assert preflight.folder_problems(tmp_path / "run") == []
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").touch()
    assert preflight.folder_problems(tmp_path / "file/run") == [
        f"{tmp_path}/file/run cannot be written: Not a directory"
    ]
    saved = tmp_path / "run/checkpoints/step_00000001"
    saved.mkdir(parents=True)
    (saved / "weights").write_bytes(b"0" * 1000)
    usage = preflight.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=1999))
    assert preflight.folder_problems(tmp_path / "run") == [
        f"{tmp_path}/run has 0.0 GB free, two checkpoints have 0.0 GB"
    ]


@pytest.mark.parametrize("size", range(2, 10))
def test_each_node_has_two_links(size: int) -> None:
    links: list[set[int]] = [set() for _ in range(size)]
    for turn in range(3):
        for rank in range(size):
            other = preflight.partner(rank, size, turn)
            assert preflight.partner(other, size, turn) == rank
            links[rank] |= {other} - {rank}
    assert [len(own) for own in links] == [min(2, size - 1)] * size
    assert all((rank + 1) % size in own for rank, own in enumerate(links))


def _links(folders: list[Path]) -> dict[str, Any]:
    return preflight.links(folders[int(os.environ["RANK"])])


@pytest.mark.slow
def test_nodes_meet(tmp_path: Path) -> None:
    """One of them sees another folder; then the first one, which writes, cannot."""
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    found = run_distributed(_links, 3, [tmp_path / "run", tmp_path / "run", tmp_path / "other"])
    assert all(report["bandwidth"] > 0 and abs(report["clock"] - time.time()) < 300 for report in found)
    unseen = f"it does not see what another node writes to {tmp_path}/other: No such file or directory"
    assert [report["problems"] for report in found] == [[], [], [unseen]]
    found = run_distributed(_links, 2, [tmp_path / "none", tmp_path / "run"])
    assert [report["problems"] for report in found] == [[], []]
    assert list((tmp_path / "run").iterdir()) == []
