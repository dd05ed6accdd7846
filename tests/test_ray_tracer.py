"""Test the tracer on exact shapes, against independent code: closed forms, and a dense march in double precision."""

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

import datasets
import ray_tracer
from config.settings import Tracer
from tracing import sdf_grid
from tracing.sdf_grid import SdfGrid
from training import step

TOLERANCE = 5e-5
# A ray that barely touches or barely misses a surface is neither hit nor miss. The tests exclude rays whose sdf has an
# extremum, or an end on the unit sphere, within this distance of zero.
GRAZING = 3e-4
ALONG_X = np.array([[1, 0, 0]], np.float32)


# --- shapes -----------------------------------------------------------------------------------------------------------
# Points (N, 3) of either precision -> sdf (N,) of the same precision: exact, or a lower bound for cut shapes.

def length(x):
    return np.sqrt((x * x).sum(-1))


def ball(x, radius=0.6, centre=(0, 0, 0)):
    return length(x - np.asarray(centre, x.dtype)) - x.dtype.type(radius)


def box(x, half=(0.5, 0.35, 0.6)):
    q = np.abs(x) - np.asarray(half, x.dtype)
    return length(np.maximum(q, 0)) + np.minimum(q.max(-1), 0)


def torus(x):
    ring = length(x[:, :2]) - x.dtype.type(0.55)
    return np.sqrt(ring * ring + x[:, 2] * x[:, 2]) - x.dtype.type(0.2)


def two_balls(x):
    return np.minimum(ball(x, 0.35, (0.45, 0, 0)), ball(x, 0.25, (-0.5, 0.1, 0.1)))


def shell(x, half=0.0025):
    """A hollow ball. Its wall, 0.005 by default, is a quarter of the gap between 100 samples of a chord."""
    return np.abs(length(x) - x.dtype.type(0.6)) - x.dtype.type(half)


def half_ball(x):
    return np.maximum(ball(x, 0.7), x[:, 0] - x.dtype.type(0.1))


def protruding(x):
    """A ball and a bar that leave the unit sphere and are cut open by it."""
    return np.minimum(ball(x, 0.5, (0.8, 0, 0)), box(x, (0.2, 1.5, 0.15)))


def bumpy(x):
    """Only approximately an sdf: its slope reaches 1.6."""
    return ball(x, 0.5) + x.dtype.type(0.03) * np.sin(20 * x).prod(-1)


SHAPES = [ball, box, torus, two_balls, shell, half_ball, protruding]


def make_rays(seed=0, outside=1200, inside=300, away=50):
    """Return rays from 3 units away (some miss the sphere), from inside the sphere, and pointing away from it."""
    rng = np.random.default_rng(seed)

    def unit(n):
        x = rng.normal(size=(n, 3))
        return x / length(x)[:, None]

    within = 0.95 * unit(inside) * rng.random((inside, 1))
    origins = np.concatenate([3 * unit(outside), within, 2 * unit(away)])
    targets = 1.1 * unit(len(origins)) * rng.random((len(origins), 1))
    targets[-away:] = 3 * origins[-away:]
    directions = targets - origins
    directions /= length(directions)[:, None]
    return origins.astype(np.float32), directions.astype(np.float32)


def least_sdf_points(sdf, origins, directions, samples, rng=None):
    """Return the points of least sdf on rays none of which wants a hit."""
    want_none = np.zeros(len(directions), bool)
    t, hit = ray_tracer.hit_or_least_sdf(sdf, origins, directions, want_none, samples=samples, rng=rng)
    assert not hit.any() and t.dtype == np.float32
    return np.asarray(origins, np.float32) + t[:, None] * np.asarray(directions, np.float32)


def first_below(sdf, level, origins, directions, t, values):
    """Return where `values`, the sdf at the sorted t (R, S), first fall below level, by bisection; NaN if never."""
    below = (values[:, :-1] > level) & (values[:, 1:] <= level)
    rays, first = np.arange(len(t)), below.argmax(1)
    low, high = t[rays, first], t[rays, first + 1]
    for _ in range(40):
        middle = 0.5 * (low + high)
        outside = sdf(origins + middle[:, None] * directions) > level
        low, high = np.where(outside, middle, low), np.where(outside, high, middle)
    return np.where(below.any(1), low, np.nan)


def chords(origins, directions):
    """Return near and far (R,), which are equal for a ray that misses the unit sphere."""
    middle = -(origins * directions).sum(1)
    half = np.sqrt(np.maximum(1 - length(origins + middle[:, None] * directions) ** 2, 0))
    return np.maximum(middle - half, 0), np.maximum(middle + half, 0)


def find_truth(sdf, origins, directions, samples=2000):
    """Return hit (R,) bool, earliest and latest (R,), the t at sdf = +-TOLERANCE, and clear (R,) bool, not grazing."""
    origins, directions = origins.astype(float), directions.astype(float)
    near, far = chords(origins, directions)
    rays = np.flatnonzero(far > near)
    o, d = origins[rays], directions[rays]
    t = near[rays, None] + (far - near)[rays, None] * np.linspace(0, 1, samples)
    values = np.stack([sdf(o + column[:, None] * d) for column in t.T], 1)
    turns = (values[:, 1:-1] - values[:, :-2]) * (values[:, 2:] - values[:, 1:-1]) <= 0
    close = np.abs(values) < GRAZING
    grazes = (turns & close[:, 1:-1]).any(1) | close[:, 0] | close[:, -1]

    crossing, earliest, latest = np.full((3, len(origins)), np.nan)
    for out, level in ((crossing, 0), (earliest, 1.02 * TOLERANCE), (latest, -1.02 * TOLERANCE)):
        out[rays] = first_below(sdf, level, o, d, t, values)
    clear = np.ones(len(origins), bool)
    clear[rays[grazes]] = False
    return ~np.isnan(crossing), earliest - 2e-6, latest + 2e-6, clear


def sdf_at(sdf, origins, directions, t):
    return sdf(origins + t[:, None] * directions)


def trace(sdf, **settings):
    """Trace one ray along +x from x = -3."""
    t, hit = ray_tracer.trace(sdf, np.float32([-3, 0, 0]), ALONG_X, tolerance=TOLERANCE, **settings)
    return float(t[0]), bool(hit[0])


def counted(sdf):
    """Return the sdf, and a list that each call extends by its points."""
    calls = []

    def seen(points):
        assert points.dtype == np.float32 and points.ndim == 2 and points.shape[1] == 3 and len(points)
        calls.append(points.copy())
        return sdf(points)

    return seen, calls


@pytest.fixture(scope="module")
def rays():
    return make_rays()


@pytest.fixture(scope="module")
def truths(rays):
    return {sdf: find_truth(sdf, *rays) for sdf in SHAPES + [bumpy]}


# --- every ray --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("refinement", ["secant", "bisection"])
@pytest.mark.parametrize("sdf", SHAPES + [bumpy])
def test_every_ray_is_right(sdf, refinement, rays, truths):
    true_hit, earliest, latest, clear = truths[sdf]
    assert clear.mean() > 0.99 and 300 < true_hit.sum() < 1300
    t, hit = ray_tracer.trace(sdf, *rays, tolerance=TOLERANCE, refinement=refinement)
    assert t.dtype == np.float32 and hit.dtype == bool and t.shape == hit.shape == (len(rays[1]),)
    assert np.flatnonzero((hit != true_hit) & clear).tolist() == []
    assert np.abs(sdf_at(sdf, *rays, t))[hit].max() <= TOLERANCE
    sure = hit & clear
    assert (t >= earliest)[sure].all() and (t <= latest)[sure].all()
    assert (t[~hit] == 0).all()


def test_truth_agrees_with_closed_forms(rays, truths):
    """Check find_truth on the ball and the box, whose hits have equations."""
    origins, directions = np.float64(rays[0]), np.float64(rays[1])
    b = (origins * directions).sum(1)
    discriminant = b * b - (origins * origins).sum(1) + 0.36
    entry = -b - np.sqrt(np.maximum(discriminant, 0))
    check_closed_form(truths[ball], (discriminant > 0) & (entry > 0), entry)

    half = np.array([0.5, 0.35, 0.6])
    planes = np.sort([(-half - origins) / directions, (half - origins) / directions], axis=0)
    entry, leave = planes[0].max(1), planes[1].min(1)
    check_closed_form(truths[box], (entry < leave) & (entry > 0), entry)


def check_closed_form(truth, closed_hit, closed_t):
    hit, earliest, latest, clear = truth
    assert (hit == closed_hit)[clear].all()
    assert ((earliest <= closed_t) & (closed_t <= latest))[hit & clear].all()


@pytest.mark.parametrize("sdf", [ball, torus, two_balls, half_ball])
def test_every_ray_is_right_by_march_alone(sdf, rays, truths):
    true_hit, earliest, latest, clear = truths[sdf]
    t, hit = ray_tracer.trace(sdf, *rays, tolerance=TOLERANCE, sphere_tracing_steps=0, samples=400)
    assert np.flatnonzero((hit != true_hit) & clear).tolist() == []
    sure = hit & clear
    assert (t >= earliest)[sure].all() and (t <= latest)[sure].all()


@pytest.mark.parametrize("half", [0.001, 0.0002])
def test_thinner_shell_is_not_lost_between_samples(half, rays):
    """Sphere tracing stalls in front of these walls, and all samples of the march may miss them."""
    def thin(x):
        return shell(x, half)

    def outline(x):
        return ball(x, 0.6 + half)

    true_hit, earliest, latest, clear = find_truth(outline, *rays)
    clear &= length(rays[0]) > 1
    t, hit = ray_tracer.trace(thin, *rays, tolerance=TOLERANCE)
    assert np.flatnonzero((hit != true_hit) & clear).tolist() == []
    sure = hit & clear
    assert (t >= earliest)[sure].all() and (t <= latest)[sure].all()


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_size_changes_nothing(batch, rays):
    origins, directions = rays[0][::5], rays[1][::5]
    t, hit = ray_tracer.trace(torus, origins, directions)
    points = least_sdf_points(torus, origins, directions, 20)
    for start in range(0, len(t), batch):
        part = slice(start, start + batch)
        part_t, part_hit = ray_tracer.trace(torus, origins[part], directions[part])
        assert (part_t == t[part]).all() and (part_hit == hit[part]).all()
        part_points = least_sdf_points(torus, origins[part], directions[part], 20)
        assert (part_points == points[part]).all()


# --- single rays: their starts, and the first of several crossings ----------------------------------------------------

def test_ray_and_unit_sphere():
    origins = np.float32([[-3, 0, 0], [0.5, 0, 0], [3, 0, 0], [-3, 0.6, 0], [-3, 2, 0], [3, 2, 0], [1, 0, 0]])
    near, far, meets = ray_tracer.intersect_unit_sphere(origins, np.tile(ALONG_X, (7, 1)))
    assert near.dtype == far.dtype == np.float32 and meets.dtype == bool
    assert meets.tolist() == [True, True, False, True, False, False, False]
    assert np.allclose(near, [2, 0, 0, 2.2, 3, 0, 0], rtol=0, atol=1e-6)
    assert np.allclose(far, [4, 0.5, 0, 3.8, 3, 0, 0], rtol=0, atol=1e-6)


def test_ends_of_the_chord_lie_on_the_unit_sphere(rays):
    origins, directions = rays
    near, far, meets = ray_tracer.intersect_unit_sphere(origins, directions)
    true_near, true_far = chords(np.float64(origins), np.float64(directions))
    assert (meets == (true_far > true_near)).all() and 1200 < meets.sum() < 1500
    outside = meets & (length(origins) > 1)
    for t in (near[outside], far[meets]):
        which = outside if len(t) == outside.sum() else meets
        assert np.abs(length(origins[which] + t[:, None] * directions[which]) - 1).max() < 1e-6


def test_chord_of_a_grazing_ray_is_exact():
    """In float32 arithmetic, the end of this chord would be wrong by 1e-4."""
    height = np.float32(1 - 3e-6)
    angle = 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    origin, direction = np.float32(turn @ [-3, height]), np.float32(turn @ [1, 0])
    o, d = np.float32([[*origin, 0]]), np.float32([[*direction, 0]])
    near, _, _ = ray_tracer.intersect_unit_sphere(o, d)
    o, d = o[0].astype(float), d[0].astype(float)
    roots = np.roots([d @ d, 2 * o @ d, o @ o - 1])
    assert abs(near[0] - roots.real.min()) < 1e-6


def test_first_of_several_crossings():
    """Four balls in a row, seen from outside and from cameras between and inside them."""
    def row(x):
        return np.min([ball(x, 0.1, (centre, 0, 0)) for centre in (-0.75, -0.25, 0.25, 0.75)], 0)

    origins = np.zeros((5, 3), np.float32)
    origins[:, 0] = [-3, -0.75, -0.5, 0.3, 0.75]  # outside, in the 1st ball, between, in the 3rd, in the 4th
    directions = np.tile(ALONG_X, (5, 1))
    for steps in (0, 1, 2, 10):
        t, hit = ray_tracer.trace(row, origins, directions, tolerance=TOLERANCE, sphere_tracing_steps=steps)
        assert hit.tolist() == [True, True, True, True, False]
        assert np.allclose(origins[:4, 0] + t[:4], [-0.85, -0.35, -0.35, 0.65], rtol=0, atol=2 * TOLERANCE)


def test_start_inside_the_object_is_no_hit():
    t, hit = ray_tracer.trace(ball, np.zeros(3, np.float32), make_rays()[1])
    assert not hit.any() and not t.any()


def test_start_on_the_surface_is_a_hit():
    origins = np.float32([[-0.6 - 2e-5, 0, 0], [-0.6 + 2e-5, 0, 0]])
    t, hit = ray_tracer.trace(ball, origins, ALONG_X.repeat(2, 0))
    assert hit.all() and not t.any()


def test_near_end_that_steps_inside_keeps_the_bracket():
    """The first stride is too long and lands inside; the march samples from the last point outside to there."""
    seen, calls = counted(lambda x: np.float32(1.7) * ball(x, 0.6))
    t, hit = trace(seen)
    assert hit and abs(t - 2.4) <= TOLERANCE
    assert np.isclose(calls[1][0, 0], -1 + 1.7 * 0.4, atol=1e-6)
    numbers = (calls[2][:, 0] + 1) / (1.7 * 0.4 / 99)
    assert np.allclose(numbers, np.arange(16, 99, 16), rtol=0, atol=1e-4)


def test_near_end_that_steps_inside_at_first_of_two():
    """The first stride is too long and lands in the second of two plates."""
    def plates(x):
        nearest = np.minimum(np.abs(x[:, 0] + np.float32(0.8)), np.abs(x[:, 0] + np.float32(0.7)))
        return np.minimum(np.float32(1.6) * nearest - np.float32(0.02), np.float32(0.31))

    t, hit = trace(plates)
    assert hit and abs(t - 2.1875) <= TOLERANCE


@pytest.mark.parametrize("slope", [1.5, 3, 20])
def test_stride_past_an_end_inside_is_no_miss(slope):
    """The object reaches through the far side of the sphere, so there is a surface, however long the strides."""
    t, hit = trace(lambda x: np.float32(slope) * ball(x, 0.5, (1, 0, 0)))
    assert hit and abs(t - 3.5) <= TOLERANCE


@pytest.mark.parametrize("slope", [1, 1.2])
def test_no_wall_is_lost_between_samples(slope):
    """The wall may lie anywhere between two samples. At the greater slope, the search of the gap steps inside it."""
    half = 0.0005 if slope == 1 else 0.002
    for x in np.linspace(-0.55, -0.52, 61):
        def wall(points, x=x):
            return np.float32(slope) * (np.abs(points[:, 0] - np.float32(x)) - np.float32(half))

        t, hit = trace(wall, sphere_tracing_steps=0)
        assert hit and abs(t - (3 + x - half)) <= 1.1 * TOLERANCE


def test_stalled_near_end_goes_on_by_march():
    """So few steps do not arrive; the rest of the chord is sampled."""
    t, hit = trace(lambda x: np.float32(0.05) * ball(x, 0.6), sphere_tracing_steps=3)
    assert hit and abs(t - 2.4) <= 20 * TOLERANCE


def test_nan_is_a_miss():
    t, hit = trace(lambda x: np.full(len(x), np.nan, np.float32))
    assert not hit and t == 0


def test_noise_moves_hits_by_no_more_than_itself(rays, truths):
    """The ball is found even if the sdf is as noisy as a half-trained network's, with slopes up to 3."""
    def noisy(x):
        return ball(x) + np.float32(0.002) * np.sin(np.float32(1000) * x).prod(-1)

    true_hit = truths[ball][0]
    origins, directions = np.float64(rays[0]), np.float64(rays[1])
    passes_at = length(origins - (origins * directions).sum(1)[:, None] * directions)
    sure = (np.abs(passes_at - 0.6) > 0.004) & (ball(origins) > 0.004)
    assert sure.mean() > 0.85
    t, hit = ray_tracer.trace(noisy, *rays, tolerance=TOLERANCE)
    assert np.flatnonzero((hit != true_hit) & sure).tolist() == []
    assert np.abs(sdf_at(ball, *rays, t))[hit & sure].max() < 0.0025


# --- refinement -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("refinement", ["secant", "bisection"])
@pytest.mark.parametrize("before, behind", [(1, 0.01), (0.01, 1), (1, 1)])
def test_kinked_sdf_is_refined_within_the_steps(before, behind, refinement):
    """Slopes differ a hundredfold, and kink and zero lie anywhere in the widest bracket."""
    for kink in np.linspace(-0.0095, 0.0095, 39):
        for zero in np.linspace(-0.009, 0.009, 7):
            def sdf(x, kink=kink, zero=zero):
                def rise(u):
                    u = u - np.float32(kink)
                    return np.where(u < 0, np.float32(before) * u, np.float32(behind) * u)
                return rise(np.float32(zero)) - rise(x[:, 0] - np.float32(1 / 99))

            t, hit = trace(sdf, sphere_tracing_steps=0, refinement=refinement)
            assert hit
            assert np.abs(sdf(np.float32([[t - 3, 0, 0]])))[0] <= TOLERANCE


def test_secant_needs_one_step_on_a_line_and_bisection_several():
    def refinement_calls(refinement):
        number = []
        for steps in (8, 0):
            seen, calls = counted(lambda x: ball(x, 0.613))
            _, hit = trace(seen, sphere_tracing_steps=0, samples=200, refinement=refinement, refinement_steps=steps)
            assert hit
            number.append(len(calls))
        return number[0] - number[1]

    assert refinement_calls("secant") == 1
    assert 3 <= refinement_calls("bisection") <= 8


@pytest.mark.parametrize("refinement", ["secant", "bisection"])
def test_refinement_steps_are_a_limit_and_the_best_point_counts(refinement):
    def steep(x):  # too steep for so few steps
        return np.cbrt(np.float32(-0.003) - x[:, 0])

    number, off = [], []
    for steps in (0, 1, 3, 8):
        seen, calls = counted(steep)
        t, hit = trace(seen, sphere_tracing_steps=0, refinement=refinement, refinement_steps=steps)
        number.append(len(calls))
        off.append(abs(t - 2.997))
        values = np.abs(steep(np.concatenate(calls)))
        assert hit and np.abs(steep(np.float32([[t - 3, 0, 0]])))[0] == values.min()
    assert np.subtract(number, number[0]).tolist() == [0, 1, 3, 8]
    assert sorted(off, reverse=True) == off and off[-1] < 4 / 99 / 2 ** 7  # a steep sdf's bracket: 2 gaps


# --- what is evaluated, and how often ---------------------------------------------------------------------------------

def test_nothing_is_evaluated_where_no_ray_meets_the_sphere():
    seen, calls = counted(ball)
    origins, directions = np.float32([[3, 0, 0], [-3, 2, 0]]), ALONG_X.repeat(2, 0)
    t, hit = ray_tracer.trace(seen, origins, directions)
    points = least_sdf_points(seen, origins, directions, 10)
    assert not calls and not hit.any() and not t.any()
    assert (points == np.float32([[3, 0, 0], [0, 2, 0]])).all()


def test_no_rays():
    seen, calls = counted(ball)
    none = np.zeros((0, 3), np.float32)
    for origins in (none, np.zeros(3, np.float32)):
        t, hit = ray_tracer.trace(seen, origins, none)
        assert t.shape == hit.shape == (0,) and t.dtype == np.float32 and hit.dtype == bool
        points = least_sdf_points(seen, origins, none, 10)
        assert points.shape == (0, 3) and points.dtype == np.float32
    near, far, meets = ray_tracer.intersect_unit_sphere(none, none)
    assert near.shape == far.shape == meets.shape == (0,)
    assert not calls


def test_plain_rays_end_early():
    seen, calls = counted(ball)  # straight at the ball: both ends, then one step of each
    t, hit = trace(seen)
    assert hit and [len(points) for points in calls] == [2, 2]

    seen, calls = counted(lambda x: ball(x, 0.05, (0, 0.9, 0)))  # the free spheres at the two ends cover the chord
    t, hit = trace(seen)
    assert not hit and [len(points) for points in calls] == [2]

    seen, calls = counted(lambda x: np.full(len(x), -1, np.float32))  # all inside: the ends and 98 samples
    t, hit = trace(seen)
    assert not hit and len(np.concatenate(calls)) == 100


def test_an_end_that_stops_is_not_evaluated_again():
    def near_arrives(x):  # the far end's sdf is too small, so it would need many steps
        return np.where(x[:, 0] < 0, np.float32(1), np.float32(0.5)) * ball(x)

    def far_gets_inside(x):
        return np.where(x[:, 0] < 0, np.float32(0.3), np.float32(1.7)) * ball(x)

    seen, calls = counted(near_arrives)
    assert trace(seen)[1] and [len(points) for points in calls] == [2, 2]
    seen, calls = counted(far_gets_inside)
    assert trace(seen)[1] and [len(points) for points in calls[:11]] == [2, 2] + [1] * 9


def wavy(x):
    """Similar to an sdf, but along rays it often rises and falls near 0."""
    return np.float32(0.03) * np.cos(np.float32(40) * x[:, 0]) + np.float32(0.4) * np.abs(x[:, 1]) - np.float32(0.02)


@pytest.mark.parametrize("shape", [ball, bumpy, wavy, lambda x: -ball(x, 0.4), lambda x: np.float32(0.2) * ball(x)],
                         ids=["ball", "bumpy", "wavy", "from inside", "flat"])
def test_skipped_samples_change_nothing(rays, monkeypatch, shape):
    """Coarse to fine gives the hits and least-sdf points of all samples, bit for bit, from fewer evaluations."""
    def results():
        seen, calls = counted(shape)
        found = (*ray_tracer.trace(seen, *rays, sphere_tracing_steps=0),
                 least_sdf_points(seen, *rays, samples=100))
        return found, sum(len(points) for points in calls)

    fine, few = results()
    monkeypatch.setattr(ray_tracer, "STRIDES", (1,))
    dense, many = results()
    for ours, theirs in zip(fine, dense):
        assert np.array_equal(ours, theirs)
    assert few < 0.8 * many


@pytest.mark.parametrize("sdf", SHAPES)
def test_a_step_finds_the_hits_that_a_trace_finds(sdf, rays, truths):
    """Rays that want a hit get it; all others, and those without one, get their sample of least sdf."""
    true_hit, earliest, latest, clear = truths[sdf]
    want_hit = np.arange(len(true_hit)) % 3 > 0
    seen, calls = counted(sdf)
    t, hit = ray_tracer.hit_or_least_sdf(seen, *rays, want_hit, samples=100, rng=np.random.default_rng(2),
                                         tolerance=TOLERANCE)
    assert np.flatnonzero((hit != (true_hit & want_hit)) & clear).tolist() == []
    sure = hit & clear
    assert (t >= earliest)[sure].all() and (t <= latest)[sure].all()
    expected = least_sdf_points(sdf, *rays, 100, np.random.default_rng(2))
    assert (sdf(rays[0] + t[:, None] * rays[1]) == sdf(expected))[~hit].all()
    assert len(calls) <= 5 + 8 and sum(len(points) for points in calls) < 0.45 * 100 * len(t)


@pytest.mark.parametrize("sdf", SHAPES)
def test_a_half_precision_sdf_changes_no_hit(sdf, rays, truths):
    """A half-precision sdf replaces the exact one only where values choose among samples."""
    true_hit, earliest, latest, clear = truths[sdf]
    noise = np.random.default_rng(3)

    def half_precision(x):
        return sdf(x) + noise.uniform(-2e-3, 2e-3, len(x)).astype(np.float32)

    want_hit = np.ones(len(true_hit), bool)
    t, hit = ray_tracer.hit_or_least_sdf(sdf, *rays, want_hit, half_precision_sdf=half_precision, tolerance=TOLERANCE)
    wrong = np.flatnonzero((hit != true_hit) & clear)
    assert len(wrong) <= 2e-3 * len(hit)        # rays that only an exact sum of two ends would rule out
    sure = hit & clear & true_hit
    assert (np.abs(sdf(rays[0] + t[:, None] * rays[1])) <= TOLERANCE)[sure].mean() > 0.995
    assert ((t >= earliest) & (t <= latest))[sure].mean() > 0.995
    least = sdf(rays[0] + t[:, None] * rays[1])[~hit]
    expected = sdf(least_sdf_points(sdf, *rays, 100))[~hit]
    assert (least <= expected + 4e-3).all()


def test_the_hits_of_a_step_take_few_calls():
    seen, calls = counted(lambda x: np.sin(ball(x, 0.3)) * np.float32(0.9))
    origins = np.float32([[-3, y, 0.1] for y in np.linspace(-0.25, 0.25, 50)])
    _, hit = ray_tracer.hit_or_least_sdf(seen, origins, ALONG_X.repeat(50, 0), np.ones(50, bool))
    assert hit.all() and len(calls) <= 5 + 2


def test_the_march_looks_at_few_samples():
    for radius in (0.8, 0.485, 0.1):
        seen, calls = counted(lambda x, radius=radius: ball(x, radius))
        _, hit = trace(seen, sphere_tracing_steps=0, refinement_steps=0)
        assert hit and sum(len(points) for points in calls) < 30


def test_only_gaps_that_can_matter_are_searched():
    def plates(x):  # two entries
        nearest = np.minimum(np.abs(x[:, 0] + np.float32(0.9)), np.abs(x[:, 0] + np.float32(0.7)))
        return nearest - np.float32(0.03)

    t, hit = trace(plates, sphere_tracing_steps=0)
    assert hit and abs(t - 2.07) <= TOLERANCE

    for height, searches in ((0.015, []), (0.009, [99])):  # along a wall: farther and nearer than half a gap
        seen, calls = counted(lambda x, height=height: np.full(len(x), height, np.float32))
        _, hit = trace(seen, sphere_tracing_steps=0)
        sizes = [len(points) for points in calls]
        assert not hit and sum(sizes[:5]) == 100 and sizes[5:] == searches


@pytest.mark.parametrize("height, most_points, most_calls", [(2e-3, 45, 6), (4e-4, 170, 8), (-4e-4, 140, 8)])
def test_a_ray_that_grazes_a_ball_is_decided_soon(height, most_points, most_calls):
    """Its gaps are closed from both ends, by as many points as the sdf at these makes likely."""
    for seed in range(20):
        seen, calls = counted(lambda x: ball(x, 0.3))
        _, hit = ray_tracer.hit_or_least_sdf(seen, np.float32([[-2.5, 0.3 + height, 0]]), ALONG_X, np.ones(1, bool),
                                             rng=np.random.default_rng(seed))
        assert hit[0] == (height < 0) and len(calls) <= most_calls
        assert sum(map(len, calls[3:])) <= most_points


def test_few_points_are_evaluated(rays, truths):
    seen, calls = counted(ball)
    _, hit = ray_tracer.trace(seen, *rays)
    points = np.concatenate(calls)
    meets = ray_tracer.intersect_unit_sphere(*rays)[2]
    assert len(calls[0]) == 2 * meets.sum()  # both ends in one call
    assert all(len(points) <= 2 * meets.sum() for points in calls[:11])
    assert len(points) < 0.3 * 100 * len(rays[1])
    assert length(points).max() < 1 + 1e-6
    assert len(calls) <= 11 + 5 + 8


# --- least sdf --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rng", [None, 5])
def test_least_sdf_is_the_least_of_the_samples(rng, rays):
    origins, directions = rays
    points = least_sdf_points(torus, *rays, samples=50, rng=rng and np.random.default_rng(rng))
    assert points.dtype == np.float32 and points.shape == origins.shape
    near, far, meets = ray_tracer.intersect_unit_sphere(*rays)
    place = 0.5 if rng is None else np.random.default_rng(rng).random(50)
    t = near[:, None] + (far - near)[:, None] * (np.arange(50) + place) / 50
    values = np.stack([sdf_at(torus, *np.float64(rays), column) for column in t.T], 1)
    assert np.abs(torus(points) - values.min(1))[meets].max() < 1e-6
    along = ((points - origins) * directions).sum(1)
    assert np.abs(points - origins - along[:, None] * directions).max() < 2e-6
    assert (along > near - 1e-6)[meets].all() and (along < far + 1e-6)[meets].all()


def test_least_sdf_points_fill_the_chord():
    """Each interval has one sample, drawn anew in each call, and all rays share the draw."""
    rng, x = np.random.default_rng(0), []
    for _ in range(200):
        seen, calls = counted(lambda points: 0 * points[:, 0])  # all samples are least, so none is skipped
        least_sdf_points(seen, np.float32([-3, 0, 0]), ALONG_X.repeat(2, 0), 4, rng)
        x.append(np.sort(np.concatenate(calls)[:, 0]).reshape(5, 2).T[:, 1:])     # behind the near end
    x = np.stack(x)
    assert (x[:, 0] == x[:, 1]).all()
    assert (np.floor((x + 1) * 2) == np.arange(4)).all()
    spread = (x + 1) * 2 - np.arange(4)
    assert spread.min() < 0.05 and spread.max() > 0.95


def test_least_sdf_of_a_ray_that_misses_is_its_nearest_point(rays):
    origins, directions = rays
    meets = ray_tracer.intersect_unit_sphere(*rays)[2]
    points = least_sdf_points(ball, *rays, samples=10)[~meets]
    t = np.linspace(0, 6, 3001)
    nearest = length((origins[~meets, None] + t[:, None] * directions[~meets, None]).astype(float)).min(1)
    assert (~meets).sum() > 50
    assert np.abs(length(points) - nearest).max() < 1e-5


# --- arguments --------------------------------------------------------------------------------------------------------

def test_one_origin_serves_all_rays(rays):
    origin = np.float64([0, -3, 0])
    directions = np.float64([[0, 1, 0], [0.1, np.sqrt(0.99), 0], [1, 0, 0]])
    one = ray_tracer.trace(ball, origin, directions)
    each = ray_tracer.trace(ball, np.tile(origin, (3, 1)), directions)
    assert (one[0] == each[0]).all() and one[1].tolist() == each[1].tolist() == [True, True, False]
    points = least_sdf_points(ball, origin, directions, 5)
    assert points.dtype == np.float32 and np.allclose(points[[0, 2]], [[0, 0, 0], [0, -3, 0]], atol=1e-6)


def test_arguments_are_left_alone(rays):
    origins, directions = rays[0].copy(), rays[1].copy()
    ray_tracer.trace(torus, origins, directions)
    least_sdf_points(torus, origins, directions, 10)
    assert (origins == rays[0]).all() and (directions == rays[1]).all()


@pytest.mark.parametrize("settings, words", [
    ({"refinement": "newton"}, "refinement must be"), ({"samples": 1}, "samples must be at least 2")])
def test_bad_settings_are_refused_even_for_no_rays(settings, words):
    with pytest.raises(ValueError, match=words):
        ray_tracer.trace(ball, np.zeros((0, 3)), np.zeros((0, 3)), **settings)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="samples must be at least 1"):
        least_sdf_points(ball, np.zeros((0, 3)), np.zeros((0, 3)), 0)


def test_sdf_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"gave shape \(2, 1\) for 2 points"):
        trace(lambda x: ball(x)[:, None])


# --- the authors' numbers ---------------------------------------------------------------------------------------------

def test_the_tracer_agrees_with_the_original(reference_network):
    network = pytest.importorskip("network")
    r = reference_network
    t, hit = ray_tracer.trace(network.sdf_evaluator(), r["camera_location"], r["ray_directions"])
    assert (hit == r["eval_hit"]).mean() >= 0.99
    both = hit & r["eval_hit"]
    off = length(r["camera_location"] + t[:, None] * r["ray_directions"] - r["eval_points"])[both]
    assert both.sum() > 100 and (off <= 1e-3).mean() >= 0.99


def test_every_ray_without_a_colour_carries_its_true_least_sample(reference_network):
    """Exact to the bit on a trained network, since these points carry the mask loss and the eikonal loss."""
    network = pytest.importorskip("network")
    r, sdf = reference_network, network.sdf_evaluator()
    origin, directions = r["camera_location"], r["ray_directions"]
    batch = datasets.Batch(np.zeros(1), origin, directions, r["rgb_gt"], r["object_mask"], np.ones(len(directions)))
    points, hit = step.place_points(sdf, batch, Tracer(samples=100), np.random.default_rng(0))
    near, far, meets = ray_tracer.intersect_unit_sphere(origin, directions)
    fractions = ((np.arange(100) + np.random.default_rng(0).random(100)) / 100).astype(np.float32)
    t = near[:, None] + (far - near)[:, None] * fractions
    every = origin + t[..., None] * directions[:, None]
    least = np.take_along_axis(t, sdf(every.reshape(-1, 3)).reshape(t.shape).argmin(axis=1)[:, None], axis=1)
    wanted = origin + np.where(meets, least[:, 0], near)[:, None] * directions
    assert (~hit & meets).sum() > 10 and not hit[~r["object_mask"]].any()
    assert np.array_equal(points[~hit], wanted[~hit])


# --- with what is remembered of the sdf -------------------------------------------------------------------------------

def moved(sdf, by):
    """Return the sdf, moved by a vector (3,)."""
    return lambda x: sdf(x - np.asarray(by, x.dtype))


@pytest.mark.parametrize("sdf", SHAPES + [bumpy])
def test_a_remembered_sdf_gives_the_answers_of_a_full_search(sdf, rays):
    """The grid is of a shape that moves a little before each search, as in a training."""
    rng, want_hit, grid = np.random.default_rng(3), np.arange(len(rays[1])) % 3 > 0, SdfGrid.of(sdf, 32)
    differ = []
    for number in range(8):
        now = moved(sdf, rng.normal(size=3) * 0.005)
        (t, hit), (found, found_hit) = (ray_tracer.hit_or_least_sdf(
            known.listening(now) if known else now, *rays, want_hit, grid=known, samples=100,
            rng=np.random.default_rng(number), tolerance=TOLERANCE) for known in (None, grid))
        grid.learn_heard()
        both, neither = hit & found_hit, ~hit & ~found_hit
        values, least = (sdf_at(now, *rays, distances)[neither] for distances in (found, t))
        differ.append((np.mean(hit != found_hit), np.mean(np.abs(t - found)[both] > 4 * TOLERANCE),
                       np.mean(values > least + TOLERANCE)))
    assert (np.mean(differ, axis=0) <= (1e-3, 1e-3, 2e-2)).all()


@pytest.mark.parametrize("num_rays, masked", [(10000, 0.5), (700, 1.0), (9, 0.0), (1, 1.0)])
def test_the_compiled_search_gives_the_answers_of_the_tracer(reference_network, num_rays, masked):
    """By the same functions, so all that differs is the rounding of matrix products over other rows."""
    network = pytest.importorskip("network")
    r, sdf, rng = reference_network, network.sdf_evaluator(), np.random.default_rng(0)
    chosen = rng.integers(0, len(r["ray_directions"]), num_rays)
    directions, want_hit = r["ray_directions"][chosen], rng.random(num_rays) < masked
    batch = datasets.Batch(np.zeros(1), r["camera_location"], directions, directions, want_hit, np.ones(num_rays))
    grid = SdfGrid.of(sdf, 24)
    grid.values += 0.005 * rng.normal(size=grid.values.shape).astype(np.float32)      # an sdf that has moved
    grids = grid, SdfGrid(grid.values.copy())

    def plain(points):
        return sdf(points)

    plain.half_precision = plain.search = None
    (points, hit), (wanted, wanted_hit) = (
        step.place_points(function, batch, Tracer(samples=64), np.random.default_rng(1), known)
        for function, known in zip((sdf, plain), grids))
    assert np.array_equal(hit, wanted_hit) and (hit.any() == (masked > 0) or num_rays < 9)
    assert length(points - wanted)[hit].max(initial=0.0) < 4 * TOLERANCE
    assert np.abs(sdf(points) - sdf(wanted))[~hit].max(initial=0.0) < 1e-6
    heard = [np.concatenate([points for points, _ in known.heard]) for known in grids]
    assert abs(len(heard[0]) - len(heard[1])) < 0.02 * len(heard[1]) + 9
    assert np.abs(sdf(heard[0]) - np.concatenate([values for _, values in grid.heard])).max() < 1e-6
    assert np.allclose(grids[0].margins, grids[1].margins, rtol=1e-3)


def test_a_remembered_sdf_saves_evaluations(rays):
    want_hit, grid, numbers = np.ones(len(rays[1]), bool), SdfGrid.of(torus, 48), []
    for number in range(4):
        for known in (None, grid):
            seen, calls = counted(torus)
            ray_tracer.hit_or_least_sdf(seen, *rays, want_hit, grid=known, rng=np.random.default_rng(number))
            numbers.append(sum(map(len, calls)))
    assert numbers[-1] < 0.6 * numbers[-2]


def test_what_a_round_has_needed_is_not_forgotten():
    """The grid is off by five samples. The first round needs a margin of it, and the second one none, by a parabola."""
    t = np.linspace(1, 2, 101, dtype=np.float32)[None]
    sdf, estimate = (np.float32(0.3) + (t - middle) ** 2 for middle in np.float32((1.55, 1.5)))
    table, evaluated, needed = np.full_like(t, np.inf), np.zeros(t.shape, bool), np.zeros((*t.shape, 2), np.float32)
    margins = np.repeat(np.float32([[0.02], [0.001]]), sdf_grid.NUM_MARGINS, axis=1)
    no, yes, places = np.zeros(1, bool), np.ones(1, bool), np.array([50])
    for number in range(5):
        table.flat[places], evaluated.flat[places] = sdf.flat[places], True
        places = sdf_grid._samples_in_doubt(t, table, evaluated, estimate, np.array([[0, 101]]), no, yes, needed,
                                            margins, TOLERANCE, number)
        if number == 0:
            assert places.size > 3 and (np.diff(places) == sdf_grid.MAX_STRIDE).all()
        else:       # those that may be the lowest
            doubtful = np.flatnonzero(~evaluated[0] & (table[0] <= table[0, evaluated[0]].min()))
            lowest = doubtful[np.argsort(table[0, doubtful], kind="stable")]
            assert set(places) == set(lowest[:sdf_grid.LIKELIEST << (number - 1)])
        assert np.isclose(needed[0, 55, 0], 0.05 ** 2, rtol=0.02)
    assert evaluated[0, 55] and not places.size and needed[0, 55, 1] < 1e-4
    before = margins.copy()
    margins *= np.float32(1e-3)
    sdf_grid._widen(margins, t, table, evaluated, needed, no, TOLERANCE)
    level = 1 + np.searchsorted(sdf_grid.LEVELS, 0.3)
    assert np.isclose(margins[0, level], max(sdf_grid.SPARES[level] * needed[0, 55, 0], sdf_grid.LEAST_MARGINS[0]))
    assert (before > margins).all()


def test_the_margin_of_a_parabola_falls_with_the_distance_of_its_samples():
    wanted = []
    for side in (1.0, 0.5):      # of a chord, with the same number of samples
        t = np.linspace(1, 1 + side, 101, dtype=np.float32)
        sdf = np.float32(0.3) + (t - t[50]) ** 2
        evaluated = np.arange(101) % 4 == 0
        table = np.where(evaluated, sdf, np.float32(-1))
        expected, margin, share = np.zeros((3, 101), np.float32)
        sdf_grid._bound_between(t, table, evaluated, 0, 101, np.float32(0.01), expected, margin, share)
        within = slice(5, 96)
        assert np.allclose(margin[within][~evaluated[within]], 0.01 * 0.04 * side / sdf_grid.WIDE, rtol=1e-4)
        assert np.allclose(table[within], (sdf - margin)[within], atol=1e-5)
        assert (share[within][evaluated[within]] == 0).all()
        wanted.append(share[50 - 1])
    assert np.isclose(wanted[0], 2 * wanted[1], rtol=1e-4)


def test_values_of_a_grid_do_not_drift():
    """Points that barely reach into a cell say little of its far corners, which must not make up for jitter."""
    side, rng = 12, np.random.default_rng(0)
    line = np.linspace(-1, 1, side, dtype=np.float32)
    corners = np.stack(np.meshgrid(line, line, line, indexing="ij"), axis=-1).reshape(-1, 3)
    grid, edge = SdfGrid.of(ball, side), line[-2]
    for _ in range(9000):
        points = rng.uniform((0.7, -0.1, -0.1), (edge + 0.005, 0.1, 0.1), (20, 3)).astype(np.float32)
        grid.learn(points, ball(points) - np.float32(0.02) * (points[:, 0] > edge))
    off = np.abs(grid.values.ravel() - ball(corners))
    assert 0.1 < off.max() < 1.5 * np.sqrt(3) * (line[1] - line[0])      # what a slope of 1.5 allows


def test_a_grid_learns_what_it_hears():
    grid, points = SdfGrid.of(ball, 16), np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)
    for spoilt in (np.float32(np.nan), np.float32(np.inf)):
        before = grid.values.copy()
        grid.learn(points[:1], np.full(1, spoilt))
        assert (grid.values == before).all()
    listening = grid.listening(lambda x: ball(x) + np.float32(0.1))
    for point in points:
        heard = listening(point[None])
        grid.learn_heard()
        seen = grid_value(grid.values, point)
        assert abs(seen - heard[0]) < 1e-6 and not grid.heard


def grid_value(values, point):
    """Return a grid's value at a point, by independent code."""
    line = np.linspace(-1, 1, len(values))
    return RegularGridInterpolator((line, line, line), values.astype(float))(point[None].astype(float))[0]
