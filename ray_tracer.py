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

from concurrent.futures import ThreadPoolExecutor

import numpy as np

second_thread = ThreadPoolExecutor(1)

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


def hit_or_least_sdf(sdf, origins, directions, seeks, *, rough_sdf=None, matters_below=np.inf, samples=100, rng=None,
                     tolerance=5e-5, refinement="secant", refinement_steps=8):
    """Where a training step takes the loss of each ray: at its hit, or else at a sample of least sdf.

    sdf, origins, directions, tolerance, refinement and refinement_steps as in trace. seeks: (R,) bool, the rays whose
    hit is wanted: trace's, but found without sphere tracing, in a few large calls instead of many small ones. Any
    other ray, and one without a hit, gives a sample on its chord of the unit sphere. The chord is cut into `samples`
    equal intervals with one sample in each: at a random place drawn from rng (numpy.random.Generator), the same for all
    rays, or in the middle where rng is None. A ray that misses the sphere gives its point nearest to the sphere's
    centre (t >= 0), without an evaluation. Source: the paper's section 3.3 and supplementary material.
    rough_sdf: takes sdf's place where the values only choose among samples: on the rays that do not seek their hit. Who
    has one has a GPU, where a call costs as much as ten thousand points: then the calls are fewer.
    matters_below: where the sdf of a ray that does not seek its hit is certainly above this, it is not looked at
    closer; if it is so on the whole ray, the ray gives any of its samples.

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
    limit = np.where(seeks, np.inf, matters_below).astype(np.float32)

    def search(sdf, rays):
        """Set t of these rays to their sample of least sdf, or to their hit where one is sought and found."""
        if not rays.size:
            return
        sdf_along, seeking = _sdf_along(sdf, origins, directions), seeks[rays]
        distances = near[rays] + (far - near)[rays] * fractions[:, None]
        entries_matter = _entries_matter(distances, tolerance) if seeking.any() else None

        def sdf_at(ray, t):
            return sdf_along(rays[ray], t)

        def matters(known, bounds, *place):
            least = bounds <= np.minimum(known[1:].min(axis=0, initial=np.inf), limit[rays])
            if not entries_matter:
                return least
            entered, before_entry = entries_matter(known, bounds, *place)
            return np.where(seeking, before_entry | least & ~entered, least)

        table, evaluated = _coarse_to_fine(sdf_at, distances, matters, FEW_CALLS if rough_sdf else FEW_POINTS)
        t[rays] = distances[1 + table[1:].argmin(axis=0), np.arange(rays.size)]
        if entries_matter:
            number, ray = _gap_ends(distances, table, evaluated, tolerance)
            number, ray = number[:, seeking[ray]], ray[seeking[ray]]
            ray, t_found = _refine(sdf_at, ray, distances[number, ray], table[number, ray], refinement == "secant",
                                   refinement_steps, tolerance, SPREAD)
            t[rays[ray]], hit[rays[ray]] = t_found, True

    rays = np.flatnonzero(meets)
    if rough_sdf:
        # In a thread of its own: while the GPU computes for one of the searches, the other one chooses its next points.
        least = second_thread.submit(search, rough_sdf, rays[~seeks[rays]])
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
    def sdf_at(rays, t):
        points = np.empty((len(t), 3), np.float32)
        for point, origin, direction in zip(points.T, origins.T, directions.T):     # by columns: four times as fast
            np.multiply(direction.take(rays), t, out=point)
            point += origin.take(rays) if origin.ndim else origin
        values = np.asarray(sdf(points), np.float32)
        if values.shape != t.shape:
            raise ValueError("the sdf gave shape {} for {} points; it must give ({},)".format(
                values.shape, len(points), len(points)))
        return values

    return sdf_at


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
    t = ends[0] + (ends[1] - ends[0]) * np.linspace(0, 1, samples, dtype=np.float32)[:, None]
    t[-1] = ends[1]
    table = np.full(t.shape, np.nan, np.float32)
    table[[0, -1]] = values
    entries_matter = _entries_matter(t, tolerance)
    table, evaluated = _coarse_to_fine(lambda ray, t: sdf_at(rays[ray], t), t,
                                       lambda *seen: entries_matter(*seen)[1], FEW_POINTS, table)
    number, ray = _gap_ends(t, table, evaluated, tolerance)
    return rays[ray], t[number, ray], table[number, ray]


def _entries_matter(t, tolerance):
    """Which samples at t (S, R) matter for their ray's first entry, for _coarse_to_fine.

    Returns a function of known, bounds, numbers and gap, as there, that gives entered (R,), whether an entry is known,
    and (m, R) bool.
    """
    # A sample outside that is next to one that is not, or that makes a gap doubtful, is not above this.
    low = np.maximum(np.diff(t, axis=0, prepend=t[:1]), np.diff(t, axis=0, append=t[-1:]))
    low *= STEEPEST
    low += np.float32(tolerance)

    def matter(known, bounds, numbers, gap):
        outside = _first((known > tolerance) & (known < np.inf))
        entry = _first((known <= tolerance) & (np.arange(len(known))[:, None] > outside))
        entered, first = entry < len(known), entry * gap
        return entered, (bounds <= low[numbers]) & (numbers[:, None] < first)

    return matter


def _first(true):
    """The number of the first row that is true, for each column of (n, R) bool; n where none is."""
    return np.where(true.any(axis=0), true.argmax(axis=0), len(true))


def _gap_ends(t, table, evaluated, tolerance):
    """The gaps between samples at t (S, R) that may hold a ray's entry; table and evaluated as _coarse_to_fine gives.

    These are the first gap from outside to not outside, and those before it with both ends outside, but closer to the
    surface (the sum of both) than the gap is long. A ray that starts on the surface has a gap of no length there.
    Returns the samples (2, n) at the ends of each gap, and its ray (n,), ordered by ray and distance.
    """
    above, below = table[:-1], table[1:]
    outside, not_outside = above > tolerance, below <= tolerance
    ends = np.zeros(t.shape, bool)              # whether the gap between this sample and the one before may hold it
    ends[0] = np.abs(table[0]) <= tolerance
    ends[1:] = outside & not_outside            # from outside to inside, or on the surface
    entry = _first(ends)
    doubtful = above + below < np.diff(t, axis=0)
    doubtful &= outside & ~not_outside
    doubtful &= np.arange(1, len(t))[:, None] < entry
    ends[0], ends[1:] = False, doubtful
    entered = np.flatnonzero(entry < len(t))
    ends[entry[entered], entered] = True
    end, ray = np.nonzero(ends)
    order = np.argsort(ray, kind="stable")
    end, ray = end[order], ray[order]
    # Where the sdf is steeper than STEEPEST, the sample before an entry may have been left out: take the last before.
    start = np.maximum(end - 1, 0)
    while not evaluated[start, ray].all():
        start -= ~evaluated[start, ray]
    return np.stack([start, end]), ray


def _coarse_to_fine(sdf_at, t, matters, gaps, table=None):
    """The sdf at distances t (S, R), S ascending ones on each of R rays, where it matters; elsewhere a bound that it
    does not go below. Returns both in one table (S, R), and (S, R) bool, where it is the sdf.

    Every gaps[0]-th is evaluated, then every gaps[1]-th of those amid, and so on to 1. From the values on either side
    follows a bound, since the sdf falls by no more than STEEPEST times the distance, and `matters(known, bounds,
    numbers, gap)` says of which samples the value is wanted: known (k, R) are the values at every gap-th sample,
    infinite where it is not known, bounds (m, R) are the bounds for the samples `numbers` (m,) amid. table: values
    known before, NaN elsewhere; those of sample 0, if any, are known.
    """
    table = np.full(t.shape, np.nan, np.float32) if table is None else table
    evaluated = ~np.isnan(table)
    gaps = [gap for gap in gaps if gap < len(t)] or [1]

    def evaluate(numbers, wanted):
        places = np.flatnonzero(wanted)
        if places.size:
            number, ray = np.divmod(places, t.shape[1])
            places = numbers[number] * t.shape[1] + ray         # in flat arrays, where numpy looks up faster
            table.ravel()[places] = sdf_at(ray, t.ravel()[places])
            evaluated.ravel()[places] = True

    numbers = np.arange(0, len(t), gaps[0])
    evaluate(numbers, ~evaluated[numbers])
    for wide, gap in zip(gaps, gaps[1:]):
        numbers = np.arange(0, len(t), gap)
        numbers = numbers[numbers % wide > 0]
        before = numbers // wide * wide
        behind = before[before + wide < len(t)] + wide          # the last may have none
        bounds = table[before] - STEEPEST * (t[numbers] - t[before])
        rises = table[behind] - STEEPEST * (t[behind] - t[numbers[:len(behind)]])
        np.maximum(bounds[:len(behind)], rises, out=bounds[:len(behind)])
        given = evaluated[numbers]
        bounds[given] = table[numbers][given]
        table[numbers] = bounds
        wanted = matters(np.where(evaluated[::wide], table[::wide], np.float32(np.inf)), bounds, numbers, wide)
        evaluate(numbers, wanted & ~given)
    return table, evaluated


def _refine(sdf_at, rays, ends, values, secant, steps, tolerance, spread=(0.0,)):
    """Narrow each gap, in place, to where the ray enters the object. Returns the rays of which a gap does hold an
    entry, and t of the first.

    A gap whose far end is inside is a bracket. In any other the ray walks on from the near end by the sdf,
    until it is on the surface, or inside (that makes a bracket), or nothing is left between the ends that the sdf at
    them does not cover. In the last case the far end is the entry if it is on the surface; if not, the gap holds none.
    spread: the points at which a bracket is looked at in one call, as offsets in its widths; ascending, with a 0. A
    walking ray looks ahead at as many, and at 8 times as many with each step: few walk on for long.
    """
    spread = np.float32(spread)[:, None]
    reach = _reach(ends[1] - ends[0], steps, tolerance)
    holds = values[1] <= tolerance
    walking = values[1] >= -tolerance
    best = np.abs(values).argmin(0)
    everyone = np.arange(rays.size)
    t, error = ends[best, everyone], np.abs(values[best, everyone])

    def look(gaps, ahead, found, bracket):
        """The ends of the gaps become the first point not outside, and the last before it that all is free up to."""
        stop = np.where((found <= tolerance).any(axis=0), (found <= tolerance).argmax(axis=0), len(found))
        # Nothing is left between two points outside whose sdf covers it, nor before one that is just on the surface.
        free = np.logical_and.accumulate(
            bracket | (found[:-1] + np.maximum(found[1:], 2 * tolerance) >= np.diff(ahead, axis=0))
            | (found[1:] < -tolerance))
        clear = 1 + np.count_nonzero(free, axis=0)                      # so many of the points
        last = np.minimum(stop, clear) - 1
        for end, moved, point in ((0, last >= 0, last), (1, stop < len(found), stop)):
            gap, column, point = gaps[moved], np.flatnonzero(moved), point[moved]
            ends[end, gap], values[end, gap] = ahead[point, column], found[point, column]
            better = gap[np.abs(values[end, gap]) < error[gap]]
            t[better], error[better] = ends[end, better], np.abs(values[end, better])
        holds[gaps[stop < len(found)]] = True
        stopped = gaps[(stop < len(found)) & (stop < clear)]
        walking[stopped] = False
        arrived = stopped[np.abs(values[1, stopped]) <= tolerance]
        t[arrived] = ends[1, arrived]
        still[arrived] = False

    still = np.ones(rays.size, bool)
    for step in range(steps):
        live = np.flatnonzero(still)
        live = live[~walking[live] | (values[0, live] + values[1, live] < ends[1, live] - ends[0, live])]
        if not live.size:
            break
        b, w = live[~walking[live]], live[walking[live]]
        ahead = _between(ends[:, b], values[:, b], reach[b] * 0.5 ** step, secant)
        in_brackets = np.clip(ahead + spread * (ends[1, b] - ends[0, b]), ends[0, b], ends[1, b])
        reached = np.minimum(ends[0, w] + values[0, w], ends[1, w])     # where the sdf at the near end reaches
        points = min(len(spread) * 8 ** step, MOST_AHEAD)
        on_the_way = reached + (ends[1, w] - reached) * (np.arange(points, dtype=np.float32) / points)[:, None]
        found = sdf_at(np.concatenate([np.tile(rays[b], len(spread)), np.tile(rays[w], points)]),
                       np.concatenate([in_brackets.ravel(), on_the_way.ravel()]))
        look(b, in_brackets, found[:in_brackets.size].reshape(in_brackets.shape), True)
        look(w, on_the_way, found[in_brackets.size:].reshape(on_the_way.shape), False)
    rays, first = np.unique(rays[holds], return_index=True)
    return rays, t[holds][first]


def _reach(width, steps, tolerance):
    """Half the width that bisection gets to 2 * tolerance in so many steps; the whole of a wider one."""
    reach = np.float32(tolerance * 2.0 ** steps)
    return np.where(width <= 2 * reach, reach, width)


def _between(ends, values, reach, secant):
    """The next point to look at in each bracket: its middle, or the secant's zero.

    The plain secant creeps along a curved or kinked sdf. So it has to keep so near the middle that bisection
    could still finish in the steps left, which is mostly no limit at all (the projection step of ITP,
    Oliveira and Takahashi, 2020). Then a bracket ends no wider than twice the tolerance, and if the sdf is
    1-Lipschitz, however kinked, one of its ends is within the tolerance. By default the steps suffice for all
    brackets that the march can give.
    """
    middle = 0.5 * (ends[0] + ends[1])
    if not secant:
        return middle
    width = ends[1] - ends[0]
    zero = ends[0] + width * (values[0] / (values[0] - values[1]))
    room = np.maximum(reach - 0.5 * width, 0)
    return np.clip(zero, middle - room, middle + room)


# --- the initial surface, traced and shaded ---------------------------------------------------------------------------

def main():
    import time
    import helper
    import network      # here: the tracer itself knows no network
    parser = helper.argument_parser("Trace and shade the initial surface, a sphere; tell hits and time.", config=False)
    parser.add_argument("-D", type=int, default=512, help="layer width")
    parser.add_argument("-L", type=int, default=9, help="affine layers")
    parser.add_argument("-R", type=float, default=0.6, help="radius of the sphere")
    args = parser.parse_args()
    network.check_sizes(args.D, args.L, args.R)
    helper.set_context(args.context, args.device_id)
    network.initialize(args.D, 256, args.L, args.R, np.random.default_rng(0))
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
    helper.write_image(path, image.reshape(size, size, 3))
    print(f"{hit.sum()} of {len(hit)} rays hit, in {seconds:.2f} s, {path}")


if __name__ == "__main__":
    import helper
    helper.run(main)
