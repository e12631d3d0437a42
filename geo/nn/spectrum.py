"""Spectra of a batch of graphs, stored flat, as padded tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _nodes_per_graph(data: Any, num_graphs: int) -> Tensor:
    """The graph of each node [N]."""
    batch = getattr(data, "batch", None)
    if batch is not None:
        return batch  # type: ignore[no-any-return]
    if num_graphs != 1:
        raise ValueError(
            f"data holds the spectra of {num_graphs} graphs, but has no batch that tells their nodes apart"
        )
    return torch.zeros(data.num_nodes, dtype=torch.int64)


def pad_spectrum(
    data: Any, dtype: torch.dtype | None = None, eigval_name: str = "eigvals", eigvec_name: str = "eigvecs"
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Pads the eigenpairs that :class:`geo.transforms.AddLaplacianSpectrum` stored, so that networks can read them.

    Graphs differ in their numbers of nodes and of eigenpairs, so the transform stores both flat and PyG batches them by
    concatenation. Here graph :math:`g` gets its row of eigenvalues, and each of its nodes a row of entries of
    eigenvectors, as wide as the largest graph of the batch needs:

    .. math::
        \Lambda_{gk} = \lambda_k^{(g)}, \qquad V_{ik} = v_k^{(g)}(i), \qquad k < k_g

    and zero for :math:`k \ge k_g`. Zero is an eigenvalue, too: only the mask tells. What
    :class:`geo.transforms.AddMagneticLaplacianSpectrum` stored is padded alike, with an axis of length 2, real and
    imaginary part, behind the eigenvectors, and an axis for the potentials if there is a list of them. See `On the
    Stability of Expressive Positional Encodings for Graphs <https://arxiv.org/abs/2310.02579>`_ for what to do with it.

    Args:
        data: A :class:`torch_geometric.data.Batch`, or a single ``Data``, which counts as a batch of one.
        dtype: Of the eigenvalues and eigenvectors returned. (default: ``torch.get_default_dtype()``)
        eigval_name: Attribute with the eigenvalues, as given to the transform.
        eigvec_name: Attribute with the eigenvectors, as given to the transform.

    Returns:
        ``(eigvals, eigvecs, eig_mask)``.

    Raises:
        ValueError: If an attribute is missing, if the sizes do not fit together, or if there are several graphs and no
            ``batch``.

    Shapes:
        - data: ``eigvals`` :math:`(\sum_g k_g)`, ``eig_count`` :math:`(B)`, ``eigvecs`` :math:`(\sum_g n_g k_g)`
        - eigvals: :math:`(B, K)` with :math:`K = \max_g k_g`; magnetic with :math:`Q` potentials: :math:`(B, Q, K)`
        - eigvecs: :math:`(N, K)`; magnetic: :math:`(N, K, 2)` or :math:`(N, Q, K, 2)`
        - eig_mask: as eigvals, ``bool``, true where there is an eigenpair

    Symmetry and derivatives: a graph's rows do not depend on its batch but for the width of the padding. No gradient is
    expected: eigenpairs are data.

    Example:
        >>> from torch_geometric.data import Batch, Data
        >>> from geo.transforms import AddLaplacianSpectrum
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> graphs = [Data(edge_index=edges, num_nodes=2), Data(edge_index=edges[:, :0], num_nodes=1)]
        >>> graphs = [AddLaplacianSpectrum()(data) for data in graphs]
        >>> eigvals, eigvecs, eig_mask = pad_spectrum(Batch.from_data_list(graphs))
        >>> eigvals.tolist(), eig_mask.tolist(), eigvecs.shape
        ([[0.0, 2.0], [0.0, 0.0]], [[True, True], [True, False]], torch.Size([3, 2]))
    """
    count_name = f"{eigval_name.removesuffix('vals').removesuffix('_')}_count"
    names = (eigval_name, eigvec_name, count_name)
    missing = [name for name in names if not isinstance(getattr(data, name, None), Tensor)]
    if missing:
        raise ValueError(f"data has no {', '.join(missing)}; apply AddLaplacianSpectrum (with these names) first")
    values, vectors, count = (getattr(data, name) for name in names)
    batch = _nodes_per_graph(data, count.size(0)).to(count.device)
    width = int(count.max()) if count.numel() else 0
    eig_mask = torch.arange(width, device=count.device) < count.unsqueeze(-1)
    node_mask = eig_mask[batch]
    if int(count.sum()) != values.size(0) or int(count[batch].sum()) != vectors.size(0):
        raise ValueError(
            f"{eigval_name} {tuple(values.shape)}, {eigvec_name} {tuple(vectors.shape)} and {count_name} "
            f"{tuple(count.shape)} do not fit together for {batch.numel()} nodes; keep what the transform stored"
        )
    dtype = torch.get_default_dtype() if dtype is None else dtype
    eigvals = values.new_zeros(eig_mask.shape, dtype=dtype)
    eigvals[eig_mask] = values.to(dtype)
    eigvecs = vectors.new_zeros(node_mask.shape + vectors.shape[1:], dtype=dtype)
    eigvecs[node_mask] = vectors.to(dtype)
    return eigvals, eigvecs, eig_mask


def check_spectrum(eigvals: Tensor, eigvecs: Tensor, batch: Tensor | None, eig_mask: Tensor | None) -> None:
    """Raise ValueError unless the padded eigenpairs of real spectra fit together and require no gradient."""
    if eigvecs.dim() != 2 or not eigvecs.is_floating_point():
        raise ValueError(f"eigvecs is {eigvecs.dtype} {tuple(eigvecs.shape)}, but must be floating (|V|, K)")
    if eigvals.dim() != 2 or eigvals.size(1) != eigvecs.size(1) or not eigvals.is_floating_point():
        wanted = f"floating (B, {eigvecs.size(1)})"
        raise ValueError(f"eigvals is {eigvals.dtype} {tuple(eigvals.shape)}, but must be {wanted}, as eigvecs")
    for name, value in (("eigvals", eigvals), ("eigvecs", eigvecs)):
        if value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, but that of an eigendecomposition is infinite where eigenvalues "
                "coincide, so none is given: detach it"
            )
    if batch is None and eigvals.size(0) != 1:
        raise ValueError(f"eigvals has {eigvals.size(0)} graphs, but without batch it must be one")
    if batch is not None and (batch.shape != eigvecs.shape[:1] or batch.dtype != torch.int64):
        wanted = f"int64 ({eigvecs.size(0)},)"
        raise ValueError(f"batch is {batch.dtype} {tuple(batch.shape)}, but must be {wanted}")
    if eig_mask is not None and (eig_mask.shape != eigvals.shape or eig_mask.dtype != torch.bool):
        wanted = f"bool {tuple(eigvals.shape)}"
        raise ValueError(f"eig_mask is {eig_mask.dtype} {tuple(eig_mask.shape)}, but must be {wanted}")


def check_edges(edge_index: Tensor, edge_weight: Tensor | None) -> None:
    """Raise ValueError unless the edges are int64 (2, |E|) with as many weights."""
    if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.dtype != torch.int64:
        raise ValueError(f"edge_index is {edge_index.dtype} {tuple(edge_index.shape)}, but must be int64 (2, |E|)")
    if edge_weight is not None and edge_weight.shape != edge_index.shape[1:]:
        raise ValueError(f"edge_weight has shape {tuple(edge_weight.shape)}, but must be ({edge_index.size(1)},)")
