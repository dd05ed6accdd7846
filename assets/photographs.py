"""Colours of surface points from the photographs that see them best: by angle, distance, visibility and the mask."""
from typing import Callable, List, NamedTuple, Optional

import cv2
import numpy as np
from tqdm import tqdm

import helper
import ray_tracer
from assets.baking import Points
from assets.highlights import Light, decoded, encoded, lobe, slope
from assets.visibility import visible
from tracing.compiling import compiled, in_threads

MOST_RAYS = 1 << 16     # traced per view; larger photographs get a smaller depth map
CHUNK = 1 << 15         # rays traced together
POWER = 2               # of the weight by angle; higher is sharper, lower forgives more error of the cameras
FLATTEST = 0.1          # cosine of the flattest view of the surface that counts
FEATHER = 3.0           # pixels from the mask's outline within which a photograph fades
ENOUGH = 0.05           # sum of weights below which the networks' colours join in
SLICE = 1 << 14         # points per thread and turn
FAINT = 1e-4            # highlights below this, in linear values, are left on the photographs
NO_LIGHT = np.zeros(7)


class Photographs(NamedTuple):
    """What V photographs know of the surface."""
    images: np.ndarray          # (V, H, W, 3) uint8
    trust: np.ndarray           # (V, H, W) uint8, 0 outside of the mask, 255 well within it
    projections: np.ndarray     # (V, 3, 4) float64, from the unit sphere's coordinates to pixels
    centres: np.ndarray         # (V, 3) float64, of the cameras
    focals: np.ndarray          # (V,) float64, pixels
    depths: np.ndarray          # (V, h, w) float32, distance of the surface from the camera; inf where no ray hit


def photographs_of(scene, views: List[int], sdf: Callable, tracer) -> Photographs:
    """Return the Photographs `views` of a datasets.Scene, with the depths that our tracer finds in them.

    sdf: points (N, 3) float32 -> (N,). tracer: the configuration's section.
    """
    poses, intrinsics = scene.poses[views], scene.intrinsics[views]
    inverse = np.linalg.inv(poses)[:, :3]
    within = (cv2.distanceTransform(scene.masks[view].astype(np.uint8), cv2.DIST_L2, 5) for view in views)
    trust = np.stack([(255 * np.minimum(pixels / FEATHER, 1)).astype(np.uint8) for pixels in within])
    depths = [depth_map(sdf, helper.Camera(scene.intrinsics[view], scene.poses[view], scene.masks[view].shape),
                        scene.masks[view], tracer)
              for view in tqdm(views, desc="visibility", unit="view", leave=False, dynamic_ncols=True)]
    return Photographs(np.ascontiguousarray(scene.images[views]), trust, intrinsics @ inverse,
                       np.ascontiguousarray(poses[:, :3, 3]), np.sqrt(intrinsics[:, 0, 0] * intrinsics[:, 1, 1]),
                       np.stack(depths))


def depth_map(sdf: Callable, camera: helper.Camera, mask: np.ndarray, tracer) -> np.ndarray:
    """Return the distances (h, w) float32 from a camera to the surface; inf without a hit, or off the mask (H, W) bool.

    The map is the picture shrunk by a whole factor to at most MOST_RAYS pixels.
    """
    height, width = mask.shape
    factor = int(np.ceil(np.sqrt(height * width / MOST_RAYS)))
    rows, columns = -(-height // factor), -(-width // factor)
    wide = np.zeros((rows * factor, columns * factor), bool)
    wide[:height, :width] = mask
    wanted = np.flatnonzero(wide.reshape(rows, factor, columns, factor).any(axis=(1, 3)))
    # The centre of a shrunk pixel is the mean of the centres that it covers.
    uv = helper.pixel_grid(rows, columns)[wanted] * factor + (factor - 1) / 2
    origin, directions = helper.pixel_rays(uv, camera.intrinsics, camera.pose)
    depths = np.full(rows * columns, np.inf, np.float32)
    for start in range(0, len(wanted), CHUNK):
        t, hit = ray_tracer.trace(sdf, origin, directions[start:start + CHUNK], **vars(tracer))
        depths[wanted[start:start + CHUNK][hit]] = t[hit]
    return depths.reshape(rows, columns)


def blended(photographs: Photographs) -> Callable:
    """Return an appearance for baking.baked: Points and a light -> their colours (N, 3) in [0, 1] in the photographs.

    Without a light they are weighted means. With one they are the colours with which and with the light's highlights a
    viewer comes nearest to the photographs. Points that no photograph sees well keep the networks' colours, in part or
    wholly.
    """
    factor = -(-photographs.images.shape[1] // photographs.depths.shape[1])

    def colors(points: Points, light: Optional[Light] = None) -> np.ndarray:
        rgb = np.empty((len(points.places), 3), np.float32)

        def blend(part):
            rgb[part] = blend_block(Points(*(values[part] for values in points)), photographs, factor, light)

        in_threads(blend, len(rgb), SLICE)
        return rgb

    return colors


def blend_block(points: Points, photographs: Photographs, factor: int, light: Optional[Light] = None) -> np.ndarray:
    """Return the colours (N, 3) of Points in photographs; factor: by which the depth maps are shrunk."""
    values = NO_LIGHT if light is None else np.array([*light.direction, *light.color, light.alpha])
    sums, weights, enough = blend_points(points, photographs, factor, values)
    share = np.minimum(enough / ENOUGH, 1)[:, None]
    return share * sums / np.maximum(weights, 1e-12) + (1 - share) * points.rgb


@compiled
def blend_points(points, photographs, factor, light):
    """Return sums (N, 3) of weighted colours, sums of their weights (N, 3), and sums of the weights by view alone (N,).

    light: (7,), direction, colour and alpha of a highlights.Light, whose highlights are taken off the colours.
    """
    places, normals, _ = points
    images, trust, projections, centres, focals, depths = photographs
    sums, weights = np.zeros((len(places), 3), np.float32), np.zeros((len(places), 3), np.float32)
    enough = np.zeros(len(places), np.float32)
    height, width = trust.shape[1:]
    for n in range(len(places)):
        x, y, z = places[n]
        for view in range(len(images)):
            p = projections[view]
            depth = p[2, 0] * x + p[2, 1] * y + p[2, 2] * z + p[2, 3]
            towards = centres[view] - places[n]
            distance = np.sqrt(towards[0] ** 2 + towards[1] ** 2 + towards[2] ** 2)
            towards /= distance
            cosine = towards[0] * normals[n, 0] + towards[1] * normals[n, 1] + towards[2] * normals[n, 2]
            if depth <= 0 or cosine < FLATTEST:
                continue
            u = (p[0, 0] * x + p[0, 1] * y + p[0, 2] * z + p[0, 3]) / depth
            v = (p[1, 0] * x + p[1, 1] * y + p[1, 2] * z + p[1, 3]) / depth
            if not (0 <= u < width - 1 and 0 <= v < height - 1):
                continue
            size = factor * distance / focals[view]     # of a depth map's pixel at the point
            free = visible(depths[view], (u - (factor - 1) / 2) / factor, (v - (factor - 1) / 2) / factor,
                           distance, size / cosine)
            if free == 0:
                continue
            i, j = int(v), int(u)
            a, b = v - i, u - j
            near = trust[view, i:i + 2, j:j + 2]
            if min(near[0, 0], near[0, 1], near[1, 0], near[1, 1]) == 0:
                continue
            sure = (near[0, 0] * (1 - b) + near[0, 1] * b) * (1 - a) + (near[1, 0] * (1 - b) + near[1, 1] * b) * a
            weight = free * sure / 255 * ((cosine - FLATTEST) / (1 - FLATTEST)) ** POWER
            enough[n] += weight
            weight *= (focals[view] / distance) ** 2 * 1e-6
            shine = lobe(normals[n], towards, light[:3], light[6]) if light[6] > 0 else 0.0
            for c in range(3):
                color = ((images[view, i, j, c] * (1 - b) + images[view, i, j + 1, c] * b) * (1 - a)
                         + (images[view, i + 1, j, c] * (1 - b) + images[view, i + 1, j + 1, c] * b) * a) / 255
                certainty, highlight = weight, shine * light[3 + c]
                if highlight > FAINT:       # as highlights.without
                    below = encoded(decoded(color) - highlight)
                    certainty *= (slope(color) / slope(below)) ** 2
                    color = below
                sums[n, c] += certainty * color
                weights[n, c] += certainty
    return sums, weights, enough
