"""Textures of a mesh from the networks: the colour and the normal of every texel, at its point of the surface."""
from typing import Callable, NamedTuple, Optional

import numpy as np
import trimesh
from tqdm import tqdm

import helper
from assets import atlas as atlases
from assets.appearance import Look
from assets.highlights import Light
from assets.surface import Surface, newton_step

BLOCK = 1 << 18     # texels per block
MOST_STEPS = 3      # of Newton's method
FAR = 5e-4          # steps longer than this, in radii of the unit sphere, are followed by another one
SMALLEST, LARGEST = 16, 16384       # sides of a texture, in texels


class Asset(NamedTuple):
    """A textured mesh, in any coordinates."""
    mesh: trimesh.Trimesh       # with vertex normals (unit length) and vertex colours
    atlas: atlases.Atlas
    base_color: np.ndarray      # (T, T, 3) uint8, sRGB
    normal_map: np.ndarray      # (T, T, 3) uint8, 127.5 (n + 1) of unit normals in tangent space, glTF's convention
    below: Optional[np.ndarray] = None      # (T, T, 3) uint8, sRGB, the colours that the light adds its highlights to
    light: Optional[Light] = None


class Points(NamedTuple):
    """N points of the surface, one for each texel of a block."""
    places: np.ndarray      # (N, 3) float32
    normals: np.ndarray     # (N, 3) float32, unit length
    rgb: np.ndarray         # (N, 3) float32 in [0, 1], the networks' colours


def baked(mesh: trimesh.Trimesh, size: int, surface: Surface, look: Optional[Look] = None,
          appearance: Optional[Callable] = None) -> Asset:
    """Return the Asset of a mesh with vertex normals, with textures of size x size texels.

    surface: whose zero set the mesh approximates. A texel's point is that of the face, moved onto the zero set.
    look: of appearance.look_of; without it the networks' colours are those seen along the normals.
    appearance: Points and a light -> colours (N, 3) in [0, 1]; None takes the networks'.
    """
    look = Look(np.zeros((len(mesh.vertices), 3), np.float32)) if look is None else look
    atlas = atlases.unwrapped(mesh, size)
    texels, frame = atlases.texels_of(atlas, size), vertex_frames(mesh, atlas)
    gradient = surface.gradient(mesh.vertices.astype(np.float32))
    known = [mesh.vertices, gradient, look.base] + ([look.below] if look.light else [])
    values = np.concatenate([np.concatenate(known, axis=1)[atlas.vertices], frame], axis=1).astype(np.float32)
    images = np.zeros((3 if look.light else 2, size * size, 3), np.uint8)
    for start in tqdm(range(0, len(texels.places), BLOCK), desc="texture", unit="block", leave=False,
                      dynamic_ncols=True, disable=len(texels.places) <= BLOCK):
        part = slice(start, start + BLOCK)
        near, slopes, *changes, frames = np.split(atlases.surface_texels(atlas, values, texels, part),
                                                  range(3, 3 * len(known) + 1, 3), axis=1)
        points = surface_points(surface, near, slopes)
        images[1, texels.places[part]] = 127.5 * in_frame(points.normals, frames) + 128     # rounded
        for image, change, light in zip((0, 2), changes, (None, look.light)):
            seen = points._replace(rgb=np.clip(points.rgb + change, 0, 1))
            images[image, texels.places[part]] = 255 * (appearance(seen, light) if appearance else seen.rgb) + 0.5
    images = [atlases.filled(image.reshape(size, size, 3), texels.places) for image in images]
    return Asset(mesh, atlas, *images, **({"light": look.light} if look.light else {}))


def surface_points(surface: Surface, near: np.ndarray, slopes: np.ndarray) -> Points:
    """Return the Points of the surface at points (N, 3) near it. slopes: (N, 3), roughly the sdf's gradient there."""
    points, moving = near.copy(), np.arange(len(near))
    for _ in range(MOST_STEPS):
        step = newton_step(surface.closed_sdf(points[moving]), slopes[moving])
        points[moving] += step
        moving = moving[np.abs(step).max(axis=1) > FAR]
        if not len(moving):
            break
    # Where a face lies far from a surface with folds, the steps may lead astray: the face's own point is better then.
    if len(moving):
        astray = np.abs(surface.closed_sdf(points[moving])) > np.abs(surface.closed_sdf(near[moving]))
        points[moving[astray]] = near[moving[astray]]
    rgb, gradient = surface.colors_and_gradient(points)
    return Points(points, helper.unit(gradient), rgb)


# --- tangent space ----------------------------------------------------------------------------------------------------

def vertex_frames(mesh: trimesh.Trimesh, atlas: atlases.Atlas) -> np.ndarray:
    """Return tangent, bitangent and normal of the atlas's vertices, (W, 9) float32, each of unit length."""
    normals, tangents = mesh.vertex_normals[atlas.vertices], atlases.tangents_of(mesh, atlas)
    return np.concatenate([tangents[:, :3], np.cross(normals, tangents[:, :3]) * tangents[:, 3:], normals],
                          axis=1).astype(np.float32)


def in_frame(normals: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Return unit normals (N, 3) in tangent space, as a viewer undoes it: with the interpolated axes at unit length.

    frames: (N, 9), interpolated vertex_frames. The axes are not quite at right angles, so the matrix is inverted.
    """
    t, b, n = (helper.unit(axis) for axis in np.split(frames, 3, axis=1))
    across = [np.cross(b, n), np.cross(n, t), np.cross(t, b)]       # the inverse's rows times the determinant
    local = np.stack([np.einsum("nc,nc->n", normals, row) for row in across], axis=1)
    return helper.unit(local * np.sign(np.einsum("nc,nc->n", t, across[0]))[:, None])
