"""Test distances between surfaces on cases with a known answer, and DTU's protocol on a small scan in DTU's files."""
import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import scipy.io
import trimesh
from PIL import Image

import helper
import make_scene
from metrics import meshes


def sphere(radius):
    return trimesh.creation.icosphere(subdivisions=5, radius=radius)


def square(height, low=0.0, high=40.0):
    """Return the rectangle [low, high] x [0, 40] at z = height as a mesh."""
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
    """A mesh of the exact sdf is as close to make_scene.py's points as the spacing of the samples allows."""
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


def refusal(function, *arguments):
    """Call a function that must raise UserError in one line; return the message."""
    with pytest.raises(helper.UserError) as raised:
        function(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("kind", meshes.KINDS)
def test_meshes_of_every_kind_have_the_same_surface(kind, tmp_path):
    mesh = sphere(0.5)
    mesh.export(tmp_path / f"mesh.{kind}")
    shape = meshes.load_shape(tmp_path / f"mesh.{kind}")
    assert shape.area == pytest.approx(mesh.area, rel=1e-4) and np.allclose(shape.bounds, mesh.bounds, atol=1e-5)


def test_a_glb_stands_where_its_nodes_put_it(tmp_path):
    """Blender writes an object's placement into a node; here twice the size, and 5 to the side."""
    scene = trimesh.Scene()
    scene.add_geometry(sphere(0.5), transform=[[2, 0, 0, 5], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    scene.export(tmp_path / "mesh.glb")
    shape = meshes.load_shape(tmp_path / "mesh.glb")
    assert np.allclose(shape.bounds, [[4, -1, -1], [6, 1, 1]], atol=1e-3)


def test_normals_of_a_point_cloud_in_text(tmp_path):
    (tmp_path / "cloud.ply").write_text("ply\nformat ascii 1.0\nelement vertex 2\n" + "".join(
        f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz")) + "end_header\n0 0 1 0 0 2\n"
        "1 0 0 0.5 0 0\n")
    found = meshes.surface(meshes.load_shape(tmp_path / "cloud.ply"))
    assert np.allclose(found.points, [[0, 0, 1], [1, 0, 0]]) and np.allclose(found.normals, [[0, 0, 1], [1, 0, 0]])


def glb(tree, rest=b""):
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    return struct.pack("<4sIIII", b"glTF", 2, 20 + len(text) + len(rest), len(text), 0x4E4F534A) + text + rest


def test_no_other_file_is_read(tmp_path):
    """A file's references to materials, textures and buffers are not followed."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    Image.new("RGB", (4, 4)).save(tmp_path / "texture.png")
    (tmp_path / "named.mtl").write_text("newmtl a\nmap_Kd texture.png\n")
    (tmp_path / "buffer.bin").write_bytes(corners.tobytes())
    (tmp_path / "mesh.obj").write_text("mtllib named.mtl\n" + "".join(f"v {x} {y} {z}\n" for x, y, z in corners)
                                       + "usemtl a\nf 1 2 3\n")
    (tmp_path / "mesh.ply").write_text("ply\nformat ascii 1.0\ncomment TextureFile texture.png\nelement vertex 3\n"
                                       "property float x\nproperty float y\nproperty float z\nelement face 1\n"
                                       "property list uchar int vertex_indices\nend_header\n0 0 0\n1 0 0\n0 1 0\n"
                                       "3 0 1 2\n")
    tree = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
            "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
            "bufferViews": [{"buffer": 0, "byteLength": 36}], "buffers": [{"byteLength": 36, "uri": "buffer.bin"}]}
    (tmp_path / "mesh.glb").write_bytes(glb(tree))
    (tmp_path / "mesh.gltf").write_text(json.dumps(tree))
    (tmp_path / "mesh.zip").write_bytes(b"")
    watching, (read_fd, write_fd) = [True], os.pipe()

    def note(event, arguments):     # also runs in the reading process, a fork of this one
        if watching[0] and event == "open" and str(arguments[0]).startswith(str(tmp_path)):
            os.write(write_fd, os.fsencode(os.path.basename(arguments[0])) + b"\n")

    sys.addaudithook(note)
    for name in ("mesh.obj", "mesh.ply"):
        assert meshes.load_shape(tmp_path / name).area == pytest.approx(0.5)
    for name in ("mesh.glb", "mesh.gltf", "mesh.zip"):
        assert name in refusal(meshes.load_shape, tmp_path / name)
    watching[0] = False
    os.close(write_fd)
    with os.fdopen(read_fd) as file:
        opened = set(file.read().split())
    assert {"mesh.obj", "mesh.ply"} <= opened <= {"mesh.obj", "mesh.ply", "mesh.glb"}


def test_what_a_mesh_must_not_be(tmp_path):
    claims = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
              "buffers": [], "bufferViews": [], "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
              "accessors": [{"componentType": 5126, "count": 3 * 10 ** 8, "type": "VEC3"}]}    # 3.6 GB of zeros
    triangle = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
    for name, content in (("claims.glb", glb(claims)), ("out.obj", (triangle + "f 1 2 9\n").encode()),
                          ("nan.obj", b"v 0 0 nan\n"), ("huge.obj", b"v 0 0 1e200\n"), ("empty.obj", b""),
                          ("flat.off", b"OFF\n3 1 0\n0 0 0\n0 0 0\n0 0 0\n3 0 1 2\n"),
                          ("out.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n"),
                          ("lies.stl", bytes(80) + struct.pack("<I", 2 ** 32 - 1) + bytes(50)),
                          ("lies.ply", b"ply\nformat binary_little_endian 1.0\nelement vertex 9000000000\n"
                                       b"property float x\nend_header\n1234")):
        (tmp_path / name).write_bytes(content)
        assert name in refusal(meshes.load_shape, tmp_path / name)
    os.mkfifo(str(tmp_path / "pipe.ply"))
    assert "not a regular file" in refusal(meshes.load_shape, tmp_path / "pipe.ply")
    assert "no such file" in refusal(meshes.load_shape, tmp_path / "absent.ply")
    assert "too long" in refusal(meshes.load_shape, tmp_path / ("x" * 300 + ".ply"))


def test_a_reader_that_is_slow_or_dies_is_ended(tmp_path, monkeypatch, capfd):
    (tmp_path / "mesh.ply").write_bytes(b"")
    monkeypatch.setattr(meshes, "PATIENCE", 0.2)
    for read, words in ((lambda path: __import__("time").sleep(60), "too long"), (lambda path: os._exit(1), "damaged"),
                        (lambda path: bytearray(1 << 32), "MemoryError"), (lambda path: {}[path], "KeyError")):
        assert words in refusal(meshes.read_apart, read, tmp_path / "mesh.ply")
    assert capfd.readouterr().err == ""


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
    """Write DTU's three files of a made-up scan 7: a plane at z = 0, a patch below the ground and one far above.

    The voxels of 0.5 mm start at (-10, -10, -10); only x < 20 is observed.
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
    """Return the mean distance of the scan's plane from two half planes, at heights `left` and `right`."""
    beyond = np.arange(0, 40.01, 0.2) - 20
    return np.minimum(np.hypot(left, np.maximum(beyond, 0)), np.hypot(right, np.minimum(beyond, 0))).mean()


def test_dtu_counts_what_was_observed_above_the_ground_and_near(dtu):
    """The mesh is 1 mm off where x < 20, and 3 mm elsewhere, unobserved; a piece at 25 mm is an outlier."""
    mesh = trimesh.util.concatenate([square(1.0, 0, 20), square(3.0, 20, 40), square(25.0, 0, 40)])
    scan = meshes.load_dtu(dtu, "scan7")
    found = meshes.compare_dtu(mesh, scan)
    assert found.accuracy == pytest.approx(1.0, abs=0.01)
    assert found.completeness == pytest.approx(to_steps(1.0, 3.0), abs=0.01)
    assert found.chamfer == pytest.approx((found.accuracy + found.completeness) / 2)
    below = scan._replace(ground=np.array([0.0, 0, 1, 15]))         # now the patch at -9 is above the ground
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


def test_a_folder_however_deep_is_searched(dtu):
    here = os.open(".", os.O_RDONLY)
    (dtu / "deep").mkdir()
    try:
        os.chdir(str(dtu / "deep"))
        for _ in range(2000):   # the path gets longer than the system allows
            os.mkdir("deep")
            os.chdir("deep")
    finally:
        os.fchdir(here)
        os.close(here)
    try:
        assert meshes.below(dtu, "Plane7.mat") == dtu / "Plane7.mat"
        assert "there is no" in refusal(meshes.below, dtu, "Plane8.mat")
        assert "there is no" in refusal(meshes.below, dtu / "nowhere", "Plane8.mat")
    finally:
        subprocess.run(["rm", "-rf", str(dtu / "deep")], check=True)    # pytest cannot


@pytest.mark.parametrize("arrays, words", [
    ({"P": {"a": 1.0}}, "numbers"), ({"P": np.array(["a"])}, "numbers"), ({"P": np.array([1, 2, 3, 4j])}, "numbers"),
    ({"P": np.array(["a", 1, 2, 3], object)}, "numbers"), ({"Q": np.zeros(4)}, "no array P"),
    ({"P": np.array([0, 0, 1, np.nan])}, "not finite"), ({"P": np.array([0, 0, 1, 1e300])}, "not finite"),
    ({"P": np.zeros(3)}, "shaped")])
def test_what_a_matlab_file_must_not_hold(dtu, arrays, words):
    scipy.io.savemat(str(dtu / "Plane7.mat"), arrays)
    message = refusal(meshes.load_dtu, dtu, "scan7")
    assert "Plane7.mat" in message and words in message


@pytest.mark.parametrize("step", [0.0, -0.5, np.inf])
def test_refuses_a_grid_without_a_step(dtu, step):
    scipy.io.savemat(str(dtu / "ObsMask7_10.mat"), {"ObsMask": np.ones((3, 3, 3), np.uint8), "BB": np.zeros((2, 3)),
                                                    "Res": step})
    assert "ObsMask7_10.mat" in refusal(meshes.load_dtu, dtu, "scan7")


def test_matlab_files_that_unpack_to_any_size_are_refused(tmp_path):
    """5 MB of compressed zeros, which unpack to the 5 GB that the file declares."""
    size = 5 * 10 ** 9 // 8
    head = struct.pack("<IIIIII", 6, 8, 6, 0, 5, 8) + struct.pack("<iihh4s", 1, size, 1, 1, b"P\0\0\0") \
        + struct.pack("<II", 9, 8 * size % 2 ** 32)
    pack = zlib.compressobj(9)
    packed = pack.compress(struct.pack("<II", 14, len(head) + 8 * size % 2 ** 32) + head)
    packed += pack.flush(zlib.Z_FULL_FLUSH)
    packed += 4800 * (pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH))
    (tmp_path / "bomb.mat").write_bytes(b"MATLAB".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)
                                        + struct.pack("<II", 15, len(packed)) + packed)
    assert "bomb.mat" in refusal(meshes.read_mat, tmp_path / "bomb.mat", "P")
