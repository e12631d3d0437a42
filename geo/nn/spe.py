"""Stable and expressive positional encodings of nodes from the spectrum of a graph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from geo.nn.mlp import NORMS
from geo.nn.spe_phi import DeepSetsFilter, MLPFilter, SplineFilter
from geo.nn.spe_rho import PairNetwork
from geo.nn.spectrum import check_edges, check_spectrum
from geo.ops import bounds, spectral_filter

_PHI = ("mlp", "deepsets", "spline")
_RHO = ("gin", "mlp", "deepsets")


class SPE(nn.Module):
    r"""Stable and expressive positional encoding of the nodes of a graph, from its eigenvalues and eigenvectors.

    "On the Stability of Expressive Positional Encodings for Graphs" (https://arxiv.org/abs/2310.02579): with the
    eigenpairs :math:`L = V \mathrm{diag}(\lambda) V^T` of the Laplacian,

    .. math::
        W_l = V \, \mathrm{diag}(\phi_l(\lambda)) \, V^T, \quad l = 1 \dots m, \qquad
        \mathrm{SPE} = \rho(W_1, \dots, W_m) \in \mathbb R^{n \times p}

    The filters :math:`\phi` give equal eigenvalues equal values, so W is the same for every choice of eigenvectors; and
    where they are Lipschitz, near-equal eigenvalues get near-equal values, so W hardly moves when the graph does. What
    :math:`\rho` reads is a matrix of pairs of nodes with m channels, and what it does:

    - ``'gin'``: a GIN along the rows, :math:`X^{l+1} = \mathrm{MLP}^l((1 + \epsilon^l) X^l + A X^l)` from
      :math:`X^0 = W`, each column by itself; then the sum over columns. This is the paper's choice.
    - ``'mlp'``: :math:`\sum_j \mathrm{MLP}(W_{ij})`.
    - ``'deepsets'``: :math:`\mathrm{MLP}_2(\sum_j \mathrm{MLP}_1(W_{ij}) + B W_{ii})`.

    What differs from the paper: layer norm by default, since batch norm reads all pairs of a batch; :math:`\epsilon`
    starts at 0, where the first layer of the GIN sees a node and its neighbours alike in the column of that node (with
    :math:`\phi = 1` that costs four of BREC's pairs, with filters of :math:`\lambda` none); the last layer of
    ``'deepsets'`` filters has no ReLU; the last linear layer stands behind the sum over columns, which is the same; and
    ``lipschitz`` and ``taper``, with which stability is a guarantee. The whole
    :math:`\phi: \mathbb R \to \mathbb R^m` is then K-Lipschitz, so for *all* symmetric L and L'

    .. math:: \lVert W(L) - W(L') \rVert_F \le K \lVert L - L' \rVert_F

    with the norm of the n x n x m tensor, if the spectrum is full or all eigenpairs below a taper are there.
    **Nothing is claimed after** :math:`\rho`: a layer norm is steep where its input is nearly constant. A spectrum that
    was cut inside an eigenspace has no stable encoding at all without a taper: give ``AddLaplacianSpectrum`` ``snap``,
    or a ``cutoff`` where this layer has its taper.

    Args:
        out_channels: Size p of the encoding.
        num_channels: Number m of filters. (default: ``16``)
        phi: ``'mlp'``, an MLP R -> R for each filter; ``'deepsets'``, one that reads all eigenvalues of the graph;
            ``'spline'``, a uniform cubic B-spline on [0, 2], where eigenvalues above 2 count as 2; or a Module, called
            as ``phi(eigvals [B, K], eig_mask [B, K])``, that returns [B, K, m]. (default: ``'mlp'``)
        rho: ``'gin'``, ``'mlp'``, ``'deepsets'``, or a Module, called as ``rho(W [P, m], row [P], col [P], edge_index,
            batch [N])`` with all pairs (row, col) of nodes of a graph, that returns [N, p]. (default: ``'gin'``)
        phi_hidden: Width of the filters' MLPs, or the number of control points of the spline. (default: ``16``)
        phi_layers: Their linear layers. (default: ``3``)
        rho_hidden: Width of rho. (default: ``64``)
        rho_layers: Layers of the GIN, or linear layers of the MLP over pairs. (default: ``4``)
        rho_mlp_layers: Linear layers of an MLP of the GIN. (default: ``3``)
        norm: ``'layer_norm'``, ``'batch_norm'`` or None, in the MLPs of rho. With batch norm a graph's output in
            training depends on its batch, and nothing is tiled. (default: ``'layer_norm'``)
        lipschitz: K of the inequality above, for ``phi='mlp'`` or ``'spline'``. (default: None, no limit)
        taper: A number c: :math:`\phi(\min(\lambda, c)) - \phi(c)` in place of :math:`\phi`, which is zero from c on
            and no steeper, so eigenpairs above c may be missing. (default: None)
        num_columns: In training, rho ``'gin'`` or ``'mlp'`` reads this many columns of each graph, drawn anew in every
            call; the sum over them is scaled to have the mean of the full sum. (default: None, all)
        aggr: ``'sum'`` or ``'mean'`` over columns. (default: ``'sum'``)
        act: Activation in rho: ``'relu'``, ``'gelu'``, ``'silu'`` or ``'tanh'``. (default: ``'relu'``)
        tile: Pairs of nodes that rho reads at a time; by default as many as fit the cache.
        recompute: True: states of rho are made again for the gradient, tile by tile; False: all are kept, about
            n^2 rho_hidden numbers for each linear layer, norm and activation, which is about a quarter faster; None:
            kept up to 256 MiB (on a GPU 8 GiB). Neither this nor ``tile`` matters for ``'mlp'`` and ``'deepsets'`` with
            ReLU and without norm, which keep nothing. (default: None)

    Shapes:
        eigvals :math:`(B, K)`, eigvecs :math:`(|V|, K)` with zeros where a graph has fewer than K eigenpairs, eig_mask
        :math:`(B, K)`, all as :func:`pad_spectrum` makes them; edge_index :math:`(2, |E|)`, batch :math:`(|V|)` sorted,
        edge_weight :math:`(|E|)`, which multiplies the messages of the GIN; output :math:`(|V|, p)`.

    Symmetry and derivatives:
        Equivariant to permutations of the nodes, invariant to signs of eigenvectors and to rotations inside
        eigenspaces. No gradient flows to eigenvalues or eigenvectors (that of an eigendecomposition is infinite where
        eigenvalues coincide): asking for it raises. Differentiable in weights and edge weights; for ``'relu'`` not at
        0. A graph's output does not depend on its batch, but with ``'batch_norm'`` in training. Filters and W keep the
        precision of the weights under autocast. ``torch.compile`` breaks the graph at rho, whose tiles are made by the
        sizes of the graphs; for that reason there is no ``fullgraph=True`` and no export.

    Raises:
        ValueError: An unknown option, inputs that do not fit together or require grad, an edge between two graphs, or
            a cut spectrum where ``lipschitz`` is given without ``taper``.
        IndexError: An edge to a node that is not there.

    Example:
        >>> import torch
        >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])  # a path; its Laplacian has 0, 1 and 2
        >>> r = 2 ** -0.5
        >>> eigvecs = torch.tensor([[0.5, r, 0.5], [r, 0.0, -r], [0.5, -r, 0.5]])
        >>> spe = SPE(8, lipschitz=1.0)
        >>> out = spe(torch.tensor([[0.0, 1.0, 2.0]]), eigvecs, edge_index)
        >>> out.shape, bool(torch.allclose(out[0], out[2], atol=1e-5)), spe.lipschitz_bound() <= 1
        (torch.Size([3, 8]), True, True)
    """

    def __init__(
        self,
        out_channels: int,
        num_channels: int = 16,
        phi: str | nn.Module = "mlp",
        rho: str | nn.Module = "gin",
        phi_hidden: int = 16,
        phi_layers: int = 3,
        rho_hidden: int = 64,
        rho_layers: int = 4,
        rho_mlp_layers: int = 3,
        norm: str | None = "layer_norm",
        lipschitz: float | None = None,
        taper: float | None = None,
        num_columns: int | None = None,
        aggr: str = "sum",
        act: str = "relu",
        tile: int | None = None,
        recompute: bool | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "out_channels": out_channels,
            "num_channels": num_channels,
            "phi_hidden": phi_hidden,
            "phi_layers": phi_layers,
            "rho_hidden": rho_hidden,
            "rho_layers": rho_layers,
            "rho_mlp_layers": rho_mlp_layers,
            "num_columns": num_columns,
            "tile": tile,
        }
        for name, value in sizes.items():
            optional = name in ("num_columns", "tile") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least 1")
        for name, kind, kinds in (("phi", phi, _PHI), ("rho", rho, _RHO)):
            if not isinstance(kind, nn.Module) and kind not in kinds:
                raise ValueError(f"{name} is {kind!r}, but must be one of {', '.join(map(repr, kinds))} or a Module")
        if norm is not None and norm not in NORMS:
            raise ValueError(f"norm is {norm!r}, but must be one of {', '.join(map(repr, NORMS))} or None")
        if aggr not in ("sum", "mean"):
            raise ValueError(f"aggr is {aggr!r}, but must be 'sum' or 'mean'")
        for name, limit in (("lipschitz", lipschitz), ("taper", taper)):
            number = isinstance(limit, int | float) and not isinstance(limit, bool)
            if limit is not None and not (number and 0 < limit < math.inf):
                raise ValueError(f"{name} is {limit!r}, but must be a positive number or None")
            if limit is not None and phi not in ("mlp", "spline"):
                shown = phi if isinstance(phi, str) else type(phi).__name__
                raise ValueError(
                    f"{name} is {limit}, but phi is {shown!r}; it is known for phi='mlp' and 'spline' only"
                )
        if num_columns is not None and rho not in ("gin", "mlp"):
            raise ValueError(f"num_columns is {num_columns}, but only rho='gin' and 'mlp' can draw columns")
        if phi == "spline" and phi_hidden < 4:
            raise ValueError(f"phi_hidden is {phi_hidden}, but a cubic spline needs at least 4 control points")
        self.out_channels, self.num_channels = out_channels, num_channels
        self.lipschitz, self.taper, self.aggr = lipschitz, taper, aggr
        self.phi: nn.Module
        if isinstance(phi, nn.Module):
            self.phi = phi
        elif phi == "mlp":
            self.phi = MLPFilter(num_channels, phi_hidden, phi_layers, lipschitz)
        elif phi == "spline":
            self.phi = SplineFilter(num_channels, phi_hidden, lipschitz)
        else:
            self.phi = DeepSetsFilter(num_channels, phi_hidden, phi_layers)
        self.rho: nn.Module
        if isinstance(rho, nn.Module):
            self.rho = rho
        else:
            options: dict[str, Any] = {
                "hidden": rho_hidden,
                "num_layers": rho_layers,
                "mlp_layers": rho_mlp_layers,
                "norm": norm,
                "act": act,
                "mean": aggr == "mean",
                "num_columns": num_columns,
                "tile": tile,
                "recompute": recompute,
            }
            self.rho = PairNetwork(rho, num_channels, out_channels, **options)

    def reset_parameters(self) -> None:
        """Draws the weights anew, also those of modules that were given."""
        from torch_geometric.nn.inits import reset  # PyG takes longer to import than this layer

        reset(self.phi)
        reset(self.rho)

    def lipschitz_bound(self) -> float:
        """A Lipschitz constant of phi, and so of W in the Laplacian, with the weights as they are; inf if unknown.

        The product of the spectral norms of the layers of an MLP, or the steepest step of a spline; with ``lipschitz``
        at most that. For phi elementwise, and the full spectrum or a taper.
        """
        if not isinstance(self.phi, MLPFilter | SplineFilter):
            return math.inf
        bound = float(self.phi.bound().detach())
        return bound if self.lipschitz is None else min(bound, self.lipschitz)

    def forward(
        self,
        eigvals: Tensor,
        eigvecs: Tensor,
        edge_index: Tensor,
        batch: Tensor | None = None,
        eig_mask: Tensor | None = None,
        edge_weight: Tensor | None = None,
    ) -> Tensor:
        """The encoding of each node.

        Args:
            eigvals: Eigenvalues of each graph.
            eigvecs: Eigenvectors, a row for each node.
            edge_index: Senders and receivers.
            batch: The graph of each node. (default: one graph)
            eig_mask: Where there is an eigenpair. (default: everywhere)
            edge_weight: Multiplies the messages of the GIN. (default: 1)
        """
        check_edges(edge_index, edge_weight)
        eigvecs, filters, ptr = self._filters(eigvals, eigvecs, batch, eig_mask)
        _refuse_crossing(edge_index, ptr)
        if isinstance(self.rho, PairNetwork):
            positions: Tensor = _run(self.rho, eigvecs, filters, ptr, edge_index, edge_weight)
            return positions
        row, col = _pairs(ptr)
        if batch is None:
            batch = row.new_zeros(eigvecs.size(0))
        out: Tensor = self.rho(spectral_filter(eigvecs, filters, ptr), row, col, edge_index, batch)
        return out

    def weight_matrices(
        self, eigvals: Tensor, eigvecs: Tensor, batch: Tensor | None = None, eig_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W of all pairs of nodes, stored: ``(W [P, m], pair_ptr [B + 1], row [P], col [P])``, by graph and row.

        Args:
            eigvals: Eigenvalues of each graph.
            eigvecs: Eigenvectors, a row for each node.
            batch: The graph of each node. (default: one graph)
            eig_mask: Where there is an eigenpair. (default: everywhere)
        """
        eigvecs, filters, ptr = self._filters(eigvals, eigvecs, batch, eig_mask)
        count = ptr.diff().square().cumsum(0)
        return spectral_filter(eigvecs, filters, ptr), torch.cat([count.new_zeros(1), count]), *_pairs(ptr)

    def _filters(
        self, eigvals: Tensor, eigvecs: Tensor, batch: Tensor | None, eig_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvectors [N, K], filters [B, K, m], the first node of each graph [B + 1]."""
        check_spectrum(eigvals, eigvecs, batch, eig_mask)
        ptr = _first_nodes(batch, eigvecs, eigvals.size(0))
        mask = torch.ones_like(eigvals, dtype=torch.bool) if eig_mask is None else eig_mask
        if self.lipschitz is not None and self.taper is None:
            _refuse_cut(mask, ptr)
        dtype = next((p.dtype for p in self.parameters()), eigvecs.dtype)
        eigvals, eigvecs = eigvals.to(dtype).masked_fill(~mask, 0.0), eigvecs.to(dtype)
        if eig_mask is not None:
            eigvecs = eigvecs.masked_fill(~(mask if batch is None else mask[batch]), 0.0)
        with torch.autocast(eigvals.device.type, enabled=False):  # rounding of filters would tell equal nodes apart
            filters = self._phi(eigvals, mask)
        return eigvecs, filters.masked_fill(~mask.unsqueeze(2), 0.0), ptr

    def _phi(self, eigvals: Tensor, mask: Tensor) -> Tensor:
        out: Tensor
        if not isinstance(self.phi, MLPFilter | SplineFilter):
            out = self.phi(eigvals, mask)
            if out.shape != (*eigvals.shape, self.num_channels):
                expected = (*eigvals.shape, self.num_channels)
                raise ValueError(f"phi returned shape {tuple(out.shape)}, but must return {expected}")
            return out
        if self.taper is None:
            out = self.phi(eigvals)
            return out
        both = torch.cat([eigvals.clamp(max=self.taper).flatten(), eigvals.new_full((1,), self.taper)])
        out = self.phi(both.unsqueeze(0)).squeeze(0)
        return (out[:-1] - out[-1]).view(*eigvals.shape, -1)

    def extra_repr(self) -> str:
        """Sizes and options."""
        parts = [f"{self.out_channels}, num_channels={self.num_channels}, aggr={self.aggr!r}"]
        parts += [f"{name}={v}" for name in ("lipschitz", "taper") if (v := getattr(self, name)) is not None]
        return ", ".join(parts)


@torch.compiler.disable  # sizes of graphs, which tiles are made of, are data
def _run(rho: PairNetwork, *args: Any) -> Tensor:
    out: Tensor = rho(*args)
    return out


@torch.compiler.disable
def _first_nodes(batch: Tensor | None, eigvecs: Tensor, num_graphs: int) -> Tensor:
    num_nodes = eigvecs.size(0)
    if batch is None:
        return torch.tensor([0, num_nodes], device=eigvecs.device)
    if bool((batch[1:] < batch[:-1]).any()):
        raise ValueError("batch is not sorted, but the nodes of each graph must stand together, graph after graph")
    if num_nodes and not 0 <= int(batch[0]) <= int(batch[-1]) < num_graphs:
        raise ValueError(
            f"batch goes from {int(batch[0])} to {int(batch[-1])}, but eigvals has {num_graphs} rows, one a graph"
        )
    return torch.searchsorted(batch, torch.arange(num_graphs + 1, device=batch.device))


@torch.compiler.disable
def _refuse_crossing(edge_index: Tensor, ptr: Tensor) -> None:
    num_nodes = int(ptr[-1])
    for end in (0, 1):
        bounds.check_index("SPE", f"edge_index[{end}]", edge_index[end], num_nodes)
    source, target = torch.searchsorted(ptr, edge_index, right=True)
    if bool((crossing := source != target).any()):
        i, j = edge_index[:, int(crossing.to(torch.uint8).argmax())].tolist()
        raise ValueError(f"edge_index joins nodes {i} and {j} of two graphs, but an edge lies inside one")


@torch.compiler.disable
def _refuse_cut(mask: Tensor, ptr: Tensor) -> None:
    cut = mask.sum(1) < ptr.diff()
    if bool(cut.any()):
        graph = int(cut.to(torch.uint8).argmax())
        raise ValueError(
            f"graph {graph} has {int(ptr.diff()[graph])} nodes and {int(mask[graph].sum())} eigenpairs, but lipschitz "
            "needs the full spectrum or a taper"
        )


@torch.compiler.disable
def _pairs(ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of all pairs of nodes of a graph, by graph and row."""
    size = ptr.diff()
    count = size.square()
    total = int(count.sum())
    graph = torch.arange(len(size), device=ptr.device).repeat_interleave(count, output_size=total)
    place = torch.arange(total, device=ptr.device) - (count.cumsum(0) - count)[graph]
    return ptr[graph] + place // size[graph], ptr[graph] + place % size[graph]
