"""A small software rasteriser, independent of the tracer and of the networks, that draws meshes as viewers do."""
from typing import NamedTuple

import numba
import numpy as np

from assets.atlas import tangents_of
from helper import unit


class Fragments(NamedTuple):
    """What the pixels of a picture show."""
    face: np.ndarray        # (H, W) int32, -1 for none
    weights: np.ndarray     # (H, W, 3), barycentric, right in perspective


def drawn(vertices, faces, camera):
    """Return the Fragments of a mesh seen by a helper.Camera; the faces' backs are not drawn."""
    local = (vertices - camera.pose[:3, 3]) @ camera.pose[:3, :3]
    depth = local[:, 2]
    pixels = local @ np.asarray(camera.intrinsics).T
    return Fragments(*fill(pixels[:, :2] / depth[:, None], depth, np.asarray(faces), *camera.shape))


@numba.njit(cache=True)
def fill(pixels, depth, faces, height, width):
    nearest = np.full((height, width), np.inf)
    face, weights = np.full((height, width), np.int32(-1)), np.zeros((height, width, 3))
    for number in range(len(faces)):
        a, b, c = faces[number]
        (ax, ay), (bx, by), (cx, cy) = pixels[a], pixels[b], pixels[c]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area >= 0:       # y points down, so that a front is clockwise
            continue
        for y in range(max(int(np.ceil(min(ay, by, cy))), 0), min(int(max(ay, by, cy)) + 1, height)):
            for x in range(max(int(np.ceil(min(ax, bx, cx))), 0), min(int(max(ax, bx, cx)) + 1, width)):
                v = ((x - ax) * (cy - ay) - (y - ay) * (cx - ax)) / area
                w = ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / area
                u = 1 - v - w
                if u < 0 or v < 0 or w < 0:
                    continue
                u, v, w = u / depth[a], v / depth[b], w / depth[c]
                total = u + v + w
                if 1 / total < nearest[y, x]:
                    nearest[y, x], face[y, x] = 1 / total, number
                    weights[y, x] = u / total, v / total, w / total
    return face, weights


def interpolated(fragments, faces, values):
    """Return values (V, C) of a mesh's vertices at the pixels that show it, (N, C)."""
    shown = fragments.face >= 0
    return np.einsum("nk,nkc->nc", fragments.weights[shown], values[faces[fragments.face[shown]]])


def texture_at(image, uv):
    """Return an image (H, W, C) in [0, 1], float, between its texels at uv (N, 2); v goes down, as in glTF."""
    place = uv * [image.shape[1], image.shape[0]] - 0.5
    low = np.floor(place).astype(int)
    share, out = place - low, 0.0
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = (np.clip(low[:, i] + d, 0, image.shape[1 - i] - 1) for i, d in ((0, dx), (1, dy)))
            weight = np.abs(1 - dx - share[:, 0]) * np.abs(1 - dy - share[:, 1])
            out = out + weight[:, None] * image[y, x]
    return out


def shown(asset, camera):
    """Return what a helper.Camera shows of a baking.Asset: colours (H, W, 3), mapped normals (H, W, 3), and where.

    Colours are in [0, 1], and white beside the asset. Normals are computed as glTF's viewers do, and 0 beside it.
    """
    mesh, atlas = asset.mesh, asset.atlas
    fragments = drawn(mesh.vertices, mesh.faces, camera)
    where = fragments.face >= 0
    tangents, normals = tangents_of(mesh, atlas), mesh.vertex_normals[atlas.vertices]
    bitangents = np.cross(normals, tangents[:, :3]) * tangents[:, 3:]
    uv = interpolated(fragments, atlas.faces, atlas.uv)
    local = texture_at(asset.normal_map / 127.5 - 1, uv)
    axes = [unit(interpolated(fragments, atlas.faces, axis)) for axis in (tangents[:, :3], bitangents, normals)]
    rgb, mapped = np.ones(camera.shape + (3,)), np.zeros(camera.shape + (3,))
    rgb[where] = texture_at(asset.base_color / 255, uv)
    mapped[where] = unit(sum(local[:, [k]] * axes[k] for k in range(3)))
    return rgb, mapped, where


def edges_shown(mesh, camera, pixels=1.0):
    """Return where the edges of a mesh's faces are seen, (H, W) bool, about that many pixels wide."""
    fragments = drawn(mesh.vertices, mesh.faces, camera)
    local = (mesh.vertices - camera.pose[:3, 3]) @ camera.pose[:3, :3] @ np.asarray(camera.intrinsics).T
    corners = (local[:, :2] / local[:, 2:])[mesh.faces[fragments.face]]
    sides = np.linalg.norm(corners - np.roll(corners, -1, axis=2), axis=-1)
    a, b = corners[..., 1, :] - corners[..., 0, :], corners[..., 2, :] - corners[..., 0, :]
    double_area = np.abs(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0])
    heights = fragments.weights * (double_area[..., None] / np.roll(sides, -1, axis=-1))    # from the opposite side
    return (fragments.face >= 0) & (heights.min(axis=-1) < pixels / 2)
