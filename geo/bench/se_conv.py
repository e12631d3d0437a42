"""The separable convolution of PONITA and the ops under it, against PyTorch ops composed as in the official code.

The composed convolution: kernel linear to [E, O, C], ``index_select``, multiply, ``index_add``, then the einsum over
orientations. Ours: :class:`geo.nn.PoniConv`. Forward + backward gives the gradients of features, kernel basis and all
weights. The command starts one process per setting (allocator, SIMD level), both being chosen when a process starts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geo.bench import Timing, interleave, machine, peak_extra_memory, table
from geo.bench.settings import TUNED
from geo.nn import PoniConv
from geo.ops import SegmentPlan, gather_mul_segment_sum
from geo.testing import assert_close

TARGETS = {  # what the ratios to the composed computation should reach, with the default allocator
    "gather_mul_segment_sum forward": 12.0,
    "gather_mul_segment_sum forward + backward": 4.0,
    "convolution forward": 9.0,
    "convolution forward + backward": 6.0,
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
Call = Callable[[], Any]


def main(argv: Sequence[str]) -> int:
    """Run the benchmark in each setting and print a page of tables."""
    parser = argparse.ArgumentParser(prog="python -m geo bench se_conv", description=__doc__.partition("\n")[0])
    parser.add_argument("--edges", type=int, default=20000)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--orientations", type=int, default=16)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--basis", type=int, default=64, help="width of the kernel basis")
    parser.add_argument(
        "--order", choices=["receiver", "random"], default="receiver", help="of the edges; AddRadiusGraph's is receiver"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="turns of each candidate")
    parser.add_argument("--calls", type=int, default=3, help="timed calls in a turn")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: with --threads 1 on a busy machine"
    )
    parser.add_argument("--malloc", choices=["default", "tuned", "both"], default="both")
    parser.add_argument("--simd", nargs="*", default=[], help="further levels to run: baseline, avx2, avx512")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(measure(args)))
        return 0
    print(
        f"## se_conv, {datetime.date.today().isoformat()}\n\n{args.dtype}, E = {args.edges}, N = {args.nodes}, "
        f"O = {args.orientations}, C = {args.channels}, B = {args.basis}, edges in {args.order} order. "
        f"Median {args.clock} ms (first to last decile) of {args.rounds * args.calls} calls, "
        f"interleaved in {args.rounds} rounds. 'x' is the composed time over ours; "
        "memory is the peak beyond inputs and results.",
        flush=True,
    )
    settings: list[tuple[str, dict[str, str]]] = (
        [("default allocator", {})] if args.malloc != "tuned" or args.device == "cuda" else []
    )
    if args.malloc != "default" and args.device == "cpu":
        settings.append((f"GLIBC_TUNABLES={TUNED}", {"GLIBC_TUNABLES": TUNED}))
    settings += [(f"default allocator, GEO_SIMD={level}", {"GEO_SIMD": level}) for level in args.simd]
    status = 0
    for title, env in settings:
        command = [sys.executable, "-m", "geo", "bench", "se_conv", *argv, "--here"]
        done = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"\n### {title}\n\nfailed")
            status = 1
        else:
            print(f"\n### {title}\n\n{page(json.loads(done.stdout.splitlines()[-1]))}", flush=True)
    return status


def page(result: dict[str, Any]) -> str:
    """Markdown of one setting's results."""
    rows = [["", "composed", "ours", "x", "target", "memory composed", "memory ours", "x"]]
    for name, row in result["rows"].items():
        composed, ours = Timing(*row["composed"]), Timing(*row["ours"])
        target = TARGETS.get(name)
        memory = [row["memory composed"], row["memory ours"]]
        rows.append(
            [
                name,
                str(composed),
                str(ours),
                f"{composed.median / ours.median:.1f}",
                "" if target is None else f"{target:g}",
                *("not available" if m is None else f"{m / 2**20:.1f} MiB" for m in memory),
                "" if None in memory else f"{memory[0] / max(memory[1], 2**16):.1f}",
            ]
        )
    return f"{result['machine']}\n\n{table(rows)}"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Check equality, then time, in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype, device = DTYPES[args.dtype], args.device
    clock = args.clock if device == "cpu" else "cuda"
    num_nodes, num_ori, channels = args.nodes, args.orientations, args.channels

    def tensor(*size: int) -> Tensor:
        return torch.randn(*size).to(device, dtype)

    edge_index = torch.randint(num_nodes, (2, args.edges))
    if args.order == "receiver":
        edge_index = edge_index[:, edge_index[1].argsort()]
    edge_index = edge_index.to(device)
    plan = SegmentPlan.from_edge_index(edge_index, num_nodes)
    x, g = tensor(num_nodes, num_ori, channels), tensor(num_nodes, num_ori, channels)
    weight = tensor(args.edges, num_ori, channels)
    rows: dict[str, dict[str, Any]] = {}

    def row(name: str, composed: Call, ours: Call) -> None:
        for a, b in zip(_tuple(ours()), _tuple(composed()), strict=True):
            scale = b.abs().amax().clamp(min=1)
            assert_close(a / scale, b / scale, factor=10, msg=name)
        timings = interleave({"composed": composed, "ours": ours}, args.rounds, args.calls, clock)
        rows[name] = {key: (t.median, t.low, t.high) for key, t in timings.items()}
        rows[name]["memory composed"] = peak_extra_memory(composed, device)
        rows[name]["memory ours"] = peak_extra_memory(ours, device)

    def both(name: str, composed: Callable[..., Any], ours: Callable[..., Any], leaves: list[Tensor]) -> None:
        with torch.no_grad():
            row(f"{name} forward", lambda: composed(*leaves), lambda: ours(*leaves))
        for leaf in leaves:
            leaf.requires_grad_()
        row(
            f"{name} forward + backward",
            lambda: torch.autograd.grad(composed(*leaves), leaves, g),
            lambda: torch.autograd.grad(ours(*leaves), leaves, g),
        )

    both(
        "gather_mul_segment_sum",
        lambda x, weight: _gather_mul_sum(x, weight, edge_index),
        lambda x, weight: gather_mul_segment_sum(x, weight, plan=plan),
        [x.clone(), weight],
    )
    del weight

    conv = PoniConv(channels, channels, args.basis).to(device, dtype)
    names, parameters = zip(*conv.named_parameters(), strict=True)
    fiber_basis = tensor(num_ori, num_ori, args.basis)

    def ours(x: Tensor, basis: Tensor, *parameters: Tensor) -> Any:
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(conv, weights, (x, edge_index, basis, fiber_basis), {"plan": plan})

    def composed(x: Tensor, basis: Tensor, *parameters: Tensor) -> Any:
        weights = dict(zip(names, parameters, strict=True))
        message = _gather_mul_sum(x, torch.nn.functional.linear(basis, weights["weight"]), edge_index)
        fiber = torch.nn.functional.linear(fiber_basis, weights["fiber_weight"])
        return torch.einsum("boc,poc->bpc", message, fiber) / num_ori + weights["bias"]

    leaves = [x, tensor(args.edges, num_ori, args.basis), *(p.detach() for p in parameters)]
    both("convolution", composed, ours, leaves)
    return {"machine": machine(device), "rows": rows}


def _gather_mul_sum(x: Tensor, weight: Tensor, edge_index: Tensor) -> Tensor:
    message = x.index_select(0, edge_index[0]) * weight
    return torch.zeros_like(x).index_add(0, edge_index[1], message)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
