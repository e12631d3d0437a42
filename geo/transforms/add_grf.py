"""Where random walks from each node go, as sparse features or as a positional encoding."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import BaseTransform

from geo.kernels import Series, SparseFeatures, features_of, normalized_adjacency
from geo.kernels.walk_matrix import spectral_radius, step_squares
from geo.ops import WalkDeposits, grf_walks
from geo.ops.random_walk import philox

_KIND = 24  # of the random numbers of projections: walks and orders of nodes have others
_RESERVED = ("index", "batch", "face", "adj", "ptr", "node", "edge")  # PyG reads a meaning into such names


class AddGRF(BaseTransform):  # type: ignore[misc]
    r"""Gives each node its graph random features, sparse or as a dense positional encoding.

    The features of `General Graph Random Features <https://arxiv.org/abs/2310.04859>`_: the dot products of the rows of

    .. math::
        \Phi = \sqrt s \sum_l f_l \, M_l, \qquad \mathbb E[\Phi_i \cdot \Phi_j] = K_{ij} \quad (i \neq j)

    estimate a kernel K on an undirected graph, from what walks of length l deposit (:math:`M_l`). With ``dim`` they are
    projected, :math:`\Phi J` with Gaussian J of variance 1 / ``dim``, which keeps the dot products in the mean.

    Random numbers are functions of (seed, node, walk, step), with the node's number in its graph, so that neither
    batches nor the other graphs of a dataset change them. J has the same rows for the first node of every graph, for
    the second, and so on.

    On directed graphs walks follow the edges from row 0 to row 1, and the dot products estimate
    :math:`s F(W) F(W)^\top` with :math:`F(W) = \sum_l f_l W^l`, which is not K. There a second set, drawn on the
    flipped graph (``edge_index.flip(0)``) with another ``first_walk``, has
    :math:`\mathbb E[\Phi_1 \Phi_2^\top] = K`.

    Args:
        num_walks: Walks from each node. (default: ``16``)
        series: The kernel, such as ``geo.kernels.heat(1.0)``, on the normalised adjacency. None stores the deposits of
            each length, for a modulation that is learned. (default: ``None``)
        attr_name: Name of the attribute, or the beginning of the names. (default: ``'grf'``)
        dim: Width of the dense encoding; None stores the sparse features. (default: ``None``)
        p_halt: Probability of a walk to end before each step. (default: ``0.5``)
        coupling: As of :func:`geo.ops.grf_walks`. (default: ``'antithetic+repelling'``)
        proposal: As of :func:`geo.ops.grf_walks`. (default: ``'uniform'``)
        max_length: Cuts longer walks. (default: ``None``)
        first_walk: Number of the first walk: 16 gives a second set, independent of the 16 walks from 0; on directed
            graphs draw it on the flipped graph. (default: ``0``)
        seed: An integer. (default: ``0``)
        weight_name: Attribute with the edge weights; where it is absent, and for None, they are 1.
            (default: ``'edge_weight'``)
        dtype: Of what is stored. (default: ``torch.float32``)

    Shapes:
        Reads ``edge_index`` :math:`(2, |E|)`, the number of nodes and the weights :math:`(|E|)`. Adds, with ``dim``,
        ``grf`` :math:`(|V|, \text{dim})`, and else, with P entries sorted by row and column,

        - ``grf_count`` :math:`(|V|)`: numbers of entries of the rows
        - ``grf_index`` :math:`(P)`: columns, which are nodes, and which batching shifts as it should
        - ``grf_value`` :math:`(P)`
        - ``grf_length`` :math:`(P)`: lengths of walks, for deposits only

        of which :func:`read_grf` makes a matrix again, before and after batching. Transforms that remove nodes come
        before this one.

    Symmetry and derivatives:
        A renumbering of nodes changes what is drawn but not its distribution. Not differentiable.

    Raises:
        ValueError: An option is not allowed; when called, if there is no graph or no number of nodes.

    Example:
        >>> from geo.kernels import heat
        >>> data = Data(edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), num_nodes=4)
        >>> AddGRF(8, heat(1.0), dim=3)(data).grf.shape
        torch.Size([4, 3])
        >>> batch = Batch.from_data_list([AddGRF(8, heat(1.0))(data)] * 2)
        >>> read_grf(batch)
        SparseFeatures(num_rows=8, num_cols=8, entries=20)
    """

    def __init__(
        self,
        num_walks: int = 16,
        series: Series | None = None,
        attr_name: str = "grf",
        dim: int | None = None,
        *,
        p_halt: float = 0.5,
        coupling: str = "antithetic+repelling",
        proposal: str = "uniform",
        max_length: int | None = None,
        first_walk: int = 0,
        seed: int = 0,
        weight_name: str | None = "edge_weight",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not attr_name.isidentifier() or any(word in attr_name for word in _RESERVED):
            raise ValueError(
                f"attr_name is {attr_name!r}, but must be a name without {', '.join(_RESERVED)}, words of PyG"
            )
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 1):
            raise ValueError(f"dim is {dim!r}, but must be an integer of at least 1, or None")
        if dim is not None and series is None:
            raise ValueError(
                f"dim is {dim}, but series is None: deposits are projected after a modulation; give a series"
            )
        if series is not None:
            max_length = _check_series(series, p_halt, max_length)
        self.num_walks, self.series, self.attr_name, self.dim = num_walks, series, attr_name, dim
        self.p_halt, self.coupling, self.proposal, self.max_length = p_halt, coupling, proposal, max_length
        self.first_walk, self.seed, self.weight_name, self.dtype = first_walk, seed, weight_name, dtype
        self._walk(*normalized_adjacency(torch.zeros(2, 0, dtype=torch.int64), dtype=dtype))  # refuses bad options

    def _walk(self, rowptr: Tensor, col: Tensor, weight: Tensor) -> WalkDeposits:
        return grf_walks(
            rowptr,
            col,
            weight,
            num_walks=self.num_walks,
            seed=self.seed,
            p_halt=self.p_halt,
            coupling=self.coupling,
            proposal=self.proposal,
            first_walk=self.first_walk,
            max_length=self.max_length,
        )

    @torch.no_grad()
    def forward(self, data: Data) -> Data:
        """Adds the features."""
        edge_index, weight, num_nodes = _graph(data, self.weight_name)
        matrix = normalized_adjacency(edge_index, weight, num_nodes, dtype=self.dtype)
        if weight is not None or matrix[1].size(0) != edge_index.size(1):
            self._check_variance(matrix)
        deposits = self._walk(*matrix)
        name = self.attr_name
        if self.series is None:
            ptr, data[f"{name}_index"], length, data[f"{name}_value"] = deposits
            data[f"{name}_count"], data[f"{name}_length"] = ptr.diff(), length
            return data
        lengths = int(deposits.length.max()) + 1 if deposits.length.numel() else 1
        f = math.sqrt(self.series.scale) * self.series.modulation(lengths)
        phi = features_of(deposits, f.to(deposits.value), num_nodes)
        if self.dim is None:
            data[f"{name}_count"], data[f"{name}_index"], data[f"{name}_value"] = phi.ptr.diff(), phi.col, phi.value
        else:
            data[name] = phi.matmul(self._projection(num_nodes, self.dim, phi.value))
        return data

    def _check_variance(self, matrix: tuple[Tensor, Tensor, Tensor]) -> None:
        """Warns of a weighted graph on which the features have infinite variance; of others the constructor does."""
        series = self.series
        if series is None or self.max_length is not None or math.isinf(series.radius):
            return
        squares = spectral_radius(*matrix[:2], step_squares(matrix, self.proposal))
        limit = 1 - squares / series.radius**2  # the square of a load has the mean of (squares / (1 - p_halt))^length
        if squares <= 1 + 1e-6 or self.p_halt < limit - 1e-9:
            return
        remedy = f"take p_halt below {limit:.3g}" if limit > 1e-6 else "no p_halt helps: take a series of shorter range"
        also = ", or proposal='weight'" if self.proposal == "uniform" else ""
        warnings.warn(
            f"series is {series.name}, whose features have infinite variance with p_halt={self.p_halt} on a graph with "
            f"such edge weights: {remedy}{also}, or cut the walks by max_length, which is a bias",
            stacklevel=4,
        )

    def _projection(self, num_nodes: int, dim: int, like: Tensor) -> Tensor:
        """[num_nodes, dim], Gaussian with variance 1 / dim, by Box and Muller."""
        node = torch.arange(num_nodes, device=like.device).unsqueeze(1)
        block = torch.arange(-(-dim // 4), device=like.device).expand(num_nodes, -1)
        zero = torch.zeros_like(block)
        words = [(word.double() + 0.5) / 2**32 for word in philox(self.seed, node + zero, block, zero, zero + _KIND)]
        parts = []
        for radius, angle in (words[:2], words[2:]):
            size = torch.sqrt(-2 * torch.log(radius) / dim)
            parts += [size * torch.cos(2 * math.pi * angle), size * torch.sin(2 * math.pi * angle)]
        return torch.stack(parts, dim=-1).flatten(1)[:, :dim].to(like)

    def __repr__(self) -> str:  # all options, since PyG tells by it whether what it has on disk is still right
        names = [name for name in vars(self) if name != "series"]
        series = None if self.series is None else self.series.name
        return f"{type(self).__name__}(series={series}, {', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"


def read_grf(data: Any, attr_name: str = "grf") -> SparseFeatures | WalkDeposits:
    """What :class:`AddGRF` stored in a graph or a batch, as one matrix of nodes by nodes.

    Args:
        data: A Data or a Batch.
        attr_name: As of :class:`AddGRF`.

    Returns:
        The features, or the deposits if it was given no series.

    Raises:
        ValueError: The attributes are not there.

    Example:
        >>> data = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), num_nodes=2)
        >>> deposits = read_grf(AddGRF(4, max_length=1)(data))
        >>> deposits.col.tolist(), deposits.length.tolist()
        ([0, 1, 0, 1], [0, 1, 1, 0])
    """
    count, index, value = (data.get(f"{attr_name}_{part}") for part in ("count", "index", "value"))
    if count is None or index is None or value is None:
        raise ValueError(
            f"data has no {attr_name}_count, {attr_name}_index and {attr_name}_value: apply "
            f"AddGRF(attr_name={attr_name!r}) without dim"
        )
    ptr = torch.cat((count.new_zeros(1), count.cumsum(0)))
    length = data.get(f"{attr_name}_length")
    if length is not None:
        return WalkDeposits(ptr, index, length, value)
    return SparseFeatures(ptr, index, value, count.size(0))


def _check_series(series: Series, p_halt: float, max_length: int | None) -> int | None:
    """Refuses a series that the features do not estimate, and returns where walks are cut."""
    both = series.modulations(16)
    if series.normalization != "sym" or series.conjugate is not None or not torch.equal(*both) or series.scale <= 0:
        raise ValueError(
            f"series is {series.name}, but must be a symmetric kernel of the normalised adjacency with one modulation, "
            "such as heat(1.0) or regularised_laplacian(1.0)"
        )
    if series.radius < 1 or (series.radius == 1 and not series.on_circle):
        raise ValueError(
            f"series is {series.name}, whose modulation converges for spectral radii below {series.radius:.6g}, but "
            "that of a normalised adjacency is 1: take a series of shorter range"
        )
    if max_length is None and series.degree is None and series.radius**-2 >= 1 - p_halt:
        warnings.warn(
            f"series is {series.name}, whose features have infinite variance with p_halt={p_halt}: take p_halt below "
            f"{1 - series.radius**-2:.3g}, or cut the walks by max_length, which is a bias",
            stacklevel=3,
        )
    return series.degree if max_length is None else max_length


def _graph(data: Any, weight_name: str | None) -> tuple[Tensor, Tensor | None, int]:
    """``edge_index``, weights and the number of nodes of one graph."""
    if not isinstance(data, Data) or isinstance(data, Batch):
        raise ValueError(f"data is a {type(data).__name__}, but must be one graph: a Data, before it is batched")
    edge_index = data.get("edge_index")
    if not isinstance(edge_index, Tensor):
        raise ValueError("data has no edge_index")
    edge_index = edge_index.as_tensor() if isinstance(edge_index, EdgeIndex) else edge_index
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            num_nodes = int(data.num_nodes)
        except UserWarning:  # PyG would guess it from the edges, and miss isolated nodes
            raise ValueError("the number of nodes is not given: set num_nodes, or node features x") from None
    weight = None if weight_name is None else data.get(weight_name)
    if weight is not None and weight.dim() == 2 and weight.size(1) == 1:
        weight = weight.squeeze(1)
    return edge_index, weight, num_nodes
