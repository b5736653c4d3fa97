"""torchrun whose exit code says how the run ended: ``python -m steel_megatron.launch --nproc-per-node 8 ...``.

The arguments are torchrun's. SIGTERM, SIGUSR1 and Ctrl-C go to the processes of this machine, which may take as long
as they need to save. torchrun itself kills them after 30 seconds, dies of SIGUSR1, and ends with 1 whatever they said.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil

from steel_megatron.errors import ExitCode
from steel_megatron.streams import standard_streams


def _forward(number: int, frame: FrameType | None) -> None:
    """Pass a signal on, wait for the processes, and end with what they say."""
    processes = psutil.Process().children()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    ended, _ = psutil.wait_procs(processes)
    raise SystemExit(_together([getattr(process, "returncode", None) for process in ended]))


def _together(codes: Sequence[int | None]) -> int:
    """One exit code for several processes; an error that must be fixed weighs more than one that may pass."""
    known = [ExitCode.LOST if code is None or code < 0 else code for code in codes]  # below 0: killed by a signal
    passing = (ExitCode.FINISHED, ExitCode.STOPPED, ExitCode.LOST)
    return max(known, key=lambda code: passing.index(code) if code in passing else len(passing), default=ExitCode.LOST)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun.

    Args:
        arguments: torchrun's; None for ``sys.argv``.

    Returns:
        what the processes that ended with an error say together, or 0.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _forward)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with standard_streams():
            run.main(["--signals-to-handle", "SIGHUP,SIGQUIT", *words])
    except ChildFailedError as error:
        return _together([failure.exitcode for failure in error.failures.values()])
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
