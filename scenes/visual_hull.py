"""Cameras and masks -> the visual hull, the unit sphere around it, and how well each mask agrees with the hull.

The visual hull is the part of space that projects into every mask (Laurentini, 1994). It is carved on a grid, from
views that are shrunk first.
"""
from typing import NamedTuple, Optional

import cv2
import numpy as np

import datasets
import helper

SMALL = 256             # pixels: hull and picture are made from views shrunk to this on the longer side
COARSE, FINE = 50, 80   # cells along the longest side of the two grids on which the hull is carved


class Look(NamedTuple):
    """A shrunk view with its camera."""
    name: str
    image: np.ndarray       # (h, w, 3) uint8
    mask: np.ndarray        # (h, w) bool
    intrinsics: np.ndarray  # (3, 3)
    pose: np.ndarray        # (4, 4) camera to world; after `normalised`, camera to the unit sphere's coordinates
    corners: np.ndarray     # (M, 2) pixels: the convex hull of the full-size mask


class Ball(NamedTuple):
    centre: np.ndarray      # (3,)
    radius: float


class Hull(NamedTuple):
    """A visual hull as points on a grid."""
    points: np.ndarray              # (N, 3); N is 0 for an empty hull
    spacing: float                  # of the grid
    ball: Optional[Ball] = None     # the ball within which it was carved, None for no limit


def make_look(name, image, mask, intrinsics, pose):
    """Return the Look of a view: image (H, W, 3) uint8, mask (H, W) bool, intrinsics (3, 3), pose (4, 4)."""
    factor = -(-max(mask.shape) // SMALL)
    points = cv2.findNonZero(mask.astype(np.uint8))
    corners = np.zeros((0, 2)) if points is None else cv2.convexHull(points)[:, 0].astype(np.float64)
    return Look(name, datasets.shrink_image(image, factor), datasets.shrink_mask(mask, factor),
                datasets.shrink_intrinsics(intrinsics, factor), pose, (corners - (factor - 1) / 2) / factor)


def normalised(looks, sphere):
    """Return Looks with poses in the coordinates in which `sphere`, a Ball, is the unit sphere."""
    poses = [look.pose.copy() for look in looks]
    for pose in poses:
        pose[:3, 3] = (pose[:3, 3] - sphere.centre) / sphere.radius
    return [look._replace(pose=pose) for look, pose in zip(looks, poses)]


def touches_border(mask):
    """Tell whether a mask (h, w) bool touches the image's border."""
    return bool(mask[[0, -1]].any() or mask[:, [0, -1]].any())


def any_cut_off(looks):
    """Tell whether any mask touches its image's border, so that the object may go on beyond it."""
    return any(touches_border(look.mask) for look in looks)


# --- points and rays --------------------------------------------------------------------------------------------------

def project(points, look):
    """Return the pixels (N, 2) and the depths (N,) of world points (N, 3) in a Look."""
    local = (points - look.pose[:3, 3]) @ look.pose[:3, :3]
    pixels = local @ look.intrinsics.T
    depth = local[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return pixels[:, :2] / pixels[:, 2:], depth


def ray_distances(look, pixels, centre=(0, 0, 0)):
    """Return the distances (N,) from a point (3,) to the rays of a Look's pixels (N, 2)."""
    origin, directions = helper.pixel_rays(pixels, look.intrinsics, look.pose)
    offset = np.asarray(centre) - look.pose[:3, 3]
    along = np.maximum(directions @ offset, 0)
    return np.linalg.norm(offset - along[:, None] * directions, axis=1)


def grid(low, high, cells):
    """Return the points (N, 3) and the spacing of a cubic grid over the box from low to high, both (3,)."""
    spacing = (high - low).max() / cells
    axes = [np.arange(a + spacing / 2, b + spacing / 2, spacing) for a, b in zip(low, high)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3), spacing


# --- the hull ---------------------------------------------------------------------------------------------------------

def carve(points, reach, looks, most_misses):
    """Return for each point (N, 3) two counts (N,) int: the views that could show it, and the masks that it meets.

    A view is taken to show the whole object, so it could show every point, even outside its frame. If its mask touches
    the border, it could show only the points in its frame. A point meets a mask that is at most `reach` away, a length
    at the point's depth. A point is dropped, and its counts stop, once it misses more than most_misses masks.
    """
    seen, met = np.zeros(len(points), int), np.zeros(len(points), int)
    away = [cv2.distanceTransform((~look.mask).astype(np.uint8), cv2.DIST_L2, 5) for look in looks]
    cut_off = [touches_border(look.mask) for look in looks]
    for start in range(0, len(points), 8192):  # as many as stay in the cache
        alive = np.arange(start, min(start + 8192, len(points)))
        for look, distances, cut in zip(looks, away, cut_off):
            pixels, depth = project(points[alive], look)
            u, v = np.rint(pixels.T)
            framed = (depth > 0) & (u >= 0) & (v >= 0) & (u < look.mask.shape[1]) & (v < look.mask.shape[0])
            near = distances[v[framed].astype(int), u[framed].astype(int)]
            near = near * depth[framed] <= reach * look.intrinsics[0, 0]
            seen[alive[framed] if cut else alive] += 1
            met[alive[framed][near]] += 1
            alive = alive[seen[alive] - met[alive] <= most_misses]
            if not len(alive):
                break
    return seen, met


def find_hull(looks, cells=FINE, misses=0, ball=None):
    """Return the Hull of Looks whose masks are not empty.

    A point of the hull meets the masks of all views that could show it but `misses`, and of at least half of all views.
    ball: carve only within this Ball. Without it the hull ends where the masks do. If cut-off masks leave it unbounded,
    it is carved within shown_ball.
    """
    least = max(2, (len(looks) + 1) // 2)
    centre, half = first_region(looks) if ball is None else ball

    def carve_box(low, high, cells, slack):
        points, spacing = grid(low, high, cells)
        if ball is not None:
            points = points[np.linalg.norm(points - centre, axis=1) <= half]
        seen, met = carve(points, slack * spacing, looks, misses)
        return points[(seen - met <= misses) & (met >= least)], spacing

    attempts = 1 if ball is not None else 2 if any_cut_off(looks) else 5
    for attempt in range(attempts):     # the box grows while the hull reaches its sides
        points, spacing = carve_box(centre - half, centre + half, COARSE, 0.9)
        if ball is not None or not len(points) or np.abs(points - centre).max() < half - spacing:
            break
        if attempts == 2 and attempt == 1:
            return find_hull(looks, cells, misses, shown_ball(looks, centre))
        half *= 1.6
    if len(points):
        points, spacing = carve_box(points.min(axis=0) - spacing, points.max(axis=0) + spacing, cells, 0.5)
    return Hull(points, spacing, ball)


def first_region(looks):
    """Return a first guess of the object's place, a Ball.

    Its centre is nearest, by least squares, to the rays through the masks' centroids. Its radius is 1.2 times the
    median of the masks' half extents there.
    """
    origins, directions = np.stack([look.pose[:3, 3] for look in looks]), []
    for look in looks:
        v, u = np.nonzero(look.mask)
        directions.append(helper.pixel_rays([(u.mean(), v.mean())], look.intrinsics, look.pose)[1][0])
    across = np.eye(3) - np.einsum("ni,nj->nij", directions, directions).astype(np.float64)
    centre = np.linalg.lstsq(across.sum(axis=0), np.einsum("nij,nj->i", across, origins), rcond=None)[0]
    extents = [np.ptp(look.corners, axis=0).max() / 2 / look.intrinsics[0, 0] for look in looks]
    return Ball(centre, 1.2 * np.median(extents * np.linalg.norm(origins - centre, axis=1)) + 1e-9)


def shown_ball(looks, centre):
    """Return the Ball about `centre` (3,) that holds what half of the Looks show.

    Its radius is 1.2 times the median over the Looks of how far from the centre a masked ray passes at most.
    """
    return Ball(centre, 1.2 * np.median([ray_distances(look, look.corners, centre).max() for look in looks]) + 1e-9)


# --- the unit sphere --------------------------------------------------------------------------------------------------

def enclosing_sphere(hull, looks):
    """Return the Ball that becomes the unit sphere.

    As IDR's authors have it: about the hull's centroid, with three times the mean distance of its points. The radius
    grows if the hull reaches beyond, or the masks do by at most a half. It shrinks, as far as these allow, if cameras
    would be inside. Where masks are cut off it is at most 1.5 times shown_ball's. A hull that was carved within a ball
    gives that ball.
    """
    if len(hull.points) < 10:
        return first_region(looks)
    centre = hull.points.mean(axis=0) if hull.ball is None else hull.ball.centre
    away = np.linalg.norm(hull.points - centre, axis=1)
    radius, least = (3 * away.mean(), 1.1 * away.max()) if hull.ball is None else (hull.ball.radius, 0)
    if any_cut_off(looks):
        radius = min(radius, 1.5 * shown_ball(looks, centre).radius)
    reached = 1.01 * max(ray_distances(look, look.corners, centre).max(initial=0) for look in looks)
    if reached < 1.5 * max(radius, least):
        least = max(least, reached)
    nearest = np.percentile([np.linalg.norm(look.pose[:3, 3] - centre) for look in looks], 10)
    return Ball(centre, max(min(radius, 0.9 * nearest), least))


# --- the hull against the masks ---------------------------------------------------------------------------------------

def silhouette(hull, look):
    """Return the silhouette (h, w) bool of a Hull in a Look."""
    pixels, depth = project(hull.points, look)
    height, width = look.mask.shape
    pixels, depth = np.rint(pixels[depth > 0]), depth[depth > 0]
    u, v = pixels[(pixels >= 0).all(axis=1) & (pixels < (width, height)).all(axis=1)].astype(int).T
    shown = np.zeros((height, width), np.uint8)
    shown[v, u] = 1
    # Closed over the pixels between the projections of neighbouring grid points.
    cell = int(np.ceil(hull.spacing * look.intrinsics[0, 0] / np.median(depth))) + 1 if len(depth) else 1
    return cv2.morphologyEx(shown, cv2.MORPH_CLOSE, np.ones((min(cell, 99),) * 2, np.uint8)) > 0


def agreements(hull, looks):
    """Return for each Look the intersection over union (N,) of its mask and the Hull's silhouette.

    A difference of one pixel does not count: neither the masks nor the grid are finer.
    """
    shares, box = [], np.ones((3, 3), np.uint8)
    for look in looks:
        mask, outline = look.mask.astype(np.uint8), silhouette(hull, look).astype(np.uint8)
        apart = (mask > cv2.dilate(outline, box)) | (outline > cv2.dilate(mask, box))
        shares.append(1 - apart.sum() / max(1, (mask | outline).sum()))
    return np.array(shares)


def coarse_agreement(looks, average, ball=None):
    """Return average(agreements) of Looks with their own coarse hull, 0 for an empty hull."""
    hull = find_hull(looks, COARSE, ball=ball)
    return average(agreements(hull, looks)) if len(hull.points) else 0.0
