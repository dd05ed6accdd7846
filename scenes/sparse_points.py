"""Photographs with cameras -> sparse points of what they show, and the table among them.

SIFT's features are matched between neighbouring views; the cameras are known, so a match must lie on its epipolar line,
and gives a point by triangulation. The points serve auto_masks.py only: they say where the object is, not its surface.
"""
from typing import NamedTuple, Optional

import cv2
import numpy as np
from scipy.spatial import cKDTree
from tqdm import tqdm

import datasets
import helper

SIDE = 800              # pixels of the longer side of the images in which features are found
FEATURES = 1500         # of a view at most
NEIGHBOURS = 4          # views with which a view is matched
WIDEST = 50.0           # degrees between the axes of two views that are matched
RATIO = 0.8             # of the distances to the best and the second match (Lowe, 2004)
PIXELS = 1.5            # from the epipolar line
LEAST_ANGLE = 1.5       # degrees between two rays of a point


class Plane(NamedTuple):
    """The points x with normal . x = offset; the normal points to the cameras' side."""
    normal: np.ndarray      # (3,), a unit vector
    offset: float

    def heights(self, points):
        """Return the heights (N,) of points (N, 3) above the plane."""
        return points @ self.normal - self.offset


class Features(NamedTuple):
    """What SIFT finds in a view."""
    places: np.ndarray          # (N, 2) float64, pixels
    descriptors: np.ndarray     # (N, 128) uint8
    intrinsics: np.ndarray      # (3, 3), for an image of the size in which they were found


def find_features(image, intrinsics):
    """Return the Features of an image (H, W, 3) uint8, RGB, which is shrunk to SIDE on the longer side at most."""
    factor = -(-max(image.shape) // SIDE)
    grey = cv2.cvtColor(datasets.shrink_image(image, factor), cv2.COLOR_RGB2GRAY)
    sift, middle = cv2.SIFT_create(contrastThreshold=0.02), (np.array(grey.shape[::-1]) - 1) / 2

    def worth(key):     # a busy background has the strongest features, but the object is what the cameras look at
        return key.response * (0.1 + np.exp(-4 * (np.abs((key.pt - middle) / middle) ** 2).max()))

    keys, descriptors = sift.compute(grey, sorted(sift.detect(grey), key=worth, reverse=True)[:FEATURES])
    places = np.array([key.pt for key in keys], np.float64).reshape(-1, 2)
    descriptors = np.zeros((0, 128), np.uint8) if descriptors is None else descriptors.astype(np.uint8)  # whole numbers
    return Features(places, descriptors, datasets.shrink_intrinsics(intrinsics, factor))


def triangulated(features, poses):
    """Return points (N, 3) float64 of what several views show, in world units; N may be 0.

    features: the Features of the views; poses (V, 4, 4), camera to world.
    """
    found = [np.zeros((0, 3))]
    for one, other in tqdm(neighbour_pairs(poses), desc="matching", unit="pair", dynamic_ncols=True):
        matches = mutual_matches(features[one].descriptors, features[other].descriptors)
        a, b = features[one].places[matches[:, 0]], features[other].places[matches[:, 1]]
        if len(matches):
            found.append(points_of_pair(a, b, [features[one].intrinsics, features[other].intrinsics],
                                        poses[[one, other]]))
    return without_strays(np.concatenate(found))


def neighbour_pairs(poses):
    """Return the pairs (i, j) of views to match: each with those whose axes differ least from its own."""
    axes, places = poses[:, :3, 2], poses[:, :3, 3]
    angles = np.degrees(np.arccos(np.clip(axes @ axes.T, -1, 1)))
    apart = np.linalg.norm(places[:, None] - places, axis=2)
    cost = np.where((angles < WIDEST) & (apart > 1e-9), angles + 1e-3 * apart / max(apart.max(), 1e-12), np.inf)
    nearest = np.argsort(cost, axis=1)[:, :NEIGHBOURS]
    return sorted({(min(i, j), max(i, j)) for i, row in enumerate(nearest) for j in row if np.isfinite(cost[i, j])})


def mutual_matches(one, other):
    """Return the matches (M, 2) int of two sets of descriptors, each the other's best and better than its second."""
    if min(len(one), len(other)) < 2:
        return np.zeros((0, 2), int)
    one, other = one.astype(np.float32), other.astype(np.float32)
    squares = (one ** 2).sum(axis=1)[:, None] + (other ** 2).sum(axis=1) - 2 * one @ other.T
    rows, best = np.arange(len(one)), squares.argmin(axis=1)
    two = np.partition(squares, 1, axis=1)[:, :2]
    good = (two[:, 0] < RATIO ** 2 * two[:, 1]) & (squares.argmin(axis=0)[best] == rows)
    return np.stack([rows[good], best[good]], axis=1)


def points_of_pair(a, b, intrinsics, poses):
    """Return the points (M, 3) of matches a and b (N, 2), pixels, in two views; matches that fit no point are dropped.
    """
    projections = [k @ np.linalg.inv(pose)[:3] for k, pose in zip(intrinsics, poses)]
    homogeneous = cv2.triangulatePoints(projections[0], projections[1], a.T, b.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        points = (homogeneous[:3] / homogeneous[3]).T
        good = np.isfinite(points).all(axis=1)
        for projection, pixels in zip(projections, (a, b)):
            seen = points @ projection[:, :3].T + projection[:, 3]
            good &= (seen[:, 2] > 0) & (np.linalg.norm(seen[:, :2] / seen[:, 2:] - pixels, axis=1) < PIXELS)
        rays = [points - pose[:3, 3] for pose in poses]
        cosines = (rays[0] * rays[1]).sum(axis=1) / np.linalg.norm(rays[0], axis=1) / np.linalg.norm(rays[1], axis=1)
        good &= cosines < np.cos(np.radians(LEAST_ANGLE))
    return points[good]


def without_strays(points, neighbours=4):
    """Return the points (N, 3) that are not alone: the fourth neighbour is at most six times as far as most have it."""
    if len(points) <= 2 * neighbours:
        return points
    away = cKDTree(points).query(points, neighbours + 1)[0][:, -1]
    return points[away < 6 * np.median(away) + 1e-12]


# --- the table --------------------------------------------------------------------------------------------------------

def find_table(points, poses, scale, tries=2000) -> Optional[Plane]:
    """Return the Plane of the table or floor under the object, None if the points show none.

    It is level, as far as the cameras are upright, holds a tenth of the points at least, lies below all cameras, and
    has next to no points under it. scale: about the object's size, in world units.
    """
    if len(points) < 50:
        return None
    rng, thick = np.random.default_rng(0), 0.02 * scale
    up = upwards(poses)
    best, most = None, max(30, 0.08 * len(points))
    for corners in points[rng.integers(len(points), size=(tries, 3))]:
        plane = plane_through(corners, poses)
        if plane is None or plane.normal @ up < 0.7 or plane.heights(poses[:, :3, 3]).min() < 2 * thick:
            continue
        heights = plane.heights(points)
        count = (np.abs(heights) < thick).sum()
        if count > most and (heights < -2 * thick).sum() < 0.25 * count:
            best, most = plane, count
    for _ in range(3 if best else 0):       # fitted to its points
        near = points[np.abs(best.heights(points)) < thick]
        normal = np.linalg.svd(near - near.mean(axis=0), full_matrices=False)[2][2]
        best = towards(normal, normal @ near.mean(axis=0), poses)
    return best


def upwards(poses):
    """Return the unit vector (3,) that the upper sides of the pictures point to, on average."""
    centre = axes_centre(poses)
    shifted = poses.copy()
    shifted[:, :3, 3] -= centre
    return helper.upright(shifted)


def plane_through(corners, poses):
    """Return the Plane through three points (3, 3), None if they are on one line."""
    normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
    length = np.linalg.norm(normal)
    return towards(normal / length, normal @ corners[0] / length, poses) if length > 1e-12 else None


def towards(normal, offset, poses):
    """Return the Plane with the normal turned to the cameras' side."""
    sign = np.sign(np.median(poses[:, :3, 3] @ normal - offset)) or 1.0
    return Plane(sign * normal, sign * offset)


def axes_centre(poses, rounds=20):
    """Return the point (3,) to which the cameras' axes come nearest: the least sum of distances, not of squares."""
    origins, axes = poses[:, :3, 3], poses[:, :3, 2]
    across = np.eye(3) - axes[:, :, None] * axes[:, None]
    weights = np.ones(len(poses))
    for _ in range(rounds):
        total = np.einsum("n,nij->ij", weights, across)
        centre = np.linalg.lstsq(total, np.einsum("n,nij,nj->i", weights, across, origins), rcond=None)[0]
        missed = np.linalg.norm(np.einsum("nij,nj->ni", across, centre - origins), axis=1)
        weights = 1 / np.maximum(missed, 1e-3 * np.median(missed) + 1e-12)
    return centre
