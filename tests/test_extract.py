"""The extraction, on exact shapes."""
import numpy as np
import pytest

import extract
import helper


def torus(points):
    across = np.hypot(points[:, 0], points[:, 1]) - 0.5
    return (np.hypot(across, points[:, 2]) - 0.2).astype(np.float32)


def box(points):
    """A slanted box with sides 1, 0.6, 0.2: exact outside, and inside."""
    turned = points @ slanted_axes().T
    q = np.abs(turned) - np.array([0.5, 0.3, 0.1])
    return (np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(axis=1), 0)).astype(np.float32)


def slanted_axes():
    return np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0].T


def with_floater(points):
    ball = np.linalg.norm(points - np.array([0.0, 0.0, 0.7]), axis=1) - 0.1
    return np.minimum(torus(points), ball).astype(np.float32)


def test_a_torus_comes_out_closed_with_its_hole_and_on_its_surface():
    mesh = extract.extract(torus, 48, 96)
    assert mesh.is_watertight and mesh.euler_number == 0
    assert np.abs(torus(mesh.vertices)).max() < 1e-3
    assert mesh.volume == pytest.approx(2 * np.pi ** 2 * 0.5 * 0.2 ** 2, rel=0.01)  # positive: faces look outward


def test_a_floating_piece_is_dropped():
    mesh = extract.extract(with_floater, 48, 96)
    assert mesh.euler_number == 0
    assert mesh.vertices[:, 2].max() < 0.3


def test_the_fine_grid_lies_along_the_object():
    mesh = extract.extract(box, 48, 100)
    axes, low, high = extract.oriented_box(mesh)
    assert np.abs(np.sum(axes * slanted_axes(), axis=1)) == pytest.approx(1.0, abs=1e-3)
    assert high - low == pytest.approx([1.0, 0.6, 0.2], abs=0.01)
    assert mesh.is_watertight and mesh.volume == pytest.approx(0.12, rel=0.03)


@pytest.mark.parametrize("sdf", [torus, box, with_floater])
def test_the_sparse_grid_gives_the_mesh_of_the_dense_one(sdf):
    counts, cell, low = np.array([90, 81, 77]), 0.023, np.array([-1.03, -0.93, -0.9])
    seen = []

    def counting(points):
        seen.append(len(points))
        return sdf(points)

    sparse = extract.sparse_grid(counting, np.eye(3), low, counts, cell)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in counts), indexing="ij"), axis=-1).reshape(-1, 3)
    dense = sdf((grid * cell + low).astype(np.float32)).reshape(counts)
    assert np.isfinite(sparse).all()
    for ours, theirs in zip(extract.marching_cubes(sparse, 0.0)[:2], extract.marching_cubes(dense, 0.0)[:2]):
        assert np.array_equal(ours, theirs)
    assert sum(seen) < 0.5 * dense.size


def test_no_surface_is_said_in_one_line():
    with pytest.raises(helper.UserError, match="no zero set"):
        extract.extract(lambda points: np.ones(len(points), np.float32), 32, 32)


def test_a_surface_through_grid_points_is_closed_all_the_same():
    """Where the sdf is exactly 0 on points of the grid, marching cubes makes triangles without area."""
    def plates(points):
        return np.abs(np.round(points * 16) / 16).max(axis=1).astype(np.float32) - np.float32(0.5)

    mesh = extract.largest_component(extract.grid_mesh(plates, np.eye(3), np.full(3, -1.0), np.full(3, 1.0), 1 / 16))
    assert mesh.is_watertight
