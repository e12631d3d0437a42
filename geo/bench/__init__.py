"""Benchmarks: ``python -m geo bench NAME``. Each checks equality with the reference, then times.

What they share: :func:`interleave` runs the candidates in turns of a few calls each, so that a disturbance of the
machine hits all of them, and gives the median and the spread; :func:`peak_extra_memory` is what a call needs at its
worst moment beyond what it leaves; :func:`machine` describes where the numbers come from.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["BENCHMARKS", "Timing", "interleave", "machine", "main", "peak_extra_memory", "table"]

BENCHMARKS = {
    "se_conv": "separable SE(n) convolution and its ops against the same computation composed of PyTorch ops",
    "scatter": "reductions over segments of rows against torch, PyG and torch_scatter",
    "selective_scan": "the selective scan against mambapy, mamba_ssm's reference loop and an eager loop",
    "walk_tokens": "random walks and walk tokens against networkx, Python lists and vectorised PyTorch",
    "graph_mamba": "a training step as the graph grows, beside attention over all nodes and GatedGCN",
    "monoid": "aggregation by a learned monoid against the recurrent, attending and monoid aggregations of PyG",
    "grf": "graph random features against walks in Python and PyTorch and exact kernels",
    "spe": "stable positional encodings against the loop over graphs of the official code",
    "tensor-products": "Gaunt products, brackets and convolutions against e3nn, cuEquivariance and grids in PyTorch",
}


def main(name: str | None, argv: Sequence[str] = ()) -> int:
    """Run a benchmark; without a name, list them. Returns the exit status."""
    if name is None:
        for key, what in BENCHMARKS.items():
            print(f"{key:16s} {what}")
        return 0
    if name not in BENCHMARKS:
        print(f"geo bench: {name!r} is not one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    run: Callable[[Sequence[str]], int] = importlib.import_module(f"geo.bench.{name.replace('-', '_')}").main
    return run(argv)


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median of all calls, and their first and last decile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 2 if self.median < 20 else 1
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 7,
    calls: int = 3,
    clock: str = "wall",
    seconds: float | None = None,
) -> dict[str, Timing]:
    """Time functions of no arguments: each round, each candidate runs once unobserved and then ``calls`` times.

    Args:
        candidates: What to time, by name. What a call returns is freed before the next one.
        rounds: Turns of each candidate.
        calls: Timed calls in a turn.
        clock: ``"wall"``; ``"cpu"``, the time that all threads of the process worked, which says more on a machine that
            is busy with other things; ``"cuda"``, by events on the current stream.
        seconds: A candidate whose timed calls took this long has one a turn, unprepared, and none after its third turn.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    limit = float("inf") if seconds is None else seconds * 1e3
    for turn in range(rounds):
        for name, call in candidates.items():
            if sum(times[name]) < limit:
                call()
            elif turn > 2:
                continue
            for _ in range(calls):
                times[name].append(_milliseconds(call, clock))
                if sum(times[name]) >= limit:
                    break
    return {name: _summary(values) for name, values in times.items()}


def _milliseconds(call: Callable[[], Any], clock: str) -> float:
    if clock != "cuda":
        now = time.perf_counter if clock == "wall" else time.process_time
        start = now()
        call()
        return (now() - start) * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])


def peak_extra_memory(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes that a call needs at its worst moment, less the tensors that it returns (to be given as its result).

    On the CPU by the peak of the process's resident memory, so that buffers of C++ kernels count too; ``None`` where
    the system does not let it be reset (anything but Linux).
    """
    call()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        return torch.cuda.max_memory_allocated() - before - _bytes(out)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        out = call()
        return max(0, _status("VmHWM") - before - _bytes(out))
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(v) for v in value) if isinstance(value, tuple | list) else 0


def machine(device: str = "cpu") -> str:
    """One line: processor, cores, SIMD level, torch, threads."""
    from geo import _native

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    threads = f"{torch.get_num_threads()} threads" if torch.get_num_threads() > 1 else "1 thread"
    return (
        f"{name}, {os.cpu_count()} CPUs, kernels: {_native.simd_level()}, "
        f"{torch.backends.cpu.get_cpu_capability()} in torch {torch.__version__}, {threads}"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
