"""How far a mesh is from the true surface: Chamfer distance and normal consistency, freely or in DTU's own protocol.

Imports nothing of the other scripts but helper.
"""
import contextlib
import io
import logging
import multiprocessing
import os
import re
import signal
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import trimesh
from scipy.io import loadmat
from scipy.spatial import cKDTree

import helper

SURFACE_SAMPLES = 200000    # points taken of a mesh
DTU_SPACING = 0.2           # mm between the points of a mesh in DTU's protocol
DTU_FARTHEST = 20.0         # mm; what is farther from its counterpart counts as an outlier, and not at all

KINDS = ("ply", "obj", "stl", "glb", "off")     # of files of meshes; others hold archives, or name files to read
LARGEST = 1e12              # of coordinates: beyond, lengths and areas overflow
SMALL_FILE = 1 << 29        # bytes of memory that a reader may take, and GROWTH times the file's size
GROWTH = 40
PATIENCE = 8                # seconds that a reader may take, and one more for each of these bytes of the file:
BYTES_PER_SECOND = 1 << 20

Surface = namedtuple("Surface", "points normals")       # (N, 3) float64 each; the normals, of length 1, may be None
Distances = namedtuple("Distances", "accuracy completeness chamfer")
DtuScan = namedtuple("DtuScan", "points observed corner step ground")


# --- surfaces from files ----------------------------------------------------------------------------------------------

def load_shape(path):
    """What a PLY, OBJ, STL, GLB or OFF file holds, as a trimesh.Trimesh with faces, else a trimesh.PointCloud.

    A point cloud's metadata has the normals (N, 3) that a PLY file gives it, or None. No other file is read. Raises
    UserError for what cannot be read, holds neither or coordinates that are not finite, or takes too much memory.
    """
    points, faces, normals = read_apart(read_shape, path)
    if faces is None:
        return trimesh.PointCloud(points, metadata={"normals": normals})
    return trimesh.Trimesh(points, faces, process=False)


def read_shape(path):
    """The points (N, 3), faces (M, 3) or None, and normals (N, 3) or None, of a file of one of KINDS."""
    kind = Path(path).suffix.lower()[1:]
    if kind not in KINDS:
        raise helper.UserError(f"{path}: meshes and point clouds are read from .{', .'.join(KINDS)} files; convert it")
    # Bytes without a name: trimesh would look for the materials and textures that a file names, beside it.
    scene = trimesh.load_scene(io.BytesIO(Path(path).read_bytes()), file_type=kind, process=False, skip_materials=True)
    points, faces, count = [np.empty((0, 3))], [np.empty((0, 3), np.int64)], 0
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        part = scene.geometry[name]
        if isinstance(part, (trimesh.Trimesh, trimesh.PointCloud)):
            corners = np.asarray(part.vertices, np.float64)
            if has_faces(part):
                if not 0 <= part.faces.min() <= part.faces.max() < len(corners):
                    raise helper.UserError(f"{path}: a face names a point that is not there; replace this file")
                faces.append(part.faces + count)
            points.append(trimesh.transform_points(corners, transform))
            count += len(corners)
    points, faces = np.concatenate(points), np.concatenate(faces)
    if len(points) == 0 or not np.isfinite(points).all() or np.abs(points).max() > LARGEST:
        raise helper.UserError(f"{path}: holds no points, or points that are not finite, or huge")
    if len(faces) == 0:
        return points, None, ply_normals(scene, len(points))
    if not trimesh.triangles.area(points[faces]).sum() > 0:
        raise helper.UserError(f"{path}: its faces have no area; replace this file")
    return points, faces, None


def ply_normals(scene, count):
    """The normals (N, 3), of length 1, of the `count` points of a PLY file; None where it gives none."""
    for part in scene.geometry.values():
        data = part.metadata.get("_ply_raw", {}).get("vertex", {}).get("data")
        with contextlib.suppress(KeyError, ValueError, TypeError, IndexError):
            normals = np.stack([np.asarray(data[name], np.float64).ravel() for name in ("nx", "ny", "nz")], axis=1)
            lengths = np.linalg.norm(normals, axis=1, keepdims=True)
            if len(normals) == count and np.isfinite(lengths).all():
                return normals / np.maximum(lengths, 1e-12)
    return None


def read_apart(read, path, *arguments):
    """read(path, *arguments) in a process of its own: what it returns; UserError where it fails.

    A small file may say that it holds any number of points, and the libraries believe it. So the process ends where it
    takes much more memory or time than files of that size do.
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


def answer(sender, size, read, path, *arguments):
    """Send a complaint, or "" and read(path, *arguments), within the bounds for a file of `size` bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for who waits for the answer
    logging.disable()
    warnings.simplefilter("ignore")
    with contextlib.suppress(ImportError, OSError, ValueError):     # not on every system
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
    except Exception as error:  # trimesh's and SciPy's readers raise whatever the bytes lead them to
        message = f"{path}: cannot be read ({type(error).__name__}); replace this file", None
    with contextlib.suppress(MemoryError):
        sender.send(message)


def has_faces(shape):
    return len(getattr(shape, "faces", ())) > 0


def surface(shape, count=SURFACE_SAMPLES):
    """The Surface of a shape: samples of a mesh, uniform over its area, or the points of a point cloud as they are.

    A mesh's normals are its faces'; a point cloud has the normals that its PLY file gives, or None.
    """
    if has_faces(shape):
        points, faces = trimesh.sample.sample_surface(shape, count, seed=0)
        return Surface(np.asarray(points, np.float64), np.asarray(shape.face_normals[faces], np.float64))
    return Surface(np.asarray(shape.vertices, np.float64), shape.metadata.get("normals"))


# --- the measures -----------------------------------------------------------------------------------------------------

def compare(ours, truth):
    """Distances and normal consistency of two Surfaces.

    accuracy is the mean distance from our points to the nearest true one, completeness that from the true points to the
    nearest of ours, chamfer their mean; all in the points' unit. Samples lie apart, so equal surfaces give a little
    more than 0. The normal consistency is the mean |cosine| between the normals of those pairs, averaged over both
    directions (Mescheder et al., CVPR 2019): 1 for equal surfaces, None where a normal is not known.
    """
    to_truth, nearest_true = cKDTree(truth.points).query(ours.points, workers=-1)
    to_ours, nearest_ours = cKDTree(ours.points).query(truth.points, workers=-1)
    accuracy, completeness, consistency = to_truth.mean(), to_ours.mean(), None
    if ours.normals is not None and truth.normals is not None:
        pairs = (ours.normals, truth.normals[nearest_true]), (truth.normals, ours.normals[nearest_ours])
        consistency = sum(np.abs(np.einsum("nx,nx->n", *pair)).mean() for pair in pairs) / 2
    return Distances(accuracy, completeness, (accuracy + completeness) / 2), consistency


def thinned(points, spacing, seed=0):
    """Points (N, 3) taken in random order, each unless one taken before is within `spacing`: (M, 3).

    All at once instead of one by one: who has no neighbour before it that may still be taken, is taken.
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


# --- DTU's protocol (Jensen et al., CVPR 2014; Aanaes et al., IJCV 2016) ----------------------------------------------

def load_dtu(folder, scene_name):
    """Read what DTU's evaluation needs of a scan, from anywhere below `folder`, as a DtuScan in millimetres.

    scene_name: such as scan65. Of it: points (M, 3), the structured-light scan stl065_total.ply; observed (X, Y, Z)
    bool, the voxels of ObsMask65_10.mat, with the corner (3,) and step (mm) of their grid; ground (4,), the plane of
    Plane65.mat, positive above. Raises UserError for a file that is missing or of another kind.
    """
    number = re.fullmatch(r"(?i)(?:dtu_)?scan_?0*(\d+)", scene_name)
    if not number:
        raise helper.UserError(f"--dtu: the scene {scene_name} is no scan of DTU's; data.path must end in a name such "
                               "as scan65")
    scan = int(number.group(1))
    points = surface(load_shape(below(folder, f"stl{scan:03d}_total.ply"))).points
    mask_file, plane_file = below(folder, f"ObsMask{scan}_10.mat"), below(folder, f"Plane{scan}.mat")
    mask, box, step = read_mat(mask_file, "ObsMask", "BB", "Res")
    (plane,) = read_mat(plane_file, "P")
    if mask.ndim != 3 or box.shape != (2, 3) or step.size != 1 or plane.size != 4:
        raise helper.UserError(f"{mask_file if plane.size == 4 else plane_file}: its arrays are not shaped as DTU's")
    for file, numbers in ((mask_file, box), (mask_file, step), (plane_file, plane)):
        if not np.isfinite(numbers).all() or np.abs(numbers.astype(float)).max() > LARGEST or step.min() <= 0:
            raise helper.UserError(f"{file}: has numbers that are not finite, or huge, or a step of its grid that is "
                                   "not more than 0; replace it")
    return DtuScan(points, mask > 0, box[0].astype(float), float(step.ravel()[0]), plane.ravel().astype(float))


def below(folder, name):
    """The path of the file of that name anywhere below a folder, however deep; the first by name of several."""
    found, pending = [], [str(folder)]
    while pending:      # os.walk and rglob call themselves for each level, to Python's limit
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.name == name:
                    found.append(Path(entry.path))
    if not found:
        raise helper.UserError(f"{folder}: there is no {name} in it; DTU's SampleSet.zip has the masks and planes, "
                               "Points.zip the scans (stl)")
    return min(found)


def read_mat(path, *names):
    """The arrays of those names in a MATLAB file, all of numbers; UserError where it lacks one or cannot be read."""
    return read_apart(read_arrays, path, *names)


def read_arrays(path, *names):
    arrays = loadmat(str(path), variable_names=names)
    for name in names:
        if name not in arrays:
            raise helper.UserError(f"{path}: has no array {name}, as DTU's has")
        if not isinstance(arrays[name], np.ndarray) or arrays[name].dtype.kind not in "buif":
            raise helper.UserError(f"{path}: {name} is not an array of numbers, as DTU's is")
    return [arrays[name] for name in names]


def compare_dtu(shape, scan):
    """The Distances (mm) of a shape in world units and a DtuScan, as DTU's protocol has them.

    The shape becomes points no nearer than 0.2 mm to one another. Accuracy: from those of them in observed voxels to
    the scan. Completeness: from the scan's points above the ground to all of them. From 20 mm on none counts.
    """
    if not 5 < shape.extents.max() < 5000:
        raise helper.UserError(f"--dtu compares in millimetres, and this mesh is {shape.extents.max():.3g} of them "
                               "long; make it with extract.py --world")
    count = int(2 * shape.area / DTU_SPACING ** 2) if has_faces(shape) else 0   # 6 in the reach of each: few gaps left
    points = thinned(surface(shape, count).points, DTU_SPACING)
    voxels = np.floor((points - scan.corner) / scan.step + 0.5).astype(int)
    seen = ((voxels >= 0) & (voxels < scan.observed.shape)).all(axis=1)
    seen[seen] = scan.observed[tuple(voxels[seen].T)]
    above = scan.points @ scan.ground[:3] + scan.ground[3] > 0
    to_scan = cKDTree(scan.points).query(points[seen], distance_upper_bound=DTU_FARTHEST, workers=-1)[0]
    to_ours = cKDTree(points).query(scan.points[above], distance_upper_bound=DTU_FARTHEST, workers=-1)[0]
    means = []
    for distances in (to_scan, to_ours):
        distances = distances[distances < DTU_FARTHEST]     # SciPy says infinite where there is none in reach
        if len(distances) == 0:
            raise helper.UserError(f"--dtu: nothing of the mesh is within {DTU_FARTHEST:.0f} mm of the scan and "
                                   "observed; make the mesh of this very scan, with extract.py --world")
        means.append(distances.mean())
    return Distances(means[0], means[1], sum(means) / 2)
