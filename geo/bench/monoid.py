"""Aggregation by a learned monoid against PyG's recurrent, attending and monoid aggregations.

PyG pads all groups to the largest, ours pads nothing. Before anything is timed, ours is compared in float64, with its
gradients, with PyG's LCMAggregation of the same weights on groups of one size, with a loop over groups on others, and
exact monoids with their fold. The other peers compute functions of their own.

Each peer runs in a process of its own, turn by turn with ours, under a limit of memory and of processor time, so
that one that needs more ends there and the page says at how much. A peer whose call takes longer than ``--seconds`` is
called up to three times, but once where that takes long enough, and not in turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import SAGEConv
from torch_geometric.nn.aggr import GRUAggregation, LSTMAggregation, MaxAggregation, SetTransformerAggregation

from geo.bench import Timing, interleave, machine, peak_extra_memory, table
from geo.nn import (
    BinaryGRU,
    ElementwiseMonoid,
    KSmallest,
    LogSumExp,
    Monoid,
    MonoidAggregation,
    SymmetricMLP,
    to_pyg_lcm,
)
from geo.ops import TreePlan, fold, gru_merge, tree_reduce
from geo.testing import assert_close

WIDTH = 64
EXPONENT, LEAST = 2.3, 2.8  # of the power law: degrees have a median of 4
PASSES = ("forward", "forward + backward")
PEERS = ("GRU", "LSTM", "SetTransformer", "LCM")
#: Padded tensors [groups, largest, WIDTH] that a peer holds at its worst moment in each pass, as measured on the CPU.
TENSORS = {"GRU": (6.4, 13.2), "LSTM": (4.0, 18.5), "SetTransformer": (7.0, 15.2), "LCM": (11.0, 22.4)}
Call = Callable[[], Any]
PEER_HEAD = [
    *("problem", "pass", "peer", "peer (ms)", "geo (ms)", "x", "target"),
    *("geo, new plan (ms)", "x", "peer (MB)", "geo (MB)"),
]
OTHER_HEAD = ["operator", "forward (ms)", "MB", "forward + backward (ms)", "MB"]


@dataclass(frozen=True)
class Case:
    """Groups of elements, and what is to be reached: by peer, in forward and in forward + backward."""

    label: str
    groups: int
    law: Callable[[int], Tensor]
    targets: dict[str, tuple[str, str]]

    def degrees(self, fraction: float) -> Tensor:
        """Elements of each group, for a part of the groups."""
        return self.law(max(1, round(fraction * self.groups)))


def power_law(num: int, largest: int, exponent: float = EXPONENT, least: float = LEAST) -> Tensor:
    """Degrees at even quantiles of a power law, cut at ``largest``, in random order."""
    quantile = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    degrees = (least * quantile ** (1 / (1 - exponent))).long().clamp(max=largest)
    return degrees[torch.randperm(num, generator=torch.Generator().manual_seed(0))]


CASES = {
    "regular8": Case("all of 8", 4000, lambda num: torch.full((num,), 8), {"LCM": ("1", "1")}),
    "regular16": Case("all of 16", 2000, lambda num: torch.full((num,), 16), {"LCM": ("1", "1")}),
    "power1e4": Case("power law, 1e4", 1000, lambda num: power_law(num, 200), {"GRU": ("60", "20"), "LCM": ("30", "")}),
    "power1e5": Case(
        "power law, 1e5", 10_000, lambda num: power_law(num, 300), {"GRU": ("150", ""), "LCM": ("30", "")}
    ),
    "power1e6": Case("power law, 1e6", 100_000, lambda num: power_law(num, 500), {}),
}
PARTS = (*list(CASES)[:-1], "operators", "million")


def main(argv: Sequence[str]) -> int:
    """Check, then time, and print a page of tables."""
    parser = argparse.ArgumentParser(prog="python -m geo bench monoid", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--peers", choices=PEERS, nargs="+", default=PEERS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the groups to take: less for a quick look")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate")
    parser.add_argument("--seconds", type=float, default=2.0, help="after which a candidate has one call a turn")
    parser.add_argument("--patience", type=int, default=45, help="seconds of a peer's first call, all threads together")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a busy machine")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--memory-limit", type=float, help="of a peer, in GB (default: 0.8 of what is available)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no GPU")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    if args.child is not None:
        name, peer, first = args.child
        child(name, peer, int(first), args)
        return 0
    print(
        f"## monoid, {datetime.date.today().isoformat()}\n\n{machine(args.device)}\n\n"
        f"Groups of {WIDTH} channels, float32, sorted index. Median {_clock(args)} ms (first to last decile) of "
        "interleaved calls; 'x' is the peer's time over ours; memory is the peak beyond the results. Ours keeps its "
        "plan between calls with an equal index, which it compares; 'new plan': it is built in each call.",
        flush=True,
    )
    check(args.device)
    cases = {name: CASES[name] for name in args.only if name in CASES}
    degrees = {name: case.degrees(args.fraction) for name, case in cases.items()}
    if "million" in args.only:
        degrees["power1e6"] = CASES["power1e6"].degrees(args.fraction)
    if degrees:
        print(f"\n{table(_sizes(degrees))}", flush=True)
    rows, status = [PEER_HEAD], 0
    for name in cases:
        for peer in args.peers:
            lines, failed = compare(name, peer, argv, args)
            rows += lines
            status |= failed
    if len(rows) > 1:
        print(f"\n{table(rows)}", flush=True)
    if "operators" in args.only:
        print(f"\nOther operators, {CASES['power1e5'].label}, plan kept:\n\n{table(operators(args))}", flush=True)
    if "million" in args.only:
        print(f"\nA million edges, plan kept:\n\n{table(million(args))}", flush=True)
    torch.set_num_threads(before)
    return status


# -- checks ------------------------------------------------------------------------------------------------------------
def check(device: str) -> None:
    """Raise AssertionError unless ours, with its gradients, is PyG's on equal sizes and right on any in float64."""
    for degrees in ([5] * 7, [8] * 20, [3, 0, 1, 2, 40, 7, 0, 16, 5]):
        problem = Problem(torch.tensor(degrees), device, torch.float64, 6)
        lcm = to_pyg_lcm(problem.ours)
        cell = lcm.gru_cell
        equal = len(set(degrees)) == 1

        def theirs(problem: Problem = problem, lcm: Any = lcm, equal: bool = equal) -> Tensor:
            out: Tensor = lcm(problem.x, problem.index, dim_size=problem.num) if equal else _one_by_one(problem, lcm)
            return out

        found = _with_gradients(problem.call, problem.wanted)
        out, dx, *parts = _with_gradients(theirs, [problem.x, *(getattr(cell, name) for name in _CELL)])
        ours = [*found[:2], *(half for g in found[2:] for half in g.chunk(2))]
        assert_close(ours, [out, dx, *parts], msg="LCMAggregation" if equal else "one group after the other")
    for op in (KSmallest(2), LogSumExp(6), ElementwiseMonoid("max")):
        problem = Problem(torch.tensor([3, 0, 1, 2, 40, 7]), device, torch.float64, 6, op)

        def folded(problem: Problem = problem, op: Monoid = problem.ours.op) -> Tensor:
            identity = op.identity()
            assert identity is not None
            return fold(op.lift(problem.x), problem.ptr, op, identity.to(problem.x).expand(op.width(6)))

        found = _with_gradients(problem.call, problem.wanted)
        assert_close(found, _with_gradients(folded, problem.wanted), msg=f"fold by {op}")


_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _with_gradients(call: Callable[[], Tensor], wanted: list[Tensor]) -> list[Tensor]:
    out = call()
    finite = torch.where(out.isfinite(), out, 0.0)  # the identities of empty groups
    return [out.detach(), *torch.autograd.grad(finite.sin().sum(), wanted, allow_unused=False)]


def _one_by_one(problem: Problem, lcm: Any) -> Tensor:
    """Each group's tree for itself, by torch's GRU cell."""
    outs = []
    for rows in problem.x.split(problem.ptr.diff().tolist()):
        while rows.size(0) > 1:
            a, b = rows[: rows.size(0) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
            merged = (lcm.gru_cell(a, b) + lcm.gru_cell(b, a)) / 2
            rows = torch.cat([merged, rows[2 * merged.size(0) :]])
        outs.append(rows if rows.size(0) else torch.zeros_like(problem.x[:1]))
    return torch.cat(outs)


# -- problems ----------------------------------------------------------------------------------------------------------
class Problem:
    """Elements in groups and our aggregation of them."""

    def __init__(
        self,
        degrees: Tensor,
        device: str,
        dtype: torch.dtype = torch.float32,
        width: int = WIDTH,
        op: Any = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.num, self.longest = degrees.numel(), int(degrees.max())
        self.ptr = torch.cat([degrees.new_zeros(1), degrees.cumsum(0)]).to(device)
        self.index = torch.repeat_interleave(torch.arange(self.num), degrees).to(device)
        x = torch.randn(self.index.numel(), width, generator=generator, dtype=torch.float64)
        self.x = x.to(device, dtype).requires_grad_()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.ours = MonoidAggregation(BinaryGRU(width) if op is None else op, width).to(device, dtype)
        self.wanted = [self.x, *self.ours.op.parameters()]  # of the gradients

    def call(self) -> Tensor:
        """As a layer calls it; the plan is kept."""
        out: Tensor = self.ours(self.x, self.index, dim_size=self.num)
        return out

    def call_anew(self) -> Tensor:
        """The plan is built in each call."""
        out: Tensor = MonoidAggregation(self.ours.op)(self.x, self.index, dim_size=self.num)
        return out

    def peer(self, name: str) -> nn.Module:
        """PyG's aggregation; LCM has our weights."""
        width = self.x.size(1)
        if name == "LCM":
            lcm: nn.Module = to_pyg_lcm(self.ours)
            return lcm
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: dict[str, nn.Module] = {
                "GRU": GRUAggregation(width, width),
                "LSTM": LSTMAggregation(width, width),
                "SetTransformer": SetTransformerAggregation(width),
            }
            return made[name].to(self.x)


def _sizes(degrees: dict[str, Tensor]) -> list[list[str]]:
    head = ["problem", "elements E", "groups N", "median", "largest", "rows when padded", "over E"]
    rows = [head]
    for name, d in degrees.items():
        num, padded = int(d.sum()), d.numel() * int(d.max())
        middle = int(d.median())
        rows.append(
            [
                CASES[name].label,
                *(f"{n:,}" for n in (num, d.numel(), middle, int(d.max()), padded)),
                f"{padded / num:.1f}",
            ]
        )
    return rows


def needs(peer: str, groups: int, largest: int, which: int) -> float:
    """About how many bytes a peer needs: so many float32 tensors (:data:`TENSORS`), padded to the largest group."""
    return 4.0 * TENSORS[peer][which] * groups * largest * WIDTH


# -- peers -------------------------------------------------------------------------------------------------------------
def compare(name: str, peer: str, argv: Sequence[str], args: argparse.Namespace) -> tuple[list[list[str]], int]:
    """The lines of a peer, measured in a process of its own; and 1 if that failed."""
    case = CASES[name]
    command = [sys.executable, "-m", "geo", "bench", "monoid", *argv, "--child", name, peer]
    found, end = _read([*command, "0"])
    ends = [end, end]
    if end.startswith("stopped") and PASSES[1] not in found:
        again, ends[1] = _read([*command, "1"])
        found |= again
    rows = []
    for which, end, target in zip(PASSES, ends, case.targets.get(peer, ("", "")), strict=True):
        row = {"why": end, **found.get(which, {})}
        rows.append([case.label, which, peer, *_cells(row, target, args)])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows, int(any(end.startswith("failed") for end in ends))


def _read(command: Sequence[str]) -> tuple[dict[str, dict[str, Any]], str]:
    """What a process found in each pass, and why it ended early."""
    found: dict[str, dict[str, Any]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for row in map(json.loads, process.stdout):
            found.setdefault(row["pass"], {}).update(row)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode == -signal.SIGTERM:
        return found, f"stopped at {_gigabytes(1024 * usage.ru_maxrss)}"
    return found, f"failed, exit status {process.returncode}" if process.returncode else ""


def _cells(row: dict[str, Any], target: str, args: argparse.Namespace) -> list[str]:
    if "geo" not in row:
        return [row["why"], "", "", target, "", "", "", ""]
    ours, anew = Timing(**row["geo"]), Timing(**row["anew"])
    memory = ["" if m is None else f"{m / 1e6:.0f}" for m in (row.get("peer memory"), row["geo memory"])]
    theirs, ratios = row["why"], ["", ""]
    if "peer" in row:
        timing = Timing(**row["peer"])
        theirs, ratios = str(timing), [f"{timing.median / t.median:.1f}" for t in (ours, anew)]
    elif theirs.startswith("stopped"):
        least = args.patience / (1 if _clock(args) == "cpu" else args.threads)  # seconds, if no thread ever waited
        theirs, ratios = f"> {1e3 * least:.0f}, {theirs}", [f"> {1e3 * least / t.median:.0f}" for t in (ours, anew)]
    return [theirs, str(ours), ratios[0], target, str(anew), ratios[1], *memory]


def child(name: str, peer: str, first: int, args: argparse.Namespace) -> None:
    """Measure a peer beside ours from the ``first`` pass on; lines of JSON, those of a pass complete each other."""
    problem = Problem(CASES[name].degrees(args.fraction), args.device)
    theirs = problem.peer(peer)

    def call() -> Tensor:
        out: Tensor = theirs(problem.x, problem.index, dim_size=problem.num)
        return out

    if peer == "LCM" and len(problem.ptr.diff().unique()) == 1:
        assert_close(problem.call(), call(), msg="LCMAggregation, float32")
    for row in measure(problem, peer, call, [problem.x, *theirs.parameters()], first, args):
        print(json.dumps(row), flush=True)


def measure(
    problem: Problem, peer: str, call: Callable[[], Tensor], wanted: list[Tensor], first: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """In each pass ours alone, then a call of the peer, if there is memory for it, then more of both."""
    limit = limit_memory(args.memory_limit, args.device)
    for which in range(first, len(PASSES)):
        step, row = (_forward, _both)[which], {"pass": PASSES[which]}
        ours = {"geo": step(problem.call, problem.wanted), "anew": step(problem.call_anew, problem.wanted)}
        memory = peak_extra_memory(ours["geo"], args.device)
        alone = interleave(ours, min(3, args.rounds), 2, _clock(args), args.seconds)
        yield {**row, "geo memory": memory, **_plain(alone)}
        need = needs(peer, problem.num, problem.longest, which)
        if need > 2 * limit:
            yield {**row, "why": f"not run: needs about {_gigabytes(need)}"}
            continue
        theirs = _Timed(step(call, wanted), args)
        try:
            with _limited_time(args.patience):
                memory = peak_extra_memory(_FromSecond(theirs), args.device)
        except (MemoryError, RuntimeError) as err:
            if not out_of_memory(err):
                raise
            yield {**row, "why": f"out of memory at {_gigabytes(limit)}"}
            continue
        yield {**row, "peer memory": memory, **_plain({"peer": theirs.summary()})}
        if theirs.times[0] > 1e3 * args.seconds:
            while len(theirs.times) < 3 and sum(theirs.times) < 5e3 * args.seconds:
                theirs()
            times = {"peer": theirs.summary()}
        else:
            memory = peak_extra_memory(theirs, args.device)
            times = interleave({"peer": theirs, **ours}, args.rounds, 2, _clock(args), args.seconds)
        yield {**row, "peer memory": memory, **_plain(times)}


@contextmanager
def _limited_time(seconds: int) -> Iterator[None]:
    """End this process if it works longer than that; the system's own limit would make ``process_time`` coarse."""
    start, done = time.process_time(), threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if time.process_time() - start > seconds:
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _Timed:
    """A call that notes how long it takes."""

    def __init__(self, call: Call, args: argparse.Namespace) -> None:
        self.call, self.cuda, self.times = call, args.device == "cuda", list[float]()
        self.now = time.process_time if args.clock == "cpu" and not self.cuda else time.perf_counter

    def __call__(self) -> Any:
        start = self.now()
        out = self.call()
        if self.cuda:
            torch.cuda.synchronize()
        self.times.append(1e3 * (self.now() - start))
        return out

    def summary(self) -> Timing:
        """Median, least and most."""
        return Timing(statistics.median(self.times), min(self.times), max(self.times))


class _FromSecond:
    """Does nothing the first time: slow peers are not called for practice."""

    def __init__(self, call: Call) -> None:
        self.call, self.practised = call, False

    def __call__(self) -> Any:
        if self.practised:
            return self.call()
        self.practised = True
        return None


def _gigabytes(num: float) -> str:
    return f"{num / 1e9:.0f} GB" if num > 1e10 else f"{num / 1e9:.2g} GB"


def _plain(times: dict[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: dict(timing.__dict__) for name, timing in times.items()}


def out_of_memory(err: BaseException) -> bool:
    """Whether an allocation failed."""
    texts = ("can't allocate memory", "bad_alloc", "out of memory")
    return isinstance(err, MemoryError) or any(text in str(err) for text in texts)


def limit_memory(gigabytes: float | None, device: str) -> float:
    """Let allocations of this process fail that go beyond so much more than it has now; returns it in bytes."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        limit = 0.8 * free if gigabytes is None else gigabytes * 1e9
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        return limit
    if not sys.platform.startswith("linux"):
        return float("inf") if gigabytes is None else gigabytes * 1e9
    import resource

    kilobytes = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    limit = 0.8 * 1024 * int(kilobytes["MemAvailable"]) if gigabytes is None else gigabytes * 1e9
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + int(limit), resource.RLIM_INFINITY))
    return limit


def _forward(call: Callable[[], Tensor], wanted: list[Tensor]) -> Call:
    return torch.no_grad()(call)


def _both(call: Callable[[], Tensor], wanted: list[Tensor]) -> Call:
    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call().sum(), wanted)

    return step


def _clock(args: argparse.Namespace) -> str:
    return "cuda" if args.device == "cuda" else str(args.clock)


# -- ours alone --------------------------------------------------------------------------------------------------------
def operators(args: argparse.Namespace) -> list[list[str]]:
    """Other operators, and PyG's maximum beside the tree's."""
    degrees = CASES["power1e5"].degrees(args.fraction)
    ops: dict[str, Any] = {
        "BinaryGRU": BinaryGRU(WIDTH),
        "SymmetricMLP": SymmetricMLP(WIDTH),
        "LogSumExp": LogSumExp(WIDTH),
        "KSmallest(2)": KSmallest(2),
        "'max'": "max",
    }
    calls: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {}
    for name, op in ops.items():
        problem = Problem(degrees, args.device, op=op)
        calls[name] = (problem.call, problem.wanted)
    plan = TreePlan(problem.ptr)
    calls["tree_reduce, torch.maximum"] = (
        lambda: tree_reduce(problem.x, plan.ptr, torch.maximum, plan),
        [problem.x],
    )
    pyg = MaxAggregation()
    calls["PyG's MaxAggregation"] = (lambda: pyg(problem.x, problem.index, dim_size=problem.num), [problem.x])
    both = [{name: step(*call) for name, call in calls.items()} for step in (_forward, _both)]
    times = [interleave(steps, args.rounds, 2, _clock(args), args.seconds) for steps in both]
    rows = [OTHER_HEAD]
    for name in calls:
        cells = [[str(t[name]), _megabytes(steps[name], args)] for t, steps in zip(times, both, strict=True)]
        rows.append([name, *cells[0], *cells[1]])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def million(args: argparse.Namespace) -> list[list[str]]:
    """A million merges, aggregations, and a training step of a layer on a million edges."""
    problem = Problem(CASES["power1e6"].degrees(args.fraction), args.device)
    num_edges = problem.index.numel()
    wanted = problem.wanted
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(problem.num, (num_edges,), generator=generator).to(args.device)
    nodes = torch.randn(problem.num, WIDTH, generator=generator).to(args.device)
    edge_index = torch.stack([source, problem.index])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = SAGEConv(WIDTH, WIDTH, aggr=MonoidAggregation(BinaryGRU(WIDTH))).to(args.device)
    optimizer = torch.optim.Adam(conv.parameters())

    def train() -> None:
        optimizer.zero_grad()
        conv(nodes, edge_index).square().mean().backward()
        optimizer.step()

    pair = torch.randint(num_edges, (2, round(1e6 * args.fraction)), generator=generator).to(args.device)
    weights = [p.detach() for p in problem.ours.op.parameters()]
    rows_of = problem.x.detach()
    calls: dict[str, tuple[Call, str]] = {
        f"gru_merge, {pair.size(1):,} pairs": (
            lambda: gru_merge(rows_of, pair[0], pair[1], *weights),
            "1.2 on an H200",
        ),
        f"forward, {num_edges:,} elements": (_forward(problem.call, wanted), ""),
        "forward, new plan": (_forward(problem.call_anew, wanted), ""),
        "forward + backward": (_both(problem.call, wanted), ""),
        f"training step: SAGEConv, {num_edges:,} edges, Adam": (train, ""),
    }
    rows = [["what", "ms", "target (ms)", "MB"]]
    for name, (call, target) in calls.items():
        memory = _megabytes(call, args)
        time = interleave({name: call}, min(args.rounds, 3), 1, _clock(args), args.seconds)[name]
        rows.append([name, str(time), target, memory])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    for peer in PEERS:
        need = [_gigabytes(needs(peer, problem.num, problem.longest, which)) for which in range(2)]
        rows.append([f"PyG's {peer}", f"not run: needs about {need[0]}, with backward {need[1]}", "", ""])
    return rows


def _megabytes(call: Call, args: argparse.Namespace) -> str:
    memory = peak_extra_memory(call, args.device)
    return "" if memory is None else f"{memory / 1e6:.0f}"
