"""One potential, three products: all Clebsch-Gordan paths, Gaunt products, Gaunt products with brackets.

A network like MACE (https://arxiv.org/abs/2206.07697): atoms hold features of every degree, a convolution with the
spherical harmonics of the edges makes two-body features of them, a product of these with themselves makes many-body
ones, and every layer adds to the energy. Forces are the energy's exact negative gradient. Only the products differ:

  cg       TensorProductConv, a radial weight and an output for each path; then each Clebsch-Gordan path of x (x) x
           with weights of its own for each element
  gaunt    functions on the sphere, multiplied point by point (https://arxiv.org/abs/2401.10216): GauntConv, a radial
           weight for each degree of the filter and one sum of all paths; then GauntPower, a weight for each order,
           degree and element. No path with l1 + l2 + l3 odd, and so no pseudo-tensors
  bracket  GauntConv with the Poisson bracket besides (https://arxiv.org/abs/2605.15073): every path of cg. Then
           GauntPower, which is symmetric: no bracket of a function with itself is left

From the second convolution on, cg and bracket carry features of both parities. All networks are trained one after the
other on the same frames, for the same time or, with --epochs, for as many steps.

  python examples/molecules_gaunt.py                                    # about four minutes on two cores
  python examples/molecules_gaunt.py --epochs 10 --correlation 3
  python examples/molecules_gaunt.py --data 3bpa/train_300K.xyz --root DIR
  python examples/molecules_gaunt.py --data rmd17:aspirin --root DIR --models gaunt,cg
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn
from torch_geometric.loader import DataLoader

from geo.bench import interleave, peak_extra_memory
from geo.nn import GauntConv, GauntPower, TensorProductConv
from geo.nn.kernel_basis import radial_window
from geo.o3 import solid_harmonics
from geo.ops import scatter_sum
from geo.training import (
    EnergyForces,
    MoleculeFrames,
    curve_plot,
    fit,
    frame_flags,
    read_log,
    report,
    start,
    training_flags,
)

MODELS = {
    "cg": "all Clebsch-Gordan paths",
    "gaunt": "Gaunt products",
    "bracket": "Gaunt products and brackets",
}

# Energy (meV) and force (meV/A) errors on 3BPA at 300 K in https://arxiv.org/abs/2401.10216.
PAPER = {"MACE (paper)": (3.0, 8.8), "MACE-Gaunt (paper)": (2.9, 9.2)}


# --- the two products with all Clebsch-Gordan paths; those with functions on the sphere are in geo.nn -----------------


class ClebschGordanConv(nn.Module):
    """The convolution of NequIP and MACE, with the radial functions of `geo.nn.GauntConv`, one for each path."""

    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps, lmax: int, radius: float) -> None:
        super().__init__()
        self.lmax, self.radius, self.softening = lmax, radius, 0.02 * radius
        self.tp = TensorProductConv(irreps_in, o3.Irreps.spherical_harmonics(lmax), irreps_out)
        self.irreps_out = self.tp.irreps_out
        self.register_buffer("order", torch.arange(8) + 0.5)
        self.radial = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, self.tp.weight_numel))
        for linear, gain in ((self.radial[0], 1.0), (self.radial[2], 1.68)):  # SiLU's outputs have a size of 1 / 1.68
            nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, pos: Tensor, edge_index: Tensor, edge_shift: Tensor) -> Tensor:
        r = pos[edge_index[0]] + edge_shift - pos[edge_index[1]]
        d = (r.square().sum(-1, keepdim=True) + self.softening**2).sqrt()
        weight = self.radial(math.sqrt(2) * torch.cos(d * self.order.to(d) * (math.pi / self.radius)))
        return self.tp(x, edge_index, solid_harmonics(r / d, self.lmax), weight * radial_window(d, self.radius))


class ClebschGordanPower(nn.Module):
    """`geo.nn.GauntPower` with a weight for each path: x, x (x) x, (x (x) x) (x) x and so on, side by side.

    The linear map that follows adds the orders up. Beside MACE's symmetric contraction: x itself has no weights of its
    element; and from order 3 on a coupling's weight is the product of one for each factor, and what is multiplied on
    the way ends at the degrees of x.
    """

    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps, correlation: int, num_elements: int) -> None:
        super().__init__()
        self.products = nn.ModuleList()
        left = irreps_in
        for order in range(2, correlation + 1):
            to = irreps_out if order == correlation else irreps_in
            found = square_paths(left, to) if order == 2 else paths(left, irreps_in, to)
            instructions = [(i, j, k, "uuu", True) for i, j, k in found]
            self.products.append(o3.TensorProduct(left, irreps_in, to, instructions, shared_weights=False))
            left = to
        self.irreps_out = irreps_in
        for product in self.products:
            self.irreps_out = self.irreps_out + product.irreps_out
        self.weights = nn.ParameterList([torch.randn(num_elements, p.weight_numel) for p in self.products])

    def forward(self, x: Tensor, elements: Tensor) -> Tensor:
        powers = [x]
        for product, weight in zip(self.products, self.weights, strict=True):
            powers.append(product(powers[-1], x, elements @ weight))
        return torch.cat(powers, -1)


def paths(one: o3.Irreps, two: o3.Irreps, out: o3.Irreps, odd: bool = True) -> list[tuple[int, int, int]]:
    """Which irreps of two inputs couple to which of the output; without ``odd``, by pointwise products only."""
    return [
        (i, j, k)
        for i, (_, a) in enumerate(one)
        for j, (_, b) in enumerate(two)
        for k, (_, c) in enumerate(out)
        if c in a * b and (odd or (a.l + b.l + c.l) % 2 == 0)
    ]


def square_paths(irreps: o3.Irreps, out: o3.Irreps, odd: bool = True) -> list[tuple[int, int, int]]:
    """Those of features with themselves: a pair in one order only, and no antisymmetric path of one irrep."""
    return [(i, j, k) for i, j, k in paths(irreps, irreps, out, odd) if i < j or (i == j and out[k].ir.l % 2 == 0)]


# --- the potential: maps a batch to (energy [G], forces [V, 3]) -------------------------------------------------------


class Layer(nn.Module):
    """Mixing, convolution, mixing, many-body product, mixing; and the features of before, mixed, are added."""

    def __init__(
        self, args: argparse.Namespace, kind: str, irreps_in: o3.Irreps, last: bool, num_elements: int, degree: float
    ) -> None:
        super().__init__()
        both = o3.Irreps([(args.hidden, (l, p * (-1) ** l)) for l in range(args.lmax + 1) for p in (1, -1)])
        if kind == "cg":
            self.conv: nn.Module = ClebschGordanConv(irreps_in, both, args.lmax, args.cutoff)
        else:
            bracket = "bracket" if kind == "bracket" else False
            self.conv = GauntConv(irreps_in, lmax=args.lmax, radius=args.cutoff, antisymmetric=bracket)
        middle = o3.Irreps([(mul, ir) for mul, ir in both if ir in self.conv.irreps_out])
        self.irreps_out = o3.Irreps([(args.hidden, (0, 1))]) if last else middle
        power = ClebschGordanPower if kind == "cg" else GauntPower
        self.power = power(middle, self.irreps_out, args.correlation, num_elements)
        self.before, self.between = o3.Linear(irreps_in, irreps_in), o3.Linear(self.conv.irreps_out, middle)
        self.after, self.skip = o3.Linear(self.power.irreps_out, self.irreps_out), o3.Linear(irreps_in, self.irreps_out)
        self.scale = degree**-0.5  # sums over neighbours to the size of one
        self.num_paths = (
            len(paths(irreps_in, o3.Irreps.spherical_harmonics(args.lmax), middle, kind != "gaunt")),
            len(square_paths(middle, self.irreps_out, kind == "cg")),
        )

    def forward(self, x: Tensor, batch: Any, pos: Tensor) -> Tensor:
        two_body = self.conv(self.before(x), pos, batch.edge_index, edge_shift=batch.edge_shift)
        return self.after(self.power(self.between(two_body * self.scale), batch.x)) + self.skip(x)


class Potential(nn.Module):
    """The network: every layer adds to the energy of an atom, the last one through an MLP."""

    def __init__(self, args: argparse.Namespace, kind: str, num_elements: int, degree: float) -> None:
        super().__init__()
        self.embedding = nn.Linear(num_elements, args.hidden, bias=False)
        nn.init.normal_(self.embedding.weight)
        irreps, self.layers, self.readouts = o3.Irreps([(args.hidden, (0, 1))]), nn.ModuleList(), nn.ModuleList()
        for i in range(args.layers):
            last = i == args.layers - 1
            self.layers.append(Layer(args, kind, irreps, last, num_elements, degree))
            irreps = self.layers[-1].irreps_out
            deep = [nn.Linear(args.hidden, 16), nn.SiLU(), nn.Linear(16, 1)]
            self.readouts.append(nn.Sequential(*deep) if last else nn.Linear(args.hidden, 1))
        self.hidden = args.hidden

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        pos = batch.pos.detach().requires_grad_()
        x, energy = self.embedding(batch.x), 0.0
        for layer, readout in zip(self.layers, self.readouts, strict=True):
            x = layer(x, batch, pos)
            energy = energy + readout(x[:, : self.hidden])  # the scalars come first
        energy = scatter_sum(energy.squeeze(-1), batch.batch, 0, dim_size=batch.num_graphs)
        (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=self.training)
        return energy, -gradient


# --- the run ----------------------------------------------------------------------------------------------------------


def step_costs(modules: dict[str, EnergyForces], batch: Any, smoke: bool) -> dict[str, tuple[float, float | None]]:
    """Milliseconds (median, the models in turns) and peak memory (MiB) of a training step: loss and its gradient."""
    device = batch.pos.device.type

    def step(module: EnergyForces) -> tuple[Tensor, ...]:
        return torch.autograd.grad(module.train().loss(batch), [*module.model.parameters()])

    calls = {name: lambda module=module: step(module) for name, module in modules.items()}
    times = interleave(calls, *((1, 1) if smoke else (9, 5)), clock="cuda" if device == "cuda" else "wall")
    memory = {name: peak_extra_memory(call, device) for name, call in calls.items()}
    return {name: (times[name].median, None if memory[name] is None else memory[name] / 2**20) for name in modules}


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="which products (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=32, help="channels of every degree (default: %(default)s)")
    parser.add_argument("--lmax", type=int, default=2, help="highest degree (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="convolutions (default: %(default)s)")
    parser.add_argument("--correlation", type=int, default=2, help="highest power (default: %(default)s)")
    frame_flags(parser)
    training_flags(parser, out="runs/molecules_gaunt", batch_size=5, lr=2e-2, budget="60 seconds a model")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {', '.join(unknown)}")
    for flag, least in (("hidden", 1), ("lmax", 1), ("layers", 1), ("correlation", 2)):
        if (value := getattr(args, flag)) < least:
            parser.error(f"--{flag} is {value}, but must be at least {least}")
    start(args)

    frames = MoleculeFrames(args)
    train, val = frames.loaders()
    print(frames)
    degree = sum(f.num_edges for f in frames.train) / sum(f.num_nodes for f in frames.train)

    modules: dict[str, EnergyForces] = {}
    found: dict[str, list[object]] = {}
    curves, points = {}, {}
    for name in names:
        torch.manual_seed(args.seed)
        model = Potential(args, name, len(frames.species), degree)
        size = sum(p.numel() for p in model.parameters())
        print(f"\n{MODELS[name]}: {size:,} parameters")
        modules[name] = EnergyForces(model, frames.shift, frames.scale, args.energy_weight, lr=args.lr)
        began = time.perf_counter()
        trainer = fit(modules[name], train, val, args, name, max_seconds=60.0)
        seconds, epochs = time.perf_counter() - began, trainer.current_epoch
        curves[MODELS[name]] = read_log(args.out / name, "val_force_mae")
        paths = [sum(counts) for counts in zip(*(layer.num_paths for layer in model.layers), strict=True)]
        found[name] = [*frames.errors(MODELS[name], modules[name]), size, *paths, epochs, round(seconds)]
    device = modules[names[0]].device
    batch = next(iter(DataLoader(frames.train, batch_size=args.batch_size))).to(device)
    rows: list[list[object]] = []
    for name, (milliseconds, memory) in step_costs(modules, batch, args.smoke).items():
        energy, force, *rest = found[name]
        rows.append([MODELS[name], energy, force, milliseconds, memory, *rest])
        points[MODELS[name]] = ([milliseconds], [force])
    rows += [[name, *errors, *[None] * 7] for name, errors in PAPER.items()]

    frames.parity_plot(args.out / "parity.png")
    curve_plot(args.out / "learning.png", curves, "epoch", "force MAE on validation frames (meV/A)", args.data)
    curve_plot(args.out / "cost.png", points, "ms per training step", "force MAE on test frames (meV/A)", args.data)
    setting = (
        f"{len(frames.train)} training frames, {len(frames.test)} test frames; {args.layers} layers of {args.hidden}, "
        f"lmax {args.lmax}, correlation {args.correlation}, cutoff {args.cutoff:g} A, batch {args.batch_size}, peak lr "
        f"{args.lr:g}, seed {args.seed}, {torch.get_num_threads()} threads."
    )
    notes = [
        setting,
        "A step is the loss and its gradient, on one batch: median time of the networks in turns, and peak memory.",
        "Paths: pairs of irreps and what they couple to, of all layers; those of a product in its square.",
        "The paper's rows: 3BPA at 300 K, 256 channels, lmax 2, correlation 3, 2000 epochs on a GPU.",
        f"Plots: {args.out}/parity.png, {args.out}/learning.png, {args.out}/cost.png",
    ]
    header = ["products", "energy MAE (meV)", "force MAE (meV/A)", "ms per step", "MiB", "parameters"]
    header += ["paths: convolutions", "powers", "epochs", "seconds"]
    report(args, f"Test errors on {args.data}", header, rows, notes)
    return rows


if __name__ == "__main__":
    main()
