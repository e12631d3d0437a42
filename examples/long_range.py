"""Carry information from one end of a graph to the other with Graph Mamba.

By default a task that is made on the spot: on a path of 50 to 100 nodes each end must tell the bit that the other end
holds. A scan that reads forwards only knows the first bit at the last node and guesses at the first one (75 % right);
message passing with few layers guesses at both (50 %); reading in both directions finds both (100 %). Half of
the paths to train on have 3 to 8 nodes and a quarter 8 to 50, else hardly a run finds the way; validation and test have
long ones only. The Mamba models are without message passing here, so that what they know came through the scan.

Peptides-func and Peptides-struct of the Long Range Graph Benchmark (https://arxiv.org/abs/2206.08164) come through
PyTorch Geometric, which fetches them into --root.

  python examples/long_range.py                                          # half a minute on one core
  python examples/long_range.py --data peptides-func --root DIR --epochs 200 --walk-length 0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import global_mean_pool
from torch_geometric.transforms import AddRandomWalkPE, Compose
from torchmetrics.functional.classification import multilabel_average_precision
from tqdm import tqdm

from geo.nn import GatedGCN, GraphMamba
from geo.training import Supervised, curve_plot, fit, read_log, report, save_weights, start, training_flags
from geo.transforms import AddWalkTokens

MODELS = {"gmn": "Graph Mamba", "forward-only": "... reads forwards only", "gatedgcn": "GatedGCN"}
# Table 1 of the paper; for the ends, what each can know.
PAPER = {
    "ends": (100.0, 75.0, 50.0),
    "peptides-func": (70.71, None, 58.64),
    "peptides-struct": (0.2473, None, 0.3420),
}


EPOCHS = 8
LONG = (50, 100)
TRAINED = ((3, 8), (8, 50), (3, 8), LONG)  # the first answers are found on short paths


class Model(nn.Module):
    """Embeds atoms and bonds where the data has them, pools where a graph has one answer, and answers by an MLP."""

    def __init__(self, name: str, args: argparse.Namespace, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.peptides = args.data != "ends"
        width = args.hidden if self.peptides else in_channels
        if self.peptides:
            self.atoms = nn.ModuleList(nn.Embedding(128, args.hidden) for _ in range(9))
            self.bonds = nn.ModuleList(nn.Embedding(16, args.hidden) for _ in range(3))
        self.pe = args.pe if self.peptides else 0
        edge_dim = args.hidden if self.peptides else None
        settings = {"edge_dim": edge_dim, "dropout": args.dropout}
        if name == "gatedgcn":
            self.net: nn.Module = GatedGCN(width + self.pe, args.hidden, args.layers, **settings)
        else:
            self.net = GraphMamba(
                width,
                args.hidden,
                args.layers,
                walk_length=args.walk_length,
                order="degree" if self.peptides else "index",
                tie="random" if self.peptides else "index",
                pe_dim=self.pe or None,
                bidirectional=name != "forward-only",
                mpnn="gatedgcn" if self.peptides else None,
                **settings,
            )
        hidden = args.hidden
        self.head = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(args.dropout), nn.Linear(hidden, out_channels)
        )

    def forward(self, batch: Any) -> Tensor:
        x, edge_attr, pe = batch.x, None, batch.pe if self.pe else None
        if self.peptides:
            x = sum(table(column) for table, column in zip(self.atoms, batch.x.t(), strict=True))
            edge_attr = sum(table(column) for table, column in zip(self.bonds, batch.edge_attr.t(), strict=True))
        if isinstance(self.net, GatedGCN):
            out = self.net(x if pe is None else torch.cat([x, pe], dim=-1), batch.edge_index, edge_attr)
        else:
            tokens = batch if self.net.walk_length else None
            out = self.net(x, batch.edge_index, edge_attr, pe=pe, batch=batch.batch, tokens=tokens)
        rows = global_mean_pool(out, batch.batch, batch.num_graphs) if self.peptides else out[batch.mask]
        return self.head(rows)


def ends(num_graphs: int, seed: int, sizes: Sequence[tuple[int, int]]) -> list[Data]:
    """Paths, sizes in turn: x says which bit an end holds, or that a node is inside; y is the other end's bit."""
    generator = torch.Generator().manual_seed(seed)
    graphs = []
    for k in range(num_graphs):
        least, most = sizes[k % len(sizes)]
        size = int(torch.randint(least, most + 1, (), generator=generator))
        bits = torch.randint(2, (2,), generator=generator)
        kind = torch.full((size,), 2)
        kind[0], kind[-1] = bits
        path = torch.arange(size - 1)
        edge_index = torch.stack([torch.cat([path, path + 1]), torch.cat([path + 1, path])])
        x, mask = nn.functional.one_hot(kind, 3).float(), kind < 2
        graphs.append(Data(x=x, edge_index=edge_index, mask=mask, y=bits.flip(0)))
    return graphs


def loss(out: Tensor, batch: Any) -> Tensor:
    if batch.y.dim() == 1:
        return nn.functional.cross_entropy(out, batch.y)
    if batch.y.size(1) == 10:  # Peptides-func: ten yes or no
        return nn.functional.binary_cross_entropy_with_logits(out, batch.y.float())
    return nn.functional.l1_loss(out, batch.y)


def score(out: Tensor, y: Tensor) -> float:
    """Accuracy in per cent, average precision in per cent, or mean absolute error."""
    if y.dim() == 1:
        return 100 * float((out.argmax(dim=-1) == y).float().mean())
    if y.size(1) == 10:
        return 100 * float(multilabel_average_precision(out.sigmoid(), y.long(), num_labels=10))
    return float((out - y).abs().mean())


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        choices=list(PAPER),
        default="ends",
        help="ends is made on the spot, the peptides are fetched into --root (default: %(default)s)",
    )
    parser.add_argument("--models", default=",".join(MODELS), help="which of them (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=32, help="channels (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="layers (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="(default: %(default)s)")
    parser.add_argument("--pe", type=int, default=20, help="steps of random-walk encoding, or 0 (default: %(default)s)")
    parser.add_argument("--walk-length", type=int, default=0, help="longest walk of tokens (default: %(default)s)")
    parser.add_argument("--num-walks", type=int, default=4, help="walks a token (default: %(default)s)")
    parser.add_argument("--num-repeats", type=int, default=2, help="tokens of each length (default: %(default)s)")
    training_flags(parser, out="runs/long_range", batch_size=32, lr=3e-3, budget=f"{EPOCHS}")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {', '.join(unknown)}")
    start(args)

    steps: list[Any] = []
    if args.data != "ends" and args.pe:
        steps.append(AddRandomWalkPE(args.pe, attr_name="pe"))
    if args.walk_length:
        steps.append(
            AddWalkTokens(args.walk_length, args.num_walks, args.num_repeats, walks=args.data == "ends", seed=args.seed)
        )
    transform = Compose(steps)
    if args.data == "ends":
        sizes = (16, 8, 8) if args.smoke else (2000, 200, 500)
        graphs: list[Any] = [ends(n, 3 * args.seed + k, [LONG] if k else TRAINED) for k, n in enumerate(sizes)]
    else:
        from torch_geometric.datasets import LRGBDataset

        graphs = [LRGBDataset(str(args.root), args.data, split) for split in ("train", "val", "test")]
    parts = [[transform(graph) for graph in tqdm(part, desc="encodings and tokens", disable=None)] for part in graphs]
    in_channels = parts[0][0].num_features
    out_channels = {"ends": 2, "peptides-func": 10, "peptides-struct": 11}[args.data]
    metric = {"ends": "accuracy (%)", "peptides-func": "average precision (%)"}.get(args.data, "mean absolute error")
    train = DataLoader(parts[0], batch_size=args.batch_size, shuffle=True)
    val, test = (DataLoader(part, batch_size=args.batch_size) for part in parts[1:])

    rows: list[list[object]] = []
    curves = {}
    for name in names:
        torch.manual_seed(args.seed)
        model = Model(name, args, in_channels, out_channels)
        module = Supervised(model, loss, lr=args.lr, weight_decay=1e-5)
        trainer = fit(module, train, val, args, name, epochs=EPOCHS, clip=1.0)
        settings = {"model": name, "in_channels": in_channels, "out_channels": out_channels, **vars(args)}
        save_weights(module, settings, args.out / name)
        with torch.no_grad():
            batches = [(module(batch), batch.y) for batch in test]
        value = score(*(torch.cat(column) for column in zip(*batches, strict=True)))
        reference = dict(zip(MODELS, PAPER[args.data], strict=True))[name]
        rows.append([MODELS[name], value, reference, sum(p.numel() for p in model.parameters()), trainer.current_epoch])
        curves[MODELS[name]] = read_log(args.out / name, "val_loss")
    curve_plot(args.out / "learning.png", curves, "epoch", "validation loss", args.data)
    setting = [
        f"{args.layers} layers of {args.hidden}",
        f"tokens m {args.walk_length}, M {args.num_walks}, s {args.num_repeats}" if args.walk_length else "no tokens",
        f"batch {args.batch_size}, peak lr {args.lr}, seed {args.seed}, {torch.get_num_threads()} threads.",
    ]
    notes = [", ".join(setting), f"Plot: {args.out}/learning.png"]
    header = ["model", metric, "can know" if args.data == "ends" else "paper", "parameters", "epochs"]
    report(args, f"Test {metric} on {args.data}", header, rows, notes)
    return rows


if __name__ == "__main__":
    main()
