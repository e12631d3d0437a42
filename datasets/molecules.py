"""What the molecular datasets share: frames as :class:`Data`, energy shifts per element."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data, InMemoryDataset

#: One kilocalorie per mole in electronvolt (1 eV = 23.060 547 830 619 kcal/mol, CODATA 2018).
KCAL_PER_MOL = 1 / 23.060547830619
#: Length of the vector of energy shifts: atomic numbers 0 (unused) to 118.
NUM_ELEMENTS = 119


def make_frame(
    z: np.ndarray,
    pos: np.ndarray,
    energy: float,
    force: np.ndarray | None = None,
    cell: np.ndarray | None = None,
    pbc: np.ndarray | None = None,
) -> Data:
    """One geometry as ``Data``, in the fields, shapes and units of :class:`MoleculeDataset`."""
    data = Data(
        z=torch.as_tensor(np.asarray(z, dtype=np.int64)),
        pos=torch.as_tensor(np.asarray(pos, dtype=np.float32)),
        energy=torch.tensor([float(energy)], dtype=torch.float64),
    )
    if force is not None:
        data.force = torch.as_tensor(np.asarray(force, dtype=np.float32))
    if cell is not None:
        data.cell = torch.as_tensor(np.asarray(cell, dtype=np.float32)).reshape(1, 3, 3)
        data.pbc = torch.as_tensor(np.ones(3, dtype=bool) if pbc is None else np.asarray(pbc, dtype=bool)).reshape(1, 3)
    return data


def energy_shift(frames: Iterable[Data]) -> Tensor:
    r"""Fit one energy per element by least squares.

    Solves :math:`\min_\epsilon \sum_g \big(E_g - \sum_{i \in g} \epsilon_{z_i}\big)^2`. Where the compositions do not
    determine the shifts (one molecule only) the solution of least norm is taken: its sum is the mean energy.

    Args:
        frames: Geometries with ``z`` [V] (atomic numbers) and ``energy`` [1] (eV). Give the training frames only.

    Returns:
        Float64 tensor [119] in eV, indexed by atomic number and zero for elements that do not occur:
        ``energy - shift[z].sum()`` is what a model has to learn.

    Raises:
        ValueError: ``frames`` is empty.
    """
    counts, energies = [], []
    for frame in frames:
        counts.append(np.bincount(frame.z.numpy(), minlength=NUM_ELEMENTS))
        energies.append(float(frame.energy))
    if not counts:
        raise ValueError("energy_shift: no frames were given, at least one is needed")
    composition = np.stack(counts).astype(np.float64)
    present = composition.any(axis=0)
    shift = np.zeros(NUM_ELEMENTS)
    shift[present] = np.linalg.lstsq(composition[:, present], np.asarray(energies), rcond=None)[0]
    return torch.from_numpy(shift)


class MoleculeDataset(InMemoryDataset):
    """Geometries of atoms with energies and forces: what :class:`ForceField` and :class:`XTBTrajectory` have in common.

    Each item has ``z`` [V] int64 (atomic numbers), ``pos`` [V, 3] float32 (Angstrom), ``energy`` [1] float64 (eV, total
    energy of the source, no shift removed) and ``force`` [V, 3] float32 (eV/Angstrom, minus the gradient of the
    energy); periodic systems also ``cell`` [1, 3, 3] float32 (Angstrom, rows are the cell vectors) and
    ``pbc`` [1, 3] bool.

    Args:
        root: Folder of the data or of the cache.
        transform: Applied on every access.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the frames for which it is true.
    """

    def __init__(
        self,
        root: str,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(root, transform, pre_transform, pre_filter)

    def energy_shift(self) -> Tensor:
        """Return energies per element [119] (eV) fitted to the frames of this dataset, see :func:`energy_shift`."""
        return energy_shift(self.get(i) for i in self.indices())
