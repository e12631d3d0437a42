"""Predict a property of molecules from their graphs, with one network and several positional encodings.

By default the molecules are made on the spot and the property is that of the ZINC benchmark, the penalised log P. The
network is the GINE of https://arxiv.org/abs/2310.02579 with its encoding added once at the input:

  spe      stable and expressive encodings
  signnet  SignNet
  rwpe     probabilities that random walks return
  none     no encoding; as rwpe made wider, to have about as many parameters as the others

Data (--data):

  enumerated    molecules joined from rings and groups (default)
  zinc          ZINC-12k, fetched by PyTorch Geometric into --root
  zinc-standin  --root with zinc_valid_targets.csv.gz and zinc_test_targets.csv.gz: 10,000 and 1,000 molecules of the
                validation part of ZINC to train and to validate on, 1,000 of its test part. It is NOT ZINC-12k: compare
                no numbers with published ones
  table         any table of SMILES: --table FILE --smiles COLUMN --target COLUMN, split at random

Presets: small, for a CPU; spe-full and spe-8, the paper's settings for ZINC (1000 epochs of a 620,000-parameter
network, with --batch-size 128: for a GPU).

  python examples/molecule_regression.py                                       # all four, enumerated molecules
  python examples/molecule_regression.py --data zinc-standin --root DIR --models spe,none
  python examples/molecule_regression.py --table esol.csv --target 'measured log solubility in mols per litre'
  python examples/molecule_regression.py --data zinc --preset spe-full --models spe --batch-size 128 --accelerator gpu
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import AddRandomWalkPE

from geo.datasets import EnumeratedMolecules, SmilesTable
from geo.nn import GINE, SPE, EigenvectorPE, SignNet, pad_spectrum
from geo.training import (
    Supervised,
    curve_plot,
    fit,
    parity_plot,
    read_log,
    report,
    save_weights,
    start,
    training_flags,
)
from geo.transforms import AddLaplacianSpectrum

MODELS = {"spe": "SPE", "signnet": "SignNet", "rwpe": "random walks", "none": "no encoding"}
NOT_ZINC = "NOT ZINC-12k, but other molecules of ZINC, with targets computed by RDKit"
# Widths of the network by encoding; spe, signnet: the layer's own arguments. k: eigenpairs, None for all.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "k": None,
        "width": {"spe": 64, "signnet": 64, "rwpe": 70, "none": 71},
        "spe": {"out_channels": 32, "num_channels": 8, "rho_hidden": 32, "rho_layers": 3},
        "signnet": {"out_channels": 32, "phi_hidden": 32, "phi_layers": 3, "mlp_layers": 3, "rho_hidden": 32},
        "epochs": 20,
        "lr": 2e-3,
    },
    "spe-full": {
        "k": None,
        "width": {"spe": 128, "signnet": 120, "rwpe": 200, "none": 200},
        "spe": {"out_channels": 37, "num_channels": 16, "rho_hidden": 128, "rho_layers": 8},
        "signnet": {
            "out_channels": 37,
            "phi_hidden": 120,
            "phi_layers": 8,
            "mlp_layers": 3,
            "rho_hidden": 120,
            "rho_layers": 8,
            "use_eigvals": False,
        },
        "epochs": 1000,
        "lr": 1e-3,
    },
    "spe-8": {
        "k": 8,
        "width": {"spe": 128, "signnet": 120, "rwpe": 200, "none": 200},
        "spe": {
            "out_channels": 8,
            "num_channels": 6,
            "phi": "deepsets",
            "phi_layers": 4,
            "rho_hidden": 128,
            "rho_layers": 8,
        },
        "signnet": {
            "out_channels": 8,
            "k": 8,
            "phi_hidden": 120,
            "phi_layers": 8,
            "phi_channels": 4,
            "mlp_layers": 3,
            "rho_hidden": 120,
            "rho_layers": 8,
            "use_eigvals": False,
        },
        "epochs": 1000,
        "lr": 1e-3,
    },
}
# Test errors on ZINC-12k in https://arxiv.org/abs/2310.02579.
PAPER = {
    "spe-full": {"spe": 0.0693, "signnet": 0.0853, "none": 0.1772},
    "spe-8": {"spe": 0.0736, "signnet": 0.1034, "none": 0.1772},
}


class Regressor(nn.Module):
    """The network with its encoding, called with a batch."""

    def __init__(self, name: str, preset: str, norm: str, walk_length: int, node_types: int) -> None:
        super().__init__()
        sizes = PRESETS[preset]
        makers = {"spe": SPE, "signnet": SignNet}
        pe = makers[name](norm=norm, **sizes[name]) if name in makers else None
        pe_dim = walk_length if name == "rwpe" else None
        self.net = GINE(
            None, sizes["width"][name], 4, 1, node_types=node_types, edge_types=4, pe=pe, pe_dim=pe_dim, norm=norm
        )

    def forward(self, batch: Any) -> Tensor:
        net = self.net
        spectrum = None if net.pe is None else pad_spectrum(batch)
        pe = None if net.pe_dim is None else batch.pe
        return net(batch.x, batch.edge_index, batch.edge_attr, batch.batch, spectrum, pe, batch.num_graphs)


def load(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Molecules of each part, with spectra and return probabilities."""
    held = 8 if args.smoke else args.held
    train = 16 if args.smoke else args.train
    try:
        if args.data == "zinc":
            from torch_geometric.datasets import ZINC

            parts = {part: list(ZINC(str(args.root), subset=True, split=part)) for part in ("train", "val", "test")}
            parts["train"] = parts["train"][:train]
        elif args.data == "zinc-standin":
            train, held = train or 10_000, held or 1000
            tables = {"valid": train + held, "test": held}
            paths = {name: args.root / f"zinc_{name}_targets.csv.gz" for name in tables}
            both = {name: list(SmilesTable(path, max_rows=tables[name])) for name, path in paths.items()}
            parts = {"train": both["valid"][:train], "val": both["valid"][train:], "test": both["test"]}
        else:
            if args.data == "enumerated":
                train, held = train or 2000, held or 500
                molecules = list(EnumeratedMolecules(args.root, train + 2 * held, seed=args.data_seed))
            else:
                path = args.table if args.table.is_file() else args.root / args.table
                table = list(SmilesTable(path, args.smiles, args.target))
                order = torch.randperm(len(table), generator=torch.Generator().manual_seed(args.data_seed)).tolist()
                molecules = [table[i] for i in order]
                held = held or len(molecules) // 10
                train = train or len(molecules) - 2 * held
            if len(molecules) < 2 * held + 1:
                raise ValueError(f"--held {held} twice leaves nothing of {len(molecules)} molecules to train on")
            parts = {
                "test": molecules[:held],
                "val": molecules[held : 2 * held],
                "train": molecules[2 * held :][:train],
            }
    except (ValueError, OSError) as error:
        raise SystemExit(f"--data {args.data}: {error}") from None
    began = time.perf_counter()
    spectra = AddLaplacianSpectrum(PRESETS[args.preset]["k"], dtype=torch.float32)
    walks = AddRandomWalkPE(args.walk_length, attr_name="pe")
    for part, graphs in parts.items():
        parts[part] = [walks(graph) for graph in spectra.transform_many(graphs)]
        for graph in parts[part]:
            graph.y = graph.y.view(1, 1)
    num = sum(len(graphs) for graphs in parts.values())
    print(f"spectra and random walks of {num} molecules: {time.perf_counter() - began:.1f} s")
    return parts


def predict(module: Supervised, graphs: list[Any]) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(batch.to(module.device)).cpu() for batch in DataLoader(graphs, batch_size=250)])


def stability(path: Path, seed: int = 0) -> dict[str, list[float]]:
    """How far encodings move when the Laplacian does, and a plot of it: || PE(L + E) - PE(L) || / || E ||.

    The graph is the rook's graph of a board of 4 x 4, whose eigenvalues have multiplicities 1, 6 and 9; E is a random
    symmetric matrix, and the networks are not trained. A stable encoding has a bounded ratio; one that depends on the
    choice of eigenvectors moves by as much for every E, so its ratio grows as 1 / || E ||.

    Args:
        path: PNG to write.
        seed: Of the weights and of E.

    Returns:
        The median ratio of nine E, by encoding, for the sizes of E from 1e-2 to 1e-8.
    """
    torch.manual_seed(seed)
    row, column = torch.arange(16) // 4, torch.arange(16) % 4
    adjacency = (row[:, None] == row).logical_xor(column[:, None] == column).double()
    laplacian = torch.eye(16, dtype=torch.float64) - adjacency / 6
    edge_index = adjacency.nonzero().t()
    spe = SPE(16, 8, rho_hidden=32, rho_layers=3).double().eval()
    tapered = SPE(16, 8, rho_hidden=32, rho_layers=3, taper=0.9).double().eval()
    sign_net = SignNet(16, phi_hidden=32, phi_layers=3).double().eval()
    raw = EigenvectorPE(16, 16).double().eval()
    encodings = {
        "SPE, full spectrum": (spe, 16),
        "SPE, 3 eigenpairs: cut inside an eigenspace": (spe, 3),
        "SPE with a taper below the cut": (tapered, 7),
        "SignNet": (sign_net, 16),
        "eigenvectors": (raw, 16),
    }
    sizes = [10.0**-power for power in range(2, 9)]
    moves = torch.randn(9, 16, 16, dtype=torch.float64)
    moves = moves + moves.transpose(1, 2)
    moves = moves / torch.linalg.matrix_norm(moves)[:, None, None]

    def encode(name: str, matrix: Tensor) -> Tensor:
        module, k = encodings[name]
        eigvals, eigvecs = torch.linalg.eigh(matrix)
        with torch.no_grad():
            return module(eigvals[None, :k], eigvecs[:, :k], edge_index)

    curves: dict[str, list[float]] = {}
    for name in encodings:
        still = encode(name, laplacian)
        curves[name] = [
            statistics.median(
                float(torch.linalg.matrix_norm(encode(name, laplacian + size * e) - still)) / size for e in moves
            )
            for size in sizes
        ]
    exponents = [math.log10(size) for size in sizes]
    curve_plot(
        path,
        {name: (exponents, values) for name, values in curves.items()},
        "log10 ||E||",
        "||PE(L + E) - PE(L)|| / ||E||",
        "Rook's graph 4 x 4, untrained networks in float64",
    )
    return curves


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        choices=["enumerated", "zinc", "zinc-standin", "table"],
        default=None,
        help="(default: enumerated, or table where --table is given)",
    )
    parser.add_argument("--table", type=Path, default=None, help="a .csv or .csv.gz with SMILES, also inside --root")
    parser.add_argument("--smiles", default="smiles", help="its column of SMILES (default: %(default)s)")
    parser.add_argument("--target", default="y", help="its column of numbers (default: %(default)s)")
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="(default: %(default)s)")
    parser.add_argument(
        "--models", default="all", help=f"all, or of {', '.join(MODELS)} with commas (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with other weights (default: %(default)s)")
    parser.add_argument("--train", type=int, default=None, help="use only so many molecules to train on")
    parser.add_argument("--held", type=int, default=None, help="so many to validate on, and as many to test on")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of molecules and splits (default: %(default)s)")
    parser.add_argument(
        "--norm", choices=["layer_norm", "batch_norm"], default="batch_norm", help="(default: %(default)s)"
    )
    parser.add_argument("--walk-length", type=int, default=20, help="steps of random walks (default: %(default)s)")
    budget = ", ".join(f"{name} {preset['epochs']}" for name, preset in PRESETS.items())
    training_flags(parser, out="runs/molecule_regression", batch_size=32, lr=None, budget=f"the preset's: {budget}")
    args = parser.parse_args(argv)
    names = list(MODELS) if args.models == "all" else [name.strip() for name in args.models.split(",") if name.strip()]
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {', '.join(unknown)}")
    args.data = args.data or ("enumerated" if args.table is None else "table")
    if (args.data == "table") != (args.table is not None):
        parser.error(f"--table {args.table} does not fit --data {args.data}")
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    preset = PRESETS[args.preset]
    args.lr = preset["lr"] if args.lr is None else args.lr
    start(args)

    parts = load(args)
    if args.data == "zinc-standin":
        print(NOT_ZINC)
    node_types = max(28, 1 + max(int(graph.x.max()) for graphs in parts.values() for graph in graphs))
    truth = {part: torch.cat([graph.y for graph in graphs]) for part, graphs in parts.items()}
    mean, std = float(truth["train"].mean()), max(float(truth["train"].std()), 1e-6)

    def loss(prediction: Tensor, batch: Any) -> Tensor:
        return nn.functional.l1_loss(prediction, (batch.y - mean) / std)

    def mae(prediction: Tensor, batch: Any) -> Tensor:
        return std * loss(prediction, batch)

    rows: list[list[Any]] = []
    curves, predictions = {}, {}
    for name in names:
        off, seconds, epochs, trained = [], 0.0, 0, 0
        for seed in range(args.seed, args.seed + args.seeds):
            torch.manual_seed(seed)
            # batch norm needs more than one molecule in the last batch, too
            train = DataLoader(
                parts["train"], args.batch_size, shuffle=True, drop_last=len(parts["train"]) > args.batch_size
            )
            model = Regressor(name, args.preset, args.norm, args.walk_length, node_types)
            size = sum(p.numel() for p in model.parameters())
            module = Supervised(model, loss, {"mae": mae}, lr=args.lr, weight_decay=3e-6)
            run = f"{name}-{seed}"
            began = time.perf_counter()
            trainer = fit(
                module,
                train,
                DataLoader(parts["val"], 250),
                args,
                run,
                epochs=preset["epochs"],
                clip=5.0,
            )
            seconds += time.perf_counter() - began
            epochs += trainer.current_epoch
            trained += module.epochs_trained
            saved = {"model": name, "node_types": node_types, "target_mean": mean, "target_std": std}
            save_weights(module, {**saved, **vars(args)}, args.out / run)
            prediction = mean + std * predict(module, parts["test"])
            predictions[MODELS[name]] = prediction.numpy()
            off.append(float((prediction - truth["test"]).abs().mean()))
            curves[f"{MODELS[name]}, seed {seed}"] = read_log(args.out / run, "val_mae")
            print(f"{run}: test MAE {off[-1]:.4f}, {trainer.current_epoch} epochs", flush=True)
        paper = PAPER.get(args.preset, {}).get(name) if args.data == "zinc" else None
        each = round(seconds / trained, 2) if trained else None
        spread = statistics.stdev(off) if len(off) > 1 else None
        rows.append([MODELS[name], statistics.mean(off), spread, paper, size, round(epochs / len(off)), each])

    source = {"table": f"{args.table}: {args.target}", "zinc-standin": "zinc-standin (NOT ZINC-12k)"}
    title = f"{source.get(args.data, args.data)}, {len(parts['train'])} molecules, preset {args.preset}"
    curve_plot(args.out / "learning.png", curves, "epoch", "validation MAE", title)
    parity_plot(args.out / "parity.png", {"target": (truth["test"].numpy(), predictions)}, title)
    ratios = stability(args.out / "stability.png")
    notes = [
        (
            f"Test MAE in the units of the target, {len(parts['test'])} molecules; the mean of the training targets "
            f"has {float((truth['test'] - mean).abs().mean()):.4f}."
        ),
        *([NOT_ZINC + "."] if args.data == "zinc-standin" else []),
        (
            f"Four layers, {args.norm}, batches of {args.batch_size}, peak lr {args.lr}, {args.seeds} seeds from "
            f"{args.seed}, {torch.get_num_threads()} threads. The rate falls as a cosine, the paper's linearly."
        ),
        "Ratio ||PE(L+E) - PE(L)|| / ||E|| on a rook's graph at ||E|| = 1e-2 and 1e-8: "
        + "; ".join(f"{name} {values[0]:.2g}, {values[-1]:.2g}" for name, values in ratios.items()),
        f"Plots: {args.out}/learning.png, {args.out}/parity.png, {args.out}/stability.png",
    ]
    header = ["encoding", "test MAE", "std of seeds", "paper", "parameters", "epochs", "s/epoch"]
    report(args, f"Molecules: {title}", header, rows, notes)
    return rows


if __name__ == "__main__":
    main()
