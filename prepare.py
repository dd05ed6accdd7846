"""Make a scene for train.py from photographs with cameras and masks, or judge a scene that is there.

    python prepare.py FOLDER --output data/mine     from a COLMAP model, transforms.json, ...; see --help
    python prepare.py data/mine --check             says what is wrong, in which view, and what to do

Both find the object's region from cameras and masks, the visual hull, and draw prepare_{scene}.png in the current
folder: the cameras around the unit sphere, and the hull's outline over the photographs. The outlines fit the
masks only where cameras, masks and their order are right.

Both judge alike. A line that begins with `wrong` says that the scene is of no use as it is: it is not written, and
either command ends with status 2. One that begins with `look` names views to look at; the scene is written, and the
status is 0. A `notice` is worth knowing.
"""
import argparse
import os
import re
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import cv2
import numpy as np
from numpy.polynomial.polynomial import polyval
from tqdm import tqdm

import datasets
import helper
from files import folders, pictures, writing
from helper import UserError
from scenes import camera_files, mask_files

SMALL = 256         # pixels: hull and picture are made from views shrunk until their longer side is no longer
COARSE, FINE = 50, 80  # cells along the sides of the two grids in which the hull is carved
AGREE, SURE = 0.92, 0.97  # of the union of mask and hull in a view, what both share where all is (surely) right
FULL = 0.99         # of a mask, what is white where it is as good as none
RENEW = "make the scene anew with prepare.py, which finds the sphere, or mend scale_mat"


class Look(NamedTuple):
    """What is kept of a view: shrunk, its camera with it."""
    name: str
    image: np.ndarray       # (h, w, 3) uint8
    mask: np.ndarray        # (h, w) bool
    intrinsics: np.ndarray  # (3, 3)
    pose: np.ndarray        # (4, 4) camera to world; after normalising, to the unit sphere's coordinates
    corners: np.ndarray     # (M, 2) pixels, of the whole mask's convex hull: its rays enclose all masked ones


class Hull(NamedTuple):
    """The visual hull of some Looks: what of space lies in their masks."""
    points: np.ndarray      # (N, 3) on a grid, none where it is empty
    spacing: float          # of the grid
    ball: Optional[tuple] = None    # centre (3,) and radius within which it was carved; None: as far as it reaches


WRONG, LOOK, NOTICE = "wrong", "look", "notice"     # of no use; views that may spoil it; worth knowing


class Finding(NamedTuple):
    text: str
    view: int = -1          # -1: of the whole scene
    level: str = WRONG
    of_masks: bool = False  # the masks may be to blame


# --- photographs and masks --------------------------------------------------------------------------------------------

def read_view(view, mask_source, threshold):
    """Read a view: the photograph as a pictures.Picture, its image (H, W, 3) uint8, mask (H, W) bool and intrinsics
    (3, 3), with distortion undone, and the paths of the pictures of which pictures.as_meant is unsure.

    The photograph is turned by its EXIF orientation where only so it fits its camera, or its mask.
    """
    photograph, shape, mask_doubt = pictures.read_picture(view.image, pictures.colours), None, False
    drawn = mask_source in ("alpha", "background")
    mask = None if drawn else pictures.read_picture(mask_source, pictures.on_object)
    if view.size:
        shape = view.size[::-1]
    elif mask:
        shape = mask.pixels.shape
    image, doubt = pictures.as_meant(photograph, shape)
    if mask_source == "background":
        mask = mask_files.background_mask(image, threshold)
    elif mask_source == "alpha":
        if not mask_files.has_alpha(view.image):
            raise UserError(f"{view.image}: has no alpha channel; put masks into a folder and name it with --masks")
        mask = pictures.as_meant(pictures.read_picture(view.image, pictures.alpha), shape)[0]
    else:
        mask, mask_doubt = pictures.as_meant(mask, image.shape)
    if mask.shape != image.shape[:2]:
        raise UserError(f"{mask_source}: {datasets.says_size(mask.shape)}, but its photograph {view.image.name} is "
                        f"{datasets.says_size(image.shape)}; a mask has its photograph's size")
    intrinsics = view.intrinsics
    if view.size and view.size != image.shape[1::-1]:
        if not pictures.alike(image.shape, view.size[::-1]):
            raise UserError(f"{view.image}: {datasets.says_size(image.shape)}, but its camera is for "
                            f"{view.size[0]}x{view.size[1]}; give the photographs that the cameras were made from")
        scale = np.divide(image.shape[1::-1], view.size)
        shift = (scale - 1) / 2  # pixel centres are at integers, before and after
        intrinsics = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]], [0, 0, 1]]) @ intrinsics
    if view.distortion:
        image = undistorted(image, intrinsics, view)
        mask = undistorted(mask.astype(np.uint8) * 255, intrinsics, view) > 127
    return photograph, image, mask, intrinsics, [view.image] * doubt + [mask_source] * mask_doubt


def undistorted(picture, intrinsics, view):
    """Return a picture as a pinhole camera of the same intrinsics would have taken it; black where it saw nothing."""
    coefficients, end = np.array(view.distortion), distortion_end(picture.shape[:2], intrinsics, view)
    try:
        if view.fisheye:
            straight = cv2.fisheye.undistortImage(picture, intrinsics, coefficients, Knew=intrinsics)
        else:
            straight = cv2.undistort(picture, intrinsics, coefficients)
    except cv2.error as error:      # of sides that are too long for it, say
        raise UserError(f"{view.image}: its distortion cannot be undone ({error.err}); undistort it before") from error
    if np.isfinite(end):
        straight[np.hypot(*image_plane(picture.shape[:2], intrinsics)) > end] = 0
    return straight


def image_plane(shape, intrinsics):
    """Return x (w,) and y (h, 1) of the pixels of an image (h, w), in focal lengths from its principal point."""
    x, y = ((np.arange(shape[1 - axis]) - intrinsics[axis, 2]) / intrinsics[axis, axis] for axis in (0, 1))
    return x.astype(np.float32), y.astype(np.float32)[:, None]


def distortion_end(shape, intrinsics, view):
    """Return how far from the principal point, in focal lengths, a lens' distortion is one, inf for everywhere: it must
    grow outwards, or it would show a place twice. Raises UserError where it folds or stretches the middle of the image
    (h, w) so much that its coefficients must be wrong."""
    with np.errstate(all="ignore"):
        r = np.linspace(0, np.hypot(*(np.abs(side).max() for side in image_plane(shape, intrinsics))), 2000)
        if view.fisheye:
            angle = np.arctan(r)
            bent = angle * polyval(angle ** 2, (1, *view.distortion))
        else:
            k1, k2, _, _, k3, k4, k5, k6 = (*view.distortion, 0, 0, 0, 0)[:8]
            bent = r * polyval(r ** 2, (1, k1, k2, k3)) / polyval(r ** 2, (1, k4, k5, k6))
        grows = np.diff(bent) > 0   # False for NaN
        stretch = bent[len(r) // 2] / r[len(r) // 2]
    end = np.inf if grows.all() else r[grows.argmin()]
    if end < 0.5 * r[-1] or not 0.1 < stretch < 10:
        raise UserError(f"{view.image}: its camera's distortion {tuple(view.distortion)} folds or tears the image; "
                        "mend these coefficients")
    return end


def look(name, image, mask, intrinsics, pose):
    """Return what is kept of a view, shrunk."""
    factor = -(-max(mask.shape) // SMALL)
    points = cv2.findNonZero(mask.astype(np.uint8))
    corners = np.zeros((0, 2)) if points is None else cv2.convexHull(points)[:, 0].astype(np.float64)
    return Look(name, datasets.shrink_image(image, factor), datasets.shrink_mask(mask, factor),
                datasets.shrink_intrinsics(intrinsics, factor), pose, (corners - (factor - 1) / 2) / factor)


# --- the visual hull and the unit sphere ------------------------------------------------------------------------------

def project(points, view):
    """Return the pixels (N, 2) at which a Look sees world points (N, 3), and their depths (N,)."""
    local = (points - view.pose[:3, 3]) @ view.pose[:3, :3]
    pixels = local @ view.intrinsics.T
    depth = local[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return pixels[:, :2] / pixels[:, 2:], depth


def carve(points, reach, views, most_misses):
    """Count for each point (N, 3) the views that could show it and those whose mask it meets; both (N,) int.

    A view shows all of the object, unless its mask touches the image's border: then it says nothing of what is
    outside its frame. reach: a point meets a mask that is no farther than the image of this length. Points with
    more than most_misses views that could show them and do not are given up.
    """
    seen, met = np.zeros(len(points), int), np.zeros(len(points), int)
    away = [cv2.distanceTransform((~view.mask).astype(np.uint8), cv2.DIST_L2, 5) for view in views]
    cut_off = [bool(touched_edges(view.mask)) for view in views]
    for start in range(0, len(points), 8192):  # as many as stay in the cache
        alive = np.arange(start, min(start + 8192, len(points)))
        for view, distances, cut in zip(views, away, cut_off):
            pixels, depth = project(points[alive], view)
            u, v = np.rint(pixels.T)
            framed = (depth > 0) & (u >= 0) & (v >= 0) & (u < view.mask.shape[1]) & (v < view.mask.shape[0])
            near = distances[v[framed].astype(int), u[framed].astype(int)]
            near = near * depth[framed] <= reach * view.intrinsics[0, 0]
            seen[alive[framed] if cut else alive] += 1
            met[alive[framed][near]] += 1
            alive = alive[seen[alive] - met[alive] <= most_misses]
            if not len(alive):
                break
    return seen, met


def touched_edges(mask):
    """Return the names of the image's edges that a mask (h, w) touches."""
    edges = (("upper", mask[0]), ("lower", mask[-1]), ("left", mask[:, 0]), ("right", mask[:, -1]))
    return [name for name, edge in edges if edge.any()]


def grid(low, high, cells):
    """Return the points (N, 3) of a cubic grid over the box from low to high (3,), and its spacing."""
    spacing = (high - low).max() / cells
    axes = [np.arange(a + spacing / 2, b + spacing / 2, spacing) for a, b in zip(low, high)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3), spacing


def visual_hull(views, cells=FINE, misses=0, ball=None):
    """Return the Hull of some Looks with masks that are not empty.

    It is what lies in every mask (in all but `misses` of them), and in those of half the views at least. ball: a
    centre (3,) and radius to stay within. Without it the hull ends where the masks do; where cut-off masks leave it
    without end, it is carved within the ball of what they show.
    """
    least = max(2, (len(views) + 1) // 2)
    centre, half = first_region(views) if ball is None else ball

    def hull_in(low, high, cells, slack):
        points, spacing = grid(low, high, cells)
        if ball is not None:
            points = points[np.linalg.norm(points - centre, axis=1) <= half]
        seen, met = carve(points, slack * spacing, views, misses)
        return points[(seen - met <= misses) & (met >= least)], spacing

    attempts = 1 if ball is not None else 2 if any_cut_off(views) else 5
    for attempt in range(attempts):     # larger, while the hull reaches the sides
        points, spacing = hull_in(centre - half, centre + half, COARSE, 0.9)
        if ball is not None or not len(points) or np.abs(points - centre).max() < half - spacing:
            break
        if attempts == 2 and attempt == 1:
            return visual_hull(views, cells, misses, shown_ball(views, centre))
        half *= 1.6
    if len(points):
        points, spacing = hull_in(points.min(axis=0) - spacing, points.max(axis=0) + spacing, cells, 0.5)
    return Hull(points, spacing, ball)


def any_cut_off(views):
    """Tell whether the mask of a Look touches the border of its image, so that what lies beyond is unknown."""
    return any(touched_edges(view.mask) for view in views)


def first_region(views):
    """Return the point (3,) nearest to the rays through the masks' centres, and how far the masks reach from there."""
    origins, directions = np.stack([view.pose[:3, 3] for view in views]), []
    for view in views:
        v, u = np.nonzero(view.mask)
        directions.append(helper.pixel_rays([(u.mean(), v.mean())], view.intrinsics, view.pose)[1][0])
    across = np.eye(3) - np.einsum("ni,nj->nij", directions, directions).astype(np.float64)
    centre = np.linalg.lstsq(across.sum(axis=0), np.einsum("nij,nj->i", across, origins), rcond=None)[0]
    reaches = [np.ptp(view.corners, axis=0).max() / 2 / view.intrinsics[0, 0] for view in views]
    return centre, 1.2 * np.median(reaches * np.linalg.norm(origins - centre, axis=1)) + 1e-9


def shown_ball(views, centre):
    """Return a centre (3,) and the radius within which half the Looks show all that their masks hold, and some more."""
    return centre, 1.2 * np.median([ray_distances(view, view.corners, centre).max() for view in views]) + 1e-9


def enclosing_sphere(hull, views):
    """Return the centre (3,) and radius of the sphere that becomes the unit sphere.

    As IDR's authors do: the hull's centroid, and 3 times its points' mean distance from there. Larger where the hull
    or, by up to a half, the masks reach beyond; smaller, if these allow it, where cameras would be inside. Where
    masks are cut off it is at most half as much again as the ball that they show, and where they leave the hull
    without end it is that ball.
    """
    if len(hull.points) < 10:
        return first_region(views)
    centre = hull.points.mean(axis=0) if hull.ball is None else hull.ball[0]
    away = np.linalg.norm(hull.points - centre, axis=1)
    radius, least = (3 * away.mean(), 1.1 * away.max()) if hull.ball is None else (hull.ball[1], 0)
    if any_cut_off(views):
        radius = min(radius, 1.5 * shown_ball(views, centre)[1])
    reached = 1.01 * max(ray_distances(view, view.corners, centre).max(initial=0) for view in views)
    if reached < 1.5 * max(radius, least):
        least = max(least, reached)
    nearest = np.percentile([np.linalg.norm(view.pose[:3, 3] - centre) for view in views], 10)
    return centre, max(min(radius, 0.9 * nearest), least)


def ray_distances(view, pixels, centre=(0, 0, 0)):
    """Return how far the rays (N,) of a Look's pixels (N, 2) pass from a point."""
    origin, directions = helper.pixel_rays(pixels, view.intrinsics, view.pose)
    offset = np.asarray(centre) - view.pose[:3, 3]
    along = np.maximum(directions @ offset, 0)
    return np.linalg.norm(offset - along[:, None] * directions, axis=1)


def normalised(views, centre, radius):
    """Return Looks with their poses in the coordinates in which that sphere is the unit sphere."""
    poses = [view.pose.copy() for view in views]
    for pose in poses:
        pose[:3, 3] = (pose[:3, 3] - centre) / radius
    return [view._replace(pose=pose) for view, pose in zip(views, poses)]


def silhouette(hull, view):
    """Return the image (h, w) bool of a Hull in a Look."""
    pixels, depth = project(hull.points, view)
    height, width = view.mask.shape
    pixels, depth = np.rint(pixels[depth > 0]), depth[depth > 0]
    u, v = pixels[(pixels >= 0).all(axis=1) & (pixels < (width, height)).all(axis=1)].astype(int).T
    shown = np.zeros((height, width), np.uint8)
    shown[v, u] = 1
    cell = int(np.ceil(hull.spacing * view.intrinsics[0, 0] / np.median(depth))) + 1 if len(depth) else 1
    return cv2.morphologyEx(shown, cv2.MORPH_CLOSE, np.ones((min(cell, 99),) * 2, np.uint8)) > 0


def agreements(hull, views):
    """Return for each Look the share (N,) of the union of its mask and the Hull's silhouette that both have.

    A pixel next to both counts as theirs: masks and grid are no finer.
    """
    shares, box = [], np.ones((3, 3), np.uint8)
    for view in views:
        mask, outline = view.mask.astype(np.uint8), silhouette(hull, view).astype(np.uint8)
        apart = (mask > cv2.dilate(outline, box)) | (outline > cv2.dilate(mask, box))
        shares.append(1 - apart.sum() / max(1, (mask | outline).sum()))
    return np.array(shares)


def agreement(views, average, ball=None):
    """Return the average (a function) of the agreements of some Looks with their hull, 0 where it is empty, roughly."""
    hull = visual_hull(views, COARSE, ball=ball)
    return average(agreements(hull, views)) if len(hull.points) else 0.0


# --- judging ----------------------------------------------------------------------------------------------------------

def few(views):
    """Return how many of some Looks may be amiss without all being in doubt."""
    return max(1, len(views) // 8)


def judge_masks(views):
    """Return the Findings on each view's mask by itself."""
    findings = []
    for index, view in enumerate(views):
        if not view.mask.any():
            findings.append(Finding("the mask is empty; the object must be white, more than half of 255, else leave "
                                    "the view out", index, of_masks=True))
        elif view.mask.mean() > FULL:
            findings.append(Finding("the mask is white everywhere; the object must be white and the background black",
                                    index, of_masks=True) if mostly_white(views) else
                            Finding("the mask is white everywhere, which is right only where the object fills the "
                                    "image", index, NOTICE, of_masks=True))
        elif touched_edges(view.mask):
            findings.append(Finding("the mask touches the image's border: the object is cut off there, and what lies "
                                    "beyond is unknown; better frame it whole", index, NOTICE, of_masks=True))
    return findings


def mostly_white(views):
    """Tell whether more than half of some Looks have masks that are white everywhere, which is to have none."""
    return np.mean([view.mask.mean() > FULL for view in views]) > 0.5


def judge_agreement(views, sphere=None):
    """Return the Hull of Looks with masks that are not empty, and the Findings on whether it fits them.

    sphere: the centre (3,) and radius of the unit sphere, if there is one. Masks that are cut off leave the hull
    without an end that they show, so it is carved within that sphere, which is wrong if the hull only fits without it.
    """
    if sphere is None or not any_cut_off(views):
        return judge_hull(views)
    if agreement(views, np.median, sphere) >= AGREE:
        hull, findings = judge_hull(views, sphere)
        if not counted(findings, WRONG):
            return hull, findings
    hull, findings = judge_hull(views)
    if counted(findings, WRONG):
        return hull, findings
    odd = {finding.view for finding in findings}
    kept = [view for index, view in enumerate(views) if index not in odd]
    inside = visual_hull(kept, ball=sphere)
    if len(inside.points) and np.median(agreements(inside, kept)) >= AGREE:
        return inside, findings
    return hull, [*findings, Finding("cameras and masks agree, but not on an object inside the unit sphere; " + RENEW)]


def judge_hull(views, ball=None):
    """Return the Hull of some Looks, carved within `ball` as visual_hull has it, and the Findings on its agreement.

    A few views that contradict the others are found and left out of the hull.
    """
    hull = visual_hull(views, ball=ball)
    shares = agreements(hull, views) if len(hull.points) else np.zeros(1)
    agreed, doubtful = np.median(shares), np.median(shares) < SURE or shares.min() < AGREE
    odd = contradicting(views, ball) if doubtful else []
    if odd:
        kept = [view for index, view in enumerate(views) if index not in odd]
        hull = visual_hull(kept, ball=ball)
        agreed = np.median(agreements(hull, kept))
    reason = confirmed_reason(views, agreed) if doubtful else ""
    if agreed < AGREE or reason:
        text = (f"hull and mask share only {agreed:.0%} of their union in the median view, so cameras and masks "
                "contradict one another; " if agreed > 0 else "no point of space lies in all masks; ")
        return hull, [Finding(text + (reason or "look in the picture for a wrong order of images, masks and cameras, "
                                      "for other axes, and for intrinsics of another image size"), of_masks=True)]
    findings = []
    for index, share in enumerate(agreements(hull, views)):
        if share < (AGREE if index in odd else AGREE - 0.1):
            inverted = agreements(hull, [views[index]._replace(mask=~views[index].mask)])[0] > AGREE
            findings.append(Finding(
                f"its mask and the hull of the other views share only {share:.0%} of their union: " +
                ("with black and white of its mask exchanged they agree" if inverted else "its mask, its camera or "
                 "its place in the order is wrong; mend it or leave the view out"), index, LOOK, of_masks=True))
    return hull, findings


def contradicting(views, ball=None):
    """Return the indices of the few Looks (none, where few are not to blame) without which the others agree."""
    odd = []
    if len(views) > 12:  # the hull that few may contradict shows whether only few do, and those that are far off
        hull = visual_hull(views, COARSE, few(views), ball)
        shares = agreements(hull, views) if len(hull.points) else np.zeros(1)
        if np.median(shares) < 0.8:
            return []
        odd = [index for index in np.argsort(shares)[:few(views)] if shares[index] < 0.5]
    kept = [index for index in range(len(views)) if index not in odd]
    agreed = agreement([views[index] for index in kept], np.mean, ball)
    while len(odd) < few(views) and len(kept) > 3:
        looks = [views[index] for index in kept]
        suspects = kept
        if len(kept) > 12:  # those that agree least with that hull
            shares = agreements(visual_hull(looks, COARSE, few(views), ball), looks)
            suspects = [kept[index] for index in np.argsort(shares)[:4]]
        without = [agreement([views[index] for index in kept if index != suspect], np.mean, ball)
                   for suspect in suspects]
        if max(without) < agreed + 0.01:
            break
        odd.append(suspects[int(np.argmax(without))])
        kept, agreed = [index for index in kept if index != odd[-1]], max(without)
    return sorted(odd) if agreed >= AGREE else []


def confirmed_reason(views, agreed):
    """Return the usual mistake whose undoing halves how much the Looks disagree, "" for none."""
    for reason, changed in trials(views):
        changed = changed[::-(-len(changed) // 24)]
        wanted = max(SURE - 0.02, (1 + agreed) / 2)
        if all(view.mask.any() for view in changed) and agreement(changed, np.median) > wanted:
            return reason
    return ""


def trials(views):
    """Yield the usual mistakes undone: a reason and the Looks that would then agree."""
    for reason, turn in (("with y and z of the cameras turned round they agree: the poses have OpenGL's axes (y up, z "
                          "backwards), wanted are y down, z into the scene", (1, -1, -1)),
                         ("with x and y of the cameras turned round they agree: the images or the cameras are upside "
                          "down", (-1, -1, 1)),
                         ("with x and z of the cameras turned round they agree: z must point into the scene",
                          (-1, 1, -1))):
        yield reason, [view._replace(pose=view.pose @ np.diag(turn + (1.0,))) for view in views]
    yield ("with the poses inverted they agree: world to camera was taken for camera to world, or the reverse",
           [view._replace(pose=np.linalg.inv(view.pose)) for view in views])
    yield ("with black and white of the masks exchanged they agree; the object must be white and the background black",
           [view._replace(mask=~view.mask) for view in views])
    for factor in (0.5, 2, 0.25, 4):
        k = np.diag((factor, factor, 1.0))
        yield (f"with the intrinsics times {factor} they agree: they are for images of another size",
               [view._replace(intrinsics=k @ view.intrinsics) for view in views])
    count = len(views)
    order = sorted(range(count), key=str)  # 0, 1, 10, 11, 2 ...
    for reason, places in (("with the cameras one place later they agree", np.arange(-1, count - 1)),
                           ("with the cameras one place earlier they agree", np.arange(1, count + 1) % count),
                           ("with the cameras sorted as 0, 1, 10, 11, 2 ... they agree: number the images with leading "
                            "zeros", order),
                           ("with the images sorted as 0, 1, 10, 11, 2 ... they agree: number the images with leading "
                            "zeros", np.argsort(order))):
        yield reason, [view._replace(pose=views[place].pose, intrinsics=views[place].intrinsics)
                       for view, place in zip(views, places)]


def judge_scale(matrices):
    """Return the Findings on a scene's scale_mat_i, each (4, 4)."""
    linear, findings = matrices[0][:3, :3], []
    if any(not np.allclose(m / m[3, 3], matrices[0] / matrices[0][3, 3], rtol=1e-4, atol=1e-9) for m in matrices):
        findings.append(Finding("the scale_mat of the views differ; one sphere holds the object, so give all the same"))
    if not np.allclose(linear @ linear.T, np.eye(3) * (linear[0] @ linear[0]), rtol=1e-3,
                       atol=1e-3 * (linear[0] @ linear[0])):
        findings.append(Finding("scale_mat_0 is more than a scale, rotation and shift, so it does not keep the sphere "
                                "round; write diag(r, r, r, 1) with the centre as its last column"))
    return findings


def judge_sphere(hull, views, odd):
    """Return the Findings on normalised Looks: whether the unit sphere holds the object and not the cameras.

    odd: the views whose masks are not trusted, -1 where neither the hull nor any mask is.
    """
    trusted = -1 not in odd
    findings, inside, missing = [], [], {}
    for index, view in enumerate(views):
        centre, axis = view.pose[:3, 3], view.pose[:3, 2]
        missed = ray_distances(view, np.argwhere(view.mask)[:, ::-1]) > 1 if view.mask.any() else np.zeros(1, bool)
        if axis @ centre > 1:
            findings.append(Finding("the unit sphere is behind the camera; z must point into the scene", index))
        elif np.linalg.norm(centre) < 1:
            inside.append(index)
        elif trusted and index not in odd and missed.mean() > 0.01:
            missing[index] = missed.mean()
        elif trusted and index not in odd and len(view.corners) and ray_distances(view, view.corners).max() > 1:
            findings.append(Finding("some masked pixels' rays miss the unit sphere", index, NOTICE))
    text = "the camera is inside the unit sphere; tracing starts outside it: " + RENEW
    findings += [Finding(text, index, LOOK if len(inside) <= few(views) else WRONG) for index in inside]
    if missing:
        most = max(missing.values())
        text = (f"{'up to ' * (len(missing) > 1)}{most:.0%} of the masked pixels' rays miss the unit sphere; clean the "
                "mask of specks, or " + RENEW)
        level = LOOK if len(missing) <= few(views) else WRONG
        findings += [Finding(text, index, level, of_masks=True) for index in missing]
    if trusted and len(hull.points):
        reach = np.linalg.norm(hull.points, axis=1).max()
        if reach > 1.05 and not any_cut_off(views):
            findings.append(Finding(f"the visual hull reaches {reach:.2f} from the centre of the unit sphere; "
                                    + RENEW))
        elif reach < 0.25:
            findings.append(Finding(f"the visual hull reaches only {reach:.2f} from the centre of the unit sphere, so "
                                    "training starts far from it; " + RENEW))
    return findings


def say(findings, views):
    """Print the findings, one line each; what holds of several views is said once."""
    for text, level in dict.fromkeys((finding.text, finding.level) for finding in findings):
        which = [finding.view for finding in findings if finding.text == text]
        names = ", ".join(str(i) for i in which[:12]) + (f" and {len(which) - 12} more" if len(which) > 12 else "")
        where = "" if which[0] < 0 else (f"view {names} ({views[which[0]].name}): " if len(which) == 1 else
                                         f"views {names}: ")
        print(f"{level}: {where}{text}", file=sys.stderr)


def counted(findings, level):
    """Return how many lines of that level the findings are."""
    return len({finding.text for finding in findings if finding.level == level})


# --- the picture ------------------------------------------------------------------------------------------------------

ORANGE, WHITE, BLUE, RED = (255, 140, 20), (255, 255, 255), (70, 150, 255), (230, 40, 40)


def draw(path, title, views, hull, findings, most=35):
    """Draw normalised Looks: their cameras around the unit sphere, the Hull, and outlines over photographs."""
    from matplotlib.figure import Figure
    wrong = {finding.view for finding in findings if finding.level != NOTICE}
    shown = sorted(sorted(range(len(views)), key=lambda i: (i not in wrong, (i * 7919) % len(views)))[:most])
    sheet = contact_sheet(views, shown, hull, wrong)
    figure = Figure(figsize=(15, 15 * 0.64 * sheet.shape[0] / sheet.shape[1] + 0.9), dpi=80)
    figure.suptitle(printable(title), fontsize=13, x=0.01, ha="left", parse_math=False)
    height = 1 - 0.6 / figure.get_figheight()
    for place, (name, elevation, azimuth) in enumerate((("from the side", 18, -60), ("from above", 89.9, -90))):
        axes = figure.add_axes((0.0, height * (0.5 - 0.5 * place), 0.35, 0.5 * height), projection="3d")
        draw_cameras(axes, views, hull.points, wrong)
        axes.view_init(elevation, azimuth)
        figure.text(0.01, height * (1 - 0.5 * place) - 0.01, name, fontsize=10, va="top")
    axes = figure.add_axes((0.35, 0.005, 0.645, height - 0.01))
    axes.imshow(sheet, interpolation="lanczos")
    axes.set_axis_off()
    with writing.replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font lacks; it draws boxes
        figure.savefig(temporary)


def contact_sheet(views, shown, hull, wrong):
    """Return the shown Looks in one image, with the outlines of mask, hull and unit sphere."""
    tiles, columns = [], int(np.ceil(np.sqrt(1.3 * len(shown))))
    width = 1200 // columns
    ratio = max(views[i].mask.shape[0] / views[i].mask.shape[1] for i in shown)
    for index in shown:
        view = views[index]
        scale = width / view.mask.shape[1]
        tile = np.full((int(np.ceil(width * ratio)) + 20, width, 3), 255, np.uint8)
        picture = cv2.resize(view.image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        outlines = [(view.mask, WHITE, 2)]
        if len(hull.points):
            outlines.append((silhouette(hull, view), ORANGE, 2))
        outlines.append((sphere_pixels(view), BLUE, 1))
        for mask, colour, thickness in outlines:
            large = cv2.resize(mask.astype(np.float32), picture.shape[1::-1], interpolation=cv2.INTER_CUBIC) > 0.5
            lines = cv2.findContours(large.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
            cv2.drawContours(picture, lines, -1, colour, thickness, cv2.LINE_AA)
        ink = RED if index in wrong else (0, 0, 0)
        if index in wrong:
            cv2.rectangle(picture, (0, 0), (picture.shape[1] - 1, picture.shape[0] - 1), RED, 5)
        tile[20:20 + picture.shape[0], :picture.shape[1]] = picture[:tile.shape[0] - 20]
        name = printable(f"{index}: {view.name}")[:width // 8]
        cv2.putText(tile, name, (2, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, ink, 1, cv2.LINE_AA)
        tiles.append(cv2.copyMakeBorder(tile, 0, 2, 2, 2, cv2.BORDER_CONSTANT, value=WHITE))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], axis=1) for i in range(0, len(tiles), columns)])


def printable(text):
    """Return a text with ? for what no font can draw, such as the bytes of a name in another encoding."""
    return "".join(c if c.isprintable() else "?" for c in text)


def sphere_pixels(view):
    """Return the pixels (h, w) bool of a normalised Look whose rays meet the unit sphere."""
    height, width = view.mask.shape
    return (ray_distances(view, helper.pixel_grid(height, width)) <= 1).reshape(height, width)


def draw_cameras(axes, views, points, wrong):
    """Draw cameras, each with its image's frame, a tip on its upper side and its axis, around the unit sphere."""
    from matplotlib import colormaps
    from mpl_toolkits.mplot3d.art3d import Line3DCollection
    upright = upright_rotation(views)
    poses = np.stack([view.pose[:3] for view in views])
    poses[:, :, 3] /= np.maximum(1, np.linalg.norm(poses[:, :, 3], axis=1) / 6)[:, None]  # far ones, for the drawing
    poses, points = upright @ poses, points @ upright.T
    angle, distance = np.linspace(0, 2 * np.pi, 60), np.median(np.linalg.norm(poses[:, :, 3], axis=1))
    for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1)):
        circle = np.stack([np.cos(angle), np.sin(angle), 0 * angle])
        axes.plot(*circle[list(order)], color=np.divide(BLUE, 255), linewidth=0.9)
    if len(points):
        some = points[::max(1, len(points) // 2500)]
        axes.scatter(*some.T, s=2, color=np.divide(ORANGE, 255), alpha=0.3, linewidths=0)
    for index, (view, pose) in enumerate(zip(views, poses)):
        height, width = view.mask.shape
        frame = np.array([(0, 0), (width, 0), (width, height), (0, height), (width / 2, -0.4 * height)])
        local = np.column_stack([frame, np.ones(5)]) @ np.linalg.inv(view.intrinsics).T
        corners = 0.08 * distance / np.abs(local[:4, :2]).max() * local @ pose[:, :3].T + pose[:, 3]
        lines = [(pose[:, 3], corner) for corner in corners[:4]]
        lines += [corners[[a, b]] for a, b in ((0, 1), (1, 2), (2, 3), (3, 0), (0, 4), (4, 1))]
        lines_ahead = [(pose[:, 3], pose[:, 3] + pose[:, 2] * np.linalg.norm(pose[:, 3]))]
        bad = index in wrong
        colour = np.divide(RED, 255) if bad else colormaps["viridis"](0.9 * index / max(1, len(views) - 1))[:3]
        axes.add_collection3d(Line3DCollection(lines, colors=[colour], linewidths=1.6 if bad else 0.9))
        axes.add_collection3d(Line3DCollection(lines_ahead, colors=[colour], linewidths=0.6, linestyles="dotted"))
        if bad or index % -(-len(views) // 12) == 0:
            axes.text(*(1.1 * pose[:, 3]), str(index), fontsize=8, color=colour)
    box = np.concatenate([1.1 * poses[:, :, 3], np.eye(3), -np.eye(3)])
    low, high = box.min(axis=0), box.max(axis=0)
    reach = (high - low).max() / 2
    axes.set(**{f"{name}lim": (middle - reach, middle + reach) for name, middle in zip("xyz", (low + high) / 2)})
    axes.set_box_aspect((1, 1, 1), zoom=1.4)
    axes.set_axis_off()


def upright_rotation(views):
    """Return the rotation (3, 3) after which up is z and they look, on the average, along y."""
    poses = np.stack([view.pose for view in views])
    up = helper.upright(poses)
    side = helper.rightwards(up, poses[:, :3, 3].mean(axis=0))
    return np.stack([side, np.cross(up, side), up])


# --- the two commands -------------------------------------------------------------------------------------------------

def picture_path(scene):
    return Path(f"prepare_{Path(scene).absolute().name}.png")


def understand(views, scene, findings=(), sphere=None, mask_hint=str):
    """Find hull and sphere of some Looks, judge them, say the findings and draw the picture.

    scene: its folder. findings: earlier ones. sphere: the centre (3,) and radius of the unit sphere, None to find it.
    mask_hint() is added to what is said of masks. Returns centre, radius and all findings. Raises UserError for fewer
    than two masks that show something.
    """
    findings = [*findings, *judge_masks(views)]
    least = FULL if mostly_white(views) else 1
    usable = [index for index, view in enumerate(views) if view.mask.any() and view.mask.mean() <= least]
    looks = [views[index] for index in usable]
    if len(looks) < 2:
        say(hinted(findings, mask_hint), views)
        raise UserError(f"{scene}: a scene needs two views with masks of the object at least, better dozens"
                        + mask_hint())
    hull, more = judge_agreement(looks, sphere)
    more = [finding if finding.view < 0 else finding._replace(view=usable[finding.view]) for finding in more]
    findings += more
    odd = {finding.view for finding in more}
    if sphere is None:
        sphere = enclosing_sphere(hull, [views[index] for index in usable if index not in odd] or looks)
        if hull.ball is not None and -1 not in odd:
            findings.append(Finding("the masks are cut off at so many borders that the object's extent is unknown; the "
                                    "unit sphere is a guess, around what they show", level=NOTICE))
    centre, radius = sphere
    units, hull = normalised(views, centre, radius), Hull((hull.points - centre) / radius, hull.spacing / radius)
    findings += judge_sphere(hull, units, odd)
    findings = hinted(findings, mask_hint)
    say(findings, views)
    counts = [f"{counted(findings, WRONG) or 'nothing'} wrong"]
    counts += [f"{counted(findings, LOOK)} to look at"] * bool(counted(findings, LOOK))
    picture = picture_path(scene)
    draw(picture, f"{picture.stem[8:]}: {len(views)} views, {', '.join(counts)}.   White: mask.   Orange: visual hull; "
         "it hides the white where they agree.   Blue: unit sphere.", units, hull, findings)
    return centre, radius, findings


KEPT = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg"}   # the formats that a scene holds, as Pillow names them


def hinted(findings, mask_hint):
    """Return the findings with mask_hint() after what is said of masks."""
    hint = mask_hint() if any(finding.of_masks for finding in findings) else ""
    return [finding._replace(text=finding.text + hint) if finding.of_masks else finding for finding in findings]


def background_hint(views, threshold):
    """Return what is to be known of the masks of some camera_files views that --masks background made."""
    if threshold is None:
        found = [mask_files.background_threshold(pictures.read_image(view.image)) for view in views]
        threshold = f"found at {min(found):.0f} to {max(found):.0f} grey levels"
    return f" (of --masks background, --threshold {threshold}; another may be better)"


def write_scene(folder, views, sources, threshold, downscale):
    """Write image/ and mask/ of the views to an empty folder; returns their Looks and their intrinsics (N, 3, 3).

    A photograph is copied as it is, unless it is changed, of another format, or carries an orientation by which other
    programs would turn it: then its pixels become a PNG.
    """
    (folder / "image").mkdir()
    (folder / "mask").mkdir()
    looks, matrices, shape, doubtful, digits = [], [], None, [], max(3, len(str(len(views) - 1)))
    for index, (view, source) in enumerate(zip(tqdm(views, unit="view", dynamic_ncols=True), sources)):
        photograph, image, mask, intrinsics, doubts = read_view(view, source, threshold)
        doubtful += doubts
        name = f"{index:0{digits}d}_" + re.sub(r"[^A-Za-z0-9.-]", "_", view.image.stem)[:100]  # sorts as the views do
        datasets.check_downscale(image.shape, downscale, view.image)
        shape = shape or image.shape[:2]
        if image.shape[:2] != shape:
            raise UserError(f"{view.image}: {datasets.says_size(image.shape)}, but {views[0].image.name} is "
                            f"{datasets.says_size(shape)}; all photographs must have one size")
        image, mask = datasets.shrink_image(image, downscale), datasets.shrink_mask(mask, downscale)
        if downscale == 1 and not view.distortion and photograph.orientation == 1 and photograph.kind in KEPT:
            shutil.copyfile(str(view.image), str(folder / "image" / (name + KEPT[photograph.kind])))
        else:
            writing.write_image(folder / "image" / (name + ".png"), image)
        writing.write_image(folder / "mask" / (name + ".png"), mask.astype(np.uint8) * 255)
        matrices.append(datasets.shrink_intrinsics(intrinsics, downscale))
        looks.append(look(view.image.name, image, mask, matrices[-1], view.pose))
    pictures.say_doubtful(doubtful)
    return looks, matrices


def prepare(args):
    """Make the scene args.output; raise UserError, and write none, where something is wrong."""
    views, what = camera_files.read_views(args.input, args.images)
    root = Path(args.input) if Path(args.input).is_dir() else Path(args.input).parent
    missing = [view.image for view in views if not os.path.exists(str(view.image))]
    if missing:
        mend = "say with --images where they are" if 2 * len(missing) > len(views) else \
            "restore what is missing, or remove its camera"
        raise UserError(f"{missing[0]}: no such photograph ({len(missing)} of {len(views)} "
                        f"{'is' if len(missing) == 1 else 'are'} missing); {mend}")
    sources = mask_files.mask_sources(views, args.masks, root)
    print(f"read {what}; masks: {sources[0] if isinstance(sources[0], str) else sources[0].parent}")
    with folders.new_folder(args.output) as folder:
        looks, intrinsics = write_scene(folder, views, sources, args.threshold, args.downscale)
        picture = picture_path(args.output)
        hint = partial(background_hint, views, args.threshold) if sources[0] == "background" else str
        centre, radius, findings = understand(looks, args.output, mask_hint=hint)
        wrong = [finding for finding in findings if finding.level == WRONG]
        if wrong:
            where = f"view {wrong[0].view} ({looks[wrong[0].view].name}): " if wrong[0].view >= 0 else ""
            raise UserError(f"{args.output}: not written; {where}{wrong[0].text}; see {picture}")
        cameras, scale_mat = {}, np.diag((radius, radius, radius, 1.0))
        scale_mat[:3, 3] = centre
        for index, view in enumerate(views):
            world_mat = np.linalg.inv(view.pose)
            world_mat[:3] = intrinsics[index] @ world_mat[:3]
            cameras[f"world_mat_{index}"], cameras[f"scale_mat_{index}"] = world_mat, scale_mat
        np.savez(str(folder / "cameras.npz"), **cameras)
    print(f"{args.output}: {len(views)} views; the unit sphere lies at {np.array2string(centre, precision=4)}, radius "
          f"{radius:.4g}; look at {to_look_at(findings)}{picture}")


def check(scene):
    """Judge the scene in a folder, as `prepare` does; raise UserError where something is wrong."""
    path = Path(scene)
    image_files, mask_files = datasets.scene_files(path)
    matrices = datasets.read_matrices(path / "cameras.npz", len(image_files))
    looks, shape, doubtful = [], None, []
    progress = tqdm(image_files, unit="view", dynamic_ncols=True)
    for index, (image_file, mask_file) in enumerate(zip(progress, mask_files)):
        try:
            with np.errstate(all="ignore"):     # what overflows is refused as not finite
                projection = matrices[f"world_mat_{index}"] @ matrices[f"scale_mat_{index}"]
                k, pose = helper.decompose_projection(projection)
        except (ValueError, np.linalg.LinAlgError) as error:
            raise UserError(f"{path / 'cameras.npz'}: the camera of view {index} cannot be used: {error}") from error
        image, mask, doubts = pictures.read_pair(image_file, mask_file)
        doubtful += doubts
        datasets.check_mask_size(mask_file, mask.shape, image_file, image.shape[:2])
        shape = shape or image.shape[:2]
        datasets.check_one_size(image_file, image.shape[:2], image_files[0], shape)
        looks.append(look(image_file.name, image, mask, k, pose))
    pictures.say_doubtful(doubtful)
    findings = judge_scale([matrices[f"scale_mat_{index}"] for index in range(len(looks))])
    findings = understand(looks, scene, findings, sphere=(np.zeros(3), 1.0))[2]
    count = counted(findings, WRONG)
    if count:
        raise UserError(f"{scene}: {count} thing{'s' * (count > 1)} to mend, in the lines above; see "
                        f"{picture_path(scene)}")
    print(f"{scene}: {len(looks)} views, nothing wrong; look at {to_look_at(findings)}{picture_path(scene)}")


def to_look_at(findings):
    """Return the words before the picture's name for those of the findings that are to be looked at."""
    count = counted(findings, LOOK)
    return f"the {'line that begins' if count == 1 else 'lines that begin'} with `look`, and at " if count else ""


def main():
    parser = argparse.ArgumentParser(description="Make a scene from photographs with cameras and masks, or judge one.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"Cameras are {camera_files.FORMATS}.")
    parser.add_argument("input", help="a folder of photographs and cameras, or a camera file; with --check a scene")
    parser.add_argument("--output", help="the scene's folder, new or empty")
    parser.add_argument("--check", action="store_true", help="judge the scene `input`; writes nothing but the picture")
    parser.add_argument("--images", metavar="FOLDER", help="the photographs, if not where the format has them")
    parser.add_argument("--masks", metavar="FOLDER|alpha|background", help="where the masks come from; by default the "
                        "folder masks/ or mask/, else the alpha channel; background: what differs from the border")
    parser.add_argument("--threshold", type=float, help="of --masks background, in grey levels; by default found")
    parser.add_argument("--downscale", type=int, default=1, help="shrink the images by this whole factor")
    args = parser.parse_args()
    if args.check:
        return check(args.input)
    if args.output is None:
        raise UserError("--output is missing: the folder for the scene, such as data/mine (or --check a scene)")
    if args.downscale < 1:
        raise UserError(f"--downscale must be 1 or more, not {args.downscale}")
    if args.threshold is not None and not 0 < args.threshold < 255:
        raise UserError(f"--threshold must be between 0 and 255, not {args.threshold}")
    prepare(args)


if __name__ == "__main__":
    helper.run(main)
