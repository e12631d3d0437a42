r"""Spectral filters on the pairs of nodes of each graph: W = V diag(z) V^T, and sums over the columns of f(W).

Graph g has :math:`n_g^2` pairs, the nodes of a batch lie in ``ptr``, and nothing is filled up to a common size for the
whole batch. A sum over columns goes tile by tile: :func:`sum_tiles` runs a function on one piece of the problem after
the other, keeps the sums alone, and runs it again for the gradient. So the tensor of all pairs and channels is never
stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.gather_mul import check_one_device, promote, widen

TILE = {"cpu": 1 << 13, "cuda": 1 << 18}  # pairs; with 64 channels of float32 they fill the level-2 cache of a core


def spectral_filter(
    eigvecs: Tensor,
    filters: Tensor,
    ptr: Tensor,
    fn: Callable[[Tensor], Tensor] | None = None,
    *,
    tile: int | None = None,
    recompute: bool = True,
) -> Tensor:
    r"""Filters of all pairs of nodes of each graph, or the sum over the columns of a function of them.

    .. math:: W_{ij} = \sum_k V_{ik} z_{gk} V_{jk} \in \mathbb R^M, \qquad out_i = \sum_j f(W_{ij})

    for i, j in graph g. With ``fn`` the pairs are visited in tiles, once for both of :math:`W_{ij} = W_{ji}`; neither W
    nor what ``fn`` makes of it is stored beyond a tile, and the gradient computes it anew. A linear last layer of f is
    cheaper, and the same, after the sum (its bias times n_g). Differentiable any number of times; a second derivative
    keeps all tiles. Where f is linear layers and ReLUs, :func:`~geo.ops.pair_mlp` is several times faster.

    Args:
        eigvecs: V, floating [N, K]; the nodes of a graph are neighbours. Columns of zeros do nothing.
        filters: z, floating [B, K, M].
        ptr: int64 [B + 1], the first node of each graph; it is read, so a GPU waits.
        fn: f, a Module or a function of [R, M] to [R, F] that works on each row by itself and always does the same.
            What it learns must be parameters of a Module. (default: none, return W)
        tile: pairs visited at a time. (default: as many as fit the cache)
        recompute: False keeps all tiles for the gradient: about a quarter faster, and as much memory as all pairs need.

    Returns:
        With ``fn`` [N, F], else W of all pairs [P, M], :math:`P = \sum_g n_g^2`, by graph, then i, then j.

    Raises:
        IndexError: ``ptr`` does not rise from 0 to N.
        ValueError: a wrong shape, dtype or device, or an ``fn`` that learns and is no Module.

    Example:
        >>> import torch
        >>> from geo.ops import spectral_filter
        >>> eigvecs = torch.tensor([[0.6, 0.8], [0.8, -0.6], [1.0, 0.0]])  # two graphs of two and one nodes
        >>> filters, ptr = torch.ones(2, 2, 1), torch.tensor([0, 2, 3])
        >>> spectral_filter(eigvecs, filters, ptr).flatten().round(decimals=3).abs().tolist()
        [1.0, 0.0, 0.0, 1.0, 1.0]
        >>> spectral_filter(eigvecs, filters, ptr, torch.exp).flatten().tolist()
        [3.71..., 3.71..., 2.71...]
    """
    eigvecs, filters = _checked(eigvecs, filters, ptr)
    if tile is None:
        tile = TILE.get(eigvecs.device.type, TILE["cuda"])
    if tile < 1:
        raise ValueError(f"spectral_filter: tile must be at least 1, got {tile}")
    order = NodeOrder(ptr)
    eigvecs, filters = order.nodes(eigvecs), order.graphs(filters)
    if fn is None:
        return order.back_pairs(_all_pairs(eigvecs, filters, order, tile))
    if not isinstance(fn, torch.nn.Module) and fn(filters.detach().new_zeros(1, filters.size(2))).requires_grad:
        raise ValueError("spectral_filter: fn uses tensors that require grad; give it as a Module that owns them")
    params = tuple(fn.parameters()) if isinstance(fn, torch.nn.Module) else ()
    tiles = list(_tiles(fn, order, tile, eigvecs.device))
    if not tiles:
        return fn(eigvecs.new_zeros(0, filters.size(2)))
    return order.back(sum_tiles(tiles, (eigvecs, filters), params, eigvecs.size(0), recompute))


def spectral_filter_reference(
    eigvecs: Tensor, filters: Tensor, ptr: Tensor, fn: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """:func:`spectral_filter` graph by graph; stores all pairs."""
    eigvecs, filters = _checked(eigvecs, filters, ptr)
    out = []
    for v, z in zip(eigvecs.split(ptr.diff().tolist()), filters, strict=True):
        pairs = torch.einsum("ik,km,jk->ijm", v, z, v)
        out.append(pairs.flatten(0, 1) if fn is None else fn(pairs.flatten(0, 1)).unflatten(0, (len(v), len(v))).sum(1))
    return torch.cat(out) if out else eigvecs.new_zeros(0, filters.size(2))


def _checked(eigvecs: Tensor, filters: Tensor, ptr: Tensor) -> tuple[Tensor, ...]:
    if eigvecs.dim() != 2:
        raise ValueError(f"spectral_filter: eigvecs must be [N, K], got {list(eigvecs.shape)}")
    if ptr.dim() != 1 or ptr.size(0) < 1 or ptr.dtype != torch.int64:
        raise ValueError(f"spectral_filter: ptr must be int64 [B + 1], got {ptr.dtype} {list(ptr.shape)}")
    if filters.dim() != 3 or filters.shape[:2] != (ptr.size(0) - 1, eigvecs.size(1)):
        raise ValueError(
            f"spectral_filter: filters must be [{ptr.size(0) - 1}, {eigvecs.size(1)}, M], got {list(filters.shape)}"
        )
    check_one_device("spectral_filter", eigvecs=eigvecs, filters=filters, ptr=ptr)
    bounds.refuse_functorch("spectral_filter")
    bounds.check_ptr("spectral_filter", ptr, eigvecs.size(0))
    return promote(eigvecs, filters)


class NodeOrder:
    """The graphs of a batch, smallest first, and their nodes in that order: graphs of like size become neighbours."""

    def __init__(self, ptr: Tensor) -> None:
        given = ptr.diff().tolist()
        order = sorted(range(len(given)), key=given.__getitem__)
        self.sizes = [given[g] for g in order]
        self.first = [0]
        for size in self.sizes:
            self.first.append(self.first[-1] + size)
        self._graphs: Tensor | None = None
        if order == list(range(len(given))):
            return
        self._graphs = torch.tensor(order, device=ptr.device)
        self._nodes = _ranges(ptr[self._graphs], ptr.diff()[self._graphs], self.first[-1])
        self._back = torch.empty_like(self._nodes)
        self._back[self._nodes] = torch.arange(self.first[-1], device=ptr.device)
        self._ptr = ptr

    def nodes(self, x: Tensor) -> Tensor:
        """Rows of nodes, into this order."""
        return x if self._graphs is None else x.index_select(0, self._nodes)

    def graphs(self, x: Tensor) -> Tensor:
        """Rows of graphs, into this order."""
        return x if self._graphs is None else x.index_select(0, self._graphs)

    def back(self, x: Tensor) -> Tensor:
        """Rows of nodes, out of this order."""
        return x if self._graphs is None else x.index_select(0, self._back)

    def renumbered(self, index: Tensor) -> Tensor:
        """Numbers of nodes, into this order."""
        return index if self._graphs is None else self._back[index]

    def back_pairs(self, x: Tensor) -> Tensor:
        """Rows of pairs, out of this order."""
        if self._graphs is None:
            return x
        counts = self._ptr.diff().square()
        sorted_counts = counts[self._graphs]
        first = torch.empty_like(counts)
        first[self._graphs] = sorted_counts.cumsum(0) - sorted_counts
        return x.index_select(0, _ranges(first, counts, x.size(0)))


def _ranges(first: Tensor, count: Tensor, total: int) -> Tensor:
    """``first[g], first[g] + 1, ...``, ``count[g]`` of them, for all g."""
    shift = first - (count.cumsum(0) - count)
    return torch.arange(total, device=first.device) + shift.repeat_interleave(count, output_size=total)


# -- tiles -------------------------------------------------------------------------------------------------------------
class Tile(NamedTuple):
    """A piece of the problem: ``run`` of some rows of each tensor is added to some rows of the result."""

    reads: tuple[slice, ...]  # the rows of each tensor that run takes
    spans: tuple[slice, ...]  # the rows of the result that run's result is added to, one span after the other
    run: Callable[..., Tensor]


def sum_tiles(
    tiles: Sequence[Tile], tensors: tuple[Tensor, ...], params: tuple[Tensor, ...], num_rows: int, recompute: bool
) -> Tensor:
    """The sum of all tiles, [num_rows, F]; ``params`` are what their functions learn.

    With ``recompute`` the forward pass keeps nothing of a tile, and the backward pass runs it again.
    """
    needs = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *params))
    if needs and recompute:
        out: Tensor = _SumTiles.apply(tiles, num_rows, len(tensors), *tensors, *params)  # type: ignore[no-untyped-call]
        return out
    if not needs:
        return _sum(tiles, tensors, num_rows)
    parts = [tile.run(*_pieces(tile, tensors)) for tile in tiles]
    rows = torch.cat([torch.arange(s.start, s.stop, device=parts[0].device) for tile in tiles for s in tile.spans])
    total = torch.cat(parts)
    return widen(total.new_zeros(num_rows, total.size(1))).index_add(0, rows, widen(total)).to(total.dtype)


def _pieces(tile: Tile, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t[rows] for t, rows in zip(tensors, tile.reads, strict=True)]


def _sum(tiles: Sequence[Tile], tensors: Sequence[Tensor], num_rows: int) -> Tensor:
    out, dtype = None, torch.float32
    for tile in tiles:
        part = tile.run(*_pieces(tile, tensors))
        if out is None:
            out, dtype = widen(part).new_zeros(num_rows, part.size(1)), part.dtype
        lengths = [rows.stop - rows.start for rows in tile.spans]
        for rows, values in zip(tile.spans, part.split(lengths), strict=True):
            out[rows] += values
    assert out is not None
    return out.to(dtype)


class _SumTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tiles: Sequence[Tile], num_rows: int, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.tiles, ctx.count = tiles, count
        device = tensors[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return _sum(tiles, tensors[:count], num_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # read once: a checkpoint around this op gives them out once
        tensors, params = saved[: ctx.count], saved[ctx.count :]
        wanted = ctx.needs_input_grad[3:]
        device, dtype, enabled = ctx.autocast
        if torch.is_grad_enabled():  # to be differentiated again: one graph of all tiles
            with torch.autocast(device, dtype, enabled):
                parts = [tile.run(*_pieces(tile, tensors)) for tile in ctx.tiles]
            inputs = [t for t, want in zip(saved, wanted, strict=True) if want]
            given = [_rows(grad, tile).to(p.dtype) for tile, p in zip(ctx.tiles, parts, strict=True)]
            got = iter(torch.autograd.grad(parts, inputs, given, create_graph=True, allow_unused=True))
            return (None, None, None, *(next(got) if want else None for want in wanted))
        sums = [torch.zeros_like(t) if want else None for t, want in zip(saved, wanted, strict=True)]
        for tile in ctx.tiles:
            pieces = _pieces(tile, tensors)
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                pieces = [p.detach().requires_grad_(want) for p, want in zip(pieces, wanted, strict=False)]
                part = tile.run(*pieces)
            inputs = [t for t, want in zip([*pieces, *params], wanted, strict=True) if want]
            got = iter(torch.autograd.grad(part, inputs, _rows(grad, tile).to(part.dtype), allow_unused=True))
            for i, total in enumerate(sums):
                if total is not None and (value := next(got)) is not None:
                    total[tile.reads[i] if i < ctx.count else ...] += value
        return (None, None, None, *sums)


def _rows(grad: Tensor, tile: Tile) -> Tensor:
    parts = [grad[rows] for rows in tile.spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# -- pairs -------------------------------------------------------------------------------------------------------------
def _product(a: Tensor, b: Tensor) -> Tensor:
    """bmm, also under autocast in the precision of its inputs: W does not depend on the basis up to rounding only."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def block(rows: Tensor, columns: Tensor, filters: Tensor) -> Tensor:
    """W of some rows [b, r, K] and columns [b, c, K] of b graphs with filters [b, K, M]: [b, r, c, M]."""
    scaled = columns.transpose(1, 2).unsqueeze(3) * filters.unsqueeze(2)  # [b, K, c, M]
    return _product(rows, scaled.flatten(2)).view(*rows.shape[:2], columns.size(1), filters.size(2))


def groups(sizes: Sequence[int], cost: Callable[[int], int], budget: int) -> Iterator[tuple[int, int]]:
    """Runs (first, stop) of graphs, smallest first, whose number times the cost of the largest is within the budget."""
    first = sum(size == 0 for size in sizes)
    for stop in range(first + 1, len(sizes) + 1):
        if stop == len(sizes) or (stop + 1 - first) * cost(sizes[stop]) > budget:
            yield first, stop
            first = stop


class Padding(NamedTuple):
    """Places of the nodes of b graphs in [b, n], n the size of the largest; None where all are of that size."""

    sizes: tuple[int, ...]
    places: Tensor | None  # of the nodes [R] among the b * n
    nodes: Tensor | None  # at the places [b * n]; the graph's first node where there is none

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> Padding:
        """For graphs of these sizes, smallest first."""
        width = sizes[-1]
        if sizes[0] == width:
            return cls(tuple(sizes), None, None)
        count = torch.tensor(sizes, device=device).unsqueeze(1)
        local = torch.arange(width, device=device)
        real = local < count
        nodes = (count.cumsum(0) - count) + torch.where(real, local, 0)
        return cls(tuple(sizes), real.flatten().nonzero().flatten(), nodes.flatten())

    def fill(self, x: Tensor) -> Tensor:
        """[R, *F] to [b, n, *F]."""
        filled = x if self.nodes is None else x.index_select(0, self.nodes)
        return filled.view(len(self.sizes), self.sizes[-1], *x.shape[1:])

    def take(self, x: Tensor) -> Tensor:
        """[b, n, *F] to [R, *F]."""
        flat = x.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


def _all_pairs(eigvecs: Tensor, filters: Tensor, order: NodeOrder, tile: int) -> Tensor:
    out = [eigvecs.new_zeros(0, filters.size(2))]
    for first, stop in groups(order.sizes, lambda n: n * n, tile):
        padding = Padding.of(order.sizes[first:stop], eigvecs.device)
        v = padding.fill(eigvecs[order.first[first] : order.first[stop]])
        pairs = padding.take(block(v, v, filters[first:stop]))  # [R, n, M]
        if padding.places is not None:
            count = torch.tensor(padding.sizes, device=v.device)
            width = count.repeat_interleave(count, output_size=pairs.size(0)).unsqueeze(1)
            pairs = pairs[torch.arange(pairs.size(1), device=v.device) < width]
        out.append(pairs.reshape(-1, filters.size(2)))
    return torch.cat(out)


def _tiles(fn: Callable[[Tensor], Tensor], order: NodeOrder, tile: int, device: torch.device) -> Iterator[Tile]:
    tables: dict[int, _Table] = {}
    for first, stop in groups(order.sizes, lambda n: n * (n + 1) // 2, tile):
        size, begin, graphs = order.sizes[stop - 1], order.first[first], slice(first, stop)
        if stop - first > 1 or size * (size + 1) // 2 <= tile:
            nodes = slice(begin, order.first[stop])
            if size not in tables:
                tables[size] = _Table.of(size, device)
            yield Tile((nodes, graphs), (nodes,), _Triangles(fn, order.sizes[first:stop], tables[size], device))
            continue
        height = max(1, math.isqrt(tile) // 4)  # columns are longer, since the filters are multiplied by each row
        width = tile // height
        for top in range(0, size, height):
            bottom = min(top + height, size)
            for left in range(top, size, width):
                right = min(left + width, size)
                rows = slice(begin + left, begin + right)
                spans = (rows,) if left == top else (slice(begin + top, begin + bottom), rows)
                reads = slice(begin + top, begin + right)
                yield Tile((reads, graphs), spans, _Rectangle(fn, bottom - top, left - top))


class _Rectangle:
    """Rows of one graph against columns at or right of the diagonal, each value for its row and for its column."""

    def __init__(self, fn: Callable[[Tensor], Tensor], height: int, left: int) -> None:
        self.fn, self.height, self.left = fn, height, left

    def __call__(self, eigvecs: Tensor, filters: Tensor) -> Tensor:
        rows, columns = eigvecs[: self.height], eigvecs[self.left :]
        scaled = rows.unsqueeze(2) * filters
        pairs = _product(columns.expand(len(rows), -1, -1), scaled)
        values = self.fn(pairs.flatten(0, 1)).view(len(rows), len(columns), -1)
        below = values.sum(0)
        if not self.left:
            below = below[self.height :]  # the square on the diagonal holds both of each pair
        return torch.cat([values.sum(1), below])


class _Table(NamedTuple):
    """The pairs i <= j of n nodes in the order of their places j (j + 1) / 2 + i, which do not depend on n."""

    low: Tensor  # [n (n + 1) / 2]
    high: Tensor
    place: Tensor  # of all pairs [n * n]
    ptr: Tensor  # the pairs at each place, as csr_from_index gives them
    perm: Tensor

    @classmethod
    def of(cls, size: int, device: torch.device) -> _Table:
        """For n nodes."""
        high, low = torch.tril_indices(size, size, device=device)
        local = torch.arange(size, device=device)
        j, i = torch.maximum(local, local.unsqueeze(1)), torch.minimum(local, local.unsqueeze(1))
        place = (j * (j + 1) // 2 + i).flatten()
        return cls(low, high, place, *torch.ops.geo.csr_from_index(place, high.size(0)))


class _Triangles:
    """The pairs i <= j of some whole graphs, each value for its row and for its column."""

    def __init__(
        self, fn: Callable[[Tensor], Tensor], sizes: Sequence[int], table: _Table, device: torch.device
    ) -> None:
        self.fn, self.table, self.padding = fn, table, Padding.of(sizes, device)
        graph, num_pairs = torch.arange(len(sizes), device=device).unsqueeze(1), table.low.size(0)
        width, all_pairs = sizes[-1], table.place.size(0)
        self.place = (table.place + graph * num_pairs).flatten()
        self.ptr = torch.arange(0, len(sizes) * all_pairs + 1, width, device=device)
        self.node = torch.arange(len(sizes) * width, device=device).repeat_interleave(width)
        real = torch.arange(width, device=device) < torch.tensor(sizes, device=device).unsqueeze(1)
        self.real = (real.unsqueeze(2) & real.unsqueeze(1)).view(-1, 1)

    def __call__(self, eigvecs: Tensor, filters: Tensor) -> Tensor:
        v = self.padding.fill(eigvecs)
        products = v.index_select(1, self.table.low) * v.index_select(1, self.table.high)
        values = self.fn(_product(products, filters).flatten(0, 1))
        t_ptr = t_perm = None
        if torch.is_grad_enabled():
            graph = torch.arange(len(v), device=v.device).unsqueeze(1) * self.table.place.size(0)
            t_ptr = torch.cat([(self.table.ptr[:-1] + graph).flatten(), self.ptr[-1:]])
            t_perm = (self.table.perm + graph).flatten()
        total: Tensor = torch.ops.geo.gather_mul_segment_sum(
            values, self.real.to(values.dtype), self.place, self.node, self.ptr, None, t_ptr, t_perm
        )
        return self.padding.take(total.view(*v.shape[:2], -1))
