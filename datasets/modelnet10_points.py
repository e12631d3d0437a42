"""Ten classes of shapes as 3-D point clouds: the furniture of ModelNet10, or generated solids without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data, InMemoryDataset

from geo.datasets.cache import Arrays, DamagedFileError, cached, check_sha256, choose, fill, read_npz, settings_key
from geo.datasets.solids import SOLIDS, sample_solid

_FILE = "modelnet10_voxels/modelnet10.npz"
_FILE_SHA256 = "85fb9d01bbaa1913cde8cd385557b31e05cb179585c572298151f54f1e1373fb"
_FURNITURE = ("bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet")
_NUM_SOLIDS = {"train": 1000, "test": 300}


def surface_voxels(voxels: np.ndarray) -> np.ndarray:
    """Mark the occupied voxels of [S, X, Y, Z] that have an empty neighbour across one of their six faces."""
    padded = np.pad(voxels.astype(bool), ((0, 0), (1, 1), (1, 1), (1, 1)))
    inner = padded.copy()
    for axis in (1, 2, 3):
        inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    surface: np.ndarray = (padded & ~inner)[:, 1:-1, 1:-1, 1:-1]
    return surface


def farthest_points(points: np.ndarray, num_points: int) -> np.ndarray:
    """Choose ``num_points`` rows of ``points`` [V, 3], each the farthest from those before; the first from the mean."""
    distance = ((points - points.mean(axis=0)) ** 2).sum(axis=1)
    chosen = np.empty(num_points, dtype=np.int64)
    for i in range(num_points):
        chosen[i] = distance.argmax()
        to_last = ((points - points[chosen[i]]) ** 2).sum(axis=1)
        distance = to_last if i == 0 else np.minimum(distance, to_last)
    return chosen


def random_rotations(num: int, kind: str, seed: int) -> np.ndarray:
    """Draw rotation matrices [num, 3, 3]: about the z axis ('z') or uniform on SO(3) ('so3')."""
    random = np.random.default_rng(seed)
    q = random.standard_normal((num, 4))
    if kind == "z":
        angle = random.uniform(0, np.pi, num)
        q = np.stack([np.cos(angle), 0 * angle, 0 * angle, np.sin(angle)], axis=1)
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


class ModelNet10Points(InMemoryDataset):
    """Upright shapes of ten classes as point clouds of their surface, centred and scaled into the unit ball.

    Two sources:

    * 'voxels': ModelNet10 (`arXiv:1406.5670 <https://arxiv.org/abs/1406.5670>`_, for research use) with the official
      split, from the occupancy grids of 30^3 voxels in ``root/modelnet10_voxels/modelnet10.npz``. The points are the
      centres of the occupied voxels that have an empty neighbour. 3991 train and 908 test grids, of which 7 and 1 are
      empty in the file and left out: 3984 train, 907 test. z points up.
    * 'solids': box, capsule, cone, cylinder, dome, octahedron, prism, pyramid, sphere and torus, generated here with
      random proportions (each axis stretched by 0.7 to 1.4), points uniform by area. 1000 train and 300 test, equally
      many of each class; the two splits come from independent random streams. Nothing is needed on disk.

    ``rotate`` turns every cloud once, the same for every run with the same ``seed``; give it to the test split only and
    training never sees a rotation. The clouds are stored under ``root/processed`` as an ``.npz`` with a checksum.

    Items have ``pos`` [V, 3] float32 (unit ball; V is ``num_points``, less where a voxel cloud has fewer) and ``y`` [1]
    int64, the class; ``class_names`` names it.

    Args:
        root: Folder of the cache, and of the voxel file where there is one.
        split: 'train' or 'test'.
        num_points: Points per cloud.
        source: 'voxels', 'solids', or 'auto': the voxel file where it is there.
        sampling: 'farthest' point sampling, or 'random' points of the surface.
        num_samples: Number of clouds: a random subset of the voxel file, or how many solids to make (default: all, or
            the numbers above).
        rotate: None, 'z' (about the vertical axis) or 'so3'.
        seed: Seed of solids, subset, random points and rotations.
        transform: Applied on every access.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the samples for which it is true.
        force_reload: Make the clouds again and replace the cache.

    Raises:
        ValueError: Unknown split, source, sampling or rotation, or a number out of range.
        FileNotFoundError: ``source='voxels'`` and the file is not there.
        DamagedFileError: The file or the cache does not match its checksum.

    Example:
        >>> from geo.datasets import ModelNet10Points
        >>> data = ModelNet10Points('data', num_points=64, source='solids', num_samples=20)
        >>> len(data), data.num_classes, data[0].pos.shape, data.class_names[data[0].y]
        (20, 10, torch.Size([64, 3]), 'box')
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        num_points: int = 256,
        *,
        source: str = "auto",
        sampling: str = "farthest",
        num_samples: int | None = None,
        rotate: str | None = None,
        seed: int = 0,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
        force_reload: bool = False,
    ) -> None:
        choose("split", split, _NUM_SOLIDS)
        choose("source", source, ("auto", "voxels", "solids"))
        choose("sampling", sampling, ("farthest", "random"))
        choose("rotate", rotate, (None, "z", "so3"))
        if num_points < 1:
            raise ValueError(f"num_points={num_points} must be 1 or more")
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be 1 or more")
        super().__init__(os.fspath(root), transform, pre_transform, pre_filter)
        file = Path(self.root) / _FILE
        self.split, self.rotate = split, rotate
        self.source = source if source != "auto" else ("voxels" if file.is_file() else "solids")
        self.class_names = _FURNITURE if self.source == "voxels" else tuple(SOLIDS)
        if self.source == "solids" and num_samples is None:
            num_samples = _NUM_SOLIDS[split]
        settings = {
            "version": 1,
            "source": self.source,
            "split": split,
            "num_points": int(num_points),
            "sampling": sampling,
            "num_samples": num_samples,
            "seed": int(seed),
        }

        def make() -> Arrays:
            random = np.random.default_rng([int(seed), list(_NUM_SOLIDS).index(split)])
            if self.source == "voxels":
                clouds, y = _read_voxels(file, split, num_samples, random)
            else:
                assert num_samples is not None
                y = np.arange(num_samples) % len(SOLIDS)
                dense = num_points * (4 if sampling == "farthest" else 1)
                clouds = [sample_solid(self.class_names[label], dense, random) for label in y]
            return _normalise(clouds, y, num_points, sampling, random)

        path = Path(self.processed_dir) / f"modelnet10_{self.source}_{split}_{settings_key(settings)}.npz"
        arrays = cached(path, settings, make, force_reload)
        clouds = np.split(arrays["pos"], arrays["ptr"][1:-1])
        if rotate is not None:
            clouds = [cloud @ r.T for cloud, r in zip(clouds, random_rotations(len(clouds), rotate, seed), strict=True)]
        y = torch.from_numpy(arrays["y"])
        samples = [Data(pos=torch.as_tensor(cloud, dtype=torch.float32)) for cloud in clouds]
        for i, sample in enumerate(samples):
            sample.y = y[i : i + 1].clone()
        fill(self, samples)


def _normalise(
    clouds: list[np.ndarray], y: np.ndarray, num_points: int, sampling: str, random: np.random.Generator
) -> Arrays:
    """Centre on the mean of the surface, scale into the unit ball, choose points; returns pos [sum V, 3], ptr, y."""
    kept = []
    for cloud in clouds:
        cloud = cloud - cloud.mean(axis=0)
        cloud = (cloud / max(np.linalg.norm(cloud, axis=1).max(), 1e-12)).astype(np.float32)
        if len(cloud) > num_points:
            farthest = sampling == "farthest"
            cloud = cloud[
                farthest_points(cloud, num_points) if farthest else random.permutation(len(cloud))[:num_points]
            ]
        kept.append(cloud)
    ptr = np.cumsum([0, *map(len, kept)])
    return {"pos": np.concatenate(kept), "ptr": ptr.astype(np.int64), "y": y.astype(np.int64)}


def _read_voxels(
    file: Path, split: str, num_samples: int | None, random: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Surface voxels of each grid as [V, 3], and the labels; empty grids are left out."""
    if not file.is_file():
        raise FileNotFoundError(f"ModelNet10Points: no file {file}; put it there, or take source='solids'")
    check_sha256(file, _FILE_SHA256)
    arrays = read_npz(file, (f"X_{split}", f"y_{split}"))
    voxels, y = arrays[f"X_{split}"].astype(bool), arrays[f"y_{split}"]
    if voxels.ndim != 4 or y.shape != voxels.shape[:1]:
        raise DamagedFileError(f"{file}: holds grids {voxels.shape} and labels {y.shape}; fetch it again")
    chosen = np.flatnonzero(voxels.any(axis=(1, 2, 3)))
    if num_samples is not None:
        if num_samples > len(chosen):
            raise ValueError(f"num_samples={num_samples} must be at most {len(chosen)} for split={split!r}")
        chosen = np.sort(random.permutation(chosen)[:num_samples])
    clouds = []
    for start in range(0, len(chosen), 512):
        clouds += [np.argwhere(grid) for grid in surface_voxels(voxels[chosen[start : start + 512]])]
    return clouds, y[chosen]
