r"""Grids of orientations: points on the circle and the sphere, and frames in SO(2) and SO(3).

A function on orientations is sampled on a grid :math:`n_1, \dots, n_O`, and an integral is a sum with weights
:math:`w_o` that add to one. The circle takes equispaced angles. The sphere takes points that repel each other (energy
:math:`1/d^2`), converged in float64 from a fixed seed: Adam on Cartesian points, 2000 steps, then
L-BFGS and Newton. The usual
sizes are stored with the package and the rest are computed when asked for. Equivariance of a layer on a grid is exact
for the rotations that map the grid to itself and approximate for others, with an error that falls fast in :math:`O`.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

STORED_SIZES = (6, 8, 12, 16, 20, 24, 32, 48, 64, 96)
SPHERE_KINDS = ("repulsion", "fibonacci", "platonic", "random")
FRAME_KINDS = ("platonic", "random")
PLATONIC_SIZES = (4, 6, 8, 12, 20)
FRAME_SIZES = (12, 24, 60)
_GOLDEN = (1 + math.sqrt(5)) / 2


def orientation_points(
    dim: int, num_ori: int, kind: str = "repulsion", seed: int = 0, antipodal: bool = False
) -> Tensor:
    r"""Unit vectors spread over the circle (``dim=2``) or the sphere (``dim=3``), in float64; the same on every call.

    Args:
        dim: 2 or 3.
        num_ori: Number of points.
        kind: ``'repulsion'``, ``'fibonacci'``, ``'platonic'`` (4, 6, 8, 12 or 20 points) or ``'random'``; on the circle
            all but ``'random'`` are equispaced. (default: ``'repulsion'``)
        seed: Seed of ``'repulsion'`` and ``'random'``. (default: ``0``)
        antipodal: With each point its opposite (``num_ori`` is then even; the second half is minus the first).
            (default: ``False``)

    Shapes:
        output :math:`(O, n)`.

    Raises:
        ValueError: A dimension, kind or number of points that does not exist.

    Example:
        >>> n = orientation_points(3, 12)
        >>> (n.t() @ n / 12 * 3 - torch.eye(3)).abs().max() < 1e-9
        tensor(True)
    """
    if dim not in (2, 3):
        raise ValueError(f"dim is {dim}, but must be 2 or 3")
    if kind not in SPHERE_KINDS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(map(repr, SPHERE_KINDS))}")
    if isinstance(num_ori, bool) or not isinstance(num_ori, int) or num_ori < 1:
        raise ValueError(f"num_ori is {num_ori!r}, but must be a positive integer")
    if antipodal and num_ori % 2:
        raise ValueError(f"num_ori is {num_ori}, but must be even with antipodal=True")
    if kind == "platonic" and dim == 3 and num_ori not in PLATONIC_SIZES:
        raise ValueError(f"num_ori is {num_ori}, but a platonic solid has one of {PLATONIC_SIZES} vertices")
    return torch.from_numpy(_points(dim, num_ori, kind, seed, antipodal).copy())


def rotation_frames(dim: int, num_ori: int, kind: str = "platonic", seed: int = 0) -> Tensor:
    r"""Rotation matrices spread over SO(2) (equispaced) or SO(3) (a rotation group, or random), in float64.

    Args:
        dim: 2 or 3.
        num_ori: Number of frames; in three dimensions ``'platonic'`` has the groups of the tetrahedron (12), octahedron
            (24) and icosahedron (60).
        kind: ``'platonic'`` or ``'random'`` (Haar). (default: ``'platonic'``)
        seed: Seed of ``'random'``. (default: ``0``)

    Shapes:
        output :math:`(O, n, n)`.

    Raises:
        ValueError: A dimension, kind or number of frames that does not exist.

    Example:
        >>> R = rotation_frames(3, 24)
        >>> (R @ R.transpose(1, 2) - torch.eye(3)).abs().max() < 1e-12
        tensor(True)
    """
    if dim not in (2, 3):
        raise ValueError(f"dim is {dim}, but must be 2 or 3")
    if kind not in FRAME_KINDS:
        raise ValueError(f"kind is {kind!r}, but frames are one of {', '.join(map(repr, FRAME_KINDS))}")
    if isinstance(num_ori, bool) or not isinstance(num_ori, int) or num_ori < 1:
        raise ValueError(f"num_ori is {num_ori!r}, but must be a positive integer")
    if dim == 2:
        return angles_to_frames(torch.from_numpy(_angles(num_ori, kind, seed)))
    if kind == "random":
        return random_rotations(num_ori, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if num_ori not in FRAME_SIZES:
        raise ValueError(
            f"num_ori is {num_ori}, but rotation groups have one of {FRAME_SIZES} elements; others need kind='random'"
        )
    return torch.from_numpy(_rotation_group(num_ori).copy())


def random_rotations(
    num: int,
    dim: int = 3,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Haar-distributed rotation matrices ``[num, dim, dim]``.

    Args:
        num: How many.
        dim: 2 or 3. (default: ``3``)
        dtype: Of the result. (default: torch's default)
        device: Of the result. (default: torch's default)
        generator: Source of the random numbers. (default: torch's global one)

    Raises:
        ValueError: Another dimension.

    Example:
        >>> random_rotations(5).shape
        torch.Size([5, 3, 3])
    """
    if dim not in (2, 3):
        raise ValueError(f"dim is {dim}, but must be 2 or 3")
    if dim == 2:
        return angles_to_frames(2 * math.pi * torch.rand(num, dtype=dtype, device=device, generator=generator))
    q = torch.randn(num, 4, dtype=dtype, device=device, generator=generator)
    w, x, y, z = (q / q.norm(dim=1, keepdim=True)).unbind(1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def angles_to_frames(angle: Tensor) -> Tensor:
    """Rotation matrices of the plane, ``[..., 2, 2]``."""
    c, s = angle.cos(), angle.sin()
    return torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)


def quadrature_weights(points: Tensor) -> Tensor:
    r"""Positive weights, summing to one, with which sums over `points` integrate low-degree polynomials exactly.

    On the circle a point gets half the arc to its two neighbours. On the sphere the weights nearest to uniform that
    integrate every polynomial up to degree :math:`L` are taken, for the largest :math:`L` that leaves each weight at
    least a third of uniform; symmetric grids keep uniform weights.

    Args:
        points: Unit vectors, float64.

    Shapes:
        points :math:`(O, n)`; output :math:`(O)`.

    Example:
        >>> quadrature_weights(orientation_points(3, 6)) * 6
        tensor([1., 1., 1., 1., 1., 1.], dtype=torch.float64)
    """
    n = points.double().cpu().numpy()
    num = len(n)
    if n.shape[1] == 2:
        angle = np.arctan2(n[:, 1], n[:, 0])
        order = np.argsort(angle, kind="stable")
        gap = np.diff(angle[order], append=angle[order][0] + 2 * math.pi)
        weight = np.empty(num)
        weight[order] = (gap + np.roll(gap, 1)) / (4 * math.pi)
        return torch.from_numpy(weight)
    uniform = np.full(num, 1 / num)
    best = uniform
    for degree in range(1, 16):
        exponents = [e for e in itertools.product(range(degree + 1), repeat=3) if sum(e) in (degree, degree - 1)]
        rows = np.stack([np.prod(n ** np.array(e), axis=1) for e in exponents])
        moments = np.array([_sphere_moment(e) for e in exponents])
        weight = uniform + np.linalg.pinv(rows, rcond=1e-10) @ (moments - rows @ uniform)
        if np.abs(rows @ weight - moments).max() > 1e-9 or weight.min() < 1 / (3 * num):
            break
        best = weight
    best = np.where(np.abs(best - uniform) < 1e-9 / num, uniform, best)
    return torch.from_numpy(best)


def _sphere_moment(exponents: tuple[int, ...]) -> float:
    """Mean of x^a y^b z^c over the sphere."""
    if any(e % 2 for e in exponents):
        return 0.0

    def odd_factorial(k: int) -> int:
        return math.prod(range(k, 0, -2))

    return math.prod(odd_factorial(e - 1) for e in exponents) / odd_factorial(sum(exponents) + 1)


def _angles(num: int, kind: str, seed: int) -> np.ndarray:
    if kind == "random":
        return np.random.default_rng([seed, 2, num]).uniform(0, 2 * math.pi, num)
    return 2 * math.pi * np.arange(num) / num


@functools.lru_cache(maxsize=64)
def _points(dim: int, num: int, kind: str, seed: int, antipodal: bool) -> np.ndarray:
    half = num // 2 if antipodal else num
    if dim == 2:
        angle = _angles(num, kind, seed)[:half] if kind != "random" else _angles(half, kind, seed)
        points = np.stack((np.cos(angle), np.sin(angle)), 1)
    elif kind == "random":
        points = np.random.default_rng([seed, 3, half]).normal(size=(half, 3))
    elif kind == "fibonacci":
        k = np.arange(num)[:half] + 0.5
        z, turn = 1 - 2 * k / num, 2 * math.pi * k / _GOLDEN
        points = np.stack((np.sqrt(1 - z * z) * np.cos(turn), np.sqrt(1 - z * z) * np.sin(turn), z), 1)
    elif kind == "platonic":
        points = _platonic(num)
        if antipodal:
            if num == 4:
                raise ValueError("num_ori is 4, but a tetrahedron has no opposite vertices: use antipodal=False")
            return np.concatenate([upper := points[_upper(points)], -upper])
    elif seed == 0 and not antipodal and num in STORED_SIZES:
        with np.load(Path(__file__).with_name("repulsion.npz")) as stored:
            return np.asarray(stored[f"sphere{num}"])
    else:
        points = repulsion_points(half, seed, antipodal)
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    return np.concatenate([points, -points]) if antipodal else points


def _upper(points: np.ndarray) -> np.ndarray:
    """True for one of each pair of opposite points."""
    return np.array([next(c for c in p[::-1] if abs(c) > 1e-9) > 0 for p in points])


def repulsion_points(num: int, seed: int = 0, antipodal: bool = False) -> np.ndarray:
    """Converged points on the sphere that repel with energy 1/d^2 (with `antipodal`, together with their opposites)."""
    start = np.random.default_rng([seed, 3, num, int(antipodal)]).normal(size=(num, 3))
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        x = torch.from_numpy(start / np.linalg.norm(start, axis=1, keepdims=True)).requires_grad_()

        def energy(x: Tensor) -> Tensor:
            n = x.view(-1, 3)
            n = n / n.norm(dim=1, keepdim=True)
            n = torch.cat((n, -n)) if antipodal else n
            i, j = torch.triu_indices(len(n), len(n), 1)
            return (1 / (n[i] - n[j]).square().sum(1).clamp_min(1e-12)).sum() / len(n) ** 2

        adam = torch.optim.Adam([x], lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 2000)
        for _ in range(2000):
            adam.zero_grad()
            energy(x).backward()  # type: ignore[no-untyped-call]
            adam.step()
            schedule.step()
            with torch.no_grad():
                x /= x.norm(dim=1, keepdim=True)
        polish = torch.optim.LBFGS(
            [x], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            polish.zero_grad()
            value = energy(x)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        polish.step(closure)
        flat = (x / x.norm(dim=1, keepdim=True)).detach().flatten()
        for _ in range(4):  # Newton: the energy is too flat to tell points apart below 1e-7, its gradient is not
            gradient = torch.func.grad(energy)(flat)
            hessian = torch.func.hessian(energy)(flat)
            step = torch.linalg.pinv(hessian, rtol=1e-7, hermitian=True) @ gradient
            if step.norm() > 1e-2:  # a nearly flat direction: what Adam and L-BFGS found is good enough
                break
            flat = flat - step
        x = flat.view(-1, 3)
        points = x.detach().numpy()
    return np.asarray(points / np.linalg.norm(points, axis=1, keepdims=True))


def _platonic(num: int) -> np.ndarray:
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=3)))
    if num == 4:
        return np.asarray(signs[np.prod(signs, axis=1) > 0] / math.sqrt(3))
    if num == 6:
        return np.concatenate([np.eye(3), -np.eye(3)])
    if num == 8:
        return np.asarray(signs / math.sqrt(3))
    a, b = (1.0, _GOLDEN) if num == 12 else (_GOLDEN, 1 / _GOLDEN)  # each the dual of the other: one rotation group
    ring = np.array([(0, s * a, t * b) for s in (1, -1) for t in (1, -1)])
    rings = np.concatenate([np.roll(ring, shift, axis=1) for shift in range(3)])
    points = rings if num == 12 else np.concatenate([signs, rings])
    return np.asarray(points / np.linalg.norm(points[0]))


@functools.lru_cache(maxsize=8)
def _rotation_group(order: int) -> np.ndarray:
    """The rotation group of the tetrahedron (12), octahedron (24) or icosahedron (60), identity first."""
    vertices = _platonic({12: 4, 24: 6, 60: 12}[order])
    a = vertices[0]
    b = vertices[np.argsort(-(vertices @ a), kind="stable")[1]]
    cosine = a @ b
    base = np.stack((a, b, np.cross(a, b)), 1)
    found = [np.eye(3)]
    for p, q in itertools.product(vertices, repeat=2):
        if abs(p @ q - cosine) > 1e-9:
            continue
        rotation = np.stack((p, q, np.cross(p, q)), 1) @ np.linalg.inv(base)
        mapped = vertices @ rotation.T
        distance = np.linalg.norm(mapped[:, None] - vertices[None], axis=-1).min(1)
        if distance.max() < 1e-9 and min(np.abs(rotation - g).max() for g in found) > 1e-6:
            u, _, vt = np.linalg.svd(rotation)
            found.append(u @ vt)
    if len(found) != order:
        raise RuntimeError(f"found {len(found)} of {order} rotations")
    return np.stack(found)
