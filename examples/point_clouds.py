"""Recognise rotated handwritten digits without ever training on one.

Digits are clouds of points in the plane, each with an intensity. A convolution over positions alone (R^2) may use
distances only, or it is not rotation invariant; a convolution over positions and directions (R^2 x S^1, which is the
group SE(2)) sees angles as well and still does not care how the digit is turned. All networks train on upright digits.
'ponita' attributes (https://arxiv.org/abs/2310.02970) lose the sense of rotation between two directions; 'universal'
ones keep it. PointNet (of PyTorch Geometric) sees coordinates and is not invariant.

  python examples/point_clouds.py                     # about four minutes on two cores
  python examples/point_clouds.py --epochs 30
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.loader import DataLoader
from torch_geometric.nn import PointNetConv, global_max_pool

from geo.datasets import DigitPoints
from geo.nn import PONITA
from geo.training import Supervised, curve_plot, fit, read_log, report, start, training_flags
from geo.transforms import AddRadiusGraph

MODELS = {
    "pointnet": "PointNet (PyG)",
    "r2": "R^2",
    "ponita": "R^2 x S^1, 'ponita'",
    "universal": "R^2 x S^1, 'universal'",
}


class Digits(nn.Module):
    """PONITA in the plane (with no orientations a convolution over distances), max pooling and a linear head."""

    def __init__(self, args: argparse.Namespace, kind: str) -> None:
        super().__init__()
        self.net = PONITA(
            in_channels=1,
            hidden_channels=args.hidden,
            out_channels=2 * args.hidden,
            num_layers=args.layers,
            basis_dim=args.basis,
            dim=2,
            num_ori=0 if kind == "r2" else args.num_ori,
            radius=args.radius,
            invariants="ponita" if kind == "ponita" else "universal",
            readout="node",
            rotate=None if kind == "r2" else "train",
        )
        self.head = nn.Linear(2 * args.hidden, 10)

    def forward(self, batch: Any) -> Tensor:
        x, _ = self.net(batch.x, batch.pos, batch.edge_index, batch.batch, batch_size=batch.num_graphs)
        return self.head(global_max_pool(x, batch.batch, batch.num_graphs))


class PointNet(nn.Module):
    """Two PointNet layers of PyG on the same graph."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()

        def mlp(size: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(size, args.hidden), nn.ReLU(), nn.Linear(args.hidden, args.hidden))

        self.first, self.second = PointNetConv(mlp(1 + 2)), PointNetConv(mlp(args.hidden + 2))
        self.head = nn.Linear(args.hidden, 10)

    def forward(self, batch: Any) -> Tensor:
        x = self.first(batch.x, batch.pos, batch.edge_index).relu()
        x = self.second(x, batch.pos, batch.edge_index).relu()
        return self.head(global_max_pool(x, batch.batch, batch.num_graphs))


def accuracy(logits: Tensor, batch: Any) -> Tensor:
    return (logits.argmax(dim=-1) == batch.y.view(-1)).float().mean()


def cross_entropy(logits: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(logits, batch.y.view(-1))


def score(module: Supervised, frames: list[Any]) -> tuple[float, Tensor]:
    """Accuracy in percent, and the predicted classes."""
    with torch.no_grad():
        predicted = torch.cat([module(batch).argmax(dim=-1) for batch in DataLoader(frames, batch_size=100)])
    truth = torch.cat([frame.y.view(-1) for frame in frames])
    return 100 * float((predicted == truth).float().mean()), predicted


def picture(path: Any, frames: list[Any], predictions: dict[str, Tensor]) -> None:
    """The first test digits as they were shown to the networks, and what each said."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from geo.training import write_atomic

    count = min(12, len(frames))
    figure, axes = plt.subplots(2, 6, figsize=(12, 5.2))
    for i, axis in enumerate(axes.flat):
        axis.axis("off")
        if i >= count:
            continue
        frame = frames[i]
        axis.scatter(frame.pos[:, 0], frame.pos[:, 1], c=frame.x.view(-1), s=45, cmap="Greys", edgecolors="0.6", lw=0.4)
        said = " | ".join(str(int(value[i])) for value in predictions.values())
        axis.set(aspect="equal", title=f"{int(frame.y)} is called {said}")
    figure.suptitle("Turned test digits, and the answers of " + " | ".join(predictions))
    figure.tight_layout()
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="which of them (default: %(default)s)")
    parser.add_argument(
        "--radius", type=float, default=2.5, help="radius of the graph in pixels (default: %(default)s)"
    )
    parser.add_argument("--hidden", type=int, default=32, help="channels (default: %(default)s)")
    parser.add_argument("--basis", type=int, default=16, help="width of the kernel basis (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="convolutions (default: %(default)s)")
    parser.add_argument("--num-ori", type=int, default=8, help="directions on the circle (default: %(default)s)")
    training_flags(parser, out="runs/point_clouds", batch_size=32, lr=5e-3, budget="60 seconds a model")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {', '.join(unknown)}")
    start(args)

    graph = AddRadiusGraph(args.radius)
    most = 20 if args.smoke else None
    splits = [("train", False), ("val", False), ("test", False), ("test", True)]
    train, val, test, rotated = (
        [graph(frame) for frame in DigitPoints(args.root, split=split, rotate=rotate, seed=args.seed)][:most]
        for split, rotate in splits
    )
    loaders = DataLoader(train, batch_size=args.batch_size, shuffle=True), DataLoader(val, batch_size=100)
    print(f"{len(train)} training, {len(val)} validation, {len(test)} test digits; training never sees a rotation")

    rows: list[list[object]] = []
    curves, predictions = {}, {}
    for name in names:
        torch.manual_seed(args.seed)
        model = PointNet(args) if name == "pointnet" else Digits(args, name)
        if isinstance(model, Digits):
            # Starts bases and kernels at the scale of the data: it learns much faster.
            model.net.calibrate(next(iter(DataLoader(train, batch_size=100))))
        size = sum(p.numel() for p in model.parameters())
        print(f"\n{MODELS[name]}: {size:,} parameters")
        module = Supervised(model, cross_entropy, {"accuracy": accuracy}, lr=args.lr, ema=0.98)
        trainer = fit(module, *loaders, args, name, max_seconds=60.0)
        upright, _ = score(module, test)
        anyhow, predictions[MODELS[name]] = score(module, rotated)
        rows.append([MODELS[name], upright, anyhow, size, trainer.current_epoch])
        epochs, values = read_log(args.out / name, "val_accuracy")
        curves[MODELS[name]] = (epochs, [100 * value for value in values])
    picture(args.out / "digits.png", rotated, predictions)
    curve_plot(
        args.out / "learning.png", curves, "epoch", "accuracy on upright validation digits (%)", "digits", log=False
    )
    setting = (
        f"{args.layers} layers of {args.hidden}, {args.num_ori} directions, radius {args.radius} pixels, batch "
        f"{args.batch_size}, peak lr {args.lr}, seed {args.seed}, {torch.get_num_threads()} threads."
    )
    notes = [
        setting,
        "A six turned upside down is a nine, so no network that ignores rotation can be perfect.",
        f"Plots: {args.out}/digits.png, {args.out}/learning.png",
    ]
    header = ["network", "upright test digits (%)", "rotated test digits (%)", "parameters", "epochs"]
    report(args, "Accuracy; training on upright digits only", header, rows, notes)
    return rows


if __name__ == "__main__":
    main()
