"""Count the cycles of 3 to 6 nodes in random graphs, with one message-passing network and several encodings.

Message passing alone cannot count cycles; what it can count says what the positional encoding tells it. The graphs are
random regular graphs without some of their edges, made on the spot as in https://arxiv.org/abs/2002.04025, and the
network is the GINE of https://arxiv.org/abs/2310.02579, the same for all encodings:

  spe      stable and expressive encodings of the whole spectrum
  signnet  SignNet, made of all eigenvectors
  raw      eigenvectors as they are, with random signs in training
  rwpe     probabilities that random walks return
  none     no encoding

With --directed each edge has one direction, the cycles are directed and messages go along the edges, those inside spe,
too, whose spectrum is that of the graph without directions. Two more encodings:

  magnetic  filters of the magnetic Laplacian at each node, sum_k phi(lambda_k) |V_ik|^2 at three potentials with a
            few fixed phi, which depend on no choice of eigenvectors
  walks     probabilities that walks along the edges, and against them, return

One network learns all four counts. Two presets:

  small  graphs of 10 to 16 nodes and a network 32 wide: minutes on a CPU
  paper  1,500 graphs of 10 to 30 nodes and the paper's sizes; its graphs are another draw, so compare no numbers

  python examples/counting_cycles.py                      # all five
  python examples/counting_cycles.py --models spe,none --seeds 3
  python examples/counting_cycles.py --directed           # spe, magnetic, walks and none
  python examples/counting_cycles.py --preset paper --batch-size 128 --accelerator gpu
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import AddRandomWalkPE

from geo.datasets import CycleCounting
from geo.nn import GINE, SPE, EigenvectorPE, SignNet, pad_spectrum
from geo.training import (
    Supervised,
    curve_plot,
    fit,
    read_log,
    report,
    save_weights,
    start,
    training_flags,
    write_atomic,
)
from geo.transforms import AddDirectedRandomWalkPE, AddLaplacianSpectrum, AddMagneticLaplacianSpectrum

MODELS = {
    "spe": "SPE",
    "signnet": "SignNet",
    "raw": "eigenvectors, random signs",
    "rwpe": "random walks",
    "magnetic": "magnetic Laplacian",
    "walks": "directed random walks",
    "none": "no encoding",
}
UNDIRECTED = ("spe", "signnet", "raw", "rwpe", "none")
DIRECTED = ("spe", "magnetic", "walks", "none")
POTENTIALS = (0.05, 0.1, 0.2)
LENGTHS = (3, 4, 5, 6)
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "sizes": ((10, 6), (12, 6), (14, 5), (16, 5)),
        "train": 2000,
        "held": 500,
        "hidden": 32,
        "layers": 3,
        "channels": 8,
        "phi": (3, 16),
        "epochs": 30,
        "lr": 3e-3,
    },
    "paper": {
        "sizes": ((10, 6), (15, 6), (20, 5), (30, 5)),
        "train": 1500,
        "held": 1000,
        "hidden": 80,
        "layers": 4,
        "channels": 8,
        "phi": (4, 80),
        "epochs": 600,
        "lr": 1e-3,
    },
}


class MagneticFilters(nn.Module):
    """The diagonals of V diag(cos(k pi lambda / 2)) V^* at each potential, real and no matter which V, and an MLP."""

    def __init__(self, out_channels: int, hidden: int, orders: int = 12) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.register_buffer("frequency", math.pi / 2 * torch.arange(1.0, orders + 1), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(len(POTENTIALS) * orders, hidden), nn.ReLU(), nn.Linear(hidden, out_channels)
        )

    def forward(self, eigvals: Tensor, eigvecs: Tensor, edge_index: Tensor, batch: Tensor, eig_mask: Tensor) -> Tensor:
        filters = (eigvals.unsqueeze(-1) * self.frequency).cos() * eig_mask.unsqueeze(-1)  # [B, Q, K, F]
        share = eigvecs.square().sum(-1)  # [N, Q, K]
        return self.mlp(torch.einsum("nqk,nqkf->nqf", share, filters[batch]).flatten(1))


class Counter(nn.Module):
    """The network with its encoding, called with a batch."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        super().__init__()
        hidden, layers, norm = args.hidden, args.layers, args.norm
        phi_layers, phi_hidden = PRESETS[args.preset]["phi"]
        pe: nn.Module | None = None
        if name == "spe":
            pe = SPE(
                hidden,
                PRESETS[args.preset]["channels"],
                phi_hidden=phi_hidden,
                phi_layers=phi_layers,
                rho_hidden=hidden,
                rho_layers=layers,
                norm=norm,
            )
        elif name == "signnet":
            pe = SignNet(
                hidden, phi_hidden=hidden, phi_layers=layers, mlp_layers=3, rho_hidden=hidden, rho_layers=3, norm=norm
            )
        elif name == "raw":
            pe = EigenvectorPE(hidden, k=args.max_nodes, hidden_channels=hidden, num_layers=3, norm=norm)
        elif name == "magnetic":
            pe = MagneticFilters(hidden, hidden)
        pe_dim = {"rwpe": args.walk_length, "walks": 2 * args.walk_length}.get(name)
        self.name = name
        self.net = GINE(1, hidden, layers, len(LENGTHS), pe=pe, pe_dim=pe_dim, pool="sum", norm=norm)

    def forward(self, batch: Any) -> Tensor:
        net = self.net
        names = ("mag_eigvals", "mag_eigvecs") if self.name == "magnetic" else ("eigvals", "eigvecs")
        spectrum = None if net.pe is None else pad_spectrum(batch, batch.x.dtype, *names)
        pe = None if net.pe_dim is None else batch.pe
        return net(batch.x, batch.edge_index, None, batch.batch, spectrum, pe, batch.num_graphs)


def loss(prediction: Tensor, batch: Any) -> Tensor:
    return nn.functional.l1_loss(prediction, batch.y)


def load(args: argparse.Namespace) -> tuple[dict[str, list[Any]], Tensor]:
    """Graphs of each part with standardised counts, spectra and return probabilities; and the deviations."""
    train, held = (16, 8) if args.smoke else (args.train, args.held)
    sizes = PRESETS[args.preset]["sizes"]
    graphs = list(CycleCounting(num_graphs=train + 2 * held, sizes=sizes, directed=args.directed, seed=args.seed))
    began = time.perf_counter()
    graphs = AddLaplacianSpectrum(is_undirected=args.directed, dtype=torch.float32).transform_many(graphs)
    walks: Any = AddRandomWalkPE(args.walk_length, attr_name="pe")
    if args.directed:
        graphs = AddMagneticLaplacianSpectrum(q=POTENTIALS, relative_q=False, dtype=torch.float32).transform_many(
            graphs
        )
        walks = AddDirectedRandomWalkPE(args.walk_length, attr_name="pe")
    print(f"spectra of {len(graphs)} graphs: {time.perf_counter() - began:.2f} s")
    graphs = [walks(graph) for graph in graphs]
    counts = torch.cat([graph.y for graph in graphs[:train]])
    mean, std = counts.mean(0), counts.std(0)
    for graph in graphs:
        graph.y = (graph.y - mean) / std
    ends = {"train": (0, train), "val": (train, train + held), "test": (train + held, train + 2 * held)}
    return {part: graphs[low:high] for part, (low, high) in ends.items()}, std


def errors(module: Supervised, graphs: list[Any], batch_size: int) -> Tensor:
    """Mean absolute error of each count, in standard deviations."""
    with torch.no_grad():
        off = [(module(b.to(module.device)) - b.y).abs().cpu() for b in DataLoader(graphs, batch_size=batch_size)]
    return torch.cat(off).mean(0)


def picture(path: Any, rows: list[list[Any]], spread: list[list[list[float]]], title: str) -> None:
    """The logarithm of each error, a group of bars for each length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    width = 0.8 / len(rows)
    for place, (row, runs) in enumerate(zip(rows, spread, strict=True)):
        x = [at + (place - (len(rows) - 1) / 2) * width for at in range(len(LENGTHS))]
        axis.bar(x, row[1:5], width, label=row[0], alpha=0.7)
        for run in runs if len(runs) > 1 else []:
            axis.plot(x, run, "k.", ms=3)
    axis.set(xticks=range(len(LENGTHS)), xticklabels=[f"cycles of {length}" for length in LENGTHS], title=title)
    axis.set_ylabel("log10 (test MAE / standard deviation)")
    axis.axhline(0, color="0.4", lw=0.8)
    axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))  # below: the bars hang down
    figure.tight_layout()
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="(default: %(default)s)")
    parser.add_argument(
        "--models", default="all", help=f"all, or of {', '.join(MODELS)} with commas (default: %(default)s)"
    )
    parser.add_argument("--directed", action="store_true", help="count directed cycles in directed graphs")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with other weights (default: %(default)s)")
    parser.add_argument(
        "--norm", choices=["layer_norm", "batch_norm"], default="batch_norm", help="(default: %(default)s)"
    )
    parser.add_argument("--walk-length", type=int, default=16, help="steps of random walks (default: %(default)s)")
    group = parser.add_argument_group("the preset's, unless given")
    for flag, text in (
        ("train", "graphs to train on"),
        ("held", "graphs to validate on, and as many to test on"),
        ("hidden", "channels"),
        ("layers", "layers of the network and of the encodings"),
    ):
        values = ", ".join(f"{name} {preset[flag]}" for name, preset in PRESETS.items())
        group.add_argument(f"--{flag}", type=int, default=None, help=f"{text} ({values})")
    budget = ", ".join(f"{name} {preset['epochs']}" for name, preset in PRESETS.items())
    training_flags(parser, out="runs/counting_cycles", batch_size=64, lr=None, budget=f"the preset's: {budget}")
    args = parser.parse_args(argv)
    allowed = DIRECTED if args.directed else UNDIRECTED
    names = list(allowed) if args.models == "all" else [name.strip() for name in args.models.split(",") if name.strip()]
    if unknown := [name for name in names if name not in allowed]:
        kind = " with --directed" if args.directed else ""
        parser.error(f"--models must be of {', '.join(allowed)}{kind}; got {', '.join(unknown)}")
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    preset = PRESETS[args.preset]
    for name in ("train", "held", "hidden", "layers", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, preset[name])
    args.max_nodes = max(nodes for nodes, _ in preset["sizes"])
    start(args)

    parts, std = load(args)
    rows: list[list[Any]] = []
    spread: list[list[list[float]]] = []
    curves = {}
    for name in names:
        runs: list[list[float]] = []
        seconds, epochs, trained = 0.0, 0, 0
        for seed in range(args.seed, args.seed + args.seeds):
            torch.manual_seed(seed)
            # batch norm needs more than one graph in the last batch, too
            train = DataLoader(
                parts["train"], args.batch_size, shuffle=True, drop_last=len(parts["train"]) > args.batch_size
            )
            model = Counter(name, args)
            size = sum(p.numel() for p in model.parameters())
            module = Supervised(model, loss, lr=args.lr)
            run = f"{name}-{seed}"
            began = time.perf_counter()
            trainer = fit(
                module,
                train,
                DataLoader(parts["val"], batch_size=256),
                args,
                run,
                epochs=preset["epochs"],
                clip=5.0,
            )
            seconds += time.perf_counter() - began
            epochs += trainer.current_epoch
            trained += module.epochs_trained
            save_weights(module, {"model": name, **vars(args)}, args.out / run)
            runs.append([math.log10(float(error)) for error in errors(module, parts["test"], 256)])
            curves[f"{MODELS[name]}, seed {seed}"] = read_log(args.out / run, "val_loss")
            print(f"{run}: log10 normalised MAE " + ", ".join(f"{value:.2f}" for value in runs[-1]), flush=True)
        mean = [round(statistics.mean(values), 3) for values in zip(*runs, strict=True)]
        each = round(seconds / trained, 2) if trained else None
        rows.append([MODELS[name], *mean, size, round(epochs / len(runs)), each])
        spread.append(runs)
    title = f"{len(parts['train'])} random{' directed' if args.directed else ''} graphs, preset {args.preset}"
    picture(args.out / "errors.png", rows, spread, f"Counting cycles: {title}")
    curve_plot(args.out / "learning.png", curves, "epoch", "validation MAE / standard deviation", title)
    notes = [
        (
            f"Columns: log10 of the test MAE over the standard deviation of the count; {len(parts['test'])} test "
            f"graphs; 0 is no better than the mean. Standard deviations {', '.join(f'{s:.1f}' for s in std.tolist())}."
        ),
        (
            f"{args.layers} layers of {args.hidden}, {args.norm}, peak lr {args.lr}, batches of {args.batch_size}, "
            f"{args.seeds} seeds from {args.seed}, {torch.get_num_threads()} threads."
        ),
        f"Plots: {args.out}/errors.png, {args.out}/learning.png",
    ]
    header = ["encoding", *(f"{length}-cycles" for length in LENGTHS), "parameters", "epochs", "s/epoch"]
    report(args, f"Counting cycles in {title}", header, rows, notes)
    return rows


if __name__ == "__main__":
    main()
