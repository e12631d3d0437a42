"""The lowest eigenpairs of many Hermitian matrices: dense ones in stacks, large sparse ones one by one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_STACK = 1 << 25  # bytes of dense matrices decomposed at a time
_TIE = 1e-6  # relative difference of the sizes of entries that counts as rounding
RESIDUAL = 1e-9  # of an accepted eigenpair, relative to the norm of the matrix


class HermitianMatrix(NamedTuple):
    """A sparse positive semidefinite matrix: its diagonal [n] and its entries at i < j, real or complex."""

    diagonal: Array
    i: Array
    j: Array
    entry: Array
    norm: float  # an upper bound of the largest eigenvalue
    kernel: Array | None  # on each component the eigenvector of eigenvalue 0, where it is known to have one


class Spectrum(NamedTuple):
    """The eigenpairs kept of one matrix: eigvals [k], eigvecs [n, k], distance from there to the next eigenvalue."""

    eigvals: Array
    eigvecs: Array
    gap: float


@dataclass(frozen=True)
class Cut:
    """Which eigenpairs to keep, and the bounds between the methods that find them.

    Args:
        k: The lowest k of them; None for all.
        cutoff: Those with eigenvalues up to this one, to within ``tol``, instead of k.
        snap: What to do with an eigenspace that the cut would split: ``'up'`` keeps it, ``'down'`` drops it, None
            splits it.
        tol: Neighbouring eigenvalues that differ by no more belong to one eigenspace.
        dense_nodes: Largest size decomposed as a dense matrix, unless most eigenpairs are asked for.
        max_fill_bytes: Memory allowed for dense matrices, factors and eigenvectors, each.

    Raises:
        ValueError: If a value is not allowed.
    """

    k: int | None = None
    cutoff: float | None = None
    snap: str | None = "up"
    tol: float = 1e-6
    dense_nodes: int = 1000
    max_fill_bytes: int = 1 << 31

    def __post_init__(self) -> None:
        if self.k is not None and self.cutoff is not None:
            raise ValueError(f"k={self.k} and cutoff={self.cutoff} are both given; give one of them, or none for all")
        if self.k is not None and (not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1):
            raise ValueError(f"k={self.k!r} must be an integer of at least 1, or None for the full spectrum")
        if self.cutoff is not None and not 0 <= self.cutoff < math.inf:
            raise ValueError(f"cutoff={self.cutoff} must be a finite number of at least 0, or None")
        if self.snap not in ("up", "down", None):
            raise ValueError(f"snap={self.snap!r} is unknown; allowed: 'up', 'down', None")
        if not 0 <= self.tol < math.inf:
            raise ValueError(f"tol={self.tol} must be a finite number of at least 0")
        for name in ("dense_nodes", "max_fill_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    @property
    def settings(self) -> dict[str, Any]:
        """The values, as they enter the key of a cache."""
        return asdict(self)

    def count(self, eigvals: Array, num_nodes: int) -> int | None:
        """How many of the lowest eigenpairs to keep, or None where too few are known to tell.

        Args:
            eigvals: The lowest eigenvalues, ascending: some or all.
            num_nodes: How many there are in all.

        Returns:
            The number, which splits no eigenspace unless ``snap`` is None.
        """
        known = len(eigvals)
        if self.cutoff is not None:
            kept = int(np.searchsorted(eigvals, self.cutoff + self.tol, side="right"))
        else:
            kept = num_nodes if self.k is None else min(self.k, num_nodes)
        step = {"up": 1, "down": -1, None: 0}[self.snap]
        while kept < num_nodes:
            if kept >= known:
                return None
            if kept == 0 or step == 0 or eigvals[kept] - eigvals[kept - 1] > self.tol:
                break
            kept += step
        return kept

    def require_bytes(self, needed: int, what: str) -> None:
        """Raise ValueError where ``what`` needs more memory than allowed."""
        if needed > self.max_fill_bytes:
            raise ValueError(
                f"{what} need {needed / 2**30:.1f} GiB, above max_fill_bytes={self.max_fill_bytes}; ask for fewer "
                "eigenpairs (k, cutoff, or a smaller tol for snap='up'), or raise max_fill_bytes"
            )

    def spectrum(self, eigvals: Array, eigvecs: Array, num_nodes: int) -> Spectrum:
        """The part to keep of eigenpairs that suffice for it."""
        kept = self.count(eigvals, num_nodes)
        if kept is None:
            raise RuntimeError(f"{len(eigvals)} of {num_nodes} eigenvalues do not settle where to cut")
        gap = float(eigvals[kept] - (eigvals[kept - 1] if kept else 0.0)) if kept < num_nodes else math.inf
        return Spectrum(eigvals[:kept], fix_phases(eigvecs[:, :kept]), gap)


def fix_phases(eigvecs: Array) -> Array:
    """Columns of [n, k] with the sign, or phase, that makes the first of the largest entries positive."""
    if not eigvecs.size:
        return eigvecs
    size = np.abs(eigvecs)
    first = (size >= size.max(axis=0) * (1 - _TIE)).argmax(axis=0)[None]
    pivot = np.take_along_axis(eigvecs, first, axis=0)
    fixed: Array = eigvecs * (pivot.conj() / np.abs(pivot))
    return fixed


def check_residuals(residual: Array, norm: float, method: str) -> None:
    """Raise RuntimeError unless every ``||L v - lambda v||`` is small against the norm of L."""
    if not np.all(residual <= RESIDUAL * norm):  # false for NaN, too
        raise RuntimeError(
            f"{method}: an eigenpair has residual {float(residual.max()):.1e} where {RESIDUAL * norm:.1e} is allowed; "
            "the decomposition failed"
        )


def solve_spectra(matrices: Sequence[HermitianMatrix], cut: Cut) -> list[Spectrum]:
    """The eigenpairs that ``cut`` keeps of each matrix.

    Args:
        matrices: Any number, of any sizes; those of equal size are decomposed together.
        cut: What to keep.

    Returns:
        One spectrum a matrix, in their order.

    Raises:
        ValueError: If more memory is needed than ``cut`` allows.
        RuntimeError: If an eigenpair fails its check.
    """
    found: dict[int, Spectrum] = {}
    dense = defaultdict(list)
    for place, matrix in enumerate(matrices):
        num_nodes = matrix.diagonal.size
        if num_nodes <= cut.dense_nodes or (cut.k is None and cut.cutoff is None) or 4 * (cut.k or 0) >= num_nodes:
            dense[num_nodes, matrix.entry.dtype].append(place)
        else:
            from geo.transforms.sparse_spectrum import solve_sparse

            found[place] = solve_sparse(matrix, cut)
    for (num_nodes, dtype), places in dense.items():
        size = num_nodes**2 * dtype.itemsize
        cut.require_bytes(3 * size if num_nodes > cut.dense_nodes else 0, f"dense matrices of {num_nodes} nodes")
        step = max(1, _STACK // max(1, size))
        for start in range(0, len(places), step):
            part = places[start : start + step]
            eigvals, eigvecs = solve_dense([matrices[place] for place in part])
            for place, values, vectors in zip(part, eigvals, eigvecs, strict=True):
                found[place] = cut.spectrum(values, vectors, num_nodes)
    return [found[place] for place in range(len(matrices))]


def solve_dense(matrices: Sequence[HermitianMatrix]) -> tuple[Array, Array]:
    """All eigenpairs of matrices of one size: eigvals [b, n] and eigvecs [b, n, n], checked."""
    num_nodes = matrices[0].diagonal.size
    stack = np.zeros((len(matrices), num_nodes, num_nodes), dtype=matrices[0].entry.dtype)
    for full, matrix in zip(stack, matrices, strict=True):
        np.fill_diagonal(full, matrix.diagonal)
        full[matrix.i, matrix.j] = matrix.entry
        full[matrix.j, matrix.i] = matrix.entry.conj()
    if num_nodes == 0:
        return np.zeros((len(matrices), 0)), stack
    eigvals, eigvecs = np.linalg.eigh(stack)
    residual = np.linalg.norm(stack @ eigvecs - eigvecs * eigvals[:, None], axis=1)
    norms = np.array([matrix.norm for matrix in matrices])
    check_residuals(residual.max(axis=1) / np.maximum(norms, np.finfo(float).tiny), 1.0, "dense eigh")
    return np.maximum(eigvals, 0.0), eigvecs
