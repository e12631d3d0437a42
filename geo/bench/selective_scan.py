"""The selective scan against mambapy, the loop of mamba_ssm's reference and an eager loop.

Every candidate is checked against a float64 loop before it is timed: output and all gradients, on whole sequences of
about 10,000 rows. Sequences are of one length, which is what the peers take, or ragged: those then scan rows that are
padded to the longest one, and the padding is part of their time, as it is of theirs who use them. The command starts
one process per setting (threads, allocator), both being chosen when a process starts.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from geo import ops
from geo.bench import interleave, peak_extra_memory, table
from geo.bench.settings import add_settings, run_settings

STATES = 16
TOLERANCE = 1e-4
CHECKED = 10_000  # rows
FORWARD = {"mambapy": 40.0, "reference loop": 30.0, "eager loop": 12.0, "mamba_ssm": 2.0}  # targets, ours = 1
MOST_COPIED = 2e9  # numbers: the gradient of the reference's loop copies [B, E, L, N] once a row
INTRODUCTION = (
    "float32, N = 16, no gate. Median {} ms of interleaved calls; 'x' is a peer's time over ours, 'target' what is "
    "asked of it. mambapy: its parallel scan in PyTorch. mamba_ssm: from our layout, its transposes included. "
    "reference loop: the formula and layout of mamba_ssm's selective_scan_ref. eager loop: one step of all sequences "
    "at a time. bytes/token: what a call needs beyond its result, measured on at most 10,000 rows."
)
Call = Callable[[], tuple[Tensor, ...]]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Sequences, and the width of their rows. ``like`` names the case of one length with as many rows."""

    name: str
    lengths: tuple[int, ...]
    channels: int
    like: str = ""

    @property
    def longest(self) -> int:
        """L."""
        return max(self.lengths)

    @property
    def rows(self) -> int:
        """T."""
        return sum(self.lengths)


def cases() -> list[Case]:
    """The shapes that the targets are stated for, and ragged sequences with as many rows."""
    equal = [(625, 16, 64), (3000, 32, 64), (200, 64, 128), (1, 10_000, 64)]
    found = [Case(f"{b} x {l} x {d}", (l,) * b, d) for b, l, d in equal]
    for case, longest in ((found[0], 31), (found[1], 63)):
        found.append(
            Case(f"{len(case.lengths)} x 1..{longest} x {case.channels}", ragged(case, longest), case.channels)
        )
        found[-1] = replace(found[-1], like=case.name)
    return found


def ragged(case: Case, longest: int) -> tuple[int, ...]:
    """As many sequences and rows as in ``case``, of 1 to ``longest`` rows."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (len(case.lengths),), generator=generator)
    while (off := case.rows - int(lengths.sum())) != 0:
        at = int(torch.randint(lengths.numel(), (1,), generator=generator))
        lengths[at] = (lengths[at] + (1 if off > 0 else -1)).clamp(1, longest)
    return tuple(lengths.tolist())


def main(argv: Sequence[str]) -> int:
    """Run the benchmark in each setting and print a page of tables."""
    parser = argparse.ArgumentParser(prog="python -m geo bench selective_scan", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, nargs="+", help=f"which of {[case.name for case in cases()]}, from 0")
    add_settings(parser, 3.0, "after which a candidate is timed no further, about")
    parser.add_argument("--quick", action="store_true", help="the smallest case alone")
    return run_settings("selective_scan", argv, parser.parse_args(argv), INTRODUCTION, measure, page)


# -- the page ----------------------------------------------------------------------------------------------------------
def target(peer: str, backward: bool, longest: int) -> float | None:
    """The ratio to a peer that is asked for."""
    if not backward:
        return FORWARD[peer]
    if peer == "mambapy":
        return 50.0 if longest <= 64 else 30.0
    return 2.0 if peer == "mamba_ssm" else None


def page(result: dict[str, Any], tuned: bool) -> str:
    """Markdown of one setting's results."""
    rows = [["sequences", "pass", "ours", "peer", "time", "x", "target", "bytes/token", "peer's"]]
    reached, stated = 0, 0
    for row in result["rows"]:
        for name, peer in row["peers"].items():
            cells = [row["case"], row["pass"], _ms(row["ours"]), name]
            if isinstance(peer, str):
                rows.append([*cells, peer, "", "", "", ""])
                continue
            ratio, wanted = peer["time"] / row["ours"], target(name, row["pass"] != "forward", row["longest"])
            stated += wanted is not None
            reached += wanted is not None and ratio >= wanted
            cells += [_ms(peer["time"]), f"{ratio:.1f}", "" if wanted is None else f"{wanted:g}"]
            rows.append([*cells, _bytes(row["memory"]), _bytes(peer["memory"])])
    text = f"{reached} of {stated} ratios reach their target."
    times = {(row["case"], row["pass"]): row["ours"] for row in result["rows"]}
    costs = [
        f"{row['case']} {row['pass']}: {row['ours'] / times[row['like'], row['pass']]:.2f} of the time of {row['like']}"
        for row in result["rows"]
        if (row["like"], row["pass"]) in times
    ]
    if costs:
        text += f" Ragged at no cost (target 1): {'; '.join(costs)}."
    return f"{result['machine']}\n\n{text}\n\n{table(rows)}"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _bytes(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


# -- the measurement ---------------------------------------------------------------------------------------------------
def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check equality, then time, in this process: one dictionary per case and pass."""
    chosen = cases()[:1] if args.quick else cases()
    if args.cases:
        chosen = [cases()[i] for i in args.cases]
    for case in chosen:
        small = cut(case)
        checked = Problem(small, args.device)
        expected = checked.truth()
        for backward in (False, True):
            functions = candidates(checked.case, args.device)
            memory: dict[str, float | None] = {}
            for name, function in functions.items():
                if isinstance(function, str) or copies_too_much(name, small, backward):
                    continue
                call = checked.call(function, backward)
                check(name, call(), expected if backward else expected[:1])
                extra = peak_extra_memory(call, args.device)
                memory[name] = None if extra is None else extra / small.rows
            yield row_of(case, backward, memory, args)


def row_of(case: Case, backward: bool, memory: dict[str, float | None], args: argparse.Namespace) -> dict[str, Any]:
    """The times of one case and pass."""
    problem = Problem(case, args.device)
    functions = candidates(case, args.device)
    calls, peers = {}, {}
    for name, function in functions.items():
        if isinstance(function, str):
            peers[name] = function
        elif copies_too_much(name, case, backward):
            peers[name] = "not run"
        else:
            calls[name] = problem.call(function, backward)
    clock = args.clock if args.device == "cpu" else "cuda"
    times = {n: t.median for n, t in interleave(calls, args.rounds, 3, clock, seconds=args.seconds).items()}
    found = {
        name: peers[name] if name in peers else {"time": times[name], "memory": memory.get(name)}
        for name in functions
        if name != "ours"
    }
    said = ", ".join(f"{n} {_ms(t)}" for n, t in times.items())
    label = "forward + backward" if backward else "forward"
    print(f"{args.threads[0]} thread(s): {case.name}, {label}: {said} ms", file=sys.stderr, flush=True)
    return {
        "case": case.name,
        "pass": label,
        "longest": case.longest,
        "like": case.like,
        "ours": times["ours"],
        "memory": memory.get("ours"),
        "peers": found,
    }


def copies_too_much(name: str, case: Case, backward: bool) -> bool:
    """Whether a peer's gradient would take minutes: that of a row sliced out of [B, E, L, N] is of that shape."""
    size = len(case.lengths) * case.longest * case.channels * STATES
    return backward and name == "reference loop" and size * case.longest > MOST_COPIED


def cut(case: Case) -> Case:
    """The first sequences of a case, about as many rows as are checked."""
    kept = [n for n, total in zip(case.lengths, itertools.accumulate(case.lengths), strict=True) if total <= CHECKED]
    return replace(case, lengths=tuple(kept or case.lengths[:1]))


def check(name: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raise AssertionError unless output and gradients are right, up to a part of their largest entry."""
    labels = ("output", "u", "delta", "A", "B", "C", "D")
    for label, a, e in zip(labels, actual, expected, strict=False):
        worst = float((a.view_as(e) - e).abs().amax() / e.abs().amax())
        if not worst <= TOLERANCE:
            raise AssertionError(f"{name}, {label}: off by {worst:.2g} of the largest entry, {TOLERANCE:g} is allowed")


class Problem:
    """The tensors of a case, by rows."""

    def __init__(self, case: Case, device: str) -> None:
        """Draw them: steps of 0.001 to 0.1 as Mamba starts with them, decays -1 to -N."""
        torch.manual_seed(0)
        rows, channels = case.rows, case.channels
        self.case = case
        delta = torch.rand(rows, channels).mul_(4.6).add_(-6.9).exp_()
        A = -torch.arange(1.0, STATES + 1).expand(channels, -1).contiguous()
        tensors = [torch.randn(rows, channels), delta, A, torch.randn(rows, STATES), torch.randn(rows, STATES)]
        self.tensors = [t.to(device) for t in (*tensors, torch.randn(channels))]
        self.cotangent = torch.randn(rows, channels).to(device)

    def call(self, function: Function, backward: bool) -> Call:
        """What is timed: the output, and with ``backward`` the gradients."""
        if not backward:

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (function(*self.tensors),)

            return forward
        leaves = [t.detach().requires_grad_() for t in self.tensors]

        def both() -> tuple[Tensor, ...]:
            out = function(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, self.cotangent)

        return both

    def truth(self) -> tuple[Tensor, ...]:
        """The same in float64, by the eager loop."""
        wide = Problem.__new__(Problem)
        wide.case, wide.cotangent = self.case, self.cotangent.double()
        wide.tensors = [t.double() for t in self.tensors]
        scan = Padded(self.case, str(self.cotangent.device))
        return tuple(t.float() for t in wide.call(lambda *t: scan(eager_loop, *t), True)())


# -- candidates --------------------------------------------------------------------------------------------------------
class Padded:
    """Rows as [sequences, longest, ...] and back; without a copy where all sequences have one length."""

    def __init__(self, case: Case, device: str) -> None:
        """Find each row's place."""
        self.shape = (len(case.lengths), case.longest)
        self.equal = case.rows == self.shape[0] * self.shape[1]
        lengths = torch.tensor(case.lengths, device=device)
        place = torch.arange(case.longest, device=device)
        self.there = (place < lengths[:, None]).flatten().nonzero().flatten()

    def spread(self, t: Tensor) -> Tensor:
        """[T, F] as [B, L, F], zeros behind the ends."""
        if self.equal:
            return t.view(*self.shape, -1)
        return t.new_zeros(self.shape[0] * self.shape[1], t.size(1)).index_copy(0, self.there, t).view(*self.shape, -1)

    def back(self, t: Tensor) -> Tensor:
        """[B, L, F] as [T, F]."""
        rows = t.reshape(self.shape[0] * self.shape[1], -1)
        return rows if self.equal else rows.index_select(0, self.there)

    def __call__(self, scan: Function, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        """``scan`` of padded rows, of rows."""
        return self.back(scan(self.spread(u), self.spread(delta), A, self.spread(B), self.spread(C), D))


def eager_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """[B, L, E]: a step of all sequences at a time, with nothing computed beforehand."""
    h, outputs = u.new_zeros(u.size(0), *A.shape), []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = (delta_t[..., None] * A).exp() * h + (delta_t * u_t)[..., None] * B_t[:, None]
        outputs.append((h * C_t[:, None]).sum(-1))
    return torch.stack(outputs, 1) + D * u


def reference_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """What mamba_ssm's selective_scan_ref computes, in its layout [B, E, L], which it is given as views."""
    u, delta, B, C = (t.transpose(1, 2) for t in (u, delta, B, C))
    decay = torch.einsum("bdl,dn->bdln", delta, A).exp()
    added = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    h, outputs = u.new_zeros(u.size(0), *A.shape), []
    for t in range(u.size(2)):
        h = decay[:, :, t] * h + added[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return (torch.stack(outputs, 2) + u * D[:, None]).transpose(1, 2)


def candidates(case: Case, device: str) -> dict[str, Function | str]:
    """Ours and the peers, of rows; a peer that is not there is a word that says so."""
    ptr = torch.tensor([0, *itertools.accumulate(case.lengths)], device=device)
    padded = Padded(case, device)

    def ours(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return cast(Tensor, ops.selective_scan(u, delta, A, B, C, D, ptr=ptr))

    found: dict[str, Function | str] = {"ours": ours}
    mambapy, mamba_ssm = _module("mambapy.pscan"), _module("mamba_ssm.ops.selective_scan_interface")

    def by_pscan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        assert mambapy is not None
        decay, added = (delta[..., None] * A).exp(), (delta * u)[..., None] * B[:, :, None]
        states: Tensor = mambapy.pscan(decay, added)
        return (states @ C[..., None]).squeeze(-1) + D * u

    def by_mamba_ssm(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        assert mamba_ssm is not None
        rows = (t.transpose(1, 2).contiguous() for t in (u, delta, B, C))
        u, delta, B, C = rows
        out: Tensor = mamba_ssm.selective_scan_fn(u, delta, A, B, C, D)
        return out.transpose(1, 2)

    found["mambapy"] = "not available" if mambapy is None else lambda *t: padded(by_pscan, *t)
    found["reference loop"] = lambda *t: padded(reference_loop, *t)
    found["eager loop"] = lambda *t: padded(eager_loop, *t)
    if device != "cpu":
        found["mamba_ssm"] = "not available" if mamba_ssm is None else lambda *t: padded(by_mamba_ssm, *t)
    return found


def _module(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
