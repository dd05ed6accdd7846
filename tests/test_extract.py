"""Test the extraction on exact shapes, and its files as other programs open them."""
import shutil
import subprocess

import imageio.v2 as imageio
import numpy as np
import pytest
import trimesh
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

import extract
import helper
import network
from assets import formats, orientation, page
from backends import context
from config.settings import Network


def torus(points):
    across = np.hypot(points[:, 0], points[:, 1]) - 0.5
    return (np.hypot(across, points[:, 2]) - 0.2).astype(np.float32)


def box(points):
    """A slanted box with sides 1, 0.6, 0.2; exact inside and outside."""
    turned = points @ slanted_axes().T
    q = np.abs(turned) - np.array([0.5, 0.3, 0.1])
    return (np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(axis=1), 0)).astype(np.float32)


def slanted_axes():
    return np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0].T


def with_floater(points):
    ball = np.linalg.norm(points - np.array([0.0, 0.0, 0.7]), axis=1) - 0.1
    return np.minimum(torus(points), ball).astype(np.float32)


def grid_mesh(sdf, axes, low, high, cell):
    """Return the zero set of an sdf on a grid from low to high, as a mesh."""
    grid = extract.grid_over(axes, low, high, cell)
    return extract.surface(*extract.sparse_grid(sdf, grid), grid)


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


def wall(points):
    """A wall of 0.4 cells of the grid below, at an angle to it."""
    return (np.abs(points @ slanted_axes()[0]) - 0.0046).astype(np.float32)


def saddles(points):
    """A gyroid, of which every cell of the grid below that it crosses is ambiguous or nearly so; scaled to slope 1."""
    x, y, z = 60 * points.T
    return ((np.sin(x) * np.cos(y) + np.sin(y) * np.cos(z) + np.sin(z) * np.cos(x)) / 100).astype(np.float32)


def dust(points, radius=0.001):
    """Balls that hold one point of the grid below each, with the steepest slope that is allowed for."""
    centres = np.random.default_rng(1).integers(6, 70, (400, 3)) * 0.023 + [-1.03, -0.93, -0.9]
    return (1.49 * (cKDTree(centres).query(points)[0] - radius)).astype(np.float32)


def dense_grid(sdf, grid):
    """Return the sdf at all points of a grid, moved from 0 as in sparse_grid, and all cells."""
    indices = np.stack(np.meshgrid(*map(np.arange, grid.counts), indexing="ij"), axis=-1).reshape(-1, 3)
    values = sdf(((indices * grid.cell + grid.low) @ grid.axes).astype(np.float32)).reshape(grid.counts)
    least = np.float32(extract.APART * grid.cell)
    return np.where(values < 0, np.minimum(values, -least), np.maximum(values, least)), np.ones(grid.counts, bool)


@pytest.mark.parametrize("most, sdf", [
    (0.065, torus), (0.03, box), (0.065, with_floater), (0.09, wall), (1.2, saddles),
    (0.06, lambda points: 1.4 * torus(points)), (0.04, lambda points: 0.7 * box(points)),
    (0.15, dust), (0.25, lambda points: dust(points, 0.03)),
    (0.06, lambda points: 2.7 * torus(points)), (0.06, lambda points: 2.7 * with_floater(points)),    # beyond SLACK
    (0.08, lambda points: np.sign(torus(points))),
])
def test_the_sparse_grid_gives_the_mesh_of_the_dense_one(most, sdf):
    grid = extract.Grid(np.eye(3), np.array([-1.03, -0.93, -0.9]), np.array([90, 81, 77]), 0.023)
    counted = Counted(sdf)
    values, crossed = extract.sparse_grid(counted, grid)
    dense, everywhere = dense_grid(sdf, grid)
    assert np.array_equal(values < 0, dense < 0)
    assert np.array_equal(values[np.isfinite(values)], dense[np.isfinite(values)])
    ours, theirs = extract.surface(values, crossed, grid), extract.surface(dense, everywhere, grid)
    assert np.array_equal(ours.vertices, theirs.vertices) and np.array_equal(ours.faces, theirs.faces)
    assert counted.count < most * dense.size


@pytest.mark.parametrize("sdf", [torus, wall, dust])
def test_the_sparse_grid_knows_every_small_value_that_it_is_asked_for(sdf):
    grid = extract.Grid(slanted_axes(), np.array([-1.03, -0.93, -0.9]), np.array([45, 41, 39]), 0.046)
    exact = extract.reach(grid.cell)
    values, dense = extract.sparse_grid(sdf, grid, exact)[0], dense_grid(sdf, grid)[0]
    assert np.isfinite(values[np.abs(dense) <= exact]).all() and np.isinf(values).any()


def test_the_coarse_grid_knows_every_point_that_may_be_near_a_surface():
    values, _, grid = extract.coarse_grid(dust, 40, 40)
    assert np.array_equal(values < extract.reach(grid.cell), dense_grid(dust, grid)[0] < extract.reach(grid.cell))


def test_only_the_component_of_the_largest_area_is_kept_whole():
    balls = [trimesh.creation.icosphere(subdivisions, radius).apply_translation([place, 0, 0])
             for subdivisions, radius, place in ((3, 0.1, -1), (1, 0.5, 0), (2, 0.2, 1))]
    kept = extract.largest_component(trimesh.util.concatenate(balls))
    assert np.array_equal(kept.triangles, balls[1].triangles) and len(kept.vertices) == len(balls[1].vertices)


@pytest.mark.parametrize("change, closed", [
    (lambda faces: faces, True), (lambda faces: faces[1:], False), (lambda faces: faces[:-2], False),
    (lambda faces: np.concatenate([faces, faces[:1]]), False),
    (lambda faces: np.concatenate([faces, faces[:1], faces[:1]]), False),
    (lambda faces: np.concatenate([faces[1:], faces[:1, ::-1]]), True),
])
def test_a_mesh_is_closed_where_trimesh_says_that_it_is_watertight(change, closed):
    ball = trimesh.creation.icosphere(2)
    mesh = trimesh.Trimesh(ball.vertices, change(ball.faces), process=False)
    assert extract.is_closed(mesh) == closed == mesh.is_watertight


@pytest.mark.parametrize("sdf", [
    lambda points: np.ones(len(points), np.float32),
    lambda points: -np.ones(len(points), np.float32),
    lambda points: (np.linalg.norm(points, axis=1) - 1.2).astype(np.float32),   # around the unit sphere
])
def test_no_surface_is_said_in_one_line(sdf):
    with pytest.raises(helper.UserError, match="no zero set"):
        extract.extract(sdf, 32, 32)


# --- what the coarse pass misses --------------------------------------------------------------------------------------

def ball(points):
    return np.linalg.norm(points, axis=1) - 0.3


def capsule(points, start, end, radius, end_radius=None):
    """A rod from `start` to `end`, or approximately a cone if its radius changes."""
    along = np.clip((points - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
    radii = radius + along * ((radius if end_radius is None else end_radius) - radius)
    return np.linalg.norm(points - start - along[:, None] * (end - start), axis=1) - radii


class Counted:
    """An sdf, the union of parts, that counts its evaluations."""

    def __init__(self, *parts):
        self.parts, self.count = parts, 0

    def __call__(self, points):
        self.count += len(points)
        return np.min([part(points) for part in self.parts], axis=0).astype(np.float32)


DIRECTIONS = [(1.0, 1, 0), (1.0, 1, 1), (-1, 0.3, 0.2), (0.1, -1, 0.3), (0.2, 0.3, -1), (-0.4, -0.7, -0.3)]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("end_radius", [0.018, 0.012])
def test_a_tail_that_is_too_thin_for_the_coarse_pass_is_whole(direction, end_radius):
    tip = 0.8 * np.array(direction) / np.linalg.norm(direction)
    alone, tailed = Counted(ball), Counted(ball, lambda points: capsule(points, 0 * tip, tip, 0.018, end_radius))
    extract.extract(alone, 20, 80)
    mesh = extract.extract(tailed, 20, 80)
    assert mesh.is_watertight and mesh.euler_number == 2
    assert (mesh.vertices @ tip).max() / 0.8 == pytest.approx(0.8 + end_radius, abs=0.02)
    assert tailed.count < 2 * alone.count


def test_a_tail_with_a_bend_and_a_second_ball_at_its_end():
    corner, end = np.array([0.35, 0.65, 0.1]), np.array([-0.5, 0.5, 0.4])
    sdf = Counted(ball, lambda points: capsule(points, 0 * end, corner, 0.009),
                  lambda points: capsule(points, corner, end, 0.009),
                  lambda points: np.linalg.norm(points - end, axis=1) - 0.1)
    mesh = extract.extract(sdf, 40, 150)
    assert mesh.is_watertight and mesh.euler_number == 2
    assert np.linalg.norm(mesh.vertices - end, axis=1).min() == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("slope", [0.5, 2.5])
def test_a_tail_of_an_sdf_that_is_none(slope):
    """A slope above SLACK hides the tail from the coarse grid, but the box still grows."""
    tip = np.array([0.5, 0.4, 0.3])
    parts = Counted(ball, lambda points: capsule(points, 0 * tip, tip, 0.02))
    mesh = extract.extract(lambda points: slope * parts(points), 40, 100)
    assert mesh.is_watertight
    assert (mesh.vertices @ tip).max() / np.linalg.norm(tip) == pytest.approx(np.linalg.norm(tip) + 0.02, abs=0.01)


def test_the_grid_does_not_grow_for_what_floats_beside_a_tail():
    tip, beside = np.array([0.5, 0.3, 0.2]), np.array([-0.5, -0.5, 0.2])
    tailed = Counted(ball, lambda points: capsule(points, 0 * tip, tip, 0.009))
    floating = Counted(*tailed.parts, lambda points: np.linalg.norm(points - beside, axis=1) - 0.1)
    alone, beside_it = (extract.extract(sdf, 40, 100) for sdf in (tailed, floating))
    assert alone.is_watertight and alone.vertices[:, 0].max() > 0.45
    assert alone.bounds == pytest.approx(beside_it.bounds, abs=1e-6) and len(alone.faces) == len(beside_it.faces)


def test_a_sheet_between_the_points_of_the_coarse_grid():
    def sheet(points):
        beyond = np.abs(points - [0.025, 0, 0]) - [0.008, 0.5, 0.4]
        return (np.linalg.norm(np.maximum(beyond, 0), axis=1) + np.minimum(beyond.max(axis=1), 0)).astype(np.float32)

    mesh = extract.extract(sheet, 40, 150)
    assert mesh.is_watertight and mesh.extents == pytest.approx([0.016, 1.0, 0.8], abs=0.01)


# --- the unit sphere --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sdf", [torus, box, with_floater, ball])
def test_a_shape_within_the_unit_sphere_is_what_it_is_without_that(sdf):
    """The two passes without the unit sphere give the same mesh, bit for bit."""
    cell = 2 / 48
    coarse = extract.largest_component(grid_mesh(sdf, np.eye(3), np.full(3, -1.0), np.full(3, 1.0), cell))
    axes, low, high = extract.oriented_box(coarse)
    fine = (high - low + 2 * cell).max() / 96
    expected = extract.largest_component(grid_mesh(sdf, axes, low - cell, high + cell, fine))
    mesh = extract.extract(sdf, 48, 96)
    assert np.array_equal(mesh.vertices, expected.vertices) and np.array_equal(mesh.faces, expected.faces)
    assert not extract.cut_by_sphere(mesh.vertices, sdf).any()


@pytest.mark.parametrize("radius", [0.999, 1.0])
def test_the_unit_sphere_itself_is_not_cut(radius):
    def sphere(points):
        return np.linalg.norm(points, axis=1) - np.float32(radius)

    mesh = extract.extract(sphere, 32, 64)
    assert mesh.is_watertight and not extract.cut_by_sphere(mesh.vertices, sphere).any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_surface_that_leaves_the_unit_sphere_is_closed_by_it(direction):
    centre = 0.6 * np.array(direction) / np.linalg.norm(direction)

    def off(points):
        return (np.linalg.norm(points - centre, axis=1) - 0.6).astype(np.float32)

    mesh = extract.extract(off, 40, 80)
    assert mesh.is_watertight and mesh.euler_number == 2
    assert np.linalg.norm(mesh.vertices, axis=1).max() < 1 + 1e-3
    # Two spherical caps: the plane of the circle in which the spheres meet is 5/6 and 7/30 from their centres.
    on_unit, on_shape = 2 * np.pi * (1 - 5 / 6), 2 * np.pi * 0.6 * (0.6 + 7 / 30)
    cut = extract.cut_by_sphere(mesh.vertices, off)
    assert mesh.area_faces[cut[mesh.faces].all(axis=1)].sum() == pytest.approx(on_unit, rel=0.08)
    assert mesh.area == pytest.approx(on_unit + on_shape, rel=0.01)
    assert np.abs(off(mesh.vertices[~cut])).max() < 0.01


def test_where_the_sphere_cuts_the_normals_are_the_spheres():
    context.set_context("cpu", "0")
    network.initialize(Network(64, 8, 9), np.random.default_rng(0))
    mesh = trimesh.creation.icosphere(subdivisions=2)
    cut = mesh.vertices[:, 2] > 0
    painted, as_it_is = extract.with_colors(mesh, network.shade, cut), extract.with_colors(mesh, network.shade)
    assert painted.vertex_normals[cut] == pytest.approx(mesh.vertices[cut], abs=1e-6)
    assert np.array_equal(painted.vertex_normals[~cut], as_it_is.vertex_normals[~cut])


def test_a_surface_through_grid_points_is_closed_all_the_same():
    """If the sdf is exactly 0 at grid points, marching cubes makes triangles without area."""
    def plates(points):
        return np.abs(np.round(points * 16) / 16).max(axis=1).astype(np.float32) - np.float32(0.5)

    mesh = extract.largest_component(grid_mesh(plates, np.eye(3), np.full(3, -1.0), np.full(3, 1.0), 1 / 16))
    assert mesh.is_watertight


@pytest.mark.parametrize("seed", range(4))
def test_a_surface_within_rounding_of_grid_points_is_closed_all_the_same(seed):
    """A rotated cube with faces in the grid's planes gives triangles as thin as float32 allows; none may be lost."""
    axes = Rotation.random(random_state=seed).as_matrix()

    def cube(points):
        return np.abs(points @ axes.T.astype(np.float32)).max(axis=1) - np.float32(0.5)

    mesh = extract.largest_component(grid_mesh(cube, axes, np.full(3, -1.0), np.full(3, 1.0), 1 / 16))
    assert mesh.is_watertight and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(1.0, rel=0.03)     # marching cubes cuts its edges within a cell


def painted_ball():
    """Return a small ball beside the origin with exact normals: red where z > 0, dark blue below."""
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.4)
    colors = np.where(ball.vertices[:, 2:] > 0, [[250, 10, 10]], [[10, 20, 60]]).astype(np.uint8)
    return trimesh.Trimesh(ball.vertices + [0.1, 0.2, 0.0], ball.faces, vertex_normals=ball.vertices / 0.4,
                           vertex_colors=colors, process=False)


def test_vertices_get_the_networks_normals_and_the_colours_seen_along_them():
    context.set_context("cpu", "0")
    network.initialize(Network(64, 8, 9), np.random.default_rng(0))
    mesh = extract.extract(network.sdf_evaluator(), 24, 32)
    painted = extract.with_colors(mesh, network.shade)
    rgb, gradient = network.shade(mesh.vertices.astype(np.float32), -painted.vertex_normals.astype(np.float32))
    assert painted.vertex_normals == pytest.approx(trimesh.unitize(gradient), abs=1e-5)
    assert np.abs(painted.visual.vertex_colors[:, :3] - 255 * rgb).max() <= 0.51
    assert np.sum(painted.vertex_normals * trimesh.unitize(mesh.vertices), axis=1).min() > 0.5     # a rough sphere
    assert np.array_equal(painted.faces, mesh.faces)


def test_normals_stay_normal_under_any_scale_mat():
    ball = painted_ball()
    mirror = np.array([[0.0, 50, 0, 7], [50, 0, 0, -3], [0, 0, 20, 1], [0, 0, 0, 1]])
    moved = formats.transformed(ball, mirror)
    assert moved.volume == pytest.approx(ball.volume * 50 * 50 * 20)
    assert moved.vertices[0] == pytest.approx(mirror[:3, :3] @ ball.vertices[0] + mirror[:3, 3])
    across = np.einsum("fi,fci->fc", moved.face_normals, moved.vertex_normals[moved.faces])
    assert across.min() > 0.95


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb"])
def test_what_is_written_has_colours_and_normals(tmp_path, suffix):
    ball = painted_ball()
    formats.write(tmp_path / f"ball{suffix}", ball, formats.facts_of(ball, True, "units", 1.0))
    loaded = trimesh.load(tmp_path / f"ball{suffix}", process=False)
    loaded = list(loaded.geometry.values())[0] if suffix == ".glb" else loaded
    assert np.array_equal(loaded.faces, ball.faces)
    assert loaded.vertices == pytest.approx(ball.vertices, abs=1e-6)
    assert loaded.vertex_normals == pytest.approx(ball.vertex_normals, abs=1e-6)
    colors = ball.visual.vertex_colors[:, :3]
    if suffix == ".glb":        # glTF is linear: a grey of 188 is half of white
        assert loaded.visual.vertex_attributes["color"] == pytest.approx((colors / 255) ** 2.2, abs=0.02)
        assert b"KHR_materials_unlit" in (tmp_path / "ball.glb").read_bytes()
    else:
        assert np.array_equal(loaded.visual.vertex_colors[:, :3], colors)


# Inserted into the page: a policy against fetching anything, and a mouse that drags the mesh by 150 pixels after 1 s.
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
    """Return a page (H, W, 3) as headless Chromium draws it, and the console's lines; skip without Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no Chromium here to open the page with (apt-get install chromium)")
    (folder / "page.html").write_text(page, encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", "--window-size=400,400", "--virtual-time-budget=4000",
         f"--screenshot={folder / 'page.png'}", f"file://{folder / 'page.html'}"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=120)
    console = [line for line in done.stdout.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return imageio.imread(folder / "page.png")[..., :3].astype(int), console


def share(picture, condition):
    """Return the share of the drawn pixels (those not white) that satisfy a condition on (r, g, b)."""
    drawn = picture[(picture < 240).any(axis=-1)]
    assert 0.05 * picture.size / 3 < len(drawn) < 0.8 * picture.size / 3
    return condition(*drawn.T).mean()


def test_the_page_draws_the_mesh_in_its_colours_upright_and_turns_it(tmp_path):
    poses = np.eye(4)[None].repeat(2, axis=0)
    poses[:, :3, :3] = np.array([[1.0, 0, 0], [0, 0, -1], [0, -1, 0]]).T    # z of the scene is up, y towards the viewer
    poses[1, :3, :3] = poses[1, :3, :3] @ np.diag([-1.0, 1.0, -1.0])
    turn = orientation.turned_up(helper.upright(poses), -poses[1, :3, 2], "y")
    ball = formats.transformed(painted_ball(), turn)
    facts = formats.facts_of(ball, True, "units", 1.0)
    drawn = page.page(ball, "ball", facts).replace("<head>", NOTHING_FROM_OUTSIDE)
    drawn = drawn.replace('<div id="tools"', '<div id="tools" hidden')
    assert "<title>ball</title>" in drawn
    strange = page.page(ball, "</title><script>alert(1)</script>&", facts)
    assert "<title>&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;</title>" in strange
    still, console = photographed(drawn, tmp_path)
    assert not console
    # Red is the upper half.
    assert share(still[:200], lambda r, g, b: (r > 240) & (g < 20) & (b < 20)) > 0.9
    assert share(still[270:], lambda r, g, b: (r < 20) & (b < 80)) > 0.9
    turned, console = photographed(drawn.replace("</body>", DRAG), tmp_path)
    assert not console
    assert np.abs(turned - still).max(axis=-1).astype(bool).mean() > 0.01
