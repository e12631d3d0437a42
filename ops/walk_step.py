r"""One step of walks that end by chance: the laws of halting, of coupling and of choice, in plain PyTorch.

Walks are those of :func:`geo.ops.random_walk`, with the same random numbers, plus couplings between the walks of one
start. These change how walks depend on each other, never the law of one: each halts with the probability asked for and
takes an edge out of its node with the probability that the proposal gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from geo.ops.random_walk import below, philox, rows_of, signed

COUPLINGS = ("iid", "antithetic", "repelling", "antithetic+repelling")
LONGEST = 2**31 - 1  # lengths are int32
Words = tuple[Tensor, Tensor, Tensor, Tensor]
_WORD = 0xFFFFFFFF
_HALF = 2**31
_ONE = 2**32  # probabilities are multiples of 2^-32
_NUMBERS = 2**32  # of walks: one word of the generator's counter
_LEAST_HALT = 1e-6  # of walks that nothing else ends: longer ones would fill the memory


class WalkLaw(NamedTuple):
    """What decides how walks go, beside the graph. They have the numbers ``first_walk`` + 0, .., ``num_walks`` - 1.

    ``halt_below[t]`` is the probability to halt before step t, in units of 2^-32; its last entry holds for later steps.
    """

    seed: int
    halt_below: tuple[int, ...]
    num_walks: int
    first_walk: int = 0
    antithetic: bool = False
    repelling: bool = False
    rendezvous: bool = False


def checked_law(
    num_walks: int,
    seed: int,
    p_halt: float = 0.5,
    survival: Sequence[float] | Tensor | None = None,
    coupling: str = "iid",
    choice: str = "slot",
    first_walk: int = 0,
    max_length: int | None = None,
) -> WalkLaw:
    """The law that the arguments of :func:`grf_walks` mean."""
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling: expected one of {', '.join(map(repr, COUPLINGS))}, got {coupling!r}")
    if choice not in ("slot", "rendezvous"):
        raise ValueError(f"choice: expected 'slot' or 'rendezvous', got {choice!r}")
    antithetic, repelling = "antithetic" in coupling, "repelling" in coupling
    if not torch.compiler.is_compiling():
        numbers = {"num_walks": num_walks, "seed": seed, "first_walk": first_walk, "max_length": max_length}
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, (Integral, torch.SymInt, type(None))):
                raise ValueError(f"{name}: expected an integer, got {number!r}")
    if num_walks < 1:
        raise ValueError(f"num_walks: expected at least 1, got {num_walks}")
    if antithetic and num_walks % 2:
        raise ValueError(
            f"num_walks: coupling={coupling!r} needs an even number, got {num_walks}: take one more, or "
            f"coupling={'repelling' if repelling else 'iid'!r}"
        )
    if first_walk < 0:
        raise ValueError(f"first_walk: expected a number of at least 0, got {first_walk}")
    if first_walk + num_walks > _NUMBERS:
        raise ValueError(
            f"first_walk: walks have numbers below 2^32, got {num_walks} from {first_walk} on: take another seed"
        )
    if max_length is not None and not 0 <= max_length <= LONGEST:
        raise ValueError(f"max_length: expected None or a number from 0 to {LONGEST}, got {max_length}")
    if choice == "rendezvous" and repelling:
        raise ValueError(f"choice: 'rendezvous' needs coupling='iid' or 'antithetic', got coupling={coupling!r}")
    halt = _halting(p_halt) if survival is None else _halting_by(survival, max_length)
    if max_length is None and halt[-1] < _LEAST_HALT * _ONE:
        name, what = ("p_halt", "this") if survival is None else ("survival", "the last ratio")
        raise ValueError(
            f"{name}: with {what} walks halt with probability {halt[-1] / _ONE:.2g} before a step and take "
            f"{_ONE / halt[-1]:.0e} steps: give max_length, or a probability of at least {_LEAST_HALT}"
        )
    return WalkLaw(signed(seed), halt, num_walks, first_walk, antithetic, repelling, choice == "rendezvous")


def _halting(p_halt: float) -> tuple[int, ...]:
    if not 0 < p_halt < 1:
        raise ValueError(f"p_halt: expected a probability between 0 and 1, both excluded, got {p_halt}")
    return (min(max(int(p_halt * _ONE), 1), _ONE - 1),)


def _halting_by(survival: Sequence[float] | Tensor, max_length: int | None) -> tuple[int, ...]:
    if isinstance(survival, Tensor) and survival.dim() != 1:
        raise ValueError(f"survival: expected one axis, got {list(survival.shape)}")
    values = [float(q) for q in (survival.tolist() if isinstance(survival, Tensor) else survival)]
    if len(values) < 2 or values[0] != 1:
        raise ValueError(f"survival: expected at least two probabilities, the first of which is 1, got {values}")
    halt: list[int] = []
    for before, after in pairwise(values):
        if not 0 <= after <= before:
            raise ValueError(f"survival: expected probabilities that never rise, got {before} and then {after}")
        if after == 0:
            return (*halt, _ONE)
        halt.append(min(int((1 - after / before) * _ONE), _ONE - 1))
    if values[-1] < values[-2]:
        halt[-1] = max(halt[-1], 1)
    elif max_length is None:
        raise ValueError(
            f"survival: the last two entries are equal, {values[-1]}, so walks would never end: end it with 0, or give "
            "max_length"
        )
    return tuple(halt)


def law_of(halt_below: Tensor, num_walks: int, seed: int, first_walk: int, flags: int) -> WalkLaw:
    """The law of an op's arguments."""
    halt = tuple(halt_below.tolist())
    return WalkLaw(seed, halt, num_walks, first_walk, bool(flags & 1), bool(flags & 2), bool(flags & 4))


def row_of_edge(rowptr: Tensor, num_edges: int) -> Tensor:
    """The row of each edge."""
    nodes = torch.arange(rowptr.size(0) - 1, device=rowptr.device)
    return nodes.repeat_interleave(rowptr.diff(), output_size=num_edges)


def proposal_units(rowptr: Tensor, weight: Tensor) -> Tensor:
    """Running sums, in each row, of probabilities in proportion to the size of the weights, in units of 2^-32.

    Each edge whose weight is not 0 has at least one unit, and those of a row are 2^32 (0 where all weights are 0). Sums
    are of integers, so a row has the same units whatever other rows there are.
    """
    row = row_of_edge(rowptr, weight.size(0))
    num_rows = rowptr.size(0) - 1
    size = weight.abs().double()
    largest = size.new_zeros(num_rows).scatter_reduce(0, row, size, "amax")[row]
    present = size > 0
    share = torch.where(present, (size / largest * 2.0**30).ceil(), 0.0).long()

    def running(count: Tensor) -> tuple[Tensor, Tensor]:
        """Sums up to each edge, and of all its row."""
        until = torch.cat([count.new_zeros(1), count.cumsum(0)])
        first = until[rowptr]
        return until[1:] - first[row], first.diff()[row]

    (below_, total), (rank, count) = running(share), running(present.long())
    spread = below_.double() / total.double() * (_ONE - count).double()
    return torch.where(count > 0, spread.nan_to_num().floor().long() + rank, 0)


def walk_step(
    law: WalkLaw,
    rowptr: Tensor,
    num_edges: int,
    node: Tensor,
    key: Tensor,
    walk: Tensor,
    step: int,
    *,
    units: Tensor | None = None,
    edge_key: Tensor | None = None,
    start: Tensor | None = None,
    op: str = "walk_step",
) -> Tensor:
    """The edge that each of W walks takes next, or -1 where it ends: the one place where the laws are written down.

    Args:
        law: of all walks.
        rowptr: int64 [N + 1].
        num_edges: E.
        node: int64 [W], a row of ``rowptr`` each: where the walks are, before step ``step``.
        key: int64 [W], the keys of the nodes that the walks started from.
        walk: int64 [W], their numbers, from ``law.first_walk`` on.
        step: the steps taken so far.
        units: int64 [E], :func:`proposal_units` (default: all edges of a row are equally likely).
        edge_key: int64 [E], the key of the node that each edge leads to; for rendezvous choice.
        start: int64 [W], which start each walk belongs to; for repelling walks, which must stand in ascending order of
            start and number.
        op: what to name in an error.

    Returns:
        int64 [W], positions among the edges.
    """
    words = philox(law.seed, key, walk, torch.full_like(key, step), torch.zeros_like(key))
    halt = words[2]
    if law.antithetic:  # the second half halts by the words of the first, turned by half a turn
        half = law.num_walks // 2
        second = (walk - law.first_walk >= half).nonzero().flatten()
        zeros = torch.zeros_like(second)
        halt = halt.index_copy(
            0, second, philox(law.seed, key[second], walk[second] - half, zeros + step, zeros)[2] + _HALF & _WORD
        )
    begin, degree = rows_of(op, rowptr, num_edges, node)
    goes = (halt >= law.halt_below[min(step, len(law.halt_below) - 1)]) & (degree > 0)
    if units is not None and num_edges:
        goes &= units[(begin + degree - 1).clamp(min=0)] > 0
    moving = goes.nonzero().flatten()
    begin, degree, node = begin[moving], degree[moving], node[moving]
    words = _at(words, moving)
    group = None
    if law.repelling and start is not None:
        group = _groups(start[moving], node, rowptr.size(0) - 1)
    if units is not None:
        taken = _by_units(units, begin, degree, words[0] if group is None else _systematic(words[0], group))
    elif law.rendezvous and edge_key is not None:
        taken = _rendezvous(edge_key, words, begin, degree)
    elif group is not None:
        taken = begin + _distinct(words, degree, group)
    else:
        taken = begin + below(words, degree)
    return torch.full_like(goes, -1, dtype=torch.int64).index_copy(0, moving, taken)


def _at(words: Words, index: Tensor) -> Words:
    a, b, c, d = (word[index] for word in words)
    return a, b, c, d


class _Groups(NamedTuple):
    """Walks of one start that stand at one node. ``order`` has the groups one after the other."""

    order: Tensor
    first: Tensor  # of each walk in this order: where its group begins
    rank: Tensor  # and its place in the group
    size: Tensor  # and of how many walks the group is


def _groups(start: Tensor, node: Tensor, num_nodes: int) -> _Groups:
    key, order = (start * num_nodes + node).sort(stable=True)
    _, count = torch.unique_consecutive(key, return_counts=True)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    return _Groups(order, first, torch.arange(len(key), device=key.device) - first, count.repeat_interleave(count))


def _systematic(words: Tensor, group: _Groups) -> Tensor:
    """Points of [0, 2^32) at equal distances, one for each walk of a group; the first walk's word turns them."""
    turned = words[group.order[group.first]] + (group.rank << 32) // group.size & _WORD
    return torch.empty_like(words).index_copy(0, group.order, turned)


def _by_units(units: Tensor, begin: Tensor, degree: Tensor, point: Tensor) -> Tensor:
    """The edge of each row whose units hold the point in [0, 2^32): the first with more units up to it."""
    low, high = begin, begin + degree - 1
    while bool((low < high).any()):
        middle = (low + high) >> 1
        above = units[middle] > point
        low, high = torch.where(above, low, torch.minimum(middle + 1, high)), torch.where(above, middle, high)
    return low


def _distinct(words: Words, degree: Tensor, group: _Groups) -> Tensor:
    """Slots without repetition within blocks of ``degree`` walks of a group.

    The walks of a block take the entries of a random permutation of the slots in turn: walk j swaps the entries j and
    t_j, a random one of those from j on (Fisher and Yates), and takes what then stands at j. Entries that no walk has
    touched hold their own position, so what stands at t_j is found by following the swaps back: the last walk i < j
    with t_i = t_j put there what stood at i before, and so on.
    """
    order = group.order
    words, degree = _at(words, order), degree[order]
    place = group.rank % degree
    target = place + below(words, degree - place)
    block = torch.arange(len(order), device=order.device) - place
    width = int(degree.max()) if len(degree) else 0
    key, by_key = (block * width + target).sort(stable=True)
    same = torch.full_like(key, -1)  # of each walk: the last one before it with the same target
    again = (key[1:] == key[:-1]).nonzero().flatten()
    same[by_key[again + 1]] = by_key[again]
    last = (torch.searchsorted(key, block * width + place, right=True) - 1).clamp(min=0)
    at_place = torch.where(key[last] == block * width + place, by_key[last], -1)
    before = torch.where(target == place, same, at_place)  # the last one whose target was this walk's place
    slot, follow = target, same
    while bool((follow >= 0).any()):
        slot = torch.where(follow >= 0, place[follow.clamp(min=0)], slot)
        follow = torch.where(follow >= 0, before[follow.clamp(min=0)], -1)
    return torch.empty_like(slot).index_copy(0, order, slot)


def _rendezvous(edge_key: Tensor, words: Words, begin: Tensor, degree: Tensor) -> Tensor:
    """The edge whose neighbour has the least hash, and among equal ones the least key."""
    owner = torch.arange(len(begin), device=begin.device).repeat_interleave(degree)
    edge = torch.arange(len(owner), device=begin.device) + (begin - (degree.cumsum(0) - degree))[owner]
    number = _hash((words[0] << 32 | words[1])[owner], edge_key[edge])
    for following in (edge_key, None):
        least = torch.full_like(begin, 2**63 - 1).scatter_reduce(0, owner, number, "amin")
        left = least[owner] == number
        owner, edge = owner[left], edge[left]
        number = edge if following is None else following[edge]
    return torch.full_like(begin, 2**63 - 1).scatter_reduce(0, owner, number, "amin")


def _hash(bits: Tensor, key: Tensor) -> Tensor:
    """64 bits, as a signed number, of 64 random ones and a key: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = bits + key * _wrapped(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _wrapped(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _wrapped(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _shifted(x: Tensor, count: int) -> Tensor:
    """The bits of x moved down, with zeros behind them."""
    return x >> count & (1 << 64 - count) - 1
