"""SignNet and plain Laplacian eigenvectors: what SPE is compared with, called as it is."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo.nn.mlp import MLP, make_norm
from geo.nn.spectrum import check_edges, check_spectrum
from geo.ops import SegmentPlan, gather_coo, gather_mul_segment_sum


class SignNet(nn.Module):
    r"""Positional encoding that does not see the signs of eigenvectors.

    From "Sign and Basis Invariant Networks for Spectral Graph Representation Learning"
    (https://arxiv.org/abs/2202.13013), with the masked sum over eigenvectors that "On the Stability of Expressive
    Positional Encodings for Graphs" (https://arxiv.org/abs/2310.02579) compares SPE with,

    .. math::
        z_k = \phi(v_k, \lambda_k) + \phi(-v_k, \lambda_k), \qquad
        \mathrm{SignNet}(v, \lambda) = \rho \Big( \sum_k z_k \Big)
        \quad \text{or} \quad \rho(z_1 \,\|\, \dots \,\|\, z_k)

    where :math:`\phi` is a GIN on the graph that reads one eigenvector :math:`v_k` as the only channel of its nodes
    (two, with the eigenvalue), each layer
    :math:`x \leftarrow \mathrm{MLP}((1 + \epsilon) x + A x)`, and :math:`\rho` an MLP of each node.

    What differs from the paper: pairs of a node and an eigenvector that its graph has are one flat list, so nothing is
    computed for padding, and layer norm in place of batch norm makes the output independent of the batch. The
    published code leaves out the eigenvalues (``use_eigvals=False``).

    Args:
        out_channels: Width of the encoding.
        k: None sums over the eigenvectors, of any number. A number concatenates the first k in place, with zeros for
            those that a graph does not have. (default: ``None``)
        phi_hidden: Width of the GIN. (default: ``64``)
        phi_layers: Its layers. (default: ``4``)
        phi_channels: Its width at the end. (default: ``phi_hidden``)
        mlp_layers: Linear maps in the MLP of each of its layers. (default: ``2``)
        rho_hidden: Width of the MLP at the end. (default: ``64``)
        rho_layers: Linear maps in it. (default: ``2``)
        use_eigvals: Whether the GIN sees the eigenvalue beside the eigenvector. (default: ``True``)
        norm: ``'layer_norm'``, ``'batch_norm'`` or None, after each linear map but the last of an MLP and between the
            layers of the GIN. (default: ``'layer_norm'``)
        act: Activation: ``'relu'``, ``'silu'``, ``'gelu'`` or ``'tanh'``. (default: ``'relu'``)

    Shapes:
        eigvals :math:`(B, K)`, eigvecs :math:`(|V|, K)`, edge_index :math:`(2, |E|)`, batch :math:`(|V|)` in any order,
        eig_mask :math:`(B, K)` bool, edge_weight :math:`(|E|)`; output :math:`(|V|, \text{out\_channels})`.

    Symmetry and derivatives:
        Invariant to the sign of each eigenvector, exactly (with ``'batch_norm'`` in training only where all flip at
        once). Equivariant to node permutation with the eigenvectors given; not invariant to the choice of a basis
        where an eigenvalue is multiple, so there it depends on what the solver returned, and not stable near such a
        graph: :class:`SPE` is both. A graph's output depends on its batch in training with ``'batch_norm'`` only.
        Differentiable in the weights and in ``edge_weight``; eigenvectors that require a gradient are refused.

    Raises:
        ValueError: An unknown option or a wrong shape, or a spectrum that requires a gradient.
        IndexError: ``edge_index`` or ``batch`` out of range.

    Example:
        >>> import torch
        >>> sign_net = SignNet(8)
        >>> eigvals, eigvecs = torch.tensor([[0.0, 1.0, 1.5]]), torch.linalg.qr(torch.randn(3, 3)).Q
        >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> pe = sign_net(eigvals, eigvecs, edge_index)
        >>> pe.shape, torch.equal(pe, sign_net(eigvals, eigvecs * torch.tensor([-1, 1, -1]), edge_index))
        (torch.Size([3, 8]), True)
    """

    def __init__(
        self,
        out_channels: int,
        k: int | None = None,
        phi_hidden: int = 64,
        phi_layers: int = 4,
        phi_channels: int | None = None,
        mlp_layers: int = 2,
        rho_hidden: int = 64,
        rho_layers: int = 2,
        use_eigvals: bool = True,
        norm: str | None = "layer_norm",
        act: str = "relu",
    ) -> None:
        super().__init__()
        phi_channels = phi_hidden if phi_channels is None else phi_channels
        _check_sizes(
            out_channels=out_channels,
            k=1 if k is None else k,
            phi_hidden=phi_hidden,
            phi_layers=phi_layers,
            phi_channels=phi_channels,
            mlp_layers=mlp_layers,
            rho_hidden=rho_hidden,
            rho_layers=rho_layers,
        )
        self.out_channels, self.k, self.use_eigvals = out_channels, k, bool(use_eigvals)
        self.phi_hidden, self.phi_layers, self.phi_channels = phi_hidden, phi_layers, phi_channels
        self.mlp_layers, self.rho_hidden, self.rho_layers = mlp_layers, rho_hidden, rho_layers
        self.norm, self.act = norm, act
        widths = [1 + self.use_eigvals, *[phi_hidden] * (phi_layers - 1), phi_channels]
        self.phi = _GIN(widths, phi_hidden, mlp_layers, norm, act)
        self.rho = MLP(phi_channels * (k or 1), rho_hidden, out_channels, rho_layers, norm, act)

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _reset(self.phi, self.rho)

    def forward(
        self,
        eigvals: Tensor,
        eigvecs: Tensor,
        edge_index: Tensor,
        batch: Tensor | None = None,
        eig_mask: Tensor | None = None,
        edge_weight: Tensor | None = None,
    ) -> Tensor:
        """Returns the encoding of each node.

        Args:
            eigvals: Eigenvalues of each graph, as :func:`geo.nn.pad_spectrum` gives them.
            eigvecs: Eigenvectors, one row a node.
            edge_index: Senders and receivers.
            batch: The graph of each node. (default: one graph)
            eig_mask: Which of them a graph has. (default: all)
            edge_weight: Factors of the messages. (default: 1)
        """
        check_spectrum(eigvals, eigvecs, batch, eig_mask)
        check_edges(edge_index, edge_weight)
        dtype = self.rho.dtype
        num_nodes, k = eigvecs.size(0), eigvecs.size(1) if self.k is None else min(self.k, eigvecs.size(1))
        v, lam = eigvecs[:, :k].to(dtype), _of_nodes(eigvals[:, :k].to(dtype), batch, num_nodes)
        has = None if eig_mask is None else _of_nodes(eig_mask[:, :k], batch, num_nodes)

        # One row for each (node, eigenvector); where a graph has no such eigenvector, the row after the last
        if has is None:
            x, other = v.flatten(), lam.flatten()
            row = torch.arange(x.size(0), device=x.device).view(num_nodes, k)
        else:
            x, other = v[has], lam[has]
            row = (has.flatten().cumsum(0) - 1).view(num_nodes, k).masked_fill(~has, x.size(0))
        src, dst = (gather_coo(row, end) for end in edge_index)
        weight = v.new_ones(edge_index.size(1)) if edge_weight is None else edge_weight.to(dtype)
        weight = weight.unsqueeze(1).expand(-1, k)
        if has is None:
            src, dst, weight = src.flatten(), dst.flatten(), weight.flatten()
        else:
            both = (src < x.size(0)) & (dst < x.size(0))
            src, dst, weight = src[both], dst[both], weight[both]
        plan = SegmentPlan(dst, x.size(0), src, x.size(0))

        z = self._phi(x, other, plan, weight) + self._phi(-x, other, plan, weight)
        if has is not None:
            z = gather_coo(torch.cat((z, z.new_zeros(1, z.size(1)))), row.flatten())
        z = z.view(num_nodes, k, self.phi_channels)
        z = z.sum(1) if self.k is None else F.pad(z, (0, 0, 0, self.k - k)).flatten(1)
        return self.rho(z)  # type: ignore[no-any-return]

    def _phi(self, x: Tensor, eigvals: Tensor, plan: SegmentPlan, weight: Tensor) -> Tensor:
        channels = torch.stack((x, eigvals), 1) if self.use_eigvals else x.unsqueeze(1)
        return self.phi(channels, plan, weight.unsqueeze(1))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.out_channels}, k={self.k}, phi_hidden={self.phi_hidden}, phi_layers={self.phi_layers}, "
            f"phi_channels={self.phi_channels}, mlp_layers={self.mlp_layers}, rho_hidden={self.rho_hidden}, "
            f"rho_layers={self.rho_layers}, use_eigvals={self.use_eigvals}, norm={self.norm!r}, act={self.act!r}"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class EigenvectorPE(nn.Module):
    r"""The first k Laplacian eigenvectors as features, with random signs in training.

    The positional encoding of "Benchmarking Graph Neural Networks" (https://arxiv.org/abs/2003.00982),

    .. math::
        \mathrm{PE}_i = \mathrm{MLP}(s_1 v_{i1}, \dots, s_k v_{ik}, \lambda_1, \dots, \lambda_k), \qquad
        s_j = \pm 1

    with new signs for each graph in each call of training and :math:`s = 1` in ``eval()``.

    What differs from the paper: the eigenvectors come as they are stored, the constant one among them, and with their
    eigenvalues.

    Args:
        out_channels: Width of the encoding.
        k: Eigenvectors that are read: the first k; zeros where a graph has fewer.
        use_eigvals: Whether the eigenvalues are read. (default: ``True``)
        hidden_channels: Width of the MLP. (default: ``64``)
        num_layers: Linear maps in it. (default: ``1``)
        random_sign: Whether signs are drawn in training. (default: ``True``)
        norm: ``'layer_norm'``, ``'batch_norm'`` or None, after each linear map but the last.
            (default: ``'layer_norm'``)
        act: Activation: ``'relu'``, ``'silu'``, ``'gelu'`` or ``'tanh'``. (default: ``'relu'``)

    Shapes:
        As of :class:`SignNet`; edge_index and edge_weight are not read, only kept for the same call.

    Symmetry and derivatives:
        None but to node permutation with the eigenvectors given: the output changes with the sign of an eigenvector,
        which the random signs teach a model to bear, and with the basis of a multiple eigenvalue. A graph's output
        depends on its batch in training with ``'batch_norm'`` only. Differentiable in the weights; eigenvectors that
        require a gradient are refused.

    Raises:
        ValueError: An unknown option or a wrong shape, or a spectrum that requires a gradient.
        IndexError: ``batch`` out of range.

    Example:
        >>> import torch
        >>> pe = EigenvectorPE(8, k=4)
        >>> eigvals, eigvecs = torch.tensor([[0.0, 1.0, 1.5]]), torch.linalg.qr(torch.randn(3, 3)).Q
        >>> pe(eigvals, eigvecs, torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        out_channels: int,
        k: int,
        use_eigvals: bool = True,
        hidden_channels: int = 64,
        num_layers: int = 1,
        random_sign: bool = True,
        norm: str | None = "layer_norm",
        act: str = "relu",
    ) -> None:
        super().__init__()
        _check_sizes(out_channels=out_channels, k=k, hidden_channels=hidden_channels, num_layers=num_layers)
        self.out_channels, self.k, self.use_eigvals = out_channels, k, bool(use_eigvals)
        self.hidden_channels, self.num_layers = hidden_channels, num_layers
        self.random_sign, self.norm, self.act = bool(random_sign), norm, act
        self.mlp = MLP(k * (1 + self.use_eigvals), hidden_channels, out_channels, num_layers, norm, act)

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _reset(self.mlp)

    def forward(
        self,
        eigvals: Tensor,
        eigvecs: Tensor,
        edge_index: Tensor,
        batch: Tensor | None = None,
        eig_mask: Tensor | None = None,
        edge_weight: Tensor | None = None,
    ) -> Tensor:
        """Returns the encoding of each node.

        Args:
            eigvals: Eigenvalues of each graph, as :func:`geo.nn.pad_spectrum` gives them.
            eigvecs: Eigenvectors, one row a node.
            edge_index: Senders and receivers; not read.
            batch: The graph of each node. (default: one graph)
            eig_mask: Which of them a graph has. (default: all)
            edge_weight: Not read.
        """
        check_spectrum(eigvals, eigvecs, batch, eig_mask)
        check_edges(edge_index, edge_weight)
        num_nodes, k, dtype = eigvecs.size(0), min(self.k, eigvecs.size(1)), self.mlp.dtype
        x, lam = eigvecs[:, :k].to(dtype), _of_nodes(eigvals[:, :k].to(dtype), batch, num_nodes)
        if self.training and self.random_sign:
            signs = torch.randint(2, (eigvals.size(0), k), device=x.device)
            x = torch.where(_of_nodes(signs, batch, num_nodes) == 1, x, -x)
        parts = [x, lam] if self.use_eigvals else [x]
        if eig_mask is not None:
            has = _of_nodes(eig_mask[:, :k], batch, num_nodes)
            parts = [part.masked_fill(~has, 0) for part in parts]
        features = [F.pad(part, (0, self.k - k)) for part in parts]
        return self.mlp(torch.cat(features, 1))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.out_channels}, k={self.k}, use_eigvals={self.use_eigvals}, "
            f"hidden_channels={self.hidden_channels}, num_layers={self.num_layers}, random_sign={self.random_sign}, "
            f"norm={self.norm!r}, act={self.act!r}"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class _GIN(nn.Module):
    """GIN layers with a norm between them, over the rows of a plan."""

    def __init__(self, widths: list[int], hidden: int, mlp_layers: int, norm: str | None, act: str) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(MLP(a, hidden, b, mlp_layers, norm, act) for a, b in pairwise(widths))
        self.eps = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in self.mlps)
        self.norms = nn.ModuleList([*(make_norm(norm, width) for width in widths[1:-1]), nn.Identity()])

    def reset_parameters(self) -> None:
        for eps in self.eps:
            nn.init.zeros_(eps)

    def forward(self, x: Tensor, plan: SegmentPlan, weight: Tensor) -> Tensor:
        for mlp, eps, norm in zip(self.mlps, self.eps, self.norms, strict=True):
            received = gather_mul_segment_sum(x, weight.to(x.dtype), plan=plan)
            x = norm(mlp((1 + eps) * x + received))
        return x


def _reset(*modules: nn.Module) -> None:
    for module in modules:
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()  # type: ignore[operator]


def _of_nodes(values: Tensor, batch: Tensor | None, num_nodes: int) -> Tensor:
    """Rows of graphs as rows of their nodes."""
    return values.expand(num_nodes, -1) if batch is None else gather_coo(values, batch)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, but must be an integer of at least 1")
