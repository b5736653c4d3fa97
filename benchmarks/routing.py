"""Soft-MoE routing: the compiled kernels against the plain PyTorch reference, at Steel-LLM's shape.

    python benchmarks/routing.py [--batch 4] [--length 2048] [--width 1792] [--slots 6] [--rounds 15]

Dispatch and combine only, with the slots themselves as the experts' results. Both are first held to be equal, then run
in turn, so that whatever else the machine does hits both. The ratio is the median over the rounds' ratios. A copy reads
as much as the tokens and writes as much as the result: the floor of the forward pass.

glibc gives large tensors back to the system at once, and a page of new memory takes longer to get than to fill. That
is most of the time of a copy and of the kernels; ``--keep-memory`` measures what is left without it.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable

import torch

from steel_megatron.ops import kernels, reference

Step = Callable[[], object]


def routing(
    module: object, x: torch.Tensor, keys: torch.Tensor, plan: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Tokens to slots to tokens, as a layer whose experts do nothing."""
    refresh, blocks = plan
    slots, logits, _ = module.dispatch(x, keys, refresh, True)  # type: ignore[attr-defined]
    y: torch.Tensor = module.combine(slots, logits, blocks)  # type: ignore[attr-defined]
    return y


def with_backward(module: object, x: torch.Tensor, keys: torch.Tensor, plan: tuple, grad_y: torch.Tensor) -> tuple:
    """The result of :func:`routing`, and the gradients of tokens and keys."""
    y = routing(module, x, keys, plan)
    return (y, *torch.autograd.grad(y, (x, keys), grad_y))


def assert_equal(ours: tuple, theirs: tuple) -> None:
    """Leave if a tensor is off by more than rounding, relative to its largest entry."""
    for name, a, b in zip(("y", "grad x", "grad keys"), ours, theirs, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error < 1e-4:
            sys.exit(f"error: {name} of the kernels is off by {error:.1e} of its largest entry")


def in_turn(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step, each run once per round; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def report(title: str, seconds: dict[str, list[float]]) -> None:
    """Print a table row per step: median milliseconds, and how many times the reference takes."""
    print(f"{title:<20}{'median ms':>12}{'reference takes':>18}")
    for name, values in seconds.items():
        ratio = statistics.median(r / v for r, v in zip(seconds["reference"], values, strict=True))
        print(f"  {name:<18}{1e3 * statistics.median(values):>12.1f}{ratio:>17.2f}x")


def keep_memory() -> None:
    """Let glibc keep freed memory for the next tensor."""
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3  # mallopt's numbers of these settings
    if not (libc.mallopt(mmap_threshold, 2**31 - 1) and libc.mallopt(trim_threshold, 2**31 - 1)):
        sys.exit("error: this C library's malloc cannot be told to keep memory; leave out --keep-memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 4), ("length", 2048), ("width", 1792), ("slots", 6), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--block-length", type=int, default=None, help="block_causal with this block; else sequence")
    parser.add_argument("--keep-memory", action="store_true", help="do not count getting memory from the system")
    arguments = parser.parse_args()
    if arguments.keep_memory:
        keep_memory()
    if not kernels.available():
        sys.exit("error: the compiled extension is not there; pip install --no-build-isolation -e . builds it")

    torch.manual_seed(0)
    batch, length, width = arguments.batch, arguments.length, arguments.width
    x = torch.randn(batch, length, width, requires_grad=True)
    phi = torch.randn(width, arguments.slots, 1)
    keys = reference.slot_keys(phi, torch.tensor([4.0])).requires_grad_()
    grad_y = torch.randn(batch, length, width)
    points = [length] if arguments.block_length is None else reference.refresh_points(length, arguments.block_length)
    blocks = [0] * length if arguments.block_length is None else reference.block_of_token(length, points)
    plan = (torch.tensor(points), torch.tensor(blocks))

    modules = {"reference": reference, "kernels": kernels}
    results = {name: with_backward(module, x, keys, plan, grad_y) for name, module in modules.items()}
    assert_equal(results["kernels"], results["reference"])

    mode = "sequence" if arguments.block_length is None else f"block_causal, K = {arguments.block_length}"
    print(f"[{batch}, {length}, {width}] float32, {arguments.slots} slots, {mode}, {torch.get_num_threads()} threads")
    print(f"memory {'is kept' if arguments.keep_memory else 'comes from the system for every large tensor'}\n")
    with torch.no_grad():
        steps: dict[str, Step] = {n: (lambda m=m: routing(m, x, keys, plan)) for n, m in modules.items()}
        steps["copy (floor)"] = x.clone
        report("forward", in_turn(steps, arguments.rounds))
    steps = {n: (lambda m=m: with_backward(m, x, keys, plan, grad_y)) for n, m in modules.items()}
    report("forward + backward", in_turn(steps, arguments.rounds))


if __name__ == "__main__":
    main()
