"""Gaussian processes on the nodes of a graph: a learned kernel against the heat and the Matern kernel.

The processes see the graph and the targets of some nodes, and predict those of the others with a standard deviation.
Their kernels are K = s F(W)^2, with W the normalised adjacency matrix and

  heat      F(x) = exp(t x / 2)                     one parameter, t
  matern    F(x) = (1 + 2 nu / kappa^2 - x)^(-nu/2)  two, nu and kappa
  learned   F(x) = f_0 + f_1 x + ... + f_8 x^8       nine, none of them assumed to be positive

all learned, with s and the noise, by the marginal likelihood of the training targets. K comes from random walks, so
that time and memory are linear in the number of nodes (https://arxiv.org/abs/2509.03691); beside it stands the same
process with the exact kernel, from the eigenvectors of W, where there are at most 4,000 nodes.

  waves     default: waves five nodes long on a grid of 30 x 30 nodes, a fifth of them measured, with noise
  smooth    the same with waves 25 nodes long
  cora      the topics of papers that cite each other, as regression on one-hot labels; features of papers are not read.
            20 papers of each topic are known. citeseer and pubmed alike. Files as PyG's Planetoid keeps them,
            DIR/Cora/raw/ind.cora.*

  python examples/graph_gp.py
  python examples/graph_gp.py --data smooth
  python examples/graph_gp.py --data cora --root DIR
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.nn.models import LabelPropagation
from tqdm import tqdm

from geo.datasets import CitationGraph, DamagedFileError
from geo.gp import GraphGP
from geo.kernels import GRFKernel, SparseFeatures, heat, matern, normalized_adjacency
from geo.nn import LearnableModulation
from geo.training import report, write_atomic

MODELS = {"heat": "heat", "matern": "Matern", "learned": "learned modulation"}
CITATIONS = ("cora", "citeseer", "pubmed")
WAVES = {"waves": 5.0, "smooth": 25.0}  # wavelengths in nodes
NOISE = 0.1  # standard deviation of the measurements; the waves have 1
LEARNED = 8  # longest walks of the learned modulation
EXACT_NODES = 4000
EXACT_LENGTH = 256  # terms of the exact series


class Task(NamedTuple):
    edge_index: Tensor  # [2, E], both directions
    targets: Tensor  # [N] or one-hot [N, C]; zero where a label is unknown
    split: Callable[[int], tuple[Tensor, Tensor]]  # number of a split -> training and test nodes
    classes: bool


# -- data --------------------------------------------------------------------------------------------------------------
def waves(args: argparse.Namespace) -> Task:
    """Plane waves of one length and all directions on a grid, measured with noise."""
    size = 10 if args.smoke else 30
    graph = nx.convert_node_labels_to_integers(nx.grid_2d_graph(size, size))
    edges = torch.tensor(list(graph.edges)).t()
    random = np.random.default_rng(args.seed)
    angle, phase = random.uniform(0, 2 * np.pi, (2, 30))
    place = np.stack(np.divmod(np.arange(size * size), size), axis=1)
    ahead = place @ np.stack([np.cos(angle), np.sin(angle)])
    field = np.cos(2 * np.pi / WAVES[args.data] * ahead + phase).sum(1)
    targets = torch.from_numpy(field / field.std() + NOISE * random.standard_normal(len(field)))

    def split(number: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(args.seed + number))
        return order[: len(order) // 5], order[len(order) // 5 :]

    return Task(torch.cat([edges, edges.flip(0)], dim=1), targets, split, False)


def citations(args: argparse.Namespace) -> Task:
    """A citation graph with labels. Split 0 is the published one, the others have as many nodes, drawn anew."""
    try:
        data = CitationGraph(args.root, args.data)[0]
    except (FileNotFoundError, DamagedFileError) as error:
        raise SystemExit(str(error)) from error
    targets = torch.zeros(data.num_nodes, int(data.y.max()) + 1, dtype=torch.float64)
    labelled = data.y >= 0
    targets[labelled, data.y[labelled]] = 1
    num_tested = int(data.test_mask.sum())

    def split(number: int) -> tuple[Tensor, Tensor]:
        if number == 0:
            return data.train_mask.nonzero().flatten(), data.test_mask.nonzero().flatten()
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(args.seed + number))
        order = order[labelled[order]]
        rank = targets[order].cumsum(0).mul(targets[order]).sum(1)  # the how many-th of its class
        first = rank <= 20
        return order[first], order[~first][:num_tested]

    return Task(data.edge_index, targets, split, True)


# -- models ------------------------------------------------------------------------------------------------------------
def modulation(name: str, args: argparse.Namespace, exact: bool) -> LearnableModulation:
    if name == "learned":
        return LearnableModulation(LEARNED, "free", init=heat(1.0)).double()
    length = EXACT_LENGTH if exact else args.length
    return LearnableModulation(length, name, init=heat(1.0) if name == "heat" else matern(1.5, 3.0)).double()


def amplitude(modulation: LearnableModulation, log_scale: Tensor, x: Tensor) -> Tensor:
    """Roots of the kernel's eigenvalues s F(x)^2, with the sign of F, at eigenvalues x of W."""
    powers = x.unsqueeze(1) ** torch.arange(modulation.max_length + 1)
    return (log_scale.exp() * modulation.scale()).sqrt() * (powers @ modulation())


class ExactGP(nn.Module):
    """The process of the exact kernel, from eigenvalues and eigenvectors of W, by Cholesky."""

    def __init__(self, spectrum: tuple[Tensor, Tensor], modulation: LearnableModulation) -> None:
        super().__init__()
        self.eigvals, self.eigvecs = spectrum
        self.modulation = modulation
        self.log_noise = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def roots(self, nodes: Tensor) -> Tensor:
        """Rows of the root of the kernel."""
        return self.eigvecs[nodes] * amplitude(self.modulation, self.log_scale, self.eigvals)

    def covariance(self) -> Tensor:
        roots = self.roots(self.nodes)
        return roots @ roots.t() + self.log_noise.exp() * torch.eye(len(roots), dtype=roots.dtype)

    def fit(self, nodes: Tensor, y: Tensor, steps: int, lr: float) -> list[float]:
        y = y.view(len(nodes), -1)
        self.nodes, self.offset = nodes, y.mean(0)
        self.y = y - self.offset
        optimizer = torch.optim.Adam(self.parameters(), lr)
        losses = []
        for _ in range(steps):
            factor = torch.linalg.cholesky(self.covariance())
            fit = (self.y * torch.cholesky_solve(self.y, factor)).sum() / 2
            size = self.y.size(1) * (factor.diagonal().log().sum() + len(nodes) * math.log(2 * math.pi) / 2)
            loss = (fit + size) / self.y.numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    @torch.no_grad()
    def predict(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        roots, factor = self.roots(nodes), torch.linalg.cholesky(self.covariance())
        across = self.roots(self.nodes) @ roots.t()
        mean = across.t() @ torch.cholesky_solve(self.y, factor) + self.offset
        solved = torch.linalg.solve_triangular(factor, across, upper=False)
        return mean, (roots.square().sum(1) - solved.square().sum(0)).clamp(min=0)


def train(name: str, task: Task, number: int, args: argparse.Namespace, spectrum: Any = None) -> dict[str, Any]:
    """Fit one process to one split, the exact one where a spectrum is given: scores, spectrum, predictions."""
    nodes, tested = task.split(number)
    targets = task.targets[nodes]
    spread = float((targets - targets.mean(0)).square().mean())
    began = time.process_time()
    model: Any
    if spectrum is not None:
        model = ExactGP(spectrum, modulation(name, args, exact=True))
        diagonal = model.roots(nodes).square().sum(1)
    else:
        kernel = GRFKernel(
            task.edge_index,
            heat(),  # gives way to the modulation
            num_nodes=len(task.targets),
            num_walks=args.walks,
            p_halt=args.p_halt,
            max_length=args.length,
            two_sets=False,
            generator=torch.Generator().manual_seed(args.seed + number),
            dtype=torch.float64,
        )
        model = GraphGP(kernel, modulation(name, args, exact=False), tol=1e-6)
        diagonal = kernel.with_modulation(model.modulation(), model.modulation.scale()).diag()[nodes]
    with torch.no_grad():  # at first the kernel has nine tenths of the targets' variance
        model.log_noise.fill_(math.log(0.1 * spread))
        model.log_scale.fill_(math.log(0.9 * spread / float(diagonal.mean())))
    losses = model.fit(nodes, targets, steps=args.steps, lr=args.lr / 2 if name == "learned" else args.lr)
    mean, variance = model.predict(tested)
    seconds = time.process_time() - began
    truth = task.targets[tested].view(len(tested), -1)
    mean, variance = mean.view(truth.shape), (variance + model.log_noise.detach().exp()).unsqueeze(1)
    whole = None if task.classes or number else model.predict(torch.arange(len(task.targets)))[0].flatten()
    x = torch.linspace(-1, 1, 201, dtype=torch.float64)
    with torch.no_grad():
        curve = amplitude(model.modulation, model.log_scale, x).square() + model.log_noise.exp()
    return {
        **scores(task, mean, variance, truth),
        "loss": statistics.mean(losses[-10:]),
        "seconds": seconds,
        "parameters": model.modulation.hyperparameters(),
        "curve": (x, curve),
        "z": ((mean - truth) / variance.sqrt()).flatten(),
        "whole": whole,
    }


def scores(task: Task, mean: Tensor, variance: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy or RMSE, and the negative logarithm of the predictive density of a target."""
    off = mean - truth
    nlpd = (off.square() / variance + torch.log(2 * math.pi * variance)).mean() / 2
    hit = (mean.argmax(1) == truth.argmax(1)).double().mean()
    return {"score": 100 * float(hit) if task.classes else float(off.square().mean().sqrt()), "nlpd": float(nlpd)}


def baseline(task: Task, number: int) -> dict[str, Any]:
    """The mean of the training targets; for labels label propagation, which says nothing about its certainty."""
    nodes, tested = task.split(number)
    targets = task.targets.view(len(task.targets), -1)
    truth, known = targets[tested], targets[nodes]
    if task.classes:
        spread = LabelPropagation(num_layers=50, alpha=0.9)
        mean = spread(targets.argmax(1), task.edge_index, nodes)[tested]
        return {"score": scores(task, mean, torch.ones(1), truth)["score"], "nlpd": None}
    return {**scores(task, known.mean(0).expand_as(truth), known.var(0), truth)}


# -- pictures ----------------------------------------------------------------------------------------------------------
def spectrum_plot(path: Path, runs: dict[str, list[Any]], task: Task, spectrum: Any, title: str) -> None:
    """Spectra of the kernels, noise included, each split a line, and what the targets have at each eigenvalue."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    curves = {name: [run["curve"] for run in found] for name, found in runs.items()}
    seen = [y for found in curves.values() for _, y in found]
    if spectrum is not None:
        eigvals, eigvecs = spectrum
        targets = task.targets.view(len(eigvals), -1)
        energy = (eigvecs.t() @ (targets - targets.mean(0))).square().mean(1)
        bins = torch.arange(len(eigvals)) * min(40, len(eigvals)) // len(eigvals)
        count = bins.bincount()
        x, y = (torch.zeros(len(count), dtype=torch.float64).index_add(0, bins, v) / count for v in (eigvals, energy))
        axis.plot(x, y, "k.", ms=5, label="all targets, mean over eigenvectors")
        seen.append(y[y > 0])
    for place, (name, found) in enumerate(curves.items()):
        for k, (x, y) in enumerate(found):
            axis.plot(x, y, f"C{place}", lw=1.2, alpha=1 if k == 0 else 0.4, label=MODELS[name] if k == 0 else None)
    low, high = float(torch.cat(seen).min()), float(torch.cat(seen).max())
    axis.set(yscale="log", ylim=(max(low, high * 1e-6) / 2, high * 2), xlim=(-1.02, 1.02), title=title)
    axis.set(xlabel="eigenvalue of W (near 1: smooth; near -1: neighbours opposite)", ylabel="variance")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def calibration_plot(path: Path, runs: dict[str, list[Any]], title: str) -> None:
    """How many test targets lie in the predicted intervals."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(4.8, 4.6), layout="constrained")
    nominal = torch.linspace(0.02, 0.99, 60, dtype=torch.float64)
    bound = math.sqrt(2) * torch.erfinv(nominal)
    for place, (name, found) in enumerate(runs.items()):
        for k, run in enumerate(found):
            share = (run["z"].abs().unsqueeze(0) <= bound.unsqueeze(1)).double().mean(1)
            label = MODELS[name] if k == 0 else None
            axis.plot(nominal, share, color=f"C{place}", lw=1.2, alpha=1 if k == 0 else 0.4, label=label)
    axis.plot([0, 1], [0, 1], "k--", lw=0.8, label="as it should be")
    axis.set(xlabel="probability of the predicted interval", ylabel="share of test targets in it", title=title)
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left")
    _save(figure, path)


def maps(path: Path, task: Task, runs: dict[str, list[Any]]) -> None:
    """The grid: all targets, those measured in split 0, and what each process makes of them."""
    plt = _pyplot()
    size = math.isqrt(len(task.targets))
    seen = torch.full_like(task.targets, math.nan)
    nodes = task.split(0)[0]
    seen[nodes] = task.targets[nodes]
    shown = {"truth (with noise)": task.targets, "measured": seen}
    shown |= {f"{MODELS[name]}, RMSE {found[0]['score']:.2f}": found[0]["whole"] for name, found in runs.items()}
    figure, axes = plt.subplots(1, len(shown), figsize=(2.6 * len(shown), 2.9), layout="constrained")
    for axis, (title, values) in zip(axes, shown.items(), strict=True):
        image = axis.imshow(values.view(size, size).numpy(), cmap="RdBu", vmin=-2.5, vmax=2.5)
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[], facecolor="0.85")
    figure.colorbar(image, ax=axes, shrink=0.8)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    _pyplot().close(figure)


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=[*WAVES, *CITATIONS], default="waves", help="(default: %(default)s)")
    parser.add_argument("--root", type=Path, default=None, help="folder of PyG's Planetoid, for citation graphs")
    parser.add_argument(
        "--models", default="all", help=f"all, or of {', '.join(MODELS)} with commas (default: %(default)s)"
    )
    parser.add_argument(
        "--splits", type=int, default=3, help="draws of training nodes and walks (default: %(default)s)"
    )
    parser.add_argument(
        "--walks", type=int, default=None, help="walks from each node, even (default: 512 on grids, else 256)"
    )
    parser.add_argument(
        "--p-halt", type=float, default=0.1, help="probability that a walk ends at each step (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=32, help="longest walks of heat and Matern kernels (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100, help="of Adam (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, help="its rate; half of it if learned (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of field, splits and walks (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a small grid, two steps: does it run at all?")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/graph_gp"), help="folder for plots and table (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    names = list(MODELS) if args.models == "all" else [name.strip() for name in args.models.split(",") if name.strip()]
    if not names or [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {args.models}")
    if args.data in CITATIONS and args.root is None:
        parser.error(f"--data {args.data} needs --root, the folder that PyG's Planetoid was given")
    if args.walks is None:
        args.walks = 512 if args.data in WAVES else 256
    if args.smoke:
        args.walks, args.steps, args.splits = 16, 2, 2
    for name in ("splits", "walks", "steps", "threads", "length"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.walks % 2:
        parser.error(f"--walks must be even, as antithetic walks come in pairs; got {args.walks}")
    if not 0 < args.p_halt < 1:
        parser.error(f"--p-halt must be between 0 and 1, got {args.p_halt}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # the probes of GraphGP.fit

    task = waves(args) if args.data in WAVES else citations(args)
    size = len(task.targets)
    spectrum = None
    if size <= EXACT_NODES:
        rowptr, col, weight = normalized_adjacency(task.edge_index, num_nodes=size, dtype=torch.float64)
        eigvals, eigvecs = torch.linalg.eigh(SparseFeatures(rowptr, col, weight, size).to_dense())
        spectrum = eigvals.clamp(-1, 1), eigvecs
    known, tested = (len(part) for part in task.split(0))
    print(
        f"{args.data}: {size} nodes, {task.edge_index.size(1) // 2} edges, {known} known, {tested} tested", flush=True
    )
    runs: dict[str, list[Any]] = {name: [] for name in names}
    exact: dict[str, list[Any]] = {name: [] for name in names}
    bar = tqdm(total=args.splits * len(names) * (1 if spectrum is None else 2), disable=not sys.stderr.isatty())
    metric, digits = ("accuracy (%)", 1) if task.classes else ("RMSE", 3)
    for number in range(args.splits):
        for name in names:
            bar.set_description(f"split {number}, {name}")
            run = train(name, task, number, args)
            runs[name].append(run)
            bar.update()
            line = f"split {number}, {MODELS[name]}: {metric} {run['score']:.{digits}f}, NLPD {run['nlpd']:.3f}"
            if spectrum is not None:
                exact[name].append(train(name, task, number, args, spectrum))
                bar.update()
                line += f" (exact {exact[name][-1]['score']:.{digits}f}, {exact[name][-1]['nlpd']:.3f})"
            bar.write(f"{line}, {run['seconds']:.1f} CPU s")
    bar.close()

    def summary(found: list[Any], key: str, places: int) -> list[object]:
        values = [run[key] for run in found if run[key] is not None]
        mean = round(statistics.mean(values), places) if values else None
        return [mean, round(statistics.stdev(values), places) if len(values) > 1 else None]

    plain = [baseline(task, number) for number in range(args.splits)]
    label = "label propagation" if task.classes else "mean of the known targets"
    rows: list[list[object]] = [
        [label, *summary(plain, "score", digits), *summary(plain, "nlpd", 3), None, None, None, "-", None]
    ]
    for name, found in runs.items():
        reference = [summary(exact[name], key, places)[0] for key, places in (("score", digits), ("nlpd", 3))]
        parameters = [
            f"{key} {statistics.mean(run['parameters'][key] for run in found):.3g}" for key in found[0]["parameters"]
        ]
        loss, seconds = summary(found, "loss", 3)[0], summary(found, "seconds", 1)[0]
        measured = [*summary(found, "score", digits), *summary(found, "nlpd", 3)]
        rows.append([MODELS[name], *measured, *reference, loss, ", ".join(parameters) or "-", seconds])
    title = f"{args.data}, {known} of {size} nodes known"
    spectrum_plot(args.out / "spectra.png", runs, task, spectrum, title)
    calibration_plot(args.out / "calibration.png", runs, title)
    plots = [f"{args.out}/spectra.png", f"{args.out}/calibration.png"]
    if not task.classes:
        maps(args.out / "maps.png", task, runs)
        plots.append(f"{args.out}/maps.png")
    notes = [
        f"Means over {args.splits} splits, seeds from {args.seed}; std: between splits; exact: the exact kernel.",
        "NLPD: of a test target, natural logarithms" + ("; labels are one-hot targets." if task.classes else "."),
        f"Loss: negative log marginal likelihood of a known target, at the end of {args.steps} steps of Adam.",
        f"{args.walks} walks from each node, halting probability {args.p_halt}, lengths up to {args.length}.",
        f"Plots: {', '.join(plots)}",
    ]
    columns = [metric, "std", "NLPD", "std", f"exact: {metric}", "exact: NLPD", "loss", "parameters", "CPU s"]
    report(args, f"Gaussian processes on {title}", ["kernel", *columns], rows, notes)
    return rows


if __name__ == "__main__":
    main()
