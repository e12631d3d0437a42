r"""Graph random features: what random walks deposit on their way (Choromanski 2023; Reid et al. 2023, 2024).

A walk carries a load, 1 at first, that each step multiplies by the matrix entry it goes along over the probability that
it does so. The mean of the loads that walks from i have at j after l steps is then :math:`(U^l)_{ij}`, whatever the
proposal, the halting law and the coupling of the walks. Draws are :func:`geo.ops.random_walk`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from geo.ops.grf_paths import PathArgs, Step, all_nodes, check_rowptr, checked_graph, path_args, steps_of
from geo.ops.plan import csr_from_index
from geo.ops.random_walk import call
from geo.ops.registration import define
from geo.ops.segment import Order, spread
from geo.ops.walk_step import LONGEST, WalkLaw, checked_law, law_of


class WalkDeposits(NamedTuple):
    """What walks left: the row of start s has the entries ``ptr[s]``, .., ``ptr[s + 1] - 1``, by (col, length).

    Args:
        ptr: int64 [S + 1].
        col: int64 [P], the node.
        length: int32 [P], after how many steps it was reached.
        value: [P], the sum of the loads of all walks that were there then, over their number; dtype of the weights.
    """

    ptr: Tensor
    col: Tensor
    length: Tensor
    value: Tensor


def grf_walks(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
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
) -> WalkDeposits:
    r"""Unbiased estimates of the powers of a sparse matrix U, by random walks along its entries.

    From each start go m walks. Before each step a walk halts with probability p; else it takes an entry e of its
    node's row with probability :math:`q_e` and multiplies its load by :math:`U_e / (q_e (1 - p))`. The deposits of
    length l, as a matrix :math:`M_l` with a row for each start, have the mean :math:`E[M_l] = U^l`. A walk ends where
    no entry leads on. Loads use the probabilities that walks really have, multiples of :math:`2^{-32}`: the mean is
    exact.

    Couplings make walks from one start depend on each other, which lowers the variance and leaves the mean: with
    ``'antithetic'`` walk k + m/2 halts by the uniform number of walk k plus 1/2, modulo 1; with ``'repelling'`` walks
    at one node leave it along different entries, in blocks of as many walks as it has entries. Walks with different
    numbers are independent between calls. Equal bits on any number of threads and any device, in gradients, too.

    ``torch.compile`` takes this as one op, unless a gradient is to reach the weights: then the graph breaks here.

    Args:
        rowptr: int64 [N + 1], the first entry of each row of U.
        col: int64 [E], the column of each entry.
        weight: [E], the entries; of any sign. Gradients reach it (twice, if need be) through the loads of the walks
            that were drawn, not through the choice of walks. Values are summed in float32 at least, and may overflow
            where weights of 16 bits cannot hold them.
        start: int64 [S], the nodes to start from (default: all).
        num_walks: m, walks from each start.
        seed: an integer; its lower 64 bits are used.
        p_halt: the probability p, between 0 and 1; at least 1e-6 without ``max_length``.
        survival: in place of ``p_halt``: the probabilities [L + 1] to take at least 0, 1, .., L steps. The first is 1
            and they never rise; no walk goes on where one is 0, else the last ratio goes on.
        coupling: ``'iid'``, ``'antithetic'``, ``'repelling'`` or ``'antithetic+repelling'``.
        proposal: ``'uniform'``, all entries of a row alike, or ``'weight'``, in proportion to \|weight\|. Repelling
            walks then take points at equal distances along the running sum of the probabilities.
        choice: how an entry is drawn: ``'slot'`` by its position in the row; ``'rendezvous'`` by the least hash of its
            node's key, so that a change of the row changes the choice of those walks alone that take the new or the
            removed entry. Rendezvous costs the length of the row, and needs a uniform proposal, walks that do not repel
            and no repeated entries.
        node_key: int64 [N], what identifies each node to the random numbers, as a start (lower 32 bits) and as a
            neighbour; give the index inside the node's own graph to make the walks of a graph independent of its batch
            (default: the node itself).
        first_walk: the number of the first walk from each start; other numbers (below :math:`2^{32}`) give independent
            walks.
        max_length: cut walks after so many steps; what they left before has the same mean.

    Returns:
        The deposits, summed over walks in ascending order and sorted.

    Raises:
        IndexError: a start, or an entry of ``rowptr`` or ``col`` that a walk meets, is out of range, or ``rowptr`` does
            not go from 0 to E.
        ValueError: a wrong shape, dtype or probability, or options that do not go together.

    Example:
        >>> import torch
        >>> from geo.ops import grf_walks
        >>> rowptr, col, weight = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.tensor([0.5, 0.5])
        >>> ptr, col, length, value = grf_walks(rowptr, col, weight, num_walks=4, seed=0, max_length=1)
        >>> ptr.tolist(), col.tolist(), length.tolist(), value.tolist()  # halves of the walks go on: 2/4 * 0.5 / 0.5
        ([0, 2, 4], [0, 1, 0, 1], [0, 1, 1, 0], [1.0, 0.5, 0.5, 1.0])
    """
    start = all_nodes(rowptr) if start is None else start
    law = checked_law(num_walks, seed, p_halt, survival, coupling, choice, first_walk, max_length)
    units = checked_graph("grf_walks", rowptr, col, weight, start, node_key, proposal, law)
    args = path_args(rowptr, col, start, node_key, None, units, law, max_length)
    if weight.requires_grad and torch.is_grad_enabled():
        deposits: WalkDeposits = _along_paths(args, weight, law)
        return deposits
    compute = weight.detach() if weight.dtype in (torch.float32, torch.float64) else weight.detach().float()
    ptr, to, length, value = call("grf_walks", torch.ops.geo.grf_walks, (*args[:3], compute, node_key, *args[5:]))
    return WalkDeposits(ptr, to, length, value.to(weight.dtype))


@torch.compiler.disable(reason="geo.ops.grf_walks: how many steps there are, which gradients go along, is data")
def _along_paths(args: PathArgs, weight: Tensor, law: WalkLaw) -> WalkDeposits:
    """Differentiable with respect to the weights."""
    rowptr, _, start, _, _, units, *_ = args
    ptr, node, edge = call("grf_walks", torch.ops.geo.grf_paths, args)
    return deposits_of(steps_of_paths(ptr, node, edge), rowptr, weight, units, law, start.size(0), _taken)


def _taken(factor: Tensor, edge: Tensor) -> Tensor:
    """``factor[edge]``; its gradient is summed in a fixed order."""
    ptr, perm = csr_from_index(edge, factor.size(0))
    return spread(factor, Order(ptr, perm, edge), edge.size(0), "grf_walks")


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def grf_walks_reference(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
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
) -> WalkDeposits:
    """:func:`grf_walks` in vectorised PyTorch: the specification, with the same bits."""
    start = all_nodes(rowptr) if start is None else start
    law = checked_law(num_walks, seed, p_halt, survival, coupling, choice, first_walk, max_length)
    units = checked_graph("grf_walks", rowptr, col, weight, start, node_key, proposal, law)
    longest = LONGEST if max_length is None else max_length
    steps = steps_of(rowptr, col, start, node_key, None, units, law, longest, "grf_walks")
    return deposits_of(steps, rowptr, weight, units, law, start.size(0))


def steps_of_paths(ptr: Tensor, node: Tensor, edge: Tensor) -> list[Step]:
    """The steps of walks whose paths stand one after the other."""
    walker = torch.arange(len(ptr) - 1, device=ptr.device)
    count, position, kept = ptr.diff(), ptr[:-1], walker
    steps = [Step(walker, node[position], edge[position], kept)]
    while len(kept := (count > len(steps)).nonzero().flatten()):
        walker, count, position = walker[kept], count[kept], position[kept] + 1
        steps.append(Step(walker, node[position], edge[position], kept))
    return steps


def deposits_of(
    steps: list[Step],
    rowptr: Tensor,
    weight: Tensor,
    units: Tensor | None,
    law: WalkLaw,
    num_starts: int,
    take: Callable[[Tensor, Tensor], Tensor] = torch.Tensor.__getitem__,
) -> WalkDeposits:
    """The loads of all walks, sorted and summed. ``take(factor, edge)``: the factors of some edges."""
    check_rowptr("grf_walks", rowptr, weight.size(0))
    compute = weight if weight.dtype == torch.float64 else weight.float()
    factor = compute * over_probability(rowptr, units, compute)
    gain = compute.new_tensor(gains(law))
    load = compute.new_ones(len(steps[0].walker))
    loads = [load]
    counts = [len(step.walker) for step in steps]
    edges = torch.cat([step.edge[:0] if step is steps[0] else step.edge for step in steps])
    for taken, (step, along) in enumerate(zip(steps[1:], take(factor, edges).split(counts[1:]), strict=True)):
        load = load[step.kept] * along * gain[min(taken, len(gain) - 1)]
        loads.append(load)
    num_nodes = rowptr.size(0) - 1
    place = torch.cat([step.walker // law.num_walks * num_nodes + step.node for step in steps])
    lengths = torch.tensor(counts, device=place.device)
    length = torch.arange(len(steps), device=place.device).repeat_interleave(lengths)
    out = sum_loads(place, length, torch.cat(loads), num_starts, num_nodes, law.num_walks)
    return out._replace(value=out.value.to(weight.dtype))


def sum_loads(
    place: Tensor, length: Tensor, load: Tensor, num_starts: int, num_nodes: int, num_walks: int
) -> WalkDeposits:
    """Deposits from loads, which stand in order of length, then of walk; ``place`` is start times N plus node."""
    place, order = place.sort(stable=True)
    length = length[order]
    new = torch.ones_like(place, dtype=torch.bool)
    new[1:] = (place[1:] != place[:-1]) | (length[1:] != length[:-1])
    value = _sums(load[order], new) / num_walks
    place, length = place[new], length[new]
    ptr = torch.searchsorted(place, torch.arange(num_starts + 1, device=place.device) * num_nodes)
    return WalkDeposits(ptr, place % max(num_nodes, 1), length.int(), value)


def _sums(numbers: Tensor, new: Tensor) -> Tensor:
    """Sums of groups of numbers, of which each begins where ``new``: one after the other, as the kernels add them.

    The first numbers of all groups, then the second ones, and so on, the largest group first: no two numbers of one
    addition belong to one group, so neither sums nor gradients depend on any order but this.
    """
    if not len(numbers):
        return numbers
    first = new.nonzero().flatten()
    size = torch.cat([first, first.new_tensor([len(numbers)])]).diff()
    _, by_size = size.sort(descending=True, stable=True)
    place = torch.empty_like(by_size).index_copy(0, by_size, torch.arange(len(by_size), device=first.device))
    rank = torch.arange(len(numbers), device=first.device) - first.repeat_interleave(size)
    _, by_rank = (rank * len(first) + place.repeat_interleave(size)).sort()
    sums, *more = numbers[by_rank].split(torch.bincount(rank).tolist())
    done = []
    for number in more:
        sums, ended = sums.split([len(number), len(sums) - len(number)])
        done.append(ended)
        sums = sums + number
    return torch.cat([sums, *reversed(done)])[place]


def over_probability(rowptr: Tensor, units: Tensor | None, like: Tensor) -> Tensor:
    """One over the probability of each edge of a row."""
    if units is None:
        degree = rowptr.diff()
        return degree.to(like.dtype).repeat_interleave(degree, output_size=like.size(0))
    before = torch.cat([units.new_zeros(1), units[:-1]])
    before[rowptr[:-1][rowptr.diff() > 0]] = 0
    probability = (units - before).double()
    return torch.where(probability > 0, 2.0**32 / probability, 0.0).to(like.dtype)


def gains(law: WalkLaw) -> list[float]:
    """One over the probability to go on, for each step; never used where that is 0."""
    return [2.0**32 / (2**32 - below) if below < 2**32 else 0.0 for below in law.halt_below]


def _kernel(
    rowptr: Tensor,
    col: Tensor,
    start: Tensor,
    weight: Tensor,
    node_key: Tensor | None,
    units: Tensor | None,
    halt_below: Tensor,
    num_walks: int,
    seed: int,
    first_walk: int,
    max_length: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    law = law_of(halt_below, num_walks, seed, first_walk, flags)
    steps = steps_of(rowptr, col, start, node_key, None, units, law, max_length, "grf_walks")
    out = deposits_of(steps, rowptr, weight, units, law, start.size(0))
    return out.ptr, out.col, out.length, out.value


# -- shapes ------------------------------------------------------------------------------------------------------------
def _fake(
    rowptr: Tensor,
    col: Tensor,
    start: Tensor,
    weight: Tensor,
    node_key: Tensor | None,
    units: Tensor | None,
    halt_below: Tensor,
    num_walks: int,
    seed: int,
    first_walk: int,
    max_length: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(rowptr.dim() == 1 and col.dim() == 1 and start.dim() == 1)
    torch._check(weight.size(0) == col.size(0))
    total = torch.library.get_ctx().new_dynamic_size()
    length = start.new_empty(total, dtype=torch.int32)
    return start.new_empty(start.size(0) + 1), start.new_empty(total), length, weight.new_empty(total)


define(
    "grf_walks(Tensor rowptr, Tensor col, Tensor start, Tensor weight, Tensor? node_key, Tensor? units, "
    "Tensor halt_below, SymInt num_walks, SymInt seed, SymInt first_walk, SymInt max_length, SymInt flags) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)
