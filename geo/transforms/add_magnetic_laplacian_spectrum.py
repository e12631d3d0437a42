"""Eigenvalues and eigenvectors of the magnetic Laplacian: directions of edges as phases."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch_geometric.data import Data

from geo.transforms.add_laplacian_spectrum import SpectrumTransform, WeightedGraph, laplacian_matrix, read_edges
from geo.transforms.spectrum_solver import Cut, HermitianMatrix


class AddMagneticLaplacianSpectrum(SpectrumTransform):
    r"""Adds the lowest eigenpairs of the magnetic Laplacian of a directed graph.

    `Transformers Meet Directed Graphs <https://arxiv.org/abs/2302.00049>`_ makes positional encodings of them. With
    :math:`A_{uv} = 1` where there is an edge from u to v, :math:`A_s` the graph without directions (1 where there is an
    edge either way) and :math:`D_s` its degrees,

    .. math::
        L = D_s - A_s \odot e^{i \Theta}, \qquad \Theta = 2 \pi q \, (A - A^\top)

    or :math:`I - D_s^{-1/2} (A_s \odot e^{i \Theta}) D_s^{-1/2}`. :math:`L` is Hermitian and positive semidefinite:
    eigenvalues are real, eigenvectors complex. A pair of opposite edges has phase 0; for :math:`q = 0` all have, and
    :math:`L` is the Laplacian. Reversing all edges conjugates the eigenvectors. The eigenvalues of a tree do not depend
    on q. Weights are not read; loops, repeated edges and isolated nodes are treated as in
    :class:`AddLaplacianSpectrum`, as is the choice of the method.

    The phase of each eigenvector makes the first of its largest entries real and positive (the paper fixes the phase of
    the first node found instead); inside an eigenspace of several dimensions the basis stays arbitrary.

    Args:
        k: Keep the k lowest eigenpairs; None keeps all. (default: ``None``)
        q: The potential, or a list of them, for each of which there is a spectrum. (default: ``0.25``)
        normalization: ``'sym'`` or None, as in the formulas. (default: ``'sym'``)
        relative_q: Divide q by :math:`\max(1, \min(m, n))` with m the number of edges without an opposite one, so that
            phases along a path do not wind around. (default: ``True``)
        cutoff: Keep eigenvalues up to this one, to within ``tol``, instead of a number of them. (default: ``None``)
        snap: What to do with an eigenspace that the cut would split: ``'up'`` keeps all of it, ``'down'`` none of it,
            None splits it and warns once. (default: ``'up'``)
        tol: Neighbouring eigenvalues that differ by no more belong to one eigenspace. (default: ``1e-6``)
        eigval_name: Attribute for the eigenvalues. (default: ``'mag_eigvals'``)
        eigvec_name: Attribute for the eigenvectors. (default: ``'mag_eigvecs'``)
        dtype: Of what is stored, a real type. (default: ``torch.float64``)
        cache_dir: Folder where spectra are kept and found again. (default: ``None``)
        dense_nodes: Largest graph decomposed as a dense matrix. (default: ``1000``)
        max_fill_bytes: Largest factor, and largest array of a graph above ``dense_nodes``. (default: 2 GiB)

    Raises:
        ValueError: If an argument is not allowed or, when called, a node is out of range or memory does not suffice.
        RuntimeError: When called, if an eigenpair fails its check.

    Shapes:
        Reads ``edge_index`` and the number of nodes :math:`n`. Adds, with :math:`k_g` eigenpairs kept of this graph

        - ``mag_eigvals`` :math:`(k_g)`, ascending
        - ``mag_eigvecs`` :math:`(n k_g, 2)`: the rows of the :math:`n \times k_g` matrix one after the other, real and
          imaginary part in the last axis
        - ``mag_eig_count`` :math:`(1)` and ``mag_eig_gap`` :math:`(1)`, as in :class:`AddLaplacianSpectrum`

        For a list of Q potentials, even of one, the spectra stand one after the other in ``mag_eigvals`` and in each
        row of the eigenvectors, and count and gap are :math:`(1, Q)`. ``geo.nn.pad_spectrum(batch,
        eigval_name='mag_eigvals', eigvec_name='mag_eigvecs')`` returns :math:`(B, K)`, :math:`(N, K, 2)` and a mask, or
        :math:`(B, Q, K)`, :math:`(N, Q, K, 2)` and a mask; ``torch.view_as_complex`` joins the parts.

    Example:
        >>> ring = Data(edge_index=torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), num_nodes=4)
        >>> data = AddMagneticLaplacianSpectrum(q=0.25, relative_q=False)(ring)
        >>> data.mag_eigvals.abs().round(decimals=6).tolist(), data.mag_eigvecs.shape
        ([0.0, 1.0, 1.0, 2.0], torch.Size([16, 2]))
    """

    def __init__(
        self,
        k: int | None = None,
        q: float | Sequence[float] = 0.25,
        normalization: Literal["sym"] | None = "sym",
        relative_q: bool = True,
        cutoff: float | None = None,
        snap: Literal["up", "down"] | None = "up",
        tol: float = 1e-6,
        eigval_name: str = "mag_eigvals",
        eigvec_name: str = "mag_eigvecs",
        dtype: torch.dtype = torch.float64,
        cache_dir: str | os.PathLike[str] | None = None,
        dense_nodes: int = 1000,
        max_fill_bytes: int = 1 << 31,
    ) -> None:
        if normalization not in ("sym", None):
            raise ValueError(f"normalization={normalization!r} is unknown; allowed: 'sym', None")
        values = np.asarray(q)
        listed = values.ndim == 1
        if values.dtype.kind not in "iuf" or values.ndim > 1 or not values.size or not np.isfinite(values).all():
            raise ValueError(f"q={q} must be a finite number or a list of at least one")
        cut = Cut(k, cutoff, snap, tol, dense_nodes, max_fill_bytes)
        super().__init__(cut, eigval_name, eigvec_name, dtype, cache_dir, listed)
        self.q = tuple(float(value) for value in np.atleast_1d(values))
        self.normalization = normalization
        self.relative_q = relative_q

    def matrices(self, data: Data) -> list[HermitianMatrix]:
        """The magnetic Laplacian of a graph for each potential."""
        num_nodes, source, target, _ = read_edges(data, None)
        key = np.minimum(source, target) * num_nodes + np.maximum(source, target)
        key, place = np.unique(key, return_inverse=True)
        low, high = np.divmod(key, max(num_nodes, 1))
        direction = np.bincount(place, weights=np.sign(target - source), minlength=key.size)  # 0: both ways
        graph = WeightedGraph(num_nodes, low, high, np.ones(key.size))
        one_way = int(np.abs(direction).sum())
        scale = 1 / max(1, min(one_way, num_nodes)) if self.relative_q else 1.0
        phases = (np.exp(2j * np.pi * q * scale * direction) for q in self.q)
        return [laplacian_matrix(graph, self.normalization == "sym", phase) for phase in phases]

    def __repr__(self) -> str:
        q = list(self.q) if self.listed else self.q[0]
        return (
            f"{type(self).__name__}(k={self.cut.k}, q={q}, normalization={self.normalization!r}, "
            f"relative_q={self.relative_q}, cutoff={self.cut.cutoff}, snap={self.cut.snap!r}, tol={self.cut.tol})"
        )
