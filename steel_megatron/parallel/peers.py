"""Which process of a launch has failed, is gone or stands still; it ends the others in seconds, with one line.

Two threads of each process do this. One talks to the store of the launch: it leaves a heartbeat, and reads whether
anybody has declared the run ended. The other one never waits for anything. It looks at the processes of this machine
and at the heartbeats, and ends this process if the main thread, which may wait in a collective for ever, does not.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import psutil
import torch.distributed as dist

from steel_megatron.errors import ExitCode, LostRankError, SteelError
from steel_megatron.log import launched_rank
from steel_megatron.parallel.agreement import any_rank
from steel_megatron.parallel.rendezvous import TIMEOUT, connect, joining, named, store_is_rank0s
from steel_megatron.parallel.stacks import Stillness, collective_of, is_of_a_collective, write_stacks
from steel_megatron.signals import ignore_sigterm
from steel_megatron.streams import complain

BEAT_SECONDS = 0.5
GRACE_SECONDS = 3.0
"""What the main thread has for noticing by itself, and the others for reading why the run ends."""
REMOTE_SECONDS = 10.0
"""What another machine has for telling why a connection to it was closed."""
RESUMES = "The same command resumes from the newest checkpoint"


@dataclasses.dataclass(frozen=True)
class _Process:
    """Where a rank runs."""

    rank: int
    host: str
    pid: int
    began: float

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def runs(self) -> bool:
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return bool(process.create_time() == self.began and process.status() != psutil.STATUS_ZOMBIE)
        return False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why the run ends.

    Attributes:
        message: the line that every process says.
        code: what they end with.
        stands_still: ranks of which no heartbeat comes; None if that is not why, and no stacks are written.
    """

    message: str
    code: int = ExitCode.LOST
    stands_still: list[int] | None = None


@dataclasses.dataclass
class _Beat:
    """The last heartbeat of a rank: when it was new here, and what it said of its main thread."""

    number: int = -1
    seen: float = dataclasses.field(default_factory=time.monotonic)
    still: float = 0.0
    waits: bool = False
    place: str = ""


class Peers:
    """The processes of a launch; every process makes one together, and is watched within its block.

    Args:
        folder: of the run; stacks of a run that stands still are written there.
        watchdog_seconds: how long a process, or the main threads of all of them, may stand still; None for ever.

    Attributes:
        phase: tells what this process is at.
    """

    def __init__(self, folder: Path, watchdog_seconds: float | None) -> None:
        own = psutil.Process()
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._folder, self._limit = folder / "stacks", watchdog_seconds or float("inf")
        self.phase: Callable[[], str] = lambda: "its start"
        found: list[tuple[str, int, float, str]] = [("", 0, 0.0, "")] * self._size
        with joining():
            dist.all_gather_object(found, (socket.gethostname(), own.pid, own.create_time(), secrets.token_hex(8)))
        self._processes = [_Process(rank, *of_rank[:3]) for rank, of_rank in enumerate(found)]
        self._prefix = f"steel/{found[0][3]}"
        self._beats = {rank: _Beat() for rank in (range(self._size) if self._rank == 0 else (0, self._rank))}
        self._still = Stillness(threading.get_ident())
        self._said: Verdict | None = None
        self._verdict: Verdict | None = None
        self._verdict_is_there, self._main_thread_ends, self._over = (threading.Event() for _ in range(3))
        self._told_of: BaseException | None = None
        self._store: dist.Store | None = None
        self._answered = time.monotonic()
        self._heard = 0
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Peers:
        self._still.look(self.phase())
        if self._size > 1:
            with suppress(RuntimeError, KeyError):  # whoever has made the process groups may have another store
                timeout = datetime.timedelta(seconds=30)
                self._store = dist.PrefixStore(self._prefix, connect(timeout))
                self._beat()
            with joining():
                any_rank(False)  # all hearts beat
            if self._store is not None:
                self._threads.append(threading.Thread(target=self._talk, name="peers-talk", daemon=True))
        self._threads.append(threading.Thread(target=self._judge, name="peers-judge", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self._size > 1:
                with self.named():
                    any_rank(False)  # who leaves first must not look lost
        finally:
            self._over.set()
            # Python aborts a process that ends while a thread of it is in C++.
            for thread in self._threads:
                thread.join(GRACE_SECONDS)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Turn the error of a collective into one that names the rank that was lost; tell the others of other errors.

        Raises:
            LostRankError: a process has failed, is gone or stands still.
        """
        try:
            yield
        except BaseException as error:
            if self._size == 1 or isinstance(error, LostRankError) or error is self._told_of:
                raise
            self._told_of = error
            self._main_thread_ends.set()
            ignore_sigterm()
            if not is_of_a_collective(error):
                code = ExitCode.WRONG_INPUT if isinstance(error, SteelError) else ExitCode.FAILED
                text = " ".join(str(error).split())
                what = text if isinstance(error, SteelError) else f"{type(error).__name__}: {text}"
                self._say(Verdict(f"{self._processes[self._rank]} failed in {self.phase()}: {what}", code))
                self._wait_for_listeners()
                raise
            remote = any(not process.is_here for process in self._processes)
            self._verdict_is_there.wait(REMOTE_SECONDS if remote else GRACE_SECONDS)
            verdict = self._verdict or Verdict(
                f"{collective_of(error)} failed in {self.phase()}: {' '.join(str(error).split())[:200]}; all processes "
                f"of this machine are there. If one was only slow, {TIMEOUT} sets how long to wait. {RESUMES}"
            )
            self._wait_for_listeners()
            raise LostRankError(verdict.message, verdict.code) from error

    def _say(self, verdict: Verdict) -> None:
        """Declare the run ended, unless somebody has."""
        self._said = self._said or verdict

    def _wait_for_listeners(self) -> None:
        """Let the others read why the run ends before the store goes with this process."""
        until = time.monotonic() + GRACE_SECONDS
        last = self._size if self._rank == 0 and store_is_rank0s() else 1
        while self._store is not None and self._heard < last and time.monotonic() < until:
            time.sleep(0.05)

    # The thread that talks.

    def _beat(self) -> None:
        assert self._store is not None
        own = self._beats[self._rank]
        own.number += 1
        self._store.set(f"beat/{self._rank}", json.dumps([own.number, self._still.seconds, *self._still.place]))

    def _talk(self) -> None:
        store, told = self._store, False
        assert store is not None
        try:
            while not self._over.wait(BEAT_SECONDS / 2 if self._said or told else BEAT_SECONDS):
                self._beat()
                if self._said is not None and not told:
                    store.compare_set("end", "", json.dumps(dataclasses.asdict(self._said)))
                if not told and store.check(["end"]):
                    self._end(Verdict(**json.loads(store.get("end"))))
                    told = True
                    store.add("heard", 1)
                if told:
                    self._heard = store.add("heard", 0)
                others = [rank for rank in self._beats if rank != self._rank]
                for rank, text in zip(others, store.multi_get([f"beat/{rank}" for rank in others]), strict=True):
                    number, *of_thread = json.loads(text)
                    if number != self._beats[rank].number:
                        self._beats[rank] = _Beat(number, time.monotonic(), *of_thread)
                self._answered = time.monotonic()
        except RuntimeError:  # its server is gone
            if store_is_rank0s() and self._rank != 0:
                self._end(self._lost([self._processes[0]]))
            self._store = None

    # The thread that judges.

    def _judge(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self._still.look(self.phase())
            if self._verdict is None:
                found = self._gone() or self._standing()
                if found is not None and self._store is not None and self._answers():
                    self._say(found)
                    self._verdict_is_there.wait(GRACE_SECONDS)  # all say the same, if the store answers
                if found is not None:
                    self._end(found)
            if self._verdict is not None:
                self._leave(self._verdict)
                return

    def _answers(self) -> bool:
        return time.monotonic() - self._answered < self._limit

    def _end(self, verdict: Verdict) -> None:
        if self._verdict is None:
            self._verdict = verdict
            self._verdict_is_there.set()

    def _gone(self) -> Verdict | None:
        """Processes of this machine that have ended."""
        gone = [process for process in self._processes if process.is_here and not process.runs]
        return self._lost(gone) if gone else None

    def _lost(self, gone: list[_Process]) -> Verdict:
        return Verdict(
            f"lost {', '.join(map(str, gone))} in {self.phase()}; it was killed or has crashed, see its own output. "
            f"{RESUMES}"
        )

    def _standing(self) -> Verdict | None:
        """Processes that do not run, or main threads that all stand still."""
        now = time.monotonic()
        stopped = [rank for rank, beat in self._beats.items() if now - beat.seen > self._limit and rank != self._rank]
        if self._store is None:
            stopped = []
        elif not self._answers():
            stopped = [0]  # its store is silent as well
        if stopped:
            who = ", ".join(str(self._processes[rank]) for rank in stopped)
            what = f"no heartbeat of {who} came for {self._limit:g} s: stopped, or its machine hangs"
            return self._stalled(what, stopped)
        own = _Beat(0, now, self._still.seconds, *self._still.place)
        beats = {**self._beats, self._rank: own} if self._store is not None or self._size == 1 else {}
        if self._rank == 0 and beats and all(beat.still > self._limit for beat in beats.values()):
            busy = {rank: beat for rank, beat in beats.items() if not beat.waits} or beats
            first = min(busy)
            others = f"; the others wait in {beats[other].place}" if (other := self._waiting(beats)) is not None else ""
            what = f"nothing has moved for {self._limit:g} s: {named(sorted(busy))} at {busy[first].place}{others}"
            return self._stalled(what, [])
        return None

    def _waiting(self, beats: dict[int, _Beat]) -> int | None:
        waiting = [rank for rank, beat in beats.items() if beat.waits]
        return min(waiting) if len(waiting) < len(beats) and waiting else None

    def _stalled(self, what: str, ranks: list[int]) -> Verdict:
        return Verdict(
            f"{what} (in {self.phase()}); stacks are in {self._folder}. If that is no fault, raise "
            f"training.watchdog_seconds. {RESUMES}",
            stands_still=ranks,
        )

    def _leave(self, verdict: Verdict) -> None:
        """End this process, unless its main thread does."""
        if verdict.stands_still is not None:
            # In a thread, for a disk that hangs may be what all wait for.
            writing = threading.Thread(target=self._write_stacks, args=(verdict.stands_still,), daemon=True)
            writing.start()
            writing.join(GRACE_SECONDS)
        elif self._main_thread_ends.wait(GRACE_SECONDS) or self._over.is_set():
            return
        self._wait_for_listeners()
        if self._over.is_set() or self._main_thread_ends.is_set():
            return
        prefix = f"[rank {self._rank}] " if launched_rank() else ""
        complain(f"{prefix}error: {verdict.message}")
        os._exit(verdict.code)

    def _write_stacks(self, stand_still: list[int]) -> None:
        write_stacks(self._folder / f"rank-{self._rank}.txt", self.phase())
        # Those that stand still would hold the run's lock, and go on later where they stood.
        for process in (self._processes[rank] for rank in stand_still):
            if process.is_here and process.runs:
                with suppress(psutil.Error, OSError):
                    state = psutil.Process(process.pid).status()
                    (self._folder / f"rank-{process.rank}.txt").write_text(f"{process} was ended: {state}\n")
                    psutil.Process(process.pid).kill()
