"""Which rays pass narrowly by the surface: found from what a trace evaluates anyway, and a little more."""
import numpy as np

from tracing.compiling import compiled


class Cones:
    """The rays of one trace as thin cones, and the rays whose cones touch a surface that they pass.

    spread: the cones' radius at distance 1 from their origin. For pixels this is the angle from a pixel's centre to
    the outermost point of interest in it.
    """

    def __init__(self, spread: float):
        self.spread = np.float32(spread)
        self.touches = self.leaves = np.zeros(0, np.float32)

    def noting(self, sdf_at, num_rays: int):
        """Return sdf_at, which evaluates the sdf along rays, as a function that also notes what it finds.

        touches (R,): the nearest evaluated point of each ray whose sdf is at most the cone's radius. leaves (R,): the
        nearest one beyond it whose sdf is more. Both are distances, infinite where there is no such point.
        """
        self.touches, self.leaves = np.full((2, num_rays), np.inf, np.float32)

        def noted(rays, t):
            values = sdf_at(rays, t)
            _note(rays, t, values, self.spread, self.touches, self.leaves)
            return values

        return noted

    def note_passes(self, rays, num_rays: int) -> None:
        """Note the rays, indices (n,), that another search has found to pass narrowly."""
        self.touches, self.leaves = np.full((2, num_rays), np.inf, np.float32)
        self.touches[rays] = self.leaves[rays] = 0

    def look_between(self, sdf_at, rays, ends, values):
        """Evaluate where the sdf may be least between two ends that have met, on n rays; sdf_at is that of `noting`.

        rays: (n,) indices. ends, values: (2, n), distances and their sdf. Two ends meet when their spheres overlap.
        As the sdf is 1-Lipschitz, it is at least half of the overlap between them. Only if that is less than the
        cone's radius, the point below which the two bounds cross is evaluated. If the ray comes as close as d, the sdf
        there is at most 2 d.
        """
        least = 0.5 * (values.sum(axis=0) - (ends[1] - ends[0]))
        t = 0.5 * (ends.sum(axis=0) + values[0] - values[1])
        open_ = least <= self.spread * t
        if open_.any():
            sdf_at(rays[open_], t[open_])

    def near(self, t: np.ndarray, hit: np.ndarray) -> np.ndarray:
        """Return (R,) bool: the ray passes the surface within its cone, before its hit if it has one.

        t, hit: (R,), the results of the trace.
        """
        return np.where(hit, self.leaves < t, self.touches < np.inf)


@compiled
def _note(rays, t, values, spread, touches, leaves):
    """Note n evaluations: rays, t, values (n,); touches, leaves (R,) are changed in place."""
    for i in range(len(t)):
        if values[i] <= spread * t[i]:
            touches[rays[i]] = min(touches[rays[i]], t[i])
        elif t[i] > touches[rays[i]]:
            leaves[rays[i]] = min(leaves[rays[i]], t[i])
