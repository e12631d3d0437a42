"""Tensor products of irreps: functions on the sphere against Clebsch-Gordan paths.

Candidates of one kind compute the same function: each is compared with a float64 reference first, and one that differs
is not timed. The products: 'uuu' channel by channel, 'uvu' with one channel of the second input, 'full' all pairs of
channels; 'siso', 'simo', 'mimo' with single or multiple degrees in and out on one channel, as in "The Price of Freedom"
(https://arxiv.org/abs/2506.13523), of outputs that exist; 'conv' sums 'uvu' products with weights over the edges of a
graph.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geo.bench import interleave, machine, peak_extra_memory
from geo.bench.se_conv import DTYPES
from geo.bench.tensor_product_page import SINGLE, TITLES, Row, introduction, page, plot
from geo.bench.tensor_product_peers import Builders, convolutions, gaunt_convolutions, products
from geo.bench.tensor_product_problems import (
    DIRECTIONS,
    TOLERANCES,
    Candidate,
    Convolution,
    Graph,
    NotAvailable,
    Problem,
    Product,
    conv_problem,
    gaunt_conv_problem,
    product_problem,
    rows,
)
from geo.ops import SegmentPlan

LMAX = {
    "uuu": (1, 2, 3, 4, 5, 6),
    "uvu": (1, 2, 3, 4),
    "full": (1, 2, 3, 4),
    "siso": (1, 2, 3, 4, 6),
    "simo": (1, 2, 3, 4, 6),
    "mimo": (1, 2, 3, 4, 6),
    "conv": (1, 2, 3),
}
FIELDS = (
    *(
        "date",
        "machine",
        "sizes",
        "dtype",
        "device",
        "threads",
        "clock",
        "rounds",
        "calls",
        "mode",
        "lmax",
        "direction",
        "kind",
    ),
    *("method", "rows", "channels", "nodes", "status", "ms", "low", "high", "us_per_output", "outputs", "paths"),
    *("memory", "error", "build_s", "note"),
)
SETTINGS = ("machine", "sizes", "dtype", "device", "threads", "clock", "rounds", "calls")
NUMBERS = ("ms", "low", "high", "us_per_output", "memory", "error", "build_s")


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print a page of tables; returns 1 where a candidate failed or was refused."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    found = Sink(args.csv, settings(args))
    print(introduction(args), flush=True)
    try:
        measure(args, found)
    finally:
        print(page(found.rows), flush=True)
    found.finish()
    if args.out is not None:
        args.out.write_text(f"{introduction(args)}\n{page(found.rows)}\n")
    if args.plot is not None:
        plot(found.rows, args.plot)
    return int(any(row["status"].startswith(("failed", "refused")) for row in found.rows))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m geo bench tensor-products", description=__doc__)

    def add(name: str, what: str, **options: Any) -> None:
        shown = " (default: %(default)s)" if options.get("default") is not None else ""
        parser.add_argument(name, help=what + shown, **options)

    def several(name: str, what: str, choices: Sequence[str], default: Sequence[str] | None = None) -> None:
        default = list(default or choices)
        parser.add_argument(
            name, help=f"{what} (default: {' '.join(default)})", nargs="+", choices=choices, default=default
        )

    several("--mode", "products, see above", list(LMAX), ["uuu", "siso", "simo", "mimo", "conv"])
    add("--lmax", "highest degrees of the inputs (default: 1 to 6, of conv 1 to 3)", type=int, nargs="+")
    several("--direction", "double: the backward of the backward, as forces in training need it", DIRECTIONS)
    several("--paths", "all: with the bracket", ["even", "all"])
    add("--batch", "rows of uuu, uvu and full", type=int, default=1000)
    add("--channels", "of uuu and uvu; each input of full has the root of it", type=int, default=64)
    add("--single-batch", "rows of siso, simo and mimo, which have one channel", type=int, default=10000)
    add("--edges", "of conv", type=int, default=20000)
    add("--nodes", "of conv", type=int, default=1000)
    add("--conv-channels", "of conv", type=int, default=32)
    add("--dtype", "of inputs and results", choices=list(DTYPES), default="float32")
    add("--device", "where", choices=["cpu", "cuda"], default="cpu")
    add("--threads", "of torch, on the CPU", type=int, default=torch.get_num_threads())
    several("--layout", "of our layers", ["dense", "e3nn"])
    add("--methods", "only those that begin so, such as 'geo auto' e3nn (default: all)", nargs="+")
    add("--rounds", "turns of each candidate", type=int, default=7)
    add("--calls", "timed calls in a turn", type=int, default=3)
    add(
        "--seconds",
        "of timed calls of a candidate, after which it has one a turn and three turns",
        type=float,
        default=2.0,
    )
    add("--clock", "cpu: with --threads 1 on a busy machine", choices=["wall", "cpu"], default="wall")
    add(
        "--build-limit",
        "seconds: what took longer to build or to call first is left out for larger lmax",
        type=float,
        default=60.0,
    )
    add(
        "--csv",
        "all rows; FILE.part while it runs, which a run of the same settings continues",
        type=Path,
        metavar="FILE",
    )
    add("--plot", "PNG of time and of time per output irrep against lmax", type=Path, metavar="FILE")
    add("--out", "write the page to this file, too", type=Path, metavar="FILE")
    add("--no-memory", "leave the peak memory out", action="store_true")
    add("--quiet", "no progress bar", action="store_true")
    args = parser.parse_args(argv)
    for name in ("batch", "channels", "single_batch", "edges", "nodes", "conv_channels", "threads", "rounds", "calls"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least 1")
    if args.lmax and min(args.lmax) < 1:
        parser.error(f"--lmax has {min(args.lmax)}, but degrees begin with 1 here")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no GPU")
    return args


def settings(args: argparse.Namespace) -> Row:
    """What all rows of a run have in common, as the CSV has it."""
    sizes = (
        f"{args.batch} x {args.channels}, {args.single_batch} x 1, {args.edges} x {args.conv_channels}, {args.nodes}"
    )
    values = (machine(args.device), sizes, args.dtype, args.device, args.threads, args.clock, args.rounds, args.calls)
    return {key: str(value) for key, value in zip(SETTINGS, values, strict=True)}


class Sink:
    """The rows; with a path also on disk, each group of them as soon as it is measured."""

    def __init__(self, path: Path | None, common: Row) -> None:
        self.path, self.common = path, common
        self.rows: list[Row] = []
        if path is None:
            return
        self.part = path.with_name(path.name + ".part")
        if self.part.is_file():
            with self.part.open(newline="") as file:  # a line that broke off lacks its last field
                self.rows = [_read(row) for row in csv.DictReader(file) if row["note"] is not None]
            if any(row[key] != common[key] for row in self.rows for key in SETTINGS):
                raise SystemExit(f"{self.part} holds rows of other settings: move it away, or name another --csv")
            print(f"continuing after {len(self.rows)} rows of {self.part}", file=sys.stderr)
        with self.part.open("w", newline="") as file:
            csv.DictWriter(file, FIELDS).writeheader()
        self._append(self.rows)

    def has(self, mode: str, lmax: int, direction: str) -> bool:
        """Whether a group was measured by the run that this one continues."""
        return any((row["mode"], row["lmax"], row["direction"]) == (mode, lmax, direction) for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Rows of one group, which are written at once."""
        rows = [{**dict.fromkeys(FIELDS, ""), **self.common, **row} for row in rows]
        self.rows += rows
        if self.path is not None:
            self._append(rows)

    def _append(self, rows: Sequence[Row]) -> None:
        with self.part.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerows(rows)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """All was measured: the file gets its name."""
        if self.path is not None:
            os.replace(self.part, self.path)


def _read(row: Row) -> Row:
    for key in NUMBERS:
        row[key] = float(row[key]) if row[key] else ""
    for key in ("lmax", "rows", "channels", "nodes", "outputs", "paths"):
        row[key] = int(row[key])
    return row


# -- what is computed --------------------------------------------------------------------------------------------------
def shapes(mode: str, lmax: int, kinds: Sequence[str], channels: int) -> dict[str, Product]:
    """The products of a mode, by kind."""
    upto = tuple(range(lmax + 1))
    even: tuple[int, ...]
    odd: tuple[int, ...]
    if mode == "siso":  # the parity of the sum decides which of two neighbours exists
        even, odd = ((lmax,), (lmax + 1,)) if lmax % 2 == 0 else ((lmax + 1,), (lmax,))
        made = {"even": Product((lmax,), (lmax,), even, ()), "odd": Product((lmax,), (lmax,), (), odd)}
    elif mode == "simo":
        even, odd = tuple(range(0, 2 * lmax + 1, 2)), tuple(range(1, 2 * lmax, 2))
        made = {"even": Product((lmax,), (lmax,), even, ()), "all": Product((lmax,), (lmax,), even, odd)}
    elif mode == "mimo":
        even, odd = tuple(range(2 * lmax + 1)), tuple(range(1, 2 * lmax))
        made = {"even": Product(upto, upto, even, ()), "all": Product(upto, upto, even, odd)}
    else:
        root = math.isqrt(channels)
        pair = {"uvu": (channels, 1), "conv": (channels, 1), "full": (root, root)}.get(mode, (channels, channels))
        name = "uvu" if mode == "conv" else mode
        made = {
            "even": Product(upto, upto, upto, (), name, pair),
            "odd": Product(upto, upto, (), upto[1:], name, pair),
            "all": Product(upto, upto, upto, upto[1:], name, pair),
        }
    return {
        kind: p for kind, p in made.items() if kind in kinds or (kind == "odd" and "all" in kinds and mode != "conv")
    }


def sizes(mode: str, args: argparse.Namespace) -> tuple[int, int, int]:
    """Rows or edges, channels, nodes."""
    if mode == "conv":
        return args.edges, args.conv_channels, args.nodes
    return (args.single_batch, 1, 0) if mode in SINGLE else (args.batch, args.channels, 0)


def problems(mode: str, lmax: int, args: argparse.Namespace) -> list[tuple[Problem, Builders]]:
    """What is computed at one lmax, and by whom."""
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    num_rows, channels, nodes = sizes(mode, args)

    def draw(*size: int) -> Tensor:  # numbers that the dtype has
        return torch.randn(*size).to(dtype).double().to(args.device)

    made = shapes(mode, lmax, args.paths, channels)
    first = next(iter(made.values()))
    d1, d2 = rows(first.first), rows(first.second)
    if mode != "conv":
        x, y = draw(num_rows, d1, first.channels[0]), draw(num_rows, d2, first.channels[1])
        listed = [(product_problem(kind, product, x, y), product) for kind, product in made.items()]
        return [(problem, products(problem, product, dtype, args.layout)) for problem, product in listed]
    edge_index = torch.randint(nodes, (2, num_rows)).to(args.device)
    edge_index[1] = edge_index[1].sort().values
    graph = Graph(edge_index[0], edge_index[1], nodes, SegmentPlan.from_edge_index(edge_index, nodes))
    found: list[tuple[Problem, Builders]] = []
    for kind, product in made.items():
        numel = channels * len(Convolution.of(product).paths)
        leaves = draw(nodes, channels * d1), draw(num_rows, d2), draw(num_rows, numel)
        problem = conv_problem(kind, product, graph, *leaves)
        found.append((problem, convolutions(problem, product, graph, dtype)))
    for kind, product in made.items():
        leaves = draw(nodes, d1, channels), draw(num_rows, d2, 1), draw(num_rows, lmax + 1, channels)
        problem = gaunt_conv_problem(f"gaunt {kind}", product, graph, *leaves)
        found.append((problem, gaunt_convolutions(problem, product, graph)))
    return found


# -- the measurement ---------------------------------------------------------------------------------------------------
Built = tuple[Problem, str, Candidate | str, float]
Slow = dict[tuple[str, ...], str]


def measure(args: argparse.Namespace, found: Sink) -> None:
    """Check equality, then time, group by group: a mode, an lmax and a direction."""
    from tqdm import tqdm

    groups = [(mode, lmax) for mode in args.mode for lmax in args.lmax or LMAX[mode]]
    slow: Slow = {}
    with tqdm(total=len(groups) * len(args.direction), unit="group", disable=args.quiet) as bar:
        for mode, lmax in groups:
            todo = [d for d in args.direction if not found.has(mode, lmax, d)]
            bar.update(len(args.direction) - len(todo))
            if not todo:
                continue
            bar.set_description(f"{mode}, L = {lmax}, building")
            built = [
                (problem, name, *_build((mode, problem.kind, name), lmax, builder, slow, args.build_limit))
                for problem, builders in problems(mode, lmax, args)
                for name, builder in builders.items()
                if not args.methods or name.startswith(tuple(args.methods))
            ]
            for direction in todo:
                bar.set_description(f"{mode}, L = {lmax}, {TITLES[direction]}")
                found.add(group(mode, lmax, direction, built, slow, args))
                bar.update()


def _build(
    key: tuple[str, ...], lmax: int, builder: Callable[[], Candidate], slow: Slow, limit: float
) -> tuple[Candidate | str, float]:
    """The candidate, or why there is none; and the seconds it took."""
    if key in slow:
        return slow[key], 0.0
    start = time.perf_counter()
    try:
        candidate: Candidate | str = builder()
    except NotAvailable as reason:
        candidate = str(reason)
    seconds = time.perf_counter() - start
    if seconds > limit:
        slow[key] = f"not built: L = {lmax} took {seconds:.0f} s"
    return candidate, seconds


def group(
    mode: str, lmax: int, direction: str, built: Sequence[Built], slow: Slow, args: argparse.Namespace
) -> list[Row]:
    """The rows of one group; what is timed is timed in turns."""
    dtype, calls, out = DTYPES[args.dtype], {}, []
    today = datetime.date.today().isoformat()
    num_rows, channels, nodes = sizes(mode, args)
    for problem, name, candidate, seconds in built:
        row: Row = {"date": today, "mode": mode, "lmax": lmax, "direction": direction, "kind": problem.kind}
        row |= {"method": name, "rows": num_rows, "channels": channels, "nodes": nodes, "build_s": round(seconds, 3)}
        row |= {"outputs": problem.outputs, "paths": problem.paths}
        out.append(row)
        if isinstance(candidate, str):
            row["status"] = candidate
            continue
        row |= {"note": candidate.note, "outputs": candidate.outputs or problem.outputs}
        key = (mode, problem.kind, name, direction)
        if key in slow:
            row["status"] = slow[key]
            continue
        start = time.perf_counter()
        row["status"], call = check(candidate, direction, dtype, row)
        if (first := time.perf_counter() - start) > args.build_limit:
            slow[key] = f"not run: at L = {lmax} the first call and its check took {first:.0f} s"
        if call is not None:
            calls[len(out) - 1] = call
    clock = args.clock if args.device == "cpu" else "cuda"
    named = {str(i): call for i, call in calls.items()}
    for place, timing in interleave(named, args.rounds, args.calls, clock, args.seconds).items():
        row = out[int(place)]
        row |= {"ms": timing.median, "low": timing.low, "high": timing.high}
        row["us_per_output"] = timing.median * 1e3 / row["outputs"]
    for i, call in calls.items():
        memory = None if args.no_memory else peak_extra_memory(call, args.device)
        out[i]["memory"] = "" if memory is None else memory
    return out


def check(
    candidate: Candidate, direction: str, dtype: torch.dtype, row: Row
) -> tuple[str, Callable[[], tuple[Tensor, ...]] | None]:
    """The status of a candidate and, where it computes what it should, its call."""
    try:
        call = candidate.call(direction, dtype)
        error = candidate.error(direction, call())
    except torch.OutOfMemoryError:
        return "out of memory", None
    except RuntimeError as problem:
        if "allocate memory" in str(problem):
            return "out of memory", None
        return f"failed: {str(problem).strip().splitlines()[0]}", None
    row["error"] = error
    if not error <= TOLERANCES[dtype]:
        return f"refused: off by {error:.1e} of the largest entry, {TOLERANCES[dtype]:g} is allowed", None
    return "ok", call
