"""The search for a step's points on a CPU, compiled as one: a core takes its rays from the first guess to the hit.

It does what ray_tracer.hit_or_least_sdf does with an SdfGrid, by the same functions. There each of some nine
evaluations is handed to all cores and awaited; between them one core works alone, much of the time in Python.
"""
from typing import List, NamedTuple, Tuple

import numpy as np

import ray_tracer
from backends import cpu_kernels
from backends.cpu_kernels import Split, Weights
from ray_tracer import Chords, Limits, Refinement
from tracing import sdf_grid
from tracing.compiling import compiled, inlined
from tracing.sdf_grid import SdfGrid

MIN_PER_CORE = 16       # rays; with fewer, handing them over takes longer than the work


class Known(NamedTuple):
    """What a search goes by: an SdfGrid's arrays, the samples' places (S,) on the chords, the refinement."""
    values: np.ndarray
    margins: np.ndarray
    fractions: np.ndarray
    how: Refinement


class Found(NamedTuple):
    """What a search has found on R rays with S samples, and what it has evaluated."""
    want_hit: np.ndarray    # (R,) bool, of the rays
    samples: Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # those of tracing.sdf_grid: distances, table and
                                                                    # evaluated (R, S), and needed (R, S, 2)
    heard: Tuple[Tuple[np.ndarray, np.ndarray], Tuple[np.ndarray, np.ndarray]]  # points (N, 3) and sdf (N,), of the
                                                                                # samples and of the refinement


def take_in(grid: SdfGrid, found: List[Found], tolerance: float) -> None:
    """Let the grid hear what the blocks of a search have evaluated, and adapt its margins to it."""
    for block in found:
        grid.heard += block.heard
        sdf_grid._widen(grid.margins, *block.samples, block.want_hit, tolerance)


class CompiledSearch:
    """A search alone, for hit_or_least_sdf, on the sdf of some weights, with what a grid knows of it.

    It lets the grid hear what it has evaluated: of each block of rays the samples, then the points of the refinement.
    """

    def __init__(self, grid: SdfGrid, weights: Weights):
        self.grid, self.weights = grid, weights

    def __call__(self, chords: Chords, fractions: np.ndarray, how: Refinement,
                 limits: Limits) -> Tuple[np.ndarray, np.ndarray]:
        """Return t (R,) float32 and hit (R,) bool of rays, as hit_or_least_sdf does."""
        known, rays = Known(self.grid.values, self.grid.margins, fractions, how), len(chords.near)
        split = Split(rays, 0, min(max(rays // MIN_PER_CORE, 1), cpu_kernels.CORES))
        t, hit, found = np.empty(rays, np.float32), np.empty(rays, bool), [None] * split.blocks

        def search_part(number, split):
            block = cpu_kernels.block_of(split, number)
            own = slice(block.first, block.first + block.rows)
            t[own], hit[own], found[number] = search(Chords(*(array[own] for array in chords)), known, self.weights)

        cpu_kernels.on_all_cores(search_part, split)
        take_in(self.grid, found, how.tolerance)
        return t, hit


@inlined
def search(chords: Chords, known: Known, net: Weights) -> Tuple[np.ndarray, np.ndarray, Found]:
    """Search R rays on one core. Returns t (R,), of the hit or of the sample of least sdf, hit (R,) bool, and Found."""
    origins, directions, want_hit, near, length = chords
    shape, how, f = (len(near), len(known.fractions)), known.how, np.float32
    t = np.empty(shape, f)
    for ray in range(len(near)):
        for sample in range(shape[1]):
            t[ray, sample] = near[ray] + length[ray] * known.fractions[sample]
    table, evaluated, needed = np.full(shape, f(np.inf), f), np.zeros(shape, np.bool_), np.zeros((*shape, 2), f)
    points, values = np.empty((t.size, 3), f), np.empty(t.size, f)
    count = find_samples((origins, directions, want_hit), (known.values, known.margins, how.tolerance, net),
                         (t, table, evaluated, needed), (points, values))
    found, hit = np.empty(len(near), f), np.zeros(len(near), np.bool_)
    for ray in range(len(near)):
        least = 1
        for sample in range(2, shape[1]):
            if table[ray, sample] < table[ray, least]:
                least = sample
        found[ray] = t[ray, least]
    rays, ends = ray_tracer._gap_ends(t, table, evaluated, want_hit, how.tolerance)
    both = np.empty((2, 2, len(rays)), f)
    for side in range(2):
        for i in range(len(rays)):
            both[0, side, i], both[1, side, i] = t[rays[i], ends[side, i]], table[rays[i], ends[side, i]]
    entry, holds, more = refine(origins, directions, rays, both, how, net)
    for i in range(len(rays) - 1, -1, -1):      # of a ray's gaps that hold an entry, the first one counts
        if holds[i]:
            found[rays[i]], hit[rays[i]] = entry[i], True
    return found, hit, Found(want_hit, (t, table, evaluated, needed), ((points[:count], values[:count]), more))


@compiled
def find_samples(rays, known, samples, heard):
    """Do SdfGrid.search: evaluate the samples that may be a ray's entry or have its least sdf.

    rays: origins and directions (R, 3), want_hit (R,); known: the grid's values and margins, the tolerance, the
    weights; samples: distances, table and evaluated, (R, S) each, and needed (R, S, 2); heard: arrays that receive the
    points and their sdf. Returns how many.
    """
    (origins, directions, want_hit), (t, table, evaluated, needed) = rays, samples
    (grid, margins, tolerance, net), (points, values), count, number = known, heard, 0, 0
    estimate, within = np.empty(t.shape, np.float32), np.empty((len(t), 2), np.int64)
    open_rays = np.ones(len(t), np.bool_)
    sdf_grid._along(grid, origins, directions, t, np.float32(2) * margins[0].max(), estimate, within)
    places = sdf_grid._first_guess(estimate, within, want_hit)
    while len(places) or number == 0:
        last = count + len(places)
        ray, distance = places // t.shape[1], np.empty(len(places), np.float32)
        for i in range(len(places)):
            distance[i] = t[ray[i], places[i] % t.shape[1]]
        cpu_kernels.write(ray_tracer._points(origins, directions, ray, distance), points[count:last])
        values[count:last] = cpu_kernels.sdf_values(points[count:last], net)
        for i in range(len(places)):
            table[ray[i], places[i] % t.shape[1]] = values[count + i]
            evaluated[ray[i], places[i] % t.shape[1]] = True
        count = last
        places = sdf_grid._samples_in_doubt(t, table, evaluated, estimate, within, want_hit, open_rays, needed,
                                            margins, tolerance, number)
        number += 1
    return count


@compiled
def refine(origins, directions, rays, both, how, net):
    """Do ray_tracer._refine for the gaps of `rays` (n,); both: their ends and the sdf there (2, 2, n).

    Returns the entries' distances (n,), whether a gap holds one (n,) bool, and the points and values evaluated.
    """
    ends, values = both[0], both[1]
    holds, walking, active = values[1] <= how.tolerance, values[1] >= -how.tolerance, np.ones(len(rays), np.bool_)
    all_points, all_values = np.empty((0, 3), np.float32), np.empty(0, np.float32)
    for step in range(how.steps):
        gap, ahead = ray_tracer._look_ahead(ends, values, holds, walking, active, how.secant,
                                            ray_tracer.num_ahead(step), ray_tracer.steps_left(step, how.steps),
                                            how.tolerance)
        if not len(gap):
            break
        points = ray_tracer._points(origins, directions, rays[gap], ahead)
        found = cpu_kernels.sdf_values(points, net)
        all_points, all_values = np.concatenate((all_points, points)), np.concatenate((all_values, found))
        ray_tracer._take_in(ends, values, holds, walking, active, gap, ahead, found, how.tolerance)
    t = np.where(np.abs(values[0]) <= np.abs(values[1]), ends[0], ends[1])
    return t, holds, (all_points, all_values)
