"""The unit of a scene: two points, clicked in two or more views, whose distance is known.

`--scale-by "12:640,410 12:655,880 31:600,402 31:618,871 = 0.21"`: the first mark in each view is the first point, the
second mark the second point. Views are counted from 0 in the order of the scene's images, and pixels are theirs. So the
points of the example lie 0.21 apart in the new unit.
"""
import re
from typing import Dict, NamedTuple, Tuple

import numpy as np

import datasets
import helper
from files import pictures, writing
from helper import UserError

EXAMPLE = '"12:640,410 12:655,880 31:600,402 31:618,871 = 0.21"'
MARK = re.compile(r"(\d{1,6}):(-?[0-9]{1,6}(?:\.[0-9]*)?),(-?[0-9]{1,6}(?:\.[0-9]*)?)")
WORST = 0.02            # of the image's longer side: marks that miss their point by more do not show the same point
LEAST_ANGLE = 1.0       # degrees between two rays to a point
KEPT = "cameras_before_scale.npz"


class Marks(NamedTuple):
    """Two points that were clicked, and their distance."""
    pixels: Dict[int, Tuple[np.ndarray, np.ndarray]]    # {view: pixels (2,) of the two points}
    distance: float


def read_marks(text):
    """Return the Marks of a --scale-by. Raises UserError, in one line, for anything else."""
    words, equals, distance = text[:10000].partition("=")
    try:
        length = float(distance)
    except ValueError:
        length = 0.0
    if not (equals and 1e-9 < length < 1e9):
        raise UserError(f"--scale-by must end in = and the points' distance, more than 0, like {EXAMPLE}")
    pixels = {}
    for word in words.split():
        mark = MARK.fullmatch(word)
        if not mark:
            raise UserError(f"--scale-by: {word[:40]!r} is not view:x,y, like {EXAMPLE}")
        pixels.setdefault(int(mark[1]), []).append(np.array([float(mark[2]), float(mark[3])]))
    if len(pixels) < 2:
        raise UserError(f"--scale-by must mark both points in at least two views, like {EXAMPLE}")
    for view, marks in pixels.items():
        if len(marks) != 2:
            raise UserError(f"--scale-by: view {view} has {len(marks)} mark{'s' * (len(marks) != 1)}; each view needs "
                            "one of each of the two points")
    return Marks({view: tuple(marks) for view, marks in pixels.items()}, length)


def factor(marks, cameras):
    """Return by how much the scene must grow so that the points of Marks have their distance.

    cameras: the scene's helper.Cameras, in world units. Raises UserError if the marks do not show two points.
    """
    for view, pair in marks.pixels.items():
        if view >= len(cameras):
            raise UserError(f"--scale-by: there is no view {view}; the scene has views 0 to {len(cameras) - 1}")
        height, width = cameras[view].shape
        for x, y in pair:
            if not (-1 <= x <= width and -1 <= y <= height):
                raise UserError(f"--scale-by: {view}:{x:g},{y:g} is outside the image of {width}x{height} pixels; the "
                                "pixels are those of the scene's images")
    points = [triangulated([pair[which] for pair in marks.pixels.values()],
                           [cameras[view] for view in marks.pixels], list(marks.pixels), which) for which in (0, 1)]
    apart = np.linalg.norm(points[0] - points[1])
    near = min(np.linalg.norm(points[0] - cameras[view].pose[:3, 3]) for view in marks.pixels)
    if not apart > 1e-4 * near:
        raise UserError("--scale-by: the two points lie at one place; mark two that are farther apart")
    return marks.distance / apart


def triangulated(pixels, cameras, views, which):
    """Return the point (3,) that cameras see at `pixels`, one (2,) for each; least squares in homogeneous form.

    views, which: for messages. Raises UserError if the rays are nearly parallel, or miss the point.
    """
    rows, rays = [], []
    for (x, y), camera in zip(pixels, cameras):
        projection = camera.intrinsics @ np.linalg.inv(camera.pose)[:3]
        rows += [(x * projection[2] - projection[0]) / camera.intrinsics[0, 0],
                 (y * projection[2] - projection[1]) / camera.intrinsics[1, 1]]
        rays.append(helper.pixel_rays([(x, y)], camera.intrinsics, camera.pose)[1][0])
    widest = np.degrees(np.arccos(np.clip(np.array(rays) @ np.array(rays).T, -1, 1))).max()
    where = f"--scale-by: point {which + 1} in views {', '.join(map(str, views))}"
    if widest < LEAST_ANGLE:
        raise UserError(f"{where}: both are seen from one side; choose views that look from different places")
    shift = np.mean([camera.pose[:3, 3] for camera in cameras], axis=0)     # else far worlds lose digits
    rows = np.array(rows)
    rows[:, 3] += rows[:, :3] @ shift
    size = max(np.linalg.norm(camera.pose[:3, 3] - shift) for camera in cameras)
    rows[:, 3] /= size
    homogeneous = np.linalg.svd(rows)[2][-1]
    point = homogeneous[:3] / homogeneous[3] * size + shift
    for (x, y), camera in zip(pixels, cameras):
        local = camera.intrinsics @ (camera.pose[:3, :3].T @ (point - camera.pose[:3, 3]))
        away = np.hypot(*(local[:2] / local[2] - (x, y))) if local[2] > 0 else np.inf
        if not away < WORST * max(camera.shape):
            off = f", {away:.0f} pixels off" if np.isfinite(away) else ""
            raise UserError(f"{where}: the marks do not show one point{off}; mark the same points, in the same order")
    return point


# --- a scene on disk --------------------------------------------------------------------------------------------------

def scale_scene(path, marks):
    """Put the scene in the folder `path` into the unit of Marks. Return the factor.

    The networks' coordinates stay, so trained models remain valid. Earlier cameras are kept as KEPT.
    """
    images = datasets.scene_files(path)[0]
    growth = factor(marks, scene_cameras(path, images))
    grow = np.diag((growth, growth, growth, 1.0))
    for name in ("cameras_linear_init.npz", "cameras.npz"):
        if not (path / name).is_file():
            continue
        stored, scaled = datasets.read_matrices(path / name, len(images)), {}
        for key, matrix in stored.items():
            scaled[key] = matrix @ np.linalg.inv(grow) if key.startswith("world") else grow @ matrix
        if name == "cameras.npz" and not (path / KEPT).exists():
            writing.write_bytes(path / KEPT, (path / name).read_bytes())
        with writing.replacing(path / name) as temporary:
            np.savez(str(temporary), **scaled)
    return growth


def scene_cameras(path, images):
    """Return the helper.Cameras, in world units, of the scene in a folder with these images."""
    matrices, cameras = datasets.read_matrices(path / "cameras.npz", len(images)), []
    for index, image in enumerate(images):
        try:
            intrinsics, pose = helper.decompose_projection(matrices[f"world_mat_{index}"])
        except ValueError as error:
            raise UserError(f"{path / 'cameras.npz'}: world_mat_{index} cannot be used: {error}") from error
        cameras.append(helper.Camera(intrinsics, pose, image_shape(image)))
    return cameras


def image_shape(path):
    """Return height and width of a scene's image as it is stored."""
    return pictures.picture_size(path)[::-1]


def extents(points):
    """Return the lengths (3,) of the box about points (N, 3), along their main axes, longest first."""
    centred = points - points.mean(axis=0)
    axes = np.linalg.svd(centred.T @ centred)[0]
    return np.sort(np.ptp(centred @ axes, axis=0))[::-1]

