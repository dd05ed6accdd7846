"""Which faces a camera sees: a small software rasteriser, and the vertices that nothing hides."""
from typing import NamedTuple

import numpy as np
import trimesh

import helper
from tracing.compiling import compiled

SIDE = 512              # pixels of the pictures from which the vertices' visibility is read
FLATTEST = 0.05         # cosine of the flattest view of the surface that counts


class Fragments(NamedTuple):
    """What the pixels of a picture show."""
    face: np.ndarray        # (H, W) int32, -1 for none
    weights: np.ndarray     # (H, W, 3), barycentric, right in perspective
    depth: np.ndarray       # (H, W), along the camera's axis; inf for none


def drawn(vertices: np.ndarray, faces: np.ndarray, camera: helper.Camera) -> Fragments:
    """Return the Fragments of a mesh (V, 3), (F, 3) seen by a camera; the faces' backs are not drawn."""
    local = (vertices - camera.pose[:3, 3]) @ camera.pose[:3, :3]
    depth = local[:, 2]
    pixels = local @ np.asarray(camera.intrinsics).T
    return Fragments(*fill(pixels[:, :2] / depth[:, None], depth, np.asarray(faces), *camera.shape))


@compiled
def fill(pixels, depth, faces, height, width):
    """Return the Fragments' arrays of faces (F, 3) whose vertices are at pixels (V, 2) and at a depth (V,)."""
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
    return face, weights, nearest


def cosines_seen(mesh: trimesh.Trimesh, centre: np.ndarray) -> np.ndarray:
    """Return the cosines (V,) float32 between a mesh's vertex normals and the ways to a camera at `centre` (3,).

    A vertex that the mesh hides, or that is flatter than FLATTEST, has 0. So have all for a camera within the mesh.
    """
    vertices, middle = mesh.vertices, mesh.bounds.mean(axis=0)
    reach, distance = np.linalg.norm(mesh.extents) / 2, np.linalg.norm(middle - centre)
    if distance <= 1.01 * reach:
        return np.zeros(len(vertices), np.float32)
    forward = (middle - centre) / distance
    right = helper.rightwards(forward, np.eye(3)[np.abs(forward).argmin()])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = np.stack([right, np.cross(forward, right), forward], axis=1), centre
    focal = (SIDE / 2 - 2) * np.sqrt(distance ** 2 - reach ** 2) / reach
    camera = helper.Camera(np.array([[focal, 0, SIDE / 2], [0, focal, SIDE / 2], [0, 0, 1]]), pose, (SIDE, SIDE))
    local = (vertices - centre) @ pose[:3, :3]
    pixels, away = focal * local[:, :2] / local[:, 2:] + SIDE / 2, np.linalg.norm(local, axis=1)
    cosines = np.einsum("nc,nc->n", mesh.vertex_normals, centre - vertices) / away
    slack = local[:, 2] / focal / np.maximum(cosines, FLATTEST)
    free = shares_visible(drawn(vertices, mesh.faces, camera).depth, pixels, local[:, 2], slack)
    return np.where(cosines > FLATTEST, cosines * free, 0).astype(np.float32)


@compiled
def shares_visible(depths, pixels, depth, slack):
    """Return `visible` of each of N points at pixels (N, 2), by their depth (N,) and slack (N,)."""
    out = np.empty(len(pixels))
    for n in range(len(pixels)):
        out[n] = visible(depths, pixels[n, 0], pixels[n, 1], depth[n], slack[n])
    return out


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
