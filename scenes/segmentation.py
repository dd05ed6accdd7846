"""An image in two: colour models of object and background, and the outline that follows colours and edges.

The outline is a minimum cut, as of GrabCut (Rother et al., SIGGRAPH 2004): each pixel's cost is given, and an edge
between unlike neighbours costs less than one between like ones. It is found as the convex problem that has the same
minimum (Chan, Esedoglu and Nikolova, 2006), by the method of Chambolle and Pock (2011).
"""
import cv2
import numpy as np
from scipy import ndimage

from tracing.compiling import compiled

BINS = (16, 32, 32)     # of a colour histogram, along L, a and b
SURE = 4.0              # the most that a pixel's colour can say, as a logarithm of a ratio of likelihoods
UNSEEN = 0.03           # share of a histogram that is spread over all colours
BORROWED = 0.25         # weight of all views' colours beside a view's own
EDGE = 4.0              # cost of an outline between two like neighbours


def colour_bins(image):
    """Return the bin (h, w) int32 of each pixel's colour. image: (h, w, 3) uint8, RGB."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.int32)
    steps = [256 // count for count in BINS]
    return (lab[..., 0] // steps[0] * BINS[1] + lab[..., 1] // steps[1]) * BINS[2] + lab[..., 2] // steps[2]


def histogram(bins, weights):
    """Return the weights' sums over the bins, float64, blurred a little over similar colours. Both arrays: (h, w)."""
    counts = np.bincount(bins.ravel(), weights.ravel(), int(np.prod(BINS)))
    return ndimage.gaussian_filter(counts.reshape(BINS), 0.7).ravel()


def colour_evidence(own, common):
    """Return the logarithms of the ratio of likelihoods, object to background, of all bins, from -SURE to SURE.

    own, common: pairs of histograms, object's and background's: of one view, and of all views together.
    """
    size = own[0].sum() + own[1].sum() + 1e-9
    densities = []
    for view, everywhere in zip(own, common):
        borrowed = everywhere / max(everywhere.sum(), 1e-9) * BORROWED * size
        mixed = view + borrowed
        densities.append((1 - UNSEEN) * mixed / max(mixed.sum(), 1e-9) + UNSEEN / len(mixed))
    return np.clip(np.log(densities[0] / densities[1]), -SURE, SURE)


def edge_costs(image):
    """Return the costs of an outline between a pixel and its right and its lower neighbour, (2, h, w) float32."""
    smooth = cv2.GaussianBlur(image, (0, 0), 0.7).astype(np.float32)
    costs = np.zeros((2, *image.shape[:2]), np.float32)
    squares = ((np.diff(smooth, axis=1) ** 2).sum(axis=2), (np.diff(smooth, axis=0) ** 2).sum(axis=2))
    typical = np.mean([s.mean() for s in squares]) + 1e-6
    costs[0, :, :-1], costs[1, :-1] = [EDGE * (0.05 + 0.95 * np.exp(-s / (2 * typical))) for s in squares]
    return costs


def cut(evidence, costs, start, steps=150):
    """Return the mask (h, w) bool of least cost.

    evidence: (h, w), positive for the object; costs: edge_costs'. start: (h, w), a guess from 0 to 1.
    """
    return relaxed(evidence.astype(np.float32), costs[0], costs[1], start.astype(np.float32), steps) > 0.5


@compiled
def relaxed(evidence, right, down, start, steps):
    """Return u (h, w) in [0, 1] that minimises the sum of right |u_x| + down |u_y| - evidence u."""
    height, width = evidence.shape
    u, ahead = start.copy(), start.copy()
    px, py = np.zeros_like(u), np.zeros_like(u)
    step = np.float32(0.35)
    for _ in range(steps):
        for y in range(height):
            for x in range(width):
                if x + 1 < width:
                    p = px[y, x] + step * (ahead[y, x + 1] - ahead[y, x]) * 3
                    px[y, x] = min(max(p, -right[y, x]), right[y, x])
                if y + 1 < height:
                    p = py[y, x] + step * (ahead[y + 1, x] - ahead[y, x]) * 3
                    py[y, x] = min(max(p, -down[y, x]), down[y, x])
        for y in range(height):
            for x in range(width):
                change = px[y, x] + py[y, x] + evidence[y, x]
                if x:
                    change -= px[y, x - 1]
                if y:
                    change -= py[y - 1, x]
                new = min(max(u[y, x] + step / 3 * change, np.float32(0)), np.float32(1))
                ahead[y, x] = 2 * new - u[y, x]
                u[y, x] = new
    return u
