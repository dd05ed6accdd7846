"""Fewer faces for a mesh of an sdf's zero set: quadric decimation, then the vertices return to the zero set."""
import fast_simplification
import numpy as np
import trimesh
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

import helper
from assets.surface import Surface, newton_step

MOST_STEPS = 4          # of Newton's method
TOLERANCE = 1e-5        # |sdf| of a vertex on the surface, in radii of the unit sphere
LONGEST_MOVE = 0.5      # of a vertex, in lengths of the mean edge
AGGRESSIVENESS = (7, 5, 3, 1)   # of fast-simplification; lower values take longer and do less harm
APART = 1e-3            # way of a vertex that was one with another, in distances to the centre of its faces
FEWEST, MOST = 4, 10 ** 8       # faces


def decimated(mesh: trimesh.Trimesh, num_faces: int, surface: Surface) -> trimesh.Trimesh:
    """Return a mesh of about num_faces faces; its vertices lie on the zero set. A closed mesh stays closed.

    surface: whose zero set, closed by the unit sphere, the mesh is. A mesh that has no more faces is returned as it is.
    Raises UserError if a closed mesh has no closed form of so few faces.
    Source: Garland and Heckbert, SIGGRAPH 1997; fast-simplification's implementation.
    """
    if len(mesh.faces) <= num_faces:
        return mesh
    closed = is_closed(mesh)
    vertices, faces = mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32)
    for aggressiveness in AGGRESSIVENESS:
        few = trimesh.Trimesh(*fast_simplification.simplify(vertices, faces, target_count=num_faces,
                                                            agg=aggressiveness), process=False)
        few = few if is_closed(few) else untouched(few)
        if len(few.faces) and len(few.faces) <= 1.1 * num_faces and (is_closed(few) or not closed):
            moved = onto_zero_set(few.vertices.astype(np.float32), surface,
                                  LONGEST_MOVE * few.edges_unique_length.mean())
            return trimesh.Trimesh(moved, few.faces, process=False)
    raise helper.UserError(f"--faces {num_faces}: too few for this surface to stay closed; it has {len(mesh.faces)} "
                           "faces, so give a number nearer to that")


def untouched(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Return a mesh whose sides no longer touch, where collapsed edges made them meet in an edge or a vertex.

    Two faces on the same corners, the rest of a part without thickness, are dropped. Where several fans of faces meet
    in a vertex, each gets a vertex of its own, a little way off. Vertices without faces are dropped.
    """
    _, groups, counts = np.unique(np.sort(mesh.faces, axis=1), axis=0, return_inverse=True, return_counts=True)
    faces = mesh.faces[counts[groups.ravel()] == 1]
    number = np.arange(faces.size).reshape(-1, 3)       # of each face's corners
    first, second = faces[:, [0, 1, 2]].ravel(), faces[:, [1, 2, 0]].ravel()
    edges = np.minimum(first, second) * len(mesh.vertices) + np.maximum(first, second)
    order = np.argsort(edges, kind="stable")
    _, start, shared = np.unique(edges[order], return_index=True, return_counts=True)
    one, other = order[start[shared == 2]], order[start[shared == 2] + 1]     # the two faces at an edge
    starts, ends = number.ravel(), number[:, [1, 2, 0]].ravel()
    # The two faces run along their edge in opposite directions.
    links = np.concatenate([starts[one], ends[one]]), np.concatenate([ends[other], starts[other]])
    graph = coo_matrix((np.ones(len(links[0]), np.int8), links), (faces.size, faces.size))
    count, fans = connected_components(graph, directed=False)
    owners = np.empty(count, np.int64)
    owners[fans] = faces.ravel()
    vertices, centres = mesh.vertices[owners], np.zeros((count, 3))
    np.add.at(centres, fans, mesh.vertices[faces].mean(axis=1).repeat(3, axis=0))
    centres /= np.bincount(fans, minlength=count)[:, None]
    several = np.bincount(owners, minlength=len(mesh.vertices))[owners] > 1
    vertices[several] += APART * (centres - vertices)[several]
    return trimesh.Trimesh(vertices, fans.reshape(-1, 3), process=False)


def onto_zero_set(points: np.ndarray, surface: Surface, longest: float) -> np.ndarray:
    """Return points (N, 3) float32 moved along the sdf's gradient to the surface, by at most `longest`.

    A point that would go farther, or that ends no nearer to the zero set, stays where it is.
    """
    moved, values = points.copy(), surface.closed_sdf(points)
    before, away = np.abs(values), np.flatnonzero(np.abs(values) > TOLERANCE)
    for _ in range(MOST_STEPS):
        if not len(away):
            break
        moved[away] += newton_step(values[away], surface.gradient(moved[away]))
        values[away] = surface.closed_sdf(moved[away])
        away = away[np.abs(values[away]) > TOLERANCE]
    worse = (np.abs(values) > before) | (np.linalg.norm(moved - points, axis=1) > longest) | ~np.isfinite(values)
    moved[worse] = points[worse]
    return moved


def is_closed(mesh: trimesh.Trimesh) -> bool:
    """Return whether every edge of a mesh has two faces, as its is_watertight does in far more time."""
    ends = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    edges = np.sort(ends[:, 0] * len(mesh.vertices) + ends[:, 1])
    return len(edges) % 2 == 0 and (edges[::2] == edges[1::2]).all() and (edges[2::2] != edges[1:-1:2]).all()
