"""Workers that encode: bounded work in flight, ordered results, and a clean end when one dies or nobody waits.

They are threads where all but a little is compiled code (gigatoken, and rows that the compiled reader takes): these
start at once, and texts and ids are handed over as they are. They are processes where Python or the tokenizer's own
library has more to do, as these run one thread at a time.
"""

from __future__ import annotations

import mmap
import multiprocessing
import multiprocessing.reduction
import os
import pickle
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from steel_megatron.data.preprocessing.encoder import Encoded, Encoder, Position, Task
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors
from steel_megatron.jobs.run import SIGNAL_SECONDS, end_with_parent

_BYTES_PER_WORKER = 8 << 20
"""Raw bytes in flight for each worker: the task at hand and the next one."""
_MOST_THREADS = 16
"""More would mostly wait for the one that writes; and each has a tokenizer of its own, made one after the other."""
_LOOK_SECONDS = 5.0
"""After so much time without a result, look whether all workers are alive."""


def encoded(tasks: Iterator[Task], encoder: Encoder, workers: int) -> Generator[tuple[Position, Encoded]]:
    """Encode tasks here or by workers; what comes back is in the order of the tasks.

    Closed early, or ended by an error or a signal, it does not wait for processes, and for threads a second or two.

    Args:
        tasks: the tasks, in the order of the inputs.
        encoder: how documents become ids.
        workers: number of workers; 1 to encode in the calling process.

    Yields:
        The end of each task and what it gave.

    Raises:
        DataError: of a task, or of the iterator of tasks: after everything that was before it in the inputs. Or a
            worker process died.
    """
    if workers == 1:
        for task in tasks:
            yield task.end, encoder.encode(task)
    elif encoder.by_threads:
        yield from _by_threads(tasks, encoder, workers)
    else:
        yield from _by_processes(tasks, encoder, workers)


def _by_threads(tasks: Iterator[Task], encoder: Encoder, workers: int) -> Generator[tuple[Position, Encoded]]:
    of_thread, unwanted = threading.local(), threading.Event()

    def encode(task: Task) -> Encoded:
        if not hasattr(of_thread, "encoder"):
            of_thread.encoder = encoder.for_thread(unwanted)
        found: Encoded = of_thread.encoder.encode(task)
        return found

    workers = min(workers, _MOST_THREADS)
    pool = ThreadPoolExecutor(workers)
    try:
        yield from _in_order(lambda task: pool.submit(encode, task), Future.result, tasks, workers * _BYTES_PER_WORKER)
    finally:
        unwanted.set()  # nothing can end a thread but itself
        pool.shutdown(wait=True, cancel_futures=True)


def _by_processes(tasks: Iterator[Task], encoder: Encoder, workers: int) -> Generator[tuple[Position, Encoded]]:
    # Spawned, not forked: the calling process may have threads (of a tokenizer, of torch) that a fork would cut off.
    handed = _SharedFile(encoder)
    arrives: Any = handed  # as the encoder
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(arrives,)
    )
    try:
        yield from _in_order(
            lambda task: _submit(pool, task),
            lambda future: _result(pool, future),
            tasks,
            workers * _BYTES_PER_WORKER,
        )
    except BrokenProcessPool as error:
        _kill_workers(pool)  # the pool asks them to end by SIGTERM and waits; none is to make it wait for ever
        time.sleep(SIGNAL_SECONDS)
        raise DataError(
            f"one of {workers} worker processes died (killed, perhaps for want of memory); run with fewer workers if "
            "memory is short"
        ) from error
    except BaseException:
        _kill_workers(pool)  # nobody takes their results any more, and a scheduler does not wait for a long row
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        handed.close()


class _SharedFile:
    """An object for worker processes, on its way in a file without a name.

    What a process is started with goes through a pipe. One that dies before it has read that (killed, or its main
    script fails) would leave its parent waiting for ever, if it is more than a pipe holds: 64 KiB, which a tokenizer
    exceeds and the rest (the paths of modules, the command line) hardly ever does.
    """

    def __init__(self, content: object) -> None:
        with disk_errors("write to", Path("the folder for temporary files"), DataError):
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this object)
            pickle.dump(content, self._file)
            self._file.flush()

    def close(self) -> None:
        """No more processes get it."""
        self._file.close()

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _taken, (multiprocessing.reduction.DupFd(self._file.fileno()),)


def _taken(descriptor: Any) -> Any:
    """What was handed to this worker."""
    with (
        open(descriptor.detach(), "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,  # the file's position is shared with others
    ):
        return pickle.loads(content)


def _kill_workers(pool: ProcessPoolExecutor) -> None:
    for worker in list((pool._processes or {}).values()):
        worker.kill()
    # The pool would wait for ever for the rest of a result that one of them was sending; this ends the pipe.
    pool._result_queue._writer.close()  # type: ignore[attr-defined]


def _result(pool: ProcessPoolExecutor, future: Future[Encoded]) -> Encoded:
    """What a task gave; notices a worker that died while it sent a result, for the rest of which the pool waits."""
    while not wait([future], timeout=_LOOK_SECONDS).done:
        if not all(worker.is_alive() for worker in list((pool._processes or {}).values())):
            raise BrokenProcessPool("a worker died")
    return future.result()


def _in_order(
    submit: Callable[[Task], Future[Encoded]],
    result_of: Callable[[Future[Encoded]], Encoded],
    tasks: Iterator[Task],
    bytes_in_flight: int,
) -> Generator[tuple[Position, Encoded]]:
    """Keep workers busy with no more bytes in flight than allowed, or a single task that has more."""
    waiting: deque[tuple[int, Position, Future[Encoded]]] = deque()
    ahead: Task | None = None
    failure: DataError | None = None
    in_flight = 0
    while True:
        while failure is None:
            try:
                ahead = ahead or next(tasks, None)
            except DataError as error:
                failure = error  # it has its turn after what was read before it
            if ahead is None or (waiting and in_flight + ahead.bytes > bytes_in_flight):
                break
            in_flight += ahead.bytes
            waiting.append((ahead.bytes, ahead.end, submit(ahead)))
            ahead = None
        if not waiting:
            break
        size, end, future = waiting.popleft()
        result = result_of(future)
        del future
        in_flight -= size
        yield end, result
        del result
    if failure is not None:
        raise failure


def _submit(pool: ProcessPoolExecutor, task: Task) -> Future[Encoded]:
    """Hand a task to the pool, which may start a worker for it: one that Ctrl-C does not reach before it is ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits it
    try:
        return pool.submit(_encode_in_worker, task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_encoder: Encoder | None = None
"""The encoder of this worker process; None in every other process."""


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    # Ctrl-C reaches the whole group; the parent handles it. SIGTERM must end a worker: it is how the pool ends the
    # others when one has died.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_parent()


def _encode_in_worker(task: Task) -> Encoded:
    assert _worker_encoder is not None
    return _worker_encoder.encode(task)
