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
        return out.clone(memory_format=torch.contiguous_format) if out._is_view() else out

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
        torch.library.register_autograd(f"geo::{name}", backward, setup_context=setup_context, lib=LIBRARY)
