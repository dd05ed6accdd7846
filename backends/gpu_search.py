"""The search along rays on a GPU, with a grid that remembers the sdf.

A call for a few thousand points costs a GPU little, and each time that the host chooses the next ones, the GPU waits.
So kernels choose (gpu_search.cu, which follows ray_tracer.py and tracing/sdf_grid.py), and the host learns only how
many points come next. No network is known here. Importing this file needs CuPy.
"""
from pathlib import Path
from typing import Callable, Optional, Tuple, Union

import cupy
import numpy as np

from backends.gpu_kernels import Device, Pointer, compiled, copy, page_locked

ROUNDS = 2      # of doubtful samples. Each takes as long as a thousand points; what is left open is walked through
FINER = 4       # times as many points a side has the grid of an sdf that stays as it is
CLOSER = 16     # places at which a gap between samples is looked at, on such a grid
BESIDE = 0.25   # of a gap: so far from where the grid is least the sdf is looked at, too
USUAL, NEARLY_ALL = 0.9, 0.999      # shares of its cells: its error in these is taken for its usual and its largest one
BEYOND = 1.2    # the margin of such a grid is so many times its largest error
THREADS = 32    # of a block: few, so that a few thousand rays keep all of a GPU busy
SHARED = 48 << 10   # bytes of shared memory that a block may have
GAP_BYTES = 32
Array = Union[np.ndarray, cupy.ndarray]
HIT_OR_LEAST, HIT = 1, 2    # what is wanted of a ray, in gpu_search.cu
SOURCE = Path(__file__).with_suffix(".cu")
KERNELS = ("learn change list_near list_middles put_values list_first_guess list_doubtful take note_needs widen "
           "list_closest take_closest list_gaps look_ahead take_in find_hits").split()


class Grid:
    """A tracing.sdf_grid.SdfGrid on a GPU. It hears what a search evaluates with it.

    usual_error: of its values, if the sdf stays as it is, else 0.
    """

    def __init__(self, search: "Search", values: np.ndarray, margins: np.ndarray, usual_error: float = 0.0):
        self.search, self.side, self.usual_error = search, len(values), np.float32(usual_error)
        with search.device.current():
            self.on_gpu = cupy.asarray(values, np.float32), cupy.asarray(margins, np.float32)
            self.needs = cupy.zeros(margins.size, np.float32), cupy.zeros(margins.shape[1], np.int32)
        self.arguments, self.changes = (*self.on_gpu, self.side), None

    @property
    def values(self) -> np.ndarray:
        """(side, side, side) float32."""
        return self.on_gpu[0].get()

    @property
    def margins(self) -> np.ndarray:
        """(2, NUM_MARGINS) float32."""
        return self.on_gpu[1].get()

    def hear(self, points: Pointer, values: Pointer, count: int) -> None:
        """Note values (count,) at points (count, 3) on the GPU."""
        if self.changes is None:
            self.changes = cupy.zeros((self.side ** 3, 2), np.float32)
        self.search.start("learn", count, *self.arguments, points, values, count, self.changes)

    def learn_heard(self) -> None:
        """Learn all that was heard since the last time."""
        if self.changes is not None:
            with self.search.device.current():
                self.search.start("change", len(self.changes), self.on_gpu[0], self.changes, len(self.changes))

    def learn(self, points: Array, values: Array) -> None:
        """Learn values (N,) at points (N, 3), float32."""
        with self.search.device.current():
            self.hear(cupy.asarray(points), cupy.asarray(values), len(points))
            self.learn_heard()


class Search:
    """Finds hits and least samples of rays, as ray_tracer.hit_or_least_sdf does with a grid.

    evaluate(x, out, count) starts the computation of the sdf at x (count, 3); x and out point to float32 on the GPU.
    still: the Grid of an sdf that stays as it is, None while there is none. evaluations: points so far, by kind.
    """

    def __init__(self, device: Device, evaluate: Callable[[Pointer, Pointer, int], None]):
        self.device, self.evaluate, self.kernels, self.still = device, evaluate, None, None
        self.room, self.ray_room, self.fractions = 0, 0, ()
        self.evaluations = {"samples": 0, "closest": 0, "refinement": 0}
        with device.current():
            self.count, self.num_gaps = (cupy.zeros(1, np.int32) for _ in range(2))
            self.number = page_locked((1,), np.int32)

    def remember(self, grid, limits) -> Grid:
        """Return the Grid of a SdfGrid; limits: ray_tracer.Limits."""
        with self.device.current():
            self.kernels = self.kernels or compiled(SOURCE, KERNELS, "-fmad=false", ROUNDS=ROUNDS, CLOSER=CLOSER,
                                                    BESIDE=BESIDE, **limits.constants)
        return Grid(self, grid.values, grid.margins)

    def remember_still(self, grid, limits) -> Grid:
        """As remember, of an sdf that stays as it is: FINER times as many points a side, exact near the surface."""
        with self.device.current():
            self.reserve(1 << 15, 100)
            coarse, side = self.measured(self.remember(grid, limits), limits), FINER * (len(grid.values) - 1) + 1
            fine, band = cupy.empty((side, side, side), np.float32), np.float32(coarse.margins[0, 0] + 8 / side)
            self.start("list_near", fine.size, *coarse.arguments, band, fine, side, *self.list)
            count = self.listed("samples", None)
            if count:
                self.start("put_values", count, *self.list, count, self.values, fine)
            return self.measured(Grid(self, fine, grid.margins), limits)

    def measured(self, grid: Grid, limits) -> Grid:
        """Return the grid with margins that follow from how far it is off near the surface, and its usual error.

        That is measured in the middle of the cells that the surface may cross, where a grid is off the most.
        """
        self.start("list_middles", (grid.side - 1) ** 3, *grid.arguments, self.ahead, *self.list)
        count = self.listed("samples", None)
        self.count.fill(0)
        if not count:
            return grid
        usual, most = np.quantile(np.abs((self.values[:count] - self.ahead[:count]).get()), (USUAL, NEARLY_ALL))
        margins = np.full(grid.on_gpu[1].shape, np.inf)     # of a parabola, nothing is known
        margins[0] = max(BEYOND * most, limits.constants["LEAST_MARGINS"][0])
        return Grid(self, grid.on_gpu[0], margins, usual)

    def __call__(self, chords, fractions: np.ndarray, how, limits, grid: Grid) -> Tuple[np.ndarray, np.ndarray]:
        """Return t (R,) float32, each ray's hit if it is wanted and found, else its least sample; and hit (R,) bool.

        fractions: (S,) float32, the samples' places on the chords, ascending. chords, how, limits: ray_tracer's Chords,
        Refinement and Limits. The grid hears what is evaluated, and its margins adapt.
        """
        return self.search(chords, fractions, how, limits, grid)[:2]

    def first_hits(self, chords, fractions: np.ndarray, how, limits, grid: Grid,
                   spread: float) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return t (R,) float32 and hit (R,) bool of rays that all want a hit, and none the least sample.

        The third result, passes (R,) bool, tells the rays that pass the surface, before they hit it, so narrowly that
        cones with the radius `spread` at distance 1 touch it, or that miss this by less than the grid's usual error.
        The grid stays as it is.
        """
        return self.search(chords, fractions, how, limits, grid, spread)

    def search(self, chords, fractions, how, limits, grid, spread=None):
        """As first_hits; without a spread, as __call__."""
        with self.device.current():
            num_rays = len(chords.near)
            self.reserve(num_rays, len(fractions))
            self.send(chords, fractions, HIT_OR_LEAST if spread is None else HIT)
            samples = (self.rays, num_rays, len(fractions), self.t, self.table, self.state, np.float32(how.tolerance),
                       *self.list)
            learning = grid if spread is None else None
            self.fill_table(samples, num_rays, grid, learning)
            if spread is not None:
                self.look_closely(samples, grid, np.float32(spread))
            self.start("list_gaps", num_rays, *samples, grid.usual_error, self.found, self.gaps, self.num_gaps,
                       self.ray_gaps)
            num_gaps = self.read(self.num_gaps)
            if num_gaps:
                self.refine(num_gaps, how, limits, learning)
                self.start("find_hits", num_rays, self.gaps, self.ray_gaps, num_rays, self.found)
            copy(self.host_found.ctypes.data, self.found.data.ptr, 8 * num_rays)
            self.num_gaps.fill(0)
            cupy.cuda.runtime.streamSynchronize(0)
            passes = self.passes[:num_rays].get() > 0
        found = self.host_found[:num_rays]
        return found[:, 0].copy(), found[:, 1] > 0, passes

    def reserve(self, rays: int, samples: int) -> None:
        """Make room for so many rays, with so many samples each."""
        if rays > self.ray_room or samples > len(self.fractions):
            self.ray_room = rays = max(rays, self.ray_room)
            samples = max(samples, len(self.fractions))
            self.rays, self.host_rays = cupy.empty((rays, 9), np.float32), page_locked((rays, 9))
            self.fractions, self.host_fractions = cupy.empty(samples, np.float32), page_locked((samples,))
            self.found, self.host_found = cupy.empty((rays, 2), np.float32), page_locked((rays, 2))
            self.ray_gaps, self.within = (cupy.empty((rays, count), np.int32) for count in (2, 3))
            self.passes = cupy.empty(rays, np.uint8)
        if rays * samples > self.room:
            self.room = room = rays * samples
            self.t, self.table, self.values, self.ahead, estimate = cupy.empty((5, room), np.float32)
            self.doubts = estimate, cupy.empty((ROUNDS, room), np.float32)
            self.points, self.places = cupy.empty((room, 3), np.float32), cupy.empty(room, np.int32)
            self.state, self.gaps = cupy.empty(room, np.uint8), cupy.empty(room * GAP_BYTES, np.uint8)
            self.list = self.count, self.places, self.points, room

    def send(self, chords, fractions: np.ndarray, wanted: int) -> None:
        """Start copying chords, as rows of gpu_search.cu's Ray, and fractions to the GPU.

        wanted: HIT or HIT_OR_LEAST, of the rays that want a hit.
        """
        rays, host_fractions = self.host_rays[:len(chords.near)], self.host_fractions[:len(fractions)]
        rays[:, :3], rays[:, 3:6] = chords.origins, chords.directions
        rays[:, 6], rays[:, 7], rays[:, 8] = chords.near, chords.length, chords.want_hit * wanted
        host_fractions[:] = fractions
        copy(self.rays.data.ptr, rays.ctypes.data, rays.nbytes)
        copy(self.fractions.data.ptr, host_fractions.ctypes.data, host_fractions.nbytes)

    def start(self, kernel: str, count: int, *arguments, shared: int = 0) -> None:
        """Start a kernel with that many threads, each of which has so many bytes of its block's shared memory."""
        threads = min(max(SHARED // shared, 1), THREADS) if shared else THREADS
        self.kernels[kernel]((-(-count // threads),), (threads,), arguments, shared_mem=shared * threads)

    def read(self, number: cupy.ndarray) -> int:
        """Return a number that the GPU has computed, when it is there."""
        copy(self.number.ctypes.data, number.data.ptr, 4)
        cupy.cuda.runtime.streamSynchronize(0)
        return int(self.number[0])

    def listed(self, kind: str, grid: Optional[Grid]) -> int:
        """Start the evaluation of the listed points, which the grid, if any, hears; return their number."""
        count = min(self.read(self.count), self.room)
        if count:
            self.evaluations[kind] += count
            self.evaluate(self.points.data.ptr, self.values.data.ptr, count)
            if grid:
                grid.hear(self.points, self.values, count)
        return count

    def fill_table(self, samples: tuple, num_rays: int, grid: Grid, learning: Optional[Grid]) -> None:
        """Evaluate the samples that matter. learning: the grid, if it changes."""
        known = *samples, *grid.arguments, *self.doubts, self.within
        narrow = np.float32(grid.usual_error and grid.usual_error + 2 * samples[6])     # both ends beyond the tolerance
        self.start("list_first_guess", num_rays, *known, self.fractions, narrow)
        for number in range(ROUNDS):
            if not self.take_samples(learning):
                break
            self.start("list_doubtful", num_rays, *known, number, shared=25 * samples[2])
        else:
            self.take_samples(learning)
        if learning:
            self.start("note_needs", num_rays, *samples, *self.doubts, self.within, *grid.needs)
            self.start("widen", len(grid.needs[1]), grid.on_gpu[1], *grid.needs)

    def look_closely(self, samples: tuple, grid: Grid, spread: np.float32) -> None:
        """Evaluate the points where rays come closest to the surface before they enter. Find which pass narrowly."""
        self.start("list_closest", samples[1], *samples, *grid.arguments, self.within, spread, self.passes)
        count = self.listed("closest", None)
        if count:
            self.start("take_closest", count, *samples, count, self.values, spread, grid.usual_error, self.passes)

    def take_samples(self, learning: Optional[Grid]) -> int:
        """Evaluate the listed samples; return their number."""
        count = self.listed("samples", learning)
        if count:
            self.start("take", count, *self.list, count, self.values, self.table, self.state)
        return count

    def refine(self, num_gaps: int, how, limits, learning: Optional[Grid]) -> None:
        """Narrow the gaps, as ray_tracer does. learning: the grid, if it changes."""
        for step in range(how.steps):
            self.start("look_ahead", num_gaps, self.rays, self.gaps, num_gaps, self.ahead, *self.list, int(how.secant),
                       limits.num_ahead(step), limits.steps_left(step, how.steps), np.float32(how.tolerance))
            if not self.listed("refinement", learning):
                break
            self.start("take_in", num_gaps, self.gaps, num_gaps, self.ahead, self.values, self.count,
                       np.float32(how.tolerance))
