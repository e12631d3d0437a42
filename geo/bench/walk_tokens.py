"""Random walks and walk tokens against networkx, Python lists and vectorised PyTorch.

Ours is first checked: walks equal the plain-PyTorch reference and every step is along an edge; tokens hold the members
and edges that the vectorised peer finds on the same walks. The walkers in Python run on the smallest graph alone, since
nobody would wait for them on the others, and never on a GPU. The vectorised peer advances all walks a step at a time by
``torch.rand`` and gathers; for tokens it sorts the visited nodes of each, and looks up the neighbours of all members
among the members, a block of roots at a time.
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

from geo.bench import Timing, interleave, machine, table
from geo.ops import csr_from_index, random_walk, random_walk_reference
from geo.transforms import AddWalkTokens

SMALL = 10_000  # nodes, up to which the walkers in Python are timed
CHECKED = 100_000  # nodes, up to which all walks are compared with the reference
BLOCK = {
    "cpu": 1 << 17,
    "cuda": 1 << 24,
}  # neighbours that the vectorised peer looks up at a time, the fastest on the CPU
WALKS = ["walks", "geo", "networkx", "x", "target", "Python lists", "x", "PyTorch", "x", "target", "Msteps/s", "target"]
TOKENS = ["tokens", "geo", "networkx", "x", "target", "PyTorch", "x", "target", "members", "edges"]
Call = Callable[[], Any]


def main(argv: Sequence[str]) -> int:
    """Check, then time, and print a page of tables."""
    parser = argparse.ArgumentParser(prog="python -m geo bench walk_tokens", description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="*", default=[2000, 100_000, 1_000_000])
    parser.add_argument("--degree", type=int, default=10, help="mean number of edges out of a node")
    parser.add_argument("--length", type=int, default=8, help="steps of a walk")
    parser.add_argument("--walks", type=int, nargs="*", default=[16, 16, 4], help="from each node, for each of --nodes")
    parser.add_argument("--tokens", type=int, nargs=3, default=[2, 4, 2], metavar=("m", "M", "s"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate")
    parser.add_argument("--seconds", type=float, default=5.0, help="after which a candidate has one call a turn")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: with --threads 1 on a busy machine"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no GPU")
    if len(args.walks) != len(args.nodes):
        parser.error(f"--walks has {len(args.walks)} numbers and --nodes {len(args.nodes)}, but they go together")
    torch.set_num_threads(args.threads)
    print(
        f"## walk_tokens, {datetime.date.today().isoformat()}\n\n{machine(args.device)}\n\nRandom graphs, "
        f"{args.degree} edges a node, walks of {args.length} steps. Median {_clock(args)} ms (first to last decile) of "
        "interleaved calls; 'x' is the peer's time over ours.\n",
        flush=True,
    )
    rows = [walk_row(n, walks, args) for n, walks in zip(args.nodes, args.walks, strict=True)]
    print(table([WALKS, *rows]), flush=True)
    steps, num_walks, repeats = args.tokens
    print(f"\nToken sequences of all nodes, m = {steps}, M = {num_walks}, s = {repeats}, one root token.\n", flush=True)
    print(table([TOKENS, *(token_row(n, args) for n in args.nodes)]), flush=True)
    return 0


def random_graph(num_nodes: int, degree: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(edge_index, rowptr, col)``, rows in ascending order."""
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(num_nodes, (2, num_nodes * degree), generator=generator)
    edge_index = edge_index[:, (edge_index[0] * num_nodes + edge_index[1]).argsort()].to(device)
    rowptr, _ = csr_from_index(edge_index[0], num_nodes)
    return edge_index, rowptr, edge_index[1]


def check_walks(rowptr: Tensor, col: Tensor, num_nodes: int, num_walks: int, length: int) -> None:
    """Raise AssertionError unless walks equal the reference (all of them, or a thousand starts) and follow edges."""
    start = torch.arange(num_nodes) if num_nodes <= CHECKED else torch.randint(num_nodes, (1000,))
    start = start.to(col.device)
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


def check_tokens(out: Data, rowptr: Tensor, col: Tensor, steps: int, num_walks: int, repeats: int) -> None:
    """Raise AssertionError unless tokens (all, or those of the first nodes) equal the peer's on the same walks."""
    num_nodes, tokens = rowptr.size(0) - 1, repeats * steps
    start = torch.arange(num_nodes if num_nodes <= CHECKED else 1000, device=col.device)
    walks = random_walk_reference(rowptr, col, start, steps, tokens * num_walks, seed=0)
    assert isinstance(walks, Tensor)
    members, size, edges, index, edge_size = torch_tokens(rowptr, col, walks, num_walks, repeats)
    if not torch.equal(out.token_size[: len(size)], size) or not torch.equal(out.token_esize[: len(size)], edge_size):
        raise AssertionError("the sizes of tokens differ from the peer's")
    owner = torch.arange(len(size), device=col.device).repeat_interleave(size)
    ours = out.token_node_id[: len(members)]
    if not torch.equal((owner * num_nodes + ours).sort().values, owner * num_nodes + members):
        raise AssertionError("the members of tokens differ from the peer's")
    of_edge = torch.arange(len(size), device=col.device).repeat_interleave(edge_size) * len(col)
    found, ends = out.token_edge_id[: len(edges)], out.token_sub_edge_index[:, : len(edges)]
    if not torch.equal((of_edge + found).sort().values, (of_edge + edges).sort().values):
        raise AssertionError("the edges of tokens differ from the peer's")
    for columns, nodes, places in ((found, ours, ends), (edges, members, index)):
        joined = torch.equal(out.edge_index[:, columns], nodes[places])
        if not joined or not torch.equal(owner[places] * len(col), of_edge.expand(2, -1)):
            raise AssertionError("edges of tokens join other members than they should")


def walk_row(num_nodes: int, num_walks: int, args: argparse.Namespace) -> list[str]:
    """A line of the first table."""
    edge_index, rowptr, col = random_graph(num_nodes, args.degree, args.device)
    start, length = torch.arange(num_nodes, device=col.device), args.length
    check_walks(rowptr, col, num_nodes, num_walks, length)
    calls: dict[str, Call] = {
        "geo": lambda: random_walk(rowptr, col, start, length, num_walks, seed=0),
        "torch": lambda: torch_walk(rowptr, col, start, length, num_walks),
    }
    if num_nodes <= SMALL and args.device == "cpu":
        graph = _networkx_graph(edge_index, num_nodes)
        rows = [col[a:b].tolist() for a, b in zip(rowptr.tolist(), rowptr[1:].tolist(), strict=False)]
        starts = [v for v in range(num_nodes) for _ in range(num_walks)]
        calls["networkx"] = lambda: [networkx_walk(graph, v, length) for v in starts]
        calls["lists"] = lambda: [list_walk(rows, v, length) for v in starts]
    times = interleave(calls, args.rounds, 1, _clock(args), args.seconds)
    cells = [*_peer(times, "networkx", num_nodes, args), *_peer(times, "lists", num_nodes, args)[:2]]
    cells += _peer(times, "torch", num_nodes, args)
    fits = col.is_cuda and rowptr.nbytes + col.nbytes <= torch.cuda.get_device_properties(col.device).L2_cache_size
    speed = num_nodes * num_walks * length / times["geo"].median / 1e3
    return [f"N = {num_nodes}, {num_walks} each", str(times["geo"]), *cells, f"{speed:.0f}", "10000" if fits else ""]


def token_row(num_nodes: int, args: argparse.Namespace) -> list[str]:
    """A line of the second table: all token sequences of a graph."""
    steps, num_walks, repeats = args.tokens
    edge_index, rowptr, col = random_graph(num_nodes, args.degree, args.device)
    data = Data(edge_index=edge_index, num_nodes=num_nodes)
    transform, start = AddWalkTokens(steps, num_walks, repeats), torch.arange(num_nodes, device=col.device)
    out = transform(data)
    check_tokens(out, rowptr, col, steps, num_walks, repeats)
    counts = [out.token_node_id.numel(), out.token_edge_id.numel()]
    label = f"N = {num_nodes}, {out.token_size.numel()} tokens"
    del out

    def vectorised() -> tuple[Tensor, ...]:
        walks = torch_walk(rowptr, col, start, steps, steps * repeats * num_walks)
        return torch_tokens(rowptr, col, walks, num_walks, repeats)

    calls: dict[str, Call] = {"geo": lambda: transform(data), "torch": vectorised}
    if num_nodes <= SMALL and args.device == "cpu":
        graph = _networkx_graph(edge_index, num_nodes)
        calls["networkx"] = lambda: networkx_tokens(graph, steps, num_walks, repeats)
    times = interleave(calls, args.rounds, 1, _clock(args), args.seconds)
    cells = [*_peer(times, "networkx", num_nodes, args), *_peer(times, "torch", num_nodes, args)]
    return [label, str(times["geo"]), *cells, *map(str, counts)]


def _clock(args: argparse.Namespace) -> str:
    return "cuda" if args.device == "cuda" else str(args.clock)


def _peer(times: dict[str, Timing], name: str, num_nodes: int, args: argparse.Namespace) -> list[str]:
    """A peer's time, its ratio to ours, and the ratio wanted on the CPU."""
    if name not in times:
        return ["not available" if args.device == "cuda" else "", "", ""]
    ratio = f"{times[name].median / times['geo'].median:.1f}"
    target = "100" if name == "networkx" else "5" if num_nodes <= 100_000 else "3"
    return [str(times[name]), ratio, target if args.device == "cpu" else ""]


# -- peers -------------------------------------------------------------------------------------------------------------
def torch_walk(rowptr: Tensor, col: Tensor, start: Tensor, length: int, num_walks: int) -> Tensor:
    """All walks at once, a step at a time."""
    node = start.repeat_interleave(num_walks)
    degree, out = rowptr.diff(), [node]
    for _ in range(length):
        choices = degree[node]
        edge = rowptr[node] + (torch.rand(node.size(0), device=node.device) * choices).long()
        node = torch.where(choices > 0, col[edge.clamp_(max=col.size(0) - 1)], node)
        out.append(node)
    return torch.stack(out, dim=1).view(start.size(0), num_walks, length + 1)


def torch_tokens(rowptr: Tensor, col: Tensor, walks: Tensor, num_walks: int, repeats: int) -> tuple[Tensor, ...]:
    """Tokens of walks [N, s m M, m + 1] and a root token: members, sizes, edges, their ends and numbers of edges."""
    device, steps, num_tokens = col.device, walks.size(2) - 1, walks.size(1) // num_walks
    lengths = steps - torch.arange(num_tokens, device=device) // repeats
    seen = torch.arange(steps + 1, device=device) <= lengths.view(-1, 1, 1)
    degree, parts, before = rowptr.diff(), [], 0
    neighbours = num_tokens * num_walks * (steps + 1) * col.size(0) // degree.size(0)
    for block in walks.split(max(1, BLOCK[device.type] // max(1, neighbours))):
        part = _torch_block(rowptr, col, degree, block.view(-1, num_tokens, num_walks, steps + 1), seen)
        part[3].add_(before)
        before += part[0].size(0)
        parts.append(part)
    return tuple(torch.cat(values, dim=-1) for values in zip(*parts, strict=True))


def _torch_block(rowptr: Tensor, col: Tensor, degree: Tensor, walks: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
    num_nodes, root = degree.size(0), walks[:, :1, :1, :1]
    visited = torch.where(seen, walks, root).flatten(2)
    visited = torch.cat([visited, root[..., 0].expand(-1, 1, visited.size(2))], dim=1).flatten(0, 1).sort(-1).values
    new = torch.ones_like(visited, dtype=torch.bool)
    torch.ne(visited[:, 1:], visited[:, :-1], out=new[:, 1:])
    size = new.sum(-1)
    token = torch.arange(size.size(0), device=col.device).view(-1, 1)
    keys, members = (token * num_nodes + visited)[new], visited[new]
    counts = degree[members]
    source = torch.arange(members.size(0), device=col.device).repeat_interleave(counts)
    edges = torch.arange(source.size(0), device=col.device)
    edges += (rowptr[members] - (counts.cumsum(0) - counts)).repeat_interleave(counts)
    wanted = (keys - members).repeat_interleave(counts) + col[edges]  # the target's key in the source's token
    target = torch.searchsorted(keys, wanted)
    inside = (keys[target.clamp(max=keys.size(0) - 1)] == wanted).nonzero().flatten()
    edges, ends = edges[inside], torch.stack([source[inside], target[inside]])
    return members, size, edges, ends, torch.bincount(keys[ends[0]] // num_nodes, minlength=size.size(0))


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
