"""Where rays meet the zero set of a signed distance function (sdf).

The tracer of IDR (Yariv et al., NeurIPS 2020, arXiv 2003.09852, supplementary material). It knows an sdf only
as a callable, points (N, 3) float32 -> (N,) float32, positive outside, and takes no gradient. The object lies
in the sphere of radius 1 about the origin; lengths are in units of that radius.

1. Each ray is cut to its chord of that sphere; a ray that misses the sphere is not traced.
2. Sphere tracing walks in from both ends of the chord until the near end hits, or both meet, or get inside.
3. Rays still open are sampled between their two ends; the first change from + to - brackets the surface.
   Gaps between samples before it, so near the surface that it may dip in and out between them, are kept too.
4. Brackets are refined by the secant method or by bisection, the other gaps searched by sphere tracing. The
   first of a ray's gaps that holds the surface gives its hit.

hit_or_least_sdf, for training, leaves out step 2 and samples whole chords: more evaluations, but in a third of the
calls, and the least sdf of the other rays comes along.

Gaps without a change of sign are not in the paper. Ten steps of sphere tracing leave many rays just in front
of the surface, where samples alone would lose corners and thin walls (a twentieth of the rays on a hollow
ball with a wall of 0.002); searching these gaps takes about 1 % more evaluations.

All this trusts the sdf to be 1-Lipschitz (never larger than the distance to the surface). Where it is so only
roughly, as a network is, a step of sphere tracing may jump over a thin part: that is inherent to the method.

The distance t stays float32, and points are always computed as origin + t * direction in float32. So the
point that was found to be within the tolerance is, to the last bit, the one that a caller computes from t;
rounding (some 2e-7 at a distance of 3) comes in nowhere after that.
"""

from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numba
import numpy as np


@lru_cache(maxsize=None)
def second_thread():
    """Return the thread in which a GPU's second search runs."""
    return ThreadPoolExecutor(1)


# What is said ray by ray below is compiled when first called, and kept beside this file. Without fastmath: products and
# sums are to be rounded as NumPy rounds them.
compiled = numba.njit(nogil=True, cache=True, error_model="numpy")

FEW_POINTS = (16, 4, 2, 1)  # of the samples on a ray, every 16th is looked at first, then of those amid every 4th, ...
FEW_CALLS = (8, 1)          # the same in fewer calls with some more points
STEEPEST = 1.5      # the sdf changes by no more than this times the distance; samples are left out by it
SPREAD = (-1 / 4, -1 / 32, 0.0, 1 / 32, 1 / 4)  # of a bracket, about the secant's zero, whose error is of second order
MOST_AHEAD = 512     # points that a ray looks at ahead of it at once


def intersect_unit_sphere(origins, directions):
    """Cut rays to their chords of the sphere of radius 1 about the origin.

    origins (R, 3) or (3,), directions (R, 3) of unit length. Returns near, far (R,) float32, distances along
    the ray, and meets (R,) bool. near is 0 for an origin inside the sphere; a sphere wholly behind the origin
    is a miss. For a miss, near and far are both the distance of the ray's nearest point to the centre (>= 0).
    """
    # In double precision: float32 loses half of its digits in the square root for rays that graze the sphere.
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


def trace(sdf, origins, directions, *, sphere_tracing_steps=10, tolerance=5e-5, samples=100,
          refinement="secant", refinement_steps=8):
    """Find the first point of each ray on the surface, entering from outside (sdf going from + to -).

    sdf: points (N, 3) float32 -> (N,) float32. origins (R, 3) or (3,), directions (R, 3) of unit length.
    sphere_tracing_steps: the most steps of either end. tolerance: the |sdf| up to which a point is on the
    surface. samples: on each ray that sphere tracing leaves open, both ends included. refinement: "secant" or
    "bisection". refinement_steps: the most evaluations for a bracket; if they do not bring it to the
    tolerance, its best point is the hit.

    Returns t (R,) float32, the distance of the hit (0 where there is none), and hit (R,) bool. A ray that
    starts inside the object is not hit there, only where it enters again. Raises ValueError for an unknown
    refinement, for fewer than 2 samples, and for an sdf that gives the wrong shape.
    """
    _check(samples, 2, refinement)
    origins, directions = np.asarray(origins, np.float32), np.asarray(directions, np.float32)
    near, far, meets = intersect_unit_sphere(origins, directions)
    t, hit = np.zeros(len(directions), np.float32), np.zeros(len(directions), bool)

    sdf_at = _sdf_along(sdf, origins, directions)
    rays = np.flatnonzero(meets)
    ends, values, touched, undecided = _sphere_trace(
        sdf_at, rays, np.stack([near[rays], far[rays]]), sphere_tracing_steps, tolerance)
    t[rays[touched]] = ends[0, touched]
    hit[rays[touched]] = True

    gaps = _march(sdf_at, rays[undecided], ends[:, undecided], values[:, undecided], samples, tolerance)
    rays, t_found = _refine(sdf_at, *gaps, refinement == "secant", refinement_steps, tolerance)
    t[rays], hit[rays] = t_found, True
    return t, hit


def hit_or_least_sdf(sdf, origins, directions, seeks, *, rough_sdf=None, samples=100, rng=None, tolerance=5e-5,
                     refinement="secant", refinement_steps=8):
    """Where a training step takes the loss of each ray: at its hit, or else at a sample of least sdf.

    sdf, origins, directions, tolerance, refinement and refinement_steps as in trace. seeks: (R,) bool, the rays whose
    hit is wanted: trace's, but found without sphere tracing, in a few large calls instead of many small ones. Any
    other ray, and one without a hit, gives a sample on its chord of the unit sphere. The chord is cut into `samples`
    equal intervals with one sample in each: at a random place drawn from rng (numpy.random.Generator), the same for all
    rays, or in the middle where rng is None. A ray that misses the sphere gives its point nearest to the sphere's
    centre (t >= 0), without an evaluation. Source: the paper's section 3.3 and supplementary material.
    rough_sdf: takes sdf's place where the values only choose among samples: on the rays that do not seek their hit. Who
    has one has a GPU, where a call costs as much as ten thousand points: then the calls are fewer.

    Returns t (R,) float32, the distance of that point, and hit (R,) bool. Raises ValueError for an unknown refinement,
    for fewer than 1 sample, and for an sdf that gives the wrong shape.
    """
    _check(samples, 1, refinement)
    origins, directions = np.asarray(origins, np.float32), np.asarray(directions, np.float32)
    near, far, meets = intersect_unit_sphere(origins, directions)
    t, hit = near, np.zeros(len(near), bool)    # on a ray that misses the sphere, near is already the nearest point
    places = 0.5 if rng is None else rng.random(samples)
    # The near end comes first: the surface may be entered before the first sample.
    fractions = np.concatenate([[0.0], (np.arange(samples) + places) / samples]).astype(np.float32)

    def search(sdf, rays):
        """Set t of these rays to their sample of least sdf, or to their hit where one is sought and found."""
        if not rays.size:
            return
        sdf_along, seeking = _sdf_along(sdf, origins, directions), seeks[rays]
        distances = near[rays, None] + (far - near)[rays, None] * fractions

        def sdf_at(ray, t):
            return sdf_along(rays[ray], t)

        table, evaluated = _coarse_to_fine(sdf_at, distances, seeking, True, tolerance,
                                           FEW_CALLS if rough_sdf else FEW_POINTS)
        t[rays] = distances[np.arange(rays.size), 1 + table[:, 1:].argmin(axis=1)]
        ray, number = _gap_ends(distances, table, evaluated, seeking, tolerance)
        if ray.size:
            ray, t_found = _refine(sdf_at, ray, distances[ray, number], table[ray, number], refinement == "secant",
                                   refinement_steps, tolerance, SPREAD)
            t[rays[ray]], hit[rays[ray]] = t_found, True

    rays = np.flatnonzero(meets)
    if rough_sdf:
        # In a thread of its own: while the GPU computes for one of the searches, the other one chooses its next points.
        least = second_thread().submit(search, rough_sdf, rays[~seeks[rays]])
        search(sdf, rays[seeks[rays]])
        least.result()
    else:
        search(sdf, rays)
    return t, hit


def _check(samples, least, refinement):
    if refinement not in ("secant", "bisection"):
        raise ValueError('refinement must be "secant" or "bisection", not {!r}'.format(refinement))
    if samples < least:
        raise ValueError("samples must be at least {}, not {!r}".format(least, samples))


def _sdf_along(sdf, origins, directions):
    """Return sdf_at(rays, t): the sdf at the distances t (n,) along the rays of the numbers (n,)."""
    origins = np.ascontiguousarray(np.broadcast_to(origins, directions.shape))
    directions = np.ascontiguousarray(directions)       # of one layout, for which alone _points is compiled

    def sdf_at(rays, t):
        points = _points(origins, directions, rays, t)
        values = np.asarray(sdf(points), np.float32)
        if values.shape != t.shape:
            raise ValueError("the sdf gave shape {} for {} points; it must give ({},)".format(
                values.shape, len(points), len(points)))
        return values

    return sdf_at


@compiled
def _points(origins, directions, rays, t):
    """The points (n, 3) at t (n,) along the rays of the numbers (n,)."""
    points = np.empty((len(t), 3), np.float32)
    for i in range(len(t)):
        for c in range(3):
            points[i, c] = origins[rays[i], c] + directions[rays[i], c] * t[i]
    return points


# In the stages below, sdf_at(rays, t) evaluates ray number rays[i] at t[i], and ends (2, n) are two distances on
# each of the n rays, the nearer first, with their sdf in values (2, n).


def _sphere_trace(sdf_at, rays, ends, steps, tolerance):
    """Walk both ends of each chord towards each other, by the sdf at each.

    Returns the ends where they stopped and their values; touched (n,) bool, where the near end is on the
    surface; undecided (n,) bool, where the surface, if any, lies between the ends. An end stops on the
    surface or inside the object. Where the near end steps inside, the ray's ends become the last point
    outside and the first inside.
    """
    if not rays.size:
        return ends, np.zeros_like(ends), np.zeros(0, bool), np.zeros(0, bool)
    values = sdf_at(np.tile(rays, 2), ends.ravel()).reshape(2, -1)
    touched = np.abs(values[0]) <= tolerance
    undecided = ~touched
    walking = (values > tolerance) & undecided
    for _ in range(steps):
        stride = np.where(walking, values, 0)
        ahead = np.stack([ends[0] + stride[0], ends[1] - stride[1]])
        met = ahead[0] >= ahead[1]
        # All is free between two ends that meet outside. Where one of them stands on or in the object, the
        # stride of the other cannot be right: that one stays where it is, and the march decides.
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
        touched |= reached
        undecided &= ~reached
        walking &= (values > tolerance) & ~(reached | pierced)
    return ends, values, touched, undecided


def _march(sdf_at, rays, ends, values, samples, tolerance):
    """Sample the rays evenly between their ends. Returns the gaps that may hold their entry: each one's ray (n,), ends
    and values (2, n), ordered by ray and distance."""
    t = ends[0][:, None] + (ends[1] - ends[0])[:, None] * np.linspace(0, 1, samples, dtype=np.float32)
    t[:, -1] = ends[1]
    table = np.full(t.shape, np.nan, np.float32)
    table[:, [0, -1]] = values.T
    seeking = np.ones(len(t), bool)
    table, evaluated = _coarse_to_fine(lambda ray, t: sdf_at(rays[ray], t), t, seeking, False, tolerance, FEW_POINTS,
                                       table)
    ray, number = _gap_ends(t, table, evaluated, seeking, tolerance)
    return rays[ray], t[ray, number], table[ray, number]


def _coarse_to_fine(sdf_at, t, seeking, want_least, tolerance, gaps, table=None):
    """The sdf at distances t (R, S), S ascending ones on each of R rays, where it matters; elsewhere a bound that it
    does not go below. Returns both in one table (R, S), and (R, S) bool, where it is the sdf.

    On a ray that is seeking (R,) bool it matters where the ray may first enter the object; with want_least also, on any
    ray that has not entered, where it may be the least of the ray's, the first sample aside. table: values known
    before, NaN elsewhere; those of sample 0, if any, are known.

    Every gaps[0]-th is evaluated, then every gaps[1]-th of those amid, and so on to 1.
    """
    table = np.full(t.shape, np.nan, np.float32) if table is None else table
    evaluated = ~np.isnan(table)
    gaps = [gap for gap in gaps if gap < t.shape[1]] or [1]

    def evaluate(places):
        if places.size:
            table.ravel()[places] = sdf_at(places // t.shape[1], t.ravel()[places])
            evaluated.ravel()[places] = True

    evaluate(np.arange(t.size).reshape(t.shape)[:, ::gaps[0]][~evaluated[:, ::gaps[0]]])
    for wide, gap in zip(gaps, gaps[1:]):
        evaluate(_samples_that_matter(t, table, evaluated, seeking, want_least, tolerance, wide, gap))
    return table, evaluated


@compiled
def _samples_that_matter(t, table, evaluated, seeking, want_least, tolerance, wide, gap):
    """The samples that _coarse_to_fine evaluates next, as places in the flat table: of every gap-th, where every
    wide-th has been looked at. The bounds of these go into the table.

    From the values on either side follows a bound, since the sdf falls by no more than STEEPEST times the distance.
    """
    places, found = np.empty(t.size, np.int64), 0
    samples = t.shape[1]
    for ray in range(len(t)):
        outside, entry, least = False, samples, np.float32(np.inf if want_least else -np.inf)
        for number in range(0, samples, wide):
            if evaluated[ray, number]:
                value = table[ray, number]
                if number > 0:
                    least = min(least, value)
                if value > tolerance:
                    outside = True
                elif outside and seeking[ray]:
                    entry = number
                    break
        for number in range(gap, samples, gap):
            before = number // wide * wide
            if number == before or evaluated[ray, number]:
                continue
            bound = table[ray, before] - STEEPEST * (t[ray, number] - t[ray, before])
            if before + wide < samples:
                bound = max(bound, table[ray, before + wide] - STEEPEST * (t[ray, before + wide] - t[ray, number]))
            table[ray, number] = bound
            # A sample outside that is next to one that is not, or that makes a gap doubtful, is not above `low`.
            low = t[ray, number] - t[ray, number - 1]
            if number + 1 < samples:
                low = max(low, t[ray, number + 1] - t[ray, number])
            if (seeking[ray] and number < entry and bound <= STEEPEST * low + tolerance
                    or entry == samples and bound <= least):
                places[found] = ray * samples + number
                found += 1
    return places[:found]


@compiled
def _gap_ends(t, table, evaluated, seeking, tolerance):
    """The gaps between samples at t (R, S) that may hold the entry of a ray that is seeking (R,) bool; table and
    evaluated as _coarse_to_fine gives.

    These are the first gap from outside to not outside, and those before it with both ends outside, but closer to the
    surface (the sum of both) than the gap is long. A ray that starts on the surface has a gap of no length there.
    Returns the ray (n,) of each gap and the samples (2, n) at its ends, ordered by ray and distance.
    """
    rays, ends, found = np.empty(t.size, np.int64), np.empty((2, t.size), np.int64), 0
    for ray in range(len(t)):
        for end in range(t.shape[1]) if seeking[ray] else range(0):
            start, value = max(end - 1, 0), table[ray, end]
            entry = abs(value) <= tolerance if end == 0 else table[ray, start] > tolerance and value <= tolerance
            doubtful = (end > 0 and table[ray, start] > tolerance and value > tolerance
                        and table[ray, start] + value < t[ray, end] - t[ray, start])
            if entry or doubtful:
                # Where the sdf is steeper than STEEPEST, the sample before an entry may have been left out: take the
                # last before.
                while not evaluated[ray, start]:
                    start -= 1
                rays[found], ends[0, found], ends[1, found] = ray, start, end
                found += 1
            if entry:
                break
    return rays[:found], ends[:, :found]


def _refine(sdf_at, rays, ends, values, secant, steps, tolerance, spread=(0.0,)):
    """Narrow each gap, in place, to where the ray enters the object. Returns the rays of which a gap does hold an
    entry, and t of the first.

    A gap whose far end is inside is a bracket. In any other the ray walks on from the near end by the sdf,
    until it is on the surface, or inside (that makes a bracket), or nothing is left between the ends that the sdf at
    them does not cover. In the last case the far end is the entry if it is on the surface; if not, the gap holds none.
    spread: the points at which a bracket is looked at in one call, as offsets in its widths; ascending, with a 0. A
    walking ray looks ahead at as many, and at 8 times as many with each step: few walk on for long.
    """
    gaps = _Gaps(ends, values, _reach(ends[1] - ends[0], steps, tolerance), *np.empty((2, rays.size), np.float32),
                 *np.empty((3, rays.size), bool))
    _begin(*gaps, tolerance)
    for step in range(steps):
        points = min(len(spread) * 8 ** step, MOST_AHEAD)
        gap, t = _look_ahead(*gaps, 0.5 ** step, secant, np.float32(spread), points)
        if not gap.size:
            break
        _take_in(*gaps, gap, t, sdf_at(rays[gap], t), tolerance)
    rays, first = np.unique(rays[gaps.holds], return_index=True)
    return rays, gaps.t[gaps.holds][first]


# Of each gap: its ends and their values (2, n); what _reach gives; the best point so far, t, and its |sdf|, error; and
# whether it holds an entry, whether its ray walks on from the near end, and whether it is to be looked at further.
_Gaps = namedtuple("_Gaps", "ends values reach t error holds walking still")


@compiled
def _begin(ends, values, reach, t, error, holds, walking, still, tolerance):
    """Fill in what _Gaps says of gaps that have not been looked at."""
    for i in range(len(t)):
        best = 0 if abs(values[0, i]) <= abs(values[1, i]) else 1
        t[i], error[i] = ends[best, i], abs(values[best, i])
        holds[i], walking[i], still[i] = values[1, i] <= tolerance, values[1, i] >= -tolerance, True


@compiled
def _look_ahead(ends, values, reach, t, error, holds, walking, still, part, secant, spread, points):
    """The gaps' next points: the gap of each (m,), in blocks, and its distance (m,) ascending within a block.

    A bracket is looked at in as many points as spread has, and a walking ray in so many `points` at even distances from
    where the sdf at the near end reaches; not in any if it reaches the sdf at the far end.
    """
    count = 0
    for i in range(len(t)):
        if still[i] and walking[i]:
            still[i] = values[0, i] + values[1, i] < ends[1, i] - ends[0, i]
        if still[i]:
            count += points if walking[i] else len(spread)
    gap, ahead, count = np.empty(count, np.int64), np.empty(count, np.float32), 0
    for i in range(len(t)):
        if not still[i]:
            continue
        near, far = ends[0, i], ends[1, i]
        if walking[i]:
            reached = min(near + values[0, i], far)
            for k in range(points):
                gap[count], ahead[count] = i, reached + (far - reached) * np.float32(k / points)
                count += 1
        else:
            zero = _between(near, far, values[0, i], values[1, i], reach[i] * part, secant)
            for offset in spread:
                gap[count], ahead[count] = i, min(max(zero + offset * (far - near), near), far)
                count += 1
    return gap, ahead


@compiled
def _take_in(ends, values, reach, t, error, holds, walking, still, gap, ahead, found, tolerance):
    """Narrow the gaps by the sdf found at the points of _look_ahead: their ends become the first point not outside, and
    the last before it that all is free up to."""
    start = 0
    while start < len(gap):
        i, end, stop, last = gap[start], start + 1, start, start
        while end < len(gap) and gap[end] == i:
            end += 1
        while stop < end and not found[stop] <= tolerance:      # a sdf that is not a number is no entry
            stop += 1
        # Nothing is left between two points outside whose sdf covers it, nor before one that is just on the surface.
        while last + 1 < end and (not walking[i] or found[last + 1] < -tolerance or found[last] + max(
                found[last + 1], 2 * tolerance) >= ahead[last + 1] - ahead[last]):
            last += 1
        arrives = stop <= last
        last = min(stop - 1, last)
        for side, point in ((0, last), (1, stop)):
            if start <= point < end:
                ends[side, i], values[side, i] = ahead[point], found[point]
                if abs(found[point]) < error[i]:
                    t[i], error[i] = ahead[point], abs(found[point])
        if stop < end:
            holds[i] = True
            if arrives:
                walking[i] = False
                if abs(found[stop]) <= tolerance:
                    t[i], still[i] = ahead[stop], False
        start = end


def _reach(width, steps, tolerance):
    """Half the width that bisection gets to 2 * tolerance in so many steps; the whole of a wider one."""
    reach = np.float32(tolerance * 2.0 ** steps)
    return np.where(width <= 2 * reach, reach, width)


@compiled
def _between(near, far, near_value, far_value, reach, secant):
    """The next point to look at in a bracket: its middle, or the secant's zero.

    The plain secant creeps along a curved or kinked sdf. So it has to keep so near the middle that bisection
    could still finish in the steps left, which is mostly no limit at all (the projection step of ITP,
    Oliveira and Takahashi, 2020). Then a bracket ends no wider than twice the tolerance, and if the sdf is
    1-Lipschitz, however kinked, one of its ends is within the tolerance. By default the steps suffice for all
    brackets that the march can give.
    """
    middle, width = 0.5 * (near + far), far - near
    if not secant:
        return middle
    zero = near + width * (near_value / (near_value - far_value))
    room = max(reach - 0.5 * width, 0.0)
    return min(max(zero, middle - room), middle + room)


# --- the initial surface, traced and shaded ---------------------------------------------------------------------------

def main():
    import time

    import helper
    import network  # here: the tracer itself knows no network
    from backends import context
    from files import writing
    parser = helper.argument_parser("Trace and shade the initial surface, a sphere; tell hits and time.", config=False)
    parser.add_argument("-D", type=int, default=512, help="layer width")
    parser.add_argument("-L", type=int, default=9, help="affine layers")
    parser.add_argument("-R", type=float, default=0.6, help="radius of the sphere")
    args = parser.parse_args()
    net = network.network_of(args.D, args.L, args.R)
    context.set_context(args.context, args.device_id)
    network.initialize(net, np.random.default_rng(0))
    sdf = network.sdf_evaluator()
    size, focal = 256, 300.0
    intrinsics = np.array([[focal, 0, (size - 1) / 2], [0, focal, (size - 1) / 2], [0, 0, 1]])
    pose = np.eye(4)
    pose[2, 3] = -1.8
    origin, directions = helper.pixel_rays(helper.pixel_grid(size, size), intrinsics, pose)
    start = time.perf_counter()
    t, hit = trace(sdf, origin, directions)
    seconds = time.perf_counter() - start
    normals = network.shade(origin + t[hit, None] * directions[hit], directions[hit])[1]
    light = np.array([-0.5, -0.6, -0.62])       # from the camera's upper left; y points down
    image = np.ones((size * size, 3), np.float32)
    image[hit] = 0.15 + 0.85 * np.maximum(normals @ light / np.linalg.norm(normals, axis=1), 0)[:, None]
    path = f"sphere_D{args.D:03d}_L{args.L:03d}.png"
    writing.write_image(path, image.reshape(size, size, 3))
    print(f"{hit.sum()} of {len(hit)} rays hit, in {seconds:.2f} s, {path}")


if __name__ == "__main__":
    import helper
    helper.run(main)
