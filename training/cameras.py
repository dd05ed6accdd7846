"""Trained cameras: a pose per view as seven numbers, its derivative, its optimiser, and how far cameras are off.

`cameras/pose`, (N, 7) float32, has one row per view by sorted name: a quaternion w, x, y, z, of any length, whose
rotation takes the camera's axes (x right, y down, z forward) to those of the unit sphere's coordinates, and the
camera's centre there. The intrinsics stay as they are.
"""
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import nnabla as nn
import numpy as np
from scipy.spatial.transform import Rotation
from skimage.transform import SimilarityTransform

import datasets
import helper
from training import checkpoints

# Of N cameras: rotation (N,) in degrees and translation (N,) in the true cameras' units, after the best alignment.
Errors = namedtuple("Errors", "rotation translation")
Truth = namedtuple("Truth", "poses scale")


# --- seven numbers ----------------------------------------------------------------------------------------------------

def pose_vectors(poses):
    """Return poses (N, 4, 4), camera to the unit sphere's coordinates, as (N, 7) float32."""
    x, y, z, w = Rotation.from_matrix(poses[:, :3, :3]).as_quat().T
    return np.concatenate([np.stack([w, x, y, z], axis=1), poses[:, :3, 3]], axis=1).astype(np.float32)


def pose_matrices(vectors):
    """Return pose vectors (N, 7) as poses (N, 4, 4) float64."""
    poses = np.tile(np.eye(4), (len(vectors), 1, 1))
    poses[:, :3, 3] = vectors[:, 4:]
    poses[:, :3, :3] = [rotation(vector[:4]) for vector in vectors]
    return poses


def unit_quaternion(quaternion):
    """Return a quaternion (4,) scaled to unit length, float64, and the length that it had."""
    quaternion = np.asarray(quaternion, np.float64)
    length = np.linalg.norm(quaternion)
    return quaternion / length, length


def rotation_slopes(unit):
    """Return the derivative (4, 3, 3) of |q|^2 R(q) by q = w, x, y, z at a unit quaternion.

    |q|^2 R(q) is quadratic in q, so R itself is half of sum(q_a slopes_a).
    """
    w, x, y, z = unit
    return 2.0 * np.array([[[w, -z, y], [z, w, -x], [-y, x, w]], [[x, y, z], [y, -x, -w], [z, w, -x]],
                           [[-y, x, w], [x, y, z], [-w, z, -y]], [[-z, -w, x], [w, -z, y], [x, y, z]]])


def rotation(quaternion):
    """Return the rotation (3, 3) float64 of a quaternion w, x, y, z of any length but 0."""
    unit, _ = unit_quaternion(quaternion)
    return 0.5 * np.tensordot(unit, rotation_slopes(unit), 1)


def rays(vector, in_camera):
    """Return the centre (3,) of the camera at a pose vector (7,), and the directions (R, 3) of its rays, float32.

    in_camera: (R, 3) unit directions in the camera's axes.
    """
    return vector[4:].astype(np.float32), (in_camera @ rotation(vector[:4]).T).astype(np.float32)


def moved(vector, step):
    """Return the pose vector (7,) after a step (7,), of the quaternion's numbers and of the centre.

    A camera that moves turns along, so that it sees the origin where it did. Without that, turning and moving change an
    image so much alike that an optimiser soon has the one make up for the other, and hardly mends what is left.
    """
    centre, quaternion = vector[4:], vector[:4] + step[:4]
    turn = np.cross(centre, step[4:]) / (centre @ centre)
    w, axis = quaternion[0], quaternion[1:]
    turned = quaternion + 0.5 * np.concatenate([[-turn @ axis], w * turn + np.cross(turn, axis)])
    return np.concatenate([turned, centre + step[4:]])


def grad_step(vector, in_camera, points, grad_points, grad_directions):
    """Carry a loss's derivatives back to the step (7,) with which a pose vector (7,) is moved: returns (7,) float64.

    vector and in_camera as for `rays`; points (R, 3): one on each ray, moved by the camera at a constant distance from
    its centre; grad_points (R, 3): the derivatives by these; grad_directions (R, 3): what the directions have beside.
    """
    centre, directions = rays(vector, in_camera)
    distances = ((points - centre) * directions).sum(axis=1, keepdims=True)
    grad_rotation = (grad_directions + distances * grad_points).astype(np.float64).T @ in_camera
    unit, length = unit_quaternion(vector[:4])
    grad_unit = np.tensordot(rotation_slopes(unit), grad_rotation, 2)
    grad_quaternion = (grad_unit - unit * (unit @ grad_unit)) / length       # its length has no effect
    grad_turn = 0.5 * (vector[0] * grad_quaternion[1:] - grad_quaternion[0] * vector[1:4]
                     + np.cross(vector[1:4], grad_quaternion[1:]))
    grad_centre = grad_points.sum(axis=0, dtype=np.float64) + np.cross(grad_turn, vector[4:]) / (vector[4:] @ vector[4:])
    return np.concatenate([grad_quaternion, grad_centre])


# --- among nnabla's parameters ----------------------------------------------------------------------------------------

def parameter():
    """Return the trained cameras among nnabla's parameters, a Variable (N, 7), or None where there are none."""
    return nn.get_parameters(grad_only=False).get(checkpoints.POSE)


def trained_poses(poses, source):
    """Return the poses (N, 4, 4) of the trained cameras among nnabla's parameters; without such a scene's own `poses`.

    Raises UserError where they are of another number of views; `source` says where they come from.
    """
    pose = parameter()
    if pose is None:
        return poses
    if len(pose.d) != len(poses):
        raise helper.UserError(f"{source}: has {len(pose.d)} trained cameras, and the scene {len(poses)} views; "
                               "restore the scene that it was trained on")
    return pose_matrices(pose.d)


class SparseAdam:
    """Adam on cameras/pose, of which a step touches one view's row and its moments alone; the count of the steps, for
    the bias corrections, is that of all views. So does torch.optim.SparseAdam, which the authors use. What a step is,
    `moved` says.

    Its states are read and set as those of nnabla's solvers.
    """

    def __init__(self, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8):
        self.learning_rate, self.beta1, self.beta2, self.eps = learning_rate, beta1, beta2, eps

    def set_parameters(self, parameters):
        (self.name, self.pose), = parameters.items()
        self.t, self.m, self.v = 0, np.zeros(self.pose.shape, np.float32), np.zeros(self.pose.shape, np.float32)

    def update(self, view, gradient):
        """Take a step along the gradient (7,) of one view."""
        self.t += 1
        self.m[view] += (1 - self.beta1) * (gradient - self.m[view])
        self.v[view] += (1 - self.beta2) * (gradient ** 2 - self.v[view])
        rate = self.learning_rate * np.sqrt(1 - self.beta2 ** self.t) / (1 - self.beta1 ** self.t)
        step = -rate * self.m[view] / (np.sqrt(self.v[view]) + self.eps)
        self.pose.d[view] = moved(self.pose.d[view], step)

    def get_states(self):
        kept = {part: nn.Variable.from_numpy_array(array) for part, array in (("m", self.m), ("v", self.v))}
        return {self.name: SimpleNamespace(t=self.t, pstate=kept)}

    def set_states(self, states):
        kept = states[self.name]
        self.t, self.m, self.v = kept.t, kept.pstate["m"].d.copy(), kept.pstate["v"].d.copy()


# --- how far off ------------------------------------------------------------------------------------------------------

def true_cameras(path, trained, count):
    """Return the cameras.npz of the scene in the folder `path` as Truth: poses (count, 4, 4), and the radius of its
    unit sphere in world units. None where the scene has none, or has no other, `trained` being the file to train.
    """
    file = Path(path) / "cameras.npz"
    if not file.is_file() or file.samefile(Path(path) / trained):
        return None
    _, poses, scale_mat = datasets.load_cameras(file, count)
    return Truth(poses, np.cbrt(np.linalg.det(scale_mat[:3, :3])))


def errors(poses, true_poses):
    """Return the Errors of poses against the true ones, both (N, 4, 4), camera to world.

    Two sets of cameras that differ by a similarity give the same images; so the centres are aligned first (Umeyama
    1991), and the rotations with them. Returns None where that is not determined: below three cameras, or all in one
    line.
    """
    aligned = alignment(poses[:, :3, 3], true_poses[:, :3, 3])
    if aligned is None:
        return None
    scale = np.cbrt(np.linalg.det(aligned[:3, :3]))
    turned = aligned[:3, :3] / scale @ poses[:, :3, :3]
    angles = Rotation.from_matrix(np.swapaxes(turned, 1, 2) @ true_poses[:, :3, :3]).magnitude()
    moved = poses[:, :3, 3] @ aligned[:3, :3].T + aligned[:3, 3]
    return Errors(np.degrees(angles), np.linalg.norm(moved - true_poses[:, :3, 3], axis=1))


def alignment(points, targets):
    """Return the similarity (4, 4) that takes points (N, 3) closest to targets (N, 3), or None where many are."""
    spreads = [np.linalg.svd(p - p.mean(axis=0), compute_uv=False) for p in (points, targets)]
    if len(points) < 3 or any(spread[1] <= 1e-6 * spread[0] for spread in spreads):
        return None
    similarity = SimilarityTransform(dimensionality=3)
    similarity.estimate(points, targets)
    return similarity.params


def in_words(found, scale):
    """Return the words for Errors in radii of the unit sphere, or for None; scale: that radius in world units."""
    if found is None:
        return "in a line or too few, so their errors have no measure"
    world = f" ({scale * found.translation.mean():.3g} in world units)" if abs(scale - 1) > 1e-6 else ""
    return (f"off by {found.rotation.mean():.3f} degrees and {found.translation.mean():.5f} of the unit sphere's radius"
            f"{world}, at most {found.rotation.max():.3f} and {found.translation.max():.5f}")
