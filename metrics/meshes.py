"""Distance of a mesh from the true surface: Chamfer distance and normal consistency, and DTU's own protocol."""
import contextlib
import io
import logging
import multiprocessing
import os
import re
import signal
import warnings
from pathlib import Path
from typing import Callable, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import trimesh
from scipy.io import loadmat
from scipy.spatial import cKDTree

import helper
from tracing.compiling import compiled

SURFACE_SAMPLES = 200000    # points sampled on a mesh
NEAREST = 12                # faces near a point whose distances are computed
DTU_SPACING = 0.2           # mm, the least distance between points of a mesh in DTU's protocol
DTU_FARTHEST = 20.0         # mm; points farther from their counterpart are outliers and do not count

KINDS = ("ply", "obj", "stl", "glb", "off")     # of mesh files; other kinds are archives or refer to further files
LARGEST = 1e12              # bound on coordinates; beyond it, lengths and areas overflow
# A reader may take SMALL_FILE bytes of memory plus GROWTH times the file's size, and PATIENCE seconds plus the file's
# size / BYTES_PER_SECOND.
SMALL_FILE = 1 << 29
GROWTH = 40
PATIENCE = 8
BYTES_PER_SECOND = 1 << 20

Shape = Union[trimesh.Trimesh, trimesh.PointCloud]


class Surface(NamedTuple):
    """Points on a surface."""
    points: np.ndarray              # (N, 3) float64
    normals: Optional[np.ndarray]   # (N, 3) float64, unit length; None if unknown


class Distances(NamedTuple):
    """Mean distances between two surfaces, in the points' unit."""
    accuracy: float         # from ours to the true one
    completeness: float     # from the true one to ours
    chamfer: float          # the mean of both


class DtuScan(NamedTuple):
    """The true surface of a DTU scan and its evaluation region, in millimetres."""
    points: np.ndarray      # (M, 3), of the structured-light scan
    observed: np.ndarray    # (X, Y, Z) bool, the voxels to evaluate
    corner: np.ndarray      # (3,), the centre of voxel 0
    step: float             # between voxels
    ground: np.ndarray      # (4,), the ground plane, positive above it


# --- surfaces from files ----------------------------------------------------------------------------------------------

def load_shape(path: Union[str, Path]) -> Shape:
    """Return the mesh of a PLY, OBJ, STL, GLB or OFF file, or its point cloud if it has no faces.

    A point cloud's metadata["normals"] are those of a PLY file, (N, 3), or None. No other file is read.
    Raises UserError if the file cannot be read, is empty, has coordinates that are not finite, or takes too much memory
    or time.
    """
    points, faces, normals = read_apart(read_shape, path)
    if faces is None:
        return trimesh.PointCloud(points, metadata={"normals": normals})
    return trimesh.Trimesh(points, faces, process=False)


def read_shape(path: Union[str, Path]) -> Tuple[np.ndarray, Optional[np.ndarray], Optional[np.ndarray]]:
    """Return the points (N, 3), the faces (M, 3) or None, and the normals (N, 3) or None of a file of one of KINDS.

    Raises UserError as load_shape does, or any exception of the libraries.
    """
    kind = Path(path).suffix.lower()[1:]
    if kind not in KINDS:
        raise helper.UserError(f"{path}: meshes and point clouds are read from .{', .'.join(KINDS)} files; convert it")
    # trimesh gets bytes without a path, or it would read the materials and textures that the file refers to.
    scene = trimesh.load_scene(io.BytesIO(Path(path).read_bytes()), file_type=kind, process=False, skip_materials=True)
    points, faces, count = [np.empty((0, 3))], [np.empty((0, 3), np.int64)], 0
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        part = scene.geometry[name]
        if isinstance(part, (trimesh.Trimesh, trimesh.PointCloud)):
            corners = np.asarray(part.vertices, np.float64)
            if has_faces(part):
                if not 0 <= part.faces.min() <= part.faces.max() < len(corners):
                    raise helper.UserError(f"{path}: a face refers to a point that does not exist; replace this file")
                faces.append(part.faces + count)
            points.append(trimesh.transform_points(corners, transform))
            count += len(corners)
    points, faces = np.concatenate(points), np.concatenate(faces)
    if len(points) == 0 or not np.isfinite(points).all() or np.abs(points).max() > LARGEST:
        raise helper.UserError(f"{path}: has no points, or points that are huge or not finite; replace this file")
    if len(faces) == 0:
        return points, None, ply_normals(scene, len(points))
    if not trimesh.triangles.area(points[faces]).sum() > 0:
        raise helper.UserError(f"{path}: its faces have no area; replace this file")
    return points, faces, None


def ply_normals(scene: trimesh.Scene, count: int) -> Optional[np.ndarray]:
    """Return the unit normals (N, 3) of a PLY file's `count` points, or None if it has none."""
    for part in scene.geometry.values():
        data = part.metadata.get("_ply_raw", {}).get("vertex", {}).get("data")
        with contextlib.suppress(KeyError, ValueError, TypeError, IndexError):
            normals = np.stack([np.asarray(data[name], np.float64).ravel() for name in ("nx", "ny", "nz")], axis=1)
            lengths = np.linalg.norm(normals, axis=1, keepdims=True)
            if len(normals) == count and np.isfinite(lengths).all():
                return normals / np.maximum(lengths, 1e-12)
    return None


def read_apart(read: Callable, path: Union[str, Path], *arguments):
    """Return read(path, *arguments), called in a process of its own; raise UserError if it fails.

    A small file may claim any number of points, and the libraries believe it. So the process is ended if it takes much
    more memory or time than files of its size need.
    """
    helper.check_is_file(path)
    size = os.path.getsize(str(path))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, size, read, path, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(PATIENCE + size // BYTES_PER_SECOND):
            raise helper.UserError(f"{path}: reading takes too long for a file of its size; replace it")
        complaint, result = receiver.recv()
    except EOFError as error:
        raise helper.UserError(f"{path}: damaged, or takes too much memory to read; replace it") from error
    finally:
        process.kill()
        process.join()
        receiver.close()
    if complaint:
        raise helper.UserError(complaint)
    return result


def answer(sender, size: int, read: Callable, path: Union[str, Path], *arguments) -> None:
    """Send ("", read(path, *arguments)), or (a complaint, None), within the memory for a file of `size` bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the parent process handles Ctrl-C
    logging.disable()
    warnings.simplefilter("ignore")
    with contextlib.suppress(ImportError, OSError, ValueError):     # not available on every system
        import resource
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = used + SMALL_FILE + GROWTH * size
        resource.setrlimit(resource.RLIMIT_AS, (most if limit < 0 else min(most, limit), hard))
    try:
        with np.errstate(all="ignore"):
            message = "", read(path, *arguments)
    except helper.UserError as error:
        message = str(error), None
    except Exception as error:  # damaged files make trimesh and SciPy raise anything
        message = f"{path}: cannot be read ({type(error).__name__}); replace this file", None
    with contextlib.suppress(MemoryError):
        sender.send(message)


def has_faces(shape: Shape) -> bool:
    """Return whether a shape is a mesh, not a point cloud."""
    return len(getattr(shape, "faces", ())) > 0


def surface(shape: Shape, count: int = SURFACE_SAMPLES) -> Surface:
    """Return `count` points of a mesh, uniform over its area, or all points of a point cloud.

    The normals are those of a mesh's faces, or those in a point cloud's PLY file, if any.
    """
    if has_faces(shape):
        points, faces = trimesh.sample.sample_surface(shape, count, seed=0)
        return Surface(np.asarray(points, np.float64), np.asarray(shape.face_normals[faces], np.float64))
    return Surface(np.asarray(shape.vertices, np.float64), shape.metadata.get("normals"))


# --- the measures -----------------------------------------------------------------------------------------------------

def compare(ours: Surface, truth: Surface) -> Tuple[Distances, Optional[float]]:
    """Return the Distances and the normal consistency of two surfaces.

    A distance is that of a point from the nearest one of the other surface. Since samples lie apart, equal surfaces
    have distances slightly above 0. The normal consistency is the mean |cosine| between the normals of these pairs of
    points, averaged over both directions (Mescheder et al., CVPR 2019): 1 for equal surfaces, None if a surface has no
    normals.
    """
    to_truth, nearest_true = cKDTree(truth.points).query(ours.points, workers=-1)
    to_ours, nearest_ours = cKDTree(ours.points).query(truth.points, workers=-1)
    accuracy, completeness, consistency = to_truth.mean(), to_ours.mean(), None
    if ours.normals is not None and truth.normals is not None:
        pairs = (ours.normals, truth.normals[nearest_true]), (truth.normals, ours.normals[nearest_ours])
        consistency = sum(np.abs(np.einsum("nx,nx->n", *pair)).mean() for pair in pairs) / 2
    return Distances(accuracy, completeness, (accuracy + completeness) / 2), consistency


def thinned(points: np.ndarray, spacing: float, seed: int = 0) -> np.ndarray:
    """Return the points (M, 3), of (N, 3) in random order, that are not within `spacing` of an earlier one kept.

    Works in rounds instead of one by one: each keeps the points without an undecided earlier neighbour, and drops the
    later neighbours of these.
    """
    points = points[np.random.default_rng(seed).permutation(len(points))]
    pairs = cKDTree(points).query_pairs(spacing, output_type="ndarray")
    first, second = pairs.min(axis=1), pairs.max(axis=1)
    taken, undecided = np.zeros(len(points), bool), np.ones(len(points), bool)
    while undecided.any():
        waiting = np.zeros(len(points), bool)
        waiting[second] = True
        chosen = undecided & ~waiting
        taken |= chosen
        undecided &= ~chosen
        undecided[second[chosen[first]]] = False
        open_pairs = undecided[first] & undecided[second]
        first, second = first[open_pairs], second[open_pairs]
    return points[taken]


def mesh_distances(ours: trimesh.Trimesh, truth: trimesh.Trimesh, count: int = 20000) -> Distances:
    """Return the Distances between two meshes that nearly agree, from `count` points sampled on each.

    A distance is that of a point from the other mesh's faces, not from samples of it. So equal meshes have distances
    of 0. Only the faces with the NEAREST centres are tried, so a distance may come out too long, never too short.
    """
    means = [distances_to_faces(samples_of(one, count), other).mean() for one, other in ((ours, truth), (truth, ours))]
    return Distances(means[0], means[1], sum(means) / 2)


def samples_of(mesh: trimesh.Trimesh, count: int) -> np.ndarray:
    """Return points (count, 3) that lie evenly on a mesh's faces, always the same ones."""
    areas = areas_of(np.asarray(mesh.vertices), np.asarray(mesh.faces))     # in a third of trimesh's time
    return trimesh.sample.sample_surface(mesh, count, face_weight=areas, seed=0)[0]


@compiled
def areas_of(vertices, faces):
    """Return the areas (F,) of faces (F, 3) of vertices (V, 3)."""
    out = np.empty(len(faces))
    for n in range(len(faces)):
        a, b, c = vertices[faces[n, 0]], vertices[faces[n, 1]], vertices[faces[n, 2]]
        x, y, z = b[0] - a[0], b[1] - a[1], b[2] - a[2]
        u, v, w = c[0] - a[0], c[1] - a[1], c[2] - a[2]
        out[n] = np.sqrt((y * w - z * v) ** 2 + (z * u - x * w) ** 2 + (x * v - y * u) ** 2) / 2
    return out


def distances_to_faces(points: np.ndarray, mesh: trimesh.Trimesh) -> np.ndarray:
    """Return the distances (N,) of points (N, 3) from the nearest of the NEAREST faces of a mesh."""
    count = min(NEAREST, len(mesh.faces))
    tree = cKDTree(mesh.triangles_center, balanced_tree=False)
    faces = tree.query(points, count, workers=-1)[1].reshape(len(points), count)
    targets = points.repeat(count, axis=0)
    found = trimesh.triangles.closest_point(mesh.triangles[faces.ravel()], targets)
    return np.linalg.norm(found - targets, axis=1).reshape(len(points), count).min(axis=1)


# --- DTU's protocol (Jensen et al., CVPR 2014; Aanaes et al., IJCV 2016) ----------------------------------------------

def load_dtu(folder: Union[str, Path], scene_name: str) -> DtuScan:
    """Read a scan's data for DTU's evaluation, from files anywhere below `folder`.

    scene_name: such as scan65. Its points are read from stl065_total.ply, the observed voxels from ObsMask65_10.mat,
    and the ground plane from Plane65.mat. Raises UserError if a file is missing or not as DTU's.
    """
    number = re.fullmatch(r"(?i)(?:dtu_)?scan_?0*(\d+)", scene_name)
    if not number:
        raise helper.UserError(f"--dtu: the scene {scene_name} is not a DTU scan; data.path must end in a name such as "
                               "scan65")
    scan = int(number.group(1))
    points = surface(load_shape(below(folder, f"stl{scan:03d}_total.ply"))).points
    mask_file, plane_file = below(folder, f"ObsMask{scan}_10.mat"), below(folder, f"Plane{scan}.mat")
    mask, box, step = read_mat(mask_file, "ObsMask", "BB", "Res")
    (plane,) = read_mat(plane_file, "P")
    if mask.ndim != 3 or box.shape != (2, 3) or step.size != 1 or plane.size != 4:
        raise helper.UserError(f"{mask_file if plane.size == 4 else plane_file}: its arrays are not shaped as DTU's; "
                               "replace it")
    for file, numbers in ((mask_file, box), (mask_file, step), (plane_file, plane)):
        if not np.isfinite(numbers).all() or np.abs(numbers.astype(float)).max() > LARGEST or step.min() <= 0:
            raise helper.UserError(f"{file}: has numbers that are huge or not finite, or a grid step that is not "
                                   "positive; replace it")
    return DtuScan(points, mask > 0, box[0].astype(float), float(step.ravel()[0]), plane.ravel().astype(float))


def below(folder: Union[str, Path], name: str) -> Path:
    """Return the path of the file `name` at any depth below a folder, the first in sorted order; UserError if none."""
    found, pending = [], [str(folder)]
    while pending:      # no recursion: os.walk and rglob fail in folders deeper than Python's limit
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.name == name:
                    found.append(Path(entry.path))
    if not found:
        raise helper.UserError(f"{folder}: there is no {name} in it; unpack DTU's SampleSet.zip (masks, planes) and "
                               "Points.zip (stl scans) there")
    return min(found)


def read_mat(path: Union[str, Path], *names: str) -> List[np.ndarray]:
    """Return the numeric arrays `names` of a MATLAB file; raise UserError if one is missing or cannot be read."""
    return read_apart(read_arrays, path, *names)


def read_arrays(path: Union[str, Path], *names: str) -> List[np.ndarray]:
    """Do read_mat's work, in the process that read_apart starts."""
    arrays = loadmat(str(path), variable_names=names)
    for name in names:
        if name not in arrays:
            raise helper.UserError(f"{path}: has no array {name}, unlike DTU's file; replace it")
        if not isinstance(arrays[name], np.ndarray) or arrays[name].dtype.kind not in "buif":
            raise helper.UserError(f"{path}: {name} is not an array of numbers, unlike DTU's; replace it")
    return [arrays[name] for name in names]


def compare_dtu(shape: Shape, scan: DtuScan) -> Distances:
    """Return the Distances (mm) between a shape in world units and a DtuScan, by DTU's protocol.

    The shape is sampled to points at least 0.2 mm apart. Accuracy is measured from its points in observed voxels to the
    scan, completeness from the scan's points above the ground to all its points. Distances of 20 mm or more do not
    count. Raises UserError if the shape is not in millimetres or nowhere near the scan.
    """
    if not 5 < shape.extents.max() < 5000:
        raise helper.UserError(f"--dtu compares in millimetres, but this mesh is {shape.extents.max():.3g} mm long; "
                               "make it with extract.py --world")
    count = int(2 * shape.area / DTU_SPACING ** 2) if has_faces(shape) else 0   # 6 per disc of that radius: few gaps
    points = thinned(surface(shape, count).points, DTU_SPACING)
    voxels = np.floor((points - scan.corner) / scan.step + 0.5).astype(int)
    seen = ((voxels >= 0) & (voxels < scan.observed.shape)).all(axis=1)
    seen[seen] = scan.observed[tuple(voxels[seen].T)]
    above = scan.points @ scan.ground[:3] + scan.ground[3] > 0
    to_scan = cKDTree(scan.points).query(points[seen], distance_upper_bound=DTU_FARTHEST, workers=-1)[0]
    to_ours = cKDTree(points).query(scan.points[above], distance_upper_bound=DTU_FARTHEST, workers=-1)[0]
    means = []
    for distances in (to_scan, to_ours):
        distances = distances[distances < DTU_FARTHEST]     # SciPy returns inf if no point is in range
        if len(distances) == 0:
            raise helper.UserError(f"--dtu: no observed part of the mesh is within {DTU_FARTHEST:.0f} mm of the scan; "
                                   "make the mesh of this very scan, with extract.py --world")
        means.append(distances.mean())
    return Distances(means[0], means[1], sum(means) / 2)
