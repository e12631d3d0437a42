"""Learn the forces of a real molecule with an SE(3)-equivariant network, then run molecular dynamics with it.

PONITA (https://arxiv.org/abs/2310.02970) keeps a feature for each atom and each of a few directions in space, and
convolves over both. Here it becomes an interatomic potential: it maps atoms and positions to an energy, and the forces
are that energy's exact negative gradient. Beside it, trained for the same time on the same frames: SchNet (of PyTorch
Geometric), which sees distances only, and the mean predictor.

By default the data are made on the spot: molecular dynamics of ethanol with GFN2-xTB, a quantum-mechanical method.

  python examples/molecules.py                                          # about three minutes on two cores
  python examples/molecules.py --data rmd17:aspirin --root DIR          # reads DIR/rmd17/rmd17_aspirin_train_01.npz
  python examples/molecules.py --data train_300K.xyz --max-time 00:00:10:00
  python examples/molecules.py --models ponita,r3 --epochs 40           # with and without orientations, equal epochs
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.loader import DataLoader
from torch_geometric.nn import SchNet

from geo.atoms import GeoCalculator
from geo.nn import PONITA
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

MODELS = {"mean": "mean predictor", "schnet": "SchNet (PyG)", "r3": "PONITA, no orientations", "ponita": "PONITA"}

# Energy (meV) and force (meV/A) errors in table 1 of the paper: 950 training frames, 5000 epochs on a GPU.
PAPER = {
    "aspirin": {"ponita": (1.7, 5.8), "r3": (4.7, 16.3)},
    "azobenzene": {"ponita": (0.7, 2.3), "r3": (3.2, 12.2)},
    "benzene": {"ponita": (0.17, 0.3), "r3": (0.2, 0.4)},
    "ethanol": {"ponita": (0.4, 2.5), "r3": (0.7, 4.1)},
    "malonaldehyde": {"ponita": (0.6, 4.0), "r3": (0.9, 5.1)},
    "paracetamol": {"ponita": (1.1, 4.3), "r3": (2.8, 11.4)},
    "toluene": {"ponita": (0.3, 1.3), "r3": (0.6, 3.4)},
}


# --- models: each maps a batch to (energy [G], forces [V, 3]) ---------------------------------------------------------


class Potential(nn.Module):
    """PONITA, with or without orientations."""

    def __init__(self, args: argparse.Namespace, num_elements: int, num_ori: int) -> None:
        super().__init__()
        self.ponita = PONITA(
            in_channels=num_elements,
            hidden_channels=args.hidden,
            out_channels=1,
            num_layers=args.layers,
            num_ori=num_ori,
            basis_dim=args.basis,
            radius=args.cutoff,
            readout="add",
            rotate="train" if num_ori else None,
        )

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.ponita.energy_and_forces(
            batch.x,
            batch.pos,
            batch.edge_index,
            batch.batch,
            batch.edge_shift,
            create_graph=self.training,
            batch_size=batch.num_graphs,
        )


class SchNetPotential(nn.Module):
    """PyG's SchNet on the same graph: its own neighbour search needs pyg-lib."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.schnet = SchNet(
            hidden_channels=args.hidden,
            num_filters=args.hidden,
            num_interactions=args.layers,
            cutoff=args.cutoff,
            interaction_graph=self.edges,
        )

    def edges(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        edge_index, edge_shift = self.graph
        return edge_index, (pos[edge_index[0]] + edge_shift - pos[edge_index[1]]).norm(dim=-1)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        pos = batch.pos.detach().requires_grad_()
        self.graph = (batch.edge_index, batch.edge_shift)
        energy = self.schnet(batch.z, pos, batch.batch).view(-1)
        (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=self.training)
        return energy, -gradient


class Mean(nn.Module):
    """No forces, and the energy of the atoms alone: what there is to beat."""

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return batch.pos.new_zeros(batch.num_graphs), torch.zeros_like(batch.pos)


# --- the run ----------------------------------------------------------------------------------------------------------


def dynamics(calculator: GeoCalculator, frame: Any, args: argparse.Namespace) -> dict[str, float]:
    """NVE molecular dynamics from a test frame at 300 K; writes the trajectory and the plot of the energy."""
    from ase import Atoms, units
    from ase.io import write
    from ase.md.verlet import VelocityVerlet

    atoms = Atoms(numbers=frame.z.numpy(), positions=frame.pos.numpy().astype(np.float64))
    if "cell" in frame:
        atoms.set_cell(frame.cell.view(3, 3).numpy())
        atoms.set_pbc(frame.pbc.view(3).numpy())
    atoms.calc = calculator
    # Maxwell and Boltzmann's momenta at 300 K, with the centre of mass at rest.
    mass = atoms.get_masses()[:, None]
    momenta = np.random.default_rng(args.seed).normal(size=(len(atoms), 3)) * np.sqrt(mass * 300 * units.kB)
    atoms.set_momenta(momenta - mass * momenta.sum(axis=0) / mass.sum())
    steps = 10 if args.smoke else round(args.md_time / 0.5)
    clock, total, potential, images = [], [], [], []
    engine = VelocityVerlet(atoms, timestep=0.5 * units.fs)

    def record() -> None:
        clock.append(engine.get_time() / units.fs)
        potential.append(1000 * atoms.get_potential_energy() / len(atoms))
        total.append(potential[-1] + 1000 * atoms.get_kinetic_energy() / len(atoms))
        if len(clock) % 2:
            images.append(atoms.copy())

    engine.attach(record, interval=max(1, steps // 200))
    # A single molecule is too little work to share between threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.perf_counter()
    engine.run(steps)
    seconds = time.perf_counter() - began
    torch.set_num_threads(threads)
    write(args.out / "md.xyz", images)
    change, swing = np.array(total) - total[0], np.array(potential) - potential[0]
    slope = np.polyfit(clock, change, 1)[0] * 1000
    curve_plot(
        args.out / "md_energy.png",
        {f"total: drifts {slope:+.2g} per ps": (clock, change), "potential": (clock, swing)},
        "time (fs)",
        "change of energy (meV per atom)",
        "NVE dynamics with the trained PONITA: total energy should stay flat",
        log=False,
    )
    return {"steps": steps, "seconds": seconds, "drift": float(slope), "largest": float(abs(change).max())}


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mean,schnet,ponita", help=f"of {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="channels (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="convolutions (default: %(default)s)")
    parser.add_argument("--basis", type=int, default=32, help="width of the kernel basis (default: %(default)s)")
    parser.add_argument("--num-ori", type=int, default=12, help="directions on the sphere (default: %(default)s)")
    parser.add_argument("--md-time", type=float, default=1000.0, help="molecular dynamics in fs (default: %(default)s)")
    frame_flags(parser)
    training_flags(parser, out="runs/molecules", batch_size=5, lr=5e-3, budget="45 seconds a model")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {', '.join(unknown)}")
    start(args)

    frames = MoleculeFrames(args)
    train, val = frames.loaders()
    print(frames)

    rows: list[list[object]] = []
    curves = {}
    trained: EnergyForces | None = None
    for name in names:
        torch.manual_seed(args.seed)
        model: nn.Module
        if name == "mean":
            model = Mean()
        elif name == "schnet":
            model = SchNetPotential(args)
        else:
            model = Potential(args, len(frames.species), args.num_ori if name == "ponita" else 0)
            # Starts bases and kernels at the scale of the data: it learns much faster.
            model.ponita.calibrate(next(iter(DataLoader(frames.train, batch_size=100))))
        lr = args.lr / 5 if name == "schnet" else args.lr
        ema = None if name == "mean" else 0.99
        module = EnergyForces(model, frames.shift, frames.scale, args.energy_weight, lr=lr, ema=ema)
        seconds, epochs = 0.0, 0
        if name != "mean":
            print(f"\n{MODELS[name]}: {sum(p.numel() for p in model.parameters()):,} parameters")
            began = time.perf_counter()
            trainer = fit(module, train, val, args, name, max_seconds=45.0)
            seconds, epochs = time.perf_counter() - began, trainer.current_epoch
            curves[MODELS[name]] = read_log(args.out / name, "val_force_mae")
        size = sum(p.numel() for p in model.parameters())
        rows.append([MODELS[name], *frames.errors(MODELS[name], module), size, epochs, round(seconds)])
        if name == "ponita":
            trained = module

    setting = (
        f"{len(frames.train)} training frames, {len(frames.test)} test frames; {args.layers} layers of {args.hidden}, "
        f"{args.num_ori} directions, batch {args.batch_size}, peak lr {args.lr:g} (SchNet a fifth of it), "
        f"seed {args.seed}, {torch.get_num_threads()} threads."
    )
    notes = [setting]
    kind, _, molecule = args.data.partition(":")
    for name in names:
        if kind == "rmd17" and name in PAPER.get(molecule, {}):
            energy, strength = PAPER[molecule][name]
            notes.append(f"{MODELS[name]} in the paper: {energy} meV, {strength} meV/A (5 layers of 128, 5000 epochs).")
    frames.parity_plot(args.out / "parity.png")
    curve_plot(args.out / "learning.png", curves, "epoch", "force MAE on validation frames (meV/A)", args.data)
    notes.append(f"Plots: {args.out}/parity.png, {args.out}/learning.png")
    if trained is not None:
        elements = {z: float(frames.shift[z]) for z in frames.species}
        ponita = trained.predictor.ponita
        GeoCalculator(ponita, frames.species, args.cutoff, elements, frames.scale).save(args.out / "potential")
        calculator = GeoCalculator.from_file(args.out / "potential")
        md = dynamics(calculator, frames.test[0], args)
        notes.append(
            f"NVE dynamics with the saved potential: {md['steps']} steps of 0.5 fs in {md['seconds']:.0f} s; the "
            f"energy drifts {md['drift']:+.2g} meV per atom and ps, at most {md['largest']:.2g} away "
            f"({args.out}/md_energy.png, md.xyz)."
        )
        notes.append(
            f"The potential: geo.atoms.GeoCalculator.from_file('{args.out}/potential'), "
            f"or its network alone: geo.nn.PONITA.load('{args.out}/potential')."
        )
    header = ["model", "energy MAE (meV)", "force MAE (meV/A)", "parameters", "epochs", "seconds"]
    report(args, f"Test errors on {args.data}", header, rows, notes)
    return rows


if __name__ == "__main__":
    main()
