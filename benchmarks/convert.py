"""Conversion of the published model's size, both ways, against copying the file and transformers' load and save.

    python benchmarks/convert.py [--layers 18] [--dtype bfloat16] [--folder .] [--rounds 3]

The model has the shape of the 1.12B one (18 layers of width 1792, 6 experts) with random weights. All ways write to the
same disk and sync. A conversion also verifies checksums and compares logits of both sides, which its seconds include.
``memory`` is by how much the process grew at most, mapped files included. Each way runs in turn, and the median of the
rounds is printed, of seconds and of processor seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from steel_megatron.config import ModelConfig
from steel_megatron.hf import mapping
from steel_megatron.hf.convert import DTYPES, export_hf, import_hf
from steel_megatron.hf.modeling_steel import SteelForCausalLM
from steel_megatron.hf.weights import Planned, write_weights


def published(folder: Path, model: ModelConfig, dtype: torch.dtype) -> None:
    """A folder with random weights, one tensor in memory at a time."""
    shapes = mapping.published_shapes(model)

    def drawn() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            yield name, torch.randn(shape, dtype=dtype) * 0.02

    folder.mkdir(parents=True)
    write_weights(folder, {name: Planned(shape, dtype) for name, shape in shapes.items()}, drawn(), 2**62)
    config = {"dtype": mapping.type_name(dtype), **mapping.config_to_hf(model)}
    (folder / "config.json").write_text(json.dumps(config))


def copy(source: Path, target: Path) -> None:
    """Copy the weights, and sync."""
    target.mkdir()
    shutil.copyfile(source / "model.safetensors", target / "model.safetensors")
    sync(target)


def load_and_save(source: Path, target: Path) -> None:
    """As users of transformers convert."""
    model = SteelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(target)
    sync(target)


def sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def status(name: str) -> int:
    """Bytes of a figure in this process's status."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measured(action: Callable[[], object]) -> tuple[float, float, int]:
    """Seconds, processor seconds of all threads, and bytes by which the process grew at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begin, used = status("VmRSS"), time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - begin, time.process_time() - used, status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--folder", default=".")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = ModelConfig(
        num_layers=arguments.layers,
        hidden_size=1792,
        num_attention_heads=32,
        ffn_hidden_size=448,
        routing_mode="sequence",
        slot_input="normalized",
        vocab_size=151936,
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="convert-") as root:
        source, saved = Path(root, "published"), Path(root, "checkpoint")
        published(source, model, DTYPES[arguments.dtype])
        size = (source / "model.safetensors").stat().st_size
        largest = max(torch.Size(shape).numel() for shape in mapping.published_shapes(model).values())
        largest *= DTYPES[arguments.dtype].itemsize
        allowed = 2 * largest + 200 * 10**6
        print(
            f"{size / 1e9:.2f} GB of weights, largest tensor {largest / 1e6:.0f} MB: twice that and 200 MB is "
            f"{allowed / 1e6:.0f} MB"
        )
        import_hf(source, saved)  # a first time, for what is only imported and compiled once
        ways: dict[str, Callable[[Path], object]] = {
            "copy the file": lambda target: copy(source, target),
            "import-hf": lambda target: import_hf(source, target),
            "export-hf": lambda target: export_hf(saved, target),
            "transformers load and save": lambda target: load_and_save(source, target),
        }
        results: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                target = Path(root, "out")
                results[name].append(measured(lambda way=way, target=target: way(target)))  # type: ignore[misc]
                shutil.rmtree(target)
        print(f"{'':<28}{'seconds':>9}{'x copy':>8}{'CPU s':>8}{'x copy':>8}{'memory, MB':>12}")
        middle = {
            name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in results.items()
        }
        for name, rows in results.items():
            cells = "".join(
                f"{value:>{width}.2f}{value / copied:>8.2f}"
                for value, copied, width in zip(middle[name][:2], middle["copy the file"][:2], (9, 8), strict=True)
            )
            print(f"{name:<28}{cells}{max(memory for _, _, memory in rows) / 1e6:>12.0f}")


if __name__ == "__main__":
    main()
