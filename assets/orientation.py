"""Which way is up, and the move that stands an object on the ground at the origin."""
import numpy as np
import trimesh
from scipy.spatial import ConvexHull, QhullError

import helper

MOST_TILT = 15.0        # degrees between the cameras' up and the normal of the plane on which the object stands
FLAT = 3.0              # degrees; faces of the hull within this of a plane's normal belong to the plane
WIDE = 0.2              # least area of that plane, in areas of the object's silhouette from above


def standing_up(vertices: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return the up direction (3,) of an object that stands on a flat bottom, else `up`.

    vertices: (V, 3); up: the cameras' mean up, a unit vector. The bottom is a plane of the convex hull that faces down
    within MOST_TILT, on which the object does not tip over, and that is wide enough: the table's plane.
    """
    try:
        hull = ConvexHull(vertices)
    except (QhullError, ValueError):
        return up
    corners, normals = vertices[hull.simplices], hull.equations[:, :3]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    silhouette = (areas * np.abs(normals @ up)).sum() / 2
    facing = np.flatnonzero(normals @ -up > np.cos(np.radians(MOST_TILT)))
    if not len(facing):
        return up
    largest = facing[areas[facing].argmax()]
    flat = normals @ normals[largest] > np.cos(np.radians(FLAT))
    down = trimesh.unitize((normals[flat] * areas[flat, None]).sum(axis=0))
    if areas[flat].sum() < WIDE * silhouette or not rests(corners[flat], vertices, down):
        return up
    return -down


def rests(corners: np.ndarray, vertices: np.ndarray, down: np.ndarray) -> bool:
    """Return whether the middle of the vertices (V, 3) lies above the plane's faces (F, 3, 3), within their box."""
    right = helper.rightwards(down, np.eye(3)[np.abs(down).argmin()])
    axes = np.stack([right, np.cross(down, right)], axis=1)
    flat, middle = corners.reshape(-1, 3) @ axes, (vertices.min(axis=0) + vertices.max(axis=0)) / 2 @ axes
    return bool((flat.min(axis=0) <= middle).all() and (middle <= flat.max(axis=0)).all())


def turned_up(up: np.ndarray, back: np.ndarray, vertical: str) -> np.ndarray:
    """Return the rotation (4, 4) that turns `up` (3,) to the axis `vertical`, "y" or "z".

    A viewer at `back` (3,) of the object then stands at its front: at +z if y is up, as in glTF, at -y if z is.
    """
    right = helper.rightwards(up, back)
    towards = np.cross(right, up)
    matrix = np.eye(4)
    matrix[:3, :3] = [right, up, towards] if vertical == "y" else [right, -towards, up]
    return matrix


def on_ground(vertices: np.ndarray, rotation: np.ndarray, vertical: str) -> np.ndarray:
    """Return the rotation (4, 4) followed by the shift that puts the middle of the vertices (V, 3) above the origin,
    and the lowest one on the ground."""
    turned = trimesh.transform_points(vertices, rotation)
    low, high = turned.min(axis=0), turned.max(axis=0)
    shift, axis = -(low + high) / 2, "xyz".index(vertical)
    shift[axis] = -low[axis]
    matrix = rotation.copy()
    matrix[:3, 3] += shift
    return matrix
