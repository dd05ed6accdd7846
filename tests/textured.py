"""Views of textured balls on a textured floor in a textured room, by closed formulas: fast enough for tests."""
import numpy as np
from scipy.ndimage import map_coordinates

import helper
import make_scene

BALLS = (((0.0, 0.0, 0.0), 0.5), ((0.45, 0.1, -0.15), 0.3), ((-0.15, 0.45, -0.2), 0.25))    # centre and radius
FLOOR, ROOM = -0.45, 7.0


def noise(points, seed):
    """Return smooth noise (N, 3) in [0, 1], three colours, at points (N, 3): two octaves of a random lattice."""
    lattice = np.random.default_rng(seed).random((3, 32, 32, 32))
    total = 0
    for scale, weight in ((9.0, 0.5), (23.0, 0.5)):
        at = (points * scale).T % 31
        total = total + weight * np.stack([map_coordinates(colour, at, order=1, mode="wrap") for colour in lattice])
    return np.clip(1.6 * (total.T - 0.5) + 0.5, 0, 1)


def turn(points, angle):
    """Return points (N, 3) turned about z by an angle in radians."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])


def render(intrinsics, pose, shape, turned=None):
    """Return an image (h, w, 3) uint8 and the mask (h, w) bool of the balls, of a camera with a pose (4, 4).

    turned: the angle by which the balls and a disc under them are turned in a room that stands still; None: the room
    belongs to them.
    """
    origin, directions = helper.pixel_rays(helper.pixel_grid(*shape), intrinsics, pose)
    origin, nearest = origin.astype(np.float64), np.full(len(directions), np.inf)
    seen = np.full(len(directions), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        for index, (centre, radius) in enumerate(BALLS):
            offset = origin - turn(np.array([centre]), turned or 0.0)[0]
            b, c = directions @ offset, offset @ offset - radius ** 2
            t = -b - np.sqrt(b * b - c)
            closer = (t > 0) & (t < nearest)
            nearest[closer], seen[closer] = t[closer], index
        for axis in range(3):
            for side in (FLOOR, ROOM) if axis == 2 else (-ROOM, ROOM):
                t = (side - origin[axis]) / directions[:, axis]
                closer = (t > 1e-6) & (t < nearest)
                nearest[closer], seen[closer] = t[closer], 10 + 2 * axis + (side > 0)
    points = origin + nearest[:, None] * directions
    moving = (seen < 10) | (seen == 14) & (np.hypot(points[:, 0], points[:, 1]) < 1.0)
    local = np.where(moving[:, None], turn(points, -(turned or 0.0)), points)
    room, colours = (seen >= 10) & ~moving, np.empty_like(local)
    colours[room], colours[~room] = noise(local[room] / 2.5, 2), noise(local[~room], 1)
    return np.round(255 * colours).astype(np.uint8).reshape(*shape, 3), (seen < 10).reshape(shape)


def ring(count, size, first=0.0, last=2 * np.pi):
    """Return intrinsics (3, 3) and poses (count, 4, 4) of a walk around the balls, for images of 3/4 size x size."""
    focal = 1.1 * size
    intrinsics = np.array([[focal, 0, (size - 1) / 2], [0, focal, (3 * size // 4 - 1) / 2], [0, 0, 1]])
    poses = []
    for angle in np.linspace(first, last, count, endpoint=False):
        height = 1.2 + 0.5 * np.sin(3 * angle)
        eye = (2.4 * np.cos(angle), 2.4 * np.sin(angle), height)
        poses.append(make_scene.look_at(eye, (0.05 * np.sin(5 * angle), 0, -0.1), (0.1 * np.sin(2 * angle), 0, 1)))
    return intrinsics, np.stack(poses)
