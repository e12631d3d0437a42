"""Sparse random features of nodes, and the matrices that the walks behind them run on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geo.ops import SegmentPlan, WalkDeposits, csr_from_index, gather_mul_segment_sum, segment_sum_csr
from geo.ops.bounds import check_index
from geo.ops.plan import index_from_csr


class SparseFeatures:
    r"""A sparse matrix :math:`\Phi` in CSR form, one row for each node, differentiable in its entries.

    Args:
        ptr: int64 [``num_rows`` + 1], the first entry of each row.
        col: int64 [P], the column of each entry, ascending inside a row, none twice.
        value: [P], the entries.
        num_cols: Number of columns.

    Attributes:
        ptr, col, value, num_rows, num_cols: As given.

    Raises:
        ValueError: A wrong shape or dtype.

    Example:
        >>> phi = SparseFeatures(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]), torch.tensor([1.0, 2.0, 3.0]), 3)
        >>> phi.matmul(torch.tensor([1.0, 1.0, 10.0])).tolist(), phi.t_matmul(torch.tensor([1.0, 1.0])).tolist()
        ([21.0, 3.0], [1.0, 3.0, 2.0])
    """

    def __init__(self, ptr: Tensor, col: Tensor, value: Tensor, num_cols: int) -> None:
        for name, index in (("ptr", ptr), ("col", col)):
            if index.dim() != 1 or index.dtype != torch.int64:
                raise ValueError(
                    f"{name}: expected an int64 tensor with one axis, got {index.dtype} {list(index.shape)}"
                )
        if ptr.size(0) == 0:
            raise ValueError("ptr: expected one entry more than rows, got none")
        if value.shape != col.shape or not value.is_floating_point():
            raise ValueError(
                f"value: expected {list(col.shape)} floating numbers, got {value.dtype} {list(value.shape)}"
            )
        self.ptr, self.col, self.value, self.num_cols = ptr, col, value, num_cols
        self.num_rows = ptr.size(0) - 1
        self._order = _Order(ptr, col, num_cols)
        self._t_value: Tensor | None = None  # the entries by column, without gradients

    @property
    def shape(self) -> tuple[int, int]:
        """(``num_rows``, ``num_cols``)."""
        return self.num_rows, self.num_cols

    @property
    def row(self) -> Tensor:
        """int64 [P], the row of each entry."""
        return self._order.row

    def with_value(self, value: Tensor) -> SparseFeatures:
        """The matrix with other entries in the same places; the orders that products need are shared."""
        if value.shape != self.col.shape:
            raise ValueError(f"value: expected shape {list(self.col.shape)}, got {list(value.shape)}")
        out = SparseFeatures.__new__(SparseFeatures)
        out.ptr, out.col, out.value, out.num_cols, out.num_rows = (
            self.ptr,
            self.col,
            value,
            self.num_cols,
            self.num_rows,
        )
        out._order, out._t_value = self._order, None
        return out

    def matmul(self, other: Tensor) -> Tensor:
        r"""The product :math:`\Phi V`.

        Args:
            other: V, [``num_cols``, \*S].

        Returns:
            [``num_rows``, \*S], in the common dtype of the two; differentiable in both, any number of times.

        Raises:
            ValueError: V has another number of rows.
        """
        return self._product(other, self.num_cols, False, "matmul")

    def t_matmul(self, other: Tensor) -> Tensor:
        r"""The product :math:`\Phi^\top V`.

        Args:
            other: V, [``num_rows``, \*S].

        Returns:
            [``num_cols``, \*S], in the common dtype of the two; differentiable in both, any number of times.

        Raises:
            ValueError: V has another number of rows.
        """
        return self._product(other, self.num_rows, True, "t_matmul")

    def _product(self, other: Tensor, rows: int, transposed: bool, name: str) -> Tensor:
        if other.dim() < 1 or other.size(0) != rows:
            raise ValueError(f"{name}: expected {rows} rows for features {list(self.shape)}, got {list(other.shape)}")
        flat = other.reshape(rows, math.prod(other.shape[1:]))
        if torch.is_grad_enabled() and (other.requires_grad or self.value.requires_grad):
            plan = self._order.transposed if transposed else self._order.forward
            out = gather_mul_segment_sum(flat, self.value.unsqueeze(1), plan=plan)
        elif transposed:  # values in the order of columns, kept: looking them up costs more than the product
            if self._t_value is None:
                self._t_value = self.value.detach()[self._order.t_perm].unsqueeze(1)
            out = gather_mul_segment_sum(flat, self._t_value, self._order.t_col, self._order.t_ptr)
        else:
            out = gather_mul_segment_sum(flat, self.value.unsqueeze(1), self.col, self.ptr)
        return out.view(out.size(0), *other.shape[1:])

    def select_rows(self, index: Tensor) -> SparseFeatures:
        """The matrix of the rows ``index``, int64 [R], in that order; a row may stand several times."""
        length = (self.ptr[1:] - self.ptr[:-1])[index]
        ptr = torch.cat([length.new_zeros(1), length.cumsum(0)])
        owner = torch.repeat_interleave(torch.arange(len(index), device=index.device), length)
        entry = torch.arange(len(owner), device=index.device) + (self.ptr[:-1][index] - ptr[:-1])[owner]
        return SparseFeatures(ptr, self.col[entry], self.value[entry], self.num_cols)

    def to_dense(self) -> Tensor:
        """[``num_rows``, ``num_cols``]; differentiable in the entries."""
        zeros = self.value.new_zeros(self.num_rows * self.num_cols)
        return zeros.scatter(0, self.row * self.num_cols + self.col, self.value).view(self.shape)

    def to_sparse_csr(self) -> Tensor:
        """The matrix as PyTorch's sparse CSR tensor, without gradients."""
        return torch.sparse_csr_tensor(self.ptr, self.col, self.value.detach(), self.shape, check_invariants=True)

    def __repr__(self) -> str:
        return f"SparseFeatures(num_rows={self.num_rows}, num_cols={self.num_cols}, entries={self.col.size(0)})"


class _Order:
    """The orders in which products read the entries; built at first use, shared by matrices of one pattern."""

    def __init__(self, ptr: Tensor, col: Tensor, num_cols: int) -> None:
        self.ptr, self.col, self.num_cols = ptr, col, num_cols
        self._row: Tensor | None = None
        self._by_column: tuple[Tensor, Tensor, Tensor] | None = None
        self._plans: tuple[SegmentPlan, SegmentPlan] | None = None

    @property
    def row(self) -> Tensor:
        if self._row is None:
            self._row = index_from_csr(self.ptr, None, self.col.size(0))
        return self._row

    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._by_column is None:
            t_ptr, t_perm = csr_from_index(self.col, self.num_cols, "col")
            self._by_column = t_ptr, t_perm, self.row[t_perm]
        return self._by_column

    @property
    def t_ptr(self) -> Tensor:
        return self._columns()[0]

    @property
    def t_perm(self) -> Tensor:
        return self._columns()[1]

    @property
    def t_col(self) -> Tensor:
        return self._columns()[2]

    @property
    def forward(self) -> SegmentPlan:
        return self._both()[0]

    @property
    def transposed(self) -> SegmentPlan:
        return self._both()[1]

    def _both(self) -> tuple[SegmentPlan, SegmentPlan]:
        if self._plans is None:
            num_rows = self.ptr.size(0) - 1
            self._plans = (
                SegmentPlan(self.row, num_rows, self.col, self.num_cols),
                SegmentPlan(self.col, self.num_cols, self.row, num_rows),
            )
        return self._plans


class FeatureMap:
    r"""What turns a modulation into features: the pattern of :math:`\Phi = \sum_l f_l M_l` and the entries of each M.

    Deposits that share a row and a column, but not a length, become one entry. The pattern is found once; each call
    then costs one pass over the deposits.

    Args:
        deposits: What :func:`geo.ops.grf_walks` returns.
        num_nodes: Number of columns.
        num_lengths: Lengths kept, from 0 on; deposits of walks as long or longer drop out (see :func:`tail_mass`).

    Raises:
        ValueError: ``num_lengths`` is less than 1.

    Example:
        >>> from geo.ops import grf_walks
        >>> rowptr, col, weight = normalized_adjacency(torch.tensor([[0, 1], [1, 0]]))
        >>> deposits = grf_walks(rowptr, col, weight, num_walks=8, seed=0)
        >>> FeatureMap(deposits, 2, 3)(torch.tensor([1.0, 0.0, 0.0])).to_dense()
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(self, deposits: WalkDeposits, num_nodes: int, num_lengths: int) -> None:
        if num_lengths < 1:
            raise ValueError(f"num_lengths: expected at least 1 (length 0 is the start itself), got {num_lengths}")
        ptr, col, length, value = deposits
        kept = length < num_lengths
        if not bool(kept.all()):
            ptr = _before(kept)[ptr]
            col, length, value = col[kept], length[kept], value[kept]
        first = torch.ones_like(col, dtype=torch.bool)  # of its row and column
        first[1:] = col[1:] != col[:-1]
        first[ptr[:-1][ptr.diff() > 0]] = True
        begin = first.nonzero().flatten()
        self.num_lengths = num_lengths
        self._pattern = SparseFeatures(_before(first)[ptr], col[begin], value.detach()[begin], num_nodes)
        self._ptr = torch.cat([begin, begin.new_tensor([col.size(0)])])
        self._length, self._value = length.long(), value
        self._plan: SegmentPlan | None = None

    def __call__(self, f: Tensor) -> SparseFeatures:
        """The features for a modulation f [``num_lengths``], in the dtype of the deposits."""
        if f.dim() != 1 or f.size(0) != self.num_lengths or not f.is_floating_point():
            raise ValueError(f"f: expected {self.num_lengths} floating numbers, got {f.dtype} {list(f.shape)}")
        f = f.to(self._value)
        if not (torch.is_grad_enabled() and (f.requires_grad or self._value.requires_grad)):
            out: Tensor = segment_sum_csr(f.detach()[self._length] * self._value.detach(), self._ptr)
            return self._pattern.with_value(out)
        if self._plan is None:
            entry = index_from_csr(self._ptr, None, self._length.size(0))
            self._plan = SegmentPlan(entry, self._ptr.size(0) - 1, self._length, self.num_lengths)
        out = gather_mul_segment_sum(f.unsqueeze(1), self._value.unsqueeze(1), plan=self._plan)
        return self._pattern.with_value(out.squeeze(1))


def _before(flag: Tensor) -> Tensor:
    """How many flags are set before each place, and in all."""
    return torch.cat([torch.zeros(1, dtype=torch.int64, device=flag.device), flag.cumsum(0)])


def features_of(deposits: WalkDeposits, f: Tensor, num_nodes: int) -> SparseFeatures:
    r"""The features :math:`\Phi = \sum_l f_l M_l` of walks under a modulation f.

    For several modulations of the same walks build one :class:`FeatureMap` and call it.

    Args:
        deposits: What :func:`geo.ops.grf_walks` returns.
        f: [L], the modulation; differentiable any number of times. Deposits of length L and more drop out, which is a
            bias unless the modulation ends there: see :func:`tail_mass`.
        num_nodes: Number of columns.

    Returns:
        The features, one row for each start, in the dtype of the deposits.

    Raises:
        ValueError: f is empty, not floating or has not one axis.

    Example:
        >>> from geo.ops import grf_walks
        >>> rowptr, col, weight = normalized_adjacency(torch.tensor([[0, 1], [1, 0]]))
        >>> deposits = grf_walks(rowptr, col, weight, num_walks=4, seed=0, survival=torch.tensor([1.0, 1.0, 0.0]))
        >>> features_of(deposits, torch.tensor([1.0, 0.5]), 2).to_dense()
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    if f.dim() != 1:
        raise ValueError(f"f: expected one axis, got {list(f.shape)}")
    return FeatureMap(deposits, num_nodes, f.size(0))(f)


def tail_mass(deposits: WalkDeposits, num_lengths: int) -> float:
    """The share of the deposits' absolute values at lengths that a modulation of ``num_lengths`` entries leaves out.

    Args:
        deposits: What :func:`geo.ops.grf_walks` returns.
        num_lengths: Number of entries of the modulation.

    Returns:
        A number from 0 (nothing is cut) to 1.

    Example:
        >>> from geo.ops import grf_walks
        >>> rowptr, col, weight = normalized_adjacency(torch.tensor([[0, 1], [1, 0]]))
        >>> deposits = grf_walks(rowptr, col, weight, num_walks=4, seed=0, survival=torch.tensor([1.0, 1.0, 0.0]))
        >>> tail_mass(deposits, 1), tail_mass(deposits, 2)
        (0.5, 0.0)
    """
    mass = deposits.value.detach().abs().double()
    total = float(mass.sum())
    return float(mass[deposits.length >= num_lengths].sum()) / total if total else 0.0


def normalized_adjacency(
    edge_index: Tensor,
    edge_weight: Tensor | None = None,
    num_nodes: int | None = None,
    normalization: str | None = "sym",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The matrix that walks run on, in CSR form, from a graph in PyG's form.

    With ``'sym'`` the entry of an edge i -> j of weight w is :math:`w / \sqrt{a_i b_j}`, where :math:`a_i` is the sum
    of :math:`|w|` over the edges out of i and :math:`b_j` over those into j. On an undirected graph of positive weights
    that is :math:`D^{-1/2} W D^{-1/2}`; with signs and with directions too its spectral norm is at most 1. Repeated
    edges are added up; loops are ordinary edges.

    Args:
        edge_index: int64 [2, E], sources and targets.
        edge_weight: [E], of any sign (default: ones); differentiable.
        num_nodes: Number of nodes (default: the largest in ``edge_index`` plus one).
        normalization: ``'sym'``, or None for the weights as they are.
        dtype: Of the entries (default: that of ``edge_weight``, or PyTorch's default).

    Returns:
        ``(rowptr, col, weight)``: int64 [N + 1], int64 [E'] ascending in each row, and [E'].

    Raises:
        IndexError: A node is not below ``num_nodes``.
        ValueError: A wrong shape or dtype, an unknown normalization, or a weight that is not finite.

    Example:
        >>> rowptr, col, weight = normalized_adjacency(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> rowptr.tolist(), col.tolist(), weight
        ([0, 1, 3, 4], [1, 0, 2, 1], tensor([0.7071, 0.7071, 0.7071, 0.7071]))
    """
    if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.dtype != torch.int64:
        raise ValueError(f"edge_index: expected int64 [2, E], got {edge_index.dtype} {list(edge_index.shape)}")
    if normalization not in ("sym", None):
        raise ValueError(f"normalization: expected 'sym' or None, got {normalization!r}")
    if edge_weight is not None:
        if edge_weight.shape != edge_index.shape[1:]:
            raise ValueError(f"edge_weight: expected [{edge_index.size(1)}], got {list(edge_weight.shape)}")
        if not bool(edge_weight.isfinite().all()):
            raise ValueError("edge_weight: expected finite numbers, got infinity or NaN")
    if dtype is None:
        floating = edge_weight is not None and edge_weight.is_floating_point()
        dtype = edge_weight.dtype if edge_weight is not None and floating else torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
    if num_nodes is None:
        num_nodes = int(edge_index.max()) + 1 if edge_index.numel() else 0
    for k in range(2):
        check_index("normalized_adjacency", f"edge_index[{k}]", edge_index[k], num_nodes)
    # Sums are taken in float64: the matrix of an undirected graph is then symmetric to the last place of dtype.
    if edge_weight is None:
        weight = torch.ones(edge_index.size(1), dtype=torch.float64, device=edge_index.device)
    else:
        weight = edge_weight.double()
    row, col = edge_index.contiguous()
    place = row * num_nodes + col
    if bool((place[1:] < place[:-1]).any()):  # two passes that count are faster than a sort
        t_ptr, by_target = csr_from_index(col, num_nodes)
        ptr, by_source = csr_from_index(row[by_target], num_nodes)
        row, col = (index_from_csr(p, None, row.size(0)) for p in (ptr, t_ptr))
        col = col[by_source]
        place = row * num_nodes + col
        if edge_weight is not None:
            weight = weight[by_target[by_source]]
    first = torch.ones_like(place, dtype=torch.bool)
    first[1:] = place[1:] != place[:-1]
    if not bool(first.all()):
        begin = first.nonzero().flatten()
        weight = segment_sum_csr(weight, torch.cat([begin, begin.new_tensor([len(first)])]))
        row, col = row[begin], col[begin]
    rowptr = torch.searchsorted(row, torch.arange(num_nodes + 1, device=row.device))
    if normalization == "sym":
        size = weight.abs()
        t_ptr, by_target = csr_from_index(col, num_nodes)
        product = segment_sum_csr(size, rowptr)[row] * segment_sum_csr(size[by_target], t_ptr)[col]
        weight = weight / torch.where(product > 0, product, 1).sqrt()
    return rowptr, col, weight.to(dtype)
