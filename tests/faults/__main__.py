"""``python -m tests.faults --kills 40 --seed 7``"""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
from pathlib import Path

from tests.faults.harness import Campaign


def main() -> None:
    """Kill as often as asked for, and say what happened."""
    parser = argparse.ArgumentParser(description="Kills processes of small runs at random, and compares the results.")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    options = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"  # of optional packages, in every process
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        Campaign(Path(folder), options.kills, options.seed, lambda line: print(line, flush=True)).run()


if __name__ == "__main__":
    main()
