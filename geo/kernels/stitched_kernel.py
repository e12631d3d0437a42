"""Products of estimated kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from geo.kernels.grf_kernel import GRFKernel


class StitchedKernel:
    r"""A product of kernels :math:`\hat K_1 \hat K_2 \cdots`, each estimated from walks of its own; for products alone.

    ``exp(tW)`` over long distances needs long walks, whose loads vary much; the product of four estimates of
    ``exp(tW/4)`` needs short ones. The walks of the factors must be independent: sample each anew.

    Args:
        kernels: The factors, of one shape; also anything else with ``shape`` and ``@``.

    Raises:
        ValueError: No factors, or factors of several shapes.

    Example:
        >>> import torch
        >>> from geo.kernels import GRFKernel, StitchedKernel, heat
        >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> kernel = StitchedKernel([GRFKernel(edge_index, heat(t=0.5)) for _ in range(2)])  # heat(t=1.0)
        >>> (kernel @ torch.ones(3)).shape
        torch.Size([3])
    """

    def __init__(self, kernels: Sequence[GRFKernel]) -> None:
        if not kernels:
            raise ValueError("kernels: expected at least one factor, got none")
        if len({kernel.shape for kernel in kernels}) > 1:
            raise ValueError(f"kernels: expected factors of one shape, got {[kernel.shape for kernel in kernels]}")
        self.kernels = tuple(kernels)
        self.shape = kernels[0].shape

    def __matmul__(self, other: Tensor) -> Tensor:
        """The product with V [N, ...]."""
        for kernel in reversed(self.kernels):
            other = kernel @ other
        return other

    def __repr__(self) -> str:
        return f"StitchedKernel({list(self.kernels)})"
