"""The common tests of transformers' models, out of the source distribution of the installed version.

``python -m tests.hf.suite`` fetches it into the environment; ``make setup`` does that too.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tarfile
import types
from importlib.metadata import version
from pathlib import Path

TESTED = "5.24"
"""The version whose tests are known; others may have tests that do not apply, and nobody has looked."""
PACKAGE = "transformers_tests"  # `tests` is this folder's name
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
"""Classes that the tests import out of folders that the distribution does not have."""


def archive() -> Path:
    """Where the distribution is, or belongs."""
    return Path(sys.prefix, "share", "sources", f"transformers-{version('transformers')}.tar.gz")


def is_here() -> bool:
    """Whether the tests can be loaded."""
    known = version("transformers").startswith(f"{TESTED}.")
    return known and archive().is_file() and importlib.util.find_spec("parameterized") is not None


def fetch() -> int:
    """Download the distribution, unless it is here; pip's exit code."""
    if archive().is_file():
        return 0
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(archive().parent)]
    command = [*pip, "download", *options, f"transformers=={version('transformers')}"]
    return subprocess.run(command, check=False).returncode


def load(folder: Path) -> types.ModuleType:
    """Import tests/test_modeling_common.py, with empty classes for those that are absent.

    Args:
        folder: where to unpack it.
    """
    with tarfile.open(archive()) as files:
        member = next(m for m in files if m.name.partition("/")[2] == "tests/test_modeling_common.py")
        source = files.extractfile(member)
        assert source is not None
        (folder / "test_modeling_common.py").write_bytes(source.read())
    modules = {PACKAGE: types.ModuleType(PACKAGE)}
    for name, class_name in ABSENT.items():
        for part in (f"{PACKAGE}.{name.partition('.')[0]}", f"{PACKAGE}.{name}"):
            modules[part] = types.ModuleType(part)
        setattr(modules[f"{PACKAGE}.{name}"], class_name, type(class_name, (), {}))
    for module in modules.values():
        module.__path__ = [str(folder)] if module.__name__ == PACKAGE else []
    sys.modules.update(modules)
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


if __name__ == "__main__":
    sys.exit(fetch())
