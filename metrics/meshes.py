"""How far a mesh is from the true surface: Chamfer distance and normal consistency, freely or in DTU's own protocol.

Imports nothing of the other scripts but helper.
"""
import re
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

Surface = namedtuple("Surface", "points normals")       # (N, 3) float64 each; the normals, of length 1, may be None
Distances = namedtuple("Distances", "accuracy completeness chamfer")
DtuScan = namedtuple("DtuScan", "points observed corner step ground")


# --- surfaces from files ----------------------------------------------------------------------------------------------

def load_shape(path):
    """What a file holds, as a trimesh.Trimesh with faces, else a trimesh.PointCloud; UserError where it is neither."""
    if not Path(path).is_file():
        raise helper.UserError(f"{path}: no such file")
    try:
        shape = trimesh.load(str(path))
        if isinstance(shape, trimesh.Scene):
            shape = trimesh.util.concatenate(list(shape.geometry.values()))
    except Exception as error:      # trimesh's readers raise whatever the bytes lead them to
        raise helper.UserError(f"{path}: not a mesh or point cloud that can be read ({type(error).__name__})")
    points = getattr(shape, "vertices", ())
    if len(points) == 0 or not np.isfinite(points).all():
        raise helper.UserError(f"{path}: holds no points, or points that are not finite")
    return shape


def has_faces(shape):
    return len(getattr(shape, "faces", ())) > 0


def surface(shape, count=SURFACE_SAMPLES):
    """The Surface of a shape: samples of a mesh, uniform over its area, or the points of a point cloud as they are.

    A mesh's normals are its faces'; a point cloud has the normals that its PLY file gives, or None.
    """
    if has_faces(shape):
        points, faces = trimesh.sample.sample_surface(shape, count, seed=0)
        return Surface(np.asarray(points, np.float64), np.asarray(shape.face_normals[faces], np.float64))
    data = shape.metadata.get("_ply_raw", {}).get("vertex", {}).get("data")
    names = getattr(getattr(data, "dtype", None), "names", None) or ()
    normals = None
    if {"nx", "ny", "nz"} <= set(names) and len(data) == len(shape.vertices):
        normals = np.stack([np.asarray(data[name], np.float64) for name in ("nx", "ny", "nz")], axis=1)
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return Surface(np.asarray(shape.vertices, np.float64), normals)


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
    return DtuScan(points, mask > 0, box[0].astype(float), float(step.ravel()[0]), plane.ravel().astype(float))


def below(folder, name):
    """The path of the file of that name anywhere below a folder."""
    found = sorted(Path(folder).rglob(name))
    if not found:
        raise helper.UserError(f"{folder}: there is no {name} in it; DTU's SampleSet.zip has the masks and planes, "
                               "Points.zip the scans (stl)")
    return found[0]


def read_mat(path, *names):
    """The arrays of those names in a MATLAB file."""
    try:
        arrays = loadmat(str(path))
    except Exception as error:      # SciPy raises what the bytes lead it to
        raise helper.UserError(f"{path}: not a MATLAB file that can be read ({type(error).__name__})")
    for name in names:
        if name not in arrays:
            raise helper.UserError(f"{path}: has no array {name}, as DTU's has")
    return [np.asarray(arrays[name]) for name in names]


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
