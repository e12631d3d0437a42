"""Reductions over segments of rows against torch, PyG and torch_scatter.

Every candidate is checked against a float64 composition of torch's ops before it is timed. Rows of the table name what
was given: ``ptr`` (sorted rows), ``plan`` (unsorted rows and a :class:`geo.ops.SegmentPlan` built beforehand) or
``index`` (sorting, where our function sorts, is part of the time). Peers of the first two may use ``ptr`` or the index,
whichever is faster; peers of the last have the index alone. The command starts one process per setting (threads,
allocator), both being chosen when a process starts.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from geo import ops
from geo.bench import interleave, table
from geo.bench.settings import add_settings, run_settings
from geo.ops.segment import Reduce

OPS = ("sum", "mean", "max", "softmax", "logsumexp")
WITH_BACKWARD = ("sum", "softmax", "logsumexp")
GRID = {100_000: (1, 16, 64, 128), 1_000_000: (1, 16, 64, 128), 10_000_000: (1,)}
QUICK = {100_000: (1, 64)}
NEVER_BELOW = 0.95
TOLERANCE = 1e-4
FAR = 3.0  # a peer this many times slower than the best one is not timed further
INTRODUCTION = (
    "float32, N = E / 20. Median {} ms of interleaved calls; 'x' is the time of the best peer over ours. 'given': ptr "
    "(sorted rows), plan (unsorted rows, sorted beforehand) or index (nothing done beforehand)."
)
Call = Callable[[], Any]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One setting of the data."""

    order: str
    degrees: str
    num_edges: int
    num_features: int


@dataclass(frozen=True)
class Graph:
    """The segments of a case: ``ptr`` where they are sorted."""

    index: Tensor
    ptr: Tensor | None
    plan: ops.SegmentPlan
    num_segments: int


def main(argv: Sequence[str]) -> int:
    """Run the benchmark in each setting and print a page of tables."""
    parser = argparse.ArgumentParser(prog="python -m geo bench scatter", description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--edges", type=int, nargs="+", help="row counts; with --features, in place of the usual grid")
    parser.add_argument("--features", type=int, nargs="+", help="widths")
    parser.add_argument("--orders", nargs="+", choices=["sorted", "unsorted"], default=["sorted", "unsorted"])
    parser.add_argument("--degrees", nargs="+", choices=["uniform", "power-law"], default=["uniform", "power-law"])
    add_settings(parser, 1.5, "for the timing of one line of the grid, about")
    parser.add_argument("--quick", action="store_true", help="the smallest part of the grid")
    return run_settings("scatter", argv, parser.parse_args(argv), INTRODUCTION, measure, page)


# -- the page ----------------------------------------------------------------------------------------------------------
def target(row: dict[str, Any], tuned: bool) -> float:
    """The ratio to the best peer that this row should reach."""
    narrow, sorted_rows = row["F"] == 1, row["given"] == "ptr"
    if row["op"] in ("softmax", "logsumexp") and row["given"] != "index":
        backward = row["pass"] != "forward"
        return (3.0 if backward else 2.0) if tuned else (6.0 if backward else 4.0)
    if sorted_rows and row["pass"] == "forward":
        return 6.0 if narrow else 2.0
    return 4.0 if row["given"] == "plan" and row["F"] >= 16 else NEVER_BELOW


def page(result: dict[str, Any], tuned: bool) -> str:
    """Markdown of one setting's results."""
    with_share = any(row["share"] is not None for row in result["rows"])
    head = ["op", "pass", "given", "order", "degrees", "E", "F", "ours", "best peer", "peer", "x", "target"]
    rows = [head + ["of copy"] * with_share]
    for row in result["rows"]:
        wanted = target(row, tuned)
        cells = [row[key] if isinstance(row[key], str) else f"{row[key]:g}" for key in head[:7]]
        cells += [_ms(row["ours"]), row["best"], _ms(row["peer"]), f"{row['ratio']:.2f}", f"{wanted:g}"]
        rows.append(cells + ([f"{row['share']:.0%}"] if with_share else []))
    ratios = [row["ratio"] for row in result["rows"]]
    reached = sum(row["ratio"] >= target(row, tuned) for row in result["rows"])
    slower = sum(ratio < NEVER_BELOW for ratio in ratios)
    text = (
        f"{reached} of {len(rows) - 1} rows reach their target; {slower} are slower than the best peer (below "
        f"{NEVER_BELOW}); median ratio {statistics.median(ratios):.1f}, least {min(ratios):.2f}."
    )
    over = [
        time / row["ours"]
        for row in result["rows"]
        for name, time in row["peers"].items()
        if row["op"] == "max" and row["F"] == 64 and name == "torch_scatter.scatter"
    ]
    if over:
        text += f" Maximum at F = 64 over torch_scatter's: {min(over):.1f} to {max(over):.1f} (target 15)."
    return f"{result['machine']}\n\n{text}\n\n{table(rows)}"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


# -- the measurement ---------------------------------------------------------------------------------------------------
def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check equality, then time, in this process: one dictionary per row of the table."""
    sizes = QUICK if args.quick else GRID
    if args.edges or args.features:
        sizes = {e: tuple(args.features or (1, 16, 64, 128)) for e in args.edges or sizes}
    cases = [
        Case(order, degrees, e, f)
        for e, widths in sizes.items()
        for f in widths
        for degrees in args.degrees
        for order in args.orders
    ]
    passes = [(op, backward) for op in args.ops for backward in (False, True) if not backward or op in WITH_BACKWARD]
    bandwidth = copy_bandwidth() if args.device == "cuda" else None
    count = 0
    for case in cases:
        torch.manual_seed(0)
        graph = draw(case, args.device)
        src = torch.randn((case.num_edges, case.num_features)[: 1 if case.num_features == 1 else 2], device=args.device)
        for op, backward in passes:
            count += 1
            for row in rows_of(op, backward, case, graph, src, args):
                if bandwidth is not None:
                    row["share"] = traffic(row, graph) / (row["ours"] * 1e-3) / bandwidth
                print(
                    f"[{count}/{len(cases) * len(passes)}] {args.threads[0]} thread(s): {op} {row['pass']}, "
                    f"{case.degrees}, {row['given']}, {case.num_edges:g} x {case.num_features}: "
                    f"{_ms(row['ours'])} ms, {row['ratio']:.2f} x {row['best']}",
                    file=sys.stderr,
                    flush=True,
                )
                yield row


def rows_of(
    op: str, backward: bool, case: Case, graph: Graph, src: Tensor, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of one op in one case: with ptr or plan, and with the index alone."""
    by_index, by_ptr = peers(op, graph)
    given = "plan" if graph.ptr is None else "ptr"
    mine = {f"ours, {given}": ours(op, graph, given), "ours, index": ours(op, graph, "index")}
    functions = {**mine, **by_index, **by_ptr}
    num_out = src.size(0) if op == "softmax" else graph.num_segments
    cotangent = torch.randn(num_out, *src.shape[1:], device=src.device) if backward else None
    calls = {name: _call(f, src, cotangent) for name, f in functions.items()}
    expected = reference(op, graph, src, cotangent)
    clock = args.clock if args.device == "cpu" else "cuda"
    times: dict[str, float] = {}
    for name, call in calls.items():
        start = time.perf_counter()
        result = call()
        times[name] = (time.perf_counter() - start) * 1e3
        check(name, op, graph, result, expected, strict=name in mine)
        del result
        if times[name] < 100:  # short enough to be asked again, without what comes with a first call
            times[name] = interleave({name: call}, 1, 1, clock)[name].median
    del expected
    best = min(time for name, time in times.items() if name not in mine)
    near = {name: call for name, call in calls.items() if name in mine or times[name] <= FAR * best}
    in_turn = int(args.seconds / args.rounds / sum(times[name] * 1e-3 for name in near)) - 1
    rounds = args.rounds if in_turn > 0 else min(args.rounds, 3)
    times |= {name: t.median for name, t in interleave(near, rounds, max(1, min(20, in_turn)), clock).items()}
    for key in mine:
        rivals = {n: times[n] for n in (*by_index, *(() if key == "ours, index" else by_ptr))}
        name = min(rivals, key=lambda n: rivals[n])
        yield {
            "op": op,
            "pass": "forward + backward" if backward else "forward",
            "given": key.removeprefix("ours, "),
            "order": case.order,
            "degrees": case.degrees,
            "E": case.num_edges,
            "F": case.num_features,
            "ours": times[key],
            "best": name,
            "peer": times[name],
            "ratio": times[name] / times[key],
            "peers": rivals,
            "share": None,
        }


def _call(function: Function, src: Tensor, cotangent: Tensor | None) -> Call:
    if cotangent is None:
        return lambda: function(src)
    leaf = src.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf), leaf, cotangent)[0]


def draw(case: Case, device: str) -> Graph:
    """Segments of 20 rows on average: drawn uniformly, or with probability falling as one over the rank."""
    num = max(1, case.num_edges // 20)
    if case.degrees == "uniform":
        index = torch.randint(num, (case.num_edges,))
    else:
        share = (1 / torch.arange(1, num + 1, dtype=torch.float64)).cumsum(0)
        place = torch.searchsorted(share, torch.rand(case.num_edges, dtype=torch.float64) * share[-1])
        index = torch.randperm(num)[place.clamp(max=num - 1)]
    if case.order == "sorted":
        index = index.sort().values
    index = index.to(device)
    plan = ops.SegmentPlan(index, num)
    return Graph(index, plan.ptr if case.order == "sorted" else None, plan, num)


def reference(op: str, graph: Graph, src: Tensor, cotangent: Tensor | None) -> Tensor:
    """The float64 composition, some columns at a time, as float32."""
    width = src.size(1) if src.dim() == 2 else 1
    step = max(1, 2**24 // src.size(0))

    def columns(t: Tensor, begin: int) -> Tensor:
        return t.view(-1, width)[:, begin : begin + step].double()

    parts = [
        _call(
            lambda x: COMPOSED[op](x, graph.index, graph.num_segments),
            columns(src, begin),
            None if cotangent is None else columns(cotangent, begin),
        )().float()
        for begin in range(0, width, step)
    ]
    return torch.cat(parts, 1)


def check(name: str, op: str, graph: Graph, actual: Tensor, expected: Tensor, strict: bool) -> None:
    """Raise AssertionError unless a result is the reference, up to a part of its largest entry.

    ``strict``, for ours, looks at the shares of long segments, too, by multiplying them with the segment's length, and
    allows a tenth. (In a segment of 10000 rows the gradient of torch_scatter's logsumexp has three digits.)
    """
    error = (actual.view_as(expected) - expected).abs_()
    scale = expected.abs()
    if strict and op in ("softmax", "logsumexp") and expected.size(0) == graph.index.size(0):
        degree = graph.plan.ptr.diff()[graph.index].unsqueeze(1)
        error, scale = error.mul_(degree), scale.mul_(degree)
    worst, allowed = float(error.amax() / scale.amax().clamp(min=1)), TOLERANCE * (1 if strict else 10)
    if not worst <= allowed:
        raise AssertionError(f"{name}, {op}: off by {worst:.2g} of the largest entry, {allowed:g} is allowed")


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying half a gigabyte on the GPU."""
    src = torch.empty(2**27, device="cuda")
    dst = torch.empty_like(src)
    milliseconds = interleave({"copy": lambda: dst.copy_(src)}, clock="cuda")["copy"].median
    return 2 * src.nbytes / (milliseconds * 1e-3)


def traffic(row: dict[str, Any], graph: Graph) -> float:
    """Bytes that must be read and written at least."""
    num_edges, num_features = float(row["E"]), float(row["F"])
    rows, groups = num_edges * num_features * 4, graph.num_segments * num_features * 4
    order = graph.num_segments * 8 + (num_edges * 8 if row["given"] != "ptr" else 0)
    forward = rows + (rows if row["op"] == "softmax" else groups) + order
    if row["pass"] == "forward":
        return forward
    backward = {"sum": groups + rows, "softmax": 3 * rows, "logsumexp": 2 * rows + 2 * groups}
    return forward + order + backward[row["op"]]


# -- candidates --------------------------------------------------------------------------------------------------------
def ours(op: str, graph: Graph, given: str) -> Function:
    """This library's function, given ``ptr``, ``plan`` or ``index``."""
    index, num = graph.index, graph.num_segments
    if given == "index":
        if op == "softmax":
            return lambda src: ops.scatter_softmax(src, index, 0, num)
        if op == "logsumexp":
            return lambda src: ops.scatter_logsumexp(src, index, 0, None, num)
        return lambda src: ops.scatter(src, index, 0, None, num, op)
    order = graph.plan if graph.ptr is None else graph.ptr
    if op == "softmax":
        return lambda src: ops.segment_softmax(src, order)
    if op == "logsumexp":
        return lambda src: ops.segment_logsumexp(src, order)
    reduce = cast(Reduce, op)
    return lambda src: ops.segment_reduce(src, order, reduce)


def _sum(src: Tensor, index: Tensor, num: int) -> Tensor:
    return src.new_zeros(num, *src.shape[1:]).index_add_(0, index, src)


def _mean(src: Tensor, index: Tensor, num: int) -> Tensor:
    out = _sum(src, index, num)
    count = _sum(src.new_ones(src.size(0)), index, num).clamp_(min=1)
    return out / count.view(-1, *[1] * (src.dim() - 1))


def _scatter_reduce(src: Tensor, index: Tensor, num: int, reduce: str) -> Tensor:
    expanded = index.view(-1, *[1] * (src.dim() - 1)).expand_as(src)
    return src.new_zeros(num, *src.shape[1:]).scatter_reduce_(0, expanded, src, reduce, include_self=False)


def _max(src: Tensor, index: Tensor, num: int) -> Tensor:
    return _scatter_reduce(src, index, num, "amax")


def _softmax(src: Tensor, index: Tensor, num: int) -> Tensor:
    shifted = (src - _max(src.detach(), index, num).index_select(0, index)).exp()
    return shifted / _sum(shifted, index, num).index_select(0, index)


def _logsumexp(src: Tensor, index: Tensor, num: int) -> Tensor:
    top = _max(src.detach(), index, num)
    total = _sum((src - top.index_select(0, index)).exp(), index, num)
    return (total.log() + top).masked_fill(total == 0, 0)


COMPOSED: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "sum": _sum,
    "mean": _mean,
    "max": _max,
    "softmax": _softmax,
    "logsumexp": _logsumexp,
}


def peers(op: str, graph: Graph) -> tuple[dict[str, Function], dict[str, Function]]:
    """What else computes ``op``: from the index, and from ``ptr`` where rows are sorted."""
    index, ptr, num = graph.index, graph.ptr, graph.num_segments
    pyg, scatter = _pyg(), _torch_scatter()
    composed = COMPOSED[op]
    names = {"sum": "index_add_", "mean": "index_add_", "max": "scatter_reduce_"}
    by_index: dict[str, Function] = {names.get(op, "composed"): lambda src: composed(src, index, num)}
    by_ptr: dict[str, Function] = {}
    if op in ("sum", "mean"):
        by_index["scatter_reduce_"] = lambda src: _scatter_reduce(src, index, num, op)
        by_index["PyG scatter"] = lambda src: pyg.scatter(src, index, 0, num, op)
    if op in ("sum", "mean", "max"):
        if ptr is not None:
            by_ptr["segment_reduce"] = lambda src: pyg.segment(src, ptr, op)  # PyG's call of torch's
        if scatter is not None:
            by_index["torch_scatter.scatter"] = lambda src: scatter.scatter(src, index, 0, None, num, op)
            if ptr is not None:
                by_index["torch_scatter.segment_coo"] = lambda src: scatter.segment_coo(src, index, None, num, op)
                by_ptr["torch_scatter.segment_csr"] = lambda src: scatter.segment_csr(src, ptr, None, op)
    if op == "softmax":
        by_index["PyG softmax"] = lambda src: pyg.softmax(src, index, None, num)
        if ptr is not None:
            by_ptr["PyG softmax, ptr"] = lambda src: pyg.softmax(src, None, ptr)
        if scatter is not None:
            by_index["torch_scatter"] = lambda src: scatter.scatter_softmax(src, index, 0, num)
    if op == "logsumexp" and scatter is not None:
        by_index["torch_scatter"] = lambda src: scatter.scatter_logsumexp(src, index, 0, None, num)
    return by_index, by_ptr


def _pyg() -> types.ModuleType:
    """PyG's own functions: imported while torch_scatter, which it would call, is out of sight."""
    if "torch_geometric" in sys.modules or "torch_scatter" in sys.modules:
        return importlib.import_module("torch_geometric.utils")
    sys.modules["torch_scatter"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("torch_geometric.utils")
    finally:
        del sys.modules["torch_scatter"]


def _torch_scatter() -> types.ModuleType | None:
    try:
        return importlib.import_module("torch_scatter")
    except ImportError:
        return None
