from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from geo.kernels import (
    custom,
    divide_series,
    heat,
    inverse_cosine,
    katz,
    matern,
    pair,
    personalised_pagerank,
    random_walk,
    regularised_laplacian,
    sqrt_series,
)

ROWS = {
    "regularised": regularised_laplacian(s=0.8, d=1.7),
    "regularised d=1": regularised_laplacian(s=1.0, d=1.0),
    "regularised d=2": regularised_laplacian(s=1.0, d=2.0),
    "matern": matern(nu=1.5, kappa=1.2),
    "two steps": random_walk(p=2, a=2.0),
    "three steps": random_walk(p=3, a=3.0),
    "four steps": random_walk(p=4, a=2.5),
    "heat": heat(t=1.3),
    "inverse cosine": inverse_cosine(),
    "inverse cosine, short": inverse_cosine(c=0.25),
    "katz": katz(beta=0.3),
    "pagerank": personalised_pagerank(a=0.3),
    "custom": custom([2.0, 1.0, 0.5, 0.1]),
    "custom function": custom(lambda n: heat(t=0.5).alpha(n)),
}


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product of two series, as many terms as they have."""
    return torch.from_numpy(np.convolve(a.numpy(), b.numpy())[: a.size(0)])


def normalized() -> np.ndarray:
    """D^-1/2 W D^-1/2 of a random weighted graph."""
    rng = np.random.default_rng(0)
    weight = np.triu(rng.random((9, 9)) * (rng.random((9, 9)) < 0.5), 1)
    weight[np.arange(8), np.arange(1, 9)] += 0.5
    weight += weight.T
    scale = weight.sum(1) ** -0.5
    return scale[:, None] * weight * scale


@pytest.mark.parametrize("row", ROWS)
def test_oracle_1_square_of_the_modulation_is_the_kernel(row):
    series = ROWS[row]
    f = series.modulation(60)
    assert f.dtype == torch.float64
    torch.testing.assert_close(product(f, f), series.alpha(60), rtol=0, atol=1e-12)
    for n in (1, 2, 7):
        assert torch.equal(series.modulation(n), f[:n])
        assert torch.equal(series.alpha(n), series.alpha(60)[:n])


@pytest.mark.parametrize("row", ROWS)
def test_oracle_1_closed_form_is_the_recurrence(row):
    series = ROWS[row]
    torch.testing.assert_close(series.modulation(60), sqrt_series(series.alpha(60)), rtol=0, atol=1e-12)


def dense(row: str, w: np.ndarray) -> np.ndarray:
    """The kernels by scipy, from their definitions by the Laplacian."""
    eye = np.eye(len(w))
    laplacian = eye - w
    power = scipy.linalg.fractional_matrix_power
    match row:
        case "regularised":
            return power(eye + 0.8**2 * laplacian, -1.7)
        case "regularised d=1":
            return np.linalg.inv(eye + laplacian)
        case "regularised d=2":
            return np.linalg.matrix_power(np.linalg.inv(eye + laplacian), 2)
        case "matern":
            return power(2 * 1.5 / 1.2**2 * eye + laplacian, -1.5)
        case "two steps":
            return np.linalg.matrix_power(2 * eye - laplacian, 2)
        case "three steps":
            return np.linalg.matrix_power(3 * eye - laplacian, 3)
        case "four steps":
            return np.linalg.matrix_power(2.5 * eye - laplacian, 4)
        case "heat":
            return scipy.linalg.expm(-1.3 * laplacian)
        case "inverse cosine":
            return scipy.linalg.cosm(np.pi / 4 * laplacian)
        case "inverse cosine, short":
            return (scipy.linalg.cosm(0.25 * w) + scipy.linalg.sinm(0.25 * w)) / np.sqrt(2)
        case "katz":
            return np.linalg.inv(eye - 0.3 * w)
        case "pagerank":
            return 0.3 * np.linalg.inv(eye - 0.7 * w)
        case "custom":
            return 2 * eye + w + 0.5 * w @ w + 0.1 * w @ w @ w
        case _:
            return scipy.linalg.expm(0.5 * w)


@pytest.mark.parametrize("row", ROWS)
def test_oracle_1_square_of_the_feature_matrix_is_scipys_kernel(row):
    w = normalized()
    series = ROWS[row]
    # The full inverse cosine converges like k^-1.5 at the largest eigenvalue, 1: there the square is taken elsewhere.
    shrink = 0.8 if row == "inverse cosine" else 1.0
    root = np.zeros_like(w)
    for coefficient in reversed(series.modulation(300).tolist()):
        root = root @ (shrink * w) + coefficient * np.eye(len(w))
    expected = dense(row, w)
    if shrink != 1:
        expected = (scipy.linalg.cosm(shrink * np.pi / 4 * w) + scipy.linalg.sinm(shrink * np.pi / 4 * w)) / np.sqrt(2)
    np.testing.assert_allclose(series.scale * root @ root, expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    # and the kernel itself, with its constants
    kernel = np.zeros_like(w)
    for coefficient in reversed(series.alpha(300).tolist()):
        kernel = kernel @ w + coefficient * np.eye(len(w))
    np.testing.assert_allclose(series.scale * kernel, dense(row, w), rtol=0, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("row", ROWS)
def test_function_is_the_series(row):
    series = ROWS[row]
    x = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)
    if series.function is None:
        assert row.startswith("custom")
        return
    powers = x.unsqueeze(1) ** torch.arange(400).double()
    torch.testing.assert_close(series.function(x), series.scale * (powers @ series.alpha(400)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("series", [heat(t=800.0), regularised_laplacian(s=3.0, d=400.0), matern(nu=500.0, kappa=30.0)])
def test_function_at_large_parameters(series):
    """Where the factor s is below, or the series above, what float64 holds."""
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    assert series.function(x).isfinite().all()
    assert (series.function(x).diff() >= 0).all()
    assert series.function(x[-1:]) == pytest.approx((2 * 500.0 / 900) ** -500.0 if "matern" in series.name else 1)


def test_table_of_the_inverse_cosine():
    table = [1, 0.5, -0.375, 0.1041667, -0.1015625, 0.0940104, -0.0912109, 0.0913396]
    torch.testing.assert_close(inverse_cosine(c=1.0).modulation(8), torch.tensor(table).double(), rtol=0, atol=1e-7)


def test_closed_forms_by_hand():
    assert random_walk(p=4, a=2.0).modulation(5).tolist() == [1, 2, 1, 0, 0]
    assert random_walk(p=4, a=3.0).degree == 2
    odd = random_walk(p=1, a=2.0).modulation(4)
    torch.testing.assert_close(odd, torch.tensor([1, 1 / 2, -1 / 8, 1 / 16]).double())
    one = regularised_laplacian(s=1.0, d=1.0).modulation(5)  # (2k-1)!! / (2k)!! / 2^k
    torch.testing.assert_close(one, torch.tensor([1, 1 / 4, 3 / 32, 5 / 128, 35 / 2048]).double())


@pytest.mark.parametrize("row", [r for r in ROWS if not r.startswith("custom") and "cosine" not in r])
def test_radius(row):
    """Just inside the radius the terms fall, just outside they grow."""
    series = ROWS[row]
    f = series.modulation(400)
    if math.isinf(series.radius):
        assert f[-1].abs() < 1e-300
    else:
        k = torch.arange(400, dtype=torch.float64)
        inside, outside = (f * (factor * series.radius) ** k for factor in (0.97, 1.03))
        assert inside[399].abs() < inside[199].abs() / 10
        assert outside[399].abs() > outside[199].abs() * 10


def test_radius_is_estimated():
    # 1 + x + x^2 / 4 is a square; 1 + x has its root at -1, (1 + x)(1 - x / 2) at -1 and 2; the cosine at -pi / 4
    assert custom([1.0, 1.0, 0.25]).radius == math.inf
    assert custom([1.0, 1.0]).radius == pytest.approx(1.0, rel=3e-3)
    assert custom([1.0, 0.5, -0.5]).radius == pytest.approx(1.0, rel=3e-3)
    assert custom(lambda n: katz(0.4).alpha(n)).radius == pytest.approx(2.5, rel=3e-3)
    assert custom(lambda n: inverse_cosine(c=0.25).alpha(n)).radius == pytest.approx(math.pi, rel=3e-3)
    assert custom(lambda n: heat(t=1.0).alpha(n)).radius > 15  # of the rounded coefficients: 19
    assert custom([1.0, 1.0], radius=0.5).radius == 0.5
    assert pair([0.0, 1.0], f1=[1.0, -0.5]).radius == pytest.approx(2.0, rel=3e-3)
    assert pair(lambda n: 0.5 ** torch.arange(n).double(), f1=[1.0, -0.25]).radius == pytest.approx(2.0, rel=3e-3)


def test_squares_of_polynomials_end():
    root = torch.tensor([0.3, 0.7, -0.9, 0.11], dtype=torch.float64)
    alpha = torch.zeros(200, dtype=torch.float64)
    alpha[:7] = torch.from_numpy(np.convolve(root.numpy(), root.numpy()))
    f = sqrt_series(alpha)
    torch.testing.assert_close(f[:4], root, rtol=0, atol=1e-13)
    assert not f[4:].any()
    assert custom(alpha[:7]).degree == 3


def test_pairs():
    alpha = [0.0, 1.0, 0.5, 0.25]
    series = pair(alpha, f1=[1.0, 0.5])
    f1, f2 = series.modulations(30)
    torch.testing.assert_close(product(f1, f2), series.alpha(30), rtol=0, atol=1e-14)
    assert series.alpha(6).tolist() == [0.0, 1.0, 0.5, 0.25, 0.0, 0.0]
    assert torch.equal(series.modulation(30), f1)
    one_sided = pair(alpha, f1=[1.0]).modulations(5)
    assert one_sided[1].tolist() == [0.0, 1.0, 0.5, 0.25, 0.0]
    assert pair(alpha, f1=[1.0]).degree == 3
    assert pair([-1.0, 0.5], f1=[1.0]).alpha(2).tolist() == [-1.0, 0.5]


def test_series_are_differentiable():
    alpha = torch.tensor([1.5, 0.4, -0.3, 0.2, 0.1], dtype=torch.float64, requires_grad=True)
    divisor = torch.tensor([0.8, 0.3, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sqrt_series, [alpha])
    assert torch.autograd.gradcheck(divide_series, [alpha, divisor])


def test_what_is_refused():
    for alpha in ([0.0, 1.0], [-1.0, 1.0]):
        with pytest.raises(ValueError, match=r"alpha: the first coefficient must be positive .* use pair\(alpha, f1\)"):
            custom(alpha)
    with pytest.raises(ValueError, match="f1: the first coefficient must not be zero"):
        pair([1.0, 1.0], f1=[0.0, 1.0])
    with pytest.raises(ValueError, match="alpha: expected at least one coefficient"):
        sqrt_series([])
    with pytest.raises(ValueError, match="returned 3 coefficients where 256 were asked for"):
        custom(lambda n: torch.ones(3))
    with pytest.raises(ValueError, match="d: expected a positive number, got 0"):
        regularised_laplacian(s=1.0, d=0)
    with pytest.raises(ValueError, match="s: expected a positive number, got -1"):
        regularised_laplacian(s=-1)
    with pytest.raises(ValueError, match="kappa: expected a positive number"):
        matern(1.0, 0.0)
    with pytest.raises(ValueError, match="t: expected a positive number, got nan"):
        heat(math.nan)
    with pytest.raises(ValueError, match=r"p: expected a number of steps of at least 1, got 1\.5"):
        random_walk(1.5)
    with pytest.raises(ValueError, match="a: expected a number of at least 2"):
        random_walk(2, a=1.5)
    with pytest.raises(ValueError, match="a: expected a probability between 0 and 1"):
        personalised_pagerank(1.0)
    with pytest.raises(ValueError, match="beta: expected a positive number"):
        katz(-0.1)
    with pytest.raises(ValueError, match="normalization: expected 'sym' or None, got 'rw'"):
        custom([1.0], normalization="rw")
    with pytest.raises(ValueError, match="n: expected a number of terms of at least 1, got 0"):
        heat().alpha(0)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "custom function"])
def test_a_series_goes_to_other_processes(name):
    series = ROWS[name]
    copy = pickle.loads(pickle.dumps(series))  # noqa: S301, our own bytes
    copy = pickle.loads(pickle.dumps(copy))  # noqa: S301
    assert copy.name == series.name
    assert torch.equal(copy.alpha(9), series.alpha(9))
    assert torch.equal(copy.modulation(9), series.modulation(9))


def test_a_series_of_a_function_goes_where_the_function_goes():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(custom(lambda n: heat(t=0.5).alpha(n)))
