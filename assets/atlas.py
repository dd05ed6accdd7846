"""A mesh's atlas: every face has a place of its own in a square texture (xatlas), and every texel there its face."""
import warnings
from typing import List, NamedTuple

import numpy as np
import trimesh
import xatlas
from scipy.cluster.vq import kmeans2
from scipy.spatial import cKDTree

from tracing.compiling import compiled, in_threads

FACES_PER_PATCH = 400   # xatlas's time grows with the square of the faces that it gets at once
MOST_PATCHES = 512
PATCH_SAMPLES = 4000    # faces from which the patches are found
NORMAL_WEIGHT = 0.3     # of normals beside positions, in the distance between faces of a patch
PADDING = 4             # texels between charts of a texture of 1,024; grows with the root of the side
PACKED = 2048           # texels per side for which charts are packed at most: xatlas's time grows with it
SLICE = 1 << 16         # texels per thread and turn
RIM = 1.5               # texels around a chart that are computed as the chart's own


class Atlas(NamedTuple):
    """A mesh cut into charts, with the place of each in a square texture. W vertices are more than the mesh's V."""
    vertices: np.ndarray    # (W,) int, indices of the mesh's vertices; one at a seam occurs once per chart
    faces: np.ndarray       # (F, 3) int, indices below W, in the order of the mesh's faces
    uv: np.ndarray          # (W, 2) float32 in [0, 1]; v goes down, (0, 0) is the texture's upper left corner
    charts: int


class Texels(NamedTuple):
    """The texels of a texture that show a face, row by row."""
    places: np.ndarray          # (N,) int, row * size + column
    faces: np.ndarray           # (N,) int32
    barycentric: np.ndarray     # (N, 3) float32, of the texel's centre; a weight is negative just outside of the face


def unwrapped(mesh: trimesh.Trimesh, size: int) -> Atlas:
    """Return the Atlas of a mesh for a texture of size x size texels."""
    patches = patches_of(mesh)
    atlas, options = xatlas.Atlas(), xatlas.PackOptions()
    packed = min(size, PACKED)
    options.resolution, options.padding = packed, max(int(PADDING * (size / 1024) ** 0.5 * packed / size), 2)
    vertices, members = mesh.vertices.astype(np.float32), []
    for patch in patches:
        used, faces = np.unique(mesh.faces[patch], return_inverse=True)
        atlas.add_mesh(vertices[used], faces.reshape(-1, 3).astype(np.uint32))
        members.append(used)
    atlas.generate(xatlas.ChartOptions(), options)
    stretch = np.array([atlas.width, atlas.height], np.float32) / max(atlas.width, atlas.height)
    origins, uvs, faces, count = [], [], np.empty((len(mesh.faces), 3), np.int64), 0
    for number, (patch, used) in enumerate(zip(patches, members)):
        mapping, corners, uv = atlas[number]
        origins.append(used[mapping])
        uvs.append(uv * stretch)
        faces[patch] = corners.reshape(-1, 3) + np.int64(count)
        count += len(mapping)
    return Atlas(np.concatenate(origins), faces, np.concatenate(uvs).astype(np.float32), atlas.chart_count)


def patches_of(mesh: trimesh.Trimesh) -> List[np.ndarray]:
    """Return the faces of a mesh in patches of a few hundred that lie together and face alike, as arrays of indices."""
    count = int(np.clip(len(mesh.faces) // FACES_PER_PATCH, 1, MOST_PATCHES))
    features = np.concatenate([mesh.triangles_center / max(mesh.scale, 1e-12) * 2,
                               NORMAL_WEIGHT * mesh.face_normals], axis=1)
    rng = np.random.default_rng(0)
    samples = features[rng.choice(len(features), min(len(features), max(PATCH_SAMPLES, 8 * count)), replace=False)]
    start = samples[rng.choice(len(samples), count, replace=False)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # of empty patches, which do no harm
        centres = kmeans2(samples, start, iter=10, minit="matrix")[0] if count > 1 else start
    labels = cKDTree(centres).query(features)[1]
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def texels_of(atlas: Atlas, size: int) -> Texels:
    """Return the Texels of an atlas in a texture of size x size.

    Those with their centres in a face come first in choice; then come those within RIM texels of one, for the nearest
    face, so that interpolation between texels finds the face's own on either side of its edge.
    """
    corners = (atlas.uv[atlas.faces] * np.float32(size) - np.float32(0.5)).astype(np.float32)
    owner = face_of_texels(corners, size, RIM)
    places = np.flatnonzero(owner >= 0)
    faces, weights = owner.ravel()[places], np.empty((len(places), 3), np.float32)
    in_threads(lambda part: barycentric(corners, faces[part], places[part], size, weights[part]), len(places), SLICE)
    return Texels(places, faces, weights)


def face_of_texels(corners: np.ndarray, size: int, rim: float) -> np.ndarray:
    """Return the face of each texel, (size, size) int32, or -1. corners: (F, 3, 2) float32, texel centres at integers.
    """
    owner = np.empty((size, size), np.int32)
    in_threads(lambda rows: fill_rows(owner[rows], corners, rows.start, np.float32(rim)), size, max(size // 16, 64))
    return owner


@compiled
def fill_rows(owner, corners, first, rim):
    """Set the texels `owner` (h, size) of a texture's rows from `first` on to their faces, as face_of_texels."""
    height, size = owner.shape
    owner[:] = -1
    distance = np.full((height, size), np.float32(np.inf))
    for face in range(len(corners)):
        (ax, ay), (bx, by), (cx, cy) = corners[face]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        top, bottom = int(min(ay, by, cy) - rim) - first, int(max(ay, by, cy) + rim) + 2 - first
        if area == 0 or bottom <= 0 or top >= height:
            continue
        top, bottom = max(top, 0) + first, min(bottom, height) + first
        sign = np.float32(1) if area > 0 else np.float32(-1)
        ab = sign / max(np.hypot(bx - ax, by - ay), np.float32(1e-6))
        bc = sign / max(np.hypot(cx - bx, cy - by), np.float32(1e-6))
        ca = sign / max(np.hypot(ax - cx, ay - cy), np.float32(1e-6))
        left, right = max(int(min(ax, bx, cx) - rim), 0), min(int(max(ax, bx, cx) + rim) + 2, size)
        for y in range(top, bottom):
            for x in range(left, right):
                outside = max(-((bx - ax) * (y - ay) - (by - ay) * (x - ax)) * ab,
                              -((cx - bx) * (y - by) - (cy - by) * (x - bx)) * bc,
                              -((ax - cx) * (y - cy) - (ay - cy) * (x - cx)) * ca)
                if outside > 0:     # the lines' distance is too short beyond a corner: take the nearest edge's
                    a, b, c = corners[face]
                    outside = min(to_segment(x, y, a, b), to_segment(x, y, b, c), to_segment(x, y, c, a))
                outside = max(outside, np.float32(0))
                if outside <= rim and outside < distance[y - first, x]:
                    distance[y - first, x], owner[y - first, x] = outside, face


@compiled
def to_segment(x, y, start, end):
    """Return the distance of (x, y) from the segment between two points (2,)."""
    (ax, ay), (bx, by) = start, end
    dx, dy = bx - ax, by - ay
    along = min(max(((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, np.float32(1e-12)), 0.0), 1.0)
    return np.float32(np.hypot(x - ax - along * dx, y - ay - along * dy))


@compiled
def barycentric(corners, faces, places, size, weights):
    """Write the weights (N, 3) float32 of the corners (F, 3, 2) of `faces` (N,) at the texels `places` (N,)."""
    for n in range(len(faces)):
        (ax, ay), (bx, by), (cx, cy) = corners[faces[n]]
        x, y = places[n] % size, places[n] // size
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        b = ((x - ax) * (cy - ay) - (y - ay) * (cx - ax)) / area
        c = ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / area
        weights[n, 0], weights[n, 1], weights[n, 2] = 1 - b - c, b, c


def tangents_of(mesh: trimesh.Trimesh, atlas: Atlas) -> np.ndarray:
    """Return the tangents (W, 4) float32 of an atlas's vertices, as glTF wants them.

    The first three are the unit direction of growing u, normal to the vertex's normal; the last is the sign of the
    bitangent, sign * cross(normal, tangent), which points up in the texture. Faces count by their corner's angle, as in
    MikkTSpace.
    """
    normals = mesh.vertex_normals[atlas.vertices]
    corners, uv = mesh.vertices[atlas.vertices][atlas.faces], atlas.uv[atlas.faces].astype(np.float64)
    edges, across = corners[:, 1:] - corners[:, :1], uv[:, 1:] - uv[:, :1]
    area = across[:, 0, 0] * across[:, 1, 1] - across[:, 0, 1] * across[:, 1, 0]
    along_u = np.sign(area)[:, None] * (across[:, 1, 1, None] * edges[:, 0] - across[:, 0, 1, None] * edges[:, 1])
    angles = trimesh.triangles.angles(corners)
    sums, mirrored = np.zeros((len(normals), 3)), np.zeros(len(normals))
    for corner in range(3):
        vertex, normal = atlas.faces[:, corner], normals[atlas.faces[:, corner]]
        flat = trimesh.unitize(along_u - (along_u * normal).sum(axis=1, keepdims=True) * normal)
        np.add.at(sums, vertex, flat * angles[:, corner, None])
        np.add.at(mirrored, vertex, np.sign(area) * angles[:, corner])
    tangents = orthogonal(sums, normals)
    # v goes down, so a chart seen from outside without a mirror has a negative area in (u, v).
    return np.concatenate([tangents, np.where(mirrored > 0, -1.0, 1.0)[:, None]], axis=1).astype(np.float32)


def orthogonal(tangents: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Return unit tangents (W, 3) normal to the unit normals (W, 3); where one vanishes, any direction serves."""
    tangents = tangents - (tangents * normals).sum(axis=1, keepdims=True) * normals
    lengths = np.linalg.norm(tangents, axis=1)
    lost = lengths < 1e-9
    axis = np.eye(3)[np.abs(normals[lost]).argmin(axis=1)]
    tangents[lost] = np.cross(normals[lost], axis)
    return trimesh.unitize(tangents)


def fill(images: np.ndarray, places: np.ndarray) -> None:
    """Give each texel of images (K, T, T, C) that is not among `places` (N,) the nearest one's values.

    So no background enters where texels are interpolated or a texture is shrunk (mipmaps).
    """
    import cv2
    empty = np.ones(images.shape[1:3], np.uint8)
    empty.ravel()[places] = 0
    labels = cv2.distanceTransformWithLabels(empty, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1].ravel()
    nearest = np.zeros(labels.max() + 1, np.int64)
    nearest[labels[places]] = places
    holes = np.flatnonzero(empty)
    sources = nearest[labels[holes]]
    for image in images:
        flat = image.reshape(-1, image.shape[-1])
        flat[holes] = flat[sources]


def surface_texels(atlas: Atlas, values: np.ndarray, texels: Texels, part: slice) -> np.ndarray:
    """Return values (W, C) of the atlas's vertices, interpolated at a part of the texels, (n, C) float32."""
    faces, weights = texels.faces[part], texels.barycentric[part]
    out = np.empty((len(faces), values.shape[1]), np.float32)
    values = np.ascontiguousarray(values, np.float32)
    in_threads(lambda some: interpolate(atlas.faces, values, faces[some], weights[some], out[some]), len(out), SLICE)
    return out


@compiled
def interpolate(corners, values, faces, weights, out):
    """Write values (W, C) at points of `faces` (N,) with barycentric weights (N, 3) to out (N, C) float32."""
    for n in range(len(faces)):
        a, b, c = corners[faces[n]]
        for k in range(values.shape[1]):
            out[n, k] = weights[n, 0] * values[a, k] + weights[n, 1] * values[b, k] + weights[n, 2] * values[c, k]
