"""Colours of surface points from the photographs that see them best: by angle, distance, visibility and the mask."""
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, List, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

import helper
import ray_tracer
from assets.baking import Points
from tracing.compiling import compiled

MOST_RAYS = 1 << 16     # traced per view; larger photographs get a smaller depth map
CHUNK = 1 << 15         # rays traced together
POWER = 2               # of the weight by angle; higher is sharper, lower forgives more error of the cameras
FLATTEST = 0.1          # cosine of the flattest view of the surface that counts
FEATHER = 3.0           # pixels from the mask's outline within which a photograph fades
ENOUGH = 0.05           # sum of weights below which the networks' colours join in
SLICE = 1 << 14         # points per thread and turn


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
    """Return an appearance for baking.baked: Points -> their colours (N, 3) in [0, 1] in the photographs.

    Points that no photograph sees well keep the networks' colours, in part or wholly.
    """
    factor = -(-photographs.images.shape[1] // photographs.depths.shape[1])

    def colors(points: Points) -> np.ndarray:
        rgb = np.empty((len(points.places), 3), np.float32)

        def blend(start):
            part = slice(start, start + SLICE)
            rgb[part] = blend_block(Points(*(values[part] for values in points)), photographs, factor)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(blend, range(0, len(rgb), SLICE)))
        return rgb

    return colors


def blend_block(points: Points, photographs: Photographs, factor: int) -> np.ndarray:
    """Return the colours (N, 3) of Points in photographs; factor: by which the depth maps are shrunk."""
    sums, enough = blend_points(points, photographs, factor)
    share = np.minimum(enough / ENOUGH, 1)[:, None]
    return share * sums[:, :3] / np.maximum(sums[:, 3:], 1e-12) + (1 - share) * points.rgb


@compiled
def blend_points(points, photographs, factor):
    """Return sums (N, 4) of weighted colours in [0, 1] and of weights, and of the weights without distance (N,)."""
    places, normals, _ = points
    images, trust, projections, centres, focals, depths = photographs
    sums, enough = np.zeros((len(places), 4), np.float32), np.zeros(len(places), np.float32)
    height, width = trust.shape[1:]
    for n in range(len(places)):
        x, y, z = places[n]
        for view in range(len(images)):
            p = projections[view]
            depth = p[2, 0] * x + p[2, 1] * y + p[2, 2] * z + p[2, 3]
            dx, dy, dz = centres[view, 0] - x, centres[view, 1] - y, centres[view, 2] - z
            distance = np.sqrt(dx * dx + dy * dy + dz * dz)
            cosine = (dx * normals[n, 0] + dy * normals[n, 1] + dz * normals[n, 2]) / distance
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
            for c in range(3):
                sums[n, c] += weight / 255 * (
                    (images[view, i, j, c] * (1 - b) + images[view, i, j + 1, c] * b) * (1 - a)
                    + (images[view, i + 1, j, c] * (1 - b) + images[view, i + 1, j + 1, c] * b) * a)
            sums[n, 3] += weight
    return sums, enough


@compiled
def visible(depths, u, v, distance, slack):
    """Return how sure it is that nothing hides a point at `distance`, 0 to 1, from the pixels of a depth map (h, w).

    (u, v): the point's place in the map. slack: by how much the surface's depth may change within a pixel. Where a ray
    around the place hit nothing, the point's place in the picture is not sure, and it counts as hidden.
    """
    rows, columns = depths.shape
    top, left, free = int(np.floor(v)), int(np.floor(u)), 0.0
    for i in (top, top + 1):
        for j in (left, left + 1):
            near = depths[min(max(i, 0), rows - 1), min(max(j, 0), columns - 1)]
            if near != np.inf:
                share = (1 - abs(v - i)) * (1 - abs(u - j))
                free += share * min(max(0.5 * (near - distance) / slack + 1.5, 0.0), 1.0)
    return max(2 * free - 1, 0.0)   # none where half of what is around hides the point
