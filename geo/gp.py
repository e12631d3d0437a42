"""Gaussian processes on the nodes of a graph, matrix-free on graph random features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn

from geo.kernels import GRFKernel, SparseFeatures

_BLOCK = 1 << 24  # numbers of a dense block of right-hand sides
_EXACT = 1024  # nodes up to which predict() takes exact variances
_SAMPLES = 256  # in whose place it takes so many samples


class Solution(NamedTuple):
    """What :func:`conjugate_gradients` returns."""

    x: Tensor  # [n, k]
    diagonal: Tensor  # [steps, k], of the tridiagonal matrix of Lanczos that starts at each right-hand side
    off_diagonal: Tensor  # [steps, k]; the last row leads out of the matrix
    residual: Tensor  # [k], |b - A x| / |b|


class GraphGP(nn.Module):
    r"""Gaussian process on the nodes of a graph, in time linear in the size of its random features.

    As in "Graph Random Features for Scalable Gaussian Processes" (https://arxiv.org/abs/2509.03691), the kernel is that
    of one set of walks, which is positive semi-definite as it stands,

    .. math::
        y = g(x) + \mu + \epsilon, \qquad g \sim \mathcal N(0, K), \qquad K = \sigma^2 c \, \Phi \Phi^\top, \qquad
        \epsilon \sim \mathcal N(0, s^2)

    with :math:`\Phi` sparse and :math:`c` the constant of the kernel. Nothing of size nodes by nodes is formed: systems
    are solved by conjugate gradients on :math:`\Phi (\Phi^\top v)`, the log-determinant is that of stochastic Lanczos
    quadrature with the same iterations, its gradient a stochastic trace, and samples are pathwise,

    .. math::
        g_* + K_{*x} (K_{xx} + s^2)^{-1} (y - \mu - g_x - s \, \epsilon_2), \qquad g = \sigma \sqrt c \, \Phi \epsilon_1

    The number of iterations grows as the root of the condition number, at most that of :math:`|\Phi|^2 / s^2`. All is
    computed in float64, on the kernel's device: in float32 the conjugate gradients of ill-conditioned kernels stall.
    The mean takes one solve for each output, the exact variance one for each node asked for, a sample one.

    Targets are real. Several outputs share kernel and noise and are independent; classification is regression on
    one-hot labels, and nothing beyond it.

    Args:
        kernel: A :class:`geo.kernels.GRFKernel`, of which the first set of walks is used (``two_sets=False`` samples no
            other, and ``symmetrise`` is not needed), or the :class:`geo.kernels.SparseFeatures` of all nodes.
        modulation: Called without arguments for the modulation f, such as a :class:`geo.nn.LearnableModulation`, whose
            parameters and constant, ``scale()``, then are those of the process; only for a GRFKernel. It is taken as it
            is: one that was trained on another graph stays trained. (default: that of the series)
        noise: :math:`s^2`, learned. (default: ``0.1``)
        scale: :math:`\sigma^2`, learned. (default: ``1.0``)
        mean: ``'constant'``, the mean of the targets of each output, or ``'zero'``. (default: ``'constant'``)
        tol: Of residuals, relative to right-hand sides. (default: ``1e-8``)
        max_iter: Most iterations of a solve; one that ends there warns. (default: ``10000``)

    Shapes:
        Targets y :math:`(n)` or :math:`(n, T)` at nodes :math:`(n)`; NaN where one is missing.

    Symmetry and derivatives:
        Equivariant to node permutation with the features given. :meth:`log_marginal_likelihood` is differentiable, once
        and with an unbiased estimate, by ``noise``, ``scale``, the parameters of the modulation, and the values of
        given features.

    Raises:
        ValueError: An unknown option, a kernel that is not symmetric and positive semi-definite, features or targets
            that are not finite, or targets that do not fit.

    Example:
        >>> import torch
        >>> from geo.kernels import GRFKernel, heat
        >>> ring = torch.stack((torch.arange(20), (torch.arange(20) + 1) % 20))
        >>> kernel = GRFKernel(torch.cat((ring, ring.flip(0)), 1), heat(4.0), two_sets=False)
        >>> gp = GraphGP(kernel, noise=0.01)
        >>> seen = torch.arange(0, 20, 2)
        >>> losses = gp.fit(seen, torch.sin(seen * torch.pi / 10), steps=5)
        >>> mean, variance = gp.predict()
        >>> mean.shape, gp.sample(3).shape
        (torch.Size([20]), torch.Size([3, 20]))
        >>> torch.equal(gp.predict(return_var=False), mean)
        True
    """

    def __init__(
        self,
        kernel: GRFKernel | SparseFeatures,
        modulation: Callable[[], Tensor] | None = None,
        noise: float = 0.1,
        scale: float = 1.0,
        mean: str = "constant",
        tol: float = 1e-8,
        max_iter: int = 10000,
    ) -> None:
        super().__init__()
        for name, value in (("noise", noise), ("scale", scale), ("tol", tol), ("max_iter", max_iter)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}, but must be positive and finite")
        if mean not in ("constant", "zero"):
            raise ValueError(f"mean is {mean!r}, but must be 'constant' or 'zero'")
        if modulation is not None and isinstance(kernel, SparseFeatures):
            raise ValueError("modulation is given with features, which have theirs: give a GRFKernel in their place")
        if not isinstance(kernel, SparseFeatures):
            series = kernel.series
            if kernel.directed or series.conjugate is not None or not torch.equal(*series.modulations(16)):
                raise ValueError(
                    f"kernel is {kernel!r}, but must be symmetric: on an undirected graph, and of a series with one "
                    "modulation, such as heat(1.0)"
                )
            if kernel.debias_diag:
                raise ValueError(
                    f"kernel is {kernel!r} with debias_diag=True, which may have negative eigenvalues: build it with "
                    "debias_diag=False"
                )
        self.kernel, self.modulation, self.mean = kernel, modulation, mean
        self.tol, self.max_iter = float(tol), int(max_iter)
        self._start = (math.log(noise), math.log(scale))
        features = kernel if isinstance(kernel, SparseFeatures) else kernel.features()[0]
        start = torch.tensor(self._start, dtype=torch.float64, device=features.value.device)
        self.log_noise, self.log_scale = (nn.Parameter(value.clone()) for value in start)
        self.iterations = 0  # of the last solve
        self._nodes: Tensor | None = None
        self._y: Tensor | None = None
        self._single = True
        self._keys: Tensor | None = None  # of the kernel's nodes when the targets came
        self._pattern: tuple[Tensor, SparseFeatures, Tensor, Tensor] | None = None
        with torch.no_grad():
            self._features()  # refuses what is no kernel

    def reset_parameters(self) -> None:
        """Back to the noise and scale given, and a modulation that has a ``reset_parameters()`` to its start."""
        with torch.no_grad():
            self.log_noise.fill_(self._start[0])
            self.log_scale.fill_(self._start[1])
        reset = getattr(self.modulation, "reset_parameters", None)
        if callable(reset):
            reset()

    def extra_repr(self) -> str:
        """Sizes and options."""
        noise, scale = math.exp(self.log_noise.item()), math.exp(self.log_scale.item())
        values = f"noise={noise:.6g}, scale={scale:.6g}"
        return f"{self._num_nodes()}, {values}, mean={self.mean!r}, tol={self.tol}, max_iter={self.max_iter}"

    # -- learning ------------------------------------------------------------------------------------------------------
    def fit(
        self,
        nodes: Tensor,
        y: Tensor,
        steps: int = 100,
        lr: float = 0.05,
        num_probes: int = 16,
        generator: torch.Generator | None = None,
    ) -> list[float]:
        """Condition on targets and raise their marginal likelihood by Adam.

        Learned are the parameters of this module; edge weights and features that require gradients get none.

        Args:
            nodes: Where the targets are: indices [n] or a mask [N]. A node may have several targets.
            y: [n] or [n, T]; rows of NaN are left out.
            steps: Of Adam; 0 only conditions.
            lr: Its rate.
            num_probes: Of the log-determinant and its gradient.
            generator: Draws the probes, new ones in each step.

        Returns:
            The negative marginal log-likelihood of each step, as estimated, per target.

        Raises:
            ValueError: Targets or nodes that do not fit.
        """
        self._nodes, self._y, self._single = _targets(nodes, y, self._num_nodes(), self.log_noise)
        self._keys, self._pattern = self._node_keys(), None
        if steps > 0 and len(self._y) and not bool((self._y - self._offset()).any()):
            warnings.warn(
                f"y never differs from its mean (mean={self.mean!r}), so that the likelihood grows without bound as "
                "noise and scale fall: give targets that vary, or steps=0",
                RuntimeWarning,
                stacklevel=2,
            )
        optimizer = torch.optim.Adam(self.parameters(), lr)
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = -self.log_marginal_likelihood(num_probes, generator) / max(1, self._y.numel())
            loss.backward(inputs=learned)  # what is behind given features was recorded once
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def log_marginal_likelihood(self, num_probes: int = 16, generator: torch.Generator | None = None) -> Tensor:
        """Logarithm of the density of the targets of :meth:`fit`, as an unbiased estimate with an unbiased gradient.

        Args:
            num_probes: Random vectors of the log-determinant and of the gradient's trace.
            generator: Draws them.

        Raises:
            ValueError: Before :meth:`fit`, or no probes.
        """
        if num_probes < 1:
            raise ValueError(f"num_probes is {num_probes}, but must be at least 1")
        y, phi, scale, noise, _ = self._observed()
        n, outputs = y.shape
        with torch.no_grad():
            probes = _signs(n, num_probes, y, generator)
            solution = self._solve(phi, scale, noise, torch.cat((y, probes), 1))
            alpha, w = solution.x.split((outputs, num_probes), 1)
            log_det = _log_determinants(solution.diagonal[:, outputs:], solution.off_diagonal[:, outputs:], n).mean()
            value = -0.5 * ((y * alpha).sum() + outputs * (log_det + n * math.log(2 * math.pi)))
        # the gradient: half of a^T dK a - T tr(K^-1 dK), with tr(K^-1 dK) = E[w^T dK z]
        left = phi.t_matmul(torch.cat((alpha, w, probes), 1))
        fit, there, back = left.split((outputs, num_probes, num_probes), 1)
        share = outputs / num_probes
        quadratic = scale * (fit.square().sum() - share * (there * back).sum())
        quadratic = quadratic + noise * (alpha.square().sum() - share * (w * probes).sum())
        estimate: Tensor = value + 0.5 * (quadratic - quadratic.detach())
        return estimate

    @torch.no_grad()
    def log_determinant(self, num_probes: int = 16, generator: torch.Generator | None = None) -> tuple[float, float]:
        """Logarithm of the determinant of the targets' covariance, noise included, and its standard error.

        Args:
            num_probes: Random vectors, at least 2.
            generator: Draws them.

        Raises:
            ValueError: Before :meth:`fit`, or fewer than 2 probes.
        """
        if num_probes < 2:
            raise ValueError(f"num_probes is {num_probes}, but a standard error needs at least 2")
        y, phi, scale, noise, _ = self._observed()
        probes = _signs(y.size(0), num_probes, y, generator)
        solution = self._solve(phi, scale, noise, probes)
        found = _log_determinants(solution.diagonal, solution.off_diagonal, y.size(0))
        return float(found.mean()), float(found.std()) / math.sqrt(num_probes)

    # -- what follows from the targets ---------------------------------------------------------------------------------
    @overload
    def predict(
        self,
        nodes: Tensor | None = None,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        *,
        return_var: Literal[True] = True,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def predict(
        self,
        nodes: Tensor | None = None,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        *,
        return_var: Literal[False],
    ) -> Tensor: ...

    @torch.no_grad()
    def predict(
        self,
        nodes: Tensor | None = None,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        *,
        return_var: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mean and variance of g + mu at nodes, given the targets of :meth:`fit`; noise is not added.

        Args:
            nodes: Indices or a mask. (default: all)
            num_samples: Estimate the variance from as many samples S, one solve for each, with a relative standard
                error of the root of 2 / S; 0 for the exact one, with a solve for each node. (default: exact for up to
                1024 nodes asked for; from 256 samples, and so to 9 percent, above)
            generator: Draws the samples.
            return_var: False for the mean alone, which takes one solve for each output.

        Returns:
            The mean [n] or [n, T], and the variance [n], the same for all outputs; or the mean alone.

        Raises:
            ValueError: Before :meth:`fit`, or a negative number of samples.
        """
        if num_samples is not None and num_samples < 0:
            raise ValueError(f"num_samples is {num_samples}, but must be at least 1, or 0 for the exact variance")
        nodes = _node_index(nodes, self._num_nodes(), self.log_noise.device)
        y, phi, scale, noise, columns = self._observed()
        full = self._features()[0]
        alpha = self._solve(phi, scale, noise, y).x
        mean = scale * full.matmul(_lift(phi.t_matmul(alpha), columns, full))[nodes] + self._offset()
        mean = mean.squeeze(1) if self._single else mean
        if not return_var:
            return mean
        if num_samples is None:
            num_samples = 0 if len(nodes) <= _EXACT else _SAMPLES
        return mean, self._sampled_variance(nodes, num_samples, generator) if num_samples else self._variance(nodes)

    @torch.no_grad()
    def sample(
        self, num_samples: int = 1, nodes: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Functions g + mu at nodes, given the targets of :meth:`fit`; before it, from the prior.

        Args:
            num_samples: How many, S.
            nodes: Indices or a mask. (default: all)
            generator: Draws them.

        Returns:
            [S, n], or [S, n, T] for targets with an axis of outputs.
        """
        nodes = _node_index(nodes, self._num_nodes(), self.log_noise.device)
        paths = self._paths(num_samples, nodes, generator).permute(2, 0, 1)
        return paths.squeeze(-1) if self._single else paths

    def _paths(self, num_samples: int, nodes: Tensor, generator: torch.Generator | None) -> Tensor:
        """[n, T, S]."""
        outputs = 1 if self._y is None else self._y.size(1)
        y = None if self._nodes is None else self._observed()[0].repeat_interleave(num_samples, 1)
        paths = self._draws(outputs * num_samples, y, generator)[nodes]
        return paths.view(-1, outputs, num_samples) + self._offset().unsqueeze(-1)

    def _draws(self, count: int, y: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Samples of g, [N, count]: given targets y [n, count] less their mean, or from the prior."""
        full, constant = self._features()
        white = _normal((full.num_cols, count), full.value, generator)
        paths = (self.log_scale.exp() * constant).sqrt() * full.matmul(white)
        if y is not None:
            _, phi, scale, noise, columns = self._observed()
            y = y - noise.sqrt() * _normal((y.size(0), count), y, generator)
            weights = self._solve(phi, scale, noise, y - paths[self._nodes]).x
            paths = paths + scale * full.matmul(_lift(phi.t_matmul(weights), columns, full))
        return paths

    def _sampled_variance(self, nodes: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """The mean square of samples given targets of zero, whose mean is zero, and whose variance is the same."""
        y, full = self._observed()[0], self._features()[0]
        total, most = y.new_zeros(nodes.size(0)), max(1, _BLOCK // max(1, *full.shape))
        for first in range(0, num_samples, most):
            count = min(most, num_samples - first)
            total += self._draws(count, y.new_zeros(y.size(0), count), generator)[nodes].square().sum(1)
        return total / num_samples

    def _variance(self, nodes: Tensor) -> Tensor:
        full = self._features()[0]
        _, phi, scale, noise, columns = self._observed()
        parts = [scale.new_zeros(0)]
        for block in nodes.split(max(1, _BLOCK // max(1, full.num_cols))):
            dense = full.select_rows(block).to_dense().t().contiguous()
            across = scale * phi.matmul(dense[columns])
            solved = self._solve(phi, scale, noise, across).x
            parts.append(scale * dense.square().sum(0) - (across * solved).sum(0))
        return torch.cat(parts).clamp(min=0)

    # -- the operator --------------------------------------------------------------------------------------------------
    def _num_nodes(self) -> int:
        return self.kernel.num_rows if isinstance(self.kernel, SparseFeatures) else self.kernel.num_nodes

    def _features(self) -> tuple[SparseFeatures, Tensor]:
        """The features of all nodes in float64 and the constant of the kernel, differentiable."""
        one = self.log_scale.new_ones(())
        if isinstance(self.kernel, SparseFeatures):
            phi, constant = self.kernel, one
        elif self.modulation is None:
            phi, constant = self.kernel.features()[0], one * self.kernel.series.scale
        else:
            phi = self.kernel.features(self.modulation())[0]
            scale = getattr(self.modulation, "scale", None)
            constant = one * (self.kernel.series.scale if scale is None else scale())
        if not bool(constant > 0):
            raise ValueError(
                f"kernel has the constant {float(constant.detach()):.6g}, but must be positive semi-definite: give the "
                "series, or the modulation, a scale above 0"
            )
        if not bool(phi.value.isfinite().all()):
            raise ValueError(
                "kernel has features that are infinite or NaN: check what they were made of, or the values of the "
                "modulation (lr of fit too high?)"
            )
        return phi.with_value(phi.value.double()), constant

    def _node_keys(self) -> Tensor:
        """Numbers that nodes keep while a kernel's graph changes."""
        known = None if isinstance(self.kernel, SparseFeatures) else self.kernel._node_key
        return torch.arange(self._num_nodes(), device=self.log_noise.device) if known is None else known

    def _observed(self) -> tuple[Tensor, SparseFeatures, Tensor, Tensor, Tensor]:
        """(targets less their mean, features of their nodes on the columns that occur, scale, noise, those columns)."""
        if self._nodes is None or self._y is None:
            raise ValueError("there are no targets yet: call fit(nodes, y) first, with steps=0 to learn nothing")
        if self._keys is not None and not torch.equal(self._keys, self._node_keys()[: len(self._keys)]):
            raise ValueError(
                "kernel has lost nodes since fit(), so that nodes have other numbers: call fit(nodes, y) again"
            )
        phi, constant = self._features()
        if self._pattern is None or self._pattern[0] is not phi.col:  # walks have been sampled anew
            self._pattern = phi.col, *_compact(phi, self._nodes)
        _, rows, entry, columns = self._pattern
        y, scale = self._y - self._offset(), self.log_scale.exp() * constant
        return y, rows.with_value(phi.value[entry]), scale, self.log_noise.exp(), columns

    def _offset(self) -> Tensor:
        """The mean of each output, [1, T]."""
        y = self._y
        if y is None or self.mean == "zero" or not len(y):
            return self.log_noise.new_zeros(1, 1 if y is None else y.size(1))
        return y.mean(0, keepdim=True)

    def _solve(self, phi: SparseFeatures, scale: Tensor, noise: Tensor, b: Tensor) -> Solution:
        def matvec(v: Tensor) -> Tensor:
            return scale * phi.matmul(phi.t_matmul(v)) + noise * v

        solution = conjugate_gradients(matvec, b, self.tol, self.max_iter)
        self.iterations = solution.diagonal.size(0)
        worst = float(solution.residual.max()) if solution.residual.numel() else 0.0
        if not worst <= 2 * self.tol:
            remedy = "raise noise or tol, or max_iter"
            if self.iterations < self.max_iter:
                remedy = "float64 has no more digits for this condition number, raise noise or tol"
            warnings.warn(
                f"conjugate gradients stopped after {self.iterations} iterations at a relative residual of {worst:.1e} "
                f"(tol is {self.tol:.1e}): {remedy}",
                RuntimeWarning,
                stacklevel=3,
            )
        return solution


# -- parts -------------------------------------------------------------------------------------------------------------
def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor], b: Tensor, tol: float = 1e-8, max_iter: int = 10000
) -> Solution:
    """Solve A x = b for many right-hand sides at once, and keep the coefficients of Lanczos.

    Args:
        matvec: The product with A, symmetric and positive definite.
        b: [n, k].
        tol: Of the residual, relative to b.
        max_iter: Most iterations.

    Returns:
        The solution.

    Raises:
        ValueError: A right-hand side or a product is infinite or NaN, or A is not positive definite.
    """
    if not bool(b.isfinite().all()):
        raise ValueError("b has infinite or NaN entries, but right-hand sides must be finite")
    x, r, p = torch.zeros_like(b), b, b
    first = rr = b.square().sum(0)
    active = rr > tol * tol * first
    broken = torch.zeros_like(active)
    diagonal, off = [], []
    before = torch.zeros_like(rr)  # beta / alpha of the iteration before
    for _ in range(max_iter):
        going, failed = torch.stack((active.any(), broken.any())).tolist()
        if failed or not going:
            break
        product = matvec(p)
        curvature = (p * product).sum(0)
        broken = active & ~((curvature > 0) & curvature.isfinite())
        active = active & ~broken
        alpha = torch.where(active, rr / curvature, 0.0)
        x = x + alpha * p
        r = r - alpha * product
        after = torch.where(active, r.square().sum(0), rr)
        beta = torch.where(active, after / rr, 0.0)
        p = r + beta * p
        goes_on = active & (after > tol * tol * first)
        # a column that has ended goes on with ones that nothing leads to
        diagonal.append(torch.where(active, 1 / alpha + before, 1.0))
        off.append(torch.where(goes_on, beta.sqrt() / alpha, 0.0))
        before, rr, active = torch.where(active, beta / alpha, 0.0), after, goes_on
    if bool(broken.any()):
        raise ValueError(
            "the matrix is not positive definite, or not finite, to the accuracy of float64: raise the noise, or lower "
            "the scale"
        )
    none = b.new_zeros(0, b.size(1))
    residual = torch.where(first > 0, (b - matvec(x)).square().sum(0) / first, 0.0).sqrt()
    return Solution(x, torch.stack(diagonal) if diagonal else none, torch.stack(off) if off else none, residual)


def _log_determinants(diagonal: Tensor, off_diagonal: Tensor, n: int) -> Tensor:
    """N times the quadrature of the logarithm, for each right-hand side of norm sqrt(n); one unbiased estimate each."""
    main, off = diagonal.cpu().numpy(), off_diagonal.cpu().numpy()
    found = np.zeros(main.shape[1])
    for k in range(main.shape[1] if len(main) else 0):
        ends = np.flatnonzero(off[:, k] == 0)  # where the iterations of this column did
        size = ends[0] + 1 if len(ends) else len(main)
        eigval, eigvec = eigh_tridiagonal(main[:size, k], off[: size - 1, k])
        eigval = np.maximum(eigval, np.finfo(np.float64).eps * eigval[-1])  # smaller ones are rounding errors
        found[k] = n * (eigvec[0] ** 2 * np.log(eigval)).sum()
    return torch.from_numpy(found).to(diagonal.device)


def _signs(n: int, k: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return 2.0 * torch.randint(2, (n, k), device=device, generator=generator).to(like) - 1.0


def _normal(shape: tuple[int, int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def _compact(phi: SparseFeatures, nodes: Tensor) -> tuple[SparseFeatures, Tensor, Tensor]:
    """Rows of features on the columns that occur in them: (features, their entries in phi, columns)."""
    position = torch.arange(phi.col.size(0), device=phi.col.device)
    rows = phi.with_value(position.double()).select_rows(nodes)  # exact up to 2^53 entries
    entry = rows.value.long()
    columns, col = torch.unique(rows.col, return_inverse=True)
    return SparseFeatures(rows.ptr, col, phi.value.detach()[entry], columns.size(0)), entry, columns


def _lift(v: Tensor, columns: Tensor, phi: SparseFeatures) -> Tensor:
    return v.new_zeros(phi.num_cols, v.size(1)).index_copy(0, columns, v)


def _node_index(nodes: Tensor | None, num_nodes: int, device: torch.device) -> Tensor:
    if nodes is None:
        return torch.arange(num_nodes, device=device)
    if nodes.dtype == torch.bool and nodes.shape == (num_nodes,):
        return nodes.nonzero().flatten().to(device)
    if nodes.dtype != torch.int64 or nodes.dim() != 1:
        raise ValueError(
            f"nodes is {nodes.dtype} {tuple(nodes.shape)}, but must be int64 indices (n,) or a mask ({num_nodes},)"
        )
    if nodes.numel() and not 0 <= int(nodes.min()) <= int(nodes.max()) < num_nodes:
        raise ValueError(f"nodes has {int(nodes.min())} to {int(nodes.max())}, but must be in 0..{num_nodes - 1}")
    return nodes.to(device)


def _targets(nodes: Tensor, y: Tensor, num_nodes: int, like: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Nodes, their targets [n, T] in float64, and whether the axis of outputs was missing."""
    nodes = _node_index(nodes, num_nodes, like.device)
    if y.dim() not in (1, 2) or y.size(0) != nodes.size(0) or (y.dim() == 2 and y.size(1) == 0):
        raise ValueError(f"y has shape {tuple(y.shape)}, but must be ({nodes.size(0)},) or ({nodes.size(0)}, T)")
    values = y.detach().to(like)
    values = values if y.dim() == 2 else values.unsqueeze(1)
    missing = values.isnan()
    partly = missing.any(1) & ~missing.all(1)
    if bool(partly.any()):
        row = int(partly.nonzero()[0])
        raise ValueError(
            f"y[{row}] has some outputs missing, but outputs must be seen at the same nodes: fit one process for each"
        )
    kept = ~missing.all(1)
    if bool(values[kept].isinf().any()):
        raise ValueError("y has infinite entries, but targets must be finite; NaN stands for a missing one")
    return nodes[kept], values[kept], y.dim() == 1
