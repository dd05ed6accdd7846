"""The search along rays on a GPU: samples in half precision, what they leave open exactly.

A call for a few thousand points costs a GPU little, and each time that the host chooses the next ones, the GPU waits.
So kernels choose (gpu_search.cu, which follows ray_tracer.py), and the host learns only how many points come next. No
network is known here. Importing this file needs CuPy.
"""
from pathlib import Path
from typing import Callable, Optional, Tuple

import cupy
import numpy as np

from backends.gpu_kernels import Device, Pointer, compiled, copy, page_locked

STRIDES = (16, 4, 1)        # of the samples in half precision, coarse to fine
FIRST_ERROR, LEAST_ERROR = 4e-3, 1e-5       # of the sdf in half precision
SPARE = 1.5     # the assumed error is at least this many times the largest one of the step before ...
FORGET = 0.01   # ... and falls by this share with each step
THREADS = 32    # of a block: few, so that a few thousand rays keep all of a GPU busy
GAP_BYTES = 32
HIT_OR_LEAST, HIT = 1, 2    # what is wanted of a ray, in gpu_search.cu
SOURCE = Path(__file__).with_suffix(".cu")
KERNELS = "list_every list_between list_rough take find_passes list_gaps look_ahead take_in find_hits".split()


class Search:
    """Finds hits and least samples of rays, as ray_tracer.hit_or_least_sdf without a grid does.

    evaluate(x, out, count, half) starts the computation of the sdf at x (count, 3), in half precision or exactly; x and
    out point to float32 on the GPU. evaluations: points so far, by kind.
    """

    def __init__(self, device: Device, evaluate: Callable[[Pointer, Pointer, int, bool], None]):
        self.device, self.evaluate, self.kernels = device, evaluate, None
        self.room, self.ray_room, self.fractions = 0, 0, ()
        self.error, self.evaluations = FIRST_ERROR, {"half": 0, "exact": 0, "refinement": 0}
        with device.current():
            self.count, self.num_gaps, self.worst = (cupy.zeros(1, np.int32) for _ in range(3))
            self.number = page_locked((1,), np.int32)

    def __call__(self, chords, fractions: np.ndarray, how, limits) -> Tuple[np.ndarray, np.ndarray]:
        """Return t (R,) float32, each ray's hit if it is wanted and found, else its least sample; and hit (R,) bool.

        fractions: (S,) float32, the samples' places on the chords, ascending. chords, how, limits: ray_tracer's Chords,
        Refinement and Limits.
        """
        return self.search(chords, fractions, how, limits)[:2]

    def first_hits(self, chords, fractions: np.ndarray, how, limits,
                   spread: Optional[float]) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return t (R,) float32 and hit (R,) bool of rays that all want a hit, and none the least sample.

        The third result, passes (R,) bool, tells the rays that may pass the surface as cones would that have the radius
        `spread` at distance 1. Without spread there are none.
        """
        return self.search(chords, fractions, how, limits, hits_alone=True, spread=spread)

    def search(self, chords, fractions, how, limits, *, hits_alone=False, spread=None):
        """As first_hits; without hits_alone, as __call__."""
        with self.device.current():
            self.kernels = self.kernels or compiled(SOURCE, KERNELS, "-fmad=false", MAX_SLOPE=limits.max_slope,
                                                    MAX_COVER=limits.max_cover)
            num_rays = len(chords.near)
            self.reserve(num_rays, len(fractions))
            self.send(chords, fractions, HIT if hits_alone else HIT_OR_LEAST)
            samples = (self.rays, num_rays, len(fractions), self.t, self.table, self.state, np.float32(how.tolerance),
                       np.float32(self.error), *self.list)
            self.fill_table(samples, num_rays)
            if spread is not None:
                self.start("find_passes", num_rays, *samples, np.float32(spread), self.passes)
            self.start("list_gaps", num_rays, *samples, self.found, self.gaps, self.num_gaps, self.ray_gaps)
            num_gaps = self.read(self.num_gaps)
            if num_gaps:
                self.refine(num_gaps, how, limits)
                self.start("find_hits", num_rays, self.gaps, self.ray_gaps, num_rays, self.found)
            copy(self.host_found.ctypes.data, self.found.data.ptr, 8 * num_rays)
            worst = self.read(self.worst) / 2 ** 24
            for number in (self.num_gaps, self.worst):
                number.fill(0)
            passes = np.zeros(num_rays, bool) if spread is None else self.passes[:num_rays].get() > 0
        self.error = max(SPARE * worst, (1 - FORGET) * self.error, LEAST_ERROR)
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
            self.ray_gaps, self.passes = cupy.empty((rays, 2), np.int32), cupy.empty(rays, np.uint8)
        if rays * samples > self.room:
            self.room = room = rays * samples
            self.t, self.table, self.values, self.ahead = cupy.empty((4, room), np.float32)
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

    def start(self, kernel: str, count: int, *arguments) -> None:
        """Start a kernel with that many threads."""
        self.kernels[kernel]((-(-count // THREADS),), (THREADS,), arguments)

    def read(self, number: cupy.ndarray) -> int:
        """Return a number that the GPU has computed, when it is there."""
        copy(self.number.ctypes.data, number.data.ptr, 4)
        cupy.cuda.runtime.streamSynchronize(0)
        return int(self.number[0])

    def listed(self, kind: str) -> int:
        """Start the evaluation of the listed points, in half precision for the kind "half"; return their number."""
        count = min(self.read(self.count), self.room)
        self.evaluations[kind] += count
        self.evaluate(self.points.data.ptr, self.values.data.ptr, count, kind == "half")
        return count

    def fill_table(self, samples: tuple, num_rays: int) -> None:
        """Evaluate the samples that matter."""
        listing = [("list_every", self.fractions, STRIDES[0])]
        listing += [("list_between", *strides) for strides in zip(STRIDES, STRIDES[1:])] + [("list_rough",)]
        for kernel, *arguments in listing:
            kind = "exact" if kernel == "list_rough" else "half"
            self.start(kernel, num_rays, *samples, *arguments)
            count = self.listed(kind)
            if count:
                self.start("take", count, *self.list, count, self.values, self.table, self.state, int(kind == "exact"),
                           np.float32(self.error), self.worst)

    def refine(self, num_gaps: int, how, limits) -> None:
        """Narrow the gaps, as ray_tracer does."""
        for step in range(how.steps):
            self.start("look_ahead", num_gaps, self.rays, self.gaps, num_gaps, self.ahead, *self.list, int(how.secant),
                       limits.num_ahead(step), limits.steps_left(step, how.steps), np.float32(how.tolerance))
            if not self.listed("refinement"):
                break
            self.start("take_in", num_gaps, self.gaps, num_gaps, self.ahead, self.values, self.count,
                       np.float32(how.tolerance))
