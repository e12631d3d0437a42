"""Tell the two chiral Tetris pieces apart, or prove that you cannot.

Eight pieces of four cubes each; two of them are mirror images. A pointwise product of functions on the sphere has no
path with l1 + l2 + l3 odd, so a network of such products alone (https://arxiv.org/abs/2401.10216) never makes a
pseudoscalar: it answers the chiral pair alike and cannot name more than seven of the eight. The Poisson bracket
(https://arxiv.org/abs/2605.15073) brings those paths back, for less than all Clebsch-Gordan paths cost. All networks
are equivariant to rotations and reflections, and are tested on pieces turned any way.

  python examples/tetris.py                     # a quarter of a minute on one core
  python examples/tetris.py --models gaunt,bracket --epochs 60
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from geo.nn import GauntConv
from geo.o3 import random_rotations, solid_harmonics
from geo.ops import scatter_sum
from geo.training import Supervised, curve_plot, fit, read_log, report, start, training_flags
from geo.transforms import AddRadiusGraph

MODELS = {
    "gaunt": "Gaunt products",
    "bracket": "Gaunt products and brackets",
    "cg": "all Clebsch-Gordan paths (e3nn)",
}
PIECES = {
    "chiral, left": [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 0)],
    "chiral, right": [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, -1, 0)],
    "square": [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)],
    "line": [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3)],
    "corner": [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)],
    "L": [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)],
    "T": [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1)],
    "zigzag": [(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 0)],
}


def pieces(turns: Tensor, radius: float) -> list[Data]:
    """Every piece in every turn, with edges between cubes that touch."""
    graph = AddRadiusGraph(radius)
    return [
        graph(
            Data(x=torch.ones(4, 1), pos=torch.tensor(cubes, dtype=torch.float32) @ turn.t(), y=torch.tensor([label]))
        )
        for turn in turns.float()
        for label, cubes in enumerate(PIECES.values())
    ]


class ClebschGordanConv(nn.Module):
    """The convolution of e3nn's guide: every path from features and harmonics, with radial weights."""

    def __init__(self, irreps_in: str, irreps_out: str, lmax: int, radius: float) -> None:
        super().__init__()
        self.radius, self.lmax = radius, lmax
        irreps_sh = o3.Irreps.spherical_harmonics(lmax)
        self.tp = o3.FullyConnectedTensorProduct(irreps_in, irreps_sh, irreps_out, shared_weights=False)
        self.radial = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, self.tp.weight_numel))

    def forward(self, x: Tensor, pos: Tensor, edge_index: Tensor) -> Tensor:
        r = pos[edge_index[0]] - pos[edge_index[1]]
        length = r.norm(dim=-1, keepdim=True)
        messages = self.tp(x[edge_index[0]], solid_harmonics(r / length, self.lmax), self.radial(length / self.radius))
        return scatter_sum(messages, edge_index[1], 0, dim_size=x.size(0))


class Gate(nn.Module):
    """Scalars through SiLU, pseudoscalars through tanh (odd), the rest times a function of the scalars."""

    def __init__(self, irreps: o3.Irreps) -> None:
        super().__init__()
        self.irreps, self.slices = irreps, irreps.slices()
        scalars = next(mul for mul, ir in irreps if ir == o3.Irrep("0e"))
        self.gates = nn.Linear(scalars, sum(mul for mul, ir in irreps if ir.l > 0))

    def forward(self, x: Tensor) -> Tensor:
        blocks = {ir: x[:, where] for (_, ir), where in zip(self.irreps, self.slices, strict=True)}
        gates = torch.sigmoid(self.gates(blocks[o3.Irrep("0e")]))
        out, start = [], 0
        for mul, ir in self.irreps:
            block = blocks[ir]
            if ir.l > 0:
                block = block.view(-1, mul, ir.dim) * gates[:, start : start + mul, None]
                start += mul
            else:
                block = nn.functional.silu(block) if ir.p > 0 else torch.tanh(block)
            out.append(block.flatten(1))
        return torch.cat(out, 1)


class Tetris(nn.Module):
    """Convolutions and gates; the last layer makes scalars, and one pseudoscalar where its paths can."""

    def __init__(self, args: argparse.Namespace, kind: str) -> None:
        super().__init__()
        true = [(args.hidden, (l, (-1) ** l)) for l in range(args.lmax + 1)]
        pseudo = [] if kind == "gaunt" else [(args.hidden, (l, -((-1) ** l))) for l in range(args.lmax + 1)]
        hidden = o3.Irreps(true + pseudo)
        middle = o3.Irreps(true + pseudo[1:])  # after one convolution of scalars there is nothing pseudo but l > 0
        out = o3.Irreps([(args.hidden, (0, 1))] + [(args.hidden, (0, -1))] * bool(pseudo))
        self.hidden = args.hidden
        sizes = [o3.Irreps("1x0e"), o3.Irreps(true), middle, *[hidden] * (args.layers - 3), out]

        def conv(irreps_in: o3.Irreps, irreps_out: o3.Irreps) -> nn.Module:
            if kind == "cg":
                return ClebschGordanConv(irreps_in, irreps_out, args.lmax, args.radius)
            bracket = "bracket" if kind == "bracket" else False
            return GauntConv(
                irreps_in, irreps_out, args.lmax, radius=2 * args.radius, mode="uvw", antisymmetric=bracket
            )

        self.convs = nn.ModuleList([conv(a, b) for a, b in pairwise(sizes)])
        self.gates = nn.ModuleList([Gate(irreps) for irreps in sizes[1:-1]])
        self.scalar, self.pseudo = nn.Linear(args.hidden, 7), nn.Linear(args.hidden, 1, bias=False)

    def forward(self, batch: Any) -> Tensor:
        x = batch.x
        for i, conv in enumerate(self.convs):
            x = conv(x, batch.pos, batch.edge_index)
            x = self.gates[i](x) if i < len(self.gates) else x
        x = scatter_sum(x, batch.batch, 0, dim_size=batch.num_graphs)
        scalar = self.scalar(x[:, : self.hidden])
        # A reflection turns the sign of a pseudoscalar, and with it exchanges the first two answers.
        side = self.pseudo(x[:, self.hidden :]) if x.size(1) > self.hidden else torch.zeros_like(scalar[:, :1])
        return torch.cat((scalar[:, :1] + side, scalar[:, :1] - side, scalar[:, 1:]), 1)


def accuracy(logits: Tensor, batch: Any) -> Tensor:
    return (logits.argmax(dim=-1) == batch.y).float().mean()


def cross_entropy(logits: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(logits, batch.y)


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="which of them (default: %(default)s)")
    parser.add_argument("--radius", type=float, default=1.1, help="of the graph, in cubes (default: %(default)s)")
    parser.add_argument("--lmax", type=int, default=2, help="highest degree (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=8, help="channels of every degree (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="convolutions, at least 3 (default: %(default)s)")
    training_flags(parser, out="runs/tetris", batch_size=4, lr=1e-2, budget="100 epochs")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {', '.join(unknown)}")
    if args.layers < 3:
        parser.error(f"--layers is {args.layers}, but a pseudoscalar takes three convolutions")
    start(args)

    upright = pieces(torch.eye(3)[None], args.radius)
    turned = pieces(random_rotations(20), args.radius)
    train = DataLoader(upright, batch_size=args.batch_size, shuffle=True)
    val = DataLoader(upright, batch_size=len(upright))
    test = next(iter(DataLoader(turned, batch_size=len(turned))))
    print(f"{len(upright)} pieces to learn, {len(turned)} turned ones to name")

    rows: list[list[object]] = []
    curves = {}
    for name in names:
        torch.manual_seed(args.seed)
        model = Tetris(args, name)
        size = sum(p.numel() for p in model.parameters())
        print(f"\n{MODELS[name]}: {size:,} parameters")
        module = Supervised(model, cross_entropy, {"accuracy": accuracy}, lr=args.lr)
        trainer = fit(module, train, val, args, name, epochs=100, validate_every=10)
        with torch.no_grad():
            logits = module(test)
            right = float(accuracy(logits, test))
        pair = logits.view(-1, 8, 8)[:, :2]
        apart = float((pair[:, 0] - pair[:, 1]).abs().max() / logits.abs().max())
        rows.append([MODELS[name], 8 * right, apart, size, trainer.current_epoch])
        epochs, values = read_log(args.out / name, "val_accuracy")
        curves[MODELS[name]] = (epochs, [8 * value for value in values])
    curve_plot(args.out / "learning.png", curves, "epoch", "pieces named, of 8", "Tetris", log=False)
    setting = (
        f"{args.layers} layers of {args.hidden} channels, lmax {args.lmax}, batch {args.batch_size}, peak lr "
        f"{args.lr}, seed {args.seed}, {torch.get_num_threads()} threads."
    )
    limit = "Where the chiral pair's logits differ by rounding only, seven pieces is the most."
    notes = [
        setting,
        limit,
        f"Plot: {args.out}/learning.png",
    ]
    header = ["network", "pieces named (of 8)", "logits apart in the chiral pair (relative)", "parameters", "epochs"]
    report(args, "Tetris pieces, turned any way", header, rows, notes)
    return rows


if __name__ == "__main__":
    main()
