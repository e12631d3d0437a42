r"""Pair invariants: numbers that label the relative pose of two points.

Let :math:`X = G/H` be a homogeneous space. A :math:`G`-equivariant linear map between functions on :math:`X` has a
kernel :math:`k(x_i, x_j)` that is constant on the orbits of :math:`G` on :math:`X \times X`; so a convolution that
shares its weights over :math:`G` is one whose kernel is a function of the invariants of a pair. Throughout :math:`r =
p_j + s_{ij} - p_i` is "sender minus receiver" (``edge_index[0]`` is the sender :math:`j`, ``edge_index[1]`` the
receiver :math:`i`, and :math:`s` is ``edge_shift``).

============  ==================================================  ================================================
space         columns of ``kind='universal'``                     equal columns mean the same pair up to
============  ==================================================  ================================================
``R2``        ``|r|``                                             E(2)
``R3``        ``|r|``                                             E(3)
``R2xS1``     ``R_i^T r`` (2), ``cos``, ``sin`` of the turn       SE(2)
``R3xS2``     ``r.n_i``, ``r.n_j``, ``|r|^2``, ``n_i.n_j``        E(3); ``chiral`` adds ``det[r, n_i, n_j]``: SE(3)
``SE2``       ``R_i^T r`` (2), ``cos``, ``sin`` of the turn       SE(2)
``SE3``       ``R_i^T r`` (3), ``R_i^T R_j`` (9, row by row)      SE(3)
============  ==================================================  ================================================

On ``R3xS2`` the three numbers of the PONITA paper (``kind='ponita'``) are not complete: they leave the azimuth of
:math:`n_j` about :math:`n_i`, relative to :math:`r`, free. The universal set is the Gram matrix of :math:`(r, n_i,
n_j)`, a polynomial in :math:`r`, so it is smooth everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPACES = ("R2", "R3", "R2xS1", "R3xS2", "SE2", "SE3")
KINDS: dict[str, tuple[str, ...]] = {
    "R2": ("universal",),
    "R3": ("universal",),
    "R2xS1": ("universal", "ponita"),
    "R3xS2": ("universal", "ponita", "chiral"),
    "SE2": ("universal",),
    "SE3": ("universal",),
}
_PAIR_DIM = {
    ("R2", "universal"): 1,
    ("R3", "universal"): 1,
    ("R2xS1", "universal"): 4,
    ("R2xS1", "ponita"): 3,
    ("R3xS2", "universal"): 4,
    ("R3xS2", "ponita"): 3,
    ("R3xS2", "chiral"): 5,
    ("SE2", "universal"): 4,
    ("SE3", "universal"): 12,
}


def check_space(space: str, kind: str = "universal") -> int:
    """Returns the dimension of the positions of `space`; raises ValueError for an unknown space or kind."""
    if space not in SPACES:
        raise ValueError(f"space is {space!r}, but must be one of {', '.join(map(repr, SPACES))}")
    if kind not in KINDS[space]:
        raise ValueError(
            f"kind is {kind!r}, but for space {space!r} it must be one of {', '.join(map(repr, KINDS[space]))}"
        )
    return 2 if "2" in space.split("x")[0] else 3


def num_pair_invariants(space: str, kind: str = "universal") -> int:
    """Number of columns of :func:`pair_invariants`.

    Args:
        space: As there.
        kind: As there. (default: ``'universal'``)

    Raises:
        ValueError: An unknown space or kind.

    Example:
        >>> num_pair_invariants("R3xS2"), num_pair_invariants("SE3")
        (4, 12)
    """
    check_space(space, kind)
    return _PAIR_DIM[space, kind]


def num_grid_invariants(space: str, kind: str = "universal", separable: bool = True) -> tuple[int, int]:
    """Numbers of columns of the two tensors of :func:`grid_invariants`; the second is 0 for the full convolution.

    Args:
        space: As there.
        kind: As there. (default: ``'universal'``)
        separable: As there. (default: ``True``)

    Raises:
        ValueError: An unknown space or kind, or ``'chiral'`` for a separable convolution.

    Example:
        >>> num_grid_invariants("R3xS2"), num_grid_invariants("R3xS2", separable=False)
        ((2, 1), (4, 0))
    """
    dim = check_space(space, kind)
    if not separable:
        return _PAIR_DIM[space, kind], 0
    if space in ("R2", "R3"):
        raise ValueError(f"space is {space!r}, which has no orientations; use pair_invariants")
    if kind == "chiral":
        raise ValueError(
            "kind is 'chiral', but a separable convolution is blind to mirror images: use separable=False or 'SE3'"
        )
    fiber = {"R2xS1": 2 if kind == "universal" else 1, "R3xS2": 1, "SE2": 2, "SE3": 9}[space]
    return (dim if space in ("SE2", "SE3") else 2), fiber


def safe_norm(x: Tensor, dim: int = -1, keepdim: bool = False) -> Tensor:
    r"""Euclidean length whose first and second derivatives at 0 are 0 instead of NaN.

    Args:
        x: Any real tensor.
        dim: The axis that is measured. (default: ``-1``)
        keepdim: Keep that axis with size 1. (default: ``False``)

    Example:
        >>> x = torch.zeros(1, 3, requires_grad=True)
        >>> torch.autograd.grad(safe_norm(x).sum(), x)[0]
        tensor([[0., 0., 0.]])
    """
    square = (x * x).sum(dim, keepdim=keepdim)
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())


def edge_vectors(pos: Tensor, edge_index: Tensor, edge_shift: Tensor | None = None) -> Tensor:
    """Sender minus receiver, ``pos[src] + edge_shift - pos[dst]``, of each edge: ``[E, n]``."""
    r = pos[edge_index[0]] - pos[edge_index[1]]
    return r if edge_shift is None else r + edge_shift


def pair_invariants(
    space: str,
    pos: Tensor,
    edge_index: Tensor,
    ori: Tensor | None = None,
    kind: str = "universal",
    edge_shift: Tensor | None = None,
) -> Tensor:
    r"""Invariants of each edge's pair of points of a homogeneous space, in the order of the table above.

    Args:
        space: ``'R2'``, ``'R3'``, ``'R2xS1'``, ``'R3xS2'``, ``'SE2'`` or ``'SE3'``.
        pos: Positions.
        edge_index: Senders (row 0) and receivers (row 1).
        ori: One orientation per node: a unit vector for ``R2xS1`` and ``R3xS2``, a rotation matrix for ``SE2`` and
            ``SE3``, nothing for ``R2`` and ``R3``.
        kind: ``'universal'`` is complete. ``'ponita'`` is the set of the paper (``R3xS2``: ``r.n_i, |r - (r.n_i) n_i|,
            n_i.n_j``; ``R2xS1``: ``R_i^T r, cos``): incomplete, and on ``R3xS2`` not :math:`C^1` where :math:`r` is
            parallel to :math:`n_i`. ``'chiral'`` (``R3xS2``) tells mirror images apart. (default: ``'universal'``)
        edge_shift: Cartesian shift of the sender's periodic image. (default: none)

    Shapes:
        pos :math:`(|V|, n)`, edge_index :math:`(2, |E|)`, ori :math:`(|V|, n)` or :math:`(|V|, n, n)`, edge_shift
        :math:`(|E|, n)`; output :math:`(|E|, d)`.

    Raises:
        ValueError: An unknown space or kind, or a shape that does not fit the space.

    Example:
        >>> pos, ori = torch.tensor([[0., 0., 0.], [1., 0., .5]]), torch.tensor([[0., 0., 1.], [1., 0., 0.]])
        >>> pair_invariants('R3xS2', pos, torch.tensor([[1], [0]]), ori)
        tensor([[0.5000, 1.0000, 1.2500, 0.0000]])
    """
    dim = check_space(space, kind)
    _check_points(space, dim, pos, edge_index, edge_shift)
    r = edge_vectors(pos, edge_index, edge_shift)
    if space in ("R2", "R3"):
        if ori is not None:
            raise ValueError(f"ori is given, but space {space!r} has no orientations")
        return safe_norm(r, keepdim=True)
    shape = (pos.size(0), dim, dim) if space in ("SE2", "SE3") else (pos.size(0), dim)
    if ori is None or ori.shape != shape:
        raise ValueError(
            f"ori has shape {None if ori is None else tuple(ori.shape)}, but space {space!r} needs {shape}"
        )
    return _pair(space, kind, r, ori[edge_index[1]], ori[edge_index[0]])


def grid_invariants(
    space: str,
    pos: Tensor,
    edge_index: Tensor,
    grid: Tensor,
    kind: str = "universal",
    separable: bool = True,
    edge_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Invariants where every node carries the same grid of orientations (a fibre bundle).

    The separable convolution sees the same orientation at both ends, then mixes orientations at one position; it has
    attributes of its own: on ``R3xS2`` :math:`(r.n, |r|)` and :math:`n.n'`. They span what the paper's :math:`(r.n,
    |r_\perp|)` spans, but are smooth off :math:`r = 0`; the paper's (``kind='ponita'``) is not :math:`C^1` where
    :math:`r` is parallel to a grid axis, so forces jump there.

    Args:
        space: ``'R2xS1'``, ``'R3xS2'``, ``'SE2'`` or ``'SE3'``.
        pos: Positions.
        edge_index: Senders (row 0) and receivers (row 1).
        grid: The orientations, unit vectors or rotation matrices.
        kind: As in :func:`pair_invariants`; ``'chiral'`` needs ``separable=False``. (default: ``'universal'``)
        separable: The two factors' attributes instead of those of the full pair. (default: ``True``)
        edge_shift: Cartesian shift of the sender's periodic image. (default: none)

    Returns:
        ``(attr, fiber_attr)``: separable :math:`(|E|, O, d)` and :math:`(O, O, d')` (receiving orientation first); full
        :math:`(|E|, O, O, d)` (receiving orientation first) and ``None``.

    Raises:
        ValueError: An unknown space or kind, or a shape that does not fit the space.

    Example:
        >>> pos, grid = torch.rand(2, 3), torch.eye(3)
        >>> attr, fiber_attr = grid_invariants('R3xS2', pos, torch.tensor([[1, 0], [0, 1]]), grid)
        >>> attr.shape, fiber_attr.shape
        (torch.Size([2, 3, 2]), torch.Size([3, 3, 1]))
    """
    dim = check_space(space, kind)
    num_grid_invariants(space, kind, separable)
    _check_points(space, dim, pos, edge_index, edge_shift)
    return grid_invariants_from_vectors(space, edge_vectors(pos, edge_index, edge_shift), grid, kind, separable)


def grid_invariants_from_vectors(
    space: str, r: Tensor, grid: Tensor, kind: str = "universal", separable: bool = True
) -> tuple[Tensor, Tensor | None]:
    """:func:`grid_invariants` of edge vectors ``r`` ``[E, n]`` that are already at hand."""
    dim = check_space(space, kind)
    num_grid_invariants(space, kind, separable)
    if space in ("R2", "R3"):
        raise ValueError(f"space is {space!r}, which has no orientations; use pair_invariants")
    shape = (dim, dim) if space in ("SE2", "SE3") else (dim,)
    if grid.shape[1:] != shape:
        raise ValueError(f"grid has shape {tuple(grid.shape)}, but space {space!r} needs {('O', *shape)}")
    num_ori = grid.size(0)
    if not separable:
        full = (r.size(0), num_ori, num_ori)
        target = grid[None, :, None].expand(*full, *shape)
        source = grid[None, None].expand(*full, *shape)
        return _pair(space, kind, r[:, None, None].expand(*full, dim), target, source), None
    if space == "SE3":
        return torch.einsum("ea,oab->eob", r, grid), _turn(grid[:, None], grid[None]).flatten(-2)
    if space == "R3xS2":
        along = r @ grid.t()
        if kind == "ponita":
            other = safe_norm(r[:, None] - along[..., None] * grid)
        else:
            other = safe_norm(r, keepdim=True).expand(-1, num_ori)
        return torch.stack((along, other), -1), (grid @ grid.t()).unsqueeze(-1)
    if space == "SE2":
        grid = grid[..., 0]
    attr = torch.stack((r @ grid.t(), _cross(grid, r[:, None])), -1)
    fiber_attr = torch.stack((grid @ grid.t(), _cross(grid[:, None], grid[None])), -1)
    return attr, fiber_attr[..., :1] if kind == "ponita" else fiber_attr


def pair_invariants_from_vectors(
    space: str, r: Tensor, target: Tensor | None, source: Tensor | None, kind: str = "universal"
) -> Tensor:
    """:func:`pair_invariants` of edge vectors ``r`` and the two ends' orientations that are already at hand."""
    check_space(space, kind)
    if space in ("R2", "R3"):
        return safe_norm(r, keepdim=True)
    if target is None or source is None:
        raise ValueError(f"space is {space!r}, which needs the orientations of both ends")
    return _pair(space, kind, r, target, source)


def zero_invariants(
    space: str, grid: Tensor | None, kind: str = "universal", separable: bool = True, like: Tensor | None = None
) -> Tensor:
    """The attributes of a self-loop, with ``r = 0`` and equal orientations.

    What :func:`pair_invariants` gives (without ``grid``, ``[1, d]``), or :func:`grid_invariants` (``[1, O, d]`` or
    ``[1, O, O, d]``).
    """
    dim = check_space(space, kind)
    if grid is not None:
        return grid_invariants_from_vectors(space, grid.new_zeros(1, dim), grid, kind, separable)[0]
    if like is None:
        raise ValueError("zero_invariants needs grid or like")
    r = like.new_zeros(1, dim)
    if space in ("R2", "R3"):
        return r[:, :1]
    eye = torch.eye(dim, dtype=like.dtype, device=like.device)[None]
    ori = eye if space in ("SE2", "SE3") else eye[:, 0]
    return _pair(space, kind, r, ori, ori)


def _pair(space: str, kind: str, r: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Invariants of pairs given by ``r`` and the two orientations, all with the same leading axes."""
    if space == "SE3":
        local = (target.transpose(-1, -2) @ r.unsqueeze(-1)).squeeze(-1)
        return torch.cat((local, _turn(target, source).flatten(-2)), -1)
    if space == "SE2":
        target, source = target[..., 0], source[..., 0]
    along, cosine = (r * target).sum(-1), (target * source).sum(-1)
    if space in ("SE2", "R2xS1"):
        columns = [along, _cross(target, r), cosine]
        if kind == "universal":
            columns.append(_cross(target, source))
    elif kind == "ponita":
        columns = [along, safe_norm(r - along.unsqueeze(-1) * target), cosine]
    else:
        columns = [along, (r * source).sum(-1), (r * r).sum(-1), cosine]
        if kind == "chiral":
            columns.append((r * torch.linalg.cross(target, source)).sum(-1))
    return torch.stack(columns, -1)


def _turn(target: Tensor, source: Tensor) -> Tensor:
    return target.transpose(-1, -2) @ source


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _check_points(space: str, dim: int, pos: Tensor, edge_index: Tensor, edge_shift: Tensor | None) -> None:
    if pos.dim() != 2 or pos.size(1) != dim:
        raise ValueError(f"pos has shape {tuple(pos.shape)}, but space {space!r} needs (|V|, {dim})")
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise ValueError(f"edge_index has shape {tuple(edge_index.shape)}, but must be (2, |E|)")
    if edge_shift is not None and edge_shift.shape != (edge_index.size(1), dim):
        raise ValueError(
            f"edge_shift has shape {tuple(edge_shift.shape)}, but needs one row per edge, ({edge_index.size(1)}, {dim})"
        )
