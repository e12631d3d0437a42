r"""Products of functions on the sphere, on their coefficients: the pointwise product and the Poisson bracket.

Coefficients belong to real spherical harmonics :math:`Y_{lm}` with mean square 1 (e3nn's ``'component'``), in e3nn's
order :math:`l^2 + l + m` and axes (polar axis y). With :math:`\langle\cdot\rangle` the mean over the sphere,

.. math::
    T(x, y, g) = \langle f_x \, f_y \, f_g \rangle \quad\text{or}\quad \langle \{f_x, f_y\} \, f_g \rangle, \qquad
    \{f, h\}(u) = u \cdot (\nabla f \times \nabla h)

``geo::gaunt_product`` is the derivative of T in one slot. T keeps its value when the slots turn in a circle (the
bracket too: by parts), so the op is closed under differentiation: each gradient is the op with its slots turned.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.registration import define

METHODS = ("auto", "sparse", "grid", "separable")
_LMAX_SPARSE = 12
LMAX = 64  # of an operand: beyond, sectoral harmonics near the poles leave the range of float64


def gaunt_product(
    x: Tensor,
    y: Tensor,
    lmax_out: int | None = None,
    bracket: bool = False,
    scale_x: Tensor | None = None,
    scale_y: Tensor | None = None,
    scale_out: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    r"""Coefficients of the product, or of the Poisson bracket, of functions on the sphere.

    .. math::
        \text{out}_k = c_{l_k} \sum_{ij} \langle Y_i Y_j Y_k \rangle \, (a_{l_i} x_i) (b_{l_j} y_j)

    with :math:`\langle \{Y_i, Y_j\} Y_k \rangle` for the bracket. The product has the couplings with
    :math:`l_1 + l_2 + l_3` even ("Gaunt products", https://arxiv.org/abs/2401.10216), the bracket exactly those with
    an odd sum. Differentiable any number of times, by the same op.

    Args:
        x: Coefficients, [..., (L1+1)^2, C].
        y: Coefficients, [..., (L2+1)^2, C]; either operand may have one channel, which then meets all of the other.
        lmax_out: Highest degree of the output. (default: L1 + L2, which loses nothing)
        bracket: Take the Poisson bracket. (default: ``False``)
        scale_x: Factor of each degree of ``x``, [..., L1+1, C] or with one channel. (default: 1)
        scale_y: Factor of each degree of ``y``, [..., L2+1, C] or with one channel. (default: 1)
        scale_out: Factor of each degree of the output, [..., lmax_out+1, C] or with one channel. (default: 1)
        method: ``'sparse'`` sums over the nonzero coefficients (up to degree 12), ``'grid'`` multiplies on a grid that
            integrates exactly, by matrix products of PyTorch, ``'separable'`` goes to the polar angles and multiplies
            Fourier series there, ``'auto'`` chooses, see :func:`geo.ops.gaunt.auto_method`: the same numbers up to
            rounding. (default: ``'auto'``)

    Returns:
        out: [..., (lmax_out+1)^2, C] in the promoted dtype; 16-bit types compute in float32.

    Raises:
        ValueError: Shapes that do not fit together, an unknown method, a degree above 64, or above 12 with
            ``'sparse'``.
        TypeError: Tensors that are not floating point.

    Example:
        >>> import torch
        >>> from geo.ops import gaunt_product
        >>> gaunt_product(torch.randn(5, 9, 8), torch.randn(5, 4, 8), lmax_out=2).shape
        torch.Size([5, 9, 8])
    """
    operands, sizes, lead = _prepare(x, y, lmax_out, scale_x, scale_y, scale_out)
    check_method(method, sizes[:3])
    op, rest = _op(method)
    out: Tensor = bounds.call("gaunt_product", op, (*operands, *sizes, bool(bracket), *rest))
    return out if len(lead) == 1 else out.view(*lead, *out.shape[1:])


def _prepare(
    x: Tensor, y: Tensor, lmax_out: int | None, *scales: Tensor | None
) -> tuple[list[Tensor | None], tuple[int, int, int, int], torch.Size]:
    """The operands as [R, d, C] in one dtype, the sizes (L1, L2, L3, C), and the leading shape."""
    for name, tensor in (("x", x), ("y", y)):
        if tensor.dim() < 2:
            raise ValueError(f"{name}: expected [..., (L+1)^2, C], got shape {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    lmax1, lmax2 = _lmax("x", x), _lmax("y", y)
    lmax3 = lmax1 + lmax2 if lmax_out is None else lmax_out
    if not 0 <= lmax3 <= 2 * LMAX:
        raise ValueError(f"lmax_out is {lmax_out}, but must lie in [0, {2 * LMAX}]")
    tensors = [x, y]
    for name, scale, lmax in zip(("scale_x", "scale_y", "scale_out"), scales, (lmax1, lmax2, lmax3), strict=True):
        if scale is None:
            continue
        if scale.dim() < 2 or scale.size(-2) != lmax + 1:
            raise ValueError(f"{name}: expected [..., {lmax + 1}, C], one row a degree, got {list(scale.shape)}")
        if not scale.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {scale.dtype}")
        tensors.append(scale)
    channels = _channels(tensors)
    lead, dtype = x.shape[:-2], x.dtype
    if any(t.shape[:-2] != lead for t in tensors):
        try:
            lead = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))
        except RuntimeError:
            shapes = ", ".join(str(list(t.shape)) for t in tensors)
            raise ValueError(f"the axes before the last two do not broadcast: {shapes}") from None
    if any(t.dtype != dtype for t in tensors):
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    rows = math.prod(lead)

    def flat(t: Tensor | None, shared: bool) -> Tensor | None:
        if t is None:
            return None
        t = t if t.dtype == dtype else t.to(dtype)
        if t.dim() == 3 and len(lead) == 1 and (t.size(0) == rows or (shared and t.size(0) == 1)):
            return t
        if shared and math.prod(t.shape[:-2]) == 1:
            return t.reshape(1, *t.shape[-2:])
        return t.expand(*lead, *t.shape[-2:]).reshape(rows, *t.shape[-2:])

    operands = [flat(x, False), flat(y, False), *(flat(s, True) for s in scales)]
    return operands, (lmax1, lmax2, lmax3, channels), lead


def _lmax(name: str, tensor: Tensor) -> int:
    size = tensor.size(-2)
    for lmax in range(LMAX + 1):  # not by isqrt, which torch.compile does not take of a symbol
        if size == (lmax + 1) ** 2:
            return lmax
    raise ValueError(
        f"{name}: expected [..., (L+1)^2, C] with L in [0, {LMAX}], got shape {list(tensor.shape)}, "
        f"where {size} is no such square"
    )


def _channels(tensors: Sequence[Tensor]) -> int:
    """The number of channels of tensors that all have it, or one."""
    found = 1
    for tensor in tensors:
        size = tensor.size(-1)
        if size != 1 and found not in (1, size):
            raise ValueError(f"operands have {found} and {size} channels: they must agree or be one")
        found = size if size != 1 else found
    return found


def check_method(method: str, lmax: tuple[int, int, int]) -> None:
    """Raise ValueError for a method that is none, or that these degrees are too high for."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(map(repr, METHODS))}")
    if method == "sparse" and max(lmax) > _LMAX_SPARSE:
        raise ValueError(f"method 'sparse' lists the couplings of degrees up to {_LMAX_SPARSE}, got {max(lmax)}")


def _op(method: str) -> tuple[Any, tuple[str, ...]]:
    """The op of a method and its last arguments: matrix products are PyTorch's on every device, hence no kernels."""
    return (torch.ops.geo.gaunt_product_grid, ()) if method == "grid" else (torch.ops.geo.gaunt_product, (method,))


# -- tables ------------------------------------------------------------------------------------------------------------
# Built in float64 on a Gauss-Legendre x uniform grid that integrates the product exactly; cast where they are used.
# geo.o3.SphereGrid writes the same harmonics down for its users: this room imports torch alone, and a test compares.
_FIELDS = {False: (("value",), ("value",)), True: (("theta", "phi"), ("phi", "-theta"))}


def _angles(degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of the polar angle, weights that sum to one, azimuths: exact to ``degree``."""
    n = degree // 2 + 1
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()
    cosine, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))  # Golub and Welsch
    azimuth = torch.arange(degree + 1, dtype=torch.float64) * (2 * math.pi / (degree + 1))
    return cosine, vectors[0].square(), azimuth


def _polar(lmax: int, cosine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised Legendre functions N[b, m, l], their derivative in the polar angle, and N / sin."""
    sine = (1 - cosine * cosine).sqrt()
    value = cosine.new_zeros(len(cosine), lmax + 1, lmax + 1)
    slope = torch.zeros_like(value)
    for m in range(lmax + 1):
        value[:, m, m] = value[:, m - 1, m - 1] * sine * math.sqrt((2 * m + 1) / (2 * m)) if m else 1.0
        for l in range(m, lmax + 1):
            below = value[:, m, l - 1] if l > m else torch.zeros_like(cosine)
            if l > m:
                two = (
                    value[:, m, l - 2] * math.sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1)) if l > m + 1 else 0
                )
                value[:, m, l] = math.sqrt((4 * l * l - 1) / (l * l - m * m)) * (cosine * below - two)
            down = math.sqrt((2 * l + 1) / (2 * l - 1) * (l * l - m * m)) if l else 0.0
            slope[:, m, l] = (l * cosine * value[:, m, l] - down * below) / sine
    return value, slope, value / sine[:, None, None]


@functools.lru_cache(maxsize=256)
def _factors(lmax: int, degree: int, field: str) -> tuple[Tensor, Tensor]:
    """``field`` of every harmonic as polar[b, m, l] times azimuthal[a, m], m from -lmax to lmax."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), torch._C._DisableFuncTorch():
        cosine, weight, azimuth = _angles(degree)
        value, slope, over_sine = _polar(lmax, cosine)
        m = torch.arange(-lmax, lmax + 1)
        turn = azimuth[:, None] * m.abs()
        root = torch.where(m == 0, 1.0, 2.0).double().sqrt()
        trig = torch.where(m < 0, turn.sin(), turn.cos()) * root
        if field == "phi":  # along the azimuth
            polar, trig = over_sine, torch.where(m < 0, turn.cos(), -turn.sin()) * root * m.abs()
        else:
            polar = {"value": value, "weighted": value * weight[:, None, None] / len(azimuth)}.get(field, slope)
            polar = -polar if field == "-theta" else polar
        return polar[:, m.abs()].contiguous(), trig.contiguous()


def _slots(lmax: tuple[int, int, int], bracket: bool) -> list[list[tuple[Tensor, Tensor]]]:
    """For x, y and the output: the fields that are evaluated. T sums the products of the first, second, ... of each."""
    fields = (*_FIELDS[bracket], ("weighted",) * (2 if bracket else 1))
    return [[_factors(top, sum(lmax), name) for name in names] for top, names in zip(lmax, fields, strict=True)]


@functools.lru_cache(maxsize=64)
def _matrices(lmax: tuple[int, int, int], bracket: bool, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A, B, C [N, d] with T = sum_n (A x)_n (B y)_n (C g)_n; the bracket has each node twice, for its two terms."""

    def matrix(polar: Tensor, trig: Tensor) -> Tensor:
        lmax = polar.size(2) - 1
        blocks = [
            polar[:, None, lmax - l : lmax + l + 1, l] * trig[None, :, lmax - l : lmax + l + 1] for l in range(lmax + 1)
        ]
        return torch.cat(blocks, 2).flatten(0, 1)

    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
        return [torch.cat([matrix(*f) for f in slot]).to(device, dtype) for slot in _slots(lmax, bracket)]


@functools.lru_cache(maxsize=64)
def _nonzeros(
    lmax: tuple[int, int, int], bracket: bool, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each i, the (j, k, coefficient) of its couplings; all are of order one, and the others exactly zero."""
    a, b, c = _matrices(lmax, bracket, torch.float64, torch.device("cpu"))
    found = []
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
        for i in range(a.size(1)):
            couplings = (a[:, i, None] * b).t() @ c
            j, k = (couplings.abs() > 1e-9).nonzero(as_tuple=True)
            found.append((j.to(device), k.to(device), couplings[j, k, None].to(device, dtype)))
    return found


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def gaunt_product_reference(
    x: Tensor,
    y: Tensor,
    lmax_out: int | None = None,
    bracket: bool = False,
    scale_x: Tensor | None = None,
    scale_y: Tensor | None = None,
    scale_out: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """:func:`gaunt_product` by matrix products: the specification, also under torch.func."""
    operands, sizes, lead = _prepare(x, y, lmax_out, scale_x, scale_y, scale_out)
    check_method(method, sizes[:3])
    out = _kernel(*operands, *sizes, bool(bracket), method)  # type: ignore[call-arg, arg-type]
    return out if len(lead) == 1 else out.view(*lead, *out.shape[1:])


def _kernel(
    x: Tensor,
    y: Tensor,
    scale_x: Tensor | None,
    scale_y: Tensor | None,
    scale_out: Tensor | None,
    lmax_x: int,
    lmax_y: int,
    lmax_out: int,
    channels: int,
    bracket: bool,
    method: str = "grid",
) -> Tensor:
    dtype, lmax = x.dtype, (lmax_x, lmax_y, lmax_out)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    if method == "auto":
        method = _auto(x, *lmax, bracket)
    product = {"grid": _by_grid, "sparse": _by_nonzeros, "separable": _by_angles}[method]
    with torch.autocast(x.device.type, enabled=False):  # a 16-bit grid would cost the symmetry
        out = product(_scaled(x.to(wide), scale_x), _scaled(y.to(wide), scale_y), lmax, bracket)
    out = _scaled(out, scale_out)
    if channels == 1 and out.size(2) != 1:
        out = out.sum(2, keepdim=True)
    return out.expand(-1, -1, channels).to(dtype).contiguous()


def _by_grid(x: Tensor, y: Tensor, lmax: tuple[int, int, int], bracket: bool) -> Tensor:
    a, b, c = _matrices(lmax, bracket, x.dtype, x.device)
    return torch.matmul(c.t(), torch.matmul(a, x) * torch.matmul(b, y))


def _by_nonzeros(x: Tensor, y: Tensor, lmax: tuple[int, int, int], bracket: bool) -> Tensor:
    out = x.new_zeros(x.size(0), (lmax[2] + 1) ** 2, _channels((x, y)))
    for i, (j, k, coefficient) in enumerate(_nonzeros(lmax, bracket, x.dtype, x.device)):
        terms = x[:, i, None] * (y[:, j] * coefficient)
        out = out.index_add(1, k, terms)
    return out


def _by_angles(x: Tensor, y: Tensor, lmax: tuple[int, int, int], bracket: bool) -> Tensor:
    """To the grid by the polar angle at each m, then by the azimuth; back in the other order."""
    slots = [[(p.to(x), t.to(x)) for p, t in slot] for slot in _slots(lmax, bracket)]
    padded = [_pad(t, top) for t, top in zip((x, y), lmax[:2], strict=True)]
    total: Tensor | None = None
    for first, second, (polar, trig) in zip(*slots, strict=True):
        f, h = (
            torch.einsum("am,rmbc->rabc", t, torch.einsum("bml,rmlc->rmbc", p, v))
            for v, (p, t) in zip(padded, (first, second), strict=True)
        )
        back = torch.einsum("bml,rmbc->rlmc", polar, torch.einsum("am,rabc->rmbc", trig, f * h))
        total = back if total is None else total + back
    assert total is not None
    top = lmax[2]
    return torch.cat([total[:, l, top - l : top + l + 1] for l in range(top + 1)], 1)


def _pad(x: Tensor, lmax: int) -> Tensor:
    """[R, (L+1)^2, C] as [R, m, l, C], zero where m exceeds l."""
    columns = [torch.nn.functional.pad(x[:, l * l : (l + 1) ** 2], (0, 0, lmax - l, lmax - l)) for l in range(lmax + 1)]
    return torch.stack(columns, 2)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """``x`` with each degree times its row of ``scale``."""
    return x if scale is None else x * _spread(scale.to(x.dtype))


def _spread(scale: Tensor) -> Tensor:
    """Rows [R, L+1, C] repeated for the 2l+1 components of each degree."""
    return torch.cat([scale[:, l : l + 1].expand(-1, 2 * l + 1, -1) for l in range(scale.size(1))], 1)


# -- shapes ------------------------------------------------------------------------------------------------------------
def _fake(
    x: Tensor,
    y: Tensor,
    scale_x: Tensor | None,
    scale_y: Tensor | None,
    scale_out: Tensor | None,
    lmax_x: int,
    lmax_y: int,
    lmax_out: int,
    channels: int,
    bracket: bool,
    method: str = "grid",
) -> Tensor:
    torch._check(x.dim() == 3 and y.dim() == 3)
    torch._check(x.size(0) == y.size(0))
    torch._check(x.size(1) == (lmax_x + 1) ** 2 and y.size(1) == (lmax_y + 1) ** 2)
    for scale, lmax in ((scale_x, lmax_x), (scale_y, lmax_y), (scale_out, lmax_out)):
        torch._check(scale is None or (scale.dim() == 3 and scale.size(1) == lmax + 1))
    return x.new_empty((x.size(0), (lmax_out + 1) ** 2, channels))


# -- gradients ---------------------------------------------------------------------------------------------------------
def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:10]
    ctx.method = inputs[10] if len(inputs) > 10 else "grid"


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *scales = ctx.saved_tensors
    *lmax, _, bracket = ctx.options
    _, rest = _op(ctx.method)
    grads = gradients([x, y, g], scales, lmax, bracket, ctx.method, ctx.needs_input_grad)
    return (*grads, *(None,) * (5 + len(rest)))


def gradients(
    slots: list[Tensor],
    scales: list[Tensor | None],
    lmax: list[int],
    bracket: bool,
    method: str,
    need: Sequence[bool],
) -> list[Tensor | None]:
    """Of x, y and the scales, where needed; the slots are those and the gradient of the output."""
    op, rest = _op(method)
    d_slots: list[Tensor | None] = [None, None, None]
    d_scales: list[Tensor | None] = [None, None, None]
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        scale = scales[i]
        need_slot, need_scale = i < 2 and need[i], scale is not None and need[2 + i]
        arguments = (slots[j], slots[k], scales[j], scales[k])
        options = (lmax[j], lmax[k], lmax[i])
        if scale is not None and need_scale:
            full = _channels([t for t in (*arguments, slots[i]) if t is not None])
            raw = op(*arguments, None, *options, full, bracket, *rest)
            d_scales[i] = _reduced(_degree_sums(raw * slots[i], lmax[i]), scale)
            if need_slot:
                d_slots[i] = _reduced(raw * _spread(scale), slots[i])
        elif need_slot:
            d_slots[i] = op(*arguments, scale, *options, slots[i].size(2), bracket, *rest)
    return [*d_slots[:2], *d_scales]


def _degree_sums(x: Tensor, lmax: int) -> Tensor:
    return torch.stack([x[:, l * l : (l + 1) ** 2].sum(1) for l in range(lmax + 1)], 1)


def _reduced(gradient: Tensor, like: Tensor) -> Tensor:
    """Summed over the rows and channels that ``like`` has one of, spread over the channels it has more of."""
    if like.size(0) == 1 and gradient.size(0) != 1:
        gradient = gradient.sum(0, keepdim=True)
    if like.size(2) == 1 and gradient.size(2) != 1:
        gradient = gradient.sum(2, keepdim=True)
    return gradient.expand(-1, -1, like.size(2))


_ARGUMENTS = (
    "(Tensor x, Tensor y, Tensor? scale_x, Tensor? scale_y, Tensor? scale_out, int lmax_x, int lmax_y, int lmax_out, "
    "int channels, bool bracket"
)
define(f"gaunt_product{_ARGUMENTS}, str method) -> Tensor", _kernel, _fake, _backward, _setup)
define(f"gaunt_product_grid{_ARGUMENTS}) -> Tensor", _kernel, _fake, _backward, _setup)


# -- the choice of 'auto' ----------------------------------------------------------------------------------------------
def auto_method(like: Tensor, lmax_x: int, lmax_y: int, lmax_out: int, bracket: bool = False) -> str:
    """What ``method='auto'`` means for tensors on the device of ``like``: the faster one as measured on a CPU.

    On CUDA straight kernels where there are any, else the separable form: a guess.

    Args:
        like: Any tensor on the device.
        lmax_x: Degree of the first operand.
        lmax_y: Degree of the second operand.
        lmax_out: Degree of the output.
        bracket: For the Poisson bracket. (default: ``False``)

    Returns:
        One of ``'sparse'``, ``'grid'`` and ``'separable'``.

    Example:
        >>> import torch
        >>> from geo.ops.gaunt import auto_method
        >>> auto_method(torch.empty(0), 1, 1, 1)
        'sparse'
    """
    method: str = torch.ops.geo.gaunt_auto(like, lmax_x, lmax_y, lmax_out, bracket)
    return method


def _auto(like: Tensor, lmax_x: int, lmax_y: int, lmax_out: int, bracket: bool) -> str:
    """Without compiled kernels matrix products win from degree 2 on, and the separable form never."""
    return "sparse" if max(lmax_x, lmax_y) <= 1 else "grid"


define("gaunt_auto(Tensor like, int lmax_x, int lmax_y, int lmax_out, bool bracket) -> str", _auto, _auto)
