"""What stands around the embedded object in `make_scene.py --floor`: a floor, walls, clutter, and their textures.

All textures are noise that is computed here. z is up, and lengths are in radii of the unit sphere about the object. The
object comes in as its sdf and its shader, so that nothing here knows its shape.
"""
from typing import Callable, List, NamedTuple, Optional, Tuple

import cv2
import numpy as np
from scipy import ndimage

import helper
import ray_tracer

KINDS = ("textured", "white", "black", "clutter")
FLOOR = -0.51       # z; the object stands on it
ROOM = 6.0          # radius of the sphere of the walls
TURNTABLE = 0.95    # radius of what turns with the object before a camera that stands still
LIT = 2.4           # the object's shadow ends within so many radii of the axis, in x and y
TILE = 4.0          # a texture repeats after so many radii
TEXELS = 1024       # pixels along a texture
NOISE = 1.5         # of the photographs, in grey levels


class Thing(NamedTuple):
    """A box that stands on the floor, or a ball that lies on it."""
    place: Tuple[float, float]      # x and y of its centre
    half: Tuple[float, float, float]    # half its sides; of a ball its radius, three times
    turn: float                     # about the vertical, in radians
    texture: List[np.ndarray]
    ball: bool = False


class Surroundings(NamedTuple):
    """What the rays meet that miss the object. A texture is an image pyramid, as from `texture`."""
    floor: List[np.ndarray]
    walls: List[np.ndarray]
    things: Tuple[Thing, ...] = ()
    stand: float = np.inf           # the floor ends so far from the axis
    turned: float = 0.0             # all but the turntable is turned by so many radians about the vertical


class Scene(NamedTuple):
    """An object and what stands around it."""
    sdf: Callable                   # points (N, 3) float32 to (N,) float32; 1-Lipschitz
    shade: Callable                 # points and directions, both (N, 3), to colours (N, 3) float32 in [0, 1]
    sun: np.ndarray                 # (3,), the unit vector towards it
    around: Surroundings
    light: Optional[np.ndarray] = None      # on the floor, as from floor_light; None for 1 everywhere


def make_surroundings(kind, seed=0):
    """Return the Surroundings of one of the KINDS. The same seed gives the same."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    if kind == "white":
        return Surroundings(flat((0.93, 0.92, 0.90)), flat((0.86, 0.87, 0.88)))
    if kind == "black":
        return Surroundings(flat((0.10, 0.10, 0.11)), flat((0.02, 0.02, 0.02)), stand=0.5)
    floor = texture(rng, ((0.36, 0.22, 0.12), (0.62, 0.43, 0.25), (0.80, 0.66, 0.45), (0.30, 0.28, 0.27)), 0.25)
    walls = texture(rng, ((0.25, 0.30, 0.42), (0.75, 0.72, 0.66), (0.45, 0.20, 0.18), (0.85, 0.83, 0.75)), 1.0)
    return Surroundings(floor, walls, clutter(rng) if kind == "clutter" else ())


def clutter(rng, count=9):
    """Return Things around the object, too low to hide it from cameras 20 degrees above it."""
    things = []
    for index in range(count):
        angle, away = 2 * np.pi * (index + rng.uniform(-0.25, 0.25)) / count, rng.uniform(1.35, 2.1)
        colours = rng.uniform(0.1, 0.9, (3, 3))
        ball = index % 3 == 2
        half = (rng.uniform(0.15, 0.22),) * 3 if ball else (*rng.uniform(0.18, 0.4, 2), rng.uniform(0.06, 0.24))
        things.append(Thing((away * np.cos(angle), away * np.sin(angle)), half, rng.uniform(0, np.pi),
                            texture(rng, colours, 0.4, TEXELS // 4), ball))
    return tuple(things)


# --- textures ---------------------------------------------------------------------------------------------------------

def flat(colour):
    """Return the texture of one colour."""
    return [np.full((1, 1, 3), colour, np.float32)]


def texture(rng, colours, size, texels=TEXELS):
    """Return a texture: patches of the `colours` ((3,) each, in [0, 1]), about `size` large, with finer noise on them.

    It is an image pyramid, float32, of texels x texels and so on, and repeats seamlessly.
    """
    coarse = sum(noise(rng, int(TILE / size * 2 ** k), texels) / 2 ** k for k in range(3))
    count = 4 * len(colours)
    ranks = np.searchsorted(np.quantile(coarse[::4, ::4], np.linspace(0, 1, count + 1)[1:-1]), coarse)
    image = np.asarray(colours, np.float32)[(3 * ranks) % len(colours)]
    image = image * (1 + sum(0.28 * noise(rng, cells, texels) for cells in (24, 64, 160)))[..., None]
    pyramid = [np.clip(image, 0, 1).astype(np.float32)]
    while len(pyramid[-1]) > 8:
        side = len(pyramid[-1]) // 2
        pyramid.append(cv2.resize(pyramid[-1], (side, side), interpolation=cv2.INTER_AREA))
    return pyramid


def noise(rng, cells, texels):
    """Return smooth noise (texels, texels) float32 with mean 0 and deviation 1 that repeats seamlessly."""
    values = np.pad(rng.normal(size=(cells, cells)).astype(np.float32), 4, mode="wrap")
    fine = cv2.resize(values, None, fx=texels / cells, fy=texels / cells, interpolation=cv2.INTER_CUBIC)
    start = int(round(4 * texels / cells))
    fine = fine[start:start + texels, start:start + texels]
    return (fine - fine.mean()) / fine.std()


def look_up(pyramid, uv, widths):
    """Return the colours (N, 3) of a texture at uv (N, 2), averaged over about `widths` (N,), both in radii."""
    colours = np.zeros((len(uv), 3), np.float32)
    levels = np.clip(np.log2(np.maximum(widths * len(pyramid[0]) / TILE, 1)), 0, len(pyramid) - 1)
    for level, image in enumerate(pyramid):
        weights = np.maximum(0, 1 - np.abs(levels - level))
        used = weights > 0
        if used.any():
            places = (uv[used, ::-1] * (len(image) / TILE)).T - 0.5
            values = [ndimage.map_coordinates(image[..., c], places, order=1, mode="grid-wrap") for c in range(3)]
            colours[used] += weights[used, None] * np.stack(values, axis=1)
    return colours


def speckles(points, seed=0, cells=12.0):
    """Return factors (N,) float32 for the albedo at points (N, 3) of [-1, 1]^3: noise in space, as of a painted glaze.

    cells: its cells per unit of length. So a smooth object has features to match.
    """
    lattice = np.random.default_rng(seed).normal(size=(32, 32, 32)).astype(np.float32)
    rough = sum(ndimage.map_coordinates(lattice, (points * cells * 2 ** k).T, order=1, mode="grid-wrap")
                for k in range(2))
    return 1 + 0.45 * np.tanh(1.5 * rough)


# --- rays -------------------------------------------------------------------------------------------------------------

def render(scene, camera, rng=None):
    """Return the image (H, W, 3) of a Scene and the object's mask (H, W) of 0 and 255, both uint8.

    camera: a helper.Camera; one ray per pixel. The image is slightly soft, as through a lens. rng: a Generator for
    the NOISE, None for none.
    """
    height, width = camera.shape
    origin, directions = helper.pixel_rays(helper.pixel_grid(height, width), camera.intrinsics, camera.pose)
    t, hit = ray_tracer.trace(scene.sdf, origin, directions, sphere_tracing_steps=200)
    colours, behind = surroundings_colours(scene, origin, directions, 1 / camera.intrinsics[0, 0])
    hit &= t < behind
    colours[hit] = scene.shade(origin + t[hit, None] * directions[hit], directions[hit])
    image = cv2.GaussianBlur(255 * colours.reshape(height, width, 3), (0, 0), 0.6)
    if rng is not None:
        image += rng.normal(0, NOISE, image.shape)
    image = np.clip(np.round(image), 0, 255).astype(np.uint8)
    return image, np.where(hit, 255, 0).astype(np.uint8).reshape(height, width)


def surroundings_colours(scene, origin, directions, pixel):
    """Return the colours (N, 3) float32 that rays see behind the object, and the distances (N,) of what they meet.

    pixel: the width of a pixel at distance 1.
    """
    around, turn = scene.around, vertical_turn(scene.around.turned)
    origin_there, directions_there = origin @ turn, directions @ turn    # in the room, which may be turned
    t, colours = np.full(len(directions), np.inf, np.float32), np.zeros((len(directions), 3), np.float32)

    def take(distances, colours_of):
        nearer = distances < t
        if nearer.any():
            t[nearer] = distances[nearer]
            colours[nearer] = colours_of(nearer, distances[nearer])

    def wall(rays, distances):
        points = origin_there + distances[:, None] * directions_there[rays]
        uv = np.stack([np.arctan2(points[:, 1], points[:, 0]) * 2 * TILE / np.pi, points[:, 2]], axis=1)
        return look_up(around.walls, uv, distances * pixel) * (0.8 + 0.03 * points[:, 2:])

    def floor(rays, distances):
        points = origin + distances[:, None] * directions[rays]
        turning = np.hypot(points[:, 0], points[:, 1])[:, None] < TURNTABLE
        uv = np.where(turning, points[:, :2], (points @ turn)[:, :2])
        widths = distances * pixel / np.sqrt(np.maximum(-directions[rays, 2], 0.02))
        colours = look_up(around.floor, uv, widths)
        if scene.light is not None:
            cells = (points[:, 1::-1].T + LIT) * (len(scene.light) - 1) / (2 * LIT)
            colours *= ndimage.map_coordinates(scene.light, cells, order=1, mode="nearest")[:, None]
        return colours

    take(to_sphere(origin_there, directions_there, ROOM), wall)
    with np.errstate(divide="ignore"):
        down = (FLOOR - origin[2]) / directions[:, 2]
    away = np.hypot(*(origin[:2] + np.where(down > 0, down, 0)[:, None] * directions[:, :2]).T)
    take(np.where((down > 0) & (away < around.stand), down, np.inf), floor)
    for thing in around.things:
        take(*meet(thing, origin_there, directions_there, scene.sun, pixel))
    return colours, t


def vertical_turn(angle):
    """Return the rotation (3, 3) about z by an angle; row vectors times it turn backwards."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)


def to_sphere(origin, directions, radius):
    """Return the distances (N,) at which rays from inside a sphere about 0 leave it."""
    along = directions @ origin
    return -along + np.sqrt(np.maximum(along ** 2 + radius ** 2 - origin @ origin, 0))


def meet(thing, origin, directions, sun, pixel):
    """Return the distances (N,) at which rays meet a Thing, inf where they do not, and a function for the colours."""
    turn, half = vertical_turn(thing.turn), np.array(thing.half, np.float32)
    start = (origin - (*thing.place, FLOOR + half[2])) @ turn / half     # the thing as [-1, 1]^3 or the unit ball
    steps = directions @ turn / half
    with np.errstate(divide="ignore", invalid="ignore"):
        if thing.ball:
            a, b = (steps ** 2).sum(axis=1), steps @ start
            t = (-b - np.sqrt(b ** 2 - a * (start @ start - 1))) / a
        else:
            ends = np.sort((np.array([[-1.0], [1.0]])[:, :, None] - start) / steps, axis=0)
            t = np.where(ends[0].max(axis=1) < ends[1].min(axis=1), ends[0].max(axis=1), np.inf)
        t = np.where(t > 0, t, np.inf)

    def colours(rays, distances):
        points = start + distances[:, None] * steps[rays]
        axis = np.abs(points).argmax(axis=1)
        normals = points if thing.ball else np.eye(3)[axis] * np.sign(points)
        uv = (points * half)[np.arange(len(points))[:, None], np.array([(1, 2), (0, 2), (0, 1)])[axis]]
        light = 0.55 + 0.45 * np.maximum(normals @ turn.T @ sun, 0)
        return look_up(thing.texture, uv, distances * pixel) * light[:, None]

    return t, colours


def floor_light(scene, cells=300, steps=16):
    """Return the light (cells, cells) float32 on the floor's square of LIT radii to each side, by y and x.

    It is less close to the object and in its soft shadow, and 1 on the square's sides.
    """
    axis = np.linspace(-LIT, LIT, cells, dtype=np.float32)
    places = np.stack(np.meshgrid(axis, axis, [np.float32(FLOOR)]), axis=-1).reshape(-1, 3)
    open_sky = np.clip(0.35 + scene.sdf(places + np.float32((0, 0, 0.05))) / 0.35, 0.35, 1)
    clear, t = np.ones(len(places), np.float32), np.full(len(places), 0.04, np.float32)
    for _ in range(steps):      # the narrowest cone of light about the ray to the sun (Quilez's soft shadow)
        gap = scene.sdf(places + t[:, None] * scene.sun.astype(np.float32))
        clear = np.minimum(clear, 6 * gap / t)
        t += np.maximum(gap, 0.04)
    light = (0.6 + 0.4 * open_sky) * (0.55 + 0.45 * np.clip(clear, 0, 1))
    return np.pad(light.reshape(cells, cells)[1:-1, 1:-1], 1, constant_values=1)
