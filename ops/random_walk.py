r"""Random walks whose every draw is a pure function of (seed, node, walk, step).

The generator is Philox4x32-10 (Salmon et al. 2011) with the seed as its key and the counter (node key, walk, step,
kind). A walk therefore depends neither on threads, nor on the device, nor on what other walks are asked for with it:
the compiled kernels and this file draw the same bits.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.registration import define

_WORD = 0xFFFFFFFF
_REDRAWS = 8  # kRedraws in csrc/random_walk.h


def random_walk(
    rowptr: Tensor,
    col: Tensor,
    start: Tensor,
    walk_length: int,
    num_walks: int = 1,
    *,
    seed: int,
    non_backtracking: bool = False,
    p_halt: float = 0.0,
    node_key: Tensor | None = None,
    first_walk: int = 0,
    return_edges: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Random walks along the edges of a graph in CSR form, ``num_walks`` from each start.

    A step takes one of the edges ``rowptr[v] .. rowptr[v + 1] - 1`` out of the present node :math:`v`, each with the
    same probability (several edges to one node count as several; probabilities differ by at most :math:`2^{-64}`). A
    walk stays where no edge leads on. The random numbers of a step are those of Philox4x32-10 with key ``seed`` and
    counter (``node_key``, ``first_walk`` + walk, step, kind), so a walk does not depend on the number of threads, the
    device, the other starts, or ``walk_length``: a longer walk begins with the shorter one. Not differentiable.

    Args:
        rowptr: int64 [N + 1], the first edge of each node.
        col: int64 [E], where each edge leads.
        start: int64 [S], the nodes to start from.
        walk_length: steps of each walk.
        num_walks: walks from each start.
        seed: an integer; its lower 64 bits are used.
        non_backtracking: never take an edge that leads back to the node the walk has just come from, unless all edges
            do (CRaWl's law). The remaining edges have equal probabilities.
        p_halt: the probability that a walk ends before each step, rounded down to a multiple of :math:`2^{-32}`; the
            number of steps is then geometric, cut at ``walk_length``.
        node_key: int64 [S], what identifies each start to the random numbers (lower 32 bits); give the index inside the
            node's own graph to make the walks of a graph independent of its batch (default: ``start``).
        first_walk: the number of the first walk from each start; other numbers (below :math:`2^{32}`) give independent
            walks.
        return_edges: also return the edges taken.

    Returns:
        Nodes, int64 [S, ``num_walks``, ``walk_length`` + 1], of which the first is the start; -1 after a walk has
        ended. With ``return_edges`` also the positions in ``col`` of the edges taken, int64
        [S, ``num_walks``, ``walk_length``], -1 where none was.

    Raises:
        IndexError: a start, or an entry of ``rowptr`` or ``col`` that a walk meets, is out of range.
        ValueError: a wrong shape, dtype, length or probability.

    Example:
        >>> import torch
        >>> from geo.ops import random_walk
        >>> rowptr, col = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 0])  # a directed triangle
        >>> random_walk(rowptr, col, torch.tensor([1]), walk_length=4, seed=0).tolist()
        [[[1, 2, 0, 1, 2]]]
    """
    args = _checked(rowptr, col, start, walk_length, num_walks, seed, non_backtracking, p_halt, node_key, first_walk)
    nodes, edges = call("random_walk", torch.ops.geo.random_walk, (*args, return_edges))
    return (nodes, edges) if return_edges else nodes


def call(name: str, op: Any, args: tuple[Any, ...]) -> Any:
    """``op(*args)``, whose first arguments are rowptr, col and start, whose names an IndexError has."""
    rowptr, col, start = args[:3]
    num_nodes = rowptr.size(0) - 1
    checks = (("src_index", start, num_nodes - 1), ("dst_index", col, num_nodes - 1), ("ptr", rowptr, col.size(0)))
    try:
        return bounds.call(name, op, args, checks)
    except IndexError as err:  # the CUDA kernel's flag has other names
        text = str(err)
        for flag, argument in (("src_index", "start"), ("dst_index", "col"), ("ptr", "rowptr")):
            text = re.sub(rf" {flag}\[", f" {argument}[", text)
        raise IndexError(text) from None


def _checked(
    rowptr: Tensor,
    col: Tensor,
    start: Tensor,
    walk_length: int,
    num_walks: int,
    seed: int,
    non_backtracking: bool,
    p_halt: float,
    node_key: Tensor | None,
    first_walk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int, int, int, int, bool, float]:
    """The arguments of the op, from those of :func:`random_walk`."""
    for name, index in (("rowptr", rowptr), ("col", col), ("start", start), ("node_key", node_key)):
        if index is not None and (index.dim() != 1 or index.dtype != torch.int64):
            raise ValueError(f"{name}: expected an int64 tensor with one axis, got {index.dtype} {list(index.shape)}")
    if rowptr.size(0) == 0:
        raise ValueError("rowptr: expected one entry more than nodes, got none")
    if node_key is not None and node_key.size(0) != start.size(0):
        raise ValueError(f"node_key: expected {start.size(0)} entries, one for each start, got {node_key.size(0)}")
    for name, count in (("walk_length", walk_length), ("num_walks", num_walks), ("first_walk", first_walk)):
        if count < 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {count}")
    if first_walk + num_walks > 2**32:  # a word of the counter
        raise ValueError(
            f"first_walk: walks have numbers below 2^32, got {num_walks} from {first_walk} on: take another seed"
        )
    if not 0 <= p_halt <= 1:
        raise ValueError(f"p_halt: expected a probability in [0, 1], got {p_halt}")
    return rowptr, col, start, node_key, walk_length, num_walks, signed(seed), first_walk, non_backtracking, p_halt


def signed(seed: int) -> int:
    """The lower 64 bits of a seed, as the int64 that an op takes."""
    return (seed + 2**63) % 2**64 - 2**63


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def random_walk_reference(
    rowptr: Tensor,
    col: Tensor,
    start: Tensor,
    walk_length: int,
    num_walks: int = 1,
    *,
    seed: int,
    non_backtracking: bool = False,
    p_halt: float = 0.0,
    node_key: Tensor | None = None,
    first_walk: int = 0,
    return_edges: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`random_walk` in vectorised PyTorch: the specification, with the same bits."""
    args = _checked(rowptr, col, start, walk_length, num_walks, seed, non_backtracking, p_halt, node_key, first_walk)
    nodes, edges = _kernel(*args, return_edges)
    return (nodes, edges) if return_edges else nodes


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of 32 bits for a key of 64 bits and a counter of four words, held in int64."""
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    c0, c1, c2, c3 = c0 & _WORD, c1 & _WORD, c2 & _WORD, c3 & _WORD
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of two words, by halves of 16 bits that int64 has room for."""
    low = (factor & 0xFFFF) * word
    high = (factor >> 16) * word + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def below(words: tuple[Tensor, ...], n: Tensor) -> Tensor:
    """A number below each n < 2^31: n times 64 random bits, less the lower 64 bits of the product."""
    return words[0] * n + (words[1] * n >> 32) >> 32


def _kernel(
    rowptr: Tensor,
    col: Tensor,
    start: Tensor,
    node_key: Tensor | None,
    walk_length: int,
    num_walks: int,
    seed: int,
    first_walk: int,
    non_backtracking: bool,
    p_halt: float,
    return_edges: bool,
) -> tuple[Tensor, Tensor]:
    num_nodes = rowptr.size(0) - 1
    bounds.check_index("random_walk", "start", start, num_nodes)
    at = start.repeat_interleave(num_walks)  # -1 where a walk has ended
    key = at if node_key is None else node_key.repeat_interleave(num_walks)
    walk = first_walk + torch.arange(num_walks, device=start.device).repeat(start.size(0))
    before = torch.full_like(at, -1)
    halt_below = int(p_halt * 2**32)
    nodes, edges = [at], []
    for step in range(walk_length):
        counter = (key, walk, torch.full_like(key, step))
        words = philox(seed, *counter, torch.zeros_like(key))
        if halt_below:
            at = torch.where(words[2] < halt_below, -1, at)
        begin, degree = rows_of("random_walk", rowptr, col.size(0), at)
        moving = degree.nonzero().flatten()
        edge = torch.full_like(at, -1)
        taken = (begin + below(words, degree))[moving]
        if non_backtracking:
            walker = tuple(t[moving] for t in (*counter, begin, degree, before))
            taken = _redraw(col, seed, taken, *walker)
        target = targets_of("random_walk", col, taken, num_nodes)
        edge[moving] = taken
        before = torch.where(edge < 0, before, at)
        at = at.index_copy(0, moving, target)
        nodes.append(at)
        edges.append(edge)
    shape = (start.size(0), num_walks)
    out = torch.stack(nodes, dim=-1).view(*shape, walk_length + 1)
    if not return_edges:
        return out, start.new_empty(0)
    return out, torch.stack(edges, dim=-1).view(*shape, walk_length) if edges else start.new_empty((*shape, 0))


def rows_of(op: str, rowptr: Tensor, num_edges: int, node: Tensor) -> tuple[Tensor, Tensor]:
    """The first edge and the number of edges of each node; none for node -1."""
    present = node >= 0
    inside = node.clamp(min=0)
    begin, end = (torch.where(present, rowptr[inside + k], 0) if len(node) else node for k in (0, 1))
    bad = (begin < 0) | (begin > end) | (end > num_edges)
    if bool(bad.any()):
        outside = (begin < 0) | (begin > num_edges)
        position = int(torch.where(outside, inside, inside + 1)[bad].min())
        low = int(rowptr[position - 1]) if position else 0
        raise IndexError(bounds.out_of_range(op, "rowptr", position, int(rowptr[position]), low, num_edges))
    return begin, end - begin


def targets_of(op: str, col: Tensor, edge: Tensor, num_nodes: int) -> Tensor:
    """Where each edge leads."""
    target = col[edge]
    bad = (target < 0) | (target >= num_nodes)
    if bool(bad.any()):
        position = int(edge[bad].min())
        raise IndexError(bounds.out_of_range(op, "col", position, int(col[position]), 0, num_nodes - 1))
    return target


def _redraw(
    col: Tensor,
    seed: int,
    edge: Tensor,
    key: Tensor,
    walk: Tensor,
    step: Tensor,
    begin: Tensor,
    degree: Tensor,
    before: Tensor,
) -> Tensor:
    """The edges taken where those that lead back to ``before`` are drawn anew, while others exist."""
    edge = edge.clone()
    again = ((col[edge] == before) & (degree > 1)).nonzero().flatten()
    for kind in range(1, _REDRAWS):
        words = philox(seed, key[again], walk[again], step[again], torch.full_like(again, kind))
        edge[again] = begin[again] + below(words, degree[again])
        again = again[col[edge[again]] == before[again]]
    # What is left stands in short rows, or in rows of many edges to one node: count the edges that lead elsewhere.
    words = philox(seed, key[again], walk[again], step[again], torch.full_like(again, _REDRAWS))
    length = degree[again]
    owner = torch.repeat_interleave(torch.arange(len(again), device=again.device), length)
    place = torch.arange(len(owner), device=again.device) - (length.cumsum(0) - length)[owner] + begin[again][owner]
    elsewhere = col[place] != before[again][owner]
    others = torch.zeros_like(again).index_add(0, owner, elsewhere.long())
    rank = elsewhere.long().cumsum(0) - 1 - (others.cumsum(0) - others)[owner]
    chosen = elsewhere & (rank == below(words, others)[owner])
    edge[again[owner[chosen]]] = place[chosen]
    return edge


# -- shapes ------------------------------------------------------------------------------------------------------------
def _fake(
    rowptr: Tensor,
    col: Tensor,
    start: Tensor,
    node_key: Tensor | None,
    walk_length: int,
    num_walks: int,
    seed: int,
    first_walk: int,
    non_backtracking: bool,
    p_halt: float,
    return_edges: bool,
) -> tuple[Tensor, Tensor]:
    torch._check(rowptr.dim() == 1 and col.dim() == 1 and start.dim() == 1)
    shape = (start.size(0), num_walks)
    edges = start.new_empty((*shape, walk_length) if return_edges else (0,))
    return start.new_empty((*shape, walk_length + 1)), edges


define(
    "random_walk(Tensor rowptr, Tensor col, Tensor start, Tensor? node_key, SymInt walk_length, SymInt num_walks, "
    "SymInt seed, SymInt first_walk, bool non_backtracking, float p_halt, bool return_edges) -> (Tensor, Tensor)",
    _kernel,
    _fake,
)
