"""Eigenvalues and eigenvectors of each graph's Laplacian, with nothing left to chance at the cut."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import BaseTransform

from geo.transforms.array_cache import Arrays, digest, read_cache, settings_key, write_cache
from geo.transforms.spectrum_solver import Array, Cut, HermitianMatrix, Spectrum, solve_spectra

_BLOCK = 1024  # graphs decomposed, and cached, together
_LARGEST = 1e150  # sum of weights: its square is a number
_SYMMETRY = 1e-6  # relative difference of the weights of the two directions that counts as rounding
_FORMAT = 1  # of the cache; part of its key


class WeightedGraph(NamedTuple):
    """A graph without loops and repeated edges, sorted by (source, target)."""

    num_nodes: int
    source: Array
    target: Array
    weight: Array


def read_edges(data: Any, weight_name: str | None, loops: bool = False) -> WeightedGraph:
    """The directed edges of a graph: checked, repetitions averaged.

    Args:
        data: The graph.
        weight_name: Attribute with one weight an edge. Where it is absent, or for None, all weights are 1.
        loops: Whether to keep self-loops.

    Returns:
        The edges, with float64 weights.

    Raises:
        ValueError: If a node is out of range, or weights require grad, do not fit the edges or are no weights.
    """
    if not isinstance(data, Data):
        raise ValueError(f"data is a {type(data).__name__}; a Laplacian is that of a Data with one edge_index")
    if isinstance(data, Batch):
        raise ValueError(
            f"data is a batch of {data.num_graphs} graphs; apply the transform to each before batching (as a dataset's "
            "transform or pre_transform, or by transform_many)"
        )
    num_nodes = int(data.num_nodes or 0)
    if data.edge_index is None:
        return WeightedGraph(num_nodes, np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    edges = data.edge_index.detach().cpu().numpy()
    if edges.ndim != 2 or edges.shape[0] != 2 or edges.dtype.kind not in "iu":
        raise ValueError(f"edge_index is {edges.dtype} {edges.shape}; it must be an integer tensor [2, num_edges]")
    if edges.size and not 0 <= edges.min() <= edges.max() < num_nodes:
        raise ValueError(f"edge_index has entries from {edges.min()} to {edges.max()}, outside 0..{num_nodes - 1}")
    weight = None if weight_name is None else getattr(data, weight_name, None)
    key = edges[0].astype(np.int64) * num_nodes + edges[1]
    if weight is None:
        key = np.unique(key)
        mean = np.ones(key.size)
    else:
        values = _check_weights(weight, weight_name, edges.shape[1])
        key, place, times = np.unique(key, return_inverse=True, return_counts=True)
        mean = np.bincount(place, weights=values, minlength=key.size) / times
    source, target = np.divmod(key, max(num_nodes, 1))
    keep = (source != target) | loops
    return WeightedGraph(num_nodes, source[keep], target[keep], mean[keep])


def _check_weights(weight: Any, name: str | None, num_edges: int) -> Array:
    if not isinstance(weight, Tensor) or weight.numel() != num_edges or weight.dim() > 2 or weight.is_complex():
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{name} is {shape}; it must be a real tensor with one number an edge [{num_edges}]")
    if weight.requires_grad:
        raise ValueError(
            f"{name} requires grad, but no gradient goes through an eigendecomposition: it is infinite where "
            "eigenvalues coincide; pass weights without grad"
        )
    values: Array = weight.cpu().reshape(-1).to(torch.float64).numpy()
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(f"{name} is {values[at]} at edge {at}; weights must be finite and not negative")
    if values.sum() > _LARGEST:
        raise ValueError(f"{name} sums to {values.sum():.1e}; weights whose sum is above {_LARGEST:.0e} overflow")
    return values


def symmetrize(graph: WeightedGraph, is_undirected: bool) -> WeightedGraph:
    """The same graph with each undirected edge once, as source < target, without those of weight 0.

    Args:
        graph: What :func:`read_edges` returns.
        is_undirected: Whether an edge stored in one direction is enough. The weights of both are averaged.

    Returns:
        The undirected edges.

    Raises:
        ValueError: If ``is_undirected`` is false and an edge has no equal in the other direction.
    """
    num_nodes, source, target, weight = graph
    key = np.minimum(source, target) * num_nodes + np.maximum(source, target)
    key, place, times = np.unique(key, return_inverse=True, return_counts=True)
    mean = np.bincount(place, weights=weight, minlength=key.size) / times
    if not is_undirected:
        off = (times[place] != 2) | (np.abs(weight - mean[place]) > _SYMMETRY * mean[place])
        if off.any():
            at = int(off.argmax())
            raise ValueError(
                f"the graph is not symmetric: edge ({source[at]}, {target[at]}) has no equal in the other direction; "
                "apply torch_geometric.transforms.ToUndirected first, or pass is_undirected=True, which takes an edge "
                "stored in one direction as an edge without direction"
            )
    low, high = np.divmod(key, max(num_nodes, 1))
    keep = mean > 0
    return WeightedGraph(num_nodes, low[keep], high[keep], mean[keep])


def laplacian_matrix(graph: WeightedGraph, normalize: bool, phase: Array | None = None) -> HermitianMatrix:
    """The Laplacian of an undirected graph; ``phase`` [E] multiplies the entry at (source, target) of each edge."""
    ends = np.concatenate([graph.source, graph.target])
    degree = np.bincount(ends, weights=np.concatenate([graph.weight, graph.weight]), minlength=graph.num_nodes)
    entry = -graph.weight if phase is None else -graph.weight * phase
    if not normalize:
        norm = 2 * float(degree.max(initial=0.0))
        kernel = np.ones(graph.num_nodes) if phase is None else None
        return HermitianMatrix(degree, graph.source, graph.target, entry, norm, kernel)
    root = np.sqrt(degree)
    entry = entry / (root[graph.source] * root[graph.target])
    kernel = np.where(degree > 0, root, 1.0) if phase is None else None
    return HermitianMatrix((degree > 0).astype(np.float64), graph.source, graph.target, entry, 2.0, kernel)


def spectrum_arrays(spectra: Sequence[Spectrum]) -> Arrays:
    """Spectra as four flat arrays, for a cache."""
    return {
        "count": np.array([spectrum.eigvals.size for spectrum in spectra], dtype=np.int64),
        "gap": np.array([spectrum.gap for spectrum in spectra], dtype=np.float64),
        "eigvals": np.concatenate([spectrum.eigvals for spectrum in spectra]),
        "eigvecs": np.concatenate([spectrum.eigvecs.reshape(-1) for spectrum in spectra]),
    }


def spectra_from_arrays(arrays: Arrays, num_nodes: Sequence[int]) -> list[Spectrum]:
    """The inverse of :func:`spectrum_arrays`."""
    count = arrays["count"]
    eigvals = np.split(arrays["eigvals"], np.cumsum(count)[:-1])
    eigvecs = np.split(arrays["eigvecs"], np.cumsum(count * np.array(num_nodes))[:-1])
    return [
        Spectrum(values, vectors.reshape(n, -1) if n else vectors.reshape(0, len(values)), float(gap))
        for values, vectors, gap, n in zip(eigvals, eigvecs, arrays["gap"], num_nodes, strict=True)
    ]


def cached_spectra(matrices: Sequence[HermitianMatrix], cut: Cut, cache_dir: Path | None) -> list[Spectrum]:
    """The spectra of matrices, read from a file named by their content and by ``cut`` if there is one."""
    if cache_dir is None or not matrices:
        return solve_spectra(matrices, cut)
    names = ("diagonal", "i", "j", "entry")
    content = digest({f"{at}.{name}": getattr(m, name) for at, m in enumerate(matrices) for name in names}, {})
    settings = {**cut.settings, "matrices": content, "format": _FORMAT}
    path = cache_dir / f"spectrum-{settings_key(settings)}.npz"
    if path.is_file():
        arrays = read_cache(path, settings, remedy="delete it, and it is made again")
        return spectra_from_arrays(arrays, [matrix.diagonal.size for matrix in matrices])
    spectra = solve_spectra(matrices, cut)
    write_cache(path, spectrum_arrays(spectra), settings)
    return spectra


class SpectrumTransform(BaseTransform):  # type: ignore[misc]
    """Adds eigenpairs of one matrix, or of several, of each graph; what transforms of spectra share.

    Args:
        cut: What to keep of each spectrum.
        eigval_name: Attribute for the eigenvalues.
        eigvec_name: Attribute for the eigenvectors.
        dtype: Of what is stored.
        cache_dir: Folder of the cache, or None.
        listed: Whether counts and gaps have an axis for the matrices of a graph.

    Raises:
        ValueError: If ``dtype`` is not a floating point type.
    """

    def __init__(
        self,
        cut: Cut,
        eigval_name: str,
        eigvec_name: str,
        dtype: torch.dtype,
        cache_dir: str | os.PathLike[str] | None,
        listed: bool = False,
    ) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} must be a floating point type")
        if eigval_name == eigvec_name:
            raise ValueError(f"eigvec_name={eigvec_name!r} is eigval_name, too; the two must differ")
        self.cut = cut
        self.eigval_name, self.eigvec_name = eigval_name, eigvec_name
        self.dtype = dtype
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.listed = listed
        self._warned = False

    def matrices(self, data: Data) -> list[HermitianMatrix]:
        """The matrices of a graph, always as many."""
        raise NotImplementedError

    def forward(self, data: Data) -> Data:
        """Add the spectrum to a graph."""
        return self._add([data])[0]

    def transform_many(self, data_list: Sequence[Data], progress: bool = False) -> list[Data]:
        """Add spectra to many graphs, faster than one by one: those of equal size are decomposed together.

        Args:
            data_list: The graphs; they are not changed.
            progress: Show a progress bar.

        Returns:
            Shallow copies of the graphs with the attributes that :meth:`forward` adds.

        Raises:
            ValueError: As a call of the transform.
            RuntimeError: The same.
        """
        starts: Any = range(0, len(data_list), _BLOCK)
        if progress:
            from tqdm import tqdm

            starts = tqdm(starts, desc="spectra", unit=f"{_BLOCK} graphs")
        out = []
        for start in starts:
            out += self._add([copy.copy(data) for data in data_list[start : start + _BLOCK]])
        return out

    def _add(self, data_list: list[Data]) -> list[Data]:
        matrices = [self.matrices(data) for data in data_list]
        spectra = iter(cached_spectra([m for several in matrices for m in several], self.cut, self.cache_dir))
        stem = self.eigval_name.removesuffix("vals").removesuffix("_")
        for data, several in zip(data_list, matrices, strict=True):
            parts = [next(spectra) for _ in several]
            for part in parts:
                self._warn(part)
            eigvecs = torch.from_numpy(np.concatenate([part.eigvecs for part in parts], axis=1)).reshape(-1)
            eigvecs = torch.view_as_real(eigvecs) if eigvecs.is_complex() else eigvecs
            eigvals = torch.from_numpy(np.concatenate([part.eigvals for part in parts]))
            device = None if data.edge_index is None else data.edge_index.device
            count = torch.tensor([part.eigvals.size for part in parts], device=device)
            gap = torch.tensor([part.gap for part in parts], dtype=self.dtype, device=device)
            data[self.eigval_name] = eigvals.to(device, self.dtype)
            data[self.eigvec_name] = eigvecs.to(device, self.dtype)
            data[f"{stem}_count"] = count.unsqueeze(0) if self.listed else count
            data[f"{stem}_gap"] = gap.unsqueeze(0) if self.listed else gap
        return data_list

    def _warn(self, spectrum: Spectrum) -> None:
        if self.cut.snap is None and spectrum.gap <= self.cut.tol and not self._warned:
            self._warned = True
            warnings.warn(
                f"the cut after {spectrum.eigvals.size} eigenpairs splits an eigenspace (gap {spectrum.gap:.1e} <= "
                f"tol={self.cut.tol}), the part kept is arbitrary and not stable; use snap='up' or 'down'",
                stacklevel=5,
            )


class AddLaplacianSpectrum(SpectrumTransform):
    r"""Adds the lowest eigenpairs of the graph Laplacian.

    `Stable positional encodings <https://arxiv.org/abs/2310.02579>`_ are made of them. With weights :math:`A`, degrees
    :math:`D` and :math:`L = I - D^{-1/2} A D^{-1/2}` (or :math:`L = D - A`),

    .. math::
        L = V \, \mathrm{diag}(\lambda) \, V^\top, \qquad 0 = \lambda_1 \le \lambda_2 \le \dots \le \lambda_n

    all in float64. Unlike PyG's ``AddLaplacianEigenvectorPE`` it keeps eigenvalues and kernel, is deterministic, works
    for every graph, disconnected ones included, and does not cut through an eigenspace unless told to: an arbitrary
    part of an eigenspace is neither invariant nor stable (``snap``).

    Self-loops are removed; an edge stored several times counts once, with the mean of its weights. An isolated node has
    :math:`L_{ii} = 0`, so that the number of zero eigenvalues is the number of components; ``get_laplacian`` of PyG
    puts 1 there. The sign of each eigenvector makes the first of its largest entries positive; inside an eigenspace of
    several dimensions the basis stays arbitrary.

    Graphs of up to ``dense_nodes`` nodes are decomposed as dense matrices, in stacks of equal size. A larger graph is
    split into components, and each is solved by shift-invert block Lanczos if a bound of the fill of its factor, known
    before factoring, stays below ``max_fill_bytes``, otherwise by Chebyshev-filtered subspace iteration, which needs
    products with :math:`L` only. Every eigenpair is checked by its residual, and a second solve in the complement of
    those found looks for missed ones.

    No gradient goes through an eigendecomposition: weights that require grad are refused.

    Args:
        k: Keep the k lowest eigenpairs; None keeps all. Smaller graphs keep all they have. (default: ``None``)
        normalization: ``'sym'`` for :math:`I - D^{-1/2} A D^{-1/2}`, None for :math:`D - A`. (default: ``'sym'``)
        cutoff: Keep eigenvalues up to this one, to within ``tol``, instead of a number of them. (default: ``None``)
        snap: What to do with an eigenspace that the cut would split: ``'up'`` keeps all of it, ``'down'`` none of it,
            None splits it and warns once. (default: ``'up'``)
        tol: Neighbouring eigenvalues that differ by no more belong to one eigenspace. The lowest of a long path or tree
            of many thousand nodes are closer than the default: give less there. (default: ``1e-6``)
        is_undirected: Take an edge stored in one direction as an edge without direction, with the mean of both weights
            where both are stored. Otherwise a graph that is not symmetric is refused. (default: ``False``)
        eigval_name: Attribute for the eigenvalues. (default: ``'eigvals'``)
        eigvec_name: Attribute for the eigenvectors. (default: ``'eigvecs'``)
        dtype: Of what is stored. (default: ``torch.float64``)
        weight_name: Attribute with the edge weights; where it is absent, and for None, they are 1. (default:
            ``'edge_weight'``)
        cache_dir: Folder where spectra are kept and found again, in files named by graph and settings; a file a call,
            and in :meth:`transform_many` a file for every 1024 graphs. A damaged file raises ``DamagedFileError``.
            (default: ``None``)
        dense_nodes: Largest graph decomposed as a dense matrix, unless a quarter of its spectrum or more is asked for.
            (default: ``1000``)
        max_fill_bytes: Largest factor made by shift-invert (0: none), and largest array of a graph above
            ``dense_nodes``. (default: 2 GiB)

    Raises:
        ValueError: If an argument is not allowed; when called, if the graph is not symmetric, if a weight is negative,
            not finite or requires grad, or if more than ``max_fill_bytes`` are needed.
        RuntimeError: When called, if an eigenpair fails its check.

    Shapes:
        Reads ``edge_index`` :math:`(2, |E|)`, the number of nodes :math:`n` and the weights :math:`(|E|)`. Adds, with
        :math:`k_g` the number of eigenpairs kept of this graph

        - ``eigvals`` :math:`(k_g)`, ascending
        - ``eigvecs`` :math:`(n k_g)`, the rows of the :math:`n \times k_g` matrix one after the other, so that graphs
          of different :math:`k_g` batch; :func:`geo.nn.pad_spectrum` makes matrices of them
        - ``eig_count`` :math:`(1)` int64, that is :math:`k_g`
        - ``eig_gap`` :math:`(1)`, the distance from the last eigenvalue kept (from 0 if none is) to the next; infinite
          if nothing is cut

        The last two are named after ``eigval_name``, without ``vals`` or ``_vals`` at its end. Transforms that remove
        nodes or edges come before this one: PyG takes the n eigenvalues of a full spectrum for features of nodes.

    Example:
        >>> triangle = Data(edge_index=torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]]), num_nodes=3)
        >>> data = AddLaplacianSpectrum(k=2)(triangle)
        >>> data.eigvals.abs().round(decimals=6).tolist(), data.eig_count.tolist(), data.eigvecs.shape
        ([0.0, 1.5, 1.5], [3], torch.Size([9]))
    """

    def __init__(
        self,
        k: int | None = None,
        normalization: Literal["sym"] | None = "sym",
        cutoff: float | None = None,
        snap: Literal["up", "down"] | None = "up",
        tol: float = 1e-6,
        is_undirected: bool = False,
        eigval_name: str = "eigvals",
        eigvec_name: str = "eigvecs",
        dtype: torch.dtype = torch.float64,
        weight_name: str | None = "edge_weight",
        cache_dir: str | os.PathLike[str] | None = None,
        dense_nodes: int = 1000,
        max_fill_bytes: int = 1 << 31,
    ) -> None:
        if normalization not in ("sym", None):
            raise ValueError(f"normalization={normalization!r} is unknown; allowed: 'sym', None")
        cut = Cut(k, cutoff, snap, tol, dense_nodes, max_fill_bytes)
        super().__init__(cut, eigval_name, eigvec_name, dtype, cache_dir)
        self.normalization = normalization
        self.is_undirected = is_undirected
        self.weight_name = weight_name

    def matrices(self, data: Data) -> list[HermitianMatrix]:
        """The Laplacian of a graph."""
        graph = symmetrize(read_edges(data, self.weight_name), self.is_undirected)
        return [laplacian_matrix(graph, self.normalization == "sym")]

    def __repr__(self) -> str:
        cut = self.cut
        return (
            f"{type(self).__name__}(k={cut.k}, normalization={self.normalization!r}, cutoff={cut.cutoff}, "
            f"snap={cut.snap!r}, tol={cut.tol})"
        )
