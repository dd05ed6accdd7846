"""Trained cameras: poses as seven numbers, their derivative, the sparse Adam, the errors, and training by the scripts."""
import re

import nnabla as nn
import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

import cameras
import datasets
import helper
import make_scene
import network
import ray_tracer
from conftest import ROOT
from test_network import BACKENDS, relative_error
from test_scripts import refused, run, series


def some_poses(count, seed=0):
    """Poses (count, 4, 4) all around the origin, turned at random."""
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.random(count, random_state=seed).as_matrix()
    poses[:, :3, 3] = np.random.default_rng(seed).normal(size=(count, 3))
    return poses


# --- seven numbers ----------------------------------------------------------------------------------------------------

def test_poses_there_and_back():
    poses = some_poses(50)
    vectors = cameras.pose_vectors(poses)
    assert vectors.shape == (50, 7) and vectors.dtype == np.float32
    np.testing.assert_allclose(cameras.pose_matrices(vectors), poses, atol=1e-6)
    longer = vectors * np.array([3.0] * 4 + [1.0] * 3)
    np.testing.assert_allclose(cameras.pose_matrices(longer), poses, atol=1e-6)


def test_rays_are_those_of_the_pose():
    poses, intrinsics = some_poses(1), make_scene.camera_intrinsics(32)
    uv = helper.pixel_grid(32, 32)
    in_camera = helper.pixel_rays(uv, intrinsics, np.eye(4))[1]
    for found, wanted in zip(cameras.rays(cameras.pose_vectors(poses)[0], in_camera),
                             helper.pixel_rays(uv, intrinsics, poses[0])):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert found.dtype == np.float32


def test_derivative_by_the_vector_against_differences():
    """Of a function of the rays' points and directions that has a known derivative."""
    rng = np.random.default_rng(0)
    vector, in_camera, t = rng.normal(size=7), rng.normal(size=(20, 3)), rng.uniform(1, 3, (20, 1))
    in_camera /= np.linalg.norm(in_camera, axis=1, keepdims=True)
    by_points, by_directions = rng.normal(size=(2, 20, 3))

    def points_and_directions(vector):
        directions = in_camera @ cameras.rotation(vector[:4]).T
        return vector[4:] + t * directions, directions

    def value(vector):
        points, directions = points_and_directions(vector)
        return (by_points * points).sum() + (by_directions * directions).sum()

    found = cameras.by_vector(vector, in_camera, points_and_directions(vector)[0], by_points, by_directions)
    wanted = [(value(vector + step) - value(vector - step)) / 2e-6 for step in 1e-6 * np.eye(7)]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@BACKENDS
def test_derivative_of_the_losses_against_differences(monkeypatch, numpy):
    """The camera is moved, its rays are traced anew where they show the surface, and the other points move along."""
    network.initialize(64, 8, 4, 0.6, np.random.default_rng(0))
    rng = np.random.default_rng(5)
    for parameter in nn.get_parameters().values():
        parameter.d = parameter.d + 0.01 * rng.normal(size=parameter.shape)
    sdf = network.sdf_evaluator()
    pose = make_scene.look_at(np.array([1.5, -1.2, 0.9]), np.zeros(3), (0, 0, 1))
    vector = cameras.pose_vectors(pose[None])[0] * np.array([1.7] * 4 + [1.0] * 3)
    in_camera = helper.pixel_rays(helper.pixel_grid(32, 32)[::3], make_scene.camera_intrinsics(32), np.eye(4))[1]
    origin, directions = cameras.rays(vector, in_camera)

    def slope(t, directions, origin=origin):
        ahead, behind = (sdf(origin + (t + step)[:, None] * directions) for step in np.float32([1e-3, -1e-3]))
        return (ahead - behind) / 2e-3

    t, hit = ray_tracer.trace(sdf, origin, directions, sphere_tracing_steps=50)
    hit &= slope(t, directions) < -0.5      # a ray that all but touches has no derivative
    t[~hit] = 2.0 + 0.2 * rng.normal(size=(~hit).sum())
    order = np.argsort(~hit, kind="stable")
    in_camera, t, hit, hits = in_camera[order], t[order], hit[order], hit.sum()
    monkeypatch.setattr(network, "on_cpu", lambda: numpy)
    g = network.training_graph(len(t), hits + 5, 1.0, 0.7, by_rays=True)
    g["rgb"].d = 2.0 * np.sign(rng.normal(size=(hits + 5, 3)))      # never reached: |rgb - I| has no kink
    g["colored"].d, g["masked"].d, g["alpha"].d = hit[:hits + 5, None], 1 - hit[:, None], 5.0
    g["object_mask"].d = rng.integers(0, 2, (len(t), 1))
    uniform = rng.uniform(-1, 1, (len(t) // 2, 3))

    def fill(vector, t):
        origin, directions = cameras.rays(vector, in_camera)
        points = origin + t[:, None] * directions
        g["points"].d, g["directions"].d = np.concatenate([points, uniform]), directions[:hits + 5]
        return points

    def loss(vector):
        origin, directions = cameras.rays(vector, in_camera)
        traced = t.copy()
        for _ in range(4):
            traced[:hits] -= (sdf(origin + traced[:hits, None] * directions[:hits])
                              / slope(traced[:hits], directions[:hits], origin))
        fill(vector, traced)
        g["forward"]()
        return float(g["color"].d) + float(g["mask"].d)     # the eikonal loss does not count

    for parameter in nn.get_parameters().values():
        parameter.g = 0
    points = fill(vector, t)
    g["forward"]()
    g["backward"]()
    by_points, by_directions = g["by_rays"]()
    by_directions = np.concatenate([by_directions, np.zeros((len(t) - len(by_directions), 3))])
    found = cameras.by_vector(vector, in_camera, points, by_points, by_directions)
    wanted = [(loss(vector + step) - loss(vector - step)) / 8e-3 for step in 4e-3 * np.eye(7)]
    assert relative_error(found, wanted) <= 0.03


# --- the optimiser ----------------------------------------------------------------------------------------------------

def test_sparse_adam_is_adam_on_one_row_with_the_count_of_all():
    start = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    pose = nn.Variable.from_numpy_array(start.copy())
    solver = cameras.SparseAdam(1e-2)
    solver.set_parameters({helper.POSE: pose})
    rows, m, v = start.astype(np.float64), np.zeros((3, 7)), np.zeros((3, 7))
    rng = np.random.default_rng(1)
    for step in range(1, 30):
        view, gradient = step % 2, rng.normal(size=7)
        before = pose.d.copy()
        solver.update(view, gradient)
        assert np.array_equal(np.delete(pose.d, view, 0), np.delete(before, view, 0))
        m[view] = 0.9 * m[view] + 0.1 * gradient
        v[view] = 0.999 * v[view] + 0.001 * gradient ** 2
        rows[view] -= 1e-2 * (m[view] / (1 - 0.9 ** step)) / np.sqrt(v[view] / (1 - 0.999 ** step))
        np.testing.assert_allclose(pose.d, rows, atol=1e-5)
    assert np.array_equal(pose.d[2], start[2])


# --- errors -----------------------------------------------------------------------------------------------------------

def test_errors_do_not_see_a_similarity_and_measure_what_is_beyond():
    poses = some_poses(12)
    moved = poses.copy()
    turn = Rotation.from_rotvec([0.3, -1.0, 0.5]).as_matrix()
    moved[:, :3, :3] = turn @ poses[:, :3, :3]
    moved[:, :3, 3] = 2.5 * poses[:, :3, 3] @ turn.T + [1.0, 2.0, 3.0]
    off = cameras.errors(moved, poses)
    assert max(off.rotation.max(), off.translation.max()) < 1e-5
    moved[4, :3, :3] = moved[4, :3, :3] @ Rotation.from_rotvec([0.0, np.radians(3.0), 0.0]).as_matrix()
    off = cameras.errors(moved, poses)
    np.testing.assert_allclose(off.rotation, 3.0 * (np.arange(12) == 4), atol=1e-4)
    moved[:, :3, 3] += 2.5 * 0.1 * np.tile([[0, 1, 0], [0, -1, 0]], (6, 1))
    assert cameras.errors(moved, poses).translation.mean() == pytest.approx(0.1, abs=0.03)


def test_errors_of_cameras_that_no_alignment_fits():
    poses = some_poses(5)
    assert cameras.errors(poses[:2], poses[:2]) is None
    poses[:, :3, 3] = np.arange(5)[:, None] * [1.0, 2.0, 3.0]
    assert cameras.errors(poses, poses) is None
    assert cameras.errors(np.tile(np.eye(4), (4, 1, 1)), some_poses(4)) is None
