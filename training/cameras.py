"""Trained cameras: poses as vectors of seven numbers, their gradients, their optimiser and their errors.

The parameter `cameras/pose`, (N, 7) float32, has one row per view, sorted by name: a quaternion w, x, y, z and the
camera's centre, both in unit sphere coordinates. The quaternion may have any length but 0. It rotates camera axes
(x right, y down, z forward) to unit sphere axes. Intrinsics are not trained.
"""
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import nnabla as nn
import numpy as np
from scipy.spatial.transform import Rotation
from skimage.transform import SimilarityTransform

import datasets
import helper
from training import checkpoints


class Errors(NamedTuple):
    """Errors of N cameras after the best alignment to the true ones."""
    rotation: np.ndarray        # (N,), degrees
    translation: np.ndarray     # (N,), units of the true cameras


class Truth(NamedTuple):
    """The true cameras of a scene."""
    poses: np.ndarray           # (N, 4, 4), camera to unit sphere coordinates
    scale: float                # radius of the unit sphere in world units


# --- pose vectors -----------------------------------------------------------------------------------------------------

def pose_vectors(poses):
    """Convert poses (N, 4, 4), camera to unit sphere coordinates, to pose vectors (N, 7) float32."""
    x, y, z, w = Rotation.from_matrix(poses[:, :3, :3]).as_quat().T
    return np.concatenate([np.stack([w, x, y, z], axis=1), poses[:, :3, 3]], axis=1).astype(np.float32)


def pose_matrices(vectors):
    """Convert pose vectors (N, 7) to poses (N, 4, 4) float64."""
    poses = np.tile(np.eye(4), (len(vectors), 1, 1))
    poses[:, :3, 3] = vectors[:, 4:]
    poses[:, :3, :3] = [rotation(vector[:4]) for vector in vectors]
    return poses


def unit_quaternion(quaternion):
    """Normalise a quaternion (4,). Return it, float64, and its former length."""
    quaternion = np.asarray(quaternion, np.float64)
    length = np.linalg.norm(quaternion)
    return quaternion / length, length


def rotation_jacobian(unit):
    """Return the derivative (4, 3, 3) of |q|^2 R(q) with respect to q = w, x, y, z at a unit quaternion.

    |q|^2 R(q) is quadratic in q, so R(q) = 0.5 * sum_a q_a J_a.
    """
    w, x, y, z = unit
    return 2.0 * np.array([[[w, -z, y], [z, w, -x], [-y, x, w]], [[x, y, z], [y, -x, -w], [z, w, -x]],
                           [[-y, x, w], [x, y, z], [-w, z, -y]], [[-z, -w, x], [w, -z, y], [x, y, z]]])


def rotation(quaternion):
    """Return the rotation matrix (3, 3) float64 of a quaternion w, x, y, z of any length but 0."""
    unit, _ = unit_quaternion(quaternion)
    return 0.5 * np.tensordot(unit, rotation_jacobian(unit), 1)


def rays(vector, in_camera):
    """Return the centre (3,) and the ray directions (R, 3) of the camera with a pose vector (7,), both float32.

    in_camera: (R, 3), unit directions of the rays in camera axes.
    """
    return vector[4:].astype(np.float32), (in_camera @ rotation(vector[:4]).T).astype(np.float32)


def placed_rays(vectors, drawn):
    """Return a Batch whose rays are in unit sphere coordinates; vectors: (N, 7), drawn: a Batch in camera axes."""
    origins, directions = np.empty_like(drawn.directions), np.empty_like(drawn.directions)
    for view, part in drawn.parts():
        origins[part], directions[part] = rays(vectors[view], drawn.directions[part])
    return drawn._replace(origins=origins, directions=directions)


def moved(vector, step):
    """Return a pose vector (7,) after a step (7,), of the quaternion and of the centre.

    A step of the centre also rotates the camera, so that the origin keeps its place in the image. Otherwise rotation
    and translation change an image in nearly the same way, and an optimiser lets one compensate for the other
    instead of reducing both errors.
    """
    centre, quaternion = vector[4:], vector[:4] + step[:4]
    turn = np.cross(centre, step[4:]) / (centre @ centre)
    w, axis = quaternion[0], quaternion[1:]
    turned = quaternion + 0.5 * np.concatenate([[-turn @ axis], w * turn + np.cross(turn, axis)])
    return np.concatenate([turned, centre + step[4:]])


def grad_step(vector, in_camera, points, grad_points, grad_directions):
    """Return the gradient (7,) float64 of a loss with respect to the step of `moved`, at step 0.

    vector, in_camera: as for `rays`
    points: (R, 3), one point per ray, which stays at its distance from the centre when the camera moves
    grad_points: (R, 3), gradient of the loss with respect to the points
    grad_directions: (R, 3), gradient with respect to the directions with the points held fixed
    """
    centre, directions = rays(vector, in_camera)
    distances = ((points - centre) * directions).sum(axis=1, keepdims=True)
    grad_rotation = (grad_directions + distances * grad_points).astype(np.float64).T @ in_camera
    unit, length = unit_quaternion(vector[:4])
    grad_unit = np.tensordot(rotation_jacobian(unit), grad_rotation, 2)
    grad_quaternion = (grad_unit - unit * (unit @ grad_unit)) / length       # the length has no effect on R
    grad_turn = 0.5 * (vector[0] * grad_quaternion[1:] - grad_quaternion[0] * vector[1:4]
                       + np.cross(vector[1:4], grad_quaternion[1:]))
    centre = vector[4:]
    grad_centre = grad_points.sum(axis=0, dtype=np.float64) + np.cross(grad_turn, centre) / (centre @ centre)
    return np.concatenate([grad_quaternion, grad_centre])


def grad_steps(vectors, drawn, points, grad_points, grad_directions):
    """Return {view: gradient (7,)} of a loss over all rays of a Batch, as grad_step gives it for the rays of one view.

    vectors: (N, 7); drawn: a Batch in camera axes; points and the gradients: (R, 3)
    """
    found = {}
    for view, part in drawn.parts():
        gradient = grad_step(vectors[view], drawn.directions[part], points[part], grad_points[part],
                             grad_directions[part])
        found[view] = found[view] + gradient if view in found else gradient
    return found


# --- nnabla's parameters ----------------------------------------------------------------------------------------------

def parameter():
    """Return nnabla's parameter of trained cameras, a Variable (N, 7), or None if there is none."""
    return nn.get_parameters(grad_only=False).get(checkpoints.POSE)


def trained_poses(poses, source):
    """Return the poses (N, 4, 4) of nnabla's trained cameras, or the scene's own `poses` if none are trained.

    Raises UserError, naming `source`, if the number of trained cameras is not N.
    """
    pose = parameter()
    if pose is None:
        return poses
    if len(pose.d) != len(poses):
        raise helper.UserError(f"{source}: has {len(pose.d)} trained cameras, and the scene {len(poses)} views; "
                               "use the scene that it was trained on")
    return pose_matrices(pose.d)


class SparseAdam:
    """Adam on cameras/pose, where an update changes the rows and the moments of its views only.

    The bias corrections count all updates, of whichever views, as in torch.optim.SparseAdam, which the authors use.
    Steps are applied by `moved`. States have the interface of nnabla's solvers.
    """

    def __init__(self, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8):
        self.learning_rate, self.beta1, self.beta2, self.eps = learning_rate, beta1, beta2, eps

    def set_parameters(self, parameters):
        (self.name, self.pose), = parameters.items()
        self.t, self.m, self.v = 0, np.zeros(self.pose.shape, np.float32), np.zeros(self.pose.shape, np.float32)

    def update(self, gradients):
        """Update poses; gradients: {view: gradient (7,) with respect to the step of `moved`}."""
        self.t += 1
        rate = self.learning_rate * np.sqrt(1 - self.beta2 ** self.t) / (1 - self.beta1 ** self.t)
        for view, gradient in gradients.items():
            self.m[view] += (1 - self.beta1) * (gradient - self.m[view])
            self.v[view] += (1 - self.beta2) * (gradient ** 2 - self.v[view])
            step = -rate * self.m[view] / (np.sqrt(self.v[view]) + self.eps)
            self.pose.d[view] = moved(self.pose.d[view], step)

    def get_states(self):
        kept = {part: nn.Variable.from_numpy_array(array) for part, array in (("m", self.m), ("v", self.v))}
        return {self.name: SimpleNamespace(t=self.t, pstate=kept)}

    def set_states(self, states):
        kept = states[self.name]
        self.t, self.m, self.v = kept.t, kept.pstate["m"].d.copy(), kept.pstate["v"].d.copy()


# --- errors -----------------------------------------------------------------------------------------------------------

def true_cameras(path, trained, count):
    """Return the Truth in the cameras.npz of the scene folder `path`, with `count` views.

    trained: name of the camera file that is trained. Returns None if there is no cameras.npz, or if it is that file.
    """
    file = Path(path) / "cameras.npz"
    if not file.is_file() or file.samefile(Path(path) / trained):
        return None
    _, poses, scale_mat = datasets.load_cameras(file, count)
    return Truth(poses, np.cbrt(np.linalg.det(scale_mat[:3, :3])))


def errors(poses, true_poses):
    """Return the Errors of poses against the true ones, both (N, 4, 4), camera to world.

    Cameras that differ by a similarity give the same images, so the poses are aligned first by the similarity that
    fits their centres best (Umeyama 1991). Returns None if it is not unique: for fewer than three cameras, or if all
    centres are on one line.
    """
    aligned = alignment(poses[:, :3, 3], true_poses[:, :3, 3])
    if aligned is None:
        return None
    scale = np.cbrt(np.linalg.det(aligned[:3, :3]))
    turned = aligned[:3, :3] / scale @ poses[:, :3, :3]
    angles = Rotation.from_matrix(np.swapaxes(turned, 1, 2) @ true_poses[:, :3, :3]).magnitude()
    centres = poses[:, :3, 3] @ aligned[:3, :3].T + aligned[:3, 3]
    return Errors(np.degrees(angles), np.linalg.norm(centres - true_poses[:, :3, 3], axis=1))


def alignment(points, targets):
    """Return the similarity (4, 4) that maps points (N, 3) closest to targets (N, 3), or None if not unique."""
    spreads = [np.linalg.svd(p - p.mean(axis=0), compute_uv=False) for p in (points, targets)]
    if len(points) < 3 or any(spread[1] <= 1e-6 * spread[0] for spread in spreads):
        return None
    similarity = SimilarityTransform(dimensionality=3)
    similarity.estimate(points, targets)
    return similarity.params


def in_words(found, scale):
    """Describe Errors in unit sphere coordinates, or None, for a message; scale: the sphere's radius in world units."""
    if found is None:
        return "too few or on one line, so their errors cannot be measured"
    world = f" ({scale * found.translation.mean():.3g} in world units)" if abs(scale - 1) > 1e-6 else ""
    return (f"off by {found.rotation.mean():.3f} degrees and {found.translation.mean():.5f} of the unit sphere's radius"
            f"{world} on average, at most {found.rotation.max():.3f} and {found.translation.max():.5f}")
