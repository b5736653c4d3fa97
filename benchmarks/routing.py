"""Soft-MoE routing side by side: tokens to slots to tokens, with experts that change nothing.

    python benchmarks/routing.py [--slots 6 64 256] [--dtype float32 bfloat16] [--rounds 7] [--threads 2] [--quick]

The shape is Steel-LLM's, 4 sequences of 2,048 tokens of width 1,792; mode ``sequence``, mix ``normalized``. The ways:

    eager             as the published model computes it: normalize, einsum, two softmaxes, two einsums
    compiled          torch.compile of that
    soft-moe-pytorch  the package of that name (pip install soft-moe-pytorch), where it is installed
    ours              steel_megatron.ops
    copy              a copy of the tokens into memory that is there: reads and writes as much as the forward pass must

Large tensors are fetched from the system and given back with every call, page by page, which can take longer than the
arithmetic. So all ways run twice: in memory ``as is``, which is what a user gets, and then ``warm``, where freed memory
stays with the process (mallopt). ``faults`` are page faults of one call.

All ways are first held to the float32 result of ours, and ours in float32 to eager's. Then they run in turn, round by
round, so that whatever else the machine does hits all. ``x eager`` is the median over the rounds of eager's time by
this way's; with one thread it is processor time, which other programs disturb less. ``extra MiB`` is measured in a
process per way: how far a step's resident memory rises (VmHWM of /proc/self/status, reset before the step, after one
step to warm up) above what was there before and the results of the step (y, and the gradients of tokens and keys).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from steel_megatron.ops import combine, dispatch, kernels

SHAPE, QUICK_SHAPE = (4, 2048, 1792), (2, 256, 128)
WAYS = ("eager", "compiled", "soft-moe-pytorch", "ours", "copy")
SCALE = 4.0
Route = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """What every way computes with. ``phi`` [d, S] is the slots' keys before they are scaled."""

    x: torch.Tensor
    phi: torch.Tensor
    grad_y: torch.Tensor

    @classmethod
    def make(cls, shape: tuple[int, ...], slots: int, dtype: torch.dtype) -> Problem:
        """Random tokens and keys, the same in every process and, up to rounding, in every type."""
        generator = torch.Generator().manual_seed(0)
        x, phi, grad_y = (
            torch.randn(size, generator=generator).to(torch.bfloat16).to(dtype)
            for size in (shape, (shape[2], slots), shape)
        )
        return cls(x.requires_grad_(), phi.requires_grad_(), grad_y)


def eager(x: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    """Soft-MoE routing as plain PyTorch programs write it."""
    normalized = functional.normalize(x, dim=-1)
    logits = torch.einsum("btd,ds->bts", normalized, SCALE * functional.normalize(phi, dim=0))
    slots = torch.einsum("btd,bts->bsd", normalized, logits.softmax(1))
    return torch.einsum("bsd,bts->btd", slots, logits.softmax(2))


def ours(x: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    """The same by this library."""
    slots, routing = dispatch(x, phi.unsqueeze(-1), phi.new_full((1,), SCALE), mode="sequence", mix="normalized")
    return combine(slots, routing)


def soft_moe_pytorch(problem: Problem) -> Route | None:
    """soft-moe-pytorch's module with identity for experts; its two norms' gains are set to give the same numbers."""
    if importlib.util.find_spec("soft_moe_pytorch") is None:
        return None
    from soft_moe_pytorch import SoftMoE

    width, slots = problem.phi.shape
    module = SoftMoE(width, num_experts=1, num_slots=slots, expert_mult=1 / width).to(problem.x.dtype)
    module.experts = torch.nn.Identity()
    torch.nn.init.constant_(module.norm.gamma, width**-0.5)
    torch.nn.init.constant_(module.slot_norm.gamma, SCALE * width**-0.5)
    del module.slot_embeds
    module.slot_embeds = problem.phi.t().unsqueeze(0)  # [experts, slots, d]
    return lambda: module(problem.x)


def route_of(way: str, problem: Problem) -> Route | None:
    """The way's function on the problem; None if it is not there."""
    if way == "soft-moe-pytorch":
        return soft_moe_pytorch(problem)
    if way == "copy":
        tokens = problem.x.detach()
        there = tokens.clone()
        return lambda: there.copy_(tokens)
    function = {"eager": eager, "compiled": torch.compile(eager, dynamic=False), "ours": ours}[way]
    return lambda: function(problem.x, problem.phi)


def step_of(route: Route, problem: Problem, backward: bool) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A step: the result, and with ``backward`` the gradients of tokens and keys."""

    def forward_only() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (route(),)

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        y = route()
        return (y.detach(), *torch.autograd.grad(y, (problem.x, problem.phi), problem.grad_y, allow_unused=True))

    return forward_and_backward if backward else forward_only


def hold_equal(name: str, results: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...], tolerance: float) -> None:
    """Leave if a result is off by more than rounding, as a part of its length."""
    for what, a, b in zip(("y", "grad x", "grad phi"), results, right, strict=True):
        error = ((a.float() - b).norm() / b.norm()).item()
        if not error < tolerance:
            sys.exit(
                f"error: {what} of {name} is off by {error:.1e} of its length; at most {tolerance:.0e} is rounding"
            )


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, however large; whether this system's does."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    no_maps, never_trimmed = (-4, 0), (-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return all(mallopt(*setting) for setting in (no_maps, never_trimmed))


def page_faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measured_in_turn(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Seconds and page faults of every step, each run once per round; a first round does not count."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            faults, started = page_faults(), clock()
            step()
            measured[name].append((clock() - started, page_faults() - faults))
    return {name: values[1:] for name, values in measured.items()}


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def extra_memory(step: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """How far a step's resident memory rises above what was there and what it gives, in bytes."""
    step()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    results = step()
    peak = resident("VmHWM")
    return max(0, peak - before - sum(tensor.nbytes for tensor in results if tensor is not None))


def extra_memory_elsewhere(way: str, slots: int, dtype: str, backward: bool, arguments: argparse.Namespace) -> float:
    """The same in MiB, in a process of its own."""
    command = [sys.executable, __file__, "--slots", str(slots), "--dtype", dtype, "--threads", str(arguments.threads)]
    command += ["--memory-of", way] + ["--quick"] * arguments.quick + ["--backward"] * backward
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20


def right_results(slots: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Ours in float32, held to eager's."""
    wide = Problem.make(shape, slots, torch.float32)
    right = step_of(lambda: ours(wide.x, wide.phi), wide, True)()
    hold_equal("ours in float32", right, step_of(lambda: eager(wide.x, wide.phi), wide, True)(), 1e-4)
    return right


def compare(slots: int, dtype: str, memory: str, arguments: argparse.Namespace, shape: tuple[int, ...]) -> None:
    """Print the table's rows for one number of slots and one type."""
    right = right_results(slots, shape)
    problem = Problem.make(shape, slots, getattr(torch, dtype))
    routes = {way: route for way in WAYS if (route := route_of(way, problem)) is not None}
    for way, route in routes.items():
        if way != "copy":
            hold_equal(f"{way} in {dtype}", step_of(route, problem, True)(), right, 1e-4 if dtype == "float32" else 0.1)
    del right
    for backward in (False, True):
        steps = {way: step_of(route, problem, backward and way != "copy") for way, route in routes.items()}
        measured = measured_in_turn(steps, arguments.rounds)
        for way, values in measured.items():
            seconds, faults = zip(*values, strict=True)
            ratio = statistics.median(e / v for (e, _), v in zip(measured["eager"], seconds, strict=True))
            extra = ""
            if memory == "as is" and way != "copy":
                extra = f"{extra_memory_elsewhere(way, slots, dtype, backward, arguments):.0f}"
            what = "fwd + bwd" if backward else "forward"
            print(
                f"{slots:>5}  {dtype:<9}{memory:<7}{what:<11}{way:<18}{1e3 * statistics.median(seconds):>9.1f}"
                f"{ratio:>9.2f}{statistics.median(faults):>8.0f}{extra:>11}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[6, 64, 256])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help=f"the shape {QUICK_SHAPE} instead: does it run?")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)  # for processes that measure memory
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not kernels.available():
        sys.exit("error: the compiled extension is not there; pip install --no-build-isolation -e . builds it")
    torch.set_num_threads(arguments.threads)
    shape = QUICK_SHAPE if arguments.quick else SHAPE
    if arguments.memory_of:
        problem = Problem.make(shape, arguments.slots[0], getattr(torch, arguments.dtype[0]))
        route = route_of(arguments.memory_of, problem)
        assert route is not None
        print(extra_memory(step_of(route, problem, arguments.backward)))
        return
    print(f"{list(shape)}, {arguments.threads} threads, torch {torch.__version__}, {arguments.rounds} rounds")
    if importlib.util.find_spec("soft_moe_pytorch") is None:
        print("soft-moe-pytorch is not installed: left out")
    head = f"{'slots':>5}  {'type':<9}{'memory':<7}{'pass':<11}{'way':<18}"
    print(f"\n{head}{'median ms':>9}{'x eager':>9}{'faults':>8}{'extra MiB':>11}")
    for memory in ("as is", "warm"):
        if memory == "warm" and not keep_freed_memory():
            print("this system's malloc cannot be told to keep memory: the warm rows are left out")
            break
        for slots in arguments.slots:
            for dtype in arguments.dtype:
                compare(slots, dtype, memory, arguments, shape)


if __name__ == "__main__":
    main()
