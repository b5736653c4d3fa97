"""One process of a run is killed at a random moment of a random phase; what must hold afterwards.

Nothing of the run is left within a minute: no process, no pipe that somebody still holds, no lock. The same call
resumes, as often as it takes, and the result equals an undisturbed run's bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from steel_megatron.config import DataConfig, ParallelConfig, RunConfig
from steel_megatron.files import is_locked
from steel_megatron.parallel.topology import free_port
from tests.distributed import PRELOAD, run_distributed
from tests.train.small_run import LAYOUTS
from tests.train.test_checkpoint_save import saving_run
from tests.train.test_loop import losses, write_corpus

STEPS = 12
PHASES = ("start", "step", "save", "validation")
SCENARIOS: dict[str, tuple[ParallelConfig, int]] = {
    "alone": (ParallelConfig(), 1),
    "dp2": (LAYOUTS["dp2"], 2),
    "tp2": (LAYOUTS["tp2"], 2),
    "pp2": (LAYOUTS["pp2"], 2),
    "dp4": (ParallelConfig(), 4),
    "tp2 pp2": (LAYOUTS["tp2 pp2"], 4),
}
SURVIVAL_SECONDS = 60.0
"""No process may outlive a killed one for longer; on a machine that is not busy it is a few seconds."""
RUN_SECONDS = 200.0


@dataclasses.dataclass(frozen=True)
class Kill:
    """When one process is killed.

    Attributes:
        rank: whose process.
        phase: what it is at.
        count: which time it is at that, in this attempt.
        delay: seconds after the phase's beginning.
    """

    rank: int
    phase: str
    count: int
    delay: float

    @classmethod
    def at_random(cls, source: random.Random, processes: int, phase: str) -> Kill:
        """Any rank, at any moment of a phase."""
        longest = {"start": 6.0, "step": 0.2, "save": 0.1, "validation": 0.1}[phase]
        count = source.randint(1, 3) if phase in ("step", "save") else 1
        return cls(source.randrange(processes), phase, count, source.uniform(0, longest))


@dataclasses.dataclass
class Attempt:
    """What came of one start of the run.

    Attributes:
        killed: whether the kill came before the end.
        codes: the exit codes by rank.
        survived: seconds for which the last process outlived the killed one.
        said: the last words of each process.
    """

    killed: bool
    codes: list[int | None]
    survived: float
    said: list[str]


def _train(run: RunConfig, rank: int, world_size: int, port: int, pipe: Connection, log: Path) -> None:
    """In a process of its own: one rank of a run, which tells each phase that it comes to."""
    os.setsid()  # all that it starts can be found by its session
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    os.environ.update(OMP_NUM_THREADS="1", STEEL_DISTRIBUTED_TIMEOUT_MINUTES="2")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tell = pipe.send
    tell("start")
    import torch

    torch.set_num_threads(1)
    from steel_megatron.log import exit_code
    from steel_megatron.train.checkpoint_save import Saver
    from steel_megatron.train.engine import Engine
    from steel_megatron.train.loop import pretrain

    def told(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            tell(phase)
            return function(*args)

        return call

    with (
        mock.patch.object(Engine, "step", told("step", Engine.step)),
        mock.patch.object(Engine, "evaluate", told("validation", Engine.evaluate)),
        mock.patch.object(Saver, "begin", told("save", Saver.begin)),
    ):
        code = exit_code(lambda: pretrain(run) and None)
    sys.stdout.flush()
    os._exit(code)


def attempt(run: RunConfig, world_size: int, kill: Kill | None, folder: Path) -> Attempt:
    """Start a run and kill one of its processes; returns when all have ended.

    Args:
        run: its settings.
        world_size: its processes.
        kill: whom to kill and when; None for nobody.
        folder: for what they write.

    Raises:
        AssertionError: one outlives the killed one for too long, or the run does not end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port, processes, pipes = free_port(), [], []
    logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    for rank, log in enumerate(logs):
        log.unlink(missing_ok=True)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_train, args=(run, rank, world_size, port, sender, log))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        killed_at = _kill_in_time(processes, pipes, kill)
        limit = SURVIVAL_SECONDS if killed_at else RUN_SECONDS
        until = (killed_at or time.monotonic()) + limit
        if killed_at and kill and kill.phase == "start":  # before all have come, only the launcher knows who is gone
            _end_as_a_launcher(processes)
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        survivors = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        assert not survivors, f"ranks {survivors} are still there {limit:.0f} s after {kill}"
        survived = time.monotonic() - killed_at if killed_at else 0.0
        _nothing_is_left(run, [process.pid for process in processes], pipes)
        said = [log.read_text(errors="replace").strip().splitlines()[-1:] for log in logs]
        return Attempt(bool(killed_at), [process.exitcode for process in processes], survived, [*map(" ".join, said)])
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _end_as_a_launcher(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.join(5)
        if process.exitcode is None:
            process.terminate()


def _kill_in_time(processes: list[ForkServerProcess], pipes: list[Connection], kill: Kill | None) -> float | None:
    """Read what the processes tell until it is time to kill; returns when that was, None if all ended before."""
    until, count, open_pipes = time.monotonic() + RUN_SECONDS, 0, list(pipes)
    while open_pipes:
        ready = wait(open_pipes, max(0.0, until - time.monotonic()))
        assert ready, f"the run has not ended after {RUN_SECONDS:.0f} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                phase = pipe.recv()
            except EOFError:
                open_pipes.remove(pipe)
                continue
            if kill is None or pipe is not pipes[kill.rank] or phase != kill.phase:
                continue
            count += 1
            victim = processes[kill.rank]
            if count == kill.count:
                time.sleep(kill.delay)
                if victim.exitcode is None and victim.pid is not None:
                    os.kill(victim.pid, signal.SIGKILL)
                    return time.monotonic()
    return None


def _nothing_is_left(run: RunConfig, pids: list[int | None], pipes: list[Connection]) -> None:
    until = time.monotonic() + SURVIVAL_SECONDS
    while orphans := list(_of_sessions(set(pids))):
        assert time.monotonic() < until, f"left behind: {orphans}"
        time.sleep(0.1)
    for pipe in pipes:
        try:
            while pipe.poll(0):
                pipe.recv()
        except EOFError:
            continue
        raise AssertionError("somebody still holds the pipe of a process that has ended")
    folder = Path(run.checkpoint.directory)
    held = [path for path in folder.rglob("*.lock") if is_locked(path.with_suffix(""))]
    assert not held, f"locks are held: {held}"


def _of_sessions(sessions: set[int | None]) -> Iterator[str]:
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        try:
            if os.getsid(process.pid) in sessions and process.info["status"] != psutil.STATUS_ZOMBIE:
                yield f"{process.pid} {process.info['cmdline']}"
        except ProcessLookupError:
            continue


def result_of(run: RunConfig) -> dict[str, Any]:
    """All that a finished run leaves and that must be the same, however often it was killed."""
    tensors = run_distributed(_hashes, 1, run)[0]
    ledger = json.loads((Path(run.checkpoint.directory) / "ledger.json").read_text())
    return {"tensors": tensors, "losses": dict(losses(run)), "ledger": ledger}


def _hashes(run: RunConfig) -> dict[str, str]:
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint

    initialize(ParallelConfig())
    path = checkpoint.path_of(run, STEPS)
    checkpoint.verify(path)
    info = checkpoint.read_info(path)
    keys = [key for key in checkpoint.tensor_names(info) if not key.startswith("random.")]
    tensors = checkpoint.read_tensors(info, keys)
    return {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in tensors.items()}


def small_training(folder: Path, layout: str, name: str) -> RunConfig:
    """A run of twelve steps with a save after every second and a validation after every third."""
    data = folder / "data"
    if not data.exists():
        data.mkdir(parents=True)
        write_corpus(data / "train", 60, 0)
        write_corpus(data / "valid", 12, 1)
    corpora = DataConfig(train=[str(data / "train")], validation=[str(data / "valid")])
    run = saving_run(corpora, folder / layout.replace(" ", "-") / name, SCENARIOS[layout][0])
    settings = {"train_steps": STEPS, "eval_interval": 3, "watchdog_seconds": 120.0}
    return dataclasses.replace(run, training=dataclasses.replace(run.training, **settings))


@dataclasses.dataclass
class Campaign:
    """Kills of runs, layout after layout, until there were enough.

    Attributes:
        folder: for runs and logs.
        kills: how many processes to kill.
        seed: of layouts, ranks, phases and moments.
        report: is told a line for each kill and each comparison.
    """

    folder: Path
    kills: int
    seed: int
    report: Callable[[str], None] = print
    done: int = 0
    longest: float = 0.0
    phases: dict[str, int] = dataclasses.field(default_factory=dict)
    references: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def run(self) -> None:
        """Do all.

        Raises:
            AssertionError: a run differs from the undisturbed one, or a kill left something behind.
        """
        source, number = random.Random(self.seed), 0
        layouts, phases = list(SCENARIOS), list(PHASES)
        source.shuffle(layouts)
        source.shuffle(phases)
        turns = itertools.cycle(phases)  # so that a few kills are of every kind
        while self.done < self.kills:
            layout = layouts[number % len(layouts)]
            number += 1
            self._disturb(layout, f"run-{number}", min(3, self.kills - self.done), source, turns)
        self.report(f"{self.done} kills ({self.phases}); the longest survivor stayed {self.longest:.1f} s")

    def _disturb(self, layout: str, name: str, kills: int, source: random.Random, phases: Iterator[str]) -> None:
        """Kill a run some times, let it end, and compare."""
        run, processes = small_training(self.folder, layout, name), SCENARIOS[layout][1]
        finished = False
        for _ in range(kills):
            kill = Kill.at_random(source, processes, next(phases))
            came = attempt(run, processes, kill, self.folder)
            self.report(f"{layout}: {kill} -> exit codes {came.codes}, {came.survived:.1f} s: {came.said}")
            if not came.killed:
                assert came.codes == [0] * processes, came
                finished = True
                break
            assert came.codes[kill.rank] == -signal.SIGKILL
            others = [code for rank, code in enumerate(came.codes) if rank != kill.rank]
            # 0: it had just ended; SIGTERM: of the launcher.
            assert set(others) <= ({0, 76, -signal.SIGTERM} if kill.phase == "start" else {0, 76}), came
            self.done, self.longest = self.done + 1, max(self.longest, came.survived)
            self.phases[kill.phase] = self.phases.get(kill.phase, 0) + 1
        if not finished:
            last = attempt(run, processes, None, self.folder)
            assert last.codes == [0] * processes, last
        if layout not in self.references:
            straight = small_training(self.folder, layout, "straight")
            assert attempt(straight, processes, None, self.folder).codes == [0] * processes
            self.references[layout] = result_of(straight)
        found, expected = result_of(run), self.references[layout]
        assert found["tensors"] == expected["tensors"] and len(expected["tensors"]) > 20
        assert found["losses"] == expected["losses"] and list(expected["losses"]) == list(range(1, STEPS + 1))
        assert found["ledger"] == expected["ledger"]
        self.report(f"{layout}: {name} equals an undisturbed run bit for bit")
