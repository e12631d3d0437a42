"""Maps of the filters of all pairs of nodes to nodes: functions of one column at a time, summed over the columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from geo.nn.activations import activation
from geo.nn.mlp import make_norm
from geo.ops import csr_from_index, gather_mul_segment_sum, pair_mlp
from geo.ops.spectral_filter import NodeOrder, Padding, Tile, block, groups, spectral_filter, sum_tiles

KEPT = {"cpu": 1 << 28, "cuda": 1 << 33}  # bytes of states kept for the gradient rather than made again
TILE_ROWS = {"cpu": 1 << 18, "cuda": 1 << 26}  # entries of a tensor of hidden states of a tile


class MLP(nn.Module):
    """Linear layers with norm and activation between them; ``last=False`` ends with those."""

    def __init__(self, widths: Sequence[int], norm: str | None, act: str, last: bool = True) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        hidden = widths[1:-1] if last else widths[1:]
        self.norms = nn.ModuleList(make_norm(norm, width) for width in hidden)
        self.act = activation(act)
        self.in_place = act == "relu"
        self.plain = norm is None and act == "relu" and not last

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """[..., F] to [..., F']; ``real`` [...] marks the rows that a batch norm reads."""
        for i, linear in enumerate(self.linears):
            x = self.between(i, _linear(linear, x), real)
        return x

    def between(self, i: int, x: Tensor, real: Tensor | None = None) -> Tensor:
        """What follows linear layer i, which made x."""
        if i == len(self.norms):
            return x
        norm = self.norms[i]
        x = _batch_norm(norm, x, real) if isinstance(norm, nn.BatchNorm1d) else norm(x)
        return x.relu_() if self.in_place else self.act(x)


def _linear(linear: nn.Module, x: Tensor) -> Tensor:
    if x.is_cpu and isinstance(linear, nn.Linear):  # there the bias is cheaper added than laid out beforehand
        return torch.matmul(x, linear.weight.t()).add_(linear.bias)
    out: Tensor = linear(x)
    return out


def _batch_norm(norm: nn.BatchNorm1d, x: Tensor, real: Tensor | None) -> Tensor:
    if real is None:
        normed: Tensor = norm(x.flatten(0, -2))
        return normed.view_as(x)
    out = torch.zeros_like(x)
    out[real] = norm(x[real]).to(x.dtype)
    return out


def _folded(mlp: MLP, filters: Tensor) -> tuple[Tensor, Tensor | None]:
    """The filters; where that is cheaper with the first layer applied, linear as W is in them, but for its bias."""
    if not mlp.linears:
        return filters, None
    width, channels, hidden = filters.size(1), filters.size(2), mlp.widths[1]
    if (width + 1) * hidden > 1.5 * channels * (width + hidden):
        return filters, None
    with torch.autocast(filters.device.type, enabled=False):
        filters = filters @ mlp.linears[0].get_parameter("weight").t()
    return filters, mlp.linears[0].get_parameter("bias")


class _Rest(nn.Module):
    """An MLP without its first layer."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.linears, self.norms = mlp.linears[1:], mlp.norms
        self.between = mlp.between

    def forward(self, x: Tensor) -> Tensor:
        """[R, H] to [R, F]."""
        x = self.between(0, x)
        for i, linear in enumerate(self.linears):
            x = self.between(i + 1, _linear(linear, x))
        return x


class RowNetwork(nn.Module):
    """An MLP of each pair."""

    def __init__(self, in_channels: int, hidden: int, num_layers: int, norm: str | None, act: str) -> None:
        super().__init__()
        self.mlp = MLP([in_channels, *[hidden] * (num_layers - 1)], norm, act, last=False)
        self.width = hidden if num_layers > 1 else in_channels

    def forward(self, x: Tensor, src: Tensor, ptr: Tensor, weight: Tensor, real: Tensor | None = None) -> Tensor:
        """As of :class:`GIN`; the edges are not read."""
        out: Tensor = self.mlp(x, real)
        return out


class GIN(nn.Module):
    """A GIN along the rows, each column by itself; its very last linear layer stands behind the sum of the columns."""

    def __init__(
        self, in_channels: int, hidden: int, num_layers: int, mlp_layers: int, norm: str | None, act: str
    ) -> None:
        super().__init__()
        widths = [in_channels, *[hidden] * mlp_layers]
        mlps = []
        for i in range(num_layers):
            if i:
                widths[0] = hidden
            last = i < num_layers - 1
            mlps.append(MLP(widths if last else widths[:-1], norm, act, last=last))
        self.mlps = nn.ModuleList(mlps)
        self.eps = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(num_layers))
        self.width = hidden if mlp_layers > 1 or num_layers > 1 else in_channels

    def forward(self, x: Tensor, src: Tensor, ptr: Tensor, weight: Tensor, real: Tensor | None = None) -> Tensor:
        """States [R, c, F] of R nodes in c columns, edges in order of their targets, weight [E, 1, 1]."""
        for eps, mlp in zip(self.eps, self.mlps, strict=True):
            x = (1 + eps) * x + gather_mul_segment_sum(x, weight, src, ptr)
            x = mlp(x, real)
        return x


class ColumnSum(nn.Module):
    r"""A network of each column, summed over the columns (their mean times ``n`` where they are sampled), [N, F]."""

    def __init__(
        self, network: RowNetwork | GIN, num_columns: int | None, tile: int | None, recompute: bool | None
    ) -> None:
        super().__init__()
        self.network, self.num_columns, self.tile, self.recompute = network, num_columns, tile, recompute
        self.together = any(isinstance(module, nn.BatchNorm1d) for module in network.modules())

    def forward(
        self, eigvecs: Tensor, filters: Tensor, ptr: Tensor, edge_index: Tensor, edge_weight: Tensor | None
    ) -> Tensor:
        """Eigenvectors [N, K] and filters [B, K, m] to [N, F]."""
        sampled = self.num_columns is not None and self.training
        if isinstance(self.network, RowNetwork) and self.network.mlp.plain and not sampled:  # what the op takes
            filters, bias = _folded(self.network.mlp, filters)
            linears = self.network.mlp.linears[bias is not None :]
            weights, biases = ([linear.get_parameter(name) for linear in linears] for name in ("weight", "bias"))
            return pair_mlp(eigvecs, filters, ptr, weights, biases, bias)
        recompute = self.recompute
        if self.together:
            recompute = False  # a batch norm counts what it sees
        elif recompute is None:
            recompute = self._states(ptr, sampled) * eigvecs.element_size() > KEPT.get(ptr.device.type, KEPT["cuda"])
        if isinstance(self.network, RowNetwork) and not sampled and not self.together:
            fn: nn.Module = self.network.mlp
            filters, bias = _folded(self.network.mlp, filters)
            if bias is not None:
                filters = torch.cat([filters, bias.expand(len(filters), 1, -1)], dim=1)
                eigvecs, fn = nn.functional.pad(eigvecs, (0, 1), value=1.0), _Rest(self.network.mlp)
            return spectral_filter(eigvecs, filters, ptr, fn, tile=self.tile, recompute=recompute)
        order = NodeOrder(ptr)
        num_nodes = eigvecs.size(0)
        index = order.renumbered(edge_index)
        edge_ptr, perm = csr_from_index(index[1], num_nodes)
        weight = eigvecs.new_ones(index.size(1)) if edge_weight is None else edge_weight.to(eigvecs.dtype)[perm]
        tensors = (order.nodes(eigvecs), order.graphs(filters), weight.view(-1, 1, 1))
        tiles = list(self._tiles(order, index[0, perm], edge_ptr, eigvecs.device, sampled))
        params = tuple(self.network.parameters())
        if not tiles:
            empty = filters.new_zeros(0, 1, filters.size(2))
            nothing: Tensor = self.network(empty, index[0], edge_ptr, tensors[2])
            return nothing.sum(1)
        return order.back(sum_tiles(tiles, tensors, params, num_nodes, recompute))

    def _states(self, ptr: Tensor, sampled: bool) -> int:
        """How many numbers of hidden states the gradient needs, about: what each layer, norm and activation returns."""
        count = ptr.diff()
        columns = count if not sampled else count.clamp(max=self.num_columns)
        pairs = int((count * columns).sum())
        if isinstance(self.network, RowNetwork) and not sampled:
            pairs //= 2
        return 3 * pairs * sum(m.out_features for m in self.network.modules() if isinstance(m, nn.Linear))

    def _tiles(
        self, order: NodeOrder, src: Tensor, edge_ptr: Tensor, device: torch.device, sampled: bool
    ) -> Iterator[Tile]:
        limit = self.num_columns if sampled and self.num_columns is not None else max(order.sizes, default=0)
        rows = self.tile or max(1, TILE_ROWS.get(device.type, TILE_ROWS["cuda"]) // self.network.width)
        if self.together:
            rows = len(order.sizes) * max(order.sizes, default=0) * limit
        for first, stop in groups(order.sizes, lambda n: n * min(n, limit), rows):
            nodes = slice(order.first[first], order.first[stop])
            edges = slice(*(int(edge_ptr[i]) for i in (nodes.start, nodes.stop)))
            near = src[edges] - nodes.start
            near_ptr = edge_ptr[nodes.start : nodes.stop + 1] - edges.start
            sizes = order.sizes[first:stop]
            columns, scale = _columns(sizes, limit, device, sampled)
            step = columns.size(1) if stop - first > 1 or self.together else max(1, rows // sizes[0])
            padding = Padding.of(sizes, device)
            for left in range(0, columns.size(1), step):
                run = _Columns(self.network, padding, columns[:, left : left + step], scale, near, near_ptr)
                yield Tile((nodes, slice(first, stop), edges), (nodes,), run)


def _columns(sizes: Sequence[int], limit: int, device: torch.device, sampled: bool) -> tuple[Tensor, Tensor | None]:
    """The columns of each graph [b, c], -1 where there are fewer, and by how much each is multiplied [b]."""
    count = torch.tensor(sizes, device=device).unsqueeze(1)
    local = torch.arange(sizes[-1], device=device).expand(len(sizes), -1)
    columns = torch.where(local < count, local, -1)
    if not sampled:
        return columns, None
    keys = torch.rand(columns.shape, device=device).masked_fill(columns < 0, 2.0)
    chosen = columns.gather(1, keys.argsort(1))[:, :limit]
    return chosen, count.squeeze(1) / count.squeeze(1).clamp(max=limit)


class _Columns:
    """Some columns of some graphs, summed."""

    def __init__(
        self,
        network: nn.Module,
        padding: Padding,
        columns: Tensor,
        scale: Tensor | None,
        src: Tensor,
        ptr: Tensor,
    ) -> None:
        self.network, self.padding, self.scale, self.src, self.ptr = network, padding, scale, src, ptr
        self.columns = columns.clamp(min=0)
        self.real: Tensor | None = None
        self.graph = torch.arange(len(columns), device=columns.device).unsqueeze(1)
        count = torch.tensor(padding.sizes, device=columns.device)
        self.owner = torch.arange(len(columns), device=columns.device).repeat_interleave(count)
        if padding.places is not None:
            self.real = (columns >= 0)[self.owner]

    def __call__(self, eigvecs: Tensor, filters: Tensor, weight: Tensor) -> Tensor:
        v = self.padding.fill(eigvecs)
        pairs = self.padding.take(block(v, v[self.graph, self.columns], filters))
        values = self.network(pairs, self.src, self.ptr, weight, self.real)
        if self.real is not None:
            values = values * self.real.unsqueeze(2)
        total: Tensor = values.sum(1)
        return total if self.scale is None else total * self.scale.to(total.dtype)[self.owner].unsqueeze(1)


class PairNetwork(nn.Module):
    """rho: a network of each column, the sum (mean) over columns, a linear layer; ``'deepsets'`` goes on from there."""

    def __init__(
        self,
        kind: str,
        in_channels: int,
        out_channels: int,
        hidden: int,
        num_layers: int,
        mlp_layers: int,
        norm: str | None,
        act: str,
        mean: bool,
        num_columns: int | None,
        tile: int | None,
        recompute: bool | None,
    ) -> None:
        super().__init__()
        self.mean = mean
        network: RowNetwork | GIN
        if kind == "gin":
            network = GIN(in_channels, hidden, num_layers, mlp_layers, norm, act)
        else:
            network = RowNetwork(in_channels, hidden, num_layers, norm, act)
        self.columns = ColumnSum(network, num_columns, tile, recompute)
        self.last = nn.Linear(network.width, hidden if kind == "deepsets" else out_channels)
        self.own: nn.Linear | None = None
        if kind == "deepsets":
            self.own = nn.Linear(in_channels, hidden, bias=False)
            self.act = activation(act)
            self.head = MLP([hidden, hidden, out_channels], norm, act)

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        for module in self.modules():
            if isinstance(module, GIN):
                for eps in module.eps:
                    nn.init.zeros_(eps)
            elif isinstance(module, nn.Linear | nn.LayerNorm | nn.BatchNorm1d):
                module.reset_parameters()

    def forward(
        self, eigvecs: Tensor, filters: Tensor, ptr: Tensor, edge_index: Tensor, edge_weight: Tensor | None
    ) -> Tensor:
        """Eigenvectors [N, K] and filters [B, K, m] to [N, out_channels]."""
        total = self.columns(eigvecs, filters, ptr, edge_index, edge_weight)
        count = ptr.diff()
        per_node = count.repeat_interleave(count, output_size=total.size(0)).unsqueeze(1).to(self.last.weight.dtype)
        out: Tensor
        if self.mean:
            out = self.last(total / per_node)
        else:
            out = nn.functional.linear(total, self.last.weight) + per_node * self.last.bias
        if self.own is None:
            return out
        graph = torch.arange(len(count), device=ptr.device).repeat_interleave(count, output_size=total.size(0))
        diagonal = torch.bmm(eigvecs.square().unsqueeze(1), filters[graph]).squeeze(1)
        head: Tensor = self.head(self.act(out + self.own(diagonal)))
        return head
