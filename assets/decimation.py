"""Fewer faces for a mesh of an sdf's zero set: quadric decimation, then the vertices return to the zero set."""
from itertools import product
from typing import List, Tuple

import fast_simplification
import numpy as np
import trimesh
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

import helper
from assets.surface import Surface, newton_step
from tracing.compiling import compiled

MOST_STEPS = 4          # of Newton's method
TOLERANCE = 1e-5        # |sdf| of a vertex on the surface, in radii of the unit sphere
LONGEST_MOVE = 0.5      # of a vertex, in lengths of the mean edge
AGGRESSIVENESS = (7, 5, 3)      # of fast-simplification; lower values take longer and do less harm
SHARES = (1.0, 0.97, 0.94)      # of the faces that are asked for, in turn, until the mesh stays closed
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
    for share, aggressiveness in product(SHARES, AGGRESSIVENESS):
        few = trimesh.Trimesh(*fast_simplification.simplify(vertices, faces, target_count=round(share * num_faces),
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

    Two faces on the same corners, the rest of a part without thickness, are dropped. Where several pairs of faces meet
    in an edge, each pair gets an edge of its own, through a new vertex. Where several fans of faces meet in a vertex,
    each gets a vertex of its own. New vertices are a little way off. Vertices without faces are dropped.
    """
    _, first, groups, counts = np.unique(np.sort(mesh.faces, axis=1), axis=0, return_index=True, return_inverse=True,
                                         return_counts=True)
    alone = counts[groups.ravel()] == 1
    alone[first[counts % 2 == 1]] = True
    return apart_at_vertices(*apart_at_edges(mesh.vertices, mesh.faces[alone]))


def edge_numbers(faces: np.ndarray, num_vertices: int) -> np.ndarray:
    """Return a number for each side of faces (F, 3), (3 F,) int, the same for all sides of an edge."""
    first, second = faces.ravel(), faces[:, [1, 2, 0]].ravel()
    return np.minimum(first, second) * num_vertices + np.maximum(first, second)


def edges_of(faces: np.ndarray, num_vertices: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sides of faces in the order of their edges, and where each edge begins and how many sides it has.

    A side is three times its face plus its number. Side k goes from corner k to the next one.
    """
    edges = edge_numbers(faces, num_vertices)
    order = np.argsort(edges, kind="stable")
    return (order, *np.unique(edges[order], return_index=True, return_counts=True)[1:])


def apart_at_edges(vertices: np.ndarray, faces: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return vertices (V, 3) and faces (F, 3) in which no more than two faces share an edge, where that can be.

    A pair of faces that has the solid between them stays together. Its faces are halved at a vertex of their own.
    """
    while True:
        order, start, shared = edges_of(faces, len(vertices))
        new_vertices, new_faces, halved = [], [], set()
        for begin, count in zip(start[shared > 2], shared[shared > 2]):
            sides = order[begin:begin + count]
            if halved.isdisjoint(sides // 3):       # a face is halved at one edge at a time
                for pair in pairs_around(vertices, faces, sides):
                    corners = [np.roll(faces[side // 3], -(side % 3)) for side in pair]
                    middle = vertices[corners[0][:2]].mean(axis=0)
                    middle += APART * (vertices[[third for _, _, third in corners]].mean(axis=0) - middle)
                    number = len(vertices) + len(new_vertices)
                    new_vertices.append(middle)
                    new_faces += [half for a, b, c in corners for half in ((a, number, c), (number, b, c))]
                    halved.update(side // 3 for side in pair)
        if not halved:
            return vertices, faces
        kept = np.delete(faces, list(halved), axis=0)
        vertices, faces = np.concatenate([vertices, new_vertices]), np.concatenate([kept, new_faces])


def pairs_around(vertices: np.ndarray, faces: np.ndarray, sides: np.ndarray) -> List[Tuple[int, int]]:
    """Return pairs of the sides (n,) that share an edge, each pair with the solid between its faces; [] if n is odd.

    sides: of edges_of. Around the edge, the solid is on one side of the faces that run along it in one direction, and
    on the other side of those that run back.
    """
    corners = np.stack([np.roll(faces[side // 3], -(side % 3)) for side in sides])
    low, high = vertices[corners[0, :2].min()], vertices[corners[0, :2].max()]
    axis = (high - low) / max(np.linalg.norm(high - low), 1e-30)
    away = vertices[corners[:, 2]] - low
    across = np.cross(axis, np.eye(3)[np.abs(axis).argmin()])
    angles = np.arctan2(away @ np.cross(axis, across), away @ across)
    forwards, pairs = corners[:, 0] < corners[:, 1], []
    around = list(np.argsort(angles))
    if 2 * forwards.sum() != len(sides):
        return []
    while around:       # a face that runs forwards, and the one before it around the edge if that runs back
        at = next(i for i in range(len(around)) if forwards[around[i]] and not forwards[around[i - 1]])
        pairs.append((sides[around[at]], sides[around[at - 1]]))
        around = [place for i, place in enumerate(around) if i not in (at, (at - 1) % len(around))]
    return pairs


def apart_at_vertices(vertices: np.ndarray, faces: np.ndarray) -> trimesh.Trimesh:
    """Return the mesh of vertices (V, 3) and faces (F, 3) in which each fan of faces has a vertex of its own."""
    number = np.arange(faces.size).reshape(-1, 3)       # of each face's corners
    order, start, shared = edges_of(faces, len(vertices))
    one, other = order[start[shared == 2]], order[start[shared == 2] + 1]     # the two faces at an edge
    starts, ends = number.ravel(), number[:, [1, 2, 0]].ravel()
    # The two faces run along their edge in opposite directions.
    links = np.concatenate([starts[one], ends[one]]), np.concatenate([ends[other], starts[other]])
    graph = coo_matrix((np.ones(len(links[0]), np.int8), links), (faces.size, faces.size))
    count, fans = connected_components(graph, directed=False)
    owners = np.empty(count, np.int64)
    owners[fans] = faces.ravel()
    own, centres = vertices[owners], np.zeros((count, 3))
    np.add.at(centres, fans, vertices[faces].mean(axis=1).repeat(3, axis=0))
    centres /= np.bincount(fans, minlength=count)[:, None]
    several = np.bincount(owners, minlength=len(vertices))[owners] > 1
    own[several] += APART * (centres - own)[several]
    return trimesh.Trimesh(own, fans.reshape(-1, 3), process=False)


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
    return len(mesh.faces) > 0 and bool(all_paired(np.ascontiguousarray(mesh.faces, np.int64), len(mesh.vertices)))


@compiled
def all_paired(faces, num_vertices):
    """Return whether each edge of faces (F, 3) int64 has exactly two of their sides."""
    start = np.zeros(num_vertices + 2, np.int64)        # of each lower end, among the higher ends
    for face in range(len(faces)):
        for k in range(3):
            start[min(faces[face, k], faces[face, (k + 1) % 3]) + 2] += 1
    for vertex in range(num_vertices):
        start[vertex + 2] += start[vertex + 1]
    higher = np.empty(3 * len(faces), np.int64)
    for face in range(len(faces)):
        for k in range(3):
            a, b = faces[face, k], faces[face, (k + 1) % 3]
            higher[start[min(a, b) + 1]] = max(a, b)
            start[min(a, b) + 1] += 1
    for vertex in range(num_vertices):
        own = range(start[vertex], start[vertex + 1])
        for place in own:       # few enough to compare all pairs
            same = 0
            for other in own:
                same += higher[other] == higher[place]
            if same != 2:
                return False
    return True
