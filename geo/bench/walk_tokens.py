"""Random walks and walk tokens against networkx, Python lists and vectorised PyTorch.

Ours is first checked: equal to the plain-PyTorch reference, and every step along an edge. The walkers in Python run on
the smallest graph alone, since nobody would wait for them on the others. The vectorised peer advances all walks a step
at a time by ``torch.rand`` and gathers; for tokens it is followed by the plain-PyTorch kernel of ``walk_tokens``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from geo.bench import interleave, machine, table
from geo.ops import csr_from_index, random_walk, random_walk_reference, walk_tokens, walk_tokens_reference
from geo.transforms import AddWalkTokens

SMALL = 10_000  # nodes, up to which the walkers in Python are timed
CHECKED = 100_000  # nodes, up to which all walks are compared with the reference
HEAD = ["walks", "geo", "networkx", "x", "target", "Python lists", "x", "PyTorch", "x", "target", "Msteps/s"]
Call = Callable[[], Any]


def main(argv: Sequence[str]) -> int:
    """Check, then time, and print a page of tables."""
    parser = argparse.ArgumentParser(prog="python -m geo bench walk_tokens", description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="*", default=[2000, 100_000, 1_000_000])
    parser.add_argument("--degree", type=int, default=10, help="mean number of edges out of a node")
    parser.add_argument("--length", type=int, default=8, help="steps of a walk")
    parser.add_argument("--walks", type=int, nargs="*", default=[16, 16, 4], help="from each node, for each of --nodes")
    parser.add_argument("--tokens", type=int, nargs=4, default=[2000, 3, 4, 2], metavar=("N", "m", "M", "s"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate")
    parser.add_argument("--seconds", type=float, default=5.0, help="after which a candidate has one call a turn")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: with --threads 1 on a busy machine"
    )
    args = parser.parse_args(argv)
    if len(args.walks) != len(args.nodes):
        parser.error(f"--walks has {len(args.walks)} numbers and --nodes {len(args.nodes)}, but they go together")
    torch.set_num_threads(args.threads)
    print(
        f"## walk_tokens, {datetime.date.today().isoformat()}\n\n{machine()}\n\nRandom graphs, {args.degree} edges a "
        f"node, walks of {args.length} steps. Median {args.clock} ms (first to last decile) of interleaved calls; 'x' "
        "is the peer's time over ours.\n",
        flush=True,
    )
    rows = [walk_row(n, walks, args) for n, walks in zip(args.nodes, args.walks, strict=True)]
    print(table([HEAD, *rows]), flush=True)
    print("\n" + token_table(args), flush=True)
    return 0


def random_graph(num_nodes: int, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(edge_index, rowptr, col)``, rows in ascending order."""
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(num_nodes, (2, num_nodes * degree), generator=generator)
    edge_index = edge_index[:, (edge_index[0] * num_nodes + edge_index[1]).argsort()]
    rowptr, _ = csr_from_index(edge_index[0], num_nodes)
    return edge_index, rowptr, edge_index[1]


def check_walks(rowptr: Tensor, col: Tensor, num_nodes: int, num_walks: int, length: int) -> None:
    """Raise AssertionError unless walks equal the reference (all of them, or a thousand starts) and follow edges."""
    start = torch.arange(num_nodes) if num_nodes <= CHECKED else torch.randint(num_nodes, (1000,))
    nodes, edges = random_walk(rowptr, col, start, length, num_walks, seed=0, return_edges=True)
    expected = random_walk_reference(rowptr, col, start, length, num_walks, seed=0)
    assert isinstance(expected, Tensor)
    if not torch.equal(nodes, expected):
        raise AssertionError("random_walk differs from its reference")
    moved = edges >= 0
    source = torch.searchsorted(rowptr, edges[moved], right=True) - 1
    follows = torch.equal(source, nodes[..., :-1][moved]) and torch.equal(col[edges[moved]], nodes[..., 1:][moved])
    if not follows:
        raise AssertionError("a step of random_walk is no edge")


def walk_row(num_nodes: int, num_walks: int, args: argparse.Namespace) -> list[str]:
    """A line of the first table."""
    edge_index, rowptr, col = random_graph(num_nodes, args.degree)
    start, length = torch.arange(num_nodes), args.length
    check_walks(rowptr, col, num_nodes, num_walks, length)
    calls: dict[str, Call] = {
        "geo": lambda: random_walk(rowptr, col, start, length, num_walks, seed=0),
        "torch": lambda: torch_walk(rowptr, col, start, length, num_walks),
    }
    if num_nodes <= SMALL:
        graph = _networkx_graph(edge_index, num_nodes)
        rows = [col[a:b].tolist() for a, b in zip(rowptr.tolist(), rowptr[1:].tolist(), strict=False)]
        starts = [v for v in range(num_nodes) for _ in range(num_walks)]
        calls["networkx"] = lambda: [networkx_walk(graph, v, length) for v in starts]
        calls["lists"] = lambda: [list_walk(rows, v, length) for v in starts]
    times = interleave(calls, args.rounds, 1, args.clock, args.seconds)
    ours = times["geo"].median
    row = [f"N = {num_nodes}, {num_walks} each", str(times["geo"])]
    for name, target in (("networkx", "100"), ("lists", None), ("torch", "5" if num_nodes <= 100_000 else "3")):
        timed = times.get(name)
        row += ["", ""] if timed is None else [str(timed), f"{timed.median / ours:.1f}"]
        if target is not None:
            row.append(target if timed is not None else "")
    return [*row, f"{num_nodes * num_walks * length / ours / 1e3:.0f}"]


def token_table(args: argparse.Namespace) -> str:
    """The second table: all token sequences of a graph."""
    num_nodes, steps, num_walks, repeats = args.tokens
    edge_index, rowptr, col = random_graph(num_nodes, args.degree)
    data = Data(edge_index=edge_index, num_nodes=num_nodes)
    transform = AddWalkTokens(steps, num_walks, repeats)
    start, tokens = torch.arange(num_nodes), repeats * steps
    lengths = steps - torch.arange(tokens) // repeats
    out = transform(data)
    walks = random_walk_reference(rowptr, col, start, steps, tokens * num_walks, seed=0)
    assert isinstance(walks, Tensor)
    walks = walks.view(num_nodes, tokens, num_walks, steps + 1)
    members, size, _, index, _ = walk_tokens_reference(rowptr, col, start, walks, lengths, 1)
    found = (out.token_node_id, out.token_size, out.token_sub_edge_index)
    if not all(torch.equal(a, b) for a, b in zip(found, (members, size, index), strict=True)):
        raise AssertionError("the tokens differ from those of the reference")

    def vectorised() -> Any:
        visited = torch_walk(rowptr, col, start, steps, tokens * num_walks)
        return walk_tokens_reference(
            rowptr, col, start, visited.view(num_nodes, tokens, num_walks, steps + 1), lengths, 1
        )

    calls: dict[str, Call] = {
        "AddWalkTokens": lambda: transform(data),
        "of it, walk_tokens": lambda: walk_tokens(rowptr, col, start, walks, lengths, 1),
        "vectorised PyTorch": vectorised,
    }
    if num_nodes <= SMALL:
        graph = _networkx_graph(edge_index, num_nodes)
        calls["networkx"] = lambda: networkx_tokens(graph, steps, num_walks, repeats)
    times = interleave(calls, args.rounds, 1, args.clock, args.seconds)
    ours = times["AddWalkTokens"].median
    rows = [["tokens", "ms", "x"]]
    rows += [[name, str(timed), f"{timed.median / ours:.1f}"] for name, timed in times.items()]
    return (
        f"Token sequences of N = {num_nodes} nodes, m = {steps}, M = {num_walks}, s = {repeats}: "
        f"{size.numel()} tokens, "
        f"{members.numel()} members, {index.size(1)} edges\n\n{table(rows)}"
    )


# -- peers -------------------------------------------------------------------------------------------------------------
def torch_walk(rowptr: Tensor, col: Tensor, start: Tensor, length: int, num_walks: int) -> Tensor:
    """All walks at once, a step at a time."""
    node = start.repeat_interleave(num_walks)
    degree, out = rowptr.diff(), [node]
    for _ in range(length):
        choices = degree[node]
        edge = rowptr[node] + (torch.rand(node.size(0)) * choices).long()
        node = torch.where(choices > 0, col[edge.clamp_(max=col.size(0) - 1)], node)
        out.append(node)
    return torch.stack(out, dim=1).view(start.size(0), num_walks, length + 1)


def list_walk(rows: list[list[int]], node: int, length: int) -> list[int]:
    """A walk over lists of neighbours."""
    walk = [node]
    for _ in range(length):
        if rows[node]:
            node = random.choice(rows[node])
        walk.append(node)
    return walk


def networkx_walk(graph: Any, node: int, length: int) -> list[int]:
    """A walk as one writes it with networkx."""
    walk = [node]
    for _ in range(length):
        neighbours = list(graph.neighbors(node))
        if neighbours:
            node = random.choice(neighbours)
        walk.append(node)
    return walk


def networkx_tokens(graph: Any, steps: int, num_walks: int, repeats: int) -> list[tuple[list[int], list[Any]]]:
    """Nodes and edges of every token, by walks and ``subgraph``."""
    out = []
    for node in graph:
        for length in [*(steps - j // repeats for j in range(repeats * steps)), 0]:
            visited = {u for _ in range(num_walks if length else 1) for u in networkx_walk(graph, node, length)}
            part = graph.subgraph(visited)
            out.append((list(part), list(part.edges)))
    return out


def _networkx_graph(edge_index: Tensor, num_nodes: int) -> Any:
    nx = importlib.import_module("networkx")  # torch depends on it

    graph = nx.DiGraph()
    graph.add_nodes_from(range(num_nodes))
    graph.add_edges_from(edge_index.t().tolist())
    return graph
