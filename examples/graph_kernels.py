"""How well random walks estimate kernels on graphs: errors against the exact kernels, over walks and couplings.

From each node go m walks, which halt with probability p before each step; their deposits make sparse features Phi with
Phi Phi^T close to the kernel (exactly unbiased off the diagonal). Four couplings of the walks of a node:

  iid                   independent
  antithetic            walks halt in pairs, one of them early where the other goes on (https://arxiv.org/abs/2305.12470)
  repelling             walks at one node leave it along different edges (https://arxiv.org/abs/2310.04859)
  antithetic+repelling  both, the default of geo

and five kernels of U = c W, with W the normalised adjacency matrix:

  1-reg, 2-reg  (I - U)^-1 and (I - U)^-2, the regularised Laplacian
  2-step        (I + U)^2, the two-step random walk
  heat          exp(U)
  cos           cos(U) + sin(U), the inverse cosine

The exact kernels are SciPy's. What is measured is |Phi Phi^T - K| / |K| in the Frobenius norm, the mean over trials.

  python examples/graph_kernels.py                            # four graphs, half a minute
  python examples/graph_kernels.py --walks 4,16,64 --trials 20
  python examples/graph_kernels.py --graph edges.txt --c 0.5  # your own: a line for each edge, "u v" or "u v weight"
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from geo.kernels import (
    FeatureMap,
    Series,
    heat,
    inverse_cosine,
    normalized_adjacency,
    random_walk,
    regularised_laplacian,
)
from geo.ops import grf_walks
from geo.training import format_table, report, write_atomic

COUPLINGS = ("iid", "antithetic", "repelling", "antithetic+repelling")
KERNELS = ("1-reg", "2-reg", "2-step", "heat", "cos")
TERMS = 64  # of the modulation: beyond, c^k is below every error seen here
LARGEST = 2000  # nodes, up to which kernels are dense matrices
BLOCK = 1 << 22  # entries of dense matrices held at a time

# What a NumPy prototype of the same walks, written apart from this package, measured with c = 0.25 and p = 0.5:
# relative errors of iid walks, m = 2, 4, 8, 16, 20 trials; squared relative errors of each coupling, m = 8, 300 trials.
PROTOTYPE_TRIALS, PROTOTYPE_SQUARED_TRIALS = 20, 300
PROTOTYPE: dict[tuple[str, str], tuple[float, ...]] = {
    ("karate", "1-reg"): (0.180, 0.119, 0.087, 0.064),
    ("karate", "2-reg"): (0.367, 0.266, 0.179, 0.124),
    ("karate", "2-step"): (0.345, 0.241, 0.169, 0.120),
    ("karate", "heat"): (0.166, 0.118, 0.090, 0.059),
    ("karate", "cos"): (0.182, 0.129, 0.084, 0.060),
    ("Erdos-Renyi", "1-reg"): (0.177, 0.123, 0.086, 0.061),
    ("Erdos-Renyi", "2-reg"): (0.371, 0.256, 0.181, 0.123),
    ("Erdos-Renyi", "2-step"): (0.326, 0.233, 0.164, 0.114),
    ("Erdos-Renyi", "heat"): (0.165, 0.114, 0.082, 0.058),
    ("Erdos-Renyi", "cos"): (0.168, 0.123, 0.085, 0.061),
    ("binary tree", "1-reg"): (0.172, 0.119, 0.086, 0.059),
    ("binary tree", "2-reg"): (0.369, 0.249, 0.169, 0.117),
    ("binary tree", "2-step"): (0.306, 0.209, 0.146, 0.106),
    ("binary tree", "heat"): (0.159, 0.108, 0.079, 0.054),
    ("binary tree", "cos"): (0.157, 0.115, 0.080, 0.056),
    ("10-regular", "1-reg"): (0.180, 0.127, 0.092, 0.065),
    ("10-regular", "2-reg"): (0.384, 0.262, 0.187, 0.130),
    ("10-regular", "2-step"): (0.350, 0.243, 0.170, 0.120),
    ("10-regular", "heat"): (0.174, 0.122, 0.086, 0.060),
    ("10-regular", "cos"): (0.179, 0.128, 0.089, 0.063),
}
PROTOTYPE_SQUARED: dict[tuple[str, str], tuple[float, ...]] = {
    ("karate", "2-reg"): (3.42e-2, 2.88e-2, 2.15e-2, 1.77e-2),
    ("karate", "heat"): (7.09e-3, 6.42e-3, 4.21e-3, 3.51e-3),
    ("Erdos-Renyi", "2-reg"): (3.27e-2, 2.71e-2, 1.54e-2, 1.03e-2),
    ("Erdos-Renyi", "heat"): (6.76e-3, 5.73e-3, 2.64e-3, 1.56e-3),
    ("binary tree", "2-reg"): (2.96e-2, 1.98e-2, 1.53e-2, 7.18e-3),
    ("binary tree", "heat"): (6.03e-3, 4.21e-3, 2.51e-3, 1.08e-3),
    ("10-regular", "2-reg"): (3.46e-2, 3.26e-2, 2.36e-2, 2.31e-2),
    ("10-regular", "heat"): (7.47e-3, 7.08e-3, 4.73e-3, 4.72e-3),
}
PROTOTYPE_WALKS, PROTOTYPE_SQUARED_WALKS = (2, 4, 8, 16), 8
Graph = tuple[Tensor, Tensor | None, int]  # edge_index in both directions, weights, number of nodes
Errors = dict[tuple[str, str, str, int], np.ndarray]  # by graph, kernel, coupling, walks: one for each trial


def graphs() -> dict[str, Graph]:
    """The four graphs of the published experiments that networkx has."""
    random = nx.erdos_renyi_graph(100, 0.04, seed=3)
    drawn = {
        "karate": nx.karate_club_graph(),
        "Erdos-Renyi": random.subgraph(max(nx.connected_components(random), key=len)),
        "binary tree": nx.balanced_tree(2, 6),
        "10-regular": nx.random_regular_graph(10, 100, seed=0),
    }
    return {name: _both_ways(list(nx.convert_node_labels_to_integers(g).edges)) for name, g in drawn.items()}


def read_graph(path: Path) -> Graph:
    """The graph of a file with a line for each edge: two names of nodes, and maybe a weight."""
    number: dict[str, int] = {}
    pairs: dict[tuple[int, int], float] = {}
    for at, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            if len(words) not in (2, 3):
                raise ValueError
            weight = float(words[2]) if len(words) == 3 else 1.0
        except ValueError:
            raise SystemExit(f"{path}, line {at}: expected 'u v' or 'u v weight', got {line!r}") from None
        u, v = (number.setdefault(word, len(number)) for word in words[:2])
        pairs[min(u, v), max(u, v)] = weight  # an edge that stands twice, or once in each direction, is one edge
    if not pairs:
        raise SystemExit(f"{path}: holds no edge; expected a line 'u v' or 'u v weight' for each")
    if len(number) > LARGEST:
        raise SystemExit(f"{path}: {len(number)} nodes, but exact kernels are computed up to {LARGEST}")
    return _both_ways(list(pairs), list(pairs.values()))


def _both_ways(pairs: list[tuple[int, int]], weights: list[float] | None = None) -> Graph:
    ends = torch.tensor(pairs).t()
    proper = ends[0] != ends[1]  # a loop has one direction
    edge_index = torch.cat([ends, ends[:, proper].flip(0)], dim=1)
    weight = None if weights is None else torch.cat([torch.tensor(weights), torch.tensor(weights)[proper]])
    return edge_index, weight, int(ends.max()) + 1


def series_of(c: float) -> dict[str, Series]:
    """The five kernels as series in W, up to constant factors."""
    s = math.sqrt(c / (1 - c))
    return {
        "1-reg": regularised_laplacian(s, 1.0),
        "2-reg": regularised_laplacian(s, 2.0),
        "2-step": random_walk(2, 1 + 1 / c),
        "heat": heat(c),
        "cos": inverse_cosine(c),
    }


def exact_kernels(graph: Graph, c: float) -> dict[str, np.ndarray]:
    """The five kernels as dense matrices, with NumPy and SciPy alone."""
    edge_index, weight, num_nodes = graph
    u = np.zeros((num_nodes, num_nodes))
    u[edge_index[0], edge_index[1]] = 1.0 if weight is None else weight
    degree = np.abs(u).sum(1)
    u = c * u / np.sqrt(np.outer(degree, degree))
    one = np.eye(num_nodes)
    inverse = np.linalg.inv(one - u)
    return {
        "1-reg": inverse,
        "2-reg": inverse @ inverse,
        "2-step": (one + u) @ (one + u),
        "heat": scipy.linalg.expm(u),
        "cos": scipy.linalg.cosm(u) + scipy.linalg.sinm(u),
    }


def estimates(graph: Graph, args: argparse.Namespace, coupling: str, num_walks: int, seed: int) -> Iterator[FeatureMap]:
    """Features of every trial, some trials at a time: copies of the graph side by side have walks of their own."""
    edge_index, weight, num_nodes = graph
    at_once = max(1, BLOCK // num_nodes**2)
    for first in range(0, args.trials, at_once):
        copies = min(at_once, args.trials - first)
        shift = (torch.arange(copies) * num_nodes).repeat_interleave(edge_index.size(1))
        weights = None if weight is None else weight.repeat(copies)
        matrix = normalized_adjacency(edge_index.repeat(1, copies) + shift, weights, copies * num_nodes)
        deposits = grf_walks(
            *matrix, num_walks=num_walks, seed=seed + first, p_halt=args.p_halt, coupling=coupling, max_length=TERMS - 1
        )
        yield FeatureMap(deposits._replace(col=deposits.col % num_nodes), num_nodes, TERMS)


def measure(name: str, graph: Graph, args: argparse.Namespace) -> Errors:
    """Relative errors on one graph."""
    exact = {kernel: torch.from_numpy(k).float() for kernel, k in exact_kernels(graph, args.c).items()}
    modulations = {kernel: series.modulation(TERMS) for kernel, series in series_of(args.c).items()}
    out: Errors = {}
    for coupling in COUPLINGS:
        for num_walks in args.walks:
            seed = 1_000_000 * args.seed + 1_000 * num_walks
            found: dict[str, list[Tensor]] = {kernel: [] for kernel in args.kernels}
            for features in estimates(graph, args, coupling, num_walks, seed):
                for kernel in args.kernels:
                    k = exact[kernel]
                    phi = features(modulations[kernel]).to_dense().view(-1, *k.shape)
                    off = torch.linalg.matrix_norm(phi @ phi.mT - k) / torch.linalg.matrix_norm(k)
                    found[kernel].append(off)
            for kernel, parts in found.items():
                out[name, kernel, coupling, num_walks] = torch.cat(parts).double().numpy()
    return out


def deviation(ours: np.ndarray, theirs: float, trials: int, digits: float) -> float:
    """The difference of two means in units of its standard error; ``theirs`` was rounded to ``digits``."""
    spread = ours.std(ddof=1) if len(ours) > 1 else ours.mean()
    return float((ours.mean() - theirs) / math.hypot(spread * math.sqrt(1 / len(ours) + 1 / trials), digits / 3.5))


def compare(errors: Errors, args: argparse.Namespace) -> tuple[list[list[str]], list[list[str]], list[float]]:
    """Our tables beside the prototype's: errors over walks, squared errors over couplings, and all deviations."""
    known = args.trials >= PROTOTYPE_TRIALS and math.isclose(args.c, 0.25) and math.isclose(args.p_halt, 0.5)
    walks, squared, off = [], [], []
    names = list(dict.fromkeys(key[0] for key in errors))
    for name, kernel in ((name, kernel) for name in names for kernel in args.kernels):
        cells = []
        for num_walks in args.walks:
            ours = errors[name, kernel, "iid", num_walks]
            cell = f"{ours.mean():.3f}"
            if known and num_walks in PROTOTYPE_WALKS and (name, kernel) in PROTOTYPE:
                theirs = PROTOTYPE[name, kernel][PROTOTYPE_WALKS.index(num_walks)]
                off.append(deviation(ours, theirs, PROTOTYPE_TRIALS, 1e-3))
                cell += f" / {theirs:.3f}"
            cells.append(cell)
        walks.append([name, kernel, *cells])
        cells, m = [], args.at
        for place, coupling in enumerate(COUPLINGS):
            ours = errors[name, kernel, coupling, m] ** 2
            cell = f"{ours.mean():.2e}"
            if known and m == PROTOTYPE_SQUARED_WALKS and (name, kernel) in PROTOTYPE_SQUARED:
                theirs = PROTOTYPE_SQUARED[name, kernel][place]
                off.append(
                    deviation(ours, theirs, PROTOTYPE_SQUARED_TRIALS, 10.0 ** (math.floor(math.log10(theirs)) - 2))
                )
                cell += f" / {theirs:.2e}"
            cells.append(cell)
        squared.append([name, kernel, *cells, f"{gain(errors, name, kernel, m):.2f}"])
    return walks, squared, off


def gain(errors: Errors, name: str, kernel: str, num_walks: int) -> float:
    """How many times less squared error the default coupling has than independent walks."""
    iid, both = (errors[name, kernel, coupling, num_walks] for coupling in (COUPLINGS[0], COUPLINGS[-1]))
    return float((iid**2).mean() / (both**2).mean())


def slope(errors: Errors, name: str, kernel: str, coupling: str, walks: list[int]) -> float:
    """Of log error against log walks."""
    return float(np.polyfit(np.log(walks), [np.log(errors[name, kernel, coupling, m].mean()) for m in walks], 1)[0])


def summary(args: argparse.Namespace) -> list[str]:
    """The kernels of the plot and of the last table."""
    return [kernel for kernel in ("2-reg", "heat") if kernel in args.kernels] or args.kernels[:1]


def picture(errors: Errors, args: argparse.Namespace) -> None:
    """Errors over walks for two kernels, with deciles, and the gain of the default coupling for all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, shown = list(dict.fromkeys(key[0] for key in errors)), summary(args)
    figure, axes = plt.subplots(
        len(shown),
        len(names),
        figsize=(3.1 * len(names) + 1.2, 3.0 * len(shown) + 0.4),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for row, kernel in zip(axes, shown, strict=True):
        for axis, name in zip(row, names, strict=True):
            for coupling in COUPLINGS:
                runs = [errors[name, kernel, coupling, m] for m in args.walks]
                (line,) = axis.plot(args.walks, [run.mean() for run in runs], "o-", ms=3, lw=1.2, label=coupling)
                low, high = np.array([np.quantile(run, (0.1, 0.9)) for run in runs]).T
                axis.fill_between(args.walks, low, high, color=line.get_color(), alpha=0.12, lw=0)
            first = errors[name, kernel, "iid", args.walks[0]].mean()
            guide = [1.15 * first * math.sqrt(args.walks[0] / m) for m in args.walks]
            axis.plot(args.walks, guide, "k--", lw=0.8, label="slope -1/2")
            axis.set(xscale="log", yscale="log", xticks=args.walks, xticklabels=args.walks)
            axis.xaxis.minorticks_off()
            axis.set_title(f"{name}, {kernel}", fontsize=10)
        row[0].set_ylabel("relative Frobenius error")
    for axis in axes[-1]:
        axis.set_xlabel("walks from each node")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(
        f"Phi Phi^T against the exact kernel, c = {args.c:g}, p = {args.p_halt:g}: mean and deciles", fontsize=11
    )
    figure.tight_layout()
    with write_atomic(args.out / "errors.png") as path:
        figure.savefig(path, dpi=130)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    width = 0.8 / len(args.kernels)
    for place, kernel in enumerate(args.kernels):
        x = [at + (place - (len(args.kernels) - 1) / 2) * width for at in range(len(names))]
        axis.bar(x, [gain(errors, name, kernel, args.at) for name in names], width, label=kernel)
    axis.axhline(1, color="0.3", lw=0.8)
    axis.set(xticks=range(len(names)), xticklabels=names, title=f"{args.at} walks from each node")
    axis.set_ylabel("squared error, iid over\nantithetic+repelling")
    axis.legend(fontsize=8, ncols=len(args.kernels), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.tight_layout()
    with write_atomic(args.out / "gain.png") as path:
        figure.savefig(path, dpi=130)
    plt.close(figure)


def _walks(text: str) -> list[int]:
    try:
        walks = sorted({int(word) for word in text.split(",")})
    except ValueError:
        walks = [0]
    if walks[0] < 1 or any(m % 2 for m in walks):
        raise argparse.ArgumentTypeError(
            f"expected even numbers with commas (antithetic walks are pairs), got {text!r}"
        )
    return walks


def _kernels(text: str) -> list[str]:
    names = [word.strip() for word in text.split(",") if word.strip()]
    if unknown := [name for name in names if name not in KERNELS]:
        raise argparse.ArgumentTypeError(
            f"expected names of {', '.join(KERNELS)} with commas, got {', '.join(unknown)}"
        )
    return names or list(KERNELS)


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, help="file with a line 'u v' or 'u v weight' for each edge")
    parser.add_argument(
        "--walks", type=_walks, default="2,4,8,16,32,64", help="numbers of walks from each node (default: %(default)s)"
    )
    parser.add_argument(
        "--kernels",
        type=_kernels,
        default=",".join(KERNELS),
        help=f"of {', '.join(KERNELS)} with commas (default: all)",
    )
    parser.add_argument("--c", type=float, default=0.25, help="U = c W (default: %(default)s)")
    parser.add_argument("--p-halt", type=float, default=0.5, help="probability to halt (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=300, help="of each setting (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="two trials of few walks: does it run at all?")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/graph_kernels"), help="folder for plots and table (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.smoke:
        args.trials, args.walks = 2, [2, 8]
    for flag in ("trials", "threads"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag} must be at least 1, got {value}")
    if not 0 < args.p_halt < 1:
        parser.error(f"--p-halt must be between 0 and 1, both excluded, got {args.p_halt}")
    # The variance is finite where c < r sqrt(1 - p), with r the radius of convergence of the kernel's root.
    for kernel, radius in {"1-reg": 1.0, "2-reg": 1.0, "cos": math.pi / 4}.items():
        largest = radius * math.sqrt(1 - args.p_halt)
        if kernel in args.kernels and not 0 < args.c < largest:
            parser.error(
                f"--c must be above 0 and below {largest:.3f} with --p-halt {args.p_halt:g}, got {args.c:g}: beyond, "
                f"the variance of {kernel} is infinite; take a smaller --p-halt, or leave {kernel} out by --kernels"
            )
    if not 0 < args.c < 1:
        parser.error(f"--c must be between 0 and 1, both excluded, got {args.c:g}")
    if args.graph is not None and not args.graph.is_file():
        parser.error(f"--graph: there is no file {args.graph}")
    args.at = min(args.walks, key=lambda m: abs(m - PROTOTYPE_SQUARED_WALKS))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    errors: Errors = {}
    for name, graph in (graphs() if args.graph is None else {args.graph.stem: read_graph(args.graph)}).items():
        began = time.perf_counter()
        errors |= measure(name, graph, args)
        edges = (graph[0][0] <= graph[0][1]).sum()
        print(f"{name}: {graph[2]} nodes, {edges} edges, {time.perf_counter() - began:.1f} s", flush=True)
    names = list(dict.fromkeys(key[0] for key in errors))
    walks, squared, off = compare(errors, args)
    beside = " / the prototype's" if off else ""
    print(f"\nRelative Frobenius error of iid walks{beside}, over walks from each node\n")
    print(format_table(["graph", "kernel", *map(str, args.walks)], walks))
    print(f"\nSquared relative error{beside}, {args.at} walks from each node\n")
    print(format_table(["graph", "kernel", *COUPLINGS, "gain"], squared))
    picture(errors, args)

    setting = f"{args.at} walks, {args.trials} trials"
    rows: list[list[Any]] = []
    for name, kernel in ((name, kernel) for name in names for kernel in summary(args)):
        theirs = PROTOTYPE_SQUARED.get((name, kernel)) if off else None
        both = float((errors[name, kernel, COUPLINGS[-1], args.at] ** 2).mean())
        rows.append([f"{name}, {kernel}: squared error", f"{both:.2e}", f"{theirs[-1]:.2e}" if theirs else "", setting])
        ratio = f"{theirs[0] / theirs[-1]:.2f}" if theirs else ""
        rows.append([f"{name}, {kernel}: gain over iid", f"{gain(errors, name, kernel, args.at):.2f}", ratio, setting])
    gains = {
        (name, kernel, m): gain(errors, name, kernel, m)
        for name in names
        for kernel in args.kernels
        for m in args.walks
    }
    least = min(gains, key=lambda key: gains[key])
    rows.append(["smallest gain of all", f"{gains[least]:.2f}", "", f"{least[0]}, {least[1]}, {least[2]} walks"])
    if len(args.walks) > 1:
        for coupling in (COUPLINGS[0], COUPLINGS[-1]):
            slopes = [slope(errors, name, kernel, coupling, args.walks) for name in names for kernel in args.kernels]
            law = (
                "expected -0.5" if coupling == COUPLINGS[0] else "steeper than iid while walks enumerate the neighbours"
            )
            what = f"{args.walks[0]} to {args.walks[-1]} walks; {law}"
            rows.append([f"slope of log error, {coupling}", f"{min(slopes):.3f} to {max(slopes):.3f}", "", what])
    if off:
        near = f"{sum(abs(z) < 2 for z in off)} of {len(off)}"
        rows.append(["cells within 2 standard errors of the prototype's", near, "", "both tables above"])
        root = math.sqrt(sum(z * z for z in off) / len(off))
        rows.append(
            ["deviation in standard errors, root mean square", f"{root:.2f}", "", "1 where chance alone is at work"]
        )
    notes = [
        (
            f"Squared error: |Phi Phi^T - K|^2 / |K|^2 of antithetic+repelling walks; c {args.c:g}, p {args.p_halt:g}, "
            f"seed {args.seed}, {torch.get_num_threads()} threads. The prototype: NumPy, written apart from geo."
        ),
        f"Plots: {args.out}/errors.png, {args.out}/gain.png",
    ]
    report(args, "Kernels on graphs by random walks", ["metric", "this run", "prototype", "setting"], rows, notes)
    return rows


if __name__ == "__main__":
    main()
