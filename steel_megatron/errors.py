"""What a user can do wrong, as exceptions.

Every message names the value, where it came from and what would be right. The command line turns a
:class:`SteelError` into one line on stderr and exit code 2, without a traceback. What cannot happen
unless the library itself is wrong is an ``assert``, never one of these.
"""


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
