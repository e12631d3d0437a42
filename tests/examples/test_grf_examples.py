"""The examples of graph random features: what they read, what they predict, what they must not see."""

from __future__ import annotations

import argparse
import math
from importlib import import_module as example
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from geo.kernels import GRFKernel, SparseFeatures, heat, normalized_adjacency, regularised_laplacian
from geo.nn import LearnableModulation
from geo.testing import assert_close

for package in ("lightning", "matplotlib"):
    pytest.importorskip(package, reason=f"the examples need {package}")

CUBE = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]  # seen from outside


@pytest.fixture(scope="module")
def meshes():
    return example("mesh_regression")


def off(vertices=CUBE, faces=QUADS, head="OFF\n8 6 12\n"):
    points = "".join(f"{x} {y} {z}\n" for x, y, z in vertices)
    return f"# a cube\n{head}{points}\n" + "".join(
        f"{len(face)} {' '.join(map(str, face))} 255 0 0\n" for face in faces
    )


def settings(**given):
    series = regularised_laplacian(s=math.sqrt(1 / 3), d=2.0)
    values = {"smoke": True, "root": None, "c": 0.25, "p_halt": 0.5, "walks": [16], "shown": 16, "steps": 3}
    return argparse.Namespace(**(values | {"series": series} | given))


# -- meshes ------------------------------------------------------------------------------------------------------------
def test_off_and_obj_are_the_same_mesh(meshes, tmp_path):
    (tmp_path / "a.off").write_text(off())
    (tmp_path / "b.off").write_text(off(head="OFF 8 6 0\n"))
    points = "".join(f"v {x} {y} {z} 1.0\n" for x, y, z in CUBE)
    corners = [" ".join(f"{k + 1}/1/{k + 1}" for k in face) for face in QUADS[:3]]
    corners += [" ".join(str(k - 8) for k in face) for face in QUADS[3:]]  # counted from the end
    (tmp_path / "c.OBJ").write_text(
        f"mtllib x.mtl\n{points}vn 0 0 1\n" + "".join(f"f {face}  # face\n" for face in corners)
    )
    vertices, faces = meshes.read_mesh(tmp_path / "a.off")
    assert vertices.tolist() == [list(map(float, point)) for point in CUBE]
    assert len(faces) == 12
    for name in ("b.off", "c.OBJ"):
        again, others = meshes.read_mesh(tmp_path / name)
        assert np.array_equal(again, vertices), name
        assert np.array_equal(others, faces), name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.off", "", "line 1: the file must start with the word OFF"),
        ("a.off", "\x00\x01\x02binary", "line 1: the file must start with the word OFF"),
        ("a.off", "OFF\n", "the numbers of vertices and faces are missing"),
        ("a.off", off()[:-20], "8 vertices and 6 faces are announced, but 13 lines follow"),
        ("a.off", off(head="OFF\n8 x 12\n"), "line 3: invalid literal for int"),
        ("a.off", off(head="OFF\n-1 6 12\n"), "-1 vertices and 6 faces are announced"),
        ("a.off", off(vertices=[("one", 0, 0), *CUBE[1:]]), "line 4: could not convert string to float: 'one'"),
        ("a.off", off(faces=[(0, 1), *QUADS[1:]]), "line 13: a face needs three corners, got 2"),
        (
            "a.off",
            off(faces=[(0, 1, 8), *QUADS[1:]]),
            "a face names vertex 8, counted from 0, but there are 8 vertices",
        ),
        ("a.off", off(vertices=[("nan", 0, 0), *CUBE[1:]]), "coordinates that are infinite or not a number"),
        ("a.obj", "v 0 0 0\n", "has no faces"),
        ("a.obj", "v 0 0\n", "line 1: a vertex needs three coordinates, got 2"),
        ("a.obj", "v 0 0 0\nf 0 1 1\n", "line 2: a face names vertex 0, but OBJ counts vertices from 1"),
        ("a.obj", "v 0 0 0\nf -2 -1 1\n", "a face names vertex -1, counted from 0, but there are 1 vertices"),
    ],
)
def test_malformed_meshes_are_refused_in_one_line(meshes, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as caught:
        meshes.read_mesh(tmp_path / name)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_generated_meshes_are_closed_and_their_normals_point_outwards(meshes):
    ball, ring = (meshes.load(name, settings(smoke=False)) for name in ("icosphere", "torus"))
    for mesh, euler in ((ball, 2), (ring, 0)):
        assert len(mesh.vertices) - mesh.edge_index.size(1) // 2 + len(mesh.faces) == euler
        assert_close(mesh.normals.norm(dim=1), torch.ones(len(mesh.vertices), dtype=torch.float64))
    assert len(ring.vertices) == 48 * 24
    assert float(torch.cosine_similarity(ball.normals, torch.from_numpy(ball.vertices), dim=1).min()) > 0.999
    xy = torch.from_numpy(ring.vertices[:, :2])
    centre = torch.nn.functional.pad(xy / xy.norm(dim=1, keepdim=True), (0, 1))
    outwards = torch.from_numpy(ring.vertices) - centre
    assert float(torch.cosine_similarity(ring.normals, outwards, dim=1).min()) > 0.98


def test_exact_product_is_that_of_the_dense_kernel(meshes):
    mesh, args = meshes.load("torus", settings()), settings()
    dense = GRFKernel(mesh.edge_index, args.series, num_walks=2, dtype=torch.float64).exact()
    found = meshes.exact(mesh, mesh.normals, args.series, 64) * args.series.scale
    assert_close(found, dense @ mesh.normals)


def test_predictions_never_see_hidden_normals(meshes):
    mesh, args = meshes.load("torus", settings()), settings()
    visible = torch.rand(len(mesh.vertices), generator=torch.Generator().manual_seed(0)) > 0.3
    other = mesh._replace(normals=torch.where(visible.unsqueeze(1), mesh.normals, torch.tensor([0.0, 0.0, 9.0])))
    names = set()
    for (name, first), (_, second) in zip(
        meshes.predictions(mesh, visible, args, 0), meshes.predictions(other, visible, args, 0), strict=True
    ):
        assert torch.equal(first[~visible], second[~visible]), name
        names.add(name)
    assert {"learned modulation", "nearest visible vertex", "exact kernel", ("iid", 16)} <= names


def test_nearest_visible_vertex_on_a_path(meshes):
    """Of a path of four vertices the two in the middle are hidden, the second nearer to the first; one is alone."""
    points = np.array([[0.0, 0, 0], [1, 0, 0], [3, 0, 0], [4, 0, 0], [9, 9, 9]])
    edges = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    mesh = meshes.Mesh(points, np.zeros((0, 3)), edges, torch.arange(15.0).view(5, 3))
    visible = torch.tensor([True, False, False, True, False])
    assert meshes.nearest(mesh, visible)[:, 0].tolist() == [0, 0, 9, 9, 0]


def test_torus_with_16_walks_reaches_its_target(meshes, tmp_path, capsys):
    rows = meshes.main(["--data", "torus", "--walks", "16", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)])
    cosine = {row[0]: row[2] for row in rows}
    assert cosine["random features, antithetic+repelling"] >= 0.996
    assert cosine["random features, antithetic+repelling"] <= cosine["exact kernel"] + 1e-3
    assert cosine["exact kernel"] == pytest.approx(0.9988, abs=5e-4)
    assert cosine["nearest visible vertex"] < cosine["learned modulation"]
    assert "torus, prototype" in capsys.readouterr().out


def test_every_mesh_of_a_folder_is_read(meshes, tmp_path, capsys):
    (tmp_path / "cube.off").write_text(off(vertices=[*CUBE, (5, 5, 5)], head="OFF\n9 6 12\n"))
    (tmp_path / "notes.txt").write_text("no mesh")
    meshes.main(["--root", str(tmp_path), "--smoke", "--hidden", "0.4", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "cube.off: 1 vertices are in no face and left out" in printed
    assert "cube.off: 8 vertices, 18 edges" in printed
    for flags, message in (
        (["--root", str(tmp_path), "--data", "sphere.obj"], "got sphere.obj, but"),
        (["--data", "bunny.off"], "got bunny.off, but --root is not given"),
        (["--root", str(tmp_path / "out")], "has no .off or .obj files"),
        (["--walks", "3"], "--walks: must be even numbers"),
        (["--hidden", "1"], "--hidden: must be between 0 and 1"),
        (["--repeats", "0"], "--repeats: must be a positive integer"),
    ):
        with pytest.raises(SystemExit):
            meshes.main(flags)
        assert message in capsys.readouterr().err


# -- Gaussian processes ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def gp():
    return example("graph_gp")


@pytest.fixture
def ring(gp, monkeypatch):
    """Instead of files: a ring of 70 papers with two topics; paper 65 has none, the last 20 are tested."""
    node = torch.arange(70)
    y = torch.where(node == 65, -1, node % 2)
    edges = torch.stack([node, (node + 1) % 70])
    data = Data(edge_index=torch.cat([edges, edges.flip(0)], dim=1), y=y, num_nodes=70)
    data.train_mask, data.test_mask = node < 4, (node >= 50) & (y >= 0)
    monkeypatch.setattr(gp, "CitationGraph", lambda root, name: {"cora": [data]}[name])
    return argparse.Namespace(data="cora", root=Path("files"), seed=0)


def test_splits_of_citations(gp, ring):
    task = gp.citations(ring)
    labels = torch.eye(2, dtype=torch.float64)[torch.arange(70) % 2]
    labels[65] = 0
    assert torch.equal(task.targets, labels)
    nodes, tested = task.split(0)
    assert nodes.tolist() == [0, 1, 2, 3]
    assert tested.tolist() == [node for node in range(50, 70) if node != 65]
    for split in (1, 2):
        nodes, tested = task.split(split)
        assert task.targets[nodes].sum(0).tolist() == [20, 20]
        assert task.targets[tested].any(1).all()
        assert len({*nodes.tolist(), *tested.tolist()}) == 40 + 19
    assert not torch.equal(task.split(1)[0], task.split(2)[0])


def test_missing_and_damaged_citations_end_in_one_line(gp, tmp_path):
    flags = ["--data", "cora", "--root", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"no file .*ind\.cora\.x; put it there or give another root"):
        gp.main(flags)
    (tmp_path / "Cora" / "raw").mkdir(parents=True)
    for part in ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index"):
        (tmp_path / "Cora" / "raw" / f"ind.cora.{part}").write_bytes(b"x")
    with pytest.raises(SystemExit, match=r"ind\.cora\.x: cannot be read"):
        gp.main(flags)


def test_cora_is_the_published_graph(gp, geo_data):
    task = gp.citations(argparse.Namespace(data="cora", root=geo_data / "planetoid", seed=0))
    assert task.targets.sum(0).tolist() == [351, 217, 418, 818, 426, 298, 180]
    assert task.edge_index.size(1) == 2 * 5278
    assert [len(part) for part in task.split(0)] == [140, 1000]
    assert [len(part) for part in task.split(1)] == [140, 1000]
    other = gp.citations(argparse.Namespace(data="citeseer", root=geo_data / "planetoid", seed=0))
    assert int(other.targets.sum()) == 3312  # of 3,327 papers 15 have no label
    assert [len(part) for part in other.split(0)] == [120, 1000]


def test_exact_process_is_the_textbook_formula(gp):
    args = argparse.Namespace(data="waves", smoke=True, seed=0, length=8)
    task = gp.waves(args)
    nodes, tested = task.split(0)
    modulation = LearnableModulation(64, "heat", init=heat(2.0)).double()
    t = modulation.hyperparameters()["t"]  # 2, rounded to float32
    dense = GRFKernel(task.edge_index, heat(t), num_walks=2, dtype=torch.float64).exact()
    eigvals, eigvecs = torch.linalg.eigh(dense)
    model = gp.ExactGP((1 + eigvals.log() / t, eigvecs), modulation)
    with torch.no_grad():
        model.log_noise.fill_(math.log(0.3))
        model.log_scale.fill_(math.log(1.7))
    y = task.targets[nodes]
    (loss,) = model.fit(nodes, y, steps=1, lr=0.0)
    mean, variance = model.predict(tested)
    known = 1.7 * dense[nodes][:, nodes] + 0.3 * torch.eye(len(nodes), dtype=torch.float64)
    across = 1.7 * dense[tested][:, nodes]
    density = torch.distributions.MultivariateNormal(y.mean().expand(len(nodes)), known).log_prob(y)
    assert loss == pytest.approx(-float(density) / len(nodes), rel=1e-8)
    assert_close(mean.flatten(), y.mean() + across @ torch.linalg.solve(known, y - y.mean()))
    assert_close(variance, 1.7 * dense.diag()[tested] - (across * torch.linalg.solve(known, across.t()).t()).sum(1))
    found = gp.scores(task, mean, variance.unsqueeze(1), task.targets[tested].unsqueeze(1))
    normal = torch.distributions.Normal(mean.flatten(), variance.sqrt())
    assert found["nlpd"] == pytest.approx(-float(normal.log_prob(task.targets[tested]).mean()))


def test_learned_kernel_finds_waves_that_heat_cannot(gp):
    args = argparse.Namespace(data="waves", smoke=False, seed=0, length=8, steps=40, lr=0.1, walks=128, p_halt=0.1)
    task = gp.waves(args)
    rowptr, col, weight = normalized_adjacency(task.edge_index, dtype=torch.float64)
    spectrum = torch.linalg.eigh(SparseFeatures(rowptr, col, weight, len(task.targets)).to_dense())
    found = {"heat": gp.train("heat", task, 0, args, spectrum), "learned": gp.train("learned", task, 0, args)}
    assert found["learned"]["score"] < 0.85 * found["heat"]["score"]
    assert found["learned"]["nlpd"] < found["heat"]["nlpd"] - 0.1
    x, y = found["learned"]["curve"]
    assert 0.2 < float(x[y.argmax()]) < 0.9, "waves of five nodes are neither constant nor opposite from node to node"
    assert float(found["heat"]["curve"][1].argmax()) == len(x) - 1


@pytest.mark.usefixtures("ring")
def test_labels_are_predicted_and_wrong_flags_refused(gp, tmp_path, capsys):
    flags = ["--data", "cora", "--root", str(tmp_path), "--smoke", "--threads", "1", "--out", str(tmp_path / "out")]
    rows = gp.main([*flags, "--models", "learned"])
    assert [row[0] for row in rows] == ["label propagation", "learned modulation"]
    assert "accuracy (%)" in (tmp_path / "out" / "table.md").read_text()
    assert not (tmp_path / "out" / "maps.png").exists()
    capsys.readouterr()
    for flags, message in (
        (["--data", "cora"], "--data cora needs --root"),
        (["--models", "gpt"], "--models must be of heat, matern, learned; got gpt"),
        (["--walks", "3"], "--walks must be even"),
        (["--splits", "0"], "--splits must be at least 1, got 0"),
        (["--p-halt", "1"], "--p-halt must be between 0 and 1"),
    ):
        with pytest.raises(SystemExit):
            gp.main(flags)
        assert message in capsys.readouterr().err


def test_exact_process_has_a_gradient_where_its_kernel_ends(gp):
    """F(x) = x is zero at the eigenvalue 0, which grids have many times."""
    modulation = LearnableModulation(1, "free").double()
    with torch.no_grad():
        modulation.raw.copy_(torch.tensor([0.0, 1.0]))
    model = gp.ExactGP(
        (torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), torch.eye(3, dtype=torch.float64)), modulation
    )
    model.nodes = torch.arange(3)
    model.covariance().sum().backward()
    assert_close(modulation.raw.grad, modulation.scale() * torch.tensor([0.0, 4.0], dtype=torch.float64))
