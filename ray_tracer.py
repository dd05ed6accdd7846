"""Find where rays hit the zero set of a signed distance function (sdf).

This is the ray tracer of IDR (Yariv et al., NeurIPS 2020, arXiv 2003.09852, supplementary material). An sdf is a
callable, points (N, 3) float32 -> (N,) float32, positive outside the object; no gradient is taken. The object lies in
the sphere of radius 1 about the origin, and all lengths are in units of that radius.

trace, for renders, has four stages:

1. Cut each ray to its chord of the unit sphere. A ray that misses the sphere has no hit.
2. Sphere tracing: walk both ends of the chord inwards, until the near end hits the surface or the two ends meet.
3. March: sample the rays that are still open between their two ends. The first change of sign from + to - brackets the
   surface. Gaps between earlier samples are kept as well if the surface may dip in and out between them.
4. Refinement: narrow brackets by the secant method or by bisection, and search the other gaps by sphere tracing. The
   hit is in the first gap of the ray that holds the surface.

hit_or_least_sdf, for training, skips stage 2 and samples the whole chord. That takes more evaluations, but a third of
the calls, and it yields the sample of least sdf for the rays that need it.

Searching gaps without a change of sign is an addition to the paper. Ten steps of sphere tracing leave many rays just in
front of the surface, where samples alone would lose corners and thin walls (a twentieth of the rays on a hollow ball
with a wall of 0.002). The search takes about 1 % more evaluations.

All stages assume that the sdf is 1-Lipschitz: it never exceeds the distance to the surface. A network satisfies this
only approximately, so sphere tracing may step over a thin part. This is inherent to the method.

Distances t are float32, and every point is computed as origin + t * direction in float32. A caller who computes the
point from t gets, bit for bit, the point that was found within the tolerance. Rounding (about 2e-7 at a distance of 3)
cannot move it afterwards.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Callable, Dict, NamedTuple, Optional, Tuple

import numpy as np

from tracing.compiling import compiled
from tracing.cones import Cones
from tracing.sdf_grid import CONSTANTS, MAX_SLOPE, STILL_SIDE, Rays, SdfGrid

Sdf = Callable[[np.ndarray], np.ndarray]    # points (N, 3) float32 -> (N,) float32

STRIDES = (16, 4, 2, 1)         # coarse to fine: evaluate every 16th sample of a ray, then every 4th where needed, ...
STRIDES_FEWER_CALLS = (8, 1)    # the same with fewer calls and slightly more points
AHEAD = (1, 8, 64, 512)     # the most points that a walking ray gets in each step; in the first, those of _cover
AHEAD_LEAST = 1 / 16        # the fewest, as a share of the most
STEADY = 0.6        # between the two: as many as it takes if the sdf stays above this share of its lower end
MAX_COVER = 8       # points at most of a bracket, or of a ray's first step
SECANT_ALONE = 2    # steps in which a bracket gets no other point than the secant's


class Chords(NamedTuple):
    """Rays cut to their chords of the unit sphere."""
    origins: np.ndarray     # (R, 3) float32
    directions: np.ndarray  # (R, 3) float32, unit length
    want_hit: np.ndarray    # (R,) bool
    near: np.ndarray        # (R,) float32, distance of the near end
    length: np.ndarray      # (R,) float32


@compiled
def num_ahead(step):
    """Return how many points a walking ray gets in a step of the refinement."""
    return AHEAD[min(step, len(AHEAD) - 1)]


@compiled
def steps_left(step, steps):
    """Return in how many steps, this one included, brackets must be narrow; 0 while there is no hurry."""
    return steps - step if step >= SECANT_ALONE else 0


class Limits(NamedTuple):
    """What a search elsewhere has to know."""
    constants: Dict = {"MAX_COVER": MAX_COVER, "AHEAD_LEAST": AHEAD_LEAST, "STEADY": STEADY, **CONSTANTS}
    num_ahead: Callable = num_ahead
    steps_left: Callable = steps_left


@lru_cache(maxsize=None)
def second_thread() -> ThreadPoolExecutor:
    """Return a thread beside the caller's: for hit_or_least_sdf's second search, or for the rest of a step."""
    return ThreadPoolExecutor(1)


def intersect_unit_sphere(origins: np.ndarray, directions: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut rays to their chords of the sphere of radius 1 about the origin.

    origins: (R, 3) or (3,); directions: (R, 3), unit length.
    Returns near and far (R,) float32, the distances of the chord's ends, and meets (R,) bool. near is 0 for an origin
    inside the sphere. A sphere behind the origin is a miss. For a miss, near and far are both the distance of the
    ray's point nearest to the centre (>= 0).
    """
    # In double precision: for rays that graze the sphere, the square root loses half of float32's digits.
    origins = np.asarray(origins, np.float64)
    directions = np.asarray(directions, np.float64)
    a = (directions * directions).sum(-1)
    b = (origins * directions).sum(-1)
    c = (origins * origins).sum(-1) - 1
    discriminant = b * b - a * c
    half_chord = np.sqrt(np.maximum(discriminant, 0)) / a
    near = np.maximum(-b / a - half_chord, 0).astype(np.float32)
    far = np.maximum(-b / a + half_chord, 0).astype(np.float32)
    return near, far, (discriminant > 0) & (far > 0)


def trace(sdf: Sdf, origins: np.ndarray, directions: np.ndarray, *, sphere_tracing_steps: int = 10,
          tolerance: float = 5e-5, samples: int = 100, refinement: str = "secant",
          refinement_steps: int = 8, cones: Optional[Cones] = None, search=None) -> Tuple[np.ndarray, np.ndarray]:
    """Find the first point of each ray on the surface, where it enters the object (sdf from + to -).

    sdf: points (N, 3) float32 -> (N,) float32.
    origins: (R, 3) or (3,); directions: (R, 3), unit length.
    sphere_tracing_steps: maximum for each end of a chord.
    tolerance: a point with |sdf| up to this is on the surface.
    samples: per ray that sphere tracing leaves open, both ends included.
    refinement: "secant" or "bisection".
    refinement_steps: maximum per bracket. If they do not reach the tolerance, the hit is the point of least |sdf|.
    cones: finds the rays that pass narrowly by the surface; its `near` tells them afterwards. The hits stay the same.
    search: a backends.gpu_search.Search, which finds hits and narrow passes on a GPU, without sphere tracing.

    Returns t (R,) float32, the distance of the hit (0 for none), and hit (R,) bool. A ray that starts inside the object
    is hit only where it enters again.
    Raises ValueError for an unknown refinement, fewer than 2 samples, or an sdf that returns the wrong shape.
    """
    _check_settings(refinement, samples, 2)
    origins, directions = np.asarray(origins, np.float32), np.asarray(directions, np.float32)
    near, far, meets = intersect_unit_sphere(origins, directions)
    t, hit = np.zeros(len(directions), np.float32), np.zeros(len(directions), bool)

    how = Refinement(refinement == "secant", refinement_steps, tolerance)
    rays = np.flatnonzero(meets)
    if search and rays.size:
        chords = Chords(np.broadcast_to(origins, directions.shape)[rays], directions[rays], np.ones(rays.size, bool),
                        near[rays], far[rays] - near[rays])
        fractions = np.linspace(0, 1, samples, dtype=np.float32)
        search.still = search.still or search.remember_still(SdfGrid.of(sdf, STILL_SIDE), Limits())
        t_found, hits, passes = search.first_hits(chords, fractions, how, Limits(), search.still,
                                                  cones.spread if cones else 0.0)
        t[rays[hits]], hit[rays[hits]] = t_found[hits], True
        if cones:
            cones.note_passes(rays[passes], len(directions))
        return t, hit
    sdf_at = _sdf_along(sdf, origins, directions)
    if cones:
        sdf_at = cones.noting(sdf_at, len(directions))
    ends, values, arrived, undecided = _sphere_trace(
        sdf_at, rays, np.stack([near[rays], far[rays]]), sphere_tracing_steps, tolerance)
    t[rays[arrived]] = ends[0, arrived]
    hit[rays[arrived]] = True
    if cones:
        met = ~(arrived | undecided)
        cones.look_between(sdf_at, rays[met], ends[:, met], values[:, met])

    gaps = _march(sdf_at, rays[undecided], ends[:, undecided], values[:, undecided], samples, tolerance)
    rays, t_found = _refine(sdf_at, *gaps, how)
    t[rays], hit[rays] = t_found, True
    return t, hit


def hit_or_least_sdf(sdf: Sdf, origins: np.ndarray, directions: np.ndarray, want_hit: np.ndarray, *,
                     grid: Optional[SdfGrid] = None, half_precision_sdf: Optional[Sdf] = None,
                     search: Optional[Callable] = None, samples: int = 100,
                     rng: Optional[np.random.Generator] = None, tolerance: float = 5e-5, refinement: str = "secant",
                     refinement_steps: int = 8) -> Tuple[np.ndarray, np.ndarray]:
    """Find the point of each ray that carries its loss: its hit, or else its sample of least sdf.

    sdf, origins, directions, tolerance, refinement and refinement_steps are those of trace.
    want_hit: (R,) bool. These rays get the hit that trace finds, but from a few large calls, without sphere tracing.
        The other rays, and those without a hit, get the sample of least sdf on their chord. A ray that misses the unit
        sphere gets its point nearest to the centre (t >= 0), without an evaluation.
    samples: the chord is cut into this many equal intervals, with one sample in each.
    rng: draws the samples' places in their intervals, the same for all rays; None is the middle.
    grid: what is known of the sdf, None for nothing. The same samples are found, from fewer evaluations.
    half_precision_sdf: replaces sdf for the rays that do not want a hit, where values only choose among samples.
        Passed on GPUs, where a call costs as much as ten thousand points; then fewer calls are made.
    search: does the search in place of this file's functions: a backends.gpu_search.Search with its grid, on a GPU.

    Returns t (R,) float32, the point's distance, and hit (R,) bool.
    Raises ValueError for an unknown refinement, fewer than 1 sample, or an sdf that returns the wrong shape.
    Source: section 3.3 of the paper and its supplementary material.
    """
    _check_settings(refinement, samples, 1)
    origins, directions = np.asarray(origins, np.float32), np.asarray(directions, np.float32)
    near, far, meets = intersect_unit_sphere(origins, directions)
    origins = np.broadcast_to(origins, directions.shape)
    t, hit = near, np.zeros(len(near), bool)    # on a ray that misses the sphere, near is already the nearest point
    fractions = sample_fractions(samples, rng)
    strides = STRIDES_FEWER_CALLS if half_precision_sdf else STRIDES
    how = Refinement(refinement == "secant", refinement_steps, tolerance)

    def find(sdf, rays):
        if rays.size:
            chords = Chords(origins[rays], directions[rays], want_hit[rays], near[rays], far[rays] - near[rays])
            t[rays], hit[rays] = (search(chords, fractions, how, Limits()) if search else
                                  _hits_or_least(sdf, chords, fractions, grid, strides, how))

    rays = np.flatnonzero(meets)
    if half_precision_sdf:
        # In parallel: while the GPU evaluates for one search, the other chooses its next points.
        least = second_thread().submit(find, half_precision_sdf, rays[~want_hit[rays]])
        find(sdf, rays[want_hit[rays]])
        least.result()
    else:
        find(sdf, rays)
    return t, hit


def sample_fractions(samples: int, rng: Optional[np.random.Generator]) -> np.ndarray:
    """Return where on its chord each ray of hit_or_least_sdf has its samples, (samples + 1,) float32 in [0, 1].

    The first one is the near end, since the ray may enter the surface before the first interval's sample.
    """
    places = 0.5 if rng is None else rng.random(samples)
    return np.concatenate([[0.0], (np.arange(samples) + places) / samples]).astype(np.float32)


def _hits_or_least(sdf, chords: Chords, fractions, grid, strides, how):
    """Return t (R,), the hit of each ray if it is wanted and found, else its sample of least sdf; and hit (R,) bool.

    fractions: (S,), the samples' places on the chords. grid, strides: of hit_or_least_sdf. how: a Refinement.
    """
    rays = Rays(*chords[:3])
    sdf_at = _sdf_along(sdf, rays.origins, rays.directions)
    distances = chords.near[:, None] + chords.length[:, None] * fractions
    if grid:
        _, table, evaluated = grid.search(sdf_at, rays, distances, how.tolerance)
    else:
        wanted = _Wanted(rays.want_hit, True, how.tolerance)
        table, evaluated = _coarse_to_fine(sdf_at, distances, wanted, strides)
    t, hit = distances[np.arange(len(distances)), 1 + table[:, 1:].argmin(axis=1)], np.zeros(len(distances), bool)
    ray, ends = _gap_ends(distances, table, evaluated, rays.want_hit, how.tolerance)
    if ray.size:
        ray, t_found = _refine(sdf_at, ray, distances[ray, ends], table[ray, ends], how)
        t[ray], hit[ray] = t_found, True
    return t, hit


def _check_settings(refinement, samples, min_samples):
    if refinement not in ("secant", "bisection"):
        raise ValueError(f'refinement must be "secant" or "bisection", not {refinement!r}')
    if samples < min_samples:
        raise ValueError(f"samples must be at least {min_samples}, not {samples!r}")


def _sdf_along(sdf, origins, directions):
    """Return sdf_at(rays, t): the sdf (n,) at the distances t (n,) along the rays with indices `rays` (n,)."""
    origins = np.ascontiguousarray(np.broadcast_to(origins, directions.shape))
    directions = np.ascontiguousarray(directions)       # one memory layout, so that _points is compiled once

    def sdf_at(rays, t):
        points = _points(origins, directions, rays, t)
        values = np.asarray(sdf(points), np.float32)
        if values.shape != t.shape:
            raise ValueError(f"the sdf gave shape {values.shape} for {len(points)} points; it must give "
                             f"({len(points)},)")
        return values

    return sdf_at


@compiled
def _points(origins, directions, rays, t):
    """Return the points (n, 3) at the distances t (n,) along the rays with indices `rays` (n,)."""
    points = np.empty((len(t), 3), np.float32)
    for i in range(len(t)):
        for c in range(3):
            points[i, c] = origins[rays[i], c] + directions[rays[i], c] * t[i]
    return points


# --- sphere tracing ---------------------------------------------------------------------------------------------------
# In all stages below, sdf_at(rays, t) evaluates ray rays[i] at the distance t[i]. ends (2, n) are two distances on each
# of n rays, the nearer first, and values (2, n) are their sdf.

def _sphere_trace(sdf_at, rays, ends, steps, tolerance):
    """Walk both ends of each chord towards each other, with the sdf as the stride.

    An end stops on the surface or inside the object. If the near end steps inside, the ray's ends become the last point
    outside and the first point inside.
    Returns the ends where they stopped; their values; arrived (n,) bool, where the near end is on the surface; and
    undecided (n,) bool, where the surface may still lie between the ends.
    """
    if not rays.size:
        return ends, np.zeros_like(ends), np.zeros(0, bool), np.zeros(0, bool)
    values = sdf_at(np.tile(rays, 2), ends.ravel()).reshape(2, -1)
    arrived = np.abs(values[0]) <= tolerance
    undecided = ~arrived
    walking = (values > tolerance) & undecided
    for _ in range(steps):
        stride = np.where(walking, values, 0)
        ahead = np.stack([ends[0] + stride[0], ends[1] - stride[1]])
        met = ahead[0] >= ahead[1]
        # If two ends meet outside, the space between them is free. If one of them is on the surface or inside, the
        # other's stride is too long: that end stays, and the march decides.
        undecided &= ~(met & walking.all(0))
        walking &= ~met
        end, ray = np.nonzero(walking)
        if not ray.size:
            break
        ahead_values = values.copy()
        ahead_values[end, ray] = sdf_at(rays[ray], ahead[end, ray])

        reached = walking[0] & (np.abs(ahead_values[0]) <= tolerance)
        pierced = walking[0] & (ahead_values[0] < -tolerance)
        outside, outside_value = ends[0, pierced], values[0, pierced]
        ends, values = np.where(walking, ahead, ends), ahead_values
        ends[:, pierced] = outside, ends[0, pierced]
        values[:, pierced] = outside_value, values[0, pierced]
        arrived |= reached
        undecided &= ~reached
        walking &= (values > tolerance) & ~(reached | pierced)
    return ends, values, arrived, undecided


# --- samples ----------------------------------------------------------------------------------------------------------

def _march(sdf_at, rays, ends, values, samples, tolerance):
    """Sample each ray evenly between its ends, and return the gaps that may hold its entry into the object.

    Returns the ray of each gap (n,), and the gap's ends and values (2, n), ordered by ray and distance.
    """
    t = ends[0][:, None] + (ends[1] - ends[0])[:, None] * np.linspace(0, 1, samples, dtype=np.float32)
    t[:, -1] = ends[1]
    table = np.full(t.shape, np.nan, np.float32)
    table[:, [0, -1]] = values.T
    want_hit = np.ones(len(t), bool)
    table, evaluated = _coarse_to_fine(lambda ray, t: sdf_at(rays[ray], t), t, _Wanted(want_hit, False, tolerance),
                                       STRIDES, table)
    ray, end = _gap_ends(t, table, evaluated, want_hit, tolerance)
    return rays[ray], t[ray, end], table[ray, end]


class _Wanted(NamedTuple):
    """Which samples matter."""
    hit: np.ndarray         # (R,) bool, on these rays, those where the ray may first enter the object
    least: bool             # on any ray without an entry, those where the sdf may be the ray's least, sample 0 excepted
    tolerance: float        # of the sdf


def _coarse_to_fine(sdf_at, t, wanted, strides, table=None):
    """Evaluate the sdf at those samples of each ray that can matter, and bound it from below at the others.

    t: (R, S), the distances of S samples on each of R rays, ascending. wanted: a _Wanted. strides: evaluate every
    strides[0]-th sample, then those of every strides[1]-th that matter, and so on to 1. table: (R, S), values known
    beforehand, NaN elsewhere.

    Returns table (R, S), the sdf or its lower bound, and evaluated (R, S) bool, where it is the sdf.
    """
    table = np.full(t.shape, np.nan, np.float32) if table is None else table
    evaluated = ~np.isnan(table)
    strides = [stride for stride in strides if stride < t.shape[1]] or [1]

    def fill(places):
        if places.size:
            table.ravel()[places] = sdf_at(places // t.shape[1], t.ravel()[places])
            evaluated.ravel()[places] = True

    fill(np.arange(t.size).reshape(t.shape)[:, ::strides[0]][~evaluated[:, ::strides[0]]])
    for coarse, fine in zip(strides, strides[1:]):
        fill(_samples_that_matter(t, table, evaluated, *wanted, coarse, fine))
    return table, evaluated


@compiled
def _samples_that_matter(t, table, evaluated, want_hit, want_least, tolerance, coarse, fine):
    """Return the samples to evaluate next, as indices into the flat table; write the bounds of the others into it.

    Every coarse-th sample has been decided; every fine-th is decided here. The sdf falls by no more than MAX_SLOPE
    times the distance, so the values on either side of a sample bound it from below. The other parameters are those of
    _coarse_to_fine and the fields of _Wanted.
    """
    places, found = np.empty(t.size, np.int64), 0
    samples = t.shape[1]
    for ray in range(len(t)):
        # What the coarse samples show: the entry and, of the samples before it, the least.
        outside, entry, least = False, samples, np.float32(np.inf if want_least else -np.inf)
        for number in range(0, samples, coarse):
            if evaluated[ray, number]:
                value = table[ray, number]
                if number > 0:
                    least = min(least, value)
                if value > tolerance:
                    outside = True
                elif outside and want_hit[ray]:
                    entry = number
                    break
        for number in range(fine, samples, fine):
            before = number // coarse * coarse
            if number == before or evaluated[ray, number]:
                continue
            bound = table[ray, before] - MAX_SLOPE * (t[ray, number] - t[ray, before])
            if before + coarse < samples:
                bound = max(bound, table[ray, before + coarse] - MAX_SLOPE * (t[ray, before + coarse] - t[ray, number]))
            table[ray, number] = bound
            # A sample farther from the surface than its wider gap can neither bracket an entry nor hide one beside it.
            width = t[ray, number] - t[ray, number - 1]
            if number + 1 < samples:
                width = max(width, t[ray, number + 1] - t[ray, number])
            if (want_hit[ray] and number < entry and bound <= MAX_SLOPE * width + tolerance
                    or entry == samples and bound <= least):
                places[found] = ray * samples + number
                found += 1
    return places[:found]


@compiled
def _gap_ends(t, table, evaluated, want_hit, tolerance):
    """Return the gaps between samples that may hold a ray's entry into the object, for the rays of want_hit (R,) bool.

    t, table and evaluated, (R, S) each, are those of _coarse_to_fine. The gaps of a ray are its first one from outside
    to not outside, and any before it that may hide a surface: both ends are outside, but the sum of their sdf is less
    than the gap's width. A ray that starts on the surface has a gap of width 0 there.
    Returns the ray of each gap (n,) and the samples at its ends (2, n), ordered by ray and distance.
    """
    rays, ends, found = np.empty(t.size, np.int64), np.empty((2, t.size), np.int64), 0
    for ray in range(len(t)):
        for end in range(t.shape[1]) if want_hit[ray] else range(0):
            start, value = max(end - 1, 0), table[ray, end]
            entry = abs(value) <= tolerance if end == 0 else table[ray, start] > tolerance and value <= tolerance
            may_hide = (end > 0 and table[ray, start] > tolerance and value > tolerance
                        and table[ray, start] + value < t[ray, end] - t[ray, start])
            if entry or may_hide:
                # If the sdf is steeper than MAX_SLOPE, the sample before an entry may not be evaluated. Take the last
                # one that is.
                while not evaluated[ray, start]:
                    start -= 1
                rays[found], ends[0, found], ends[1, found] = ray, start, end
                found += 1
            if entry:
                break
    return rays[:found], ends[:, :found]


# --- refinement -------------------------------------------------------------------------------------------------------

class _Gaps(NamedTuple):
    """The state of n gaps; _look_ahead and _take_in get these arrays one by one, and change them in place."""
    ends: np.ndarray        # (2, n) float32
    values: np.ndarray      # (2, n) float32
    holds: np.ndarray       # (n,) bool: the gap holds an entry
    walking: np.ndarray     # (n,) bool: the ray walks on from the near end; else the gap is a bracket
    active: np.ndarray      # (n,) bool: to be evaluated further


class Refinement(NamedTuple):
    """How gaps are narrowed."""
    secant: bool            # else bisection
    steps: int              # maximum
    tolerance: float        # of the sdf


def _refine(sdf_at, rays, ends, values, how):
    """Narrow each gap to where its ray enters the object; ends and values (2, n) are changed in place.

    A gap whose far end is inside the object is a bracket. In any other gap the ray walks from the near end, with the
    sdf as the stride, until it gets inside (then the gap is a bracket), until it is on the surface, or until the sdf at
    the two ends covers what is left between them. In the last case the far end is the entry if it is on the surface;
    otherwise the gap holds none.
    how: a Refinement.

    Returns the rays that enter the object (m,) int and the distances t (m,) of their first entries.
    """
    gaps = _Gaps(ends, values, values[1] <= how.tolerance, values[1] >= -how.tolerance, np.ones(rays.size, bool))
    for step in range(how.steps):
        gap, t = _look_ahead(*gaps, how.secant, num_ahead(step), steps_left(step, how.steps), how.tolerance)
        if not gap.size:
            break
        _take_in(*gaps, gap, t, sdf_at(rays[gap], t), how.tolerance)
    best = np.where(np.abs(values[0]) <= np.abs(values[1]), *ends)
    rays, first = np.unique(rays[gaps.holds], return_index=True)
    return rays, best[gaps.holds][first]


@compiled
def _look_ahead(ends, values, holds, walking, active, secant, num_ahead, steps_left, tolerance):
    """Return the next points of the active gaps: gap (m,) int and distance (m,) float32, one ascending block per gap.

    A bracket gets the points of _narrowing. A walking ray gets those of _cover, or, if num_ahead is more than 1, up to
    so many of _spread. A gap whose ends cover it gets none, and is no longer active.
    """
    room = max(num_ahead, MAX_COVER) * len(active)
    gap, ahead, count = np.empty(room, np.int64), np.empty(room, np.float32), 0
    for i in range(len(active)):
        if active[i] and walking[i]:
            active[i] = values[0, i] + values[1, i] < ends[1, i] - ends[0, i]
        if not active[i]:
            continue
        near, far, before = ends[0, i], ends[1, i], count
        points = ahead[count:count + max(num_ahead, MAX_COVER)]
        if not walking[i]:
            count += _narrowing(near, far, values[0, i], values[1, i], secant, steps_left, tolerance, points)
        elif num_ahead > 1:
            least = num_ahead if steps_left == 1 else max(int(num_ahead * AHEAD_LEAST), 1)
            count += _spread(near, far, values[0, i], values[1, i], least, num_ahead, tolerance, points)
        else:
            count += _cover(near, far, values[0, i], values[1, i], points)
        gap[before:count] = i
    return gap[:count], ahead[:count]


@compiled
def _narrowing(near, far, near_value, far_value, secant, steps_left, tolerance, points):
    """Set points to the next ones of a bracket, ascending, and return their number.

    That is the middle, or the zero of the secant. The plain secant method creeps along a curved or kinked sdf. So the
    bracket is also cut into equal parts, as many as will make it twice the tolerance wide in the steps that are left
    (0: it is not cut). Then one of its ends is within the tolerance, however kinked the sdf, as long as it is
    1-Lipschitz. The default steps suffice for every bracket of the march.
    """
    width = far - near
    if not secant:
        points[0] = near + np.float32(0.5) * width
        return 1
    zero = min(near + width * (near_value / (near_value - far_value)), far)
    parts = 2 if steps_left else 1
    while steps_left and parts < len(points) and 2 * tolerance * parts ** steps_left < width:
        parts += 1
    count = 0
    for k in range(1, parts + 1):
        cut = near + width * np.float32(k / parts)
        if count < k and (k == parts or zero <= cut):
            points[count] = zero
            count += 1
        if k < parts:
            points[count] = cut
            count += 1
    return count


@compiled
def _cover(near, far, near_value, far_value, points):
    """Set points to those that cover a gap if its sdf is linear, and return their number.

    Two points cover the space between them if the sum of their sdf is its width.
    """
    fall = max((near_value - far_value) / (far - near), 0.0)
    point, value = near, near_value
    for k in range(len(points)):
        free = point + value
        point += 0.9 * 2.0 * value / (1.0 + fall)       # a little less, since the sdf is not linear
        value = max(near_value - fall * (point - near), far_value)
        points[k] = point
        if point + value + far_value >= far:
            points[k] = 0.5 * (free + far - far_value)      # the middle of what is left
            return k + 1
    return len(points)


@compiled
def _spread(near, far, near_value, far_value, least, most, tolerance, points):
    """Set points to evenly spaced ones in the part of a gap that its ends leave open, and return their number.

    They are as many as cover it if the sdf stays above STEADY times its ends' lower one, but from `least` to `most`.
    """
    start, left = near + near_value, far - near - near_value - max(far_value, 0.0)
    needed = np.ceil(left / (2.0 * STEADY * max(min(near_value, far_value), tolerance)))
    count = int(min(max(needed, least), most))
    for k in range(count):
        points[k] = start + left * np.float32((k + 0.5) / count)
    return count


@compiled
def _take_in(ends, values, holds, walking, active, gap, ahead, found, tolerance):
    """Narrow the gaps by `found` (m,), the sdf at the points that _look_ahead gave, gap and ahead (m,).

    The far end moves to the first point not outside. The near end moves to the last point before it up to which the
    gap is known to be free. If all points are outside, the far end moves to the first from which on the gap is free.
    """
    start = 0
    while start < len(gap):
        i, end, stop, last = gap[start], start + 1, start, start - 1
        while end < len(gap) and gap[end] == i:
            end += 1
        # `stop` is the first point not outside. NaN counts as outside.
        while stop < end and not found[stop] <= tolerance:
            stop += 1
        # `last` is the point up to which the gap is free: two points cover the space between them if the sum of their
        # sdf is its width. A point on the surface counts for 2 * tolerance. Before a point inside, and in a bracket,
        # the gap needs no cover.
        t, value = ends[0, i], values[0, i]
        while last + 1 < end and (not walking[i] or found[last + 1] < -tolerance or value + max(
                found[last + 1], 2 * tolerance) >= ahead[last + 1] - t):
            last += 1
            t, value = ahead[last], found[last]
        arrives = stop <= last
        last = min(stop - 1, last)
        if stop == end and values[1, i] > tolerance:
            while stop - 1 > last and found[stop - 1] + values[1, i] >= ends[1, i] - ahead[stop - 1]:
                stop -= 1
                ends[1, i], values[1, i] = ahead[stop], found[stop]
        elif stop < end:
            ends[1, i], values[1, i] = ahead[stop], found[stop]
            holds[i] = True
            if arrives:
                walking[i], active[i] = False, abs(found[stop]) > tolerance
        if start <= last:
            ends[0, i], values[0, i] = ahead[last], found[last]
        start = end


def main():
    """Trace the initial surface of the networks and draw it."""
    import network  # only here: the tracer itself knows no network
    network.run_initial_surface(trace)


if __name__ == "__main__":
    main()
