"""What a user can do wrong, as exceptions.

Every message names the value, where it came from and what would be right. The command line turns a
:class:`SteelError` into one line on stderr and exit code 2, without a traceback. What cannot happen
unless the library itself is wrong is an ``assert``, never one of these.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ends; docs/commands.md has the table. A job that ends with STOPPED or LOST is to be started again.

    A process that a signal ends has no say; shells show 128 and the signal's number.
    """

    FINISHED = 0
    """All is done."""
    FAILED = 1
    """An error of the library, with a traceback; of ``audit``: the model leaks."""
    WRONG_INPUT = 2
    """A setting, a file or the data must be changed first: the same command would end the same way."""
    NO_NODES = 69
    """Of a batch script's step: too few nodes are healthy. EX_UNAVAILABLE of sysexits.h."""
    STOPPED = 75
    """A signal asked a run to stop, and it is saved. EX_TEMPFAIL of sysexits.h."""
    LOST = 76
    """A process of a run is gone or stands still, or did not come. EX_PROTOCOL of sysexits.h."""
    GIVEN_UP = 93
    """Of a batch script: too many crashes or lost nodes without a new checkpoint."""
    INTERRUPTED = 130
    """Ctrl-C, of a command that saves nothing."""
    NO_READER = 141
    """Nobody reads the output any more, as under ``| head``."""


class SteelError(Exception):
    """Something outside the library is wrong: a setting, a file, the launch."""


class ConfigError(SteelError):
    """A setting has a wrong value, or two settings contradict each other."""


class DataError(SteelError):
    """A corpus, a tokenizer or an indexed dataset cannot be used as it is."""


class CheckpointError(SteelError):
    """A checkpoint or an exported model folder is missing, incomplete or of another shape."""


class TrainingError(SteelError):
    """Training cannot go on: a loss that is not finite, a worker that is gone."""


class LostRankError(SteelError):
    """A process of the launch has failed, is gone, stands still or did not come.

    Args:
        message: which one, and what it was at.
        code: what this process ends with.
    """

    def __init__(self, message: str, code: int = ExitCode.LOST) -> None:
        super().__init__(message)
        self.code = code
