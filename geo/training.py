"""What the examples share: Lightning modules, command-line flags, the last table and the plots.

An example is one flat script. What every script would otherwise repeat stands here once:

* ``training_flags`` adds the flags (``--epochs``, ``--max-time``, ``--resume``, ``--smoke``, ...) to a parser;
* ``frame_flags`` and ``MoleculeFrames`` are the data of a potential: which frames, in batches, and the test errors;
* ``EnergyForces`` and ``Supervised`` are the two Lightning modules: a potential, and anything with one loss;
* ``fit`` builds the trainer (progress bar, CSV log, checkpoints, gradient clipping, time budget) and trains;
* ``format_table``, ``report``, ``parity_plot``, ``curve_plot`` and ``save_weights`` print and save what a run found.

The learning rate warms up linearly and then falls as a cosine to zero *at the end of the budget*, a number of epochs
or a time: with ``--max-time`` the cosine reads the clock, so that models trained for the same time each see their whole
schedule.

Needs the extra ``train``: ``pip install torch-geo[train]``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch_geometric.loader import DataLoader

from geo.datasets import ForceField, XTBTrajectory, energy_shift
from geo.transforms import AddRadiusGraph

try:
    import lightning
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.utilities import rank_zero_only
except ImportError as error:
    raise ImportError("geo.training needs Lightning: pip install 'torch-geo[train]'") from error

__all__ = [
    "EnergyForces",
    "MoleculeFrames",
    "Supervised",
    "curve_plot",
    "fit",
    "format_table",
    "frame_flags",
    "parity_plot",
    "parse_time",
    "positive_integer",
    "read_log",
    "report",
    "save_weights",
    "start",
    "training_flags",
    "write_atomic",
]

EV_TO_MEV = 1000.0


# --- flags ------------------------------------------------------------------------------------------------------------


def parse_time(text: str) -> float:
    """Seconds in a time span written as in Lightning, ``DD:HH:MM:SS``.

    Args:
        text: Four integers separated by colons.

    Raises:
        ValueError: If the text has another form.

    Example:
        >>> parse_time("00:00:01:30")
        90.0
    """
    match = re.fullmatch(r"(\d+):(\d+):(\d+):(\d+)", text.strip())
    if match is None:
        raise ValueError(f"max-time must be written DD:HH:MM:SS (for example 00:00:01:30), got {text!r}")
    days, hours, minutes, seconds = (int(group) for group in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _time_flag(text: str) -> float:
    try:
        return parse_time(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive_integer(text: str) -> int:
    """A flag's value as an integer of at least 1, for the ``type=`` of a parser's argument.

    Args:
        text: As typed.

    Raises:
        argparse.ArgumentTypeError: If it is something else; the parser prints its message with the flag's name.

    Example:
        >>> positive_integer("3")
        3
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def training_flags(
    parser: argparse.ArgumentParser,
    *,
    out: str,
    batch_size: int,
    lr: float | None,
    budget: str,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Add the flags that all examples understand.

    Args:
        parser: The example's parser.
        out: Default folder of everything the run writes.
        batch_size: Default number of graphs in a step.
        lr: Default peak learning rate; None where the example chooses it with its other settings.
        budget: What is trained when neither ``--epochs`` nor ``--max-time`` is given, in words (for ``--help``).
        seed: Default seed.
        threads: Default number of CPU threads; None for all cores.
    """
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs", type=positive_integer, default=None, help=f"passes over the training data (default: {budget})"
    )
    group.add_argument(
        "--max-time",
        type=_time_flag,
        default=None,
        metavar="DD:HH:MM:SS",
        help="training time of each model, as in Lightning; with --epochs, whichever ends first",
    )
    group.add_argument(
        "--batch-size", type=positive_integer, default=batch_size, help="graphs in a step (default: %(default)s)"
    )
    rate = "the preset's" if lr is None else str(lr)
    group.add_argument("--lr", type=float, default=lr, help=f"peak learning rate (default: {rate})")
    group.add_argument(
        "--seed", type=int, default=seed, help="seed of weights, shuffling and splits (default: %(default)s)"
    )
    group.add_argument("--resume", action="store_true", help="continue from the last checkpoint found in --out")
    group.add_argument("--smoke", action="store_true", help="two steps on a handful of samples: does it run at all?")
    group = parser.add_argument_group("machine")
    group.add_argument("--accelerator", default="auto", help="cpu, gpu, mps or auto (default: %(default)s)")
    group.add_argument("--devices", type=positive_integer, default=1, help="how many of them (default: %(default)s)")
    group.add_argument(
        "--threads", type=positive_integer, default=threads, help=f"CPU threads (default: {threads or 'all cores'})"
    )
    group = parser.add_argument_group("files")
    group.add_argument(
        "--out", type=Path, default=Path(out), help="folder for logs, checkpoints, plots (default: %(default)s)"
    )
    group.add_argument("--root", type=Path, default=None, help="folder of the data (default: a cache inside --out)")


def start(args: argparse.Namespace) -> None:
    """Seed every generator, set the threads and make the output folder; call it first.

    Args:
        args: Parsed flags of ``training_flags``.
    """
    # Lightning advises more data-loader workers and other tastes; a user of an example cannot act on any of it.
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    _quiet_lightning()
    _keep_memory()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    lightning.seed_everything(args.seed, workers=True, verbose=False)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.smoke:
        args.batch_size = min(args.batch_size, 8)
    if args.root is None:
        args.root = args.out / "data"


def _keep_memory() -> None:
    """Let glibc keep the memory of large tensors for the next ones: fetched anew, each page costs a fault.

    It saves a quarter of a full-batch step on the CPU.
    """
    import ctypes

    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def _quiet_lightning() -> None:
    import logging

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


# --- molecules: frames with energies and forces -----------------------------------------------------------------------


def frame_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the frames a potential learns from; ``training_flags`` has the rest.

    Args:
        parser: The example's parser.
    """
    parser.add_argument(
        "--data",
        default="xtb:ethanol",
        help="xtb:NAME, rmd17:NAME, 3bpa, acac, water, or a file: .xyz, .npz, DeePMD folder (default: %(default)s)",
    )
    parser.add_argument("--train", type=int, default=None, help="use only so many training frames")
    parser.add_argument("--test", type=int, default=None, help="use only so many test frames")
    parser.add_argument("--cutoff", type=float, default=5.0, help="radius of the graph in A (default: %(default)s)")
    parser.add_argument(
        "--energy-weight", type=float, default=0.02, help="weight of the energy error (default: %(default)s)"
    )


class MoleculeFrames:
    """Frames of molecules with graphs, energies and forces: to train a potential on, and to compare potentials by.

    Args:
        args: Parsed flags of ``frame_flags`` and ``training_flags``.

    Attributes:
        train: Training frames; each has its graph and the one-hot elements as ``x``.
        val: Validation frames.
        test: Test frames.
        species: Atomic numbers that occur in the training frames, in the order of the one-hot elements.
        scale: Root mean square of the training forces, in eV/Å.
        shift: Energy of each element in eV, fitted to the training energies.
        energies: By model, the energies of the test frames in eV, once ``errors`` was asked for it.
        forces: By model, the force components in eV/Å.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from geo.atoms import one_hot  # needs ASE, which the other examples do not

        self.name, self.batch_size = args.data, args.batch_size
        parts = _splits(args)
        self.species = sorted({int(z) for frame in parts["train"][: args.train] for z in frame.z.unique()})
        graph = AddRadiusGraph(args.cutoff)

        def prepare(frame: Any) -> Any:
            frame = graph(frame)
            frame.x = one_hot(frame.z, self.species)
            return frame

        self.train = [prepare(frame) for frame in parts["train"][: args.train]]
        self.val = [prepare(frame) for frame in parts["val"]]
        self.test = [prepare(frame) for frame in parts["test"][: args.test]]
        self.scale = float(torch.cat([frame.force for frame in self.train]).pow(2).mean().sqrt())
        self.shift = energy_shift(self.train)
        self.energies: dict[str, np.ndarray] = {}
        self.forces: dict[str, np.ndarray] = {}

    def __repr__(self) -> str:
        sizes = f"{len(self.train)} training, {len(self.val)} validation, {len(self.test)} test frames"
        return f"{self.name}: {sizes} of {len(self.train[0].z)} atoms"

    def loaders(self) -> tuple[DataLoader, DataLoader]:
        """Loaders of the training batches and of the validation frames."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True), DataLoader(self.val, batch_size=50)

    def errors(self, name: str, module: EnergyForces) -> tuple[float, float]:
        """Mean absolute errors on the test frames, of the energy in meV and of the force components in meV/Å.

        Args:
            name: Of the model; its predictions are kept under it.
            module: The trained model.
        """
        module.eval()
        pairs = [module(batch.to(module.device)) for batch in DataLoader(self.test, batch_size=50)]
        self.energies[name], self.forces[name] = (torch.cat([pair[i] for pair in pairs]).cpu().numpy() for i in (0, 1))
        energy, force = self._truth()
        return (
            EV_TO_MEV * float(abs(self.energies[name] - energy).mean()),
            EV_TO_MEV * float(abs(self.forces[name] - force).mean()),
        )

    def parity_plot(self, path: str | os.PathLike[str]) -> Path:
        """Predicted against reference energies and forces of the test frames, of every model asked for its errors.

        Args:
            path: PNG to write.
        """
        energy, force = self._truth()
        energies = {name: value - energy.mean() for name, value in self.energies.items()}
        panels = {
            "energy (eV, mean taken off)": (energy - energy.mean(), energies),
            "force component (eV/A)": (force, self.forces),
        }
        return parity_plot(path, panels, f"{self.name}: {len(self.test)} test frames")

    def _truth(self) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.array([float(frame.energy) for frame in self.test]),
            torch.cat([frame.force for frame in self.test]).numpy(),
        )


def _splits(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Training, validation and test frames without graphs."""
    kind, _, name = args.data.partition(":")
    parts: dict[str, list[Any]] = {}
    if kind == "xtb":
        # Three trajectories of their own: no test frame is a neighbour in time of a training frame.
        frames = {"train": 24, "val": 4, "test": 8} if args.smoke else {"train": 700, "val": 50, "test": 300}
        quick = {"warmup": 5.0} if args.smoke else {}
        for split, count in frames.items():
            settings: dict[str, Any] = {"split": split, "num_frames": count, "progress": sys.stderr.isatty(), **quick}
            parts[split] = list(XTBTrajectory(args.root, name or "ethanol", **settings))
        return parts
    # Published data have no validation frames: the last twentieth of the training frames serves.
    published = kind in ("rmd17", "3bpa", "acac")
    for split in ("train", "test") if published else ("train", "val", "test"):
        try:
            parts[split] = list(ForceField(args.root, args.data, split=split))
        except (ValueError, OSError) as error:
            raise SystemExit(f"--data {args.data} --root {args.root}: {error}") from None
    if published:
        num_val = max(1, len(parts["train"]) // 20)
        parts["train"], parts["val"] = parts["train"][:-num_val], parts["train"][-num_val:]
    return parts


# --- Lightning modules ------------------------------------------------------------------------------------------------


class _Trained(lightning.LightningModule):
    """Optimiser, schedule and moving average, the same for every example."""

    def __init__(
        self,
        model: torch.nn.Module,
        lr: float = 5e-4,
        weight_decay: float = 1e-10,
        warmup: float = 0.02,
        ema: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self.max_seconds: float | None = None
        self.epochs_trained = 0  # since the module was made: of a resumed run only the new ones
        # A moving average of 0.99 forgets the start within a few hundred steps.
        self.average = None if ema is None else copy.deepcopy(model).requires_grad_(False)
        self._blend = None if ema is None else get_ema_multi_avg_fn(ema)

    @property
    def predictor(self) -> torch.nn.Module:
        """The weights to predict with: the moving average where there is one."""
        return self.model if self.average is None or self.training else self.average

    def progress(self, step: int, total: float) -> float:
        """How much of the budget is spent, between 0 and 1: by steps, or by the clock where that is further."""
        done = step / total if math.isfinite(total) and total > 0 else 0.0
        if self.max_seconds:
            timers = [callback for callback in self.trainer.callbacks if isinstance(callback, Timer)]
            done = max([done, *(timer.time_elapsed("train") / self.max_seconds for timer in timers)])
        return min(done, 1.0)

    def configure_optimizers(self) -> Any:
        """Adam, warm-up then cosine; weight decay as `weight_decay` says."""
        decay: list[torch.nn.Parameter] = []
        plain: list[torch.nn.Parameter] = []
        for p in self.model.parameters():
            if p.requires_grad:
                (plain if p.dim() <= 1 or getattr(p, "_no_weight_decay", False) else decay).append(p)
        groups = [{"params": decay, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=self.lr)
        total = float(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate(self, step: int, total: float) -> float:
        """The learning rate of a step as a share of its peak; override it for another schedule."""
        done = self.progress(step, total)
        rise = min(1.0, done / self.warmup) if self.warmup > 0 else 1.0
        return max(rise, 0.02) * 0.5 * (1.0 + math.cos(math.pi * done))

    def on_train_epoch_end(self) -> None:
        """Count the epochs."""
        self.epochs_trained += 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the moving average of the parameters; buffers are copied."""
        if self.average is None or self._blend is None:
            return
        self._blend([*self.average.parameters()], [*self.model.parameters()], 0)
        # By name: PyTorch's AveragedModel goes by place, and copies of e3nn's products have buffers in other places.
        buffers = dict(self.average.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffers[name].copy_(buffer)


class EnergyForces(_Trained):
    """Train a potential on energies and forces.

    The model sees one batch and returns ``(energy [G], forces [V, 3])`` *in units of* ``scale``, without the atoms'
    own energies; this module adds them back, so what ``forward`` returns is in eV and eV/Å. With F the reference
    forces, s the scale, E the reference energy minus the per-element shifts, the loss is

        energy_weight * mean (e - E/s)^2  +  mean (f - F/s)^2.

    Args:
        model: Called as ``model(batch)``.
        energy_shift: Energy of each atom by its atomic number, in eV, a tensor [max Z + 1].
        scale: Root mean square of the training forces, in eV/Å.
        energy_weight: Weight of the energy term.
        lr: Peak learning rate.
        weight_decay: Of matrices only, without those marked by an attribute ``_no_weight_decay`` (Mamba's A).
        warmup: Fraction of the budget in which the learning rate rises.
        ema: Decay of the moving average of the weights used for prediction, or None.
    """

    energy_shift: Tensor

    def __init__(
        self,
        model: torch.nn.Module,
        energy_shift: Tensor,
        scale: float,
        energy_weight: float = 0.02,
        lr: float = 5e-4,
        weight_decay: float = 1e-10,
        warmup: float = 0.02,
        ema: float | None = 0.99,
    ) -> None:
        super().__init__(model, lr, weight_decay, warmup, ema)
        # Total energies are thousands of eV: float32 would round them to 1e-3 eV.
        self.register_buffer("energy_shift", energy_shift.to(torch.float64))
        self.scale, self.energy_weight = float(scale), float(energy_weight)

    def atom_energy(self, batch: Any) -> Tensor:
        """Sum of the atoms' own energies of each graph, float64 [G]."""
        shift = self.energy_shift[batch.z]
        return torch.zeros(batch.num_graphs, dtype=shift.dtype, device=shift.device).index_add_(0, batch.batch, shift)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Energy [G] in eV (float64) and forces [V, 3] in eV/Å."""
        with torch.enable_grad():
            energy, forces = self.predictor(batch)
        return energy.detach().to(torch.float64) * self.scale + self.atom_energy(batch), forces.detach() * self.scale

    def loss(self, batch: Any) -> Tensor:
        """The weighted squared error that a training step lowers."""
        energy, forces = self.model(batch)
        target = ((batch.energy.view(-1).to(torch.float64) - self.atom_energy(batch)) / self.scale).to(energy.dtype)
        energy_loss = torch.nn.functional.mse_loss(energy, target)
        force_loss = torch.nn.functional.mse_loss(forces, batch.force / self.scale)
        return self.energy_weight * energy_loss + force_loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss, logged."""
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=batch.num_graphs)
        return loss

    def _evaluate(self, batch: Any, name: str) -> None:
        energy, forces = self(batch)
        energy_error = (energy - batch.energy.view(-1)).abs().mean().float() * EV_TO_MEV
        force_error = (forces - batch.force).abs().mean() * EV_TO_MEV
        graphs, atoms = batch.num_graphs, batch.num_nodes
        self.log(f"{name}_energy_mae", energy_error, on_epoch=True, prog_bar=True, batch_size=graphs, sync_dist=True)
        self.log(f"{name}_force_mae", force_error, on_epoch=True, prog_bar=True, batch_size=atoms, sync_dist=True)
        loss = force_error / (EV_TO_MEV * self.scale) + 0.1 * energy_error / (EV_TO_MEV * self.scale)
        self.log(f"{name}_loss", loss, on_epoch=True, batch_size=atoms, sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the mean absolute errors in meV and meV/Å."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the mean absolute errors in meV and meV/Å."""
        self._evaluate(batch, "test")


class Supervised(_Trained):
    """Train any model on one loss: regression and classification.

    Args:
        model: Called as ``model(batch)``.
        loss: ``loss(prediction, batch)``, a scalar.
        metrics: By name, ``metric(prediction, batch)``, a scalar averaged over graphs.
        lr: Peak learning rate.
        weight_decay: Of matrices only, without those marked by an attribute ``_no_weight_decay`` (Mamba's A).
        warmup: Fraction of the budget in which the learning rate rises.
        ema: Decay of the moving average of the weights used for prediction, or None.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[[Any, Any], Tensor],
        metrics: Mapping[str, Callable[[Any, Any], Tensor]] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-10,
        warmup: float = 0.02,
        ema: float | None = None,
    ) -> None:
        super().__init__(model, lr, weight_decay, warmup, ema)
        self.loss, self.metrics = loss, dict(metrics or {})

    def forward(self, batch: Any) -> Any:
        """The model's prediction."""
        return self.predictor(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        loss = self.loss(self.model(batch), batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=batch.num_graphs)
        return loss

    def _evaluate(self, batch: Any, name: str) -> None:
        prediction = self(batch)
        self.log(
            f"{name}_loss", self.loss(prediction, batch), on_epoch=True, batch_size=batch.num_graphs, sync_dist=True
        )
        for key, metric in self.metrics.items():
            value = metric(prediction, batch)
            self.log(f"{name}_{key}", value, on_epoch=True, prog_bar=True, batch_size=batch.num_graphs, sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss and the metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss and the metrics."""
        self._evaluate(batch, "test")


class _Slice(Callback):
    """Stop after some seconds, at the end of an epoch; the budget and the schedule are not touched."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if time.perf_counter() - self.began >= self.seconds:
            trainer.should_stop = True


class _Bar(Callback):
    """One progress bar for the whole budget; where the output is not a terminal, a line at every tenth of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.terminal = sys.stderr.isatty()
        self.bar: Any = None
        self.shown = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        from tqdm import tqdm

        form = "{desc}: {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}"
        on = self.terminal and trainer.is_global_zero
        self.bar = tqdm(total=1000, desc=self.name, bar_format=form, disable=not on)
        self.began, self.terminal = time.perf_counter(), on
        self._show(trainer, pl_module)

    def _show(self, trainer: lightning.Trainer, module: Any) -> None:
        done = module.progress(trainer.global_step, float(trainer.estimated_stepping_batches))
        text = ", ".join(
            [
                f"epoch {trainer.current_epoch + 1}",
                *(f"{k} {float(v):.4g}" for k, v in trainer.progress_bar_metrics.items()),
            ]
        )
        if self.terminal:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(round(1000 * done) - self.bar.n)
        elif trainer.is_global_zero and int(10 * done) > self.shown:
            self.shown = int(10 * done)
            print(f"{self.name}: {100 * done:3.0f}%, {time.perf_counter() - self.began:.0f} s, {text}", flush=True)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._show(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._show(trainer, pl_module)
        self.bar.close()


def fit(
    module: _Trained,
    train: Any,
    val: Any,
    args: argparse.Namespace,
    name: str,
    *,
    epochs: int | None = None,
    max_seconds: float | None = None,
    clip: float = 0.5,
    validate_every: int = 1,
    slice_seconds: float | None = None,
    monitor: tuple[str, str] = ("val_loss", "min"),
) -> lightning.Trainer:
    """Train a module within the budget and load its best weights.

    Writes ``OUT/NAME/metrics.csv`` and the checkpoints ``OUT/NAME/{best,last}.ckpt``. With ``--resume`` training goes
    on from ``last.ckpt`` where it exists, the clock included. At the end the module holds the best weights on ``val``.

    Args:
        module: ``EnergyForces`` or ``Supervised``.
        train: Loader of training batches.
        val: Loader of validation batches.
        args: Parsed flags of ``training_flags``.
        name: Name of the model; its folder inside ``--out``.
        epochs: Budget when the user gave neither ``--epochs`` nor ``--max-time``.
        max_seconds: The same, in seconds.
        clip: Norm at which gradients are clipped.
        validate_every: Validate after this many epochs.
        slice_seconds: Stop after this time although the budget is not spent; ``--resume`` goes on.
        monitor: What tells the best weights: a logged value, and ``'min'`` or ``'max'``.

    Returns:
        The trainer, ready for ``test``.
    """
    if args.epochs is not None or args.max_time is not None:
        epochs, max_seconds = args.epochs, args.max_time
    if args.smoke:
        # Two steps; a resumed smoke run makes two more.
        epochs, max_seconds, validate_every = (2 if args.resume else 1), None, 1
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.ckpt"
    resume = str(last) if args.resume and last.exists() else None
    if args.resume and resume is None:
        print(f"--resume: no checkpoint at {last}; starting {name} from the beginning")
    if rank_zero_only.rank != 0:
        pass  # with several devices one process tidies up for all
    elif resume is None:
        for old in [*folder.glob("*.ckpt"), *folder.glob("metrics*.csv")]:
            old.unlink()
    elif (folder / "metrics.csv").exists():
        # Lightning starts a new log; the old one is kept beside it.
        (folder / "metrics.csv").rename(folder / f"metrics_{len(list(folder.glob('metrics_*.csv'))):03d}.csv")
    module.max_seconds = max_seconds
    best = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor=monitor[0],
        mode=monitor[1],
        save_last=True,
        save_top_k=1,
        enable_version_counter=False,
    )
    trainer = lightning.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        max_epochs=epochs if epochs is not None else -1,
        max_time=None if max_seconds is None else {"seconds": max_seconds},
        logger=CSVLogger(folder.parent, name=folder.name, version=""),
        callbacks=[best, _Bar(name), *([] if slice_seconds is None else [_Slice(slice_seconds)])],
        enable_progress_bar=False,
        gradient_clip_val=clip,
        check_val_every_n_epoch=validate_every,
        limit_train_batches=2 if args.smoke else None,
        limit_val_batches=1 if args.smoke else None,
        limit_test_batches=1 if args.smoke else None,
        num_sanity_val_steps=0,
        inference_mode=False,
        enable_model_summary=False,
        log_every_n_steps=10_000,
    )
    trainer.fit(module, train, val, ckpt_path=resume)
    trainer.save_checkpoint(last)
    chosen = best.best_model_path or (str(last) if last.exists() else "")
    if chosen and os.path.exists(chosen):
        state = torch.load(chosen, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(state)
    module.eval()
    return trainer


# --- what a run found -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def write_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and rename it when the block ends well, so no half-written file is left.

    Args:
        path: Where the file shall stand.

    Example:
        >>> import pathlib, tempfile
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> with write_atomic(target) as tmp:
        ...     _ = tmp.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: matplotlib and others read the format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(module: _Trained, settings: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write the weights to predict with as ``model.safetensors`` and how the model was made as ``model.json``.

    Args:
        module: What ``fit`` trained; the moving average of its weights is written where it has one.
        settings: Whatever builds the model anew: strings, numbers, paths.
        folder: Where both files shall stand, such as ``OUT/NAME``.

    Returns:
        The file of weights; ``safetensors.torch.load_file`` reads it for ``load_state_dict``.
    """
    from safetensors.torch import save_file

    model = module.model if module.average is None else module.average
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    target = Path(folder) / "model.safetensors"
    with write_atomic(target) as path:
        save_file(state, path)
    with write_atomic(target.with_suffix(".json")) as path:
        path.write_text(json.dumps(dict(settings), indent=2, default=str) + "\n")
    return target


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]], markdown: bool = False) -> str:
    """A table as text, columns aligned.

    Args:
        header: Column names.
        rows: Cells; floats are given four significant digits, None becomes a dash.
        markdown: Write it with bars, for a README.

    Raises:
        ValueError: If a row has another number of cells than the header.

    Example:
        >>> print(format_table(["model", "error"], [["mean", 1.0], ["ours", 0.25]]))
        model  error
        -----  -----
        mean       1
        ours    0.25
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows must have {len(header)} cells like the header {list(header)}, got {list(row)}")
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[c], (int, float, type(None))) for row in rows) for c in range(len(header))
    ]
    width = [max(len(line[c]) for line in [list(header), *cells]) for c in range(len(header))]

    def join(line: Sequence[str], sep: str) -> str:
        return sep.join(t.rjust(w) if n else t.ljust(w) for t, w, n in zip(line, width, numeric, strict=True)).rstrip()

    if not markdown:
        return "\n".join(
            [join(list(header), "  "), "  ".join("-" * w for w in width), *(join(line, "  ") for line in cells)]
        )
    rule = "|".join(("-" * (w + 1) + ":") if n else "-" * (w + 2) for w, n in zip(width, numeric, strict=True))
    return "\n".join([f"| {join(list(header), ' | ')} |", f"|{rule}|", *(f"| {join(line, ' | ')} |" for line in cells)])


def report(
    args: argparse.Namespace,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    notes: Sequence[str] = (),
) -> None:
    """Print the last table of an example and keep it as ``OUT/table.md``, once where several devices train.

    Args:
        args: Parsed flags of ``training_flags``.
        title: One line above the table.
        header: Column names.
        rows: Cells.
        notes: Lines below it: settings, where the plots are.
    """
    if rank_zero_only.rank != 0:
        return
    print("\n".join(["", title, "", format_table(header, rows), "", *notes]), flush=True)
    with write_atomic(args.out / "table.md") as path:
        path.write_text("\n".join([f"## {title}", "", format_table(header, rows, markdown=True), "", *notes, ""]))


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'torch-geo[train]'") from error
    return plt


def parity_plot(
    path: str | os.PathLike[str], panels: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]], title: str = ""
) -> Path:
    """Prediction against reference, one panel a quantity, one colour a model.

    Args:
        path: PNG to write.
        panels: By axis label (with its unit): the reference values and, by model, the predictions.
        title: Above all panels.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.8), squeeze=False)
    for axis, (label, (truth, predictions)) in zip(axes[0], panels.items(), strict=True):
        truth = np.asarray(truth).ravel()
        low, high = float(truth.min()), float(truth.max())
        pad = 0.05 * (high - low) or 1.0
        for name, values in predictions.items():
            values = np.asarray(values).ravel()
            pick = np.linspace(0, truth.size - 1, min(truth.size, 4000)).astype(int)
            axis.plot(
                truth[pick], values[pick], ".", ms=3, alpha=0.4, label=f"{name} (MAE {abs(values - truth).mean():.3g})"
            )
        axis.plot([low - pad, high + pad], [low - pad, high + pad], "k-", lw=0.8)
        axis.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad), aspect="equal")
        axis.set(xlabel=f"reference {label}", ylabel=f"predicted {label}")
        axis.legend(loc="upper left", fontsize=8, markerscale=3)
    figure.suptitle(title)
    return _save(figure, path)


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    figure.tight_layout()
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    _pyplot().close(figure)
    return Path(path)


def curve_plot(
    path: str | os.PathLike[str],
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: bool = True,
    reference: Mapping[str, float] | None = None,
) -> Path:
    """Learning curves, or any lines.

    Args:
        path: PNG to write.
        curves: By name: x and y.
        xlabel: Name and unit of x.
        ylabel: Name and unit of y.
        title: Above the plot.
        log: Logarithmic y axis.
        reference: Horizontal lines by name, for published values.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    for name, (x, y) in curves.items():
        axis.plot(x, y, marker="." if len(x) < 60 else "", label=name)
    for (name, value), style in zip((reference or {}).items(), ("--", ":", "-.") * 9, strict=False):
        axis.axhline(value, color="0.4", ls=style, lw=1, label=f"{name} {value:g}")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3, which="both")
    if curves or reference:
        axis.legend(fontsize=8)
    return _save(figure, path)


def read_log(folder: str | os.PathLike[str], metric: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one metric in the CSV log, earlier parts of a resumed run included.

    Args:
        folder: ``OUT/NAME`` of ``fit``.
        metric: Column of the log.

    Returns:
        Two lists of equal length; empty where nothing was logged.
    """
    values: dict[float, float] = {}
    # A resumed run leaves one file for each start, and metrics.csv is the newest.
    for path in sorted(Path(folder).glob("metrics_*.csv")) + sorted(Path(folder).glob("metrics.csv")):
        with path.open(newline="") as handle:
            values |= {float(row["epoch"]) + 1: float(row[metric]) for row in csv.DictReader(handle) if row.get(metric)}
    return list(values), list(values.values())
