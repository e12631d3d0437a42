"""Graph random features against walks in Python, vectorised PyTorch walks and exact kernels.

The op is first compared with its plain-PyTorch reference, bit for bit, in every coupling; the peers' estimates of the
powers of a matrix must have the error that ours have. The peer in Python walks over arrays and deposits into
dictionaries, on some of the starts, scaled up. The vectorised one advances all walks of a block of starts by
``torch.rand``, then sorts and sums; blocks have the size that is fastest. Both deposit what ours does: loads by start,
node and length. Memory is that of the process, so buffers count.
"""

from __future__ import annotations

import argparse
import array
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geo.bench import interleave, peak_extra_memory
from geo.bench.grf_page import draw, page_of
from geo.bench.settings import add_settings, run_settings
from geo.kernels import FeatureMap, SparseFeatures, StreamingWalks, heat, normalized_adjacency, regularised_laplacian
from geo.ops import grf_walks, grf_walks_reference

P_HALT = 0.2  # of the walks that are compared with peers
FEATURES: dict[str, Any] = {
    "p_halt": 0.5,
    "coupling": "antithetic+repelling",
}  # of features: what kernels have by default
WALKERS = 100_000  # walks that the peer in Python takes, at most
BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}  # walks that the vectorised peer advances at a time, the fastest on the CPU
TERMS = 64
COUPLINGS = ("iid", "antithetic", "repelling", "antithetic+repelling")
Csr = tuple[Tensor, Tensor, Tensor]
Call = Callable[[], Any]

INTRODUCTION = (
    "Random graphs of mean degree 10, matrix D^-1/2 A D^-1/2, float32. Median {} ms (first to last decile) of "
    "interleaved calls; 'x' is the peer's time over ours. Sampling: iid walks that halt with probability 0.2; deposits "
    f"summed by start, node and length; the peer in Python takes {WALKERS:,} walks at most, its time is scaled up. "
    "Features: coupling antithetic+repelling, halting with probability 0.5."
)


def main(argv: Sequence[str]) -> int:
    """Check, then time each setting in a process of its own, and print a page of tables."""
    parser = argparse.ArgumentParser(prog="python -m geo bench grf", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000], help="of the sampled graphs"
    )
    parser.add_argument("--walks", type=int, nargs="+", default=[100, 50, 16, 4], help="from each node of --nodes")
    parser.add_argument("--degree", type=int, default=10, help="mean degree")
    parser.add_argument(
        "--exact", type=int, nargs="*", default=[125, 250, 500, 1000, 2000, 3000], help="nodes of exact kernels"
    )
    parser.add_argument("--features", type=int, default=1_000_000, help="nodes of the features with 4 walks each")
    parser.add_argument("--stream", type=int, default=100_000, help="nodes of the graph that edges are added to")
    parser.add_argument("--plot", type=Path, help="draw time and error over the number of nodes into this PNG")
    parser.add_argument(
        "--parts", choices=list(PARTS), nargs="+", default=list(PARTS), help="what to measure (default: all)"
    )
    add_settings(parser, 10.0, "after which a candidate has one call a turn (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no GPU")
    if len(args.walks) != len(args.nodes):
        parser.error(f"--walks has {len(args.walks)} numbers and --nodes {len(args.nodes)}, but they go together")

    def page(result: dict[str, Any], tuned: bool) -> str:
        if args.plot is not None and not args.plot.is_file() and "exact" in args.parts:
            draw([row for row in result["rows"] if row["part"] == "exact"], args.plot)
        return page_of(result, args)

    if args.plot is not None:
        args.plot.unlink(missing_ok=True)
    return run_settings("grf", argv, args, INTRODUCTION, measure, page)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of all parts in one setting; memory first, while the process has freed nothing yet."""
    check(args.device)
    for part in PARTS:
        if part in args.parts:
            for row in PARTS[part](args):
                print(" ".join(map(str, row.values())), file=sys.stderr, flush=True)
                yield {"part": part, **row}


def random_graph(num_nodes: int, degree: int, device: str = "cpu", seed: int = 0) -> Csr:
    """``(rowptr, col, weight)`` of the normalised adjacency matrix."""
    return normalized_adjacency(_edges(num_nodes, degree, seed).to(device), num_nodes=num_nodes)


def _edges(num_nodes: int, degree: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(num_nodes, (2, num_nodes * degree // 2), generator=generator)
    return torch.cat([pairs, pairs.flip(0)], dim=1)


# -- checks ------------------------------------------------------------------------------------------------------------
def check(device: str) -> None:
    """Raise AssertionError unless ours has the reference's bits and the peers estimate powers of U as well as ours."""
    matrix = random_graph(300, 6, device)
    for coupling in COUPLINGS:
        options: dict[str, Any] = {"num_walks": 8, "seed": 1, "p_halt": P_HALT, "coupling": coupling}
        for ours, theirs in zip(grf_walks(*matrix, **options), grf_walks_reference(*matrix, **options), strict=True):
            if not torch.equal(ours, theirs):
                raise AssertionError(f"grf_walks differs from its reference, coupling={coupling!r}")
    num_nodes, num_walks = 40, 1000
    matrix = random_graph(num_nodes, 5, device)
    power = dense = to_dense(matrix)
    start = torch.arange(num_nodes, device=device)
    ptr, *rest = grf_walks(*matrix, num_walks=num_walks, seed=0, p_halt=P_HALT, coupling="iid")
    found = {
        "geo": (start.repeat_interleave(ptr.diff()), *rest),
        "PyTorch": torch_walks(matrix, start, num_walks, P_HALT),
        "Python": python_walks(*arrays(matrix), range(num_nodes), num_walks, P_HALT),
    }
    for length in range(1, 4):
        errors = {}
        for name, deposits in found.items():
            row, col, steps, value = (t.to(device) for t in deposits)
            at = steps == length
            estimate = torch.zeros_like(dense).index_put((row[at], col[at]), value[at].double(), accumulate=True)
            errors[name] = float((estimate - power).norm() / power.norm())
        for name, error in errors.items():
            if error > 0.5 or not 0.67 < error / errors["geo"] < 1.5:
                raise AssertionError(f"{name}: the error of U^{length} is {error:.3f}, ours is {errors['geo']:.3f}")
        power = power @ dense


def to_dense(matrix: Csr) -> Tensor:
    """A CSR matrix as a dense one in float64."""
    rowptr, col, weight = matrix
    num_nodes = rowptr.size(0) - 1
    row = torch.repeat_interleave(torch.arange(num_nodes, device=col.device), rowptr.diff())
    dense = torch.zeros(num_nodes, num_nodes, dtype=torch.float64, device=col.device)
    return dense.index_put((row, col), weight.double())


# -- peers -------------------------------------------------------------------------------------------------------------
def torch_walks(
    matrix: Csr, start: Tensor, num_walks: int, p_halt: float, block: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deposits (start, node, length, value), sorted; all walks of a block of starts at once, a step at a time."""
    rowptr, col, weight = matrix
    degree = rowptr.diff()
    factor = weight * degree.repeat_interleave(degree, output_size=weight.size(0)) / (1 - p_halt)
    at_once = max(1, (block or BLOCK[start.device.type]) // num_walks)
    parts = [_torch_block(rowptr, col, degree, factor, s, num_walks, p_halt) for s in start.split(at_once)]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))  # type: ignore[return-value]


def _torch_block(
    rowptr: Tensor, col: Tensor, degree: Tensor, factor: Tensor, start: Tensor, num_walks: int, p_halt: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_nodes = degree.size(0)
    node = start.repeat_interleave(num_walks)
    walker, load = node * num_nodes, torch.full_like(node, 1 / num_walks, dtype=factor.dtype)
    keys, loads = [(walker + node) * TERMS], [load]
    for length in range(1, TERMS):
        alive = ((torch.rand(node.size(0), device=node.device) >= p_halt) & (degree[node] > 0)).nonzero().flatten()
        if alive.size(0) == 0:
            break
        node, walker = node[alive], walker[alive]
        edge = rowptr[node] + (torch.rand(node.size(0), device=node.device) * degree[node]).long()
        load = load[alive] * factor[edge]
        node = col[edge]
        keys.append((walker + node) * TERMS + length)
        loads.append(load)
    key, order = torch.cat(keys).sort()
    key, slot = torch.unique_consecutive(key, return_inverse=True)
    value = torch.zeros(key.size(0), dtype=load.dtype, device=load.device).index_add_(0, slot, torch.cat(loads)[order])
    place = key // TERMS
    return place // num_nodes, place % num_nodes, key % TERMS, value


def python_walks(
    rowptr: Sequence[int],
    col: Sequence[int],
    weight: Sequence[float],
    start: Sequence[int],
    num_walks: int,
    p_halt: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same one walk after the other, into a dictionary for each start."""
    draw, go_on = random.random, 1 - p_halt
    starts, nodes, lengths, values = array.array("q"), array.array("q"), array.array("q"), array.array("f")
    for i in start:
        row: dict[tuple[int, int], float] = {}
        for _ in range(num_walks):
            node, length, load = i, 0, 1 / num_walks
            row[node, 0] = row.get((node, 0), 0.0) + load
            while True:
                begin = rowptr[node]
                degree = rowptr[node + 1] - begin
                if degree == 0 or draw() < p_halt:
                    break
                edge = begin + int(draw() * degree)
                load *= degree * weight[edge] / go_on
                node = col[edge]
                length += 1
                row[node, length] = row.get((node, length), 0.0) + load
        for node, length in sorted(row):
            starts.append(i)
            nodes.append(node)
            lengths.append(length)
            values.append(row[node, length])
    integers = (torch.frombuffer(numbers, dtype=torch.int64) for numbers in (starts, nodes, lengths))
    return *integers, torch.frombuffer(values, dtype=torch.float32)  # type: ignore[return-value]


def arrays(matrix: Csr) -> tuple[Any, Any, Any]:
    """As arrays of Python numbers, without an object for each."""
    rowptr, col, weight = (t.cpu().numpy().tobytes() for t in matrix)
    return array.array("q", rowptr), array.array("q", col), array.array("f", weight)


# -- parts -------------------------------------------------------------------------------------------------------------
def memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What sampling and features need at their worst moment, over what they return."""
    matrix = random_graph(args.features, args.degree, args.device)
    for label, options in (("iid, p 0.2", {"p_halt": P_HALT, "coupling": "iid"}), ("features' walks", FEATURES)):
        call = walks_call(matrix, 4, options)
        size = sum(t.nbytes for t in call())
        extra = peak_extra_memory(call, args.device)
        yield {"what": f"sampling, {label}", "MB": size / 1e6, "x": None if extra is None else (extra + size) / size}

    def all_of() -> tuple[Tensor, ...]:
        phi = features(matrix, 4)
        return phi.ptr, phi.col, phi.value

    size = sum(t.nbytes for t in all_of())
    extra = peak_extra_memory(all_of, args.device)
    yield {"what": "sampling and features", "MB": size / 1e6, "x": None if extra is None else (extra + size) / size}


def walks_call(matrix: Csr, num_walks: int, options: dict[str, Any], start: Tensor | None = None) -> Call:
    """A call of the op."""
    return lambda: grf_walks(*matrix, start, num_walks=num_walks, seed=0, **options)


def features(matrix: Csr, num_walks: int, seed: int = 0) -> SparseFeatures:
    """Features of the heat kernel."""
    deposits = grf_walks(*matrix, num_walks=num_walks, seed=seed, max_length=TERMS - 1, **FEATURES)
    return FeatureMap(deposits, matrix[0].size(0) - 1, TERMS)(heat(1.0).modulation(TERMS))


def sampling(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Independent walks against the peers."""
    settings = [(n, m, P_HALT) for n, m in zip(args.nodes, args.walks, strict=True)]
    if args.device == "cuda":
        settings.append((1_000_000, 16, 1 / 6))  # 5 steps on average
    for num_nodes, num_walks, p_halt in settings:
        matrix = random_graph(num_nodes, args.degree, args.device)
        start = torch.arange(num_nodes, device=args.device)
        options: dict[str, Any] = {"p_halt": p_halt, "coupling": "iid"}
        some = min(num_nodes, max(1, WALKERS // num_walks))
        calls = {
            "geo": walks_call(matrix, num_walks, options),
            "torch": lambda: torch_walks(matrix, start, num_walks, p_halt),  # noqa: B023 - called in this turn
        }
        if args.device == "cpu":
            numbers = arrays(matrix)
            calls["python"] = lambda: python_walks(*numbers, range(some), num_walks, p_halt)  # noqa: B023
        times = interleave(calls, args.rounds, 1, _clock(args), args.seconds)
        total = int(walks_call(matrix, num_walks, options)().ptr[-1])
        yield {
            "nodes": num_nodes,
            "walks": num_walks,
            "p": round(p_halt, 3),
            "deposits": total,
            **{name: times[name].__dict__ for name in times},
            "share": some / num_nodes,
        }


def exact(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time and error of features and a product, and of exact kernels and a product."""
    sizes = sorted({*args.exact, *args.nodes}) if args.exact else []
    for num_nodes in sizes:
        matrix = random_graph(num_nodes, args.degree, args.device)
        v = torch.randn(num_nodes, 1, device=args.device)
        calls: dict[str, Call] = {}
        for num_walks in (4, 16):
            calls[f"{num_walks} walks"] = partial(_kernel_product, matrix, num_walks, v)
        row: dict[str, Any] = {"nodes": num_nodes}
        if args.device == "cpu":
            calls["SciPy expm_multiply"] = _scipy_expm_multiply(matrix, v)
        if num_nodes in args.exact:
            dense = to_dense(matrix).float()
            one = torch.eye(num_nodes, device=args.device)
            calls["matrix_exp"] = lambda: torch.linalg.matrix_exp(dense) @ v  # noqa: B023
            calls["eigh"] = lambda: _by_eigenvalues(dense) @ v  # noqa: B023
            calls["inverse"] = lambda: torch.linalg.inv(one - dense / 2) @ v  # noqa: B023
            calls["solve"] = lambda: torch.linalg.solve(one - dense / 2, v)  # noqa: B023
            if args.device == "cpu":
                calls["SciPy expm"] = _scipy_expm(dense, v)
            kernel = torch.linalg.matrix_exp(dense)
            for num_walks in (4, 16):
                phi = features(matrix, num_walks, seed=1).to_dense()
                row[f"error {num_walks}"] = float((phi @ phi.t() - kernel).norm() / kernel.norm())
        times = interleave(calls, args.rounds, 3, _clock(args), args.seconds)
        yield row | {name: timing.__dict__ for name, timing in times.items()}


def _scipy_expm(dense: Tensor, v: Tensor) -> Call:
    import scipy.linalg

    numbers, vector = dense.numpy(), v.numpy()
    return lambda: scipy.linalg.expm(numbers) @ vector


def _scipy_expm_multiply(matrix: Csr, v: Tensor) -> Call:
    """Exact without a dense matrix; but each further vector costs as much as the first."""
    import scipy.sparse.linalg

    rowptr, col, weight = (t.numpy() for t in matrix)
    sparse = scipy.sparse.csr_array((weight, col, rowptr), shape=(v.size(0), v.size(0)))
    vector = v.numpy()
    return lambda: scipy.sparse.linalg.expm_multiply(sparse, vector)


def _kernel_product(matrix: Csr, num_walks: int, v: Tensor) -> Tensor:
    return _product(features(matrix, num_walks), v)


def _product(phi: SparseFeatures, v: Tensor) -> Tensor:
    return phi.matmul(phi.t_matmul(v))


def _by_eigenvalues(dense: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(dense)
    out: Tensor = (vectors * values.exp()) @ vectors.t()
    return out


def large(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Features of a large graph, step by step, and products with them."""
    edge_index = _edges(args.features, args.degree).to(args.device)
    matrix = normalized_adjacency(edge_index, num_nodes=args.features)
    deposits = walks_call(matrix, 4, FEATURES)()
    phi, v = features(matrix, 4), torch.randn(args.features, device=args.device)
    f = regularised_laplacian().modulation(TERMS)
    again = FeatureMap(deposits, args.features, TERMS)
    eight = torch.randn(args.features, 8, device=args.device)
    calls: dict[str, Call] = {
        "normalised adjacency matrix": lambda: normalized_adjacency(edge_index, num_nodes=args.features),
        "sampling": walks_call(matrix, 4, FEATURES),
        "features from the graph (sampling, pattern, modulation)": lambda: features(matrix, 4),
        "another modulation of the same walks": lambda: again(f),
        "product with a vector, Phi (Phi^T v)": lambda: _product(phi, v),
        "product with eight vectors": lambda: _product(phi, eight),
    }
    for name, timing in interleave(calls, args.rounds, 1, _clock(args), args.seconds).items():
        yield {"what": name, **timing.__dict__}


def streaming(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Edges come and go: an update against sampling anew."""
    options: dict[str, Any] = {"num_walks": 16, "seed": 0, "p_halt": 0.5, "coupling": "antithetic"}
    edge_index = _edges(args.stream, args.degree).to(args.device)
    for changed in (1, 10, 100, 1000):
        stream = StreamingWalks(edge_index, num_nodes=args.stream, **options)
        new = _new_edges(edge_index, args.stream, changed)
        toggle, after = Toggle(stream, new), torch.cat([edge_index, new], dim=1)
        toggle()
        anew = StreamingWalks(after, num_nodes=args.stream, **options)
        for ours, theirs in zip(stream.deposits, anew.deposits, strict=True):
            if not torch.equal(ours, theirs):
                raise AssertionError(f"an update of {changed} edges differs from sampling anew")

        def again() -> Any:
            graph = normalized_adjacency(after, num_nodes=args.stream)  # noqa: B023 - called in this turn
            return grf_walks(*graph, choice="rendezvous", **options)

        times = interleave({"update": toggle, "anew": again}, args.rounds, 2, _clock(args), args.seconds)
        yield {"edges": changed, "walks": toggle.walks, **{name: t.__dict__ for name, t in times.items()}}


def _new_edges(edge_index: Tensor, num_nodes: int, number: int) -> Tensor:
    """So many undirected edges that are not there, each in both directions."""
    there = (edge_index[0] * num_nodes + edge_index[1]).unique().cpu()
    drawn = torch.randint(num_nodes, (2, 2 * number + 10), generator=torch.Generator().manual_seed(1))
    drawn = drawn.sort(dim=0).values.unique(dim=1)
    drawn = drawn[:, (drawn[0] != drawn[1]) & ~torch.isin(drawn[0] * num_nodes + drawn[1], there)][:, :number]
    return torch.cat([drawn, drawn.flip(0)], dim=1).to(edge_index.device)


class Toggle:
    """Adds edges, then takes them away, and so on."""

    def __init__(self, stream: StreamingWalks, edges: Tensor) -> None:
        self.stream, self.edges, self.present, self.walks = stream, edges, False, 0

    def __call__(self) -> None:
        """One update."""
        edges = self.edges
        done = self.stream.update(edges_removed=edges) if self.present else self.stream.update(edges_added=edges)
        self.present = not self.present
        self.walks = done.walk.size(0)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "memory": memory,
    "sampling": sampling,
    "exact": exact,
    "large": large,
    "streaming": streaming,
}


def _clock(args: argparse.Namespace) -> str:
    return "cuda" if args.device == "cuda" else str(args.clock)
