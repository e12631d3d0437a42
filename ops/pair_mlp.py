r"""An MLP of the filters of each pair of nodes, summed over the columns, as one op.

:func:`~geo.ops.spectral_filter` sums any function of :math:`W_{ij} = \sum_k V_{ik} z_{gk} V_{jk}` in tiles, layer by
layer. For ReLU layers the op here takes a few pairs through all of them before the next ones, and has its gradient
written out, which makes everything but the sums anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.gather_mul import check_one_device, promote, widen
from geo.ops.registration import define

_MOST_LAYERS = 63  # of the CUDA kernel, and so of all
_TILE = 1 << 12  # pairs that the plain-PyTorch kernels take at a time, about


def pair_mlp(
    eigvecs: Tensor,
    filters: Tensor,
    ptr: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    first_bias: Tensor | None = None,
) -> Tensor:
    r"""Sum over the columns of an MLP of the filters of all pairs of nodes of each graph.

    .. math:: out_i = \sum_j f(W_{ij}), \qquad W_{ij} = \sum_k V_{ik} z_{gk} V_{jk} \in \mathbb R^M

    for i, j in graph g, where f is linear layers with a ReLU behind each:
    :math:`f(x) = \sigma(A_L \cdots \sigma(A_1 x + a_1) \cdots + a_L)`, and with ``first_bias``
    :math:`f(\sigma(x + a_0))`: as W is linear in the filters, so may be a layer before the first, filters times its
    matrix, which is cheaper for few eigenvectors. Each pair is visited once for both of :math:`W_{ij} = W_{ji}`.

    Memory is that of the results and of some hundred pairs, and for the gradient up to 65 times that of the weights on
    the CPU. Results are bitwise the same on any number of threads. Second derivatives, of any order, run in plain
    PyTorch, in eager mode, and keep all pairs.
    Another f, with a norm or another activation, is for :func:`~geo.ops.spectral_filter`.

    Args:
        eigvecs: V, floating [N, K]; the nodes of a graph are neighbours. Columns of zeros do nothing.
        filters: z, floating [B, K, M].
        ptr: int64 [B + 1], the first node of each graph.
        weights: the matrices :math:`A_l` [:math:`F_l`, :math:`F_{l-1}`], with :math:`F_0 = M`; there may be none.
        biases: :math:`a_l` [:math:`F_l`].
        first_bias: :math:`a_0` [M]. (default: f begins with :math:`A_1`)

    Returns:
        [N, :math:`F_L`], in the common dtype of all arguments; float16 and bfloat16 are computed in float32.

    Raises:
        IndexError: ``ptr`` does not rise from 0 to N.
        ValueError: a wrong shape, dtype or device.

    Example:
        >>> import torch
        >>> from geo.ops import pair_mlp
        >>> eigvecs = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 1.0]])  # two graphs of two and one nodes
        >>> filters, ptr = torch.ones(2, 2, 1), torch.tensor([0, 2, 3])  # W is 5, 11, 11, 25 and 2
        >>> pair_mlp(eigvecs, filters, ptr, [torch.ones(1, 1)], [torch.tensor([-10.0])]).flatten().tolist()
        [1.0, 16.0, 0.0]
    """
    args, dtype = _prepare(eigvecs, filters, ptr, weights, biases, first_bias)
    checks = (("ptr", ptr, eigvecs.size(0)),)
    out: Tensor = bounds.call("pair_mlp", torch.ops.geo.pair_mlp, args, checks)
    return out.to(dtype)


def _prepare(
    eigvecs: Tensor,
    filters: Tensor,
    ptr: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    first_bias: Tensor | None,
) -> tuple[tuple[Any, ...], torch.dtype]:
    """What the op takes, and the dtype of the result."""
    if eigvecs.dim() != 2:
        raise ValueError(f"pair_mlp: eigvecs must be [N, K], got {list(eigvecs.shape)}")
    if ptr.dim() != 1 or ptr.size(0) < 1 or ptr.dtype != torch.int64:
        raise ValueError(f"pair_mlp: ptr must be int64 [B + 1], got {ptr.dtype} {list(ptr.shape)}")
    if filters.dim() != 3 or filters.size(0) != ptr.size(0) - 1 or filters.size(1) != eigvecs.size(1):
        raise ValueError(
            f"pair_mlp: filters must be [{ptr.size(0) - 1}, {eigvecs.size(1)}, M], got {list(filters.shape)}"
        )
    if len(weights) != len(biases):
        raise ValueError(f"pair_mlp: each layer has a weight and a bias, got {len(weights)} and {len(biases)}")
    if len(weights) > _MOST_LAYERS:
        raise ValueError(f"pair_mlp: weights must be of at most {_MOST_LAYERS} layers, got {len(weights)}")
    width, widths = filters.size(2), []
    if first_bias is not None and list(first_bias.shape) != [width]:
        raise ValueError(f"pair_mlp: first_bias must be [{width}], got {list(first_bias.shape)}")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() != 2 or weight.size(1) != width:
            raise ValueError(f"pair_mlp: weights[{i}] must be [F, {width}], got {list(weight.shape)}")
        width = weight.size(0)
        widths.append(width)
        if list(bias.shape) != [width]:
            raise ValueError(f"pair_mlp: biases[{i}] must be [{width}], got {list(bias.shape)}")
    first = () if first_bias is None else (first_bias,)
    layers = [*first, *(t for pair in zip(weights, biases, strict=True) for t in pair)]
    check_one_device(
        "pair_mlp", eigvecs=eigvecs, filters=filters, ptr=ptr, **{f"parameter {i}": t for i, t in enumerate(layers)}
    )
    given = promote(eigvecs, filters, *layers)
    eigvecs, filters, *params = map(widen, given)
    flat = torch.cat([p.flatten() for p in params]) if params else eigvecs.new_zeros(0)
    return (eigvecs, filters, ptr, flat, widths, first_bias is not None), given[0].dtype


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def pair_mlp_reference(
    eigvecs: Tensor,
    filters: Tensor,
    ptr: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    first_bias: Tensor | None = None,
) -> Tensor:
    """:func:`pair_mlp` graph by graph, the specification, also under torch.func; it stores all pairs."""
    args, dtype = _prepare(eigvecs, filters, ptr, weights, biases, first_bias)
    bounds.check_ptr("pair_mlp", ptr, eigvecs.size(0))
    out: Tensor = _plain(*args)
    return out.to(dtype)


def _in_full_precision(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Also under autocast: W does not depend on the basis up to rounding only."""

    @functools.wraps(kernel)
    def call(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return kernel(*args)

    return call


class _Layer(NamedTuple):
    """x to x @ weight + bias, and the ReLU of that."""

    weight: Tensor
    bias: Tensor | None
    relu: bool

    def __call__(self, x: Tensor) -> Tensor:
        x = x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)
        return x.relu() if self.relu else x


def _layers(
    params: Tensor, filters: Tensor, widths: Sequence[int], leading: bool
) -> tuple[Tensor | None, list[_Layer]]:
    """The first bias and the layers that lie one after the other in ``params``."""
    at, width, first, layers = 0, filters.size(2), None, []
    if leading:
        at, first = width, params[:width]
    for out in widths:
        weight, bias = params[at : at + out * width].view(out, width), params[at + out * width : at + out * (width + 1)]
        layers.append(_Layer(weight.t(), bias, True))
        at, width = at + out * (width + 1), out
    return first, layers


@_in_full_precision
def _plain(
    eigvecs: Tensor, filters: Tensor, ptr: Tensor, params: Tensor, widths: Sequence[int], leading: bool
) -> Tensor:
    first, layers = _layers(params, filters, widths, leading)
    out = []
    for v, z in zip(eigvecs.split(ptr.diff().tolist()), filters, strict=True):
        x = (v.unsqueeze(1) * v).flatten(0, 1)
        for layer in (_Layer(z, first, leading), *layers):
            x = layer(x)
        out.append(x.unflatten(0, (len(v), len(v))).sum(1))
    if not out:  # no graphs: no rows, but zero gradients for all
        inputs = eigvecs.sum() + filters.sum() + params.sum()
        return inputs * eigvecs.new_zeros(0, widths[-1] if widths else filters.size(2))
    return torch.cat(out)


# A tile is rows of a graph against its columns from the first of them on. The square on the diagonal holds both of each
# pair, what lies right of it one of them.
def _tiles(ptr: Tensor) -> Iterator[tuple[int, slice, slice]]:
    first = ptr.tolist()
    for graph, (top, stop) in enumerate(pairwise(first)):
        while top < stop:
            bottom = min(stop, top + max(1, _TILE // (stop - top)))
            yield graph, slice(top, bottom), slice(top, stop)
            top = bottom


def _states(x: Tensor, layers: Sequence[_Layer]) -> list[Tensor]:
    states = [x]
    for layer in layers:
        states.append(layer(states[-1]))
    return states


@_in_full_precision
def _kernel(
    eigvecs: Tensor, filters: Tensor, ptr: Tensor, params: Tensor, widths: Sequence[int], leading: bool
) -> Tensor:
    bounds.check_ptr("pair_mlp", ptr, eigvecs.size(0))
    first, layers = _layers(params, filters, widths, leading)
    out = eigvecs.new_zeros(eigvecs.size(0), widths[-1] if widths else filters.size(2))
    for graph, rows, columns in _tiles(ptr):
        v, w = eigvecs[rows], eigvecs[columns]
        x = (v.unsqueeze(1) * w).flatten(0, 1)
        values = _states(x, [_Layer(filters[graph], first, leading), *layers])[-1].view(len(v), len(w), -1)
        out[rows] += values.sum(1)
        out[rows.stop : columns.stop] += values[:, len(v) :].sum(0)
    return out


@_in_full_precision
def _backward_kernel(
    grad: Tensor,
    eigvecs: Tensor,
    filters: Tensor,
    ptr: Tensor,
    params: Tensor,
    widths: Sequence[int],
    leading: bool,
    need_eigvecs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds.check_ptr("pair_mlp", ptr, eigvecs.size(0))
    first, layers = _layers(params, filters, widths, leading)
    by_eigvecs = torch.zeros_like(eigvecs) if need_eigvecs else eigvecs.new_zeros(0)
    by_filters, by_params = torch.zeros_like(filters), torch.zeros_like(params)
    for graph, rows, columns in _tiles(ptr):
        v, w = eigvecs[rows], eigvecs[columns]
        network = [_Layer(filters[graph], first, leading), *layers]
        states = _states((v.unsqueeze(1) * w).flatten(0, 1), network)
        right = grad[columns].clone()
        right[: len(v)] = 0
        g = (grad[rows].unsqueeze(1) + right).flatten(0, 1)
        found: list[Tensor] = []
        for x, layer, y in zip(states[-2::-1], network[::-1], states[:0:-1], strict=True):
            g = torch.where(y <= 0, 0, g) if layer.relu else g
            found = [x.t() @ g, g.sum(0), *found]
            g = g @ layer.weight.t() if need_eigvecs or layer is not network[0] else g
        by_filters[graph] += found[0]
        if len(params):
            by_params += torch.cat([t.t().flatten() for t in found[1 if leading else 2 :]])
        if need_eigvecs:
            g = g.view(len(v), len(w), -1)
            by_eigvecs[rows] += (g * w).sum(1)
            by_eigvecs[columns] += (g * v.unsqueeze(1)).sum(0)
    return by_eigvecs, by_filters, by_params


# -- shapes ------------------------------------------------------------------------------------------------------------
def _check_shapes(eigvecs: Tensor, filters: Tensor, ptr: Tensor, params: Tensor) -> None:
    torch._check(eigvecs.dim() == 2 and filters.dim() == 3 and ptr.dim() == 1 and params.dim() == 1)
    torch._check(filters.size(1) == eigvecs.size(1))
    torch._check(ptr.size(0) == filters.size(0) + 1)


def _fake(
    eigvecs: Tensor, filters: Tensor, ptr: Tensor, params: Tensor, widths: Sequence[int], leading: bool
) -> Tensor:
    _check_shapes(eigvecs, filters, ptr, params)
    return eigvecs.new_empty(eigvecs.size(0), widths[-1] if widths else filters.size(2))


def _backward_fake(
    grad: Tensor,
    eigvecs: Tensor,
    filters: Tensor,
    ptr: Tensor,
    params: Tensor,
    widths: Sequence[int],
    leading: bool,
    need_eigvecs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_shapes(eigvecs, filters, ptr, params)
    by_eigvecs = eigvecs.new_empty(eigvecs.shape if need_eigvecs else 0)
    return by_eigvecs, filters.new_empty(filters.shape), params.new_empty(params.shape)


# -- gradients ---------------------------------------------------------------------------------------------------------
def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.flags = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad[0]
    by_eigvecs, by_filters, by_params = torch.ops.geo.pair_mlp_backward(grad, *ctx.saved_tensors, *ctx.flags, need)
    return by_eigvecs if need else None, by_filters, None, by_params, None, None


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.flags = inputs[5:7]


def _backward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """By autograd, of the plain forward; that is differentiable itself, hence derivatives of any order."""
    again = torch.is_grad_enabled()
    saved = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [
            t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_()
            for t in saved
            if t.is_floating_point()
        ]
        g, eigvecs, filters, params = leaves
        out = _plain(eigvecs, filters, saved[3], params, *ctx.flags)
        first = torch.autograd.grad(out, leaves[1:], g, create_graph=True, materialize_grads=True)
        pairs = [(f, t) for f, t in zip(first, grads, strict=True) if t is not None and f.requires_grad]
    second: Sequence[Tensor | None] = [None] * 4
    if pairs:
        second = torch.autograd.grad(
            [f for f, _ in pairs], leaves, [t for _, t in pairs], create_graph=again, allow_unused=True
        )
    by_grad, by_eigvecs, by_filters, by_params = second
    return by_grad, by_eigvecs, by_filters, None, by_params, None, None, None


# All floating tensors are float32, or all float64. `params` is the first bias, where `leading` says that there is one,
# then weight and bias of each layer; `widths` are the layers' outputs. Eigenvectors without need get an empty gradient.
define(
    "pair_mlp(Tensor eigvecs, Tensor filters, Tensor ptr, Tensor params, int[] widths, bool leading) -> Tensor",
    _kernel,
    _fake,
    _backward,
    _setup,
)
define(
    "pair_mlp_backward(Tensor grad, Tensor eigvecs, Tensor filters, Tensor ptr, Tensor params, int[] widths, "
    "bool leading, bool need_eigvecs) -> (Tensor deigvecs, Tensor dfilters, Tensor dparams)",
    _backward_kernel,
    _backward_fake,
    _backward_backward,
    _backward_setup,
)
