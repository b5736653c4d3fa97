"""Applies small edits to a copy of the project, one at a time, and reports those that no test notices.

Each ``*.yaml`` in this folder is an area: a list of edits, each with the fewest and quickest tests that must fail with
it. ``python -m tests.mutants.run --only NAME`` runs an area, or the edits whose names contain NAME.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
# Every run of pytest is forked from a process that has imported what takes long, and nothing of the project.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.mutants.preload"])
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "__pycache__", ".*_cache", "*.egg-info")
# Exceptions of an edit that cannot run, which says nothing about the tests.
MALFORMED = re.compile(r"\b(?:NameError|UnboundLocalError|ImportError|SyntaxError): .*")
FAILED = re.compile(r"^(?:FAILED|ERROR) ([^\s\[]+)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """An edit of one file, and the tests that must fail with it.

    Attributes:
        area: the list that it is in.
        name: unique over all lists.
        file: path from the project's root.
        find: text that occurs exactly once in the file.
        replace: what stands there instead.
        tests: ``file::function``, or whole files.
    """

    area: str
    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]


def read_mutants(root: Path) -> list[Mutant]:
    """All lists of a project."""
    found = []
    for path in sorted((root / "tests" / "mutants").glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
            found.append(Mutant(**{**entry, "area": path.stem, "tests": tuple(entry["tests"])}))
    return found


@cache
def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.FunctionDef)}


def problem(mutant: Mutant, root: Path) -> str | None:
    """What makes a mutant useless before any test has run; None if nothing does."""
    source = root / mutant.file
    count = source.read_text(encoding="utf-8").count(mutant.find) if source.is_file() else 0
    if count != 1 or mutant.find == mutant.replace:
        return f"its text is {count} times in {mutant.file}" if count != 1 else "it changes nothing"
    if source.suffix == ".py":
        try:
            compile(edited(mutant, root), mutant.file, "exec")
        except SyntaxError as error:
            return f"{mutant.file} does not compile with it: {error}"
    for test in mutant.tests:
        file, _, function = test.partition("::")
        if not (root / file).is_file() or (function and function.partition("[")[0] not in _functions(root / file)):
            return f"there is no test {test}"
    return None if mutant.tests else "it names no test"


def edited(mutant: Mutant, root: Path) -> str:
    """The mutant's file with the edit."""
    return (root / mutant.file).read_text(encoding="utf-8").replace(mutant.find, mutant.replace)


def _pytest(tree: Path, words: Sequence[str], log: Path) -> NoReturn:
    """In a process of its own: run pytest on a copy of the project."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)  # before everything installed, also for processes that the tests start
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry and Path(entry) not in (ROOT, ROOT.parent))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    code = pytest.main(list(words))
    sys.stdout.flush()
    os._exit(code)


def run_pytest(tree: Path, tests: Iterable[str], timeout: float | None, *options: str) -> tuple[int | None, str]:
    """Run tests in a copy of the project; their exit code (None after ``timeout`` seconds) and output."""
    if (tree / "tests/mutants/no_shrinking.py").is_file():
        options = ("-p", "tests.mutants.no_shrinking", *options)
    log = tree.parent / "log"
    words = ["-q", "-p", "no:cacheprovider", "-o", "timeout=0", f"--basetemp={tree.parent / 'tmp'}", *options, *tests]
    process = SERVER.Process(target=_pytest, args=(tree, words, log))
    process.start()
    process.join(timeout)
    code = process.exitcode
    with suppress(ProcessLookupError):  # nothing that a test started outlives it
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    return code, log.read_text(errors="replace") if log.exists() else ""


def verdict(mutant: Mutant, tree: Path, timeout: float) -> str:
    """``caught``, ``SURVIVED``, or ``broken: why``, after one run of its tests with the edit, which is taken back."""
    source = tree / mutant.file
    before = source.read_bytes()
    compiled = Path(importlib.util.cache_from_source(str(source)))  # it knows the source by size and second alone
    try:
        source.write_text(edited(mutant, tree), encoding="utf-8")
        compiled.unlink(missing_ok=True)
        code, output = run_pytest(tree, mutant.tests, timeout, "-x")
    finally:
        source.write_bytes(before)
        compiled.unlink(missing_ok=True)
    if code is None:
        return f"broken: no end within {timeout:.0f} s"
    if code == 0:
        return "SURVIVED" if " passed" in output else "broken: its tests are skipped here"
    if code != 1:
        return f"broken: pytest ended with exit code {code}"
    malformed = MALFORMED.search(output)
    return f"broken: {malformed[0]}" if malformed else "caught"


def copies(root: Path, folder: Path, count: int) -> Iterable[Path]:
    """Copies of the project, compiled modules included, each beside a link to the fixtures' folder."""
    for number in range(count):
        tree = folder / str(number) / "project"
        shutil.copytree(root, tree, ignore=NOT_COPIED)
        if (root.parent / "shared").is_dir():
            (tree.parent / "shared").symlink_to(root.parent / "shared")
        yield tree


def failing_unedited(tree: Path, mutants: Sequence[Mutant], jobs: int) -> tuple[set[str], str]:
    """The tests, as ``file::function``, that fail without any edit; and the output of a run that could not be done."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    code, output = run_pytest(tree, tests, None, *(["-n", str(jobs), "--dist=loadfile"] if jobs > 1 else []))
    return set(FAILED.findall(output)), output if code not in (0, 1) else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run mutants; exit code 0 if all are caught, 1 if not, 2 if the run could not be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="NAME", help="an area, or a part of the names of mutants")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the project that are tested at the same time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that the tests of a mutant may take")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project")
    options = parser.parse_args(arguments)
    every = read_mutants(options.root)
    chosen = [m for m in every if options.only == m.area] or [m for m in every if options.only in m.name]
    if not chosen:
        print(f"no mutant is called {options.only!r}")
        return 2
    results = {mutant: f"broken: {why}" for mutant in chosen if (why := problem(mutant, options.root))}
    sound = [mutant for mutant in chosen if mutant not in results]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for tree in copies(options.root, Path(folder), options.jobs):
            trees.put(tree)
        failing, trouble = failing_unedited(tree, sound, options.jobs) if sound else (set(), "")
        if trouble:
            print(trouble, "the tests cannot be run without any edit", sep="\n")
            return 2

        def test(mutant: Mutant) -> tuple[str, float]:
            own = {test.partition("[")[0] for test in mutant.tests}
            bad = sorted(name for name in failing if name in own or name.partition("::")[0] in own)
            if mutant in results or bad:
                return results.get(mutant, f"broken: {', '.join(bad)} fails without it"), 0.0
            tree, began = trees.get(), time.monotonic()
            try:
                return verdict(mutant, tree, options.timeout), time.monotonic() - began
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(options.jobs) as pool:
            try:
                for mutant, (result, seconds) in zip(chosen, pool.map(test, chosen), strict=True):
                    results[mutant] = result
                    print(f"{seconds:6.1f} s  {mutant.area}: {mutant.name}: {result}", flush=True)
            finally:
                pool.shutdown(cancel_futures=True)  # after Ctrl-C
    counts = [sum(result.startswith(word) for result in results.values()) for word in ("caught", "SURV", "broken")]
    print(f"{len(chosen)} mutants, {counts[0]} caught, {counts[1]} survived, {counts[2]} broken")
    return int(counts[0] < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
