"""A training step of Graph Mamba as the graph grows, beside attention over all nodes (GPSConv of PyG) and GatedGCN.

Full-batch steps, forward and backward, of networks of equal width and depth on random graphs; time and the peak of
memory beyond what is there before. A step that would take longer or need more memory than there is, judged by the
growth from the size before, is not run and says so.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GPSConv, SAGEConv

from geo.bench import Timing, interleave, machine, peak_extra_memory, table
from geo.nn import GatedGCN, GraphMamba
from geo.testing import assert_close
from geo.transforms import AddWalkTokens

TOKENS: dict[str, Any] = {"walk_length": 2, "num_walks": 4, "num_repeats": 2}
GROWTH = {"GPSConv (attention)": 2.0}  # the power of the nodes that time and memory grow with, 1 for the others


class _GPS(nn.Module):
    """PyG's GPS layers: message passing and attention over all nodes."""

    def __init__(self, in_channels: int, hidden_channels: int, num_layers: int, out_channels: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(in_channels, hidden_channels)
        self.convs = nn.ModuleList(
            GPSConv(hidden_channels, SAGEConv(hidden_channels, hidden_channels), heads=4, norm="layer_norm")
            for _ in range(num_layers)
        )
        self.head = nn.Linear(hidden_channels, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.encoder(x)
        for conv in self.convs:
            x = conv(x, edge_index, batch)
        out: Tensor = self.head(x)
        return out


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print a page of tables."""
    parser = argparse.ArgumentParser(prog="python -m geo bench graph_mamba", description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="*", default=[1000, 10000, 100000, 1000000])
    parser.add_argument("--degree", type=int, default=8, help="edges that end in a node, on average")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="turns of each network")
    parser.add_argument("--seconds", type=float, default=120.0, help="longest step")
    parser.add_argument(
        "--memory", type=float, default=None, help="most memory of a step in GiB (default: 80 %% of free)"
    )
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: with --threads 1 on a busy machine"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    memory = _free(args.device) * 0.8 if args.memory is None else args.memory * 2**30
    clock = "cuda" if args.device == "cuda" else args.clock
    _check_equality(args)
    rows = [["nodes", "network", f"step ({args.clock} ms)", "us a node", "peak memory (MiB)", "KiB a node"]]
    last: dict[str, tuple[int, float, float]] = {}
    for num_nodes in args.nodes:
        data = graph(num_nodes, args.degree)
        for name in ("Graph Mamba", "Graph Mamba, tokens", "GatedGCN", "GPSConv (attention)"):
            if why := _too_large(last.get(name), GROWTH.get(name, 1.0), num_nodes, args.seconds, memory):
                rows.append([f"{num_nodes:,}", name, why, "", "", ""])
                continue
            step = make_step(name, data, args)
            timing: Timing = interleave({name: step}, args.rounds, 1, clock, args.seconds)[name]
            peak = peak_extra_memory(step, args.device)
            cells = (
                ["not available", ""] if peak is None else [f"{peak / 2**20:.0f}", f"{peak / 2**10 / num_nodes:.1f}"]
            )
            rows.append([f"{num_nodes:,}", name, str(timing), f"{1e3 * timing.median / num_nodes:.1f}", *cells])
            last[name] = (num_nodes, timing.median / 1e3, float(peak or 0))
            del step
            gc.collect()
    print(
        f"## graph_mamba, {datetime.date.today().isoformat()}\n\n{machine(args.device)}\n\nForward and backward of "
        f"{args.layers} layers of {args.hidden} on random graphs of mean degree {args.degree}, float32; median "
        f"(first to last decile) of {args.rounds} steps. Tokens: m {TOKENS['walk_length']}, M {TOKENS['num_walks']}, "
        f"s {TOKENS['num_repeats']}, encoded by GatedGCN. Graph Mamba passes messages by GatedGCN, GPSConv by the "
        "cheaper SAGEConv (it takes no edge states), beside its attention of four heads.\n\n" + table(rows)
    )
    return 0


def graph(num_nodes: int, degree: int) -> Data:
    """A random undirected graph."""
    generator = torch.Generator().manual_seed(num_nodes)
    pairs = torch.randint(num_nodes, (2, num_nodes * degree // 2), generator=generator)
    edge_index = torch.cat([pairs, pairs.flip(0)], dim=1)
    return Data(x=torch.randn(num_nodes, 16, generator=generator), edge_index=edge_index)


def make_step(name: str, data: Data, args: argparse.Namespace) -> Callable[[], None]:
    """A training step of the network `name` on one graph."""
    torch.manual_seed(0)
    sizes = (16, args.hidden, args.layers, 2)
    if name == "Graph Mamba, tokens":
        data = AddWalkTokens(**TOKENS)(data)
    batch = Batch.from_data_list([data]).to(args.device)
    given: dict[str, Any] = {} if name == "GatedGCN" else {"batch": batch.batch}
    if name == "GatedGCN":
        net: nn.Module = GatedGCN(*sizes)
    elif name == "GPSConv (attention)":
        net = _GPS(*sizes)
    elif name == "Graph Mamba":
        net = GraphMamba(*sizes)
    else:
        net = GraphMamba(*sizes, walk_length=TOKENS["walk_length"])
        given["tokens"] = batch
    net = net.to(args.device).train()

    def step() -> None:
        net.zero_grad()
        net(batch.x, batch.edge_index, **given).square().mean().backward()

    return step


def _check_equality(args: argparse.Namespace) -> None:
    """Graph Mamba gives a graph the same output alone as in a batch."""
    graphs = [AddWalkTokens(**TOKENS)(graph(n, 4)) for n in (1, 7, 40)]
    for walk_length in (0, TOKENS["walk_length"]):
        net = GraphMamba(16, args.hidden, args.layers, 2, walk_length=walk_length, tie="wl").to(args.device).eval()

        def run(batch: Any, net: nn.Module = net, tokens: bool = walk_length > 0) -> Tensor:
            batch = batch.to(args.device)
            with torch.no_grad():
                out: Tensor = net(batch.x, batch.edge_index, batch=batch.batch, tokens=batch if tokens else None)
            return out

        alone = torch.cat([run(Batch.from_data_list([one])) for one in graphs])
        assert_close(run(Batch.from_data_list(graphs)), alone, msg="alone = in a batch")


def _too_large(
    last: tuple[int, float, float] | None, power: float, num_nodes: int, seconds: float, memory: float
) -> str | None:
    if last is None:
        return None
    growth = (num_nodes / last[0]) ** power
    if last[1] * growth > seconds:
        return f"not run: about {last[1] * growth:.0f} s"
    if last[2] * growth > memory:
        return f"not run: about {last[2] * growth / 2**30:.0f} GiB"
    return None


def _free(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
