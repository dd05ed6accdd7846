"""Distances between surfaces, on cases with a known answer; DTU's protocol on a small scan in DTU's files."""
import numpy as np
import pytest
import scipy.io
import trimesh

import helper
import make_scene
from metrics import meshes


def sphere(radius):
    return trimesh.creation.icosphere(subdivisions=5, radius=radius)


def square(height, low=0.0, high=40.0):
    """A mesh: the square [low, high] x [0, 40] at z = height."""
    corners = [[low, 0, height], [high, 0, height], [high, 40, height], [low, 40, height]]
    return trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)


def compared(ours, truth, samples=40000):
    return meshes.compare(meshes.surface(ours, samples), meshes.surface(truth, samples))


def test_concentric_spheres_are_apart_by_the_difference_of_their_radii():
    distances, consistency = compared(sphere(0.5), sphere(0.53))
    assert distances == pytest.approx((0.03, 0.03, 0.03), abs=3e-3)
    assert 0.995 < consistency <= 1


def test_planes_are_apart_by_their_distance_and_their_angle():
    distances, consistency = compared(square(0.0), square(3.0))
    assert distances == pytest.approx((3.0, 3.0, 3.0), abs=0.02) and consistency == pytest.approx(1.0)
    tilted = square(0.0)
    tilted.apply_transform(trimesh.transformations.rotation_matrix(np.radians(60), [1, 0, 0]))
    assert compared(tilted, square(0.0), 2000)[1] == pytest.approx(0.5)
    assert compared(trimesh.Trimesh(tilted.vertices, tilted.faces[:, ::-1]), square(0.0), 2000)[1] == pytest.approx(0.5)


def test_missing_and_superfluous_surface_are_told_apart():
    one, two = (meshes.Surface(np.array([[0.0, 0, 0], [1.0, 0, 0]])[:count], None) for count in (1, 2))
    assert meshes.compare(one, two) == ((0.0, 0.5, 0.25), None)
    assert meshes.compare(two, one) == ((0.5, 0.0, 0.25), None)


def test_the_embedded_scenes_surface_and_its_normals(tmp_path):
    """A mesh of the exact sdf against what make_scene.py writes: next to nothing, as its samples lie apart."""
    points = make_scene.surface_samples(20000, np.random.default_rng(0))
    cloud = trimesh.Trimesh(points, vertex_normals=make_scene.exact_normals(points), process=False)
    cloud.export(tmp_path / "surface.ply")
    truth = meshes.load_shape(tmp_path / "surface.ply")
    assert not meshes.has_faces(truth)
    distances, consistency = compared(make_scene.surface_mesh(96), truth)
    assert distances.chamfer < 0.007 and consistency > 0.98
    bare = trimesh.PointCloud(points)
    assert compared(make_scene.surface_mesh(96), bare) == (pytest.approx(distances), None)


@pytest.mark.parametrize("content", [b"", b"ply\nnonsense", b"\x00\x01\x02"])
def test_a_file_that_is_no_mesh_is_refused(tmp_path, content):
    path = tmp_path / "mesh.ply"
    path.write_bytes(content)
    with pytest.raises(helper.UserError, match="mesh.ply"):
        meshes.load_shape(path)


def test_thinning_is_what_taking_points_one_by_one_gives():
    points = np.random.default_rng(1).uniform(size=(1500, 3))
    kept = []
    for point in points[np.random.default_rng(7).permutation(1500)]:
        if not kept or np.linalg.norm(np.array(kept) - point, axis=1).min() > 0.15:
            kept.append(point)
    assert np.array_equal(meshes.thinned(points, 0.15, seed=7), kept)
    assert 50 < len(kept) < 500


# --- DTU's protocol ---------------------------------------------------------------------------------------------------

@pytest.fixture
def dtu(tmp_path):
    """DTU's three files of a made-up scan 7: a plane at z = 0, a patch below the ground and another far above.

    The grid of voxels of 0.5 mm begins at (-10, -10, -10); observed is x < 20 alone.
    """
    grid = np.stack(np.meshgrid(np.arange(0, 40.01, 0.2), np.arange(0, 40.01, 0.2)), axis=-1).reshape(-1, 2)
    points = np.concatenate([np.c_[grid, np.full(len(grid), z)] for z in (0.0, -9.0, 60.0)])
    (tmp_path / "Points" / "stl").mkdir(parents=True)
    trimesh.PointCloud(points).export(tmp_path / "Points" / "stl" / "stl007_total.ply")
    observed = np.zeros((120, 120, 40), np.uint8)
    observed[:60] = 1
    scipy.io.savemat(str(tmp_path / "ObsMask7_10.mat"), {
        "ObsMask": observed, "BB": np.array([[-10.0, -10, -10], [49.5, 49.5, 9.5]]), "Res": 0.5})
    scipy.io.savemat(str(tmp_path / "Plane7.mat"), {"P": np.array([[0.0], [0], [1], [5]])})
    return tmp_path


def to_steps(left, right):
    """The mean distance of the scan's plane from two others, that far above its left half and its right half."""
    beyond = np.arange(0, 40.01, 0.2) - 20
    return np.minimum(np.hypot(left, np.maximum(beyond, 0)), np.hypot(right, np.minimum(beyond, 0))).mean()


def test_dtu_counts_what_was_observed_above_the_ground_and_near(dtu):
    """Ours is 1 mm off where x < 20 and 3 mm where not, which no camera observed; a piece 25 mm up is an outlier."""
    mesh = trimesh.util.concatenate([square(1.0, 0, 20), square(3.0, 20, 40), square(25.0, 0, 40)])
    scan = meshes.load_dtu(dtu, "scan7")
    found = meshes.compare_dtu(mesh, scan)
    assert found.accuracy == pytest.approx(1.0, abs=0.01)
    assert found.completeness == pytest.approx(to_steps(1.0, 3.0), abs=0.01)
    assert found.chamfer == pytest.approx((found.accuracy + found.completeness) / 2)
    below = scan._replace(ground=np.array([0.0, 0, 1, 15]))         # the patch at -9 counts once the ground is below it
    assert meshes.compare_dtu(mesh, below).completeness == pytest.approx(
        (to_steps(1.0, 3.0) + to_steps(10.0, 12.0)) / 2, abs=0.01)
    wide = scan._replace(observed=np.ones_like(scan.observed))
    assert meshes.compare_dtu(mesh, wide).accuracy == pytest.approx(2.0, abs=0.02)


def test_what_dtu_refuses(dtu):
    for name in ("scan8", "teapot"):
        with pytest.raises(helper.UserError, match="scan"):
            meshes.load_dtu(dtu, name)
    scan = meshes.load_dtu(dtu, "dtu_scan007")
    with pytest.raises(helper.UserError, match="--world"):
        meshes.compare_dtu(sphere(0.5), scan)
    with pytest.raises(helper.UserError, match="this very scan"):
        meshes.compare_dtu(sphere(10.0).apply_translation([500, 0, 0]), scan)
    (dtu / "Plane7.mat").write_bytes(b"nonsense")
    with pytest.raises(helper.UserError, match="Plane7.mat"):
        meshes.load_dtu(dtu, "scan7")
