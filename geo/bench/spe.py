"""SPE and its op against the loop over graphs that the official code uses, written from its description.

That loop makes W of each graph by V diag(z) V^T for each filter, fills all graphs up to the largest of the batch, runs
rho on all of it, masks what was filled up and sums over the columns. Both sides have the same weights; filters,
eigenvectors and edges are given. Outputs and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geo.bench import Timing, interleave, machine, peak_extra_memory, table
from geo.nn.spe_rho import GIN, PairNetwork
from geo.testing import assert_close

Problem = tuple[Tensor, Tensor, Tensor, Tensor]  # eigvecs, filters, ptr, edge_index
HEAD = ["problem", "pass", "loop", "geo", "x", "target", "geo, recompute=False", "x", "loop MB", "geo MB"]


def main(argv: Sequence[str]) -> int:
    """Check, then time, and print a page with a table."""
    parser = argparse.ArgumentParser(prog="python -m geo bench spe", description=__doc__.partition("\n")[0])
    parser.add_argument("--graphs", type=int, default=128, help="molecules in the batch")
    parser.add_argument("--nodes", type=int, default=1000, help="nodes of each of the two large graphs")
    parser.add_argument("--rho", choices=["mlp", "gin"], nargs="*", default=["mlp", "gin"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate")
    parser.add_argument("--seconds", type=float, default=20.0, help="after which a candidate has one call a turn")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a busy machine")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no GPU")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    clock = "cuda" if args.device == "cuda" else args.clock
    print(
        f"## spe, {datetime.date.today().isoformat()}\n\n{machine(args.device)}\n\n"
        f"Median {clock} ms (first to last decile) of interleaved calls; 'x' is the loop's time over ours; memory is "
        "the peak beyond the results.\n",
        flush=True,
    )
    atoms = molecules(molecule_sizes(args.graphs), 37, 16)
    few = molecules(molecule_sizes(12), 37, 16)
    cases = [
        ("mlp, molecules, K=37 M=16 H=64", atoms, few, ("mlp", 64, 3, None), ("5", "5")),
        ("mlp with layer norm, the same", atoms, few, ("mlp", 64, 3, "layer_norm"), ("", "")),
        (
            "mlp, 2 large, K=32 M=16 H=32",
            large(args.nodes, 32, 16),
            large(150, 32, 16),
            ("mlp", 32, 3, None),
            ("15", "10"),
        ),
        ("gin 8 x 128, molecules", atoms, few, ("gin", 128, 8, "layer_norm"), ("1", "1")),
    ]
    rows = [HEAD]
    for label, problem, small, rho, targets in (c for c in cases if c[3][0] in args.rho):
        check(small, *rho)
        rows += case(label, problem, rho, targets, args, clock)
    print(table(rows), flush=True)
    torch.set_num_threads(before)
    return 0


def molecule_sizes(num: int) -> list[int]:
    """Numbers of atoms with the mean and spread of ZINC's."""
    generator = torch.Generator().manual_seed(0)
    return (23.2 + 4.5 * torch.randn(num, generator=generator)).round().clamp(9, 37).int().tolist()


def molecules(sizes: Sequence[int], width: int, channels: int) -> Problem:
    """Trees with a ring or two, and the first ``width`` eigenpairs of each."""
    generator = torch.Generator().manual_seed(1)
    eigvecs, edges, first = [], [], 0
    for n in sizes:
        child = torch.arange(1, n)
        parent = torch.stack([torch.randint(max(0, c - 3), c, (), generator=generator) for c in child.tolist()])
        rings = torch.tensor([[0, n // 3], [5 % n, n - 1]])
        pairs = torch.cat([torch.stack([child, parent]), rings], dim=1)
        pairs = pairs[:, pairs[0] != pairs[1]]
        edge_index = torch.cat([pairs, pairs.flip(0)], dim=1).unique(dim=1)
        eigvecs.append(_eigenvectors(edge_index, n, width))
        edges.append(edge_index + first)
        first += n
    return _problem(eigvecs, edges, sizes, channels)


def large(num_nodes: int, width: int, channels: int) -> Problem:
    """Two random graphs of mean degree 6."""
    generator = torch.Generator().manual_seed(2)
    pairs = [torch.randint(num_nodes, (2, 3 * num_nodes), generator=generator) for _ in range(2)]
    edges = [torch.cat([p, p.flip(0)], dim=1).unique(dim=1) for p in pairs]
    eigvecs = [_eigenvectors(e, num_nodes, width) for e in edges]
    return _problem(eigvecs, [edges[0], edges[1] + num_nodes], [num_nodes] * 2, channels)


def _eigenvectors(edge_index: Tensor, num_nodes: int, width: int) -> Tensor:
    adjacency = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    adjacency[edge_index[0], edge_index[1]] = 1
    scale = adjacency.sum(1).clamp(min=1).rsqrt()
    vectors = torch.linalg.eigh(torch.eye(num_nodes, dtype=torch.float64) - scale.unsqueeze(1) * adjacency * scale)[1]
    return nn.functional.pad(vectors[:, :width], (0, max(0, width - num_nodes))).float()


def _problem(eigvecs: list[Tensor], edges: list[Tensor], sizes: Sequence[int], channels: int) -> Problem:
    generator = torch.Generator().manual_seed(3)
    filters = torch.randn(len(sizes), eigvecs[0].size(1), channels, generator=generator)
    return torch.cat(eigvecs), filters, torch.tensor([0, *sizes]).cumsum(0), torch.cat(edges, dim=1)


def loop(rho: PairNetwork, eigvecs: Tensor, filters: Tensor, ptr: Tensor, edge_index: Tensor) -> Tensor:
    """What rho makes of filters, graph by graph and filled up."""
    sizes = ptr.diff().tolist()
    width, filled, masks = max(sizes), [], []
    for v, z in zip(eigvecs.split(sizes), filters, strict=True):
        w = (v @ z.t().diag_embed() @ v.t()).permute(1, 2, 0)
        filled.append(torch.cat([w, w.new_zeros(len(v), width - len(v), w.size(2))], dim=1))
        masks.append((torch.arange(width, device=v.device) < len(v)).expand(len(v), -1))
    x = torch.cat(filled)
    network = rho.columns.network
    if isinstance(network, GIN):
        for eps, mlp in zip(network.eps, network.mlps, strict=True):
            messages = torch.zeros_like(x).index_add(0, edge_index[1], x.index_select(0, edge_index[0]))
            x = plain(mlp, (1 + eps) * x + messages)
    else:
        x = plain(network.mlp, x)
    out: Tensor = rho.last(x) * torch.cat(masks).unsqueeze(2)
    return out.sum(1)


def case(
    label: str,
    problem: Problem,
    rho: tuple[str, int, int, str | None],
    targets: tuple[str, str],
    args: argparse.Namespace,
    clock: str,
) -> list[list[str]]:
    """Two lines of the table: forward, and forward with the gradients of weights and filters."""
    eigvecs, filters, ptr, edge_index = (t.to(args.device) for t in problem)
    problem = (eigvecs, filters.requires_grad_(), ptr, edge_index)
    networks = {
        name: make(*rho, recompute=None if name == "geo" else False).to(args.device) for name in ("geo", "kept")
    }
    calls: dict[str, Callable[[], Tensor]] = {
        "loop": lambda: loop(networks["geo"], *problem),
        "geo": lambda: networks["geo"](*problem, None),
        "kept": lambda: networks["kept"](*problem, None),
    }
    with torch.no_grad():
        ours, theirs = calls["geo"](), calls["loop"]()
    assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), msg=label)
    rows = []
    for what, target in zip(("forward", "forward + backward"), targets, strict=True):
        passes = {name: _forward(call) if what == "forward" else _both(call) for name, call in calls.items()}
        if what == "forward" or (rho[0] == "mlp" and rho[3] is None):  # the op keeps nothing
            del passes["kept"]
        times = interleave(passes, args.rounds, 1, clock, args.seconds)
        memory = [peak_extra_memory(passes[name], args.device) for name in ("loop", "geo")]
        rows.append([label, what, *_cells(times, target), *("" if m is None else f"{m / 1e6:.0f}" for m in memory)])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def plain(mlp: Any, x: Tensor) -> Tensor:
    """An MLP layer by layer, nothing in place."""
    for i, linear in enumerate(mlp.linears):
        x = linear(x)
        if i < len(mlp.norms):
            x = nn.functional.relu(mlp.norms[i](x))
    return x


def make(kind: str, hidden: int, num_layers: int, norm: str | None, recompute: bool | None = None) -> PairNetwork:
    """A rho; always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PairNetwork(kind, 16, hidden, hidden, num_layers, 3, norm, "relu", False, None, None, recompute)


def check(problem: Problem, kind: str, hidden: int, num_layers: int, norm: str | None) -> None:
    """Raise AssertionError unless ours and the loop agree in float64, outputs and gradients."""
    network = make(kind, hidden, num_layers, norm).double()
    eigvecs, filters, ptr, edge_index = problem
    eigvecs, filters = eigvecs.double(), filters.double().requires_grad_()
    wanted = [filters, *network.parameters()]
    results = []
    for out in (network(eigvecs, filters, ptr, edge_index, None), loop(network, eigvecs, filters, ptr, edge_index)):
        grads = torch.autograd.grad(out.square().mean(), wanted)
        results.append([out, *grads])
    for ours, theirs in zip(*results, strict=True):
        scale = theirs.abs().max().clamp(min=1e-6)
        assert_close(ours / scale, theirs / scale, msg=f"rho={kind!r}")


def _forward(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(call)


def _both(call: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        call().sum().backward()

    return step


def _cells(times: dict[str, Timing], target: str) -> list[str]:
    cells = [str(times["loop"]), str(times["geo"]), f"{times['loop'].median / times['geo'].median:.1f}", target]
    if "kept" not in times:
        return [*cells, "", ""]
    return [*cells, str(times["kept"]), f"{times['loop'].median / times['kept'].median:.1f}"]
