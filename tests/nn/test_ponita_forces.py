from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data

from geo.nn import PONITA
from geo.testing import assert_close, check_derivatives
from geo.transforms import AddRadiusGraph

F64 = torch.float64
MODES = {
    "separable": {"num_ori": 6},
    "full": {"num_ori": 4, "separable": False},
    "cloud": {"num_ori": 0},
    "SE3": {"num_ori": 12, "space": "SE3", "degree": 2},
    "plane": {"num_ori": 6, "dim": 2},
}


def build(mode: str = "separable", radius: float | None = 2.0, **changes) -> PONITA:
    torch.manual_seed(0)
    return PONITA(2, 8, 1, 2, readout="add", radius=radius, **(MODES[mode] | changes)).double()


def molecule(dim: int = 3, num: int = 5, radius: float = 2.0, seed: int = 0) -> Data:
    torch.manual_seed(seed)
    data = Data(pos=torch.randn(num, dim, dtype=F64), x=torch.randn(num, 2, dtype=F64))
    return AddRadiusGraph(radius)(data)


@pytest.mark.parametrize("mode", MODES)
def test_forces_are_central_differences(mode):
    model = build(mode)
    batch = Batch.from_data_list([molecule(model.dim, n, seed=n) for n in (5, 1, 4)])
    energy, forces = model.energy_and_forces(batch.x, batch.pos, batch.edge_index, batch.batch)
    assert energy.shape == (3,)
    assert forces.shape == batch.pos.shape
    h = 1e-5
    for v in range(len(batch.pos)):
        for a in range(model.dim):
            step = torch.zeros_like(batch.pos)
            step[v, a] = h
            up, down = (
                model(batch.x, batch.pos + s, batch.edge_index, batch.batch)[0].detach().sum() for s in (step, -step)
            )
            assert forces[v, a].item() == pytest.approx(-((up - down) / (2 * h)).item(), rel=1e-6, abs=1e-8)
    assert forces[batch.batch == 1].abs().max() == 0  # a lone atom
    torch.testing.assert_close(forces[batch.batch == 0].sum(0), torch.zeros(model.dim, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_energy_is_twice_differentiable_at_loops_and_collinear_edges(mode):
    """Self-loops in the graph, an edge along a grid axis, and three atoms on a line."""
    model = build(mode, radius=3.0, **({"grid": "platonic"} if mode == "separable" else {}))
    pos = torch.zeros(3, model.dim, dtype=F64)
    pos[1, 0], pos[2, 0] = 1.0, -0.8
    edge_index = torch.tensor([[0, 1, 1, 2, 0, 2, 1], [0, 0, 1, 0, 2, 2, 2]])
    x = torch.randn(3, 2, dtype=F64)
    check_derivatives(lambda p: model(x, p, edge_index)[0], [pos])


def test_the_papers_attributes_have_a_kink_at_collinear_edges_and_the_default_has_none():
    """Negative control of the test above: the force of 'ponita' jumps where a bond passes through a grid axis."""
    pos = torch.tensor([[0.0, 0, 0], [1, 0, 0]], dtype=F64)
    edge_index = torch.tensor([[1, 0], [0, 1]])
    x = torch.randn(2, 2, dtype=F64)
    jump = {}
    for kind in ("ponita", "universal"):
        model = build("separable", radius=3.0, grid="platonic", invariants=kind)
        forces = []
        for side in (1e-7, -1e-7):
            moved = pos.clone()
            moved[1, 1] = side
            forces.append(model.energy_and_forces(x, moved, edge_index)[1])
        jump[kind] = (forces[0] - forces[1]).abs().max().item()
    assert jump["universal"] < 1e-5
    assert jump["ponita"] > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_energy_is_smooth_through_the_cutoff(mode):
    """One atom moves through the radius: |dE| = O(h^3), with and without the edge in the graph."""
    model = build(mode, radius=2.0)
    x = torch.randn(2, 2, dtype=F64)
    direction = torch.zeros(model.dim, dtype=F64)
    direction[:2] = torch.tensor([0.6, 0.8])
    graph = AddRadiusGraph(2.0)

    def energy(distance: float) -> float:
        pos = torch.stack((torch.zeros_like(direction), direction * distance))
        data = graph(Data(pos=pos))
        assert data.num_edges == (2 if distance <= 2.0 else 0)
        return model(x, pos, data.edge_index)[0].item()

    apart = energy(3.0)
    assert energy(2.0 + 1e-9) == apart
    gaps = [abs(energy(2.0 - h) - apart) for h in (0.08, 0.04, 0.02, 0.01)]
    rates = [np.log2(a / b) for a, b in itertools.pairwise(gaps)]
    assert gaps[0] > 1e-9
    assert rates[-1] > 2.7, (gaps, rates)
    data = graph(Data(pos=torch.stack((torch.zeros_like(direction), direction * (2.0 - 1e-6)))))
    _, forces = model.energy_and_forces(x, data.pos, data.edge_index)
    assert forces.abs().max() < 1e-9


def test_an_energy_without_a_window_jumps():
    """Negative control: without a window an edge that is cut is felt."""
    model = build(radius=None)
    x, pos = torch.randn(2, 2, dtype=F64), torch.tensor([[0.0, 0, 0], [1.2, 1.6, 0]], dtype=F64)
    none = torch.zeros(2, 0, dtype=torch.int64)
    with_edge = model(x, pos, torch.tensor([[0, 1], [1, 0]]))[0]
    assert (with_edge - model(x, pos, none)[0]).abs() > 1e-4


def test_loss_on_forces_trains_every_weight():
    model = build().train()
    data = molecule(num=6)
    energy, forces = model.energy_and_forces(data.x, data.pos, data.edge_index)
    (energy.square().sum() + forces.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    weight = model.kernel_basis.lin1.weight
    analytic = weight.grad[2, 1].item()

    def loss() -> float:
        e, f = model.energy_and_forces(data.x, data.pos, data.edge_index, create_graph=False)
        return float(e.detach().square().sum() + f.square().sum())

    with torch.no_grad():
        weight[2, 1] += 1e-5
        up = loss()
        weight[2, 1] -= 2e-5
        down = loss()
    assert analytic == pytest.approx((up - down) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("loops", [False, True])
def test_hessian_is_finite_and_symmetric(loops):
    model = build().train()
    data = AddRadiusGraph(2.0, loop=loops)(molecule(num=4))
    pos = data.pos.clone().requires_grad_()
    _, forces = model.energy_and_forces(data.x, pos, data.edge_index)
    rows = [torch.autograd.grad(f, pos, retain_graph=True)[0].flatten() for f in forces.flatten()]
    hessian = torch.stack(rows)
    assert torch.isfinite(hessian).all()
    torch.testing.assert_close(hessian, hessian.t(), rtol=1e-8, atol=1e-12)
    assert hessian.abs().max() > 1e-6


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_forces_in_evaluation(context):
    model, data = build().eval(), molecule()
    expected = model.energy_and_forces(data.x, data.pos, data.edge_index)
    assert not expected[1].requires_grad
    with context():
        inside = AddRadiusGraph(2.0)(Data(pos=data.pos * 1.0, x=data.x * 1.0))
        energy, forces = model.energy_and_forces(inside.x, inside.pos, inside.edge_index)
    assert_close((energy.clone(), forces.clone()), expected)
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(False)
    assert_close(model.energy_and_forces(data.x, data.pos, data.edge_index)[1], expected[1])


def test_dense_forces_equal_sparse():
    model, data = build(), molecule(num=5)
    x, pos = (torch.full((2, 7, t.size(1)), float("nan"), dtype=F64) for t in (data.x, data.pos))
    mask = torch.zeros(2, 7, dtype=torch.bool)
    x[0, :5], pos[0, :5], mask[0, :5] = data.x, data.pos, True
    energy, forces = model.energy_and_forces(x, pos, mask=mask)
    expected = model.energy_and_forces(data.x, data.pos, data.edge_index)
    assert_close(energy[:1], expected[0])
    assert_close(forces[0, :5], expected[1])
    assert energy[1] == 0
    assert forces[~mask].eq(0).all()


# -- periodic cells ----------------------------------------------------------------------------------------------------


def crystal(num: int = 8, edge: float = 4.2, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    cell = torch.from_numpy(np.eye(3) * edge + rng.normal(scale=0.2, size=(3, 3)))
    pos = torch.from_numpy(rng.uniform(size=(num, 3))) @ cell
    return Data(x=torch.from_numpy(rng.normal(size=(num, 2))), pos=pos, cell=cell[None], pbc=torch.ones(1, 3).bool())


def repeat(data: Data, times: int) -> Data:
    cell = data.cell[0]
    steps = torch.cartesian_prod(*[torch.arange(times, dtype=F64)] * 3)
    pos = (data.pos[None] + (steps @ cell)[:, None]).flatten(0, 1)
    return Data(x=data.x.repeat(times**3, 1), pos=pos, cell=times * data.cell, pbc=data.pbc)


def check_periodic(data: Data, model: PONITA, radius: float, factor: float = 1.0) -> None:
    graph = AddRadiusGraph(radius)

    def evaluate(d: Data):
        d = graph(d.clone())
        return model.energy_and_forces(d.x, d.pos, d.edge_index, edge_shift=d.edge_shift)

    energy, forces = evaluate(data)
    assert forces.abs().max() > 1e-8
    torch.manual_seed(3)
    moved = data.clone()
    moved.pos = moved.pos + torch.randint(-2, 3, moved.pos.shape).to(moved.pos) @ data.cell[0] + 0.37
    assert_close(evaluate(moved), (energy, forces), factor, "wrapping and translation")
    large_energy, large_forces = evaluate(repeat(data, 2))
    assert_close(large_energy, 8 * energy, factor, "2x2x2")
    assert_close(large_forces, forces.repeat(8, 1), factor, "2x2x2")
    without = graph(data.clone())
    plain = model.energy_and_forces(without.x, without.pos, without.edge_index)[0]
    assert (plain - energy).abs() > 1e-6  # negative control: the shift is needed


@pytest.mark.parametrize("mode", ["separable", "full", "cloud"])
@pytest.mark.parametrize("radius", [2.0, 5.0])
def test_periodic_crystal(mode, radius):
    """A radius of 5 is longer than the cell: atoms see their own images."""
    if (mode, radius) == ("full", 5.0):
        return
    check_periodic(crystal(), build(mode, radius=radius), radius)


def test_water(geo_data):
    """A frame of liquid water: wrapping atoms changes nothing, and a 2x2x2 supercell has 8 times the energy."""
    folder = geo_data / "water_deepmd" / "data_0"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    pos = torch.from_numpy(np.load(folder / "set.000" / "coord.npy")[0].reshape(-1, 3)).double()
    cell = torch.from_numpy(np.load(folder / "set.000" / "box.npy")[0].reshape(1, 3, 3)).double()
    z = torch.from_numpy(np.loadtxt(folder / "type.raw", dtype=np.int64))
    data = Data(x=torch.eye(2, dtype=F64)[z], pos=pos, cell=cell, pbc=torch.ones(1, 3).bool())
    assert data.num_nodes == 192
    check_periodic(data, build(radius=3.0), 3.0, factor=10)


def test_refusals():
    data = molecule()
    for changes in ({"out_channels": 2}, {"readout": "mean"}, {"readout": "node"}, {"out_vec": 1}):
        arguments = {"out_channels": 1, "readout": "add"} | changes
        model = PONITA(2, 8, num_layers=1, num_ori=6, **arguments).double()
        with pytest.raises(ValueError, match="energies need out_channels=1"):
            model.energy_and_forces(data.x, data.pos, data.edge_index)
    model = PONITA(2, 8, 1, 1, num_ori=-1, readout="add").double()
    with pytest.raises(ValueError, match="num_ori is -1"):
        model.energy_and_forces(data.x, data.pos, data.edge_index)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_compiled_forces():
    """Dynamo breaks the graph at ``torch.autograd.grad``; in training AOTAutograd refuses the second pass."""
    torch.compiler.reset()
    model, data = build(), molecule()
    compiled = torch.compile(lambda x, pos: model.energy_and_forces(x, pos, data.edge_index), backend="aot_eager")
    found = compiled(data.x, data.pos)
    assert_close(found, model.energy_and_forces(data.x, data.pos, data.edge_index))
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        found[1].square().sum().backward()
