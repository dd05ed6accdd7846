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
from tracing.compiling import compiled, in_threads

BLOCK = 1 << 18     # texels per block
MOST_STEPS = 3      # of Newton's method
FAR = 5e-4          # steps longer than this, in radii of the unit sphere, are followed by another one
TINY = 1e-30
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
    look = Look(mesh.vertex_normals, np.zeros((len(mesh.vertices), 3), np.float32)) if look is None else look
    atlas = atlases.unwrapped(mesh, size)
    texels, frame = atlases.texels_of(atlas, size), vertex_frames(mesh, atlas)
    gradient = surface.gradient(mesh.vertices.astype(np.float32))
    known = [mesh.vertices, gradient, look.towards, look.base] + ([look.below] if look.light else [])
    values = np.concatenate([np.concatenate(known, axis=1)[atlas.vertices], frame], axis=1).astype(np.float32)
    images = np.zeros((3 if look.light else 2, size * size, 3), np.uint8)
    for start in tqdm(range(0, len(texels.places), BLOCK), desc="texture", unit="block", leave=False,
                      dynamic_ncols=True, disable=len(texels.places) <= BLOCK):
        part = slice(start, start + BLOCK)
        here = atlases.surface_texels(atlas, values, texels, part)
        points = surface_points(surface, here[:, :3].copy(), here[:, 3:6], helper.unit(here[:, 6:9]))
        for image, first, light in zip((0, 2), range(9, values.shape[1] - 9, 3), (None, look.light)):
            seen = points._replace(rgb=np.clip(points.rgb + here[:, first:first + 3], 0, 1))
            images[image, texels.places[part]] = 255 * (appearance(seen, light) if appearance else seen.rgb) + 0.5
        images[1, texels.places[part]] = mapped_normals(points.normals, here[:, -9:])
    images = images.reshape(len(images), size, size, 3)
    atlases.fill(images, texels.places)
    return Asset(mesh, atlas, *images, **({"light": look.light} if look.light else {}))


def surface_points(surface: Surface, near: np.ndarray, slopes: np.ndarray, towards: np.ndarray) -> Points:
    """Return the Points of the surface at points (N, 3) near it.

    slopes: (N, 3), roughly the sdf's gradient there; towards: (N, 3), unit length, the ways to the eyes.
    """
    step = newton_step(surface.closed_sdf(near), slopes)
    points, moving = near + step, np.flatnonzero(far(step))
    for _ in range(MOST_STEPS - 1):
        if not len(moving):
            break
        step = newton_step(surface.closed_sdf(points[moving]), slopes[moving])
        points[moving] += step
        moving = moving[far(step)]
    # Where a face lies far from a surface with folds, the steps may lead astray: the face's own point is better then.
    if len(moving):
        astray = np.abs(surface.closed_sdf(points[moving])) > np.abs(surface.closed_sdf(near[moving]))
        points[moving[astray]] = near[moving[astray]]
    rgb, gradient = surface.colors_and_gradient(points, towards)
    return Points(points, helper.unit(gradient), rgb)


def far(steps: np.ndarray) -> np.ndarray:
    """Return which steps (N, 3) are longer than FAR, (N,) bool."""
    return np.einsum("nc,nc->n", steps, steps) > FAR ** 2


# --- tangent space ----------------------------------------------------------------------------------------------------

def vertex_frames(mesh: trimesh.Trimesh, atlas: atlases.Atlas) -> np.ndarray:
    """Return tangent, bitangent and normal of the atlas's vertices, (W, 9) float32, each of unit length."""
    normals, tangents = mesh.vertex_normals[atlas.vertices], atlases.tangents_of(mesh, atlas)
    return np.concatenate([tangents[:, :3], np.cross(normals, tangents[:, :3]) * tangents[:, 3:], normals],
                          axis=1).astype(np.float32)


def mapped_normals(normals: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Return unit normals (N, 3) as a normal map's values (N, 3) uint8. frames: (N, 9), interpolated vertex_frames."""
    out = np.empty((len(normals), 3), np.uint8)
    in_threads(lambda part: map_normals(normals[part], frames[part], out[part]), len(out), atlases.SLICE)
    return out


@compiled
def map_normals(normals, frames, out):
    """Write mapped_normals: in tangent space, as a viewer undoes it, with the interpolated axes at unit length."""
    for i in range(len(normals)):
        n, t, b, up = normals[i], frames[i, 0:3], frames[i, 3:6], frames[i, 6:9]
        # The axes are not quite at right angles, so the matrix of unit axes is inverted, up to a factor above 0.
        sign = 1 if triple(t, b, up) >= 0 else -1
        x, y, z = length(t) * triple(n, b, up), length(b) * triple(n, up, t), length(up) * triple(n, t, b)
        scale = sign / max(np.sqrt(x * x + y * y + z * z), TINY)
        for c, value in enumerate((x, y, z)):
            out[i, c] = np.uint8(127.5 * scale * value + 128)   # rounded: 127.5 (n + 1) + 0.5


@compiled
def length(a):
    """Return the length of a vector (3,)."""
    return np.sqrt(a[0] * a[0] + a[1] * a[1] + a[2] * a[2])


@compiled
def triple(a, b, c):
    """Return the product a . (b x c) of vectors (3,)."""
    return (a[0] * (b[1] * c[2] - b[2] * c[1]) + a[1] * (b[2] * c[0] - b[0] * c[2])
            + a[2] * (b[0] * c[1] - b[1] * c[0]))
