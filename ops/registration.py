"""One call registers an op: schema, plain-PyTorch kernel, shapes and gradient.

The plain-PyTorch kernel is registered for the alias key ``CompositeExplicitAutograd``; the compiled kernels register
themselves for CPU and CUDA and win over it wherever they are loaded. So each op exists and works without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("geo", "FRAGMENT")  # kept alive: it owns the registrations
_TAGS = (torch.Tag.pt2_compliant_tag,)


def _owned(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, with views among its results copied: autograd lets nobody write to a view that an op returned."""

    def own(out: Any) -> Any:
        if not isinstance(out, torch.Tensor) or not out._is_view():
            return out
        return out.clone(memory_format=torch.contiguous_format)

    def call(*args: Any) -> Any:
        out = kernel(*args)
        return tuple(map(own, out)) if isinstance(out, tuple) else own(out)

    return call


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define ``geo::<schema>`` with its PyTorch kernel, its fake (shapes only) and, where it has one, its gradient."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.impl(name, _owned(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"geo::{name}", fake, lib=LIBRARY)
    if backward is not None:
        assert setup_context is not None
        function = _function(getattr(torch.ops.geo, name).default, backward, setup_context)
        LIBRARY.impl(name, function, "Autograd", with_keyset=True)


def _function(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
    """What ``torch.library.register_autograd`` makes, for ops without defaults or keywords; it saves 10 us a call."""
    below, after = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        with below():
            out = op.redispatch(keyset & after, *inputs)
        setup_context(ctx, inputs, out)
        return out

    def backward_(ctx: Any, *grads: Any) -> Any:
        return (*backward(ctx, *grads), None)

    name = f"GeneratedBackwardFor_geo_{op._opname}"
    function: Any = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward_)}
    )

    def call(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        with below():
            return op.redispatch(keyset & after, *args)

    return call
