"""What is known of an sdf without evaluating it: its values on a grid, and the samples of a ray that these leave open.

A training step changes the sdf a little, and a trained sdf stays as it is. So a grid over the unit ball, which learns
from every evaluation, tells where on a ray the surface and the least sdf can be. The sdf is evaluated only there.

What the grid says is never taken for a value. It gives the change of the sdf from an evaluated sample of the same ray
to another one, up to a margin. Far from the surface, where the sdf is smooth, a parabola through three evaluated
samples tells more, up to a smaller margin. What this leaves in doubt is evaluated. The margins are learned as well:
each search shows how much of its margin a ray has needed.
"""
from typing import Callable, NamedTuple, Optional

import numpy as np

from backends.cpu_kernels import CORES, Split, block_of, on_all_cores
from tracing.compiling import compiled

MAX_SLOPE = 1.5     # assumed bound on the sdf's slope, by which samples are skipped
ERROR_SLOPE = 2.0   # assumed bound on the slope of the grid's error
READ_STRIDE = 4     # of a ray's samples, every 4th is read from the grid first
SMOOTH = 0.1        # on a ray whose least sdf is above this, a parabola tells more than the grid. There, ...
MAX_STRIDE = 6      # ... of the samples that may be the least, every 6th at most is evaluated first, then what remains,
FEW = 3             # ... but so many of them at least
WIDE = 0.08         # a parabola's margin holds for samples so far apart, and is smaller for closer ones
LIKELIEST = 2       # doubtful samples of a ray that its second round evaluates, the third twice as many, and so on
LEVELS = np.float32([0.0, 0.02, 0.05, 0.1, 0.2, 0.4])   # of a ray's least sdf, at which another margin begins
NUM_MARGINS = 2 + len(LEVELS)     # of rays with a hit, and of the others by their level
FIRST_MARGINS, LEAST_MARGINS = (0.05, 0.01), (1e-3, 1e-4)   # of what the grid says, and of what a parabola says
# A margin is at least so many times what a ray has lately needed: of rays with a hit, and of the others by their level,
# more near the surface, where the mask loss depends on the least sdf. It falls by the share FORGET with each such ray.
SPARES = np.float32([1.4, 2.0, 2.0, 1.7, 1.7, 1.7, 1.4, 1.4])
FORGET = 1e-3
MIN_PER_CORE = 1 << 14      # samples; with fewer, handing them over takes longer than the work
STILL_SIDE = 96     # of the grid of an sdf that stays as it is
# For a search elsewhere, which does the same with a grid.
CONSTANTS = {"MAX_SLOPE": MAX_SLOPE, "ERROR_SLOPE": ERROR_SLOPE, "READ_STRIDE": READ_STRIDE,
             "SPARES": tuple(SPARES.tolist()), "FORGET": FORGET, "LEAST_MARGINS": LEAST_MARGINS,
             "NUM_MARGINS": NUM_MARGINS, "LEVELS": tuple(LEVELS.tolist()), "SMOOTH": SMOOTH, "MAX_STRIDE": MAX_STRIDE,
             "FEW": FEW, "WIDE": WIDE}


class Rays(NamedTuple):
    """Rays in search of a sample."""
    origins: np.ndarray     # (R, 3) float32
    directions: np.ndarray  # (R, 3) float32, unit length
    want_hit: np.ndarray    # (R,) bool: of their entry; the others, and those without one, of their least sdf


class Samples(NamedTuple):
    """Samples on R rays, and what is known of the sdf there."""
    t: np.ndarray           # (R, S) float32, their distances, ascending
    table: np.ndarray       # (R, S) float32, the sdf, or a lower bound
    evaluated: np.ndarray   # (R, S) bool, where the table holds the sdf


class SdfGrid:
    """An sdf's values at side^3 points over [-1, 1]^3, and how far they can be trusted.

    values: (side, side, side) float32, at x, y and z. margins: (2, NUM_MARGINS) float32, of what the grid says and of
    what a parabola says through samples WIDE apart; for rays with a hit, and for the others by the level of their least
    sdf. Both change in place.
    """

    def __init__(self, values: np.ndarray, margins: Optional[np.ndarray] = None):
        self.values = values
        self.margins = np.repeat(np.float32(FIRST_MARGINS)[:, None], NUM_MARGINS, 1) if margins is None else margins
        self.heard = []     # [(points, values)]
        self.changes = np.zeros((*values.shape, 2), np.float32)     # scratch of _learn

    @classmethod
    def of(cls, sdf: Callable, side: int) -> "SdfGrid":
        """Return the grid of an sdf, points (N, 3) float32 -> (N,) float32, from side^3 evaluations."""
        line = np.linspace(-1, 1, side, dtype=np.float32)
        plane = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
        values = np.stack([sdf(np.insert(plane, 0, x, axis=1)) for x in line])
        return cls(values.astype(np.float32).reshape(side, side, side))

    def listening(self, sdf: Callable) -> Callable:
        """Return an sdf that lets the grid hear what it returns."""
        def heard_sdf(points):
            values = sdf(points)
            self.heard.append((points, np.asarray(values, np.float32)))
            return values
        return heard_sdf

    def learn_heard(self) -> None:
        """Learn all that was heard since the last time. Apart from the search, so that it can wait for a GPU's work."""
        if self.heard:
            self.learn(*map(np.concatenate, zip(*self.heard)))
        self.heard.clear()

    def learn(self, points: np.ndarray, values: np.ndarray) -> None:
        """Change the grid so that it gives `values` (N,) at `points` (N, 3), float32, or nearly if many are close."""
        _learn(self.values, points, values, self.changes)

    def search(self, sdf_at: Callable, rays: Rays, t: np.ndarray, tolerance: float) -> Samples:
        """Evaluate the samples at the distances t (R, S) that may be a ray's entry or have its least sdf.

        sdf_at(ray (n,), t (n,)) gives the sdf (n,). A ray's first sample never counts as its least. tolerance: of the
        sdf at an entry.
        """
        samples = Samples(t, np.full(t.shape, np.inf, np.float32), np.zeros(t.shape, bool))
        estimate, within = np.empty(t.shape, np.float32), np.empty((len(t), 2), np.int64)
        needed, open_rays, number = np.zeros((*t.shape, 2), np.float32), np.ones(len(t), bool), 0
        doubt, (flat_t, flat_table, flat_evaluated) = 2 * self.margins[0].max(), (array.ravel() for array in samples)

        def begin(part):
            _along(self.values, rays.origins[part], rays.directions[part], t[part], doubt, estimate[part], within[part])
            return _first_guess(estimate[part], within[part], rays.want_hit[part])

        def go_on(part):
            arrays = (array[part] for array in (*samples, estimate, within, rays.want_hit, open_rays, needed))
            return _samples_in_doubt(*arrays, self.margins, tolerance, number)

        places = _places(begin, t.shape)
        while places.size or number == 0:
            flat_table[places] = sdf_at(places // t.shape[1], flat_t[places])
            flat_evaluated[places] = True
            places = _places(go_on, t.shape)
            number += 1
        _widen(self.margins, *samples, needed, rays.want_hit, tolerance)
        return samples


def _places(choose, shape):
    """Return the samples, as indices into a flat table of this shape (R, S), that choose(slice of the rays) chooses.

    Each core that has enough to do takes a part of the rays.
    """
    split = Split(shape[0], 0, min(max(shape[0] * shape[1] // MIN_PER_CORE, 1), CORES))
    chosen = [None] * split.blocks

    def choose_part(number, split):
        first, rows = block_of(split, number)[:2]
        chosen[number] = first * shape[1] + choose(slice(first, first + rows))

    on_all_cores(choose_part, split)
    return np.concatenate(chosen)


# --- values between the grid's points ---------------------------------------------------------------------------------

@compiled
def _cell(x, side):
    """Return the number of the grid's point below a coordinate in [-1, 1], and how many steps lie between them."""
    place = (x + np.float32(1)) * np.float32(0.5 * (side - 1))
    below = min(max(int(place), 0), side - 2)
    return below, place - np.float32(below)


@compiled
def _value(values, x, y, z):
    """Return the value at a point between the grid's points, linear in each coordinate."""
    side, one, v = values.shape[0], np.float32(1), values
    (i, a), (j, b), (k, c) = _cell(x, side), _cell(y, side), _cell(z, side)
    low = ((v[i, j, k] * (one - c) + v[i, j, k + 1] * c) * (one - b)
           + (v[i, j + 1, k] * (one - c) + v[i, j + 1, k + 1] * c) * b)
    high = ((v[i + 1, j, k] * (one - c) + v[i + 1, j, k + 1] * c) * (one - b)
            + (v[i + 1, j + 1, k] * (one - c) + v[i + 1, j + 1, k + 1] * c) * b)
    return low * (one - a) + high * a


@compiled
def _along(values, origins, directions, t, doubt, out, within):
    """Write the values at the distances t (R, S) along rays to `out` (R, S), where they matter.

    The first sample where they matter, and the one after the last, are written to within (R, 2). Outside of these, the
    sdf is neither a ray's least nor at its entry, if the grid is off by less than `doubt` / 2. So not all are read:
    first every READ_STRIDE-th.
    """
    rays, samples = t.shape
    for ray in range(rays):
        (x, y, z), (dx, dy, dz) = origins[ray], directions[ray]
        least = np.float32(np.inf)
        for number in range(0, samples, READ_STRIDE):
            d = t[ray, number]
            out[ray, number] = _value(values, x + dx * d, y + dy * d, z + dz * d)
            least = min(least, out[ray, number])
        spacing = (t[ray, samples - 1] - t[ray, 0]) / samples
        limit = max(least, np.float32(0)) + doubt + MAX_SLOPE * READ_STRIDE * spacing
        first, last = samples, 0
        for number in range(0, samples, READ_STRIDE):
            if out[ray, number] <= limit:
                first, last = min(first, number), number
        within[ray] = max(first - READ_STRIDE, 0), min(last + READ_STRIDE, samples)
        for number in range(within[ray, 0], within[ray, 1]):
            if number % READ_STRIDE:
                d = t[ray, number]
                out[ray, number] = _value(values, x + dx * d, y + dy * d, z + dz * d)


@compiled
def _learn(values, points, found, changes):
    """Change the 8 values around each point by the least amount after which the grid gives found (N,) there.

    A value between several points takes the mean of what they ask for, weighted by how near they are: one after the
    other, they would undo what the one before has brought. But none stays farther from what was found than MAX_SLOPE
    allows. Else those with little weight, as beyond the unit sphere, would drift.
    changes: (side, side, side, 2), zero before and after.
    """
    side, one, weights = values.shape[0], np.float32(1), np.empty((2, 2, 2), np.float32)
    slope = np.float32(2 * MAX_SLOPE / (side - 1))      # from one value to the next
    for n in range(len(points)):
        if not abs(found[n]) < np.float32(np.inf):
            continue
        (i, a), (j, b), (k, c) = _cell(points[n, 0], side), _cell(points[n, 1], side), _cell(points[n, 2], side)
        value = square = np.float32(0)
        for x in range(2):
            for y in range(2):
                for z in range(2):
                    weight = (a if x else one - a) * (b if y else one - b) * (c if z else one - c)
                    da, db, dc = a - np.float32(x), b - np.float32(y), c - np.float32(z)
                    far, known = da * da + db * db + dc * dc, values[i + x, j + y, k + z]
                    if (known - found[n]) ** 2 > slope * slope * far:       # seldom
                        known = found[n] + np.copysign(slope * np.sqrt(far), known - found[n])
                        values[i + x, j + y, k + z] = known
                    value += weight * known
                    square += weight * weight
                    weights[x, y, z] = weight
        step = (found[n] - value) / square
        for x in range(2):
            for y in range(2):
                for z in range(2):
                    changes[i + x, j + y, k + z, 0] += step * weights[x, y, z] * weights[x, y, z]
                    changes[i + x, j + y, k + z, 1] += weights[x, y, z]
    for n in range(len(points)):
        (i, _), (j, _), (k, _) = _cell(points[n, 0], side), _cell(points[n, 1], side), _cell(points[n, 2], side)
        for x in range(i, i + 2):
            for y in range(j, j + 2):
                for z in range(k, k + 2):
                    if changes[x, y, z, 1] > 0:
                        values[x, y, z] += changes[x, y, z, 0] / changes[x, y, z, 1]
                        changes[x, y, z, 0] = changes[x, y, z, 1] = 0


# --- the samples in doubt ---------------------------------------------------------------------------------------------
# t, table, evaluated (R, S): the fields of Samples. estimate (R, S) and within (R, 2): what _along gives.
# want_hit (R,) bool: of Rays. needed (R, S, 2): the margins of the grid and of a parabola without which a sample would
# not have been evaluated.

@compiled
def _first_guess(estimate, within, want_hit):
    """Return the samples to evaluate first, as indices into the flat table.

    On a ray that wants a hit, they are those on either side of the first change of sign of the estimate, else the one
    of its least value.
    """
    samples = estimate.shape[1]
    places, found = np.empty(2 * len(estimate), np.int64), 0
    for ray in range(len(estimate)):
        first, end = within[ray]
        least, entry = max(first, 1), 0
        for number in range(max(first, 1), end):
            if estimate[ray, number] < estimate[ray, least]:
                least = number
            if want_hit[ray] and number > first and estimate[ray, number] <= 0 < estimate[ray, number - 1]:
                entry = number
                places[found] = ray * samples + entry - 1
                found += 1
                break
        places[found] = ray * samples + (entry if entry else least)
        found += 1
    return places[:found]


@compiled
def _samples_in_doubt(t, table, evaluated, estimate, within, want_hit, open_rays, needed, margins, tolerance, number):
    """Return the samples to evaluate next, as indices into the flat table; write lower bounds into it elsewhere.

    A sample is in doubt if it may be the ray's entry, if the surface may hide in a gap beside it, or if the ray has no
    sure entry and the sample may be the least. Only some of the latter are listed. number: of the round, from 0.
    open_rays (R,) bool loses the rays that have no doubtful sample left.
    """
    samples = t.shape[1]
    places, found = np.empty(t.size, np.int64), 0
    expected, margin, share = np.empty((3, samples), np.float32)
    listed, doubtful = np.zeros(samples, np.bool_), np.zeros(samples, np.bool_)
    for ray in range(len(t)):
        if not open_rays[ray]:
            continue
        first, end = within[ray]
        end, least = _bound(t[ray], table[ray], evaluated[ray], estimate[ray], first, end, want_hit[ray], margins,
                            tolerance, expected, margin, share)
        outside, sure, before = first > 0, False, found
        for sample in range(first, end) if want_hit[ray] else range(0):
            low, last = table[ray, sample], max(sample - 1, first)
            hides = outside and low > tolerance and low + table[ray, last] < t[ray, sample] - t[ray, last]
            if low <= tolerance or hides:
                listed[sample] = listed[last] = True
                if not evaluated[ray, sample]:
                    _need(needed[ray, sample], share[sample], expected[sample] - tolerance)
            sure = outside and expected[sample] + margin[sample] <= tolerance
            if sure:
                break
            outside |= low > tolerance
        for sample in range(max(first, 1), end) if not sure else range(0):
            if not evaluated[ray, sample] and not listed[sample]:
                _need(needed[ray, sample], share[sample], expected[sample] - least)
                doubtful[sample] = table[ray, sample] <= least
        if number == 0:
            _list_sparsely(doubtful, first, end, least > SMOOTH, listed)
        else:
            _list_likeliest(doubtful, table[ray], first, end, LIKELIEST << (number - 1), listed)
        for sample in range(first, end):
            if listed[sample] and not evaluated[ray, sample]:
                places[found] = ray * samples + sample
                found += 1
            listed[sample] = doubtful[sample] = False
        open_rays[ray] = found > before or not sure and number == 0
    return places[:found]


@compiled
def _need(needed, share, margin):
    """Note in needed (2,), of one sample, what margin it takes for the sample to be in doubt.

    share: how much of a parabola's margin counts there; 0 where the grid's margin does.
    """
    if share > 0:
        needed[1] = max(needed[1], margin / share)
    else:
        needed[0] = max(needed[0], margin)


@compiled
def _list_sparsely(doubtful, first, end, smooth, listed):
    """List every 2nd doubtful sample, (S,) bool; on a smooth sdf, every few, so that all lie between two."""
    stride = min(doubtful[first:end].sum() // FEW, MAX_STRIDE) if smooth else 1
    for number in range(first, end):
        if doubtful[number]:
            if stride > 1:
                listed[max(number // stride * stride, first)] = True
                listed[min(-(-number // stride) * stride, end - 1)] = True
            else:
                listed[number] = smooth or number % 2 == 0


@compiled
def _list_likeliest(doubtful, low, first, end, most, listed):
    """List the doubtful samples, (S,) bool, of least lower bound, low (S,); `most` at most."""
    for _ in range(most):
        lowest = -1
        for number in range(first, end):
            if doubtful[number] and not listed[number] and (lowest < 0 or low[number] < low[lowest]):
                lowest = number
        if lowest < 0:
            break
        listed[lowest] = True


@compiled
def _bound(t, table, evaluated, estimate, first, end, want_hit, margins, tolerance, expected, margin, share):
    """Bound one ray's sdf from `first` to `end`: write lower bounds into table, what is expected, up to what margin.

    Of the evaluated samples on either side, the one that gives the higher bound counts, with the grid, or a parabola,
    then with a share of its margin. Returns the end, or that of the samples up to the entry if it is known, and the
    least sdf found.
    """
    least, outside = np.float32(np.inf), first > 0
    for number in range(first, end):
        if evaluated[number]:
            if number > 0:
                least = min(least, table[number])
            if want_hit and outside and table[number] <= tolerance:
                end = number + 1
                break
            outside |= table[number] > tolerance
    which = 0 if want_hit and least <= tolerance and outside else 1 + np.searchsorted(LEVELS, least)
    for backwards in range(2):
        known = -1
        for step in range(end - first):
            number = end - 1 - step if backwards else first + step
            if evaluated[number]:
                known, expected[number], margin[number] = number, table[number], 0
                continue
            if not backwards:
                table[number], expected[number], margin[number] = -np.inf, -np.inf, np.inf
            if known >= 0:
                far = abs(t[number] - t[known])
                error = min(margins[0, which], ERROR_SLOPE * far)
                value = estimate[number] + table[known] - estimate[known]
                bound = max(value - error, table[known] - MAX_SLOPE * far)
                if bound > table[number]:
                    table[number], expected[number], margin[number] = bound, value, error
    share[first:end] = 0
    if least > SMOOTH:
        _bound_between(t, table, evaluated, first, end, margins[1, which], expected, margin, share)
    return end, least


@compiled
def _bound_between(t, table, evaluated, first, end, wide_error, expected, margin, share):
    """Bound one ray's sdf between close evaluated samples by a parabola, up to its error, where that is a higher bound.

    The parabola is that through the two on either side and the nearer one of those beyond. wide_error: if the two are
    WIDE apart.
    """
    before = start = -1
    for stop in range(first, end):
        if not evaluated[stop]:
            continue
        if start >= 0 and 1 < stop - start <= MAX_STRIDE:
            part, after = (t[stop] - t[start]) / np.float32(WIDE), stop + 1
            error = wide_error * part
            while after < end and not evaluated[after]:
                after += 1
            for number in range(start + 1, stop):
                third = before if before >= 0 and (after == end or number - before < after - number) else after
                if third < end and abs(third - number) <= 2 * MAX_STRIDE:
                    value = _parabola(t, table, start, stop, third, t[number])
                    if value - error > table[number]:
                        table[number], expected[number] = value - error, value
                        margin[number], share[number] = error, part
        before, start = start, stop


@compiled
def _parabola(t, values, a, b, c, x):
    """Return the value at x of the parabola through the samples a, b and c."""
    slope, next_slope = (values[b] - values[a]) / (t[b] - t[a]), (values[c] - values[a]) / (t[c] - t[a])
    return values[a] + (x - t[a]) * (slope + (x - t[b]) * (next_slope - slope) / (t[c] - t[b]))


@compiled
def _widen(margins, t, table, evaluated, needed, want_hit, tolerance):
    """Adapt the margins to what the answers of some rays have needed."""
    for ray in range(len(t)):
        outside, enters, answer = False, False, 1
        for number in range(t.shape[1]):
            if evaluated[ray, number]:
                enters = want_hit[ray] and outside and table[ray, number] <= tolerance
                if enters or number > 0 and (table[ray, number] < table[ray, answer] or not evaluated[ray, answer]):
                    answer = number
                if enters:
                    break
            outside |= table[ray, number] > tolerance
        which = 0 if enters else 1 + np.searchsorted(LEVELS, table[ray, answer])
        for kind in range(2):
            margins[kind, which] = max(margins[kind, which] * (1 - FORGET), SPARES[which] * needed[ray, answer, kind],
                                       LEAST_MARGINS[kind])
