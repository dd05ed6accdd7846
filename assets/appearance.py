"""The networks' colours as one colour per point: the mean of what the cameras see, or what a light leaves of it."""
from typing import NamedTuple, Optional, Tuple

import numpy as np
import trimesh
from tqdm import tqdm

import helper
from assets.highlights import Light, Views, colors_below, fitted_light, mean_colors
from assets.surface import Surface
from assets.visibility import cosines_seen

MOST_VIEWS = 32         # cameras that count; of more, those are taken that stand farthest from each other
BLOCK = 1 << 14         # vertices seen together
FITTED = 1000           # vertices from which the light is found
REST = 1e-3             # weight of the last view beside the cosines: for what no camera sees


class Look(NamedTuple):
    """From where to take the networks' colours, and what to add to them, at V vertices."""
    towards: np.ndarray                     # (V, 3) float32, unit length, the middle of the ways to the cameras
    base: np.ndarray                        # (V, 3) float32, for the mean of what the cameras see
    below: Optional[np.ndarray] = None      # (V, 3) float32, for the colour that the light adds its highlights to
    light: Optional[Light] = None


def look_of(mesh: trimesh.Trimesh, surface: Surface, centres: np.ndarray, glossy: bool) -> Tuple[Look, float]:
    """Return the Look of a mesh with vertex normals for cameras at centres (N, 3), and what share its light explains.

    The colours are least squares over the cameras: each camera that sees a vertex counts by the cosine of its angle
    with the normal, which is the size of the surface there in its picture. glossy: find a light; else there is none.
    """
    centres = centres[spread(centres)]
    seen = np.stack([np.rint(255 * cosines_seen(mesh, centre)).astype(np.uint8)     # a byte each: there may be many
                     for centre in tqdm(centres, desc="visibility", unit="view", leave=False, dynamic_ncols=True)])
    light, explained = None, 0.0
    if glossy:
        chosen = np.random.default_rng(0).permutation(len(mesh.vertices))[:FITTED]
        light, explained = fitted_light(views_of(mesh, surface, centres, seen, chosen))
    count = len(mesh.vertices)
    towards, base, below = np.empty((3, count, 3), np.float32)
    for start in tqdm(range(0, count, BLOCK), desc="colours by view", unit="block", leave=False, dynamic_ncols=True,
                      disable=count <= BLOCK):
        part = np.arange(start, min(start + BLOCK, count))
        views = views_of(mesh, surface, centres, seen, part)
        towards[part], base[part] = views.towards[-1], mean_colors(views) - views.colors[-1]
        if light:
            below[part] = colors_below(light, views) - views.colors[-1]
    return Look(towards, base, below if light else None, light), explained


def spread(centres: np.ndarray) -> np.ndarray:
    """Return the indices of at most MOST_VIEWS of the centres (N, 3), each the farthest from those before it."""
    if len(centres) <= MOST_VIEWS:
        return np.arange(len(centres))
    chosen, distance = [0], np.full(len(centres), np.inf)
    while len(chosen) < MOST_VIEWS:
        distance = np.minimum(distance, np.linalg.norm(centres - centres[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return np.array(chosen)


def views_of(mesh: trimesh.Trimesh, surface: Surface, centres: np.ndarray, seen: np.ndarray,
             part: np.ndarray) -> Views:
    """Return the Views of the vertices `part` (n,) of a mesh from centres (N, 3), and last that from their middle.

    The middle of the ways to the cameras that see a vertex lies between them, where the networks have learnt colours;
    they have not along every normal. A vertex that no camera sees is seen along its normal.
    seen: (N, V) uint8, 255 times cosines_seen.
    """
    points, normals = mesh.vertices[part].astype(np.float32), mesh.vertex_normals[part].astype(np.float32)
    weights = np.concatenate([seen[:, part] / np.float32(255), np.full((1, len(part)), np.float32(REST))])
    ways = np.concatenate([helper.unit((centres[:, None] - points).astype(np.float32)), normals[None]])
    ways[-1] = helper.unit(np.einsum("vn,vnc->nc", weights, ways))
    colors = np.zeros(ways.shape, np.float32)
    view, point = np.nonzero(weights)
    colors[view, point] = surface.shade(points[point], -ways[view, point])[0]
    return Views(normals, ways, np.clip(colors, 0, 1), weights)
