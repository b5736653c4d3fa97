"""What starting costs: the seconds that imports take, by package, and the whole processor time of a mistake.

    python benchmarks/startup.py [--rounds 3]

``python -X importtime`` adds up the time of every module. ``command line`` is what every command imports; ``engine`` is
what ``pretrain`` imports before it reads data; ``lower bound`` is torch with what megatron-core and
torch.distributed.checkpoint, which the engine is built on, take of it. ``a wrong option`` and ``a missing path`` are
whole commands. The least of the rounds is printed.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PREPARE = "from steel_megatron.platform import prepare; prepare(); "
IMPORTS = {
    "command line": "import steel_megatron.cli",
    "engine": PREPARE + "import steel_megatron.train.loop",
    "lower bound": "import torch, torch.distributed.tensor, torch.distributed.checkpoint",
}
COMMANDS = {
    "a wrong option": ["generate", "--model", ".", "--prompts", "a", "--temperature", "-1"],
    "a missing path": ["generate", "--model", "no/such/model", "--prompts", "a"],
}
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def seconds_of(code: str) -> Counter[str]:
    """Seconds of all modules that a program imports, by package."""
    words = [sys.executable, "-X", "importtime", "-c", code]
    told = subprocess.run(words, capture_output=True, text=True, check=True, env=environment()).stderr
    found: Counter[str] = Counter()
    for microseconds, package in _LINE.findall(told):
        found[package] += int(microseconds)
    return Counter({package: value / 1e6 for package, value in found.items()})  # type: ignore[misc]


def processor_seconds(words: list[str]) -> float:
    """Of a command that ends with exit code 2."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "steel_megatron", *words], capture_output=True, env=environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = range(parser.parse_args().rounds)
    print(f"{'imports':<16}{'seconds':>9}   of these")
    for name, code in IMPORTS.items():
        found = min((seconds_of(code) for _ in rounds), key=lambda one: one.total())
        largest = ", ".join(f"{package} {value:.2f}" for package, value in found.most_common(6))
        print(f"{name:<16}{found.total():>9.2f}   {largest}", flush=True)
    print(f"\n{'commands':<16}{'seconds':>9}   of the processor")
    for name, words in COMMANDS.items():
        print(f"{name:<16}{min(processor_seconds(words) for _ in rounds):>9.2f}", flush=True)


if __name__ == "__main__":
    main()
