"""Predict where five charged particles will be: an SE(3)-equivariant network against published numbers.

Each sample gives positions, velocities and charges of five particles at one time; wanted are the positions 1000
simulator steps later. A velocity is a vector, so it enters PONITA (https://arxiv.org/abs/2310.02970) as a vector and
the displacement leaves it as one. Beside it: the straight line along the velocity, and the same network without
orientations, which can take no vectors and sees the speeds only.

  python examples/nbody.py                                     # a small network, two minutes a model on two cores
  python examples/nbody.py --root DIR                          # reads DIR/nbody_charged/nbody_small_charged5_seed43.npz
  python examples/nbody.py --paper --accelerator gpu           # the official setting: 5 layers of 128, 10,000 epochs
  python examples/nbody.py --paper --max-time 00:00:27:00 --slice 00:00:09:00 --resume
                                                               # the same in slices of nine minutes: repeat the command
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from geo.datasets import NBody
from geo.nn import PONITA
from geo.training import Supervised, curve_plot, fit, parse_time, read_log, report, start, training_flags

MODELS = {"line": "straight line", "r3": "PONITA, no orientations", "ponita": "PONITA"}
PAPER = {"EGNN": 0.0070, "SEGNN": 0.0043, "PONITA": 0.0043}


class Batches:
    """All samples have five particles, so a batch is a slice of four tensors: nothing to collate."""

    def __init__(self, dataset: Any, batch_size: int, shuffle: bool) -> None:
        frames = list(dataset)
        self.fields = {key: torch.stack([frame[key] for frame in frames]) for key in ("pos", "vel", "charge", "y")}
        self.batch_size, self.shuffle = batch_size, shuffle

    def to(self, device: torch.device) -> Batches:
        self.fields = {key: value.to(device) for key, value in self.fields.items()}
        return self

    def __len__(self) -> int:
        size = len(self.fields["pos"])
        # Training batches are all of one size, which CUDA graphs need.
        return max(1, size // self.batch_size) if self.shuffle else -(-size // self.batch_size)

    def __iter__(self) -> Iterator[Data]:
        size = len(self.fields["pos"])
        order = torch.randperm(size) if self.shuffle else torch.arange(size)
        for i in range(len(self)):
            pick = order[i * self.batch_size : (i + 1) * self.batch_size].to(self.fields["pos"].device)
            yield Data(**{key: value[pick].flatten(0, 1) for key, value in self.fields.items()}, num_graphs=len(pick))


def pairs(num_graphs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Edges between all particles of each graph, and the graph of each particle."""
    graph, target, source = torch.meshgrid(*(torch.arange(n, device=device) for n in (num_graphs, 5, 5)), indexing="ij")
    edge_index = torch.stack([5 * graph + source, 5 * graph + target])[:, source != target]
    return edge_index, torch.arange(num_graphs, device=device).repeat_interleave(5)


class Displacement(nn.Module):
    """PONITA from (charge, velocity) to the displacement of each particle."""

    def __init__(self, args: argparse.Namespace, num_ori: int) -> None:
        super().__init__()
        self.num_ori = num_ori
        self.net = PONITA(
            # Without orientations there are no vectors: the speed goes in, and a factor for each pair vector comes out.
            in_channels=1 if num_ori else 2,
            hidden_channels=args.hidden,
            out_channels=0 if num_ori else 2,
            num_layers=args.layers,
            in_vec=1 if num_ori else 0,
            out_vec=1 if num_ori else 0,
            num_ori=num_ori,
            basis_dim=args.basis,
            layer_scale=1e-6 if args.paper else None,
            rotate="train" if num_ori else None,
        )
        self.edges: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def inputs(self, batch: Any) -> dict[str, Any]:
        """What the network takes of a batch."""
        key = batch.num_graphs, batch.pos.device
        if key not in self.edges:
            self.edges[key] = pairs(*key)
        edge_index, graph = self.edges[key]
        arguments = {"pos": batch.pos, "edge_index": edge_index, "batch": graph, "batch_size": batch.num_graphs}
        if self.num_ori:
            return {"x": batch.charge, "vec": batch.vel.unsqueeze(1), **arguments}
        return {"x": torch.cat([batch.charge, batch.vel.norm(dim=-1, keepdim=True)], dim=-1), **arguments}

    def forward(self, batch: Any) -> Tensor:
        scalar, vector = self.net(**self.inputs(batch))
        if self.num_ori:
            return batch.pos + vector.squeeze(1)
        # The only vectors at hand are the velocity and the place in the group.
        centre = batch.pos.view(-1, 5, 3).mean(dim=1).repeat_interleave(5, dim=0)
        return batch.pos + scalar[:, :1] * batch.vel + scalar[:, 1:] * (batch.pos - centre)


class Line(nn.Module):
    """Everything flies on along its velocity; the time is the one number that is fitted."""

    def __init__(self, batch: Data) -> None:
        super().__init__()
        step = batch.y - batch.pos
        self.register_buffer("time", (step * batch.vel).sum() / batch.vel.pow(2).sum())

    def forward(self, batch: Any) -> Tensor:
        return batch.pos + self.time * batch.vel


def mse(prediction: Tensor, batch: Any) -> Tensor:
    return torch.nn.functional.mse_loss(prediction, batch.y)


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="line,r3,ponita", help=f"of {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument(
        "--paper", action="store_true", help="the official setting, for a GPU; sets the four sizes below"
    )
    parser.add_argument("--hidden", type=int, default=48, help="channels (default: %(default)s; --paper 128)")
    parser.add_argument("--layers", type=int, default=3, help="convolutions (default: %(default)s; --paper 5)")
    parser.add_argument(
        "--basis", type=int, default=48, help="width of the kernel basis (default: %(default)s; --paper 256)"
    )
    parser.add_argument("--num-ori", type=int, default=12, help="directions (default: %(default)s; --paper 16)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network (on a GPU: with CUDA graphs)")
    parser.add_argument(
        "--slice",
        type=parse_time,
        default=None,
        metavar="DD:HH:MM:SS",
        help="stop after this time; go on with --resume",
    )
    training_flags(parser, out="runs/nbody", batch_size=100, lr=5e-3, budget="2 minutes a model; --paper 10,000 epochs")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {', '.join(unknown)}")
    if args.paper:
        args.hidden, args.layers, args.basis, args.num_ori = 128, 5, 256, 16
        args.lr = 1e-3 if args.lr == parser.get_default("lr") else args.lr
        names = ["line", "ponita"] if args.models == parser.get_default("models") else names
    start(args)

    few = {"num_samples": 200} if args.smoke else {}
    parts = {split: NBody(args.root, split=split, **few) for split in ("train", "val", "test")}
    loaders = {
        split: Batches(part, args.batch_size if split == "train" else 500, split == "train")
        for split, part in parts.items()
    }
    if torch.cuda.is_available() and args.accelerator in ("auto", "gpu", "cuda"):
        loaders = {split: part.to(torch.device("cuda")) for split, part in loaders.items()}
    print(", ".join(f"{len(part)} {split}" for split, part in parts.items()), "samples of five charged particles")

    rows: list[list[object]] = []
    curves = {}
    for name in names:
        torch.manual_seed(args.seed)
        epochs, model = 0, None
        if name == "line":
            model = Line(next(iter(Batches(parts["train"], len(parts["train"]), False))))
        else:
            model = Displacement(args, args.num_ori if name == "ponita" else 0)
            # Kernels scaled so that each layer keeps the spread of its inputs.
            model.net.calibrate(model.inputs(next(iter(Batches(parts["train"], 200, False)))))
            if args.compile:
                model.net.compile(mode="reduce-overhead" if torch.cuda.is_available() else "default")
        module = Supervised(model, mse, {"mse": mse}, lr=args.lr, warmup=0.001 if args.paper else 0.02)
        if name != "line":
            print(f"\n{MODELS[name]}: {sum(p.numel() for p in model.parameters()):,} parameters")
            trainer = fit(
                module,
                loaders["train"],
                loaders["val"],
                args,
                name,
                epochs=10_000 if args.paper else None,
                max_seconds=None if args.paper else 120.0,
                slice_seconds=args.slice,
                validate_every=25 if args.paper else 2,
            )
            epochs = trainer.current_epoch
            curves[MODELS[name]] = read_log(args.out / name, "val_mse")
        module.eval()
        with torch.no_grad():
            batches = (batch.to(module.device) for batch in loaders["test"])
            errors = [(mse(module(batch), batch), batch.num_graphs) for batch in batches]
        error = float(sum(value * size for value, size in errors) / sum(size for _, size in errors))
        rows.append([MODELS[name], error, epochs, "this run"])
    rows += [[name, value, 10_000, "paper"] for name, value in PAPER.items()]
    curve_plot(
        args.out / "learning.png",
        curves,
        "epoch",
        "mean squared error on validation samples",
        "charged five-body",
        reference=PAPER,
    )
    setting = (
        f"This run: {args.layers} layers of {args.hidden}, {args.num_ori} orientations, batch {args.batch_size}, "
        f"peak lr {args.lr}, seed {args.seed}, {len(parts['train'])} training samples; the epochs are those run."
    )
    notes = [
        setting,
        "Published (3000 training samples): tables of the EGNN, SEGNN and PONITA papers.",
        f"Plot: {args.out}/learning.png",
    ]
    report(
        args,
        "Mean squared error of the predicted positions on test samples",
        ["model", "MSE", "epochs", "from"],
        rows,
        notes,
    )
    return rows


if __name__ == "__main__":
    main()
