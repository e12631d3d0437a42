"""Kernels on graphs, estimated by random features."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geo.kernels.estimate import Estimate, places_of, row_dots, row_sums
from geo.kernels.exact_moments import WalkMoments, covariance, matrix_series, relative_error, variance
from geo.kernels.features import FeatureMap, SparseFeatures, normalized_adjacency
from geo.kernels.series import Series
from geo.kernels.streaming import StreamingWalks, WalkUpdate
from geo.kernels.walk_matrix import Matrix, spectral_radius, step_squares, transposed
from geo.ops import WalkDeposits, grf_walks
from geo.ops.walk_step import checked_law

_ONE = 2**32  # probabilities of halting and of steps are multiples of one over this
_EXACT_NODES = 300  # whose second moments fit: their cube is 27 million numbers


class GRFKernel:
    r"""An unbiased estimate of a graph kernel :math:`K = s \sum_k \alpha_k W^k` by random features.

    :math:`\hat K = s\, \Phi_1 \Phi_2^\top` with sparse :math:`\Phi` from random walks that end by chance ("General
    graph random features", `arXiv:2310.04859 <https://arxiv.org/abs/2310.04859>`_). Sampling and products cost
    :math:`O(N m / p)` for N nodes, m walks each and the probability p of halting; the relative error falls as
    :math:`m^{-1/2}`.

    With two independent sets of walks every entry is unbiased, and the estimate is not symmetric. One set gives a
    symmetric positive semi-definite estimate; its diagonal is too large by what :meth:`exact_bias` returns, which
    ``debias_diag`` takes away again (then it may have small negative eigenvalues). On a directed graph walks follow the
    edges, and those of the second set go against them. Isolated nodes have :math:`K_{ii} = s \alpha_0`.

    Args:
        edge_index: int64 [2, E], sources and targets; an undirected graph holds both directions. Repeated edges are
            added up.
        series: The kernel, such as ``heat(t=1.0)``; its ``normalization`` decides the matrix W, as in
            :func:`normalized_adjacency`.
        edge_weight: [E], of any sign (default: ones). If it requires a gradient, so do the features; tie the weights of
            the two directions of an edge, or the graph becomes a directed one.
        num_nodes: Number of nodes (default: the largest in ``edge_index`` plus one).
        num_walks: m, walks from each node and set.
        p_halt: Probability that a walk halts before each step. Long-range kernels need a small one: a warning tells
            where the variance is infinite, and where the error is estimated to be larger than the kernel.
        coupling: ``'iid'``, ``'antithetic'``, ``'repelling'`` or ``'antithetic+repelling'``, as in
            :func:`geo.ops.grf_walks`; the last has the smallest error and needs an even ``num_walks``.
        proposal: ``'uniform'``, or ``'weight'``: steps in proportion to \|W\|, for weights that differ much.
        two_sets: Whether to draw two independent sets of walks.
        generator: Draws the seed (default: PyTorch's).
        choice: ``'slot'`` or ``'rendezvous'``, as in :func:`geo.ops.grf_walks`.
        survival: [L], the probabilities of walks of at least each length, in place of ``p_halt``.
        max_length: Cuts walks, and with them the series (default: where its modulation ends, if it does).
        debias_diag: Estimate the diagonal from pairs of different walks; for one set of ``'iid'`` walks.
        symmetrise: Return :math:`(\hat K + \hat K^\top) / 2`.
        dtype: Of the features (default: that of ``edge_weight``, or PyTorch's default).

    Attributes:
        num_nodes, shape, series, num_walks, directed, seed: What they say.

    Raises:
        ValueError: The series diverges on this graph, or options do not go together; the message names the remedy.

    Example:
        >>> import torch
        >>> from geo.kernels import GRFKernel, heat
        >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> kernel = GRFKernel(edge_index, heat(t=1.0), num_walks=4096, generator=torch.Generator().manual_seed(0))
        >>> (kernel @ torch.ones(3)).shape, bool((kernel.dense() - kernel.exact()).abs().max() < 0.05)
        (torch.Size([3]), True)
    """

    def __init__(
        self,
        edge_index: Tensor,
        series: Series,
        edge_weight: Tensor | None = None,
        num_nodes: int | None = None,
        num_walks: int = 16,
        p_halt: float = 0.5,
        coupling: str = "antithetic+repelling",
        proposal: str = "uniform",
        two_sets: bool = True,
        generator: torch.Generator | None = None,
        *,
        choice: str = "slot",
        survival: Sequence[float] | Tensor | None = None,
        max_length: int | None = None,
        debias_diag: bool = False,
        symmetrise: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._cut_by_series = max_length is None and series.degree is not None
        if max_length is None:
            max_length = series.degree
        self._halting = checked_law(num_walks, 0, p_halt, survival, coupling, choice, 0, max_length).halt_below
        self._matrix = normalized_adjacency(edge_index, edge_weight, num_nodes, series.normalization, dtype)
        self._transpose, self.directed = transposed(*self._matrix)
        self.num_nodes = self._matrix[0].size(0) - 1
        self.num_walks, self.two_sets, self.debias_diag, self.symmetrise = num_walks, two_sets, debias_diag, symmetrise
        self.coupling, self._max_length = coupling, max_length
        self._options: dict[str, Any] = {
            "p_halt": p_halt, "survival": survival, "proposal": proposal, "choice": choice, "max_length": max_length,
        }  # fmt: skip
        self._plain = edge_weight is None and self._matrix[1].size(0) == edge_index.size(1)
        self._check_options()
        self._graph = edge_index, edge_weight
        self._set_series(series)
        self.resample(generator)

    def _check_options(self) -> None:
        if self.directed and not self.two_sets:
            raise ValueError(
                "two_sets: a directed graph needs two sets, since the second walks against its edges; got False. For "
                "an undirected graph give each edge in both directions (torch_geometric.utils.to_undirected)"
            )
        if self.directed and self.symmetrise:
            raise ValueError("symmetrise: the kernel of a directed graph is not symmetric; leave it False")
        if self.debias_diag:
            self._require_iid("debias_diag")
            if self.two_sets:
                raise ValueError(
                    "debias_diag: two sets have an unbiased diagonal already; use two_sets=False or debias_diag=False"
                )
            if self.num_walks < 2:
                raise ValueError(f"debias_diag: needs num_walks of at least 2, got {self.num_walks}")

    def _require_iid(self, what: str) -> None:
        if self.coupling != "iid":
            raise ValueError(
                f"{what}: needs coupling='iid', got {self.coupling!r}: the walks of a start must be independent"
            )

    # -- series --------------------------------------------------------------------------------------------------------
    def _set_series(self, series: Series, check: bool = True) -> None:
        if series.conjugate == "degree" and (self.directed or self.symmetrise):
            raise ValueError(
                f"series: {series.name} needs an undirected graph and symmetrise=False; on a directed one take "
                "katz(beta=1 - a), times a, with edge_weight = 1 / (number of edges out of the source)"
            )
        if check and self._matrix[1].size(0):
            self._check_variance(series, self._check_convergence(series))
        self.series = series
        self._sides: tuple[Tensor, Tensor] | None = None  # what multiplies rows and columns
        if series.conjugate == "degree":
            rowptr, _, weight = normalized_adjacency(*self._graph, self.num_nodes, None, self._matrix[2].dtype)
            degree = row_sums(rowptr, weight.abs())
            root = torch.where(degree > 0, degree, 1).sqrt()
            self._sides = 1 / root, root
        self._features: tuple[SparseFeatures, SparseFeatures, Tensor | None] | None = None

    def _check_convergence(self, series: Series) -> float:
        """Walks need absolute convergence: of the matrix without its signs, whose spectral radius this bounds."""
        if series.normalization == "sym" and series.radius > 1 + 1e-3:
            return 1.0
        rowptr, col, weight = self._matrix
        rho = spectral_radius(rowptr, col, weight.detach().abs())
        limit = series.radius * (1 + 1e-6 if series.on_circle else 1 - 1e-6)
        if rho > limit:
            raise ValueError(
                f"series: the modulation of {series.name} converges for spectral radii below {series.radius:.6g}, but "
                f"the matrix has {rho:.6g}: divide edge_weight by more than {rho / series.radius:.6g}, or take a "
                "series of shorter range"
            )
        return rho

    def _check_variance(self, series: Series, rho: float) -> None:
        proposal, halt = self._options["proposal"], self._halting[-1] / _ONE
        finite = self._max_length is not None or halt == 1 or not math.isfinite(series.radius)
        squares = 1.0  # for a symmetric normalised matrix: more if it has weights, which does not matter if finite
        if self.directed or series.normalization is None or not (finite or self._plain):
            sets = (self._matrix, self._transpose) if self.directed else (self._matrix,)
            squares = max(spectral_radius(*matrix[:2], step_squares(matrix, proposal)) for matrix in sets)
        limit = 1 - squares / series.radius**2  # the square of a load has the mean of (squares / (1 - halt))^length
        if finite or halt < limit - 1e-9:
            halting = [units / _ONE for units in self._halting]
            dtype = self._matrix[2].dtype
            error = relative_error(series, self.num_walks, halting, self._max_length, rho, squares, dtype)
            if error > 1:
                warnings.warn(
                    f"series: the error of {series.name} from {self.num_walks} walks a node with p_halt={halt:.3g} is "
                    f"estimated at {error:.2g} times the kernel: take a smaller p_halt, more walks (num_walks), or a "
                    "product of kernels of shorter range (StitchedKernel)",
                    stacklevel=4,
                )
            return
        remedy = f"take p_halt below {limit:.3g}" if limit > 1e-6 else "no p_halt helps: take a series of shorter range"
        also = ", or proposal='weight'" if proposal == "uniform" and not self._plain else ""
        warnings.warn(
            f"series: the variance of {series.name} is infinite on this graph with p_halt={halt:.3g}: {remedy}{also}, "
            "or cut the walks by max_length, which is a bias",
            stacklevel=4,
        )

    def with_series(self, series: Series) -> GRFKernel:
        """Another kernel estimated from the same walks.

        Args:
            series: Of the same ``normalization``. Lengths beyond ``max_length``, if it was given, drop out.

        Returns:
            The kernel; it shares its walks with this one.

        Raises:
            ValueError: The series needs another matrix, or longer walks than the first series had, or diverges.

        Example:
            >>> from geo.kernels import regularised_laplacian
            >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
            >>> GRFKernel(edge_index, regularised_laplacian()).with_series(regularised_laplacian(d=2.0)).shape
            (3, 3)
        """
        out = self._for_series(series)
        out._set_series(series)
        return out

    def _for_series(self, series: Series) -> GRFKernel:
        """A copy with the same walks, if they will do."""
        if series.normalization != self.series.normalization:
            raise ValueError(
                f"series: {series.name} has normalization={series.normalization!r}, the walks "
                f"{self.series.normalization!r}; sample anew"
            )
        cut = self._max_length
        if self._cut_by_series and cut is not None and (series.degree is None or series.degree > cut):
            raise ValueError(
                f"series: {series.name} needs walks longer than {cut}, where these were cut for a shorter series; "
                "sample anew, or start from the longer series"
            )
        out = copy.copy(self)
        out._streams = None
        return out

    def with_modulation(self, f: Tensor, scale: float = 1.0) -> GRFKernel:
        """The kernel of a modulation of one's own, from the same walks; differentiable in f.

        Args:
            f: [L], the modulation of both sets, in powers of W. Lengths of L and more drop out.
            scale: Factor of the kernel.

        Returns:
            The kernel; it shares its walks with this one.

        Raises:
            ValueError: f has not one axis, is empty, or is longer than the walks were cut for a series that ends.

        Example:
            >>> from geo.kernels import heat
            >>> f = torch.tensor([1.0, 0.5], requires_grad=True)
            >>> kernel = GRFKernel(torch.tensor([[0, 1], [1, 0]]), heat()).with_modulation(f)
            >>> torch.autograd.grad(kernel.diag().sum(), f)[0].shape
            torch.Size([2])
        """
        if f.dim() != 1 or f.numel() == 0 or not f.is_floating_point():
            raise ValueError(f"f: expected floating numbers along one axis, got {f.dtype} {list(f.shape)}")
        series = _learned(f, scale, self.series)
        out = self._for_series(series)
        out._set_series(series, check=False)  # f is what it is
        return out

    # -- walks ---------------------------------------------------------------------------------------------------------
    def resample(self, generator: torch.Generator | None = None) -> GRFKernel:
        """Draw new walks.

        Args:
            generator: Draws the seed (default: PyTorch's).

        Returns:
            This kernel.
        """
        device = None if generator is None else generator.device
        self.seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
        first = self._sample(self._matrix, self.num_walks, 0)
        second = self._sample(self._transpose, self.num_walks, self.num_walks) if self.two_sets else first
        single = [self._sample(self._matrix, 1, k) for k in range(self.num_walks)] if self.debias_diag else []
        self._streams: list[StreamingWalks] | None = None  # the same walks, ready for a change of the graph
        self._node_key: Tensor | None = None
        self._set_deposits(first, second, *single)
        return self

    def _set_deposits(self, *deposits: WalkDeposits) -> None:
        self._deposits = deposits
        longest = max((int(d.length.max()) for d in self._deposits[:2] if d.length.numel()), default=0)
        self._num_lengths = longest + 1
        self._maps: tuple[int, list[FeatureMap]] | None = None
        self._features = None

    def _sample(self, matrix: Matrix, num_walks: int, first_walk: int) -> WalkDeposits:
        options = self._options | {"coupling": self.coupling, "first_walk": first_walk}
        return grf_walks(*matrix, num_walks=num_walks, seed=self.seed, **options)

    def update(
        self,
        edges_added: Tensor | None = None,
        edges_removed: Tensor | None = None,
        weight_added: Tensor | None = None,
        nodes_added: int = 0,
        nodes_removed: Tensor | None = None,
    ) -> tuple[WalkUpdate, ...]:
        """Change the graph, and simulate again only the walks that visit a node whose edges change.

        The kernel is then, bit for bit, what sampling the changed graph with the same seed gives. The first call also
        finds the paths of all walks, which it keeps.

        Args:
            edges_added: As in :meth:`StreamingWalks.update`, like all that follow; on an undirected graph in both
                directions.
            edges_removed: See there.
            weight_added: See there.
            nodes_added: See there.
            nodes_removed: See there.

        Returns:
            What was done, for each set of walks.

        Raises:
            IndexError: A node is out of range.
            ValueError: The kernel does not have ``choice='rendezvous'``, its edge weights require gradients, an
                undirected graph would become directed, the series diverges on the new graph, or what
                :meth:`StreamingWalks.update` refuses. The kernel is then as it was.

        Example:
            >>> from geo.kernels import heat
            >>> ring = torch.tensor([[0, 1, 2, 3, 1, 2, 3, 0], [1, 2, 3, 0, 0, 1, 2, 3]])
            >>> kernel = GRFKernel(ring, heat(), coupling="antithetic", choice="rendezvous")
            >>> first, second = kernel.update(edges_added=torch.tensor([[0, 2], [2, 0]]))
            >>> first.touched.tolist(), len(first.start) < 4 * kernel.num_walks
            ([0, 2], True)
        """
        streams = self._streams or self._new_streams()
        self._streams = None  # until all of this has worked
        done = []
        for i, stream in enumerate(streams):
            added, removed = edges_added, edges_removed
            if self.directed and i == 1:  # these walks go against the edges
                added, removed = (None if edges is None else edges.flip(0) for edges in (added, removed))
            done.append(stream.update(added, removed, weight_added, nodes_added, nodes_removed))
        out, first = copy.copy(self), streams[0]
        out.num_nodes, out._graph, out._matrix = first.num_nodes, (first.edge_index, first.edge_weight), first.matrix
        out._transpose, directed = transposed(*out._matrix)
        if directed and not self.directed:
            raise ValueError(
                "edges_added, edges_removed: the graph was undirected and would become directed: give each edge in "
                "both directions, with one weight"
            )
        out._plain, out._node_key = bool((first.edge_weight == 1).all()), first.node_key
        out._set_series(self.series)
        found = [stream.deposits for stream in streams]
        out._set_deposits(*(found if self.two_sets else (found[0], *found)))
        out._streams = streams
        self.__dict__.update(out.__dict__)
        return tuple(done)

    def _new_streams(self) -> list[StreamingWalks]:
        if self._options["choice"] != "rendezvous":
            raise ValueError(
                f"update: needs a kernel with choice='rendezvous', coupling='iid' or 'antithetic', and "
                f"proposal='uniform'; got choice={self._options['choice']!r}"
            )
        (edge_index, weight), m = self._graph, self.num_walks
        if weight is not None and weight.requires_grad:
            raise ValueError(
                "update: edge_weight requires a gradient, which walks do not keep; give edge_weight.detach()"
            )
        sets = [(edge_index, m, 0)]
        if self.two_sets:
            sets.append((edge_index.flip(0) if self.directed else edge_index, m, m))
        if self.debias_diag:
            sets += [(edge_index, 1, k) for k in range(m)]
        options = {key: self._options[key] for key in ("p_halt", "survival", "max_length")}
        options |= {"seed": self.seed, "coupling": self.coupling, "normalization": self.series.normalization}
        options |= {"node_key": self._node_key, "dtype": self._matrix[2].dtype}
        return [
            StreamingWalks(edges, weight, self.num_nodes, num_walks=num, first_walk=first, **options)
            for edges, num, first in sets
        ]

    def features(self, f: Tensor | tuple[Tensor, Tensor] | None = None) -> tuple[SparseFeatures, SparseFeatures]:
        r"""The features :math:`\Phi_1, \Phi_2`, without the factor s and, for PageRank, the scaling by degrees.

        Args:
            f: [L], a modulation for both sets, or one for each; differentiable (default: that of the series). Lengths
                of L and more drop out.

        Returns:
            Two sparse matrices [N, N]; the same one twice where one set has one modulation.

        Raises:
            ValueError: f has not one axis, or is empty.
        """
        if f is None:
            return self._default()[:2]
        f1, f2 = f if isinstance(f, tuple) else (f, f)
        phi1, phi2, _ = self._features_of(f1, f2, False)
        return phi1, phi2

    def _default(self) -> tuple[SparseFeatures, SparseFeatures, Tensor | None]:
        """The features of the series, and what debiasing adds to the diagonal."""
        if self._features is not None:
            return self._features
        out = self._features_of(*self.series.modulations(self._num_lengths), self.debias_diag)
        if not out[0].value.requires_grad and not out[1].value.requires_grad:
            self._features = out
        return out

    def _features_of(
        self, f1: Tensor, f2: Tensor, debias: bool
    ) -> tuple[SparseFeatures, SparseFeatures, Tensor | None]:
        for f in (f1, f2):
            if f.dim() != 1 or f.size(0) < 1:
                raise ValueError(f"f: expected at least one number along one axis, got {list(f.shape)}")
        n = min(max(f1.size(0), f2.size(0)), self._num_lengths)
        same = f1 is f2  # two modulations of equal values are still two, which learn apart
        f1, f2 = (torch.cat([f[:n], f.new_zeros(max(n - f.size(0), 0))]).to(self._matrix[2]) for f in (f1, f2))
        if self._maps is None or self._maps[0] != n:
            sets = self._deposits if self.two_sets else (self._deposits[0], *self._deposits[2:])
            self._maps = n, [FeatureMap(deposits, self.num_nodes, n) for deposits in sets]
        maps = self._maps[1]
        phi1 = maps[0](f1)
        phi2 = phi1 if same and not self.two_sets else maps[self.two_sets](f2)
        if not debias:
            return phi1, phi2, None
        m, total = self.num_walks, row_dots(phi1, phi2)
        alone = torch.stack([row_dots(one(f1), one(f2)) for one in maps[1:]]).sum(0)
        return phi1, phi2, (m * m * total - alone) / (m * (m - 1)) - total

    # -- the kernel as a matrix ----------------------------------------------------------------------------------------
    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""
        return self.num_nodes, self.num_nodes

    def __matmul__(self, other: Tensor) -> Tensor:
        r"""The product :math:`\hat K V` with V [N, \*S]; differentiable in V and the features, any number of times."""
        if other.dim() < 1 or other.size(0) != self.num_nodes:
            raise ValueError(f"matmul: expected {self.num_nodes} rows, one a node, got {list(other.shape)}")
        return self._estimate().matmul(other)

    def __getitem__(self, index: Any) -> Tensor:
        """Entries, with the indexing rules of a dense tensor for integers, slices, lists and index tensors."""
        i, j = index if isinstance(index, tuple) and len(index) == 2 else (index, slice(None))
        device = self._matrix[0].device
        rows, columns = (places_of(k, self.num_nodes, device) for k in (i, j))
        if isinstance(i, slice) or isinstance(j, slice):
            return self._estimate().block(rows.flatten(), columns.flatten()).view(*rows.shape, *columns.shape)
        rows, columns = torch.broadcast_tensors(rows, columns)
        return self._estimate().entries(rows.flatten(), columns.flatten()).view(rows.shape)

    def diag(self) -> Tensor:
        """The diagonal of the estimate, [N]."""
        nodes = torch.arange(self.num_nodes, device=self._matrix[0].device)
        return self._estimate().entries(nodes, nodes)

    def dense(self) -> Tensor:
        """The estimate as a dense matrix, [N, N]."""
        nodes = torch.arange(self.num_nodes, device=self._matrix[0].device)
        return self._estimate().block(nodes, nodes)

    def _estimate(self) -> Estimate:
        return Estimate(*self._default(), self._sides, self.series.scale, self.symmetrise)

    # -- what it estimates ---------------------------------------------------------------------------------------------
    def _dense_matrix(self, matrix: Matrix, values: Tensor | None = None) -> Tensor:
        rowptr, col, weight = matrix
        value = weight.detach().double() if values is None else values
        return SparseFeatures(rowptr, col, value, self.num_nodes).to_dense()

    def exact(self) -> Tensor:
        """The kernel itself, [N, N]: a dense function of the matrix, in time of the cube of the number of nodes.

        Eigenvalues are taken where the matrix is symmetric and the series has a closed form; else the series is summed.

        Returns:
            The kernel, computed in float64, in the dtype of the features.

        Raises:
            ValueError: The series does not converge within 4096 terms, or its sum is beyond float64.
        """
        out: Tensor
        matrix = self._dense_matrix(self._matrix)
        if self.series.function is not None and not self.directed:
            eigvals, eigvecs = torch.linalg.eigh((matrix + matrix.t()) / 2)
            out = (eigvecs * self.series.function(eigvals)) @ eigvecs.t()
        else:
            out = self.series.scale * matrix_series(self.series, matrix)
        out = out.to(self._matrix[2].dtype)
        sides = self._sides
        return out if sides is None else sides[0].unsqueeze(1) * out * sides[1]

    def _moments(self, what: str) -> tuple[WalkMoments, WalkMoments, Tensor, Tensor]:
        self._require_iid(what)
        halt = torch.tensor(self._halting, dtype=torch.float64) / _ONE
        most = 4096 if self._max_length is None else self._max_length
        going_on = torch.cat([1 - halt, (1 - halt[-1:]).expand(max(most - len(halt), 0))])[:most]
        ends = (going_on == 0).nonzero().flatten().tolist()
        first = WalkMoments(
            self._dense_matrix(self._matrix),
            self._dense_matrix(self._matrix, step_squares(self._matrix, self._options["proposal"])),
            going_on[: ends[0] if ends else most].to(self._matrix[0].device),
        )
        second = first
        if self.directed:
            second = first.transposed(
                self._dense_matrix(self._transpose, step_squares(self._transpose, self._options["proposal"]))
            )
        f1, f2 = first.modulations(self.series)
        if second is not first:  # each set goes on as long as its own loads matter
            f1, f2 = max((f1, f2), second.modulations(self.series), key=lambda pair: len(pair[0]))
        return first, second, f1.detach(), f2.detach()

    def exact_variance(self) -> Tensor:
        r"""The variance of each entry of the estimate, [N, N], computed in :math:`O(N^4)`; for up to 300 nodes.

        With one set that of the diagonal is NaN: it depends on fourth moments.

        Returns:
            Variances, float64.

        Raises:
            ValueError: The walks are not ``'iid'``, there are more than 300 nodes, or the variance is infinite.
        """
        if self.num_nodes > _EXACT_NODES:
            raise ValueError(
                f"exact_variance: for up to {_EXACT_NODES} nodes, got {self.num_nodes}; take a smaller graph"
            )
        first, second, f1, f2 = self._moments("exact_variance")
        out = variance(first, second, f1, f2, self.num_walks) * self.series.scale**2
        if self.symmetrise and (self.two_sets or not torch.equal(f1, f2)):
            both = out + out.t()
            if not self.two_sets:  # then the entries (i, j) and (j, i) are of the same walks
                both = both + 2 * covariance(first, f1, f2, self.num_walks) * self.series.scale**2
            out = torch.where(torch.eye(len(out), device=out.device) > 0, out, both / 4)
        if not self.two_sets:
            out.fill_diagonal_(math.nan)
        sides = self._sides
        return out if sides is None else sides[0].double().square().unsqueeze(1) * out * sides[1].double().square()

    def exact_bias(self) -> Tensor:
        r"""The mean of the estimate's diagonal less the kernel's, [N]: zero for two sets and with ``debias_diag``.

        One set of m walks has :math:`(E |\phi|^2 - |E \phi|^2) / m`, where :math:`\phi` is the feature of one walk.

        Returns:
            Biases, float64.

        Raises:
            ValueError: The walks are not ``'iid'``, or the variance is infinite.
        """
        if self.two_sets or self.debias_diag:
            return torch.zeros(self.num_nodes, dtype=torch.float64, device=self._matrix[0].device)
        first, _, f1, f2 = self._moments("exact_bias")
        mean = (first.mean(f1) * first.mean(f2)).sum(1)
        return self.series.scale * (first.dot(f1, f2) - mean) / self.num_walks

    def expected_cost(self) -> float:
        """The expected number of deposits for each node, in all sets: what sampling and products cost.

        Walks that meet a dead end make it smaller. ``num_walks / p_halt`` for each set where no length is cut.
        """
        going, total = 1.0, 0.0
        lengths = math.inf if self._max_length is None else self._max_length + 1
        for halt in self._halting[:-1]:
            if lengths > 0:
                total, going, lengths = total + going, going * (1 - halt / _ONE), lengths - 1
        last = self._halting[-1] / _ONE
        if last == 0:
            total += going * lengths
        elif lengths > 0:
            total += going * (1 - (1 - last) ** lengths) / last
        return self.num_walks * (1 + self.two_sets) * total

    def __repr__(self) -> str:
        sets = 2 if self.two_sets else 1
        return (
            f"GRFKernel({self.series.name}, num_nodes={self.num_nodes}, num_walks={self.num_walks}, sets={sets}, "
            f"coupling={self.coupling!r})"
        )


# -- parts -------------------------------------------------------------------------------------------------------------
def _learned(f: Tensor, scale: float, like: Series) -> Series:
    def padded(n: int) -> tuple[Tensor, Tensor]:
        out = torch.cat([f[:n], f.new_zeros(max(n - f.size(0), 0))])
        return out, out

    def square(n: int) -> Tensor:
        g = padded(n)[0].double()
        return torch.stack([(g[: k + 1] * g[: k + 1].flip(0)).sum() for k in range(n)])

    return Series(
        "modulation", square, padded, scale, like.normalization, degree=f.size(0) - 1, conjugate=like.conjugate
    )
