"""Recognise three-dimensional shapes turned any way, after training on upright ones only.

PONITA (https://arxiv.org/abs/2310.02970) convolves over positions and directions, R^3 x S^2: it sees angles, and yet
its answer does not depend on how the shape is turned. A convolution over positions alone (R^3) may use distances only.
DGCNN (EdgeConv of PyTorch Geometric) sees coordinates: excellent upright, lost when the shape lies on its side. (DGCNN
finds its neighbours anew in each layer with torch_cluster, which is being retired; here EdgeConv works on a fixed graph
of nearest neighbours found with scipy.)

By default the shapes are ten kinds of solids, made on the spot; with --root DIR, ModelNet10 from
DIR/modelnet10_voxels/modelnet10.npz.

  python examples/shapes.py                        # about five minutes on two cores
  python examples/shapes.py --data modelnet10 --root DIR --epochs 20
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch_geometric.loader import DataLoader
from torch_geometric.nn import EdgeConv, global_max_pool

from geo.datasets import ModelNet10Points
from geo.nn import PONITA
from geo.training import Supervised, curve_plot, fit, read_log, report, start, training_flags, write_atomic
from geo.transforms import AddRadiusGraph

MODELS = {"dgcnn": "DGCNN (PyG EdgeConv)", "r3": "R^3", "ponita": "R^3 x S^2 (PONITA)"}


class Shapes(nn.Module):
    """PONITA, the largest of each feature over points, and a linear head."""

    def __init__(self, args: argparse.Namespace, num_ori: int) -> None:
        super().__init__()
        self.net = PONITA(
            in_channels=1,
            hidden_channels=args.hidden,
            out_channels=2 * args.hidden,
            num_layers=args.layers,
            basis_dim=args.basis,
            num_ori=num_ori,
            radius=args.radius,
            readout="node",
            rotate="train" if num_ori else None,
        )
        self.head = nn.Linear(2 * args.hidden, 10)

    def forward(self, batch: Any) -> Tensor:
        x, _ = self.net(batch.x, batch.pos, batch.edge_index, batch.batch, batch_size=batch.num_graphs)
        return self.head(global_max_pool(x, batch.batch, batch.num_graphs))


class DGCNN(nn.Module):
    """Three EdgeConv layers, their outputs joined and pooled."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()

        def mlp(size: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(2 * size, args.hidden), nn.ReLU(), nn.Linear(args.hidden, args.hidden))

        self.convs = nn.ModuleList(EdgeConv(mlp(size)) for size in (3, args.hidden, args.hidden))
        self.head = nn.Sequential(nn.Linear(3 * args.hidden, args.hidden), nn.ReLU(), nn.Linear(args.hidden, 10))

    def forward(self, batch: Any) -> Tensor:
        x, outputs = batch.pos, []
        for conv in self.convs:
            x = conv(x, batch.nearest_index)
            outputs.append(x)
        return self.head(global_max_pool(torch.cat(outputs, dim=-1), batch.batch, batch.num_graphs))


def nearest(pos: Tensor, k: int = 12) -> Tensor:
    """Edges from the k nearest points to each point, [2, k V]."""
    _, index = cKDTree(pos.numpy()).query(pos.numpy(), k=min(k + 1, len(pos)))
    source = torch.as_tensor(index[:, 1:])
    target = torch.arange(len(pos)).view(-1, 1).expand_as(source)
    return torch.stack([source.reshape(-1), target.reshape(-1)])


def accuracy(logits: Tensor, batch: Any) -> Tensor:
    return (logits.argmax(dim=-1) == batch.y.view(-1)).float().mean()


def cross_entropy(logits: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(logits, batch.y.view(-1))


def score(module: Supervised, frames: list[Any]) -> float:
    """Accuracy in percent."""
    with torch.no_grad():
        right = [module(batch).argmax(dim=-1) == batch.y.view(-1) for batch in DataLoader(frames, batch_size=32)]
    return 100 * float(torch.cat(right).float().mean())


def picture(path: Any, rows: list[list[object]], columns: list[str], frames: dict[str, Any]) -> None:
    """Bars of the accuracies, beside one of the shapes upright and turned."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 4.2))
    for i, (title, frame) in enumerate(frames.items()):
        axis = figure.add_subplot(1, 4, i + 1, projection="3d")
        axis.scatter(*frame.pos.T.tolist(), s=8)
        axis.set(title=title, xticks=[], yticks=[], zticks=[], aspect="equal")
    axis = figure.add_subplot(1, 2, 2)
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        bars = axis.bar([j + i * width for j in range(len(columns))], row[1 : 1 + len(columns)], width, label=row[0])
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set(xticks=[j + 0.4 - width / 2 for j in range(len(columns))], ylabel="test accuracy (%)", ylim=(0, 115))
    axis.set_xticklabels(columns)
    axis.legend(fontsize=8, ncols=len(rows), loc="upper center")
    figure.tight_layout()
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["solids", "modelnet10"], default="solids", help="(default: %(default)s)")
    parser.add_argument("--models", default=",".join(MODELS), help="which of them (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=None, help="training shapes (default: all)")
    parser.add_argument("--points", type=int, default=64, help="points of a shape (default: %(default)s)")
    parser.add_argument(
        "--radius",
        type=float,
        default=0.5,
        help="radius of the graph; shapes fill the unit ball (default: %(default)s)",
    )
    parser.add_argument("--hidden", type=int, default=32, help="channels (default: %(default)s)")
    parser.add_argument("--basis", type=int, default=16, help="width of the kernel basis (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="convolutions (default: %(default)s)")
    parser.add_argument("--num-ori", type=int, default=12, help="directions on the sphere (default: %(default)s)")
    training_flags(parser, out="runs/shapes", batch_size=16, lr=5e-3, budget="90 seconds a model")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {', '.join(unknown)}")
    start(args)
    if args.smoke:
        args.points = min(args.points, 24)

    graph = AddRadiusGraph(args.radius)

    def prepare(frame: Any) -> Any:
        frame.x = torch.ones(len(frame.pos), 1)
        frame.nearest_index = nearest(frame.pos)
        return graph(frame)

    def shapes(split: str, rotate: str | None = None) -> list[Any]:
        few = (40 if split == "train" else 20) if args.smoke else args.samples if split == "train" else None
        source = "solids" if args.data == "solids" else "voxels"
        settings = {
            "source": source,
            "num_points": args.points,
            "num_samples": few,
            "rotate": rotate,
            "seed": args.seed,
        }
        return [prepare(frame) for frame in ModelNet10Points(args.root, split, **settings)]

    train = shapes("train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed)).tolist()
    num_val = max(1, len(train) // 10)
    val, train = [train[i] for i in order[:num_val]], [train[i] for i in order[num_val:]]
    views = {"upright": shapes("test"), "turned about z": shapes("test", "z"), "turned any way": shapes("test", "so3")}
    loaders = DataLoader(train, batch_size=args.batch_size, shuffle=True), DataLoader(val, batch_size=32)
    print(f"{len(train)} training, {len(val)} validation, {len(views['upright'])} test shapes; training is upright")

    rows: list[list[object]] = []
    curves = {}
    for name in names:
        torch.manual_seed(args.seed)
        model = DGCNN(args) if name == "dgcnn" else Shapes(args, args.num_ori if name == "ponita" else 0)
        if isinstance(model, Shapes):
            # Starts bases and kernels at the scale of the data: it learns much faster.
            model.net.calibrate(next(iter(DataLoader(train, batch_size=32))))
        size = sum(p.numel() for p in model.parameters())
        print(f"\n{MODELS[name]}: {size:,} parameters")
        module = Supervised(model, cross_entropy, {"accuracy": accuracy}, lr=args.lr, ema=0.98)
        trainer = fit(module, *loaders, args, name, max_seconds=90.0)
        rows.append([MODELS[name], *(score(module, frames) for frames in views.values()), size, trainer.current_epoch])
        epochs, values = read_log(args.out / name, "val_accuracy")
        curves[MODELS[name]] = (epochs, [100 * value for value in values])
    shown = {"trained on": views["upright"][0], "tested on": views["turned any way"][0]}
    picture(args.out / "accuracy.png", rows, list(views), shown)
    curve_plot(
        args.out / "learning.png", curves, "epoch", "accuracy on upright validation shapes (%)", args.data, log=False
    )
    setting = (
        f"{args.points} points, radius {args.radius}, {args.layers} layers of {args.hidden}, {args.num_ori} directions"
        f", batch {args.batch_size}, peak lr {args.lr}, seed {args.seed}, {torch.get_num_threads()} threads."
    )
    notes = [
        setting,
        "EdgeConv works on a fixed graph of 12 nearest neighbours (scipy), not on one found anew in each layer.",
        f"Plots: {args.out}/accuracy.png, {args.out}/learning.png",
    ]
    header = ["network", *(f"{view} (%)" for view in views), "parameters", "epochs"]
    report(args, "Test accuracy; training on upright shapes only", header, rows, notes)
    return rows


if __name__ == "__main__":
    main()
