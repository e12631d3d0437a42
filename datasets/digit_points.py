"""Handwritten digits as point clouds in the plane."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data, InMemoryDataset

from geo.datasets.cache import choose, fill

_SPLITS = {"train": slice(0, 1257), "val": slice(1257, 1437), "test": slice(1437, 1797)}


class DigitPoints(InMemoryDataset):
    """The 1797 handwritten digits of scikit-learn as 2-D point clouds: one point for each pixel that has ink.

    The 8 x 8 images come with scikit-learn (extra ``points``) and are the test part of the UCI set "Optical Recognition
    of Handwritten Digits" (https://doi.org/10.24432/C50P49, CC BY 4.0); nothing is downloaded or cached. No published
    split of them exists; a fixed permutation gives 1257 train, 180 val and 360 test digits.

    With ``rotate=True`` every digit is turned about the centre of the image by an angle that is uniform in [0, 2 pi),
    the same at every access and in every run with the same ``seed``. Give it to the test split only and training never
    sees a rotation. (A turned 6 can look like a 9; that bounds the accuracy on rotated digits for any method.)

    Items have ``pos`` [V, 2] float32 in units of pixels, from -3.5 to 3.5 about the centre of the image, x to the right
    and y up; ``x`` [V, 1] float32, the intensity in (0, 1]; ``y`` [1] int64, the digit; and ``angle`` [1] float32 in
    radians, counterclockwise (zero without ``rotate``).

    Args:
        root: Not used for files; kept for the interface of PyG.
        split: 'train', 'val', 'test', or 'all'.
        rotate: Whether to turn each digit by a random angle.
        seed: Seed of the angles.
        transform: Applied on every access.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the samples for which it is true.

    Raises:
        ValueError: Unknown split.
        ImportError: scikit-learn is missing.

    Example:
        >>> from geo.datasets import DigitPoints
        >>> data = DigitPoints(split='test')
        >>> len(data), data.num_classes, data[0].pos.shape[1], data[0].x.shape[1]
        (360, 10, 2, 1)
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        split: str = "train",
        *,
        rotate: bool = False,
        seed: int = 0,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
    ) -> None:
        choose("split", split, (*_SPLITS, "all"))
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("DigitPoints needs scikit-learn: pip install 'torch-geo[points]'") from error
        super().__init__(None if root is None else os.fspath(root), transform, pre_transform, pre_filter)
        self.split = split
        digits = load_digits()
        angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, len(digits.images)) * rotate
        order = np.arange(len(digits.images))
        if split != "all":
            order = np.random.default_rng(1797).permutation(order)[_SPLITS[split]]
        fill(self, [_points(digits.images[i], int(digits.target[i]), float(angles[i])) for i in order])


def _points(image: np.ndarray, digit: int, angle: float) -> Data:
    row, column = np.nonzero(image)
    pos = np.stack([column - 3.5, 3.5 - row], axis=1)
    cos, sin = np.cos(angle), np.sin(angle)
    pos = pos @ np.array([[cos, sin], [-sin, cos]])
    return Data(
        pos=torch.as_tensor(pos, dtype=torch.float32),
        x=torch.as_tensor(image[row, column][:, None] / 16, dtype=torch.float32),
        y=torch.tensor([digit]),
        angle=torch.tensor([angle], dtype=torch.float32),
    )
