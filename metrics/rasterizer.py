"""A small software rasteriser, independent of the tracer and of the networks, that draws meshes as viewers do."""
import numpy as np

from assets.atlas import tangents_of
from assets.highlights import decoded, encoded, highlights
from assets.visibility import drawn
from helper import unit


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
    mapped[where] = unit(sum(local[:, [k]] * axes[k] for k in range(3)))
    if asset.light is None:
        rgb[where] = texture_at(asset.base_color / 255, uv)
    else:
        towards = unit(camera.pose[:3, 3] - interpolated(fragments, mesh.faces, mesh.vertices))
        shine = highlights(asset.light, mapped[where], towards[None])[0]
        rgb[where] = encoded(texture_at(decoded(asset.below / 255), uv) + shine)
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
