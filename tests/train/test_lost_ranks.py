"""A process that fails, dies, stands still or does not come: the others end soon, with a line that says who and why."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from steel_megatron.config import DataConfig, RunConfig, dump_yaml
from steel_megatron.errors import ExitCode, LostRankError
from steel_megatron.parallel import peers
from steel_megatron.parallel.peers import Peers
from steel_megatron.parallel.rendezvous import meet, named
from steel_megatron.parallel.topology import free_port
from steel_megatron.train.callbacks import Callback, RunView
from steel_megatron.train.loop import pretrain
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS
from tests.train.test_loop import make_run, write_corpus
from tests.train.test_signals import TORCHRUN, launched, wait_for_step


def fail() -> None:
    raise KeyError("an error of this process alone")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stand_still() -> None:
    threading.Event().wait()


def at_work() -> None:
    for _ in range(SECONDS):
        time.sleep(0.6)
        time.sleep(0.7)
        time.sleep(0.6)


def nothing() -> None:
    pass


@dataclasses.dataclass
class Accident(Callback):
    """What happens to this rank before step 3."""

    happens: Callable[[], None]

    def before_step(self, run: RunView) -> None:
        if run.step == 2:
            self.happens()


def trained(run: RunConfig, folder: Path, accidents: list[Callable[[], None]], hosts: list[str]) -> str:
    """Trains with an accident for each rank; what is written to stderr goes to ``said-RANK``.

    Returns:
        the exit code that the command would have, and the message.
    """
    rank = int(os.environ["RANK"])
    if hosts:
        socket.gethostname = lambda: hosts[rank]
    sys.stderr = (folder / f"said-{rank}").open("w")
    try:
        pretrain(run, [Accident(accidents[rank])])
    except LostRankError as error:
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does; it must not come before the line
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        return f"{error.code:d}: {error}"
    except KeyError:
        return "own"
    return "finished"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(train=[write_corpus(tmp_path_factory.mktemp("corpora") / "train", 60, 0)])


@pytest.fixture
def run(corpora: DataConfig, tmp_path: Path) -> RunConfig:
    run = make_run(corpora, tmp_path / "run", LAYOUTS["dp2"], watchdog_seconds=None)
    # Without this a line says that the run is saved only at its end.
    return dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save_interval=6))


def watched(run: RunConfig, seconds: float) -> RunConfig:
    return dataclasses.replace(run, training=dataclasses.replace(run.training, watchdog_seconds=seconds))


SECONDS = 5  # on a busy machine a process may have to wait for a processor
FAILED = r"rank 1 \(process \d+ on \S+\) failed in step 3: KeyError: 'an error of this process alone'"


@pytest.mark.slow
def test_an_error_of_one_process_is_told_by_the_other(run: RunConfig, tmp_path: Path) -> None:
    other, own = run_distributed(trained, 2, run, tmp_path, [nothing, fail], [])
    assert own == "own" and re.fullmatch(f"1: {FAILED}", other)


@pytest.mark.slow
def test_an_error_of_one_process_ends_another_that_waits_for_ever(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 0 died with exit code 1$"):
        run_distributed(trained, 2, run, tmp_path, [stand_still, fail], [], timeout=50)
    assert re.fullmatch(f"error: {FAILED}\n", (tmp_path / "said-0").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("happens", [kill, stop])
def test_what_another_machine_lost_is_known_by_its_heartbeat(
    run: RunConfig, tmp_path: Path, happens: Callable[[], None]
) -> None:
    # The main thread of rank 0 gets no error of a connection: it does not communicate.
    accidents, hosts = [stand_still, happens], ["near", "far"]
    with pytest.raises(AssertionError, match="rank 0 died with exit code 76"):
        run_distributed(trained, 2, watched(run, SECONDS), tmp_path, accidents, hosts, timeout=50)
    assert re.fullmatch(
        r"error: no heartbeat of rank 1 \(process \d+ on far\) came for 5 s: stopped, or its machine hangs \(in step "
        r"3\); stacks are in \S+/stacks\. If that is no fault, raise training\.watchdog_seconds\. The same command "
        r"resumes from the newest checkpoint\n",
        (tmp_path / "said-0").read_text(),
    )
    assert "stand_still" in (tmp_path / "run/stacks/rank-0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_found_and_ended(run: RunConfig, tmp_path: Path, stopped: int) -> None:
    accidents = [nothing, nothing]
    accidents[stopped] = stop
    # Once the stopped one is killed, the other is told so by its connection as well.
    ends = r"rank 0 died with exit code -9", r"rank (0 died with exit code 76|1 died with exit code -9)"
    with pytest.raises(AssertionError, match=ends[stopped]):
        run_distributed(trained, 2, watched(run, SECONDS), tmp_path, accidents, [], timeout=50)
    said = (tmp_path / f"said-{1 - stopped}").read_text()
    assert f"error: no heartbeat of rank {stopped} (process" in said and said.count("\n") == 1
    stacks = tmp_path / "run/stacks"
    assert "distributed_c10d.py" in (stacks / f"rank-{1 - stopped}.txt").read_text()
    assert "was ended: stopped" in (stacks / f"rank-{stopped}.txt").read_text()


@pytest.mark.slow
def test_threads_that_all_stand_still_are_found(run: RunConfig, tmp_path: Path) -> None:
    """Both end, and either may be the first."""
    with pytest.raises(AssertionError, match=r"rank [01] died with exit code 76"):
        run_distributed(trained, 2, watched(run, SECONDS), tmp_path, [nothing, stand_still], [], timeout=50)
    for rank in range(2):
        said = (tmp_path / f"said-{rank}").read_text()
        assert re.search(
            r"nothing has moved for 5 s: rank 1 at \S+/threading\.py:\d+ \(wait\); the others wait in start_grad_sync "
            r"\(in step 3\); stacks are in",
            said,
        )
    assert "stand_still" in (tmp_path / "run/stacks/rank-1.txt").read_text()
    assert "start_grad_sync" in (tmp_path / "run/stacks/rank-0.txt").read_text()


def threads_left(folder: Path) -> list[str]:
    """Of the watcher, whose heartbeats take long, after its block."""
    from steel_megatron.config import ParallelConfig
    from steel_megatron.parallel.topology import initialize

    initialize(ParallelConfig())
    beat = Peers._beat

    def slow(self: Peers) -> None:
        time.sleep(0.5)
        beat(self)

    with mock.patch.object(Peers, "_beat", slow), mock.patch.object(peers, "BEAT_SECONDS", 0.0), Peers(folder, None):
        pass
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("peers")]


def test_no_thread_is_left_that_would_abort_the_end_of_its_process(tmp_path: Path) -> None:
    assert run_distributed(threads_left, 2, tmp_path) == [[], []]


def test_one_process_alone_is_watched_as_well(corpora: DataConfig, tmp_path: Path) -> None:
    run = watched(make_run(corpora, tmp_path / "run"), 1)
    with pytest.raises(AssertionError, match="rank 0 died with exit code 76"):
        run_distributed(trained, 1, run, tmp_path, [stand_still], [], timeout=50)
    assert "nothing has moved for 1 s: rank 0 at" in (tmp_path / "said-0").read_text()
    assert "stand_still" in (tmp_path / "run/stacks/rank-0.txt").read_text()


@pytest.mark.slow
def test_who_waits_for_one_that_moves_is_not_ended(run: RunConfig, tmp_path: Path) -> None:
    said = run_distributed(trained, 2, watched(run, SECONDS), tmp_path, [nothing, at_work], [])
    assert said == ["finished", "finished"]


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    second, host = datetime.timedelta(seconds=1), socket.gethostname()
    with pytest.raises(LostRankError) as raised:
        meet(0, 3, second)
    assert str(raised.value) == (
        f"ranks 1, 2 of 3 did not come to localhost:{port} within 0.0166667 minutes (there: rank 0 on {host}); "
        "STEEL_DISTRIBUTED_TIMEOUT_MINUTES sets how long to wait"
    )
    assert raised.value.code == ExitCode.LOST
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(LostRankError, match=rf"^rank 2 on {host} found nobody at localhost:\d+ \(MASTER_ADDR, MAST"):
        meet(2, 3, second)
    assert named([4]) == "rank 4" and named(list(range(12))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more"


@pytest.mark.slow
def test_a_kill_is_one_line_for_each_of_the_others(run: RunConfig, tmp_path: Path) -> None:
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, train_steps=100_000))
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save_interval=1000))
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    with launched(tmp_path, "steel_megatron.launch", *TORCHRUN) as process:
        killed = wait_for_step(process, 3)[1]
        killed.kill()
        assert process.stderr is not None
        said = [line for line in process.stderr.read().splitlines() if not line.startswith("step ")]
        assert process.wait(60) == ExitCode.LOST
    # torchrun itself says that it ends the others, and they note its signal.
    own = [line for line in said if not re.match(r"[WEI]\d{4} .*torch/distributed/elastic/|SIGTERM: ", line)]
    assert len(own) == 1 and own[0].startswith(f"error: lost rank 1 (process {killed.pid} on "), own
