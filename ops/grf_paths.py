r"""The paths of walks that end by chance, as graph random features take them (see :mod:`geo.ops.walk_step`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.random_walk import call, targets_of
from geo.ops.registration import define
from geo.ops.walk_step import LONGEST, WalkLaw, checked_law, law_of, proposal_units, row_of_edge, walk_step


def grf_paths(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor | None = None,
    start: Tensor | None = None,
    *,
    num_walks: int,
    seed: int,
    p_halt: float = 0.5,
    survival: Sequence[float] | Tensor | None = None,
    coupling: str = "antithetic+repelling",
    proposal: str = "uniform",
    choice: str = "slot",
    node_key: Tensor | None = None,
    first_walk: int = 0,
    max_length: int | None = None,
    walk: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The paths of the walks of :func:`grf_walks`, one after the other.

    Args:
        rowptr: int64 [N + 1], the first edge of each node.
        col: int64 [E], where each edge leads.
        weight: floating [E]; needed with ``proposal='weight'`` alone.
        start: int64 [S], the nodes to start from (default: all).
        num_walks: m, walks from each start.
        seed: an integer; its lower 64 bits are used.
        p_halt: as in :func:`grf_walks`, like all that follow but the last.
        survival: see there.
        coupling: see there.
        proposal: see there.
        choice: see there.
        node_key: see there.
        first_walk: see there.
        max_length: see there.
        walk: int64 [S], numbers from 0 to ``num_walks`` - 1: only this walk from each start. Not for repelling walks,
            whose steps depend on each other.

    Returns:
        With T nodes in all paths: where each path starts, int64 [S * m + 1] (with ``walk`` [S + 1]); the nodes, int64
        [T], of which the first is the start; the positions in ``col`` of the edges that led there, int64 [T], -1 at the
        start.

    Raises:
        IndexError: a start, or an entry of ``rowptr`` or ``col`` that a walk meets, is out of range, or ``rowptr`` does
            not go from 0 to E.
        ValueError: a wrong shape, dtype or probability, or options that do not go together.

    Example:
        >>> import torch
        >>> from geo.ops import grf_paths
        >>> rowptr, col = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 0])  # a directed triangle
        >>> ptr, node, edge = grf_paths(rowptr, col, num_walks=2, seed=0, survival=[1, 1, 1, 0], coupling="iid")
        >>> node.view(3, 2, 3)[:, 0].tolist()
        [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    """
    start = all_nodes(rowptr) if start is None else start
    law = checked_law(num_walks, seed, p_halt, survival, coupling, choice, first_walk, max_length)
    units = checked_graph("grf_paths", rowptr, col, weight, start, node_key, proposal, law)
    if walk is not None:
        _check_walk(walk, start, law)
    ptr, node, edge = call(
        "grf_paths", torch.ops.geo.grf_paths, path_args(rowptr, col, start, node_key, walk, units, law, max_length)
    )
    return ptr, node, edge


# -- what the arguments must be (also used by grf_walks) ---------------------------------------------------------------
def all_nodes(rowptr: Tensor) -> Tensor:
    """The start nodes where none are given."""
    return torch.arange(max(rowptr.size(0) - 1, 0) if rowptr.dim() else 0, device=rowptr.device)


def checked_graph(
    op: str,
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor | None,
    start: Tensor,
    node_key: Tensor | None,
    proposal: str,
    law: WalkLaw,
) -> Tensor | None:
    """The proposal of each edge: None for equally likely edges of a node, else :func:`proposal_units`."""
    for name, index in (("rowptr", rowptr), ("col", col), ("start", start), ("node_key", node_key)):
        if index is not None and (index.dim() != 1 or index.dtype != torch.int64):
            raise ValueError(f"{name}: expected an int64 tensor with one axis, got {index.dtype} {list(index.shape)}")
    if rowptr.size(0) == 0:
        raise ValueError("rowptr: expected one entry more than nodes, got none")
    if node_key is not None and node_key.size(0) != rowptr.size(0) - 1:
        raise ValueError(f"node_key: expected {rowptr.size(0) - 1} entries, one a node, got {node_key.size(0)}")
    if weight is not None and (weight.shape != col.shape or not weight.is_floating_point()):
        raise ValueError(
            f"weight: expected floating numbers, one for each of {col.size(0)} edges, got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    if proposal not in ("uniform", "weight"):
        raise ValueError(f"proposal: expected 'uniform' or 'weight', got {proposal!r}")
    if proposal == "weight" and law.rendezvous:
        raise ValueError("proposal: choice='rendezvous' needs 'uniform', got 'weight'")
    if proposal == "weight" and weight is None:
        raise ValueError("weight: proposal='weight' needs it, got None")
    looks = not torch.compiler.is_compiling() and bounds.reads_values(col)
    if looks:
        for position, expected in ((0, 0), (-1, col.size(0))):
            if int(rowptr[position]) != expected:
                position %= rowptr.size(0)
                raise IndexError(bounds.out_of_range(op, "rowptr", position, int(rowptr[position]), expected, expected))
    if looks and (proposal == "weight" or law.rendezvous):
        _check_rows(op, rowptr, col)
        if law.rendezvous:
            _check_distinct(rowptr, col, node_key)
    if proposal == "uniform" or weight is None:
        return None
    if looks and not bool(weight.isfinite().all()):
        raise ValueError("weight: proposal='weight' needs finite numbers, got some that are not")
    return proposal_units(rowptr, weight.detach())


def check_rowptr(op: str, rowptr: Tensor, num_edges: int) -> None:
    """Raise IndexError unless ``rowptr`` rises from 0 to the number of edges."""
    try:
        bounds.check_ptr(op, rowptr, num_edges)
    except IndexError as err:
        raise IndexError(str(err).replace(" ptr[", " rowptr[")) from None


def _check_rows(op: str, rowptr: Tensor, col: Tensor) -> None:
    check_rowptr(op, rowptr, col.size(0))
    bounds.check_index(op, "col", col, rowptr.size(0) - 1)


def _check_distinct(rowptr: Tensor, col: Tensor, node_key: Tensor | None) -> None:
    """That no two edges of a node lead to nodes of one key."""
    num_nodes = rowptr.size(0) - 1
    rank = col if node_key is None else torch.unique(node_key, return_inverse=True)[1][col]
    pair = row_of_edge(rowptr, col.size(0)) * num_nodes + rank
    if bool((pair[1:] > pair[:-1]).all()):
        return
    pair, order = pair.sort(stable=True)
    again = pair[1:] == pair[:-1]
    if bool(again.any()):
        i = int(again.to(torch.uint8).argmax())
        a, b = int(order[i]), int(order[i + 1])
        what = "lead to one node" if int(col[a]) == int(col[b]) else "lead to two nodes with one node_key"
        raise ValueError(
            f"choice: 'rendezvous' needs different neighbours, but the edges {a} and {b} of node "
            f"{int(pair[i]) // num_nodes} {what}: merge repeated edges (coalesce), or take choice='slot'"
        )


def _check_walk(walk: Tensor, start: Tensor, law: WalkLaw) -> None:
    if law.repelling:
        raise ValueError(
            "walk: repelling walks depend on each other: take coupling='iid' or 'antithetic', or leave it out"
        )
    if walk.shape != start.shape or walk.dtype != torch.int64:
        raise ValueError(
            f"walk: expected int64 {list(start.shape)}, one for each start, got {walk.dtype} {list(walk.shape)}"
        )
    if not torch.compiler.is_compiling():
        bounds.check_index("grf_paths", "walk", walk, law.num_walks)


PathArgs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, int, int, int, int, int]


def path_args(
    rowptr: Tensor,
    col: Tensor,
    start: Tensor,
    node_key: Tensor | None,
    walk: Tensor | None,
    units: Tensor | None,
    law: WalkLaw,
    max_length: int | None,
) -> PathArgs:
    """The arguments of the op ``grf_paths``."""
    halt = torch.tensor(law.halt_below, device=rowptr.device)
    longest = LONGEST if max_length is None else max_length
    flags = law.antithetic | law.repelling << 1 | law.rendezvous << 2
    return rowptr, col, start, node_key, walk, units, halt, law.num_walks, law.seed, law.first_walk, longest, flags


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def grf_paths_reference(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor | None = None,
    start: Tensor | None = None,
    *,
    num_walks: int,
    seed: int,
    p_halt: float = 0.5,
    survival: Sequence[float] | Tensor | None = None,
    coupling: str = "antithetic+repelling",
    proposal: str = "uniform",
    choice: str = "slot",
    node_key: Tensor | None = None,
    first_walk: int = 0,
    max_length: int | None = None,
    walk: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`grf_paths` in vectorised PyTorch: the specification, with the same bits."""
    start = all_nodes(rowptr) if start is None else start
    law = checked_law(num_walks, seed, p_halt, survival, coupling, choice, first_walk, max_length)
    units = checked_graph("grf_paths", rowptr, col, weight, start, node_key, proposal, law)
    if walk is not None:
        _check_walk(walk, start, law)
    return _kernel(*path_args(rowptr, col, start, node_key, walk, units, law, max_length))


class Step(NamedTuple):
    """The walks that have reached some length."""

    walker: Tensor  # start * m + walk
    node: Tensor
    edge: Tensor  # that led there; -1 at the start
    kept: Tensor  # which of the walks of the step before they are


def steps_of(
    rowptr: Tensor,
    col: Tensor,
    start: Tensor,
    node_key: Tensor | None,
    walk: Tensor | None,
    units: Tensor | None,
    law: WalkLaw,
    max_length: int,
    op: str,
) -> list[Step]:
    """All walks together, one step after the other."""
    num_nodes, device = rowptr.size(0) - 1, start.device
    bounds.check_index(op, "start", start, num_nodes)
    per_start = law.num_walks if walk is None else 1
    walker = torch.arange(start.size(0) * per_start, device=device)
    number = law.first_walk + (walker % per_start if walk is None else walk)
    owner = walker // per_start
    node = start[owner]
    key = node if node_key is None else node_key[node]
    edge_key = None
    if law.rendezvous:
        edge_key = col if node_key is None else node_key[col]
    steps = [Step(walker, node, torch.full_like(node, -1), walker)]
    for step in range(max_length):
        edge = walk_step(
            law, rowptr, col.size(0), node, key, number, step, units=units, edge_key=edge_key, start=owner, op=op
        )
        kept = (edge >= 0).nonzero().flatten()
        if not len(kept):
            break
        walker, key, number, owner, edge = (t[kept] for t in (walker, key, number, owner, edge))
        node = targets_of(op, col, edge, num_nodes)
        steps.append(Step(walker, node, edge, kept))
    return steps


def _kernel(
    rowptr: Tensor,
    col: Tensor,
    start: Tensor,
    node_key: Tensor | None,
    walk: Tensor | None,
    units: Tensor | None,
    halt_below: Tensor,
    num_walks: int,
    seed: int,
    first_walk: int,
    max_length: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor]:
    law = law_of(halt_below, num_walks, seed, first_walk, flags)
    steps = steps_of(rowptr, col, start, node_key, walk, units, law, max_length, "grf_paths")
    walker = torch.cat([step.walker for step in steps])
    ptr = start.new_zeros(len(steps[0].walker) + 1)
    ptr[1:] = torch.bincount(walker, minlength=len(steps[0].walker)).cumsum(0)
    position = torch.cat([ptr[step.walker] + length for length, step in enumerate(steps)])
    node, edge = (
        torch.empty_like(walker).index_copy(0, position, torch.cat(parts))
        for parts in ([step.node for step in steps], [step.edge for step in steps])
    )
    return ptr, node, edge


# -- shapes ------------------------------------------------------------------------------------------------------------
def _fake(
    rowptr: Tensor,
    col: Tensor,
    start: Tensor,
    node_key: Tensor | None,
    walk: Tensor | None,
    units: Tensor | None,
    halt_below: Tensor,
    num_walks: int,
    seed: int,
    first_walk: int,
    max_length: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(rowptr.dim() == 1 and col.dim() == 1 and start.dim() == 1)
    total = torch.library.get_ctx().new_dynamic_size()
    walks = start.size(0) * (num_walks if walk is None else 1)
    return start.new_empty(walks + 1), start.new_empty(total), start.new_empty(total)


define(
    "grf_paths(Tensor rowptr, Tensor col, Tensor start, Tensor? node_key, Tensor? walk, Tensor? units, "
    "Tensor halt_below, SymInt num_walks, SymInt seed, SymInt first_walk, SymInt max_length, SymInt flags) "
    "-> (Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)
