"""Fewer faces for a mesh of an sdf's zero set: quadric decimation, then the vertices return to the zero set."""
import fast_simplification
import numpy as np
import trimesh

import helper
from assets.surface import Surface, newton_step

MOST_STEPS = 4          # of Newton's method
TOLERANCE = 1e-5        # |sdf| of a vertex on the surface, in radii of the unit sphere
LONGEST_MOVE = 0.5      # of a vertex, in lengths of the mean edge
AGGRESSIVENESS = (7, 5, 3, 1)   # of fast-simplification; lower values take longer and do less harm
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
        few = without_loose_vertices(few)
        if len(few.faces) and (is_closed(few) or not closed):
            moved = onto_zero_set(few.vertices.astype(np.float32), surface,
                                  LONGEST_MOVE * few.edges_unique_length.mean())
            return trimesh.Trimesh(moved, few.faces, process=False)
    raise helper.UserError(f"--faces {num_faces}: too few for this surface to stay closed; it has {len(mesh.faces)} "
                           "faces, so give a number nearer to that")


def without_loose_vertices(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Return a mesh without vertices that have no face."""
    used, faces = np.unique(mesh.faces, return_inverse=True)
    return trimesh.Trimesh(mesh.vertices[used], faces.reshape(-1, 3), process=False)


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
