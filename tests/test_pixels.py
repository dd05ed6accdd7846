"""Pixels as areas: coverage, thin parts, jumps in depth, the number of evaluations, backgrounds; on exact shapes."""
import numpy as np
import pytest

import helper
import ray_tracer
from config import settings
from conftest import ROOT
from rendering import pixels
from tracing.cones import Cones

TRACER = settings.load_config(ROOT / "config" / "default.yaml").tracer
CENTRE, RADIUS = np.array([0.03, -0.02, 0.1], np.float32), 0.55


class Counting:
    """An sdf that counts its calls and points."""

    def __init__(self, sdf):
        self.sdf, self.calls, self.points = sdf, 0, 0

    def __call__(self, points):
        self.calls, self.points = self.calls + 1, self.points + len(points)
        return self.sdf(points)


def ball(points, centre=CENTRE, radius=RADIUS):
    return np.linalg.norm(points - centre, axis=1).astype(np.float32) - np.float32(radius)


def wire(points, slope=0.0, z=-0.7, radius=0.0083):
    """A wire in the plane at z, through x = y = 0 and with x = slope y, within the unit sphere."""
    along = np.array([slope, 1, 0], np.float32) / np.float32(np.hypot(slope, 1))
    reach = np.sqrt(1 - z * z) - 0.05
    nearest = np.clip(points @ along, -reach, reach)[:, None] * along + np.array([0, 0, z], np.float32)
    return np.linalg.norm(points - nearest, axis=1).astype(np.float32) - np.float32(radius)


def shader(sdf, color):
    """Return the shade function of an exact sdf, normals by differences, with colours by color(points)."""
    def shade(points, directions):
        normals = [sdf(points + step) - sdf(points - step) for step in np.eye(3, dtype=np.float32) * 1e-3]
        return color(points), np.stack(normals, axis=1) / 2e-3
    return shade


def grey(points):
    return np.full(points.shape, 0.5, np.float32)


def camera(size=64, shift=0.0):
    """A camera at z = -3 that looks at the origin; shift: of the image, in pixels."""
    pose = np.eye(4)
    pose[2, 3] = -3
    middle = (size - 1) / 2 + shift
    return helper.Camera(np.array([[1.4 * size, 0, middle], [0, 1.4 * size, middle], [0, 0, 1]]), pose, (size, size))


def rendered(sdf, seen, color=grey, wanted=None):
    return pixels.render_areas(sdf, shader(sdf, color), seen, TRACER, wanted)


def exact_cover(seen, each=24):
    """Return the share (H, W) of each pixel's area that shows the ball, from each x each exact rays."""
    offsets = (np.arange(each) + 0.5) / each - 0.5
    cover = np.zeros(seen.shape)
    for u in offsets:
        for v in offsets:
            uv = helper.pixel_grid(*seen.shape) + np.array([u, v])
            origin, directions = helper.pixel_rays(uv, seen.intrinsics, seen.pose)
            off = np.linalg.norm(np.cross(CENTRE - origin, directions), axis=1)
            cover += (off < RADIUS).reshape(seen.shape) / each ** 2
    return cover


def test_alpha_is_the_share_of_a_pixel_that_a_ball_covers():
    seen = camera()
    areas, centres = rendered(ball, seen)
    exact = exact_cover(seen)
    outline = (exact > 0) & (exact < 1)
    assert 100 < outline.sum() < 300
    assert np.array_equal(areas.alpha[~outline], exact[~outline].round())
    off = areas.alpha - exact
    assert np.abs(off).max() < 0.3 and off[outline].std() < 0.1     # five rays: 0.29 at most, 0.08 on average
    assert abs(off.sum()) < 0.02 * outline.sum()
    assert (centres.alpha - exact)[outline].std() > 0.25
    # colours are the object's alone, white only where nothing is hit
    assert np.allclose(areas.rgb[areas.alpha > 0], 0.5) and np.all(areas.rgb[areas.alpha == 0] == 1)
    assert np.array_equal(areas.hit, centres.hit) and np.array_equal(areas.depth, centres.depth)
    assert np.all(areas.alpha[centres.hit] > 0)


def test_the_rays_through_the_centres_are_those_of_render_view():
    seen = camera()
    for one, other in zip(rendered(ball, seen)[1], pixels.render_view(ball, shader(ball, grey), seen, TRACER)):
        assert np.array_equal(one, other)


class Search:
    """A search of hits as backends.gpu_search.Search is, which takes every third ray to pass the surface narrowly."""

    still = "a grid that is there already"

    def first_hits(self, chords, fractions, how, limits, grid, spread):
        assert grid is self.still and chords.want_hit.all() and np.all(np.diff(fractions) > 0) and spread > 0
        t, hit = ray_tracer.trace(ball, chords.origins, chords.directions, tolerance=how.tolerance)
        return np.where(hit, t, chords.near), hit, np.arange(len(t)) % 3 == 0


def test_a_search_of_a_gpu_finds_the_hits():
    seen = camera()
    origin, directions = helper.pixel_rays(helper.pixel_grid(*seen.shape), seen.intrinsics, seen.pose)
    found = []
    for search in (None, Search()):
        cones, sdf = Cones(0.002), Counting(ball)
        t, hit = ray_tracer.trace(sdf, origin, directions, cones=cones, search=search)
        found.append((t, hit, cones.near(t, hit), sdf.points))
    (t, hit, _, points), (searched_t, searched_hit, near, searched_points) = found
    assert np.array_equal(searched_t, t) and np.array_equal(searched_hit, hit) and 0 < hit.mean() < 1
    meets = ray_tracer.intersect_unit_sphere(origin, directions)[2]
    assert np.array_equal(np.flatnonzero(near), np.flatnonzero(meets)[::3]) and (near & hit).any()
    assert points > 0 == searched_points


def test_only_outlines_cost_more():
    sdf, shaded, seen = Counting(ball), [], camera(256)

    def shade(points, directions):
        shaded.append(len(points))
        return shader(ball, grey)(points, directions)

    pixels.render_view(sdf, shade, seen, TRACER)
    calls, points, hits = sdf.calls, sdf.points, sum(shaded)
    sdf.calls, sdf.points = 0, 0
    shaded.clear()
    pixels.render_areas(sdf, shade, seen, TRACER)
    assert sdf.points < 1.2 * points and sdf.calls < 2 * calls + 5
    assert hits < sum(shaded) < 1.05 * hits     # the steep but smooth rim of the ball keeps its one ray


def test_a_wire_between_the_rays_through_the_centres_is_found():
    seen = camera()     # x = 0 is halfway between two columns
    areas, centres = rendered(lambda points: wire(points, z=0), seen)
    width = 2 * 0.0083 / 3 * seen.intrinsics[0, 0]
    assert 0.45 < width < 0.55 and not centres.hit.any()
    rows = slice(8, 56)
    assert np.all(np.abs(areas.alpha[rows].sum(axis=1) - width) < 0.21)
    assert not areas.alpha[:, :31].any() and not areas.alpha[:, 33:].any()


@pytest.mark.parametrize("slope", [0.1, 0.6])
def test_a_wire_is_as_wide_as_it_is(slope):
    seen = camera()
    areas, centres = rendered(lambda points: wire(points, slope, z=0), seen)
    width = 2 * 0.0083 / 3 * seen.intrinsics[0, 0] * np.hypot(slope, 1)
    across = areas.alpha[12:52].sum(axis=1)
    assert across.mean() == pytest.approx(width, rel=0.05) and across.min() > 0.3 * width
    assert centres.alpha[12:52].sum(axis=1).min() == 0      # dotted


def two_colors(points):
    """Red in front of z = -0.6, green behind."""
    return np.where(points[:, 2:] < -0.6, np.float32([1, 0, 0]), np.float32([0, 1, 0]))


def test_a_wire_in_front_of_a_ball_is_found():
    seen, scale = camera(), 1.4 * 64 / 2.3
    areas, centres = rendered(lambda points: np.minimum(wire(points, radius=0.006), ball(points)), seen, two_colors)
    inside = np.s_[20:44]
    assert np.all(centres.hit[inside, 25:40]) and not centres.rgb[inside, 25:40, 0].any()   # all pass it
    assert np.all(areas.alpha[inside, 25:40] == 1)
    red = areas.rgb[inside, 25:40, 0].sum(axis=1)
    assert np.all(np.abs(red - 2 * 0.006 * scale) < 0.21)
    assert np.allclose(areas.rgb[inside, 25:40].sum(axis=-1), 1)


def test_a_jump_in_depth_mixes_both_colours():
    front = np.array([0.2, 0.1, -0.75], np.float32)
    seen = camera(96)

    def sdf(points):
        return np.minimum(ball(points), ball(points, front, 0.14))

    areas, centres = rendered(sdf, seen, two_colors)
    origin, directions = helper.pixel_rays(helper.pixel_grid(96, 96), seen.intrinsics, seen.pose)
    off = np.linalg.norm(np.cross(front - origin, directions), axis=1).reshape(96, 96)
    pixel = 2.25 / seen.intrinsics[0, 0]
    rim = np.abs(off - 0.14) < 0.2 * pixel
    assert rim.sum() > 10 and np.all(areas.alpha[rim] == 1)
    assert np.all((areas.rgb[rim, 0] > 0.15) & (areas.rgb[rim, 0] < 0.85))
    far = np.abs(off - 0.14) > 0.8 * pixel
    assert np.array_equal(areas.rgb[far & centres.hit & (areas.alpha == 1)],
                          centres.rgb[far & centres.hit & (areas.alpha == 1)])


def test_wanted_pixels_are_those_of_the_whole_picture():
    seen, wanted = camera(), np.zeros((64, 64), bool)
    wanted[10:40, 20:64] = np.random.default_rng(0).random((30, 44)) < 0.5
    whole, part = rendered(ball, seen)[0], rendered(ball, seen, wanted=wanted)[0]
    for one, other in zip(whole, part):
        assert np.array_equal(one[wanted], other[wanted])
    few = Counting(ball)
    rendered(few, seen, wanted=wanted & (np.arange(64) > 60))
    assert few.points < 3000


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_images(size):
    areas, centres = rendered(ball, camera(size))
    assert areas.alpha.shape == (size, size) and 0 < areas.alpha.mean() <= 1 and np.all(areas.alpha[centres.hit] > 0)


def test_nothing_to_see():
    areas, _ = rendered(lambda points: ball(points, np.float32([0, 0, 9])), camera(8))
    assert not areas.alpha.any() and np.all(areas.rgb == 1)


def test_cones_find_the_rays_that_pass_nearby_and_leave_the_hits_alone():
    origin, directions = helper.pixel_rays(helper.pixel_grid(128, 128), camera(128).intrinsics, camera().pose)
    spread = 0.01
    cones = Cones(spread)
    t, hit = ray_tracer.trace(ball, origin, directions, cones=cones)
    assert all(map(np.array_equal, (t, hit), ray_tracer.trace(ball, origin, directions)))
    near = cones.near(t, hit)
    along = (directions * (CENTRE - origin)).sum(axis=1)
    off = np.linalg.norm(np.cross(CENTRE - origin, directions), axis=1) - RADIUS
    assert not near[hit].any()      # nothing is in front of the ball
    assert np.all(near[~hit & (off < 0.9 * spread * along)])
    assert not near[~hit & (off > spread * along * 1.05)].any()


def test_backgrounds():
    colors = np.full((1, 3, 3), 0.4, np.float32)
    alpha = np.float32([[1, 0.5, 0]])
    assert pixels.on_background(colors, alpha, "white")[0, :, 0] == pytest.approx([0.4, 0.7, 1])
    assert pixels.on_background(colors, alpha, "black")[0, :, 0] == pytest.approx([0.4, 0.2, 0])
    clear = pixels.on_background(colors, alpha, "transparent")
    assert clear.shape == (1, 3, 4) and clear[0, :, 3] == pytest.approx([1, 0.5, 0])
    assert clear[0, :, 0] == pytest.approx([0.4, 0.4, 0])       # of the object alone
    for background, level in (("white", 1), ("black", 0)):      # what a viewer makes of it
        shown = clear[..., :3] * clear[..., 3:] + level * (1 - clear[..., 3:])
        assert shown == pytest.approx(pixels.on_background(colors, alpha, background))
