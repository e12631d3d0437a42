"""The lowest eigenpairs of a large sparse matrix: component by component, checked for missed ones."""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh, qr
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.sparse.linalg import SuperLU, splu

from geo.transforms.spectrum_solver import (
    RESIDUAL,
    Array,
    Cut,
    HermitianMatrix,
    Spectrum,
    check_residuals,
    solve_dense,
)

_FIRST = 16  # eigenpairs looked for at first where their number is not known
_TARGET = 0.1 * RESIDUAL  # residual at which iterations stop, relative to the norm
_HUB = 10.0  # nodes with more neighbours than so many times the root of the number of nodes
_LEAF = 64  # nodes of a part that is dissected no further
_INDEX = 4  # bytes of the index that each entry of L and of U has besides its value
_GROWTH = 1e8  # of the lowest eigenvector against the damped ones in one Chebyshev cycle
_SHIFT = 1e-8  # relative to the norm; makes the matrix definite
_POWERS = 3  # of the inverse, between restarts
_DEGREE = 1000  # at most, of one Chebyshev cycle
_MARGIN = 0.1  # of the spread of the block, by which the damped interval begins above it
_PRODUCTS = 30_000  # at most, of the matrix with the block of vectors


def solve_sparse(matrix: HermitianMatrix, cut: Cut) -> Spectrum:
    """The eigenpairs that ``cut`` keeps of one large matrix.

    Args:
        matrix: The matrix.
        cut: What to keep, and the bounds between methods.

    Returns:
        The spectrum.

    Raises:
        ValueError: If eigenvectors or a dense matrix need more memory than ``cut`` allows.
        RuntimeError: If an eigenpair fails its check.
    """
    num_nodes = matrix.diagonal.size
    components = _split(matrix, cut)
    wanted = _FIRST if cut.k is None else cut.k + 1
    while True:
        wanted = min(wanted, num_nodes)
        cut.require_bytes(num_nodes * wanted * matrix.entry.itemsize, f"{wanted} eigenvectors of {num_nodes} nodes")
        parts = [component.lowest(wanted) for component in components]
        values = np.concatenate([eigvals for eigvals, _ in parts])
        order = np.argsort(values, kind="stable")[:wanted]  # the lowest of all are among the lowest of each
        kept = cut.count(values[order], num_nodes)
        if kept is not None:
            break
        wanted *= 2
    owner = np.repeat(np.arange(len(parts)), [eigvals.size for eigvals, _ in parts])[order]
    column = np.concatenate([np.arange(eigvals.size) for eigvals, _ in parts])[order]
    eigvecs = np.zeros((num_nodes, order.size), dtype=matrix.entry.dtype)
    for at in np.unique(owner):
        place = np.flatnonzero(owner == at)
        eigvecs[np.ix_(components[at].nodes, place)] = parts[at][1][:, column[place]]
    return cut.spectrum(values[order], eigvecs, num_nodes)


def _split(matrix: HermitianMatrix, cut: Cut) -> list[_Component]:
    """The connected components; those of one size that are small enough are decomposed together."""
    num_nodes = matrix.diagonal.size
    ends = (np.concatenate([matrix.i, matrix.j]), np.concatenate([matrix.j, matrix.i]))
    pattern = coo_array((np.ones(ends[0].size), ends), shape=(num_nodes, num_nodes))
    number, label = connected_components(pattern, directed=False)
    nodes = np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label, minlength=number))[:-1])
    owner = label[matrix.i]
    edges = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner, minlength=number))[:-1])
    rank = np.empty(num_nodes, dtype=np.int64)
    out = []
    for members, edge in zip(nodes, edges, strict=True):
        rank[members] = np.arange(members.size)
        part = HermitianMatrix(
            matrix.diagonal[members],
            rank[matrix.i[edge]],
            rank[matrix.j[edge]],
            matrix.entry[edge],
            matrix.norm,
            None if matrix.kernel is None else matrix.kernel[members],
        )
        out.append(_Component(members, part, cut))
    small: dict[int, list[_Component]] = {}
    for component in out:
        if component.nodes.size <= cut.dense_nodes:
            small.setdefault(component.nodes.size, []).append(component)
    for group in small.values():
        for component, *pair in zip(group, *solve_dense([component.matrix for component in group]), strict=True):
            component.full = (pair[0], pair[1])
    return out


class _Component:
    """A connected part of a matrix and the eigenpairs found of it so far."""

    def __init__(self, nodes: Array, matrix: HermitianMatrix, cut: Cut) -> None:
        self.nodes, self.matrix, self.cut = nodes, matrix, cut
        self.full: tuple[Array, Array] | None = None
        self.eigvals = np.zeros(0)
        self.eigvecs = np.zeros((nodes.size, 0), dtype=matrix.entry.dtype)
        self.bound = -np.inf  # the lowest eigenvalue of all that were not known before the last solve
        self.solver: _Iteration | None = None

    def lowest(self, wanted: int) -> tuple[Array, Array]:
        """The ``wanted`` lowest eigenpairs, or all where there are fewer."""
        size = self.nodes.size
        if self.full is None and 4 * wanted >= size:
            self.cut.require_bytes(3 * size**2 * self.matrix.entry.itemsize, f"dense matrices of {size} nodes")
            eigvals, eigvecs = solve_dense([self.matrix])
            self.full = (eigvals[0], eigvecs[0])
        if self.full is not None:
            return self.full[0][:wanted], self.full[1][:, :wanted]
        solver = self.solver = self.solver or self._start()
        slack = _TARGET * self.matrix.norm
        # Each solve looks in the complement of what is known. Only when the lowest eigenvalue there is not below those
        # asked for, none was missed: the last solve of this loop is the check, and finds the next eigenpair besides.
        while self.eigvals.size < wanted or self.bound < self.eigvals[wanted - 1] - slack:
            eigvals, eigvecs = solver.solve(max(1, wanted - self.eigvals.size), self.eigvecs)
            self.bound = eigvals[0]
            order = np.argsort(np.concatenate([self.eigvals, eigvals]), kind="stable")
            self.eigvals = np.concatenate([self.eigvals, eigvals])[order]
            self.eigvecs = np.concatenate([self.eigvecs, eigvecs], axis=1)[:, order]
        self._check()
        return self.eigvals[:wanted], self.eigvecs[:, :wanted]

    def _start(self) -> _Iteration:
        laplacian = _sparse(self.matrix)
        if self.matrix.kernel is not None:  # known exactly, and often far below the rest
            self.eigvals = np.zeros(1)
            self.eigvecs = (self.matrix.kernel / np.linalg.norm(self.matrix.kernel))[:, None]
        order = dissect(laplacian, self.cut.max_fill_bytes // (2 * laplacian.dtype.itemsize + 2 * _INDEX))
        if order is None:
            return _Chebyshev(laplacian, self.matrix.norm)
        return _ShiftInvert(laplacian, self.matrix.norm, order[0])

    def _check(self) -> None:
        residual = np.linalg.norm(_sparse(self.matrix) @ self.eigvecs - self.eigvecs * self.eigvals, axis=0)
        check_residuals(residual, self.matrix.norm, type(self.solver).__name__.strip("_"))
        overlap = np.abs(self.eigvecs.conj().T @ self.eigvecs - np.eye(self.eigvals.size)).max()
        if not overlap <= RESIDUAL:
            raise RuntimeError(f"eigenvectors overlap by {overlap:.1e}; the decomposition failed")


def _sparse(matrix: HermitianMatrix) -> csr_array:
    size = matrix.diagonal.size
    node = np.arange(size)
    ends = (np.concatenate([node, matrix.i, matrix.j]), np.concatenate([node, matrix.j, matrix.i]))
    return coo_array((np.concatenate([matrix.diagonal, matrix.entry, matrix.entry.conj()]), ends), (size, size)).tocsr()


def _rayleigh_ritz(laplacian: csr_array, block: Array, known: Array, width: int) -> tuple[Array, Array, Array]:
    """The ``width`` lowest eigenpairs as far as the span of a block, less known vectors, has them; their residuals."""
    basis = qr(np.concatenate([known, block], axis=1), mode="economic", overwrite_a=True, check_finite=False)[0]
    basis = basis[:, known.shape[1] :]
    image = laplacian @ basis
    eigvals, turn = eigh(basis.conj().T @ image)
    eigvals, turn = eigvals[:width], turn[:, :width]
    eigvecs = basis @ turn
    return eigvals, eigvecs, np.linalg.norm(image @ turn - eigvecs * eigvals, axis=0)


def _complement(block: Array, known: Array) -> Array:
    """The part of a block orthogonal to known vectors."""
    rest: Array = block - known @ (known.conj().T @ block)
    return rest


class _Iteration:
    """The lowest eigenpairs by improving a random block, which finds eigenspaces up to its own width."""

    def __init__(self, laplacian: csr_array, norm: float) -> None:
        self.laplacian, self.norm = laplacian, norm
        self.calls = 0

    def improve(self, eigvals: Array, eigvecs: Array, known: Array, slow: int) -> tuple[Array, int]:
        """A block that has more of the lowest eigenvectors, and how many products with the block it took."""
        raise NotImplementedError

    def solve(self, wanted: int, known: Array) -> tuple[Array, Array]:
        """The ``wanted`` lowest eigenpairs in the complement of known eigenvectors, always from a random start.

        Args:
            wanted: Their number.
            known: Orthonormal eigenvectors [n, m].

        Returns:
            Eigenvalues, ascending, and eigenvectors.

        Raises:
            RuntimeError: If the iteration does not converge.
        """
        size, dtype = self.laplacian.shape[0], self.laplacian.dtype
        self.calls += 1
        rng = np.random.default_rng(self.calls)
        width = wanted + max(8, wanted // 2)  # the nearer the last column to the last one wanted, the slower
        block = rng.standard_normal((size, width)).astype(dtype)
        if dtype.kind == "c":
            block += 1j * rng.standard_normal((size, width))
        eigvals, eigvecs, residual = _rayleigh_ritz(self.laplacian, block, known, width)
        products = slow = 0
        while products < _PRODUCTS:
            worst = residual[:wanted].max()
            if worst <= _TARGET * self.norm * (5 if slow > 9 else 1):  # below RESIDUAL; a wide cluster stays slow
                return eigvals[:wanted], eigvecs[:, :wanted]
            block, cost = self.improve(eigvals, eigvecs, known, slow)
            products += cost
            eigvals, eigvecs, residual = _rayleigh_ritz(self.laplacian, block, known, width)
            slow = slow + 1 if residual[:wanted].max() > worst / 4 else 0
        raise RuntimeError(
            f"{type(self).__name__.strip('_')}: residual {residual[:wanted].max():.1e} after {products} products, "
            f"not {_TARGET * self.norm:.1e}; eigenvalues are too close, a larger max_fill_bytes allows to factor"
        )


class _ShiftInvert(_Iteration):
    """Restarted block Lanczos on ``(L + shift)^-1``."""

    def __init__(self, laplacian: csr_array, norm: float, order: Array) -> None:
        super().__init__(laplacian, norm)
        self.order = order
        self.factor = factorize(laplacian, _SHIFT * norm, order)

    def improve(self, eigvals: Array, eigvecs: Array, known: Array, slow: int) -> tuple[Array, int]:
        """The block and its images under the first powers of the inverse."""
        blocks = [eigvecs]
        for _ in range(_POWERS):
            image = np.empty_like(eigvecs)
            image[self.order] = self.factor.solve(np.ascontiguousarray(blocks[-1][self.order]))
            blocks.append(qr(_complement(image, known), mode="economic", overwrite_a=True, check_finite=False)[0])
        return np.concatenate(blocks, axis=1), _POWERS


def factorize(laplacian: csr_array, shift: float, order: Array) -> SuperLU:
    """LU factors of ``L + shift``, rows and columns in the given order, without pivoting since it is definite."""
    size = laplacian.shape[0]
    node = np.arange(size)
    shifted = (laplacian + csr_array((np.full(size, shift), (node, node)), (size, size)))[order][:, order]
    return splu(shifted.tocsc(), permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"SymmetricMode": True})


class _Chebyshev(_Iteration):
    """Subspace iteration with a polynomial that is small on all of the spectrum but its lowest end."""

    def improve(self, eigvals: Array, eigvecs: Array, known: Array, slow: int) -> tuple[Array, int]:
        """The block under a polynomial that damps all that lies above it.

        Damping begins a margin above the block, the wider the more steps were slow: an eigenspace may be wider than it.
        """
        top = 1.01 * self.norm
        spread = max(eigvals[-1] - eigvals[0], 1e-3 * self.norm)
        edge = min(eigvals[-1] + _MARGIN * 2.0 ** min(slow, 9) * spread, (eigvals[-1] + top) / 2)
        rate = np.arccosh((top + edge - 2 * eigvals[0]) / (top - edge))
        degree = int(np.clip(np.arccosh(_GROWTH) / rate, 4, _DEGREE))
        return chebyshev_filter(self.laplacian, eigvecs, known, degree, edge, top, eigvals[0]), degree


def chebyshev_filter(
    laplacian: csr_array, block: Array, known: Array, degree: int, edge: float, top: float, lowest: float
) -> Array:
    """A Chebyshev polynomial of a matrix, times a block.

    Args:
        laplacian: The matrix; no eigenvalue is below 0.
        block: What it is applied to.
        known: Eigenvectors to keep out of the result, though the polynomial may be far larger there.
        degree: Of the polynomial.
        edge: Where the damped interval begins; below it the polynomial grows fastest of all of its degree.
        top: Where it ends.
        lowest: Where the polynomial is 1.

    Returns:
        The filtered block.
    """
    half, centre = (top - edge) / 2, (top + edge) / 2
    period = max(1, int(np.arccosh(_GROWTH) / np.arccosh(centre / half)))  # products that rounding errors can grow for
    node = np.arange(laplacian.shape[0])
    mapped = (laplacian - csr_array((np.full(node.size, centre), (node, node)), laplacian.shape)) / half
    first = scale = half / (lowest - centre)
    before, now = block.copy(), (mapped @ block) * scale
    for step in range(1, degree):
        if step % period == 0:
            before, now = _complement(before, known), _complement(now, known)
        after = 1 / (2 / first - scale)
        product = mapped @ now
        product *= 2 * after
        before *= scale * after
        product -= before
        before, now, scale = now, product, after
    filtered: Array = now
    return filtered


def dissect(laplacian: csr_array, limit: int) -> tuple[Array, int] | None:
    """Nested dissection: an order of elimination and a bound of the entries of its triangular factor.

    Hubs come last. A breadth-first search from a far node cuts each part at a small level; both sides come before it.
    The columns of a separator of s nodes in a part with b neighbours outside have at most s (s + 1) / 2 + s b entries.

    Args:
        laplacian: The matrix; its pattern is symmetric.
        limit: Give up above so many entries.

    Returns:
        ``(order, entries)``, or None if the bound exceeds ``limit``.
    """
    pattern = csr_array((np.ones(laplacian.nnz), laplacian.indices, laplacian.indptr), laplacian.shape)
    size = laplacian.shape[0]
    hub = np.diff(pattern.indptr) > _HUB * np.sqrt(size)
    blocks = [np.flatnonzero(hub)]
    parts = [np.flatnonzero(~hub)]
    entries = blocks[0].size * (blocks[0].size + 1) // 2
    inside = np.zeros(size, dtype=bool)
    while parts:
        nodes = parts.pop()
        rows = pattern[nodes]
        inside[nodes] = True
        outside = np.unique(rows.indices[~inside[rows.indices]]).size
        inside[nodes] = False
        pieces, separators = _cut_part(rows[:, nodes])
        parts += [nodes[piece] for piece in pieces]
        for separator in separators:
            blocks.append(nodes[separator])
            entries += separator.size * (separator.size + 1) // 2 + separator.size * outside
        if entries > limit:
            return None
    return np.concatenate(blocks[::-1]), entries


def _cut_part(graph: csr_array) -> tuple[list[Array], list[Array]]:
    """Split a part: what is to be cut further, and sets of nodes that are not adjacent to one another."""
    size = graph.shape[0]
    if size <= _LEAF:
        return [], [np.arange(size)]
    number, label = connected_components(graph, directed=False)
    if number > 1:
        pieces = np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label))[:-1])
        return [p for p in pieces if p.size > _LEAF], [p for p in pieces if p.size <= _LEAF]
    start = int(dijkstra(graph, indices=0, unweighted=True).argmax())
    level = dijkstra(graph, indices=start, unweighted=True).astype(np.int64)
    sizes = np.bincount(level)
    before = np.cumsum(sizes) - sizes
    fair = np.minimum(before, size - before - sizes) >= size / 5
    if fair.any():
        chosen = int(np.where(fair, sizes, size).argmin())
    else:
        chosen = int(np.searchsorted(before + sizes, size / 2))
    cut = [np.flatnonzero(level < chosen), np.flatnonzero(level > chosen)]
    return [p for p in cut if p.size], [np.flatnonzero(level == chosen)]
