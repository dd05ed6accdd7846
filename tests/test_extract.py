"""The extraction, on exact shapes; what it writes, opened as others open it."""
import shutil
import subprocess

import imageio.v2 as imageio
import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

import extract
import helper
import network
from backends import context


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


@pytest.mark.parametrize("seed", range(4))
def test_a_surface_within_rounding_of_grid_points_is_closed_all_the_same(seed):
    """A turned cube whose faces lie in the grid's planes: triangles as thin as float32 can tell, none of them lost."""
    axes = Rotation.random(random_state=seed).as_matrix()

    def cube(points):
        return np.abs(points @ axes.T.astype(np.float32)).max(axis=1) - np.float32(0.5)

    mesh = extract.largest_component(extract.grid_mesh(cube, axes, np.full(3, -1.0), np.full(3, 1.0), 1 / 16))
    assert mesh.is_watertight and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(1.0, rel=0.03)     # its edges are cut within a cell


def painted_ball():
    """A small ball off the middle with exact normals: red where z > 0, dark blue below."""
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.4)
    colors = np.where(ball.vertices[:, 2:] > 0, [[250, 10, 10]], [[10, 20, 60]]).astype(np.uint8)
    return trimesh.Trimesh(ball.vertices + [0.1, 0.2, 0.0], ball.faces, vertex_normals=ball.vertices / 0.4,
                           vertex_colors=colors, process=False)


def test_vertices_get_the_networks_normals_and_the_colours_seen_along_them():
    context.set_context("cpu", "0")
    network.initialize(64, 8, 9, 0.6, np.random.default_rng(0))
    mesh = extract.extract(network.sdf_evaluator(), 24, 32)
    painted = extract.with_colors(mesh)
    rgb, gradient = network.shade(mesh.vertices.astype(np.float32), -painted.vertex_normals.astype(np.float32))
    assert painted.vertex_normals == pytest.approx(trimesh.unitize(gradient), abs=1e-5)
    assert np.abs(painted.visual.vertex_colors[:, :3] - 255 * rgb).max() <= 0.51
    assert np.sum(painted.vertex_normals * trimesh.unitize(mesh.vertices), axis=1).min() > 0.5     # a rough sphere
    assert np.array_equal(painted.faces, mesh.faces)


def test_normals_stay_normal_under_any_scale_mat():
    ball = painted_ball()
    mirror = np.array([[0.0, 50, 0, 7], [50, 0, 0, -3], [0, 0, 20, 1], [0, 0, 0, 1]])
    moved = extract.transformed(ball, mirror)
    assert moved.volume == pytest.approx(ball.volume * 50 * 50 * 20)
    assert moved.vertices[0] == pytest.approx(mirror[:3, :3] @ ball.vertices[0] + mirror[:3, 3])
    across = np.einsum("fi,fci->fc", moved.face_normals, moved.vertex_normals[moved.faces])
    assert across.min() > 0.95


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb"])
def test_what_is_written_has_colours_and_normals(tmp_path, suffix):
    ball = painted_ball()
    extract.write_mesh(tmp_path / f"ball{suffix}", ball)
    loaded = trimesh.load(tmp_path / f"ball{suffix}", process=False)
    loaded = list(loaded.geometry.values())[0] if suffix == ".glb" else loaded
    assert np.array_equal(loaded.faces, ball.faces)
    assert loaded.vertices == pytest.approx(ball.vertices, abs=1e-6)
    assert loaded.vertex_normals == pytest.approx(ball.vertex_normals, abs=1e-6)
    colors = ball.visual.vertex_colors[:, :3]
    if suffix == ".glb":        # linear light there: a grey of 188 is half of white
        assert loaded.visual.vertex_attributes["color"] == pytest.approx((colors / 255) ** 2.2, abs=0.02)
        assert b"KHR_materials_unlit" in (tmp_path / "ball.glb").read_bytes()
    else:
        assert np.array_equal(loaded.visual.vertex_colors[:, :3], colors)


# Into the page: it may fetch nothing from outside, and after one second a mouse drags the mesh by 150 pixels.
NOTHING_FROM_OUTSIDE = """<head><meta http-equiv="Content-Security-Policy" content="default-src 'none';
    script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src data: blob:; img-src data: blob:">"""
DRAG = """<script>
Element.prototype.setPointerCapture = Element.prototype.releasePointerCapture = () => {};
setTimeout(() => {
    const at = (name, x) => new PointerEvent(name, {pointerId: 1, pointerType: "mouse", clientX: x, clientY: 200,
                                                    pageX: x, pageY: 200, bubbles: true, button: 0});
    const canvas = document.querySelector("canvas");
    canvas.dispatchEvent(at("pointerdown", 150));
    for (let x = 150; x <= 300; x += 30) canvas.dispatchEvent(at("pointermove", x));
    canvas.dispatchEvent(at("pointerup", 300));
}, 1000);
</script></body>"""


def photographed(page, folder):
    """What headless Chromium draws of a page (H, W, 3), and its console's lines; skips where there is no Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no Chromium here to open the page with (apt-get install chromium)")
    (folder / "page.html").write_text(page, encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", "--window-size=400,400", "--virtual-time-budget=4000",
         f"--screenshot={folder / 'page.png'}", f"file://{folder / 'page.html'}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    console = [line for line in done.stdout.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return imageio.imread(folder / "page.png")[..., :3].astype(int), console


def share(picture, condition):
    """The share of the drawn pixels, those that are not white, that fulfil a condition on (r, g, b)."""
    drawn = picture[(picture < 240).any(axis=-1)]
    assert 0.05 * picture.size / 3 < len(drawn) < 0.8 * picture.size / 3
    return condition(*drawn.T).mean()


def test_the_page_draws_the_mesh_in_its_colours_upright_and_turns_it(tmp_path):
    poses = np.eye(4)[None].repeat(2, axis=0)
    poses[:, :3, :3] = np.array([[1.0, 0, 0], [0, 0, -1], [0, -1, 0]]).T    # z of the scene is up, y towards the viewer
    poses[1, :3, :3] = poses[1, :3, :3] @ np.diag([-1.0, 1.0, -1.0])
    page = extract.page(painted_ball(), "ball", poses, 1).replace("<head>", NOTHING_FROM_OUTSIDE)
    assert "<title>ball</title>" in page
    still, console = photographed(page, tmp_path)
    assert not console
    assert share(still[:200], lambda r, g, b: (r > 240) & (g < 20) & (b < 20)) > 0.9     # red is the upper half
    assert share(still[240:], lambda r, g, b: (r < 20) & (b < 80)) > 0.9
    turned, console = photographed(page.replace("</body>", DRAG), tmp_path)
    assert not console
    assert np.abs(turned - still).max(axis=-1).astype(bool).mean() > 0.01
