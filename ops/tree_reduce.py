"""Reduction of ragged segments by any binary operation: a balanced tree for all segments at once, level by level."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.plan import csr_from_index

Op = Callable[[Tensor, Tensor], Tensor]
_CLASSES = 64  # 0: an empty segment; k: a tree of k - 1 levels


class Level(NamedTuple):
    """One call of the operation: which rows of the level below meet, and which move up alone.

    ``rows`` int64 holds the left operands, the right operands and the rows that move up. Of the results the first
    ``num_done`` are segments' last; the others, and behind them the rows that move up, are the rows of the next level.
    """

    rows: Tensor
    num_pairs: int
    num_kept: int
    num_done: int

    @property
    def left(self) -> Tensor:
        """Rows of the left operands."""
        return self.rows[: self.num_pairs]

    @property
    def right(self) -> Tensor:
        """Rows of the right operands."""
        return self.rows[self.num_pairs : 2 * self.num_pairs]

    @property
    def kept(self) -> Tensor:
        """Rows without a partner, at most one of each segment."""
        return self.rows[2 * self.num_pairs :]


class TreePlan:
    r"""The balanced trees of ragged segments: who meets whom in :func:`tree_reduce`.

    Neighbours merge pairwise, and an odd one out at the end of its segment moves up, until one is left. The tree of a
    segment depends on its length alone, and the plan on ``ptr`` alone: one plan serves all layers, epochs and passes
    that reduce the same segments. It holds about two numbers per row, and reads the device twice to be built.

    Args:
        ptr: int64 [S + 1]: segment i is the rows ``ptr[i]:ptr[i + 1]``.
        num_rows: E, where known; else the last entry of ``ptr`` is read.

    Attributes:
        ptr: as given.
        num_rows, num_segments, num_empty: E, S, and how many segments have no rows.
        num_merges: E less the number of segments with rows.
        num_levels: :math:`\lceil \log_2 n \rceil` of the longest segment.
        levels: a ``Level`` for each, the lowest first.
        singles: int64, the rows of the segments of one row.
        order: int64 [S], the segments' places among the results, empty ones first, then by level; None: as they are.

    Raises:
        IndexError: ``ptr`` does not rise from 0 to E.
        ValueError: a wrong shape or dtype.

    Example:
        >>> import torch
        >>> from geo.ops import TreePlan
        >>> plan = TreePlan(torch.tensor([0, 5, 5, 6]))
        >>> plan.num_merges, plan.num_levels
        (4, 3)
        >>> [(level.left.tolist(), level.right.tolist(), level.kept.tolist()) for level in plan.levels]
        [([0, 2], [1, 3], [4]), ([0], [1], [2]), ([0], [1], [])]
    """

    def __init__(self, ptr: Tensor, num_rows: int | None = None) -> None:
        _check_ptr("TreePlan", ptr)
        ptr = ptr.clone()  # the caller may write into theirs
        self.num_rows = max(int(ptr[-1]), 0) if num_rows is None else num_rows
        bounds.check_ptr("TreePlan", ptr, self.num_rows)
        self.ptr, self.num_segments = ptr, ptr.size(0) - 1
        length = ptr.diff()
        powers = torch.tensor([0, *(1 << k for k in range(_CLASSES - 2))], device=ptr.device)
        start, by_depth = csr_from_index(torch.searchsorted(powers, length), _CLASSES)
        edges = start.tolist()
        self.num_empty = edges[1]
        many = by_depth[edges[2] :]
        self.singles = ptr[by_depth[edges[1] : edges[2]]]
        done = [b - a for a, b in pairwise(edges[2:])]
        while done and done[-1] == 0:
            done.pop()
        self.num_levels = len(done)
        self.levels = _levels(ptr[many], length[many], done)
        self.num_merges = sum(level.num_pairs for level in self.levels)
        self.order: Tensor | None = None
        if sum(a < b for a, b in pairwise(edges)) > 1:
            self.order = torch.empty_like(by_depth).scatter_(0, by_depth, _arange(self.num_segments, ptr))

    def to(self, device: torch.device | str) -> TreePlan:
        """The same plan on another device."""
        plan = TreePlan.__new__(TreePlan)
        plan.__dict__.update(self.__dict__)
        plan.ptr, plan.singles = self.ptr.to(device), self.singles.to(device)
        plan.levels = [level._replace(rows=level.rows.to(device)) for level in self.levels]
        plan.order = None if self.order is None else self.order.to(device)
        return plan

    def __repr__(self) -> str:
        return (
            f"TreePlan(num_rows={self.num_rows}, num_segments={self.num_segments}, num_merges={self.num_merges}, "
            f"num_levels={self.num_levels})"
        )


def _levels(first: Tensor, length: Tensor, done: list[int]) -> list[Level]:
    """The levels of segments of two rows or more, sorted by depth; ``done[k]`` of them end with level k."""
    totals, left_over = [], length
    for num_done in done:
        totals += [(left_over >> 1).sum(), (left_over & 1).sum()]
        left_over = (left_over + 1 >> 1)[num_done:]
    sizes = iter(torch.stack(totals).tolist() if totals else [])
    last, levels = first + length - 1, []
    for num_done, num_pairs, num_kept in zip(done, sizes, sizes, strict=True):
        # A segment's rows stand one after the other, its last one perhaps elsewhere
        pairs, odd = length >> 1, length & 1
        segment, place = _spread(pairs, num_pairs)
        left = first[segment] + 2 * place
        right = torch.where(2 * place + 2 == length[segment], last[segment], left + 1)
        kept = last[_spread(odd, num_kept)[0]]
        levels.append(Level(torch.cat([left, right, kept]), num_pairs, num_kept, num_done))
        pairs, odd = pairs[num_done:], odd[num_done:]
        first, length = pairs.cumsum(0) - pairs, pairs + odd
        last = torch.where(odd > 0, num_pairs - num_done + odd.cumsum(0) - 1, first + pairs - 1)
    return levels


def _spread(count: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For ``count[i]`` items of each i: their i, and their number among those of i."""
    owner = torch.repeat_interleave(_arange(count.size(0), count), count, output_size=total)
    return owner, _arange(total, count) - (count.cumsum(0) - count)[owner]


def _arange(num: int, like: Tensor) -> Tensor:
    return torch.arange(num, device=like.device)


def tree_reduce(
    x: Tensor,
    ptr: Tensor,
    op: Op,
    plan: TreePlan | None = None,
    identity: Tensor | None = None,
    states: list[Tensor] | None = None,
) -> Tensor:
    r"""Reduce each segment of rows by a binary operation, along a balanced tree.

    A segment of n rows takes n - 1 merges in :math:`\lceil \log_2 n \rceil` levels, :math:`((x_0 x_1)(x_2 x_3)) x_4`
    for five, and each level of all segments is one call of ``op``. The order of the rows is kept, the left operand
    goes first, and nothing is padded: an associative ``op`` needs neither to commute nor to have an identity, and gives
    what :func:`fold` gives. For any other ``op`` the result is that of this tree, which depends on the segment alone.
    So NaN stays in its segment, where ``op`` treats its rows one by one.

    Differentiable as often as ``op``, with compositions of torch's own functions. Memory is proportional to the rows;
    where no gradient is asked for, a level's is given back after the next.

    Args:
        x: [E, \*F].
        ptr: int64 [S + 1]: segment i is the rows ``ptr[i]:ptr[i + 1]``.
        op: called as ``op(a, b)`` with two tensors [P, \*F], returns [P, \*F] of the same dtype. (Under autocast
            its result is converted to it.) Where it has a method ``merge``, that is called instead, as
            ``op.merge(rows, left, right)`` with int64 [P] indices of the operands in [R, \*F].
        plan: the :class:`TreePlan` of ``ptr``; built where it is not given.
        identity: [\*F], the result of an empty segment. (default: zeros)
        states: a list to which the results of each level are appended.

    Returns:
        [S, \*F].

    Raises:
        IndexError: ``ptr`` does not rise from 0 to E.
        ValueError: a shape, dtype or device that does not fit, a plan of another ``ptr``, or an ``op`` whose result has
            another shape or dtype than its operands.

    Example:
        >>> import torch
        >>> from geo.ops import tree_reduce
        >>> tree_reduce(torch.tensor([1.0, 5.0, 3.0, 2.0]), torch.tensor([0, 3, 3, 4]), torch.maximum).tolist()
        [5.0, 0.0, 2.0]
    """
    _check_input("tree_reduce", x, ptr)
    if plan is None:
        bounds.check_ptr("tree_reduce", ptr, x.size(0))
        plan = TreePlan(ptr, x.size(0))
    _check_plan(x, ptr, plan)
    done = [_identity("tree_reduce", x, identity).expand(plan.num_empty, *x.shape[1:])]
    done.append(x.index_select(0, plan.singles))
    rows = x
    for level in plan.levels:
        merged, kept = _climb(rows, op, level)
        if states is not None:
            states.append(merged)
        ended, rows = merged.split([level.num_done, level.num_pairs - level.num_done])
        done.append(ended)
        if level.num_kept:
            rows = torch.cat([rows, kept])
    out = torch.cat(done)
    return out if plan.order is None else out.index_select(0, plan.order)


def _climb(rows: Tensor, op: Op, level: Level) -> tuple[Tensor, Tensor]:
    """The results of a level, and the rows that move up."""
    merge = getattr(op, "merge", None)
    if merge is not None:
        merged, kept = merge(rows, level.left, level.right), rows.index_select(0, level.kept)
    else:
        sizes = [level.num_pairs, level.num_pairs, level.num_kept]
        left, right, kept = rows.index_select(0, level.rows).split(sizes)
        merged = op(left, right)
    return _result("tree_reduce", merged, rows, level.num_pairs), kept


def fold(x: Tensor, ptr: Tensor, op: Op, identity: Tensor | None = None) -> Tensor:
    r"""Reduce each segment of rows from left to right, :math:`((x_0 x_1) x_2) x_3` for four.

    The definition that :func:`tree_reduce` follows where ``op`` is associative. It takes as many calls of ``op``, one
    after the other, as the longest segment has rows, less one.

    Args:
        x: [E, \*F].
        ptr: int64 [S + 1]: segment i is the rows ``ptr[i]:ptr[i + 1]``.
        op: called as ``op(a, b)`` with two tensors [P, \*F], returns [P, \*F] of the same dtype.
        identity: [\*F], the result of an empty segment. (default: zeros)

    Returns:
        [S, \*F].

    Raises:
        IndexError: ``ptr`` does not rise from 0 to E.
        ValueError: as :func:`tree_reduce`.

    Example:
        >>> import torch
        >>> from geo.ops import fold
        >>> fold(torch.tensor([8.0, 2.0, 3.0, 2.0]), torch.tensor([0, 3, 3, 4]), torch.sub).tolist()
        [3.0, 0.0, 2.0]
    """
    _check_input("fold", x, ptr)
    bounds.check_ptr("fold", ptr, x.size(0))
    length, order = ptr.diff().sort(stable=True)
    num_of = torch.bincount(length.cpu(), minlength=1).tolist()  # segments of each length
    first = ptr[:-1][order[num_of[0] :]]
    done = [_identity("fold", x, identity).expand(num_of[0], *x.shape[1:])]
    state = x.index_select(0, first)
    for k, num in enumerate(num_of[1:], 1):
        done.append(state[:num])
        state, first = state[num:], first[num:]
        if first.size(0):
            state = _result("fold", op(state, x.index_select(0, first + k)), x, first.size(0))
    place = torch.empty_like(order).scatter_(0, order, _arange(order.size(0), order))
    return torch.cat(done).index_select(0, place)


# -- what does not fit -------------------------------------------------------------------------------------------------
def _check_ptr(name: str, ptr: Tensor) -> None:
    if ptr.dim() != 1 or ptr.size(0) < 1 or ptr.dtype != torch.int64:
        raise ValueError(f"{name}: ptr must be int64 [S + 1], got {ptr.dtype} {list(ptr.shape)}")


def _check_input(name: str, x: Tensor, ptr: Tensor) -> None:
    if x.dim() < 1:
        raise ValueError(f"{name}: x must have one row per element [E, *F], got a scalar")
    _check_ptr(name, ptr)
    if x.device != ptr.device:
        raise ValueError(f"{name}: x is on {x.device}, ptr on {ptr.device}: they must be on one device")


def _check_plan(x: Tensor, ptr: Tensor, plan: TreePlan) -> None:
    if plan.num_rows != x.size(0):
        raise ValueError(f"tree_reduce: x has {x.size(0)} rows, the plan was built for {plan.num_rows}")
    if plan.ptr.device != x.device:
        raise ValueError(
            f"tree_reduce: x is on {x.device}, the plan on {plan.ptr.device}: move it with plan.to(x.device)"
        )
    if ptr is plan.ptr or torch.compiler.is_compiling() or not bounds.reads_values(ptr):
        return
    if not torch.equal(ptr, plan.ptr):
        raise ValueError("tree_reduce: ptr differs from the one that the plan was built for: pass plan.ptr, or no plan")


def _identity(name: str, x: Tensor, identity: Tensor | None) -> Tensor:
    if identity is None:
        return x.new_zeros(x.shape[1:])
    fits = identity.shape == x.shape[1:] and identity.device == x.device
    if not fits or (identity.is_floating_point() and not x.is_floating_point()):
        raise ValueError(
            f"{name}: identity must have the shape, dtype and device of a row of x, {list(x.shape[1:])} {x.dtype} "
            f"{x.device}, got {list(identity.shape)} {identity.dtype} {identity.device}"
        )
    return identity.to(x.dtype)


def _result(name: str, out: Tensor, rows: Tensor, num: int) -> Tensor:
    shape = (num, *rows.shape[1:])
    if isinstance(out, Tensor) and out.shape == shape:
        if out.dtype == rows.dtype:
            return out
        if torch.is_autocast_enabled(rows.device.type):
            return out.to(rows.dtype)
    got = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else repr(out)
    raise ValueError(
        f"{name}: op must return a tensor of the shape and dtype of its operands, {rows.dtype} {list(shape)}, "
        f"got {got}; change width or dtype before or after the reduction"
    )
