"""Everything that a GPU owner can check and time, in one go and one report: kernels, training, memory, checkpoints.

    python benchmarks/gpu_check.py [--device cuda] [--quick] [--rounds 20] [--no-timing] [--report gpu_check.json]
    torchrun --nproc-per-node 8 benchmarks/gpu_check.py       # training on several GPUs, with and without overlap

Needs the extension built with CUDA (``STEEL_CUDA=1 pip install --no-build-isolation -e .``); builds nothing itself.
It takes less than ten minutes on one GPU with 80 GB.

Kernels: slots, logits, log-sum-exp, y and the gradients of every pass on many shapes in every type, held to the float64
reference; half precision against eager PyTorch's own error; the same bits in a second run; ``torch.library.opcheck``.
Dispatch and combine are timed at Steel-LLM's shape against eager PyTorch (in mode ``sequence`` as the published model
does it), torch.compile of that, and a copy on the same device.

Training (benchmarks/gpu_training.py): a few steps of a 1.12B model in each implementation that is here (local,
transformer_engine): losses next to those of the first one, milliseconds, tokens per second, model FLOPs utilisation,
the memory that ``steel-megatron checkpoint plan`` counts and the device's peak; and checkpoints of each implementation
loaded in the others.

Exit code: 0 if all is well, 1 if a check failed, 2 if it cannot run here. ``--device cpu`` does the same with the C++
kernels and a tiny model.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_training

from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import write_atomically
from steel_megatron.log import exit_code
from steel_megatron.ops import kernels, reference
from steel_megatron.ops.plan import BlockPlan, block_plan

TYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("slots", "logits", "lse", "y", "grad x", "grad keys")
STEEL = (4, 2048, 1792, 6)


@dataclass(frozen=True)
class Case:
    """One comparison: shape, mode (``block_length`` None is ``sequence``), and what is odd about its tokens."""

    batch: int
    length: int
    width: int
    slots: int
    block_length: int | None = None
    mix_normalized: bool = False
    documents: bool = False
    scale: float = 3.0
    tokens: str = "random"  # or: equal, zeros (some of them)

    def plan(self, device: torch.device) -> BlockPlan:
        """Blocks; with documents, sequence b has borders at every (7 + 5 b)-th token."""
        starts = None
        if self.documents:
            tokens = torch.arange(self.length)
            starts = torch.stack([tokens // (7 + 5 * row) * (7 + 5 * row) for row in range(self.batch)]).to(device)
        return block_plan(self.length, self.block_length, device, starts)

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x and keys; the same on every device."""
        generator = torch.Generator().manual_seed(self.length)
        x = torch.randn(self.batch, self.length, self.width, generator=generator)
        if self.tokens == "equal":
            x = x[:, :1].expand(x.shape).contiguous()
        keys = self.scale * reference.l2_normalize(torch.randn(self.width, self.slots, generator=generator), dim=0)
        if self.tokens == "zeros":
            x[:, ::5] = 0.0
        return x.to(device, dtype), keys.to(device)


CASES = [
    Case(2, 37, 20, 6),
    Case(2, 37, 19, 6, 5, True),  # rows that are not aligned
    Case(1, 1, 8, 4, 8, True),  # one token
    Case(1, 2, 3, 1, 64),
    Case(2, 9, 16, 1, 1),  # a block for every token
    Case(2, 101, 64, 6, 16, True, documents=True),
    Case(3, 101, 64, 6, None, False, documents=True),
    Case(1, 300, 36, 18, 7),  # more slots than a tile
    Case(1, 40, 5, 70, 3, True),
    Case(1, 40, 12, 512),
    Case(2, 50, 2300, 6, 16),  # more columns than a tile
    Case(1, 30, 12, 3, 5, True, scale=1e4),
    Case(1, 30, 12, 3, 5, False, tokens="equal"),
    Case(1, 30, 12, 3, 5, False, tokens="zeros"),
    Case(*STEEL, 64, True),
    Case(*STEEL),
    Case(8, 8192, 128, 4, 512),
    Case(4096, 300, 4, 2, 64),  # more tokens than a dimension of a grid may have blocks
]


def layer(module: ModuleType, x: Tensor, keys: Tensor, plan: BlockPlan, mix_normalized: bool) -> dict[str, Tensor]:
    """A layer whose experts are tanh, and the gradients of a fixed loss on y, logits and lse."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, keys)]
    slots, logits, lse = module.dispatch(*leaves, plan.starts, plan.ends, mix_normalized)
    y = module.combine(torch.tanh(slots), logits, plan.block_of_token)
    seen = torch.where((plan.starts < plan.ends).unsqueeze(-1), lse, 0.0)
    columns = torch.arange(y.size(-1), device=y.device)
    loss = (y * torch.cos(columns).to(y.dtype)).sum(dtype=lse.dtype) + logits.sin().sum() + seen.cos().sum()
    gradients = torch.autograd.grad(loss, leaves)
    return {name: value.detach() for name, value in zip(NAMES, (slots, logits, lse, y, *gradients), strict=True)}


def errors(result: dict[str, Tensor], right: dict[str, Tensor], zeros: Tensor) -> dict[str, float]:
    """Largest error relative to the largest entry; infinite where one is not finite and the other is.

    The gradient of a zero vector is that of x / 1e-12, ten orders above the others: it is compared by itself.
    """
    found = {}
    for name, value in right.items():
        parts = [(result[name].double(), value)]
        if name == "grad x":
            parts = [(result[name][mask].double(), value[mask]) for mask in (zeros, ~zeros)]
        worst = 0.0
        for a, b in parts:
            finite = b.isfinite()
            if not torch.equal(a.isfinite(), finite):
                worst = float("inf")
            elif finite.any():
                worst = max(worst, ((a - b)[finite].abs().max() / b[finite].abs().max().clamp_min(0.1)).item())
        found[name] = worst
    return found


def failures(case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """What is wrong with the kernels on one case."""
    (x, keys), plan = case.tensors(device, dtype), case.plan(device)
    ours = layer(kernels, x, keys, plan, case.mix_normalized)
    again = layer(kernels, x, keys, plan, case.mix_normalized)
    right = layer(reference, x.double(), keys.double(), plan, case.mix_normalized)
    eager = layer(reference, x, keys, plan, case.mix_normalized)
    zeros = (x == 0).all(-1)
    allowed = errors(eager, right, zeros)
    for name, error in errors(ours, right, zeros).items():
        # A logit of 1e4 is known to 1e-3 in float32; elsewhere sums in another order differ by a few roundings.
        limit = max(5e-3 if case.scale > 100 else 3e-5, 1.05 * allowed[name])
        if not error <= limit:
            yield f"{name} is off by {error:.1e} of its largest entry (allowed {limit:.1e})"
    for name, value in ours.items():
        if not torch.equal(value, again[name]):
            yield f"{name} differs between two runs"


def opcheck(device: torch.device, dtype: torch.dtype) -> None:
    """torch's own checks of the four operators: schemas, fake tensors, autograd, torch.compile."""
    case = Case(2, 11, 8, 3, 4, True, documents=True)
    (x, keys), plan = case.tensors(device, dtype), case.plan(device)
    operators, blocks = torch.ops.steel_megatron, (plan.starts, plan.ends)
    arguments = (x.clone().requires_grad_(), keys.clone().requires_grad_(), *blocks, True)
    torch.library.opcheck(operators.soft_moe_dispatch, arguments)
    made = operators.soft_moe_dispatch(x, keys, *blocks, True)
    outputs = made[0].to(dtype, copy=True)
    leaves = (outputs.clone().requires_grad_(), made[1].clone().requires_grad_())
    torch.library.opcheck(operators.soft_moe_combine, (*leaves, plan.block_of_token))
    finite = tuple(value.nan_to_num(neginf=0.0) for value in made)
    torch.library.opcheck(operators.soft_moe_dispatch_backward, (*finite, x, keys, *blocks, True, *made))
    torch.library.opcheck(operators.soft_moe_combine_backward, (x, outputs, made[1], plan.block_of_token))


@dataclass
class Report:
    """What was found, for one JSON file.

    Attributes:
        machine: device, versions.
        checks: name, and what is wrong (None: nothing).
        kernels: rows of the timings.
        training: rows of :func:`gpu_training.measure`.
    """

    machine: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Checks that found something wrong."""
        return sum(check["wrong"] is not None for check in self.checks)

    def check(self, name: str, find: Callable[[], str | None]) -> None:
        """Run a check and print a line of it; one that raises has failed, and the others still run."""
        try:
            wrong = find()
        except ConfigError:
            raise
        except Exception as error:  # what a GPU, its libraries or a kernel raise is a result here
            traceback.print_exc()
            wrong = f"{type(error).__name__}: {error}"
        self.checks.append({"name": name, "wrong": wrong})
        if is_rank0():
            print(f"{'ok' if wrong is None else 'FAILED':<7}{name}" + (f"\n       {wrong}" if wrong else ""))


def is_rank0() -> bool:
    """Whether this process prints and writes for all of a launch."""
    return os.environ.get("RANK", "0") == "0"


def verify(device: torch.device, dtypes: list[torch.dtype], quick: bool, report: Report) -> None:
    """A check per case and type."""
    for case in [case for case in CASES if not quick or case.batch * case.length * case.width < 100_000]:
        for dtype in dtypes:
            if dtype != torch.float32 and (case.scale > 100 or case.tokens == "zeros"):
                continue  # rounding the tokens alone moves these by more than anything to be seen
            name = f"{str(dtype)[6:]:<9} {case}"
            report.check(name, lambda: "\n       ".join(failures(case, dtype, device)) or None)  # noqa: B023
    for dtype in dtypes:
        name = f"{str(dtype)[6:]:<9} torch.library.opcheck of the four operators"
        report.check(name, lambda: opcheck(device, dtype))  # noqa: B023


def train(device: torch.device, quick: bool, report: Report) -> None:
    """A check and a row per implementation; every process of a launch calls it."""
    from steel_megatron.config import ParallelConfig
    from steel_megatron.parallel.topology import initialize, shutdown

    topology = initialize(ParallelConfig())
    if topology.device.type != device.type:
        raise ConfigError(f"--device {device.type}, but training takes the {topology.device.type} that is here")
    try:
        for title, run in gpu_training.runs(topology, tiny=quick or device.type == "cpu"):

            def find(title: str = title, run: Any = run) -> str | None:
                row = gpu_training.measure(run, topology)
                report.training.append({"run": title, **row})
                return gpu_training.wrong_losses(row["losses"], report.training[0]["losses"])

            report.check(f"training, {title}", find)
        names = list(dict.fromkeys(row["run"].partition(",")[0] for row in report.training))
        report.check(f"checkpoints of {' and '.join(names)}", lambda: gpu_training.checkpoints_agree(topology, names))
    finally:
        shutdown()


def print_training(report: Report) -> None:
    """The rows of the training runs."""
    print(f"\n{'training':<34}{'ms':>9}{'tokens/s':>11}{'MFU':>8}{'held GB':>9}{'peak GB':>9}")
    for row in report.training:
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        print(
            f"{row['run']:<34}{row['ms']:>9.1f}{row['tokens_per_second']:>11,.0f}{mfu:>8}"
            f"{row['held_bytes'] / 1e9:>9.3f}{peak:>9}"
        )


# ---- timing ----


def published(x: Tensor, keys: Tensor) -> Tensor:
    """Mode ``sequence`` as the published model computes it, the slots themselves as the experts' results."""
    tokens = torch.nn.functional.normalize(x, dim=-1)
    logits = torch.einsum("btd,ds->bts", tokens, keys.to(x.dtype))
    slots = torch.einsum("bts,btd->bsd", logits.softmax(1), tokens)
    return torch.einsum("bts,bsd->btd", logits.softmax(-1), slots)


def through(module: ModuleType, plan: BlockPlan) -> Callable[[Tensor, Tensor], Tensor]:
    """Dispatch and combine of a module, likewise."""

    def route(x: Tensor, keys: Tensor) -> Tensor:
        slots, logits, _ = module.dispatch(x, keys, plan.starts, plan.ends, True)
        y: Tensor = module.combine(slots, logits, plan.block_of_token)
        return y

    return route


def milliseconds(step: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median over rounds, by the device's own clock where it has one; three rounds do not count."""
    spent = []
    for _ in range(rounds + 3):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            spent.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            step()
            spent.append(1e3 * (time.perf_counter() - started))
    return statistics.median(spent[3:])


def time_all(device: torch.device, dtypes: list[torch.dtype], quick: bool, rounds: int, report: Report) -> None:
    """Print a table per type and mode. GB/s counts the tokens' arrays that must move: 2 forward, 5 with backward."""
    batch, length, width, slots = (2, 256, 64, 6) if quick else STEEL
    for dtype in dtypes:
        x = torch.randn(batch, length, width, device=device, dtype=dtype, requires_grad=True)
        keys = reference.slot_keys(torch.randn(width, slots, 1), torch.tensor([4.0])).to(device).requires_grad_()
        gradient, target = torch.randn_like(x), torch.empty_like(x)
        size = x.numel() * x.element_size()
        copied = 2 * size / milliseconds(functools.partial(target.copy_, x.detach()), device, rounds) / 1e6
        print(f"\n[{batch}, {length}, {width}] {str(dtype)[6:]}, {slots} slots; a copy moves {copied:.0f} GB/s")
        for block_length in (None, 64):
            plan = block_plan(length, block_length, device)
            eager = published if block_length is None else through(reference, plan)
            ways = {"eager": eager, "kernels": through(kernels, plan)}
            if not quick:
                ways["torch.compile"] = torch.compile(eager)
            mode = "sequence" if block_length is None else f"block_causal, K = {block_length}"
            print(f"  {mode:<24}{'ms':>10}{'eager takes':>13}{'GB/s':>8}{'of a copy':>11}")
            for title, arrays in (("forward", 2), ("forward + backward", 5)):
                spent = {}
                for name, way in ways.items():

                    def step(way: Callable[[Tensor, Tensor], Tensor] = way, backward: bool = arrays == 5) -> None:
                        with torch.set_grad_enabled(backward):
                            y = way(x, keys)  # noqa: B023
                        if backward:
                            torch.autograd.grad(y, (x, keys), gradient)  # noqa: B023

                    spent[name] = milliseconds(step, device, rounds)
                    rate = arrays * size / spent[name] / 1e6
                    ratio = f"{spent['eager'] / spent[name]:.2f}x"
                    facts = {"dtype": str(dtype)[6:], "mode": mode, "pass": title, "way": name}
                    report.kernels.append({**facts, "ms": spent[name], "gb_per_second": rate, "of_copy": rate / copied})
                    print(
                        f"    {title + ', ' + name:<30}{spent[name]:>6.3f}{ratio:>13}{rate:>8.0f}{rate / copied:>10.0%}"
                    )


def check_that_it_can_run(device: torch.device) -> list[torch.dtype]:
    """The types to check; a ConfigError where there is nothing to check."""
    if not kernels.available():
        raise ConfigError("the compiled extension is not there; build it first: pip install --no-build-isolation -e .")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"torch {torch.__version__} finds no CUDA device; --device cpu checks the C++ kernels")
    dtypes = [dtype for dtype in TYPES if kernels.supports(torch.empty(0, device=device, dtype=dtype))]
    if not dtypes:
        raise ConfigError(
            "the extension has no CUDA kernels; build it again: STEEL_CUDA=1 pip install --no-build-isolation -e ."
        )
    return dtypes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small shapes only, and no torch.compile")
    parser.add_argument("--rounds", type=int, default=20, help="runs that a median time is over")
    parser.add_argument("--no-timing", action="store_true", help="check only")
    parser.add_argument("--report", default="gpu_check.json", help="JSON file for all that was found")
    arguments = parser.parse_args()
    device, failed = torch.device(arguments.device), 0

    def check() -> None:
        nonlocal failed
        started = time.monotonic()
        dtypes = check_that_it_can_run(device)
        report = Report(machine(device))
        if is_rank0():
            print(", ".join(f"{key} {value}" for key, value in report.machine.items()))
            verify(device, dtypes, arguments.quick, report)
            if not arguments.no_timing:
                time_all(device, dtypes, arguments.quick, arguments.rounds, report)
        train(device, arguments.quick, report)
        failed = report.failed
        if not is_rank0():
            return
        if not arguments.no_timing:
            print_training(report)
        facts = {"seconds": round(time.monotonic() - started, 1), "failed": failed}
        content = json.dumps({**facts, **vars(report)}, indent=1) + "\n"
        write_atomically(arguments.report, content.encode(), DataError)
        print(f"{failed} failures" if failed else "every check passed")
        print(f"{arguments.report}: {facts['seconds']:.0f} seconds")

    return exit_code(check) or int(failed > 0)


def machine(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    from steel_megatron.platform import choose_implementation, probe

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    found = probe()
    return {
        "device": name,
        "count": torch.cuda.device_count() if device.type == "cuda" else 1,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "transformer_engine": found.transformer_engine,
        "apex_norm": found.apex_norm,
        "apex_gradients": found.apex_gradients,
        "auto": choose_implementation("auto").describe(),
    }


if __name__ == "__main__":
    sys.exit(main())
