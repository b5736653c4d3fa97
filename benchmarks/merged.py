"""The merged expert of mode ``merged``: chunks of segments, against merging all at once, against a dense layer.

    python benchmarks/merged.py [--segments 32] [--tokens 64] [--width 512] [--inner 768] [--experts 6] [--rounds 5]

Double SwiGLU, forward and backward, with the gradients of tokens, shares and weights. ``plain`` makes the matrices of
all segments and lets autograd keep them. ``dense`` is one expert for all segments: what a merged expert would cost if
merging were free. Results are first held to be equal, then each way runs in turn, so that whatever else the machine
does hits all. Memory (Linux) is what a process of its own has resident at most during a step, beyond what it had
before: results, gradients and what autograd keeps included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

Tensors = tuple[torch.Tensor, ...]


def plain(x: torch.Tensor, shares: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """All segments' matrices by one product each, then the expert."""
    merged = [(shares.to(x.dtype) @ weight.flatten(1)).view(-1, *weight.shape[1:]) for weight in (up, down)]
    return double_swiglu(x, *merged)


def dense(x: torch.Tensor, shares: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Every token through the first expert."""
    return double_swiglu(x.flatten(0, 1).unsqueeze(0), up[:1], down[:1]).view_as(x)


def double_swiglu(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """[M, N, d] through matrices [M, 2, I, d] and [M, 2, d, I]."""
    gate, value = (x @ up.flatten(1, 2).mT).chunk(2, dim=-1)
    gate, value = (F.silu(gate) * value @ down.flatten(1, 2).mT).chunk(2, dim=-1)
    return F.silu(gate) * value


def make_inputs(arguments: argparse.Namespace) -> tuple[Tensors, torch.Tensor]:
    """Tokens, shares, weights up and down; and the gradient of the result."""
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    width, inner, experts = arguments.width, arguments.inner, arguments.experts
    x = torch.randn(arguments.segments, arguments.tokens, width).to(dtype)
    shares = torch.randn(arguments.segments, experts).softmax(-1)
    up = (torch.randn(experts, 2, inner, width) / width**0.5).to(dtype)
    down = (torch.randn(experts, 2, width, inner) / inner**0.5).to(dtype)
    return tuple(tensor.requires_grad_() for tensor in (x, shares, up, down)), torch.randn_like(x)


def step(way: Callable[..., torch.Tensor], inputs: Tensors, grad_y: torch.Tensor) -> Tensors:
    """The result and the gradients; the dense layer has none for the shares."""
    y = way(*inputs)
    return y, *(
        gradient for gradient in torch.autograd.grad(y, inputs, grad_y, allow_unused=True) if gradient is not None
    )


def way_named(name: str) -> Callable[..., torch.Tensor]:
    """One of the ways, each of (x, shares, up, down)."""
    if name != "ours":
        return {"plain": plain, "dense": dense}[name]
    warnings.filterwarnings("ignore", module="megatron")  # optional packages that are not here
    from steel_megatron.model.experts import merged_experts
    from steel_megatron.parallel.topology import initialize_alone

    return partial(merged_experts, tp_group=initialize_alone("this benchmark").groups.tp, ep_group=None)


def resident(field: str) -> float:
    """MiB of this process's memory: ``VmRSS`` now, ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def extra_memory(name: str, arguments: argparse.Namespace) -> float:
    """MiB that one step needs at its highest, beyond inputs and libraries."""
    torch.set_num_threads(arguments.threads)
    way = way_named(name)
    small = argparse.Namespace(**{**vars(arguments), "segments": 2, "tokens": 2, "width": 16, "inner": 16})
    step(way, *make_inputs(small))  # libraries get their own memory at their first call
    inputs = make_inputs(arguments)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest is now what it is at present
    before = resident("VmRSS")
    step(way, *inputs)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"segments": 32, "tokens": 64, "width": 512, "inner": 768, "experts": 6, "rounds": 5, "threads": 2}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ways = {name: way_named(name) for name in ("ours", "plain", "dense")}
    inputs, grad_y = make_inputs(arguments)

    tolerance = 1e-4 if arguments.dtype == "float32" else 0.03
    names = ("y", "grad x", "grad shares", "grad up", "grad down")
    for name, a, b in zip(names, step(ways["ours"], inputs, grad_y), step(plain, inputs, grad_y), strict=True):
        error = ((a - b).norm() / b.norm()).item()
        if not error < tolerance:
            sys.exit(f"error: {name} of the chunked way is off by {error:.1e}")

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            step(way, inputs, grad_y)
            seconds[name].append(time.perf_counter() - started)
    matrices = arguments.segments * (inputs[2][0].numel() + inputs[3][0].numel()) * grad_y.element_size() / 2**20
    print(", ".join(f"{name} {value}" for name, value in vars(arguments).items()))
    print(f"the merged matrices of all segments: {matrices:.0f} MiB\n")
    print(f"{'forward + backward':<20}{'median ms':>11}{'of plain':>11}{'extra MiB':>11}")
    for name, values in seconds.items():
        ratio = statistics.median(v / p for v, p in zip(values[1:], seconds["plain"][1:], strict=True))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory = pool.apply(extra_memory, (name, arguments))
        print(f"  {name:<18}{1e3 * statistics.median(values[1:]):>11.1f}{ratio:>10.2f}x{memory:>11.0f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
