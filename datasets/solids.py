"""Ten kinds of solid as random point clouds on their surface: shapes that need no file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Mesh = tuple[np.ndarray, np.ndarray]
Random = np.random.Generator


def revolve(profile: np.ndarray, closed: bool = False, segments: int = 48) -> Mesh:
    """Turn the polyline ``profile`` [K, 2] of (radius, height) about the z axis into a triangle mesh."""
    angle = 2 * np.pi * (np.arange(segments) + 0.5) / segments  # a square stands parallel to the axes
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points = np.concatenate(
        [profile[:, None, :1] * ring, np.broadcast_to(profile[:, None, 1:], (len(profile), segments, 1))], axis=2
    )
    rows = np.arange(len(profile) if closed else len(profile) - 1)
    first, second = (a.ravel() for a in np.meshgrid(rows, np.arange(segments), indexing="ij"))
    a, b = first * segments + second, first * segments + (second + 1) % segments
    c, d = ((first + 1) % len(profile) * segments + s for s in (second, (second + 1) % segments))
    return points.reshape(-1, 3), np.concatenate([np.stack([a, b, c], axis=1), np.stack([b, d, c], axis=1)])


def extrude(num_sides: int, height: float = 1.0, top: float = 1.0, bottom: float = 1.0) -> Mesh:
    """Mesh of a prism on a regular polygon of radius 1, with the top and bottom polygons scaled (0 makes a pyramid)."""
    profile = np.array([[0, -height], [bottom, -height], [top, height], [0, height]], dtype=np.float64)
    return revolve(profile, segments=num_sides)


def _arc(start: float, end: float, centre: tuple[float, float] = (0, 0), radius: float = 1.0) -> np.ndarray:
    angle = np.linspace(start, end, 25)
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], axis=1)


def _capsule(random: Random) -> Mesh:
    half = random.uniform(0.5, 1.2)
    return revolve(np.concatenate([_arc(-np.pi / 2, 0, (0, -half)), _arc(0, np.pi / 2, (0, half))]))


def _torus(random: Random) -> Mesh:
    return revolve(_arc(0, 2 * np.pi, (1, 0), random.uniform(0.2, 0.45))[:-1], closed=True)


def _octahedron(_: Random) -> Mesh:
    return revolve(np.array([[0.0, -1.0], [1.0, 0.0], [0.0, 1.0]]), segments=4)


SOLIDS: dict[str, Callable[[Random], Mesh]] = {
    "box": lambda random: extrude(4),
    "capsule": _capsule,
    "cone": lambda random: extrude(48, top=0.0),
    "cylinder": lambda random: extrude(48),
    "dome": lambda random: revolve(np.concatenate([[[0.0, 0.0]], _arc(0, np.pi / 2)])),
    "octahedron": _octahedron,
    "prism": lambda random: extrude(3),
    "pyramid": lambda random: extrude(4, top=0.0),
    "sphere": lambda random: revolve(_arc(-np.pi / 2, np.pi / 2)),
    "torus": _torus,
}


def sample_surface(mesh: Mesh, num_points: int, random: Random) -> np.ndarray:
    """Points [num_points, 3] uniform by area on a triangle mesh of points [K, 3] and triangles [T, 3]."""
    corner = mesh[0][mesh[1]]
    side = corner[:, 1:] - corner[:, :1]
    area = np.linalg.norm(np.cross(side[:, 0], side[:, 1]), axis=1)
    face = random.choice(len(area), num_points, p=area / area.sum())
    u = random.uniform(size=(num_points, 2))
    u = np.where(u.sum(axis=1, keepdims=True) > 1, 1 - u, u)  # fold the square into the triangle
    points: np.ndarray = corner[face, 0] + (u[:, :, None] * side[face]).sum(axis=1)
    return points


def sample_solid(name: str, num_points: int, random: Random) -> np.ndarray:
    """Points [num_points, 3] on an upright solid whose three axes are stretched by random factors of 0.7 to 1.4."""
    points, faces = SOLIDS[name](random)
    return sample_surface((points * random.uniform(0.7, 1.4, size=3), faces), num_points, random)
