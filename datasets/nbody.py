"""Charged particles in free space: the dynamics benchmark of EGNN, simulated on the spot or read from a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data, InMemoryDataset

from geo.datasets.cache import Arrays, DamagedFileError, cached, check_sha256, choose, fill, read_npz, settings_key

TIME_STEP = 0.001
MAX_FORCE = 0.1 / TIME_STEP
SPEED = 0.5
SAMPLE_EVERY, NUM_STEPS = 100, 5000
#: Trajectories that the published generator draws per split, in this order of its random stream ...
_DRAWN = {"train": 10000, "val": 2000, "test": 2000}
#: ... and how many of them the benchmark uses.
_USED = {"train": 3000, "val": 2000, "test": 2000}
_FILE = "nbody_charged/nbody_small_charged5_seed43.npz"
_FILE_SHA256 = "17f9ee7503402f6a02b3d5b8c2c0476d794e8ef81255de5d78e9faa6fd2630bd"


def simulate(
    pos: np.ndarray,
    vel: np.ndarray,
    charge: np.ndarray,
    num_steps: int,
    time_step: float = TIME_STEP,
    on_step: Callable[[], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Move charged particles of unit mass by ``num_steps`` steps of the published integrator.

    One step is :math:`v \leftarrow v + \Delta t\, F(x)`, then :math:`x \leftarrow x + \Delta t\, v` (symplectic Euler),
    with :math:`F_i = \sum_{j \ne i} q_i q_j (x_i - x_j) / |x_i - x_j|^3` and each component of :math:`F_i` cut off at
    :math:`\pm 100`. All samples move at once, in float64.

    Args:
        pos: Positions [S, V, 3].
        vel: Velocities [S, V, 3].
        charge: Charges [S, V].
        num_steps: Number of steps.
        time_step: Step :math:`\Delta t`; the benchmark uses 0.001.
        on_step: Called after every hundredth step of every chunk of samples, for a progress bar.

    Returns:
        Positions and velocities [S, V, 3] after the steps, float64.
    """
    first, second = np.triu_indices(pos.shape[1], k=1)
    # net[i] sums the pair forces that act on i: +1 where i is first, -1 where it is second
    net = np.zeros((pos.shape[1], len(first)))
    net[first, np.arange(len(first))], net[second, np.arange(len(first))] = 1.0, -1.0
    out_pos, out_vel = np.empty(pos.shape), np.empty(pos.shape)
    for start in range(0, len(pos), 256):  # a chunk fits into the second-level cache
        chunk = slice(start, start + 256)
        x = np.ascontiguousarray(np.moveaxis(pos[chunk].astype(np.float64), 0, 2))  # [V, 3, S]
        v = np.ascontiguousarray(np.moveaxis(vel[chunk].astype(np.float64), 0, 2))
        q = charge[chunk].astype(np.float64).T
        strength = q[first] * q[second]  # [P, S]
        for step in range(1, num_steps + 1):
            r = x[first] - x[second]  # [P, 3, S]
            square = (r * r).sum(axis=1)
            r *= (strength / (square * np.sqrt(square)))[:, None]
            force = (net @ r.reshape(len(first), -1)).reshape(x.shape)
            v += time_step * np.clip(force, -MAX_FORCE, MAX_FORCE, out=force)
            x += time_step * v
            if on_step is not None and step % 100 == 0:
                on_step()
        out_pos[chunk], out_vel[chunk] = np.moveaxis(x, 2, 0), np.moveaxis(v, 2, 0)
    return out_pos, out_vel


def total_energy(pos: np.ndarray, vel: np.ndarray, charge: np.ndarray) -> np.ndarray:
    """Return kinetic plus Coulomb energy [S] of particles at ``pos``, ``vel`` [S, V, 3] with ``charge`` [S, V]."""
    first, second = np.triu_indices(pos.shape[1], k=1)
    distance = np.linalg.norm(pos[:, first] - pos[:, second], axis=-1)
    energy: np.ndarray = 0.5 * (vel**2).sum(axis=(1, 2)) + (charge[:, first] * charge[:, second] / distance).sum(axis=1)
    return energy


def initial_states(split: str, num_samples: int, num_particles: int, seed: int) -> tuple[np.ndarray, ...]:
    """Draw starting positions and velocities [S, V, 3] and charges [S, V] in the order of the published generator.

    The generator runs through train, val and test with one random stream and, after each trajectory, draws observation
    noise of variance zero; the draws are repeated here so that the same seed gives the same trajectories.
    """
    spread = (num_particles / 5) ** (1 / 3)
    random = np.random.RandomState(seed)  # the published stream is the legacy one
    saved = NUM_STEPS // SAMPLE_EVERY - 1
    pos, vel, charge = [], [], []
    for name, drawn in _DRAWN.items():
        for _ in range(num_samples if name == split else drawn):
            q = random.choice([-1.0, 0.0, 1.0], size=(num_particles, 1), p=[0.5, 0.0, 0.5])
            x, v = spread * random.randn(3, num_particles), random.randn(3, num_particles)
            random.randn(2 * saved * 3 * num_particles)
            if name == split:
                pos.append(x.T)
                vel.append((v * SPEED / np.sqrt((v**2).sum(axis=0, keepdims=True))).T)
                charge.append(q[:, 0])
        if name == split:
            break
    return np.stack(pos), np.stack(vel), np.stack(charge)


class NBody(InMemoryDataset):
    r"""The charged five-body system of `arXiv:2102.09844 <https://arxiv.org/abs/2102.09844>`_ (EGNN).

    Five particles of unit mass and charge :math:`\pm 1` start at normally distributed positions with speed 0.5 and move
    in free space under Coulomb forces (there are no units; see :func:`simulate` for the law). Of 5000 steps of 0.001
    every hundredth is kept; from frame 30 (time 3.1) the positions at frame 40 (time 4.1) are to be predicted.
    Published sizes: 3000 train (the first of 10000 drawn), 2000 val, 2000 test, seed 43.

    The data was never published as files, only its generator (MIT licence). The simulation here repeats its random
    stream and its steps for all samples at once, in seconds; charges are equal and trajectories agree to rounding,
    except the 3 to 6 % in which particles pass so close that the last bit of a float64 decides their course. It is
    stored under ``root/processed`` as an ``.npz`` with a checksum. Where ``root`` holds
    ``nbody_charged/nbody_small_charged5_seed43.npz`` that file is read instead.

    Items have ``pos`` [5, 3] and ``vel`` [5, 3] at frame 30, ``charge`` [5, 1], and ``y`` [5, 3], the positions at
    frame 40; all float32.

    Args:
        root: Folder of the cache, and of the file where there is one.
        split: 'train', 'val' or 'test'.
        num_samples: Number of trajectories, the first ones of the split (default: the published number).
        num_particles: Number of particles; other than 5 is always simulated.
        seed: Seed of the generator; other than 43 is always simulated.
        source: 'file', 'simulation', or 'auto': the file where it is there.
        transform: Applied on every access.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the samples for which it is true.
        force_reload: Simulate again and replace the cache.
        progress: Show a progress bar while simulating.

    Raises:
        ValueError: Unknown split or source, or more samples than the generator draws for the split.
        FileNotFoundError: ``source='file'`` and it is not there.
        DamagedFileError: The file or the cache does not match its checksum.

    Example:
        >>> from geo.datasets import NBody
        >>> data = NBody('data', num_samples=3, progress=False)
        >>> len(data), data[0].pos.shape, data[0].charge.flatten().tolist()
        (3, torch.Size([5, 3]), [-1.0, 1.0, -1.0, -1.0, -1.0])
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        num_samples: int | None = None,
        *,
        num_particles: int = 5,
        seed: int = 43,
        source: str = "auto",
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
        force_reload: bool = False,
        progress: bool = True,
    ) -> None:
        choose("split", split, _USED)
        choose("source", source, ("auto", "file", "simulation"))
        num_samples = _USED[split] if num_samples is None else int(num_samples)
        if not 1 <= num_samples <= _DRAWN[split]:
            raise ValueError(f"num_samples={num_samples} must be 1 to {_DRAWN[split]} for split={split!r}")
        if num_particles < 2:
            raise ValueError(f"num_particles={num_particles} must be 2 or more")
        published = num_particles == 5 and seed == 43
        if source == "file" and not published:
            raise ValueError(f"source='file' holds num_particles=5, seed=43, not {num_particles} and {seed}")
        super().__init__(os.fspath(root), transform, pre_transform, pre_filter)
        self.split = split
        file = Path(self.root) / _FILE
        if source == "file" or (source == "auto" and published and file.is_file()):
            self.source, arrays = "file", _read(file, split, num_samples)
        else:
            self.source = "simulation"
            settings = {
                "version": 1,
                "split": split,
                "num_samples": num_samples,
                "num_particles": num_particles,
                "seed": int(seed),
            }
            path = Path(self.processed_dir) / f"nbody_{split}_{settings_key(settings)}.npz"
            arrays = cached(
                path, settings, lambda: _generate(split, num_samples, num_particles, seed, progress), force_reload
            )
        tensors = {key: torch.from_numpy(value.astype(np.float32)) for key, value in arrays.items()}
        fill(self, [Data(**{key: value[i] for key, value in tensors.items()}) for i in range(num_samples)])


def _generate(split: str, num_samples: int, num_particles: int, seed: int, progress: bool) -> Arrays:
    from tqdm import tqdm

    pos, vel, charge = initial_states(split, num_samples, num_particles, seed)
    until_input, until_target = 31 * SAMPLE_EVERY, 10 * SAMPLE_EVERY
    total = -(-num_samples // 256) * (until_input + until_target)
    with tqdm(total=total, desc=f"charged particles, {split}", unit="step", disable=not progress) as bar:
        pos, vel = simulate(pos, vel, charge, until_input, on_step=lambda: bar.update(100))
        target, _ = simulate(pos, vel, charge, until_target, on_step=lambda: bar.update(100))
    single = {"pos": pos, "vel": vel, "charge": charge[..., None], "y": target}
    return {key: value.astype(np.float32) for key, value in single.items()}


def _read(file: Path, split: str, num_samples: int) -> Arrays:
    if not file.is_file():
        raise FileNotFoundError(f"NBody: no file {file}; put it there, or take source='simulation'")
    check_sha256(file, _FILE_SHA256)
    part = {"val": "valid"}.get(split, split)
    arrays = read_npz(file, ("frames", f"loc_{part}", f"vel_{part}", f"charges_{part}"))
    loc, vel, charge = (arrays[f"{key}_{part}"][:num_samples] for key in ("loc", "vel", "charges"))
    if arrays["frames"].tolist() != [30, 40] or loc.shape != (num_samples, 2, 5, 3):
        raise DamagedFileError(
            f"{file}: holds frames {arrays['frames'].tolist()} and positions {loc.shape}; fetch it again"
        )
    return {"pos": loc[:, 0], "vel": vel[:, 0], "charge": charge[..., None], "y": loc[:, 1]}
