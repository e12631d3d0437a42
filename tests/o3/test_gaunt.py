from __future__ import annotations

import itertools
import math

import pytest
import sympy
import torch
from e3nn import o3 as e3nn_o3
from sympy.physics.wigner import wigner_3j as sympy_3j

from geo.o3 import SphereGrid, bracket_coefficient, gaunt_coefficient, pack, unpack
from geo.ops.gaunt import gaunt_product
from geo.testing import assert_close

F64 = torch.float64
LMAX = 6


def couplings(l1: int, l2: int, l3: int, bracket: bool, degree: int | None = None) -> torch.Tensor:
    """Means of products or brackets of three harmonics, on a grid three times as fine as needed."""
    grid = SphereGrid(3 * (l1 + l2 + l3) if degree is None else degree)
    third = grid.weights[:, None] * grid.to_matrix(l3)[:, l3 * l3 :]
    if not bracket:
        pairs = grid.to_matrix(l1)[:, l1 * l1 :, None] * grid.to_matrix(l2)[:, None, l2 * l2 :]
    else:
        (fp, fa), (hp, ha) = grid.gradient_matrices(l1), grid.gradient_matrices(l2)
        fp, fa, hp, ha = fp[:, l1 * l1 :, None], fa[:, l1 * l1 :, None], hp[:, None, l2 * l2 :], ha[:, None, l2 * l2 :]
        pairs = fp * ha - fa * hp
    return torch.einsum("nij,nk->ijk", pairs, third)


def wigner(l1: int, l2: int, l3: int) -> torch.Tensor:
    if not abs(l1 - l2) <= l3 <= l1 + l2:
        return torch.zeros(2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1, dtype=F64)
    return e3nn_o3.wigner_3j(l1, l2, l3, dtype=F64)


TRIPLES = [t for t in itertools.product(range(LMAX + 1), repeat=3) if t[0] <= t[1]]


@pytest.mark.parametrize("l1", range(LMAX + 1))
def test_quadrature_is_the_coefficient_times_wigner_3j(l1):
    for _, l2, l3 in (t for t in TRIPLES if t[0] == l1):
        for bracket, coefficient in ((False, gaunt_coefficient), (True, bracket_coefficient)):
            value = coefficient(l1, l2, l3)
            error = (couplings(l1, l2, l3, bracket) - value * wigner(l1, l2, l3)).abs().max()
            scale = math.sqrt(l1 * (l1 + 1) * l2 * (l2 + 1)) if bracket else 1
            assert error < 1e-12 * max(1, scale), (l1, l2, l3, bracket)
            allowed = abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == bracket
            assert (value != 0) == allowed
            if allowed:
                assert abs(value) > 0.1


def test_closed_forms_by_sympy():
    """|g| and |d| from exact 3j symbols."""
    for l1, l2, l3 in itertools.product(range(5), repeat=3):
        if not abs(l1 - l2) <= l3 <= l1 + l2:
            continue
        root = math.sqrt((2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1))
        if (l1 + l2 + l3) % 2 == 0:
            exact = root * abs(float(sympy_3j(l1, l2, l3, 0, 0, 0)))
            assert abs(gaunt_coefficient(l1, l2, l3)) == pytest.approx(exact, abs=1e-12)
        else:
            exact = root * abs(float(sympy_3j(l1, l2, l3, 1, -1, 0))) * math.sqrt(l1 * (l1 + 1) * l2 * (l2 + 1))
            assert abs(bracket_coefficient(l1, l2, l3)) == pytest.approx(exact, abs=1e-11)
    assert abs(bracket_coefficient(1, 1, 1)) == pytest.approx(3 * math.sqrt(2), abs=1e-13)


def test_signed_couplings_by_sympys_gaunt():
    """The integral of three complex harmonics, in the real basis of e3nn; only a factor i^l of each is free."""
    from sympy.physics.wigner import gaunt

    def basis(l: int) -> torch.Tensor:
        """Rows: real harmonics without the Condon-Shortley sign, m as sine and cosine; columns: complex ones."""
        q = torch.zeros(2 * l + 1, 2 * l + 1, dtype=torch.complex128)
        q[l, l] = 1
        for m in range(1, l + 1):
            q[l + m, l + m], q[l + m, l - m] = (-1) ** m / math.sqrt(2), 1 / math.sqrt(2)
            q[l - m, l + m], q[l - m, l - m] = -1j * (-1) ** m / math.sqrt(2), 1j / math.sqrt(2)
        return q

    for l1, l2, l3 in ((0, 0, 0), (1, 1, 2), (1, 2, 3), (2, 2, 2), (2, 2, 4), (1, 3, 2)):
        raw = torch.tensor(
            [
                [[float(sympy.N(gaunt(l1, l2, l3, a, b, c))) for c in range(-l3, l3 + 1)] for b in range(-l2, l2 + 1)]
                for a in range(-l1, l1 + 1)
            ],
            dtype=torch.complex128,
        )
        exact = torch.einsum("abc,ia,jb,kc->ijk", raw, basis(l1), basis(l2), basis(l3))
        assert exact.imag.abs().max() < 1e-13
        assert_close(gaunt_coefficient(l1, l2, l3, "integral") * wigner(l1, l2, l3), exact.real)


@pytest.mark.parametrize("triple", [(1, 1, 2), (2, 2, 2), (2, 3, 3), (3, 2, 1)])
def test_exact_from_the_degree_of_the_integrand_on(triple):
    """The bracket's integrand is of degree one less."""
    degree = sum(triple)
    bracket = degree % 2 == 1
    fewest = degree - 1 if bracket else degree
    exact = couplings(*triple, bracket)
    assert (couplings(*triple, bracket, fewest) - exact).abs().max() < 1e-12
    assert (couplings(*triple, bracket, fewest - 1) - exact).abs().max() > 1e-2


def test_normalizations():
    for l1, l2, l3 in ((1, 1, 2), (2, 3, 3), (1, 2, 3)):
        g = gaunt_coefficient(l1, l2, l3)
        sizes = [math.sqrt(2 * l + 1) for l in (l1, l2, l3)]
        assert gaunt_coefficient(l1, l2, l3, "norm") == pytest.approx(g / sizes[0] / sizes[1] * sizes[2], abs=1e-13)
        assert gaunt_coefficient(l1, l2, l3, "integral") == pytest.approx(g / math.sqrt(4 * math.pi), abs=1e-13)


@pytest.mark.parametrize(("lmax", "even", "every"), [(1, 4, 5), (2, 11, 15), (3, 23, 34)])
def test_product_and_bracket_span_all_paths(lmax, even, every):
    """Rank of the couplings that each method makes, degree by degree, against the count of Clebsch-Gordan paths."""
    size = (lmax + 1) ** 2
    unit = torch.eye(size, dtype=F64)
    x = unit[:, None, :, None].expand(size, size, size, 1)
    y = unit[None, :, :, None].expand(size, size, size, 1)
    ranks = []
    found = []
    for bracket in (False, True):
        whole = gaunt_product(x, y, lmax, bracket)[..., 0]
        for l1, l2, l3 in itertools.product(range(lmax + 1), repeat=3):
            part = torch.zeros_like(whole)
            cut = tuple(slice(l * l, (l + 1) ** 2) for l in (l1, l2, l3))
            part[cut] = whole[cut]
            found.append(part.flatten())
        ranks.append(int(torch.linalg.matrix_rank(torch.stack(found), atol=1e-9)))
    assert ranks == [even, every]
    paths = []
    for l1, l2, l3 in itertools.product(range(lmax + 1), repeat=3):
        part = torch.zeros(size, size, size, dtype=F64)
        part[l1 * l1 : (l1 + 1) ** 2, l2 * l2 : (l2 + 1) ** 2, l3 * l3 : (l3 + 1) ** 2] = wigner(l1, l2, l3)
        paths.append(part.flatten())
    assert int(torch.linalg.matrix_rank(torch.stack(paths), atol=1e-9)) == every
    assert int(torch.linalg.matrix_rank(torch.stack(found + paths), atol=1e-9)) == every


@pytest.mark.parametrize(
    ("irreps", "rows"),
    [
        ("2x0e+2x1o+2x2e", 9),
        ("2x1o+2x0e", 4),
        ("3x0e+3x2e", 9),
        ("2x0o+2x1e", 4),
        ("2x0e+2x1e+2x1o", 8),
        ("0x0e+0x1o", 4),
    ],
)
def test_pack_and_back(irreps, rows):
    parsed = e3nn_o3.Irreps(irreps)
    x = torch.randn(3, 2, parsed.dim)
    dense = pack(x, irreps)
    assert dense.shape == (3, 2, rows, parsed[0].mul)
    assert torch.equal(unpack(dense, parsed), x)
    assert int((dense != 0).sum()) == x.numel()


def test_pack_order():
    """A worked index: vectors (x, y, z) of two channels behind their scalars."""
    flat = torch.tensor([1.0, 2, 10, 11, 12, 20, 21, 22])
    assert pack(flat, "2x0e+2x1o").tolist() == [[1, 2], [10, 20], [11, 21], [12, 22]]
    both = pack(torch.tensor([1.0, 2, 3, 4, 5, 6]), "1e+1o")  # the true signal first; absent scalars are zero
    assert both.flatten().tolist() == [0, 4, 5, 6, 0, 1, 2, 3]
    assert unpack(both[:4], "1o").tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gaunt_coefficient(-1, 0, 0), "a degree is -1"),
        (lambda: bracket_coefficient(1, 1.0, 1), "a degree is 1.0"),
        (lambda: gaunt_coefficient(1, 1, 0, "e3nn"), "normalization is 'e3nn'"),
        (lambda: pack(torch.ones(5), "2x0e+3x1o"), "multiplicities of signals on the sphere must be equal"),
        (lambda: pack(torch.ones(5), "2x0e+2x0e"), "which has 0e twice"),
        (lambda: pack(torch.ones(5), "2x0e+2x1x"), "which e3nn does not read"),
        (lambda: pack(torch.ones(5), ""), "is empty"),
        (lambda: pack(torch.ones(5), "2x0e+2x1o"), r"x has shape \(5,\), but irreps '2x0e\+2x1o' need \(\.\.\., 8\)"),
        (lambda: unpack(torch.ones(4, 3), "2x0e+2x1o"), r"need \(\.\.\., 4, 2\)"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
