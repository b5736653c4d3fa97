"""Which files are read: files, folders, patterns and addresses -> a list of inputs, and what was left out of them.

A folder and the pattern ``FOLDER/**`` give the same files. Both follow links, and notice links that lead in a circle.
Nothing in them is left out in silence.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steel_megatron.data.reading.folders import (
    HIDDEN,
    SPECIAL,
    UNKNOWN,
    LeftOut,
    LeftOutPath,
    below_pattern,
    data_of,
    files_below,
    in_words,
    is_input,
    matches,
    splits_of,
)
from steel_megatron.data.reading.forms import KNOWN, PARQUET, form_of
from steel_megatron.data.reading.sources import SOURCES, is_source
from steel_megatron.data.reading.storage import (
    STDIN,
    file_system,
    is_remote,
    is_stream,
    remote_errors,
    require_packages,
)
from steel_megatron.errors import DataError
from steel_megatron.jobs.folder import is_job
from steel_megatron.log import get_logger

_log = get_logger(__name__)
_SOURCE_NAME = re.compile(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?")
_STDIN_NAMES = (STDIN, "/dev/stdin")


@dataclass(frozen=True)
class Input:
    """A file to read, and as what."""

    path: str
    """A path, an address (``s3://bucket/corpus.jsonl``), or ``-`` for standard input."""
    source: str
    """Name of a source."""


@dataclass(frozen=True)
class Inputs:
    """What is read, and what is not."""

    files: list[Input]
    left_out: dict[str, Any]
    """What folders and patterns hold in addition: how many paths by reason, with examples."""


def find_inputs(
    inputs: Sequence[str], own: Callable[[Path], bool] | None = None, streams_for: str | None = None
) -> Inputs:
    """Turn files, folders, glob patterns and addresses, each alone or as ``SOURCE=PATTERN``, into a list of files.

    The order is that of ``inputs``, and within a folder or a pattern sorted by path, so it does not depend on the
    file system. A file that is named twice, in whichever way, is read once, under its first name. Folders are
    searched through all levels and links for files of a known form. What folders and patterns hold in addition is
    logged in one line: hidden files, the metadata of datasets, names of no known form. The folders of unfinished jobs
    are no input either.

    Args:
        inputs: paths, patterns (``*``, ``?``, ``[...]``, and ``**`` for any depth), addresses that fsspec opens, pipes,
            or ``-`` for standard input; without a source's name, rows are read by their text key.
        own: whether the caller itself writes a file; such files are left out of folders and patterns.
        streams_for: what reads inputs more than once and so takes no pipes, for the message; None if they are fine.

    Raises:
        DataError: an input matches nothing, a file is of no known form or named with two sources, or one that the
            caller itself writes, or there is no such source, or a package is missing.
    """
    if isinstance(inputs, str):
        raise DataError(f"the inputs are one string, {inputs!r}, where a list is expected: [{inputs}]")
    files: dict[tuple[int, ...] | str, Input] = {}
    left_out = LeftOut()
    for given in inputs:
        name, pattern = _split(given)
        paths, others = _matching(pattern, given)
        left_out.add(entry for entry in others if own is None or is_remote(entry[0]) or not own(Path(entry[0])))
        for path in _not_own(paths, pattern, own):
            first = files.setdefault(_identity(path), Input(path, name))
            if first.source != name:
                raise DataError(f"{path} is named as {first.source} and as {name}; a file has one source")
            if first.path != path:
                _log.info(f"{path} is {first.path}, which is read already")
    if not files:
        raise DataError("no input was given; name at least one file, folder or pattern")
    found = [*files.values()]
    left_out.forget(entry.path for entry in found)
    for entry in found:
        require_packages(entry.path)
        if streams_for is not None and is_stream(entry.path):
            raise DataError(
                f"{entry.path} is a stream, which can be read once; {streams_for}: store it in a file first"
            )
    counts = left_out.as_dict()
    if counts:
        log = _log.warning if UNKNOWN in counts else _log.info
        log(f"left out of the inputs: {in_words(counts)}")
    return Inputs(found, counts)


def parse_inputs(inputs: Sequence[str], own: Callable[[Path], bool] | None = None) -> list[Input]:
    """The files of :func:`find_inputs`.

    Args:
        inputs: as for :func:`find_inputs`.
        own: as for :func:`find_inputs`.
    """
    return find_inputs(inputs, own).files


def _split(given: str) -> tuple[str, str]:
    """The source and the pattern of an input."""
    name, equals, pattern = given.partition("=")
    if not equals or os.path.exists(given) or not _SOURCE_NAME.fullmatch(name):
        return "text", os.path.expanduser(given)
    if is_source(name):
        return name, os.path.expanduser(pattern)
    if glob.has_magic(given) and glob.glob(given):  # a folder such as date=2024
        return "text", given
    raise DataError(
        f"input {given!r}: there is no source {name!r}; known are {', '.join(SOURCES)}, or module:Class for your own"
    )


def _identity(path: str) -> tuple[int, ...] | str:
    """The same for all names of a file."""
    if is_remote(path) or path == STDIN:
        return path
    try:
        found = os.stat(path)
    except OSError:  # reported when it is read
        return os.path.realpath(path)
    # Some network file systems number their files carelessly: not by the number alone.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _not_own(paths: Sequence[str], pattern: str, own: Callable[[Path], bool] | None) -> Iterator[str]:
    """Files without those that the job itself writes."""
    for path in paths:
        if own is None or is_remote(path) or path == STDIN or not own(Path(path)):
            yield path
        elif os.path.isfile(pattern):
            raise DataError(f"{path} is a file that this very job writes; name other inputs, or another output")
        else:
            _log.info(f"{path} is left out of the inputs: this very job writes it")


def _in_unfinished(paths: Iterable[str]) -> set[str]:
    """Paths in the folder of an unfinished job: what is there is the input of that job once more."""
    unfinished: dict[Path, bool] = {}
    found: set[str] = set()
    for path in paths:
        for folder in Path(path).parents:
            if folder.name.endswith(".partial"):
                if folder not in unfinished:
                    unfinished[folder] = is_job(folder)
                    if unfinished[folder]:
                        _log.info(f"{folder} is left out of the inputs: an unfinished job works there")
                if unfinished[folder]:
                    found.add(path)
    return found


def _matching(pattern: str, given: str) -> tuple[list[str], list[LeftOutPath]]:
    """The data that a path, a pattern or an address names, and what else it matches."""
    if pattern in _STDIN_NAMES:
        return [STDIN], []
    if is_remote(pattern) and not pattern.startswith("file://"):
        return _remote(pattern, given)
    pattern = pattern.removeprefix("file://")
    if is_stream(pattern):
        if form_of(pattern) is PARQUET:
            raise DataError(f"{pattern} is a stream, and a parquet file is read from its end: store it in a file first")
        return [pattern], []
    if os.path.isfile(pattern):
        if form_of(pattern) is None:
            raise DataError(f"{pattern} is of no known form; the name of a file must end in {KNOWN}")
        return [os.fspath(Path(pattern))], []
    files, left_out = _candidates(pattern)
    unfinished = _in_unfinished([*files, *(path for path, _ in left_out)])
    return _checked(
        [os.fspath(Path(path)) for path in files if path not in unfinished],
        [(os.fspath(Path(path)), why) for path, why in left_out if path not in unfinished],
        given,
    )


def _checked(files: list[str], left_out: list[LeftOutPath], given: str) -> tuple[list[str], list[LeftOutPath]]:
    """What is data of the files that an input matches."""
    data, others = data_of(files)
    if not data:
        found = LeftOut()
        found.add([*left_out, *others])
        what = (
            f"holds no file of a known form ({in_words(found.as_dict())})" if files or left_out else "matches no file"
        )
        raise DataError(f"input {given!r} {what}; the name of a file must end in {KNOWN}")
    for folder, splits in splits_of(path for path in files if not is_remote(path)):
        if len(splits) > 1:
            _log.warning(
                f"{folder} is a dataset with the splits {', '.join(splits)}, and all of them are read; to read one, "
                f"name its folder, such as {folder}/{splits[0]}"
            )
    return data, [*left_out, *others]


def _candidates(pattern: str) -> tuple[list[str], list[LeftOutPath]]:
    """All files that a folder holds or a pattern matches, and what is no file."""
    if os.path.isdir(pattern):
        return files_below(pattern)
    if "**" in pattern.split("/"):
        head, rest = below_pattern(pattern)
        files: list[str] = []
        left_out: list[LeftOutPath] = []
        for root in sorted(glob.glob(head)) if glob.has_magic(head) else [head]:
            if os.path.isdir(root):
                below, others = files_below(root)
                files += [path for path in below if matches(path, root, rest)]
                left_out += [(path, why) for path, why in others if matches(path, root, rest)]
        return files, left_out
    files, left_out = [], []
    for match in sorted(glob.glob(pattern)):
        if os.path.isdir(match):
            below, others = files_below(match)
            files, left_out = [*files, *below], [*left_out, *others]
        elif is_input(match):
            files.append(match)
        else:
            left_out.append((match, SPECIAL))
    return files, left_out


def _remote(pattern: str, given: str) -> tuple[list[str], list[LeftOutPath]]:
    """The files of a remote address."""
    system, place = file_system(pattern)
    if not glob.has_magic(place) and form_of(pattern) is not None:
        return [pattern], []
    try:
        with remote_errors():
            matched = sorted(system.glob(place)) if glob.has_magic(place) else [place]
            names: list[str] = []
            for match in matched:
                names += sorted(system.find(match)) if system.isdir(match) else [match] if system.isfile(match) else []
            addresses = [str(system.unstrip_protocol(name)) for name in names]
    except OSError as error:
        raise DataError(f"cannot list {pattern}: {error}") from error
    hidden = {path for path in addresses if path.rpartition("/")[2].startswith(".")}
    return _checked([path for path in addresses if path not in hidden], [(path, HIDDEN) for path in hidden], given)
