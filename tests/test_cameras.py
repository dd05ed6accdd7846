"""Test trained cameras: pose vectors, their gradients, the sparse Adam, the errors, and training by the scripts."""
import re

import nnabla as nn
import nnabla.solvers as S
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from test_network import BACKENDS, relative_error, single
from test_scripts import series

import datasets
import helper
import make_scene
import network
import ray_tracer
from backends import architecture
from commands import refused, run
from config.settings import Network
from conftest import write_demo_config
from training import cameras, checkpoints
from training.step import LossSettings, Placed, TrainingStep


def some_poses(count, seed=0):
    """Return random poses (count, 4, 4) around the origin."""
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.random(count, random_state=seed).as_matrix()
    poses[:, :3, 3] = np.random.default_rng(seed).normal(size=(count, 3))
    return poses


# --- pose vectors -----------------------------------------------------------------------------------------------------

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
    """Check grad_step for a linear function of the rays' points and directions."""
    rng = np.random.default_rng(0)
    vector, in_camera, t = rng.normal(size=7), rng.normal(size=(20, 3)), rng.uniform(1, 3, (20, 1))
    in_camera /= np.linalg.norm(in_camera, axis=1, keepdims=True)
    grad_points, grad_directions = rng.normal(size=(2, 20, 3))

    def points_and_directions(vector):
        directions = in_camera @ cameras.rotation(vector[:4]).T
        return vector[4:] + t * directions, directions

    def value(vector):
        points, directions = points_and_directions(vector)
        return (grad_points * points).sum() + (grad_directions * directions).sum()

    found = cameras.grad_step(vector, in_camera, points_and_directions(vector)[0], grad_points, grad_directions)
    wanted = [(value(cameras.moved(vector, step)) - value(cameras.moved(vector, -step))) / 2e-6
              for step in 1e-6 * np.eye(7)]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_camera_that_moves_keeps_the_origin_in_view():
    vector = cameras.pose_vectors(make_scene.look_at(np.array([1.0, 2.0, 1.5]), np.zeros(3), (0, 0, 1))[None])[0]
    step = np.array([0, 0, 0, 0, 0.02, -0.01, 0.03])
    moved = cameras.moved(2.0 * vector * np.array([1] * 4 + [0.5] * 3), step)
    np.testing.assert_allclose(moved[4:], vector[4:] + step[4:])
    seen = cameras.rotation(moved[:4]).T @ -moved[4:]
    assert np.linalg.norm(seen[:2]) < 5e-4 * seen[2]
    turned = cameras.moved(vector, np.array([0.01, -0.02, 0.03, 0.01, 0, 0, 0]))
    np.testing.assert_allclose(turned, vector + np.array([0.01, -0.02, 0.03, 0.01, 0, 0, 0]))


@BACKENDS
def test_derivative_of_the_losses_against_differences(monkeypatch, numpy):
    """Check grad_step for the losses. Rays that hit are traced again for each moved camera; other points move along."""
    network.initialize(Network(64, 8, 4), np.random.default_rng(0))
    rng = np.random.default_rng(5)
    for parameter in nn.get_parameters().values():
        parameter.d = single(parameter.d + 0.01 * rng.normal(size=parameter.shape))
    sdf = network.sdf_evaluator()
    pose = make_scene.look_at(np.array([1.5, -1.2, 0.9]), np.zeros(3), (0, 0, 1))
    vector = cameras.pose_vectors(pose[None])[0] * np.array([1.7] * 4 + [1.0] * 3)
    in_camera = helper.pixel_rays(helper.pixel_grid(32, 32)[::3], make_scene.camera_intrinsics(32), np.eye(4))[1]
    origin, directions = cameras.rays(vector, in_camera)

    def slope(t, directions, origin=origin):
        ahead, behind = (sdf(origin + (t + step)[:, None] * directions) for step in np.float32([1e-3, -1e-3]))
        return (ahead - behind) / 2e-3

    t, hit = ray_tracer.trace(sdf, origin, directions, sphere_tracing_steps=50)
    hit &= slope(t, directions) < -0.5      # the derivative is not defined for grazing rays
    t[~hit] = 2.0 + 0.2 * rng.normal(size=(~hit).sum())
    order = np.argsort(~hit, kind="stable")
    in_camera, t, hit, hits = in_camera[order], t[order], hit[order], hit.sum()
    monkeypatch.setattr(network, "on_cpu", lambda: numpy)
    step, count = TrainingStep((), LossSettings(1.0, 0.7), len(t), want_grad_rays=True), len(t)
    rgb = np.zeros((count, 3), np.float32)
    rgb[:hits] = 2.0 * np.sign(rng.normal(size=(hits + 5, 3)))[:hits]   # out of reach: |rgb - I| has no kink
    mask, seed = rng.integers(0, 2, count) > 0, int(rng.integers(1 << 30))
    solver = S.Adam()
    solver.set_parameters(nn.get_parameters())

    def take_step(vector, t):
        origin, directions = cameras.rays(vector, in_camera)
        points = origin + t[:, None] * directions
        batch = datasets.Batch(np.zeros(1, np.int64), origin, directions, rgb, mask, np.ones(count, np.float32))
        losses = step.compute_gradients(solver, batch, Placed(single(points), hit), 5.0, np.random.default_rng(seed))
        return points, float(losses["color"].d) + float(losses["mask"].d)  # eikonal: constant

    def loss(vector):
        origin, directions = cameras.rays(vector, in_camera)
        traced = t.copy()
        for _ in range(4):
            traced[:hits] -= (sdf(origin + traced[:hits, None] * directions[:hits])
                              / slope(traced[:hits], directions[:hits], origin))
        return take_step(vector, traced)[1]

    for _ in range(2):      # twice, as the first step leaves gradients behind
        points, _ = take_step(vector, t)
    grad_points, grad_directions = step.grad_rays()
    found = cameras.grad_step(vector, in_camera, points, grad_points, grad_directions)
    wanted = [(loss(cameras.moved(vector, step)) - loss(cameras.moved(vector, -step))) / 8e-3
              for step in 4e-3 * np.eye(7)]
    assert relative_error(found, wanted) <= 0.03


# --- the optimiser ----------------------------------------------------------------------------------------------------

def test_sparse_adam_is_adam_on_one_row_with_the_count_of_all():
    start = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    pose = nn.Variable.from_numpy_array(start.copy())
    solver = cameras.SparseAdam(1e-2)
    solver.set_parameters({checkpoints.POSE: pose})
    rows, m, v = start.astype(np.float64), np.zeros((3, 7)), np.zeros((3, 7))
    rng = np.random.default_rng(1)
    for step in range(1, 30):
        view, gradient = step % 2, rng.normal(size=7)
        before = pose.d.copy()
        solver.update({view: gradient})
        assert np.array_equal(np.delete(pose.d, view, 0), np.delete(before, view, 0))
        m[view] = 0.9 * m[view] + 0.1 * gradient
        v[view] = 0.999 * v[view] + 0.001 * gradient ** 2
        by = 1e-2 * (m[view] / (1 - 0.9 ** step)) / np.sqrt(v[view] / (1 - 0.999 ** step))
        rows[view] = cameras.moved(rows[view], -by)
        np.testing.assert_allclose(pose.d, rows, atol=1e-5)
    assert np.array_equal(pose.d[2], start[2])


def test_two_views_in_a_step_are_one_update_of_both():
    start = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    solvers, poses = [cameras.SparseAdam(1e-2) for _ in range(3)], []
    for solver in solvers:
        poses.append(nn.Variable.from_numpy_array(start.copy()))
        solver.set_parameters({checkpoints.POSE: poses[-1]})
    for gradients in np.random.default_rng(1).normal(size=(5, 2, 7)):
        solvers[0].update({0: gradients[0], 2: gradients[1]})
        solvers[1].update({0: gradients[0]})
        solvers[2].update({2: gradients[1]})
    assert np.array_equal(poses[0].d[0], poses[1].d[0]) and np.array_equal(poses[0].d[2], poses[2].d[2])
    assert np.array_equal(poses[0].d[1], start[1]) and solvers[0].t == 5


def test_the_gradient_of_several_views_is_that_of_each():
    """Check the rays and gradients of a Batch against those of its views; a view that comes twice has the sum."""
    rng = np.random.default_rng(2)
    vectors = cameras.pose_vectors(some_poses(4))
    in_camera, points, by_points, by_directions = rng.normal(size=(4, 40, 3)).astype(np.float32)
    drawn = datasets.Batch(np.array([2, 0, 2]), None, in_camera, None, None, None)
    placed = cameras.placed_rays(vectors, drawn)
    found = cameras.grad_steps(vectors, drawn, points, by_points, by_directions)
    assert set(found) == {0, 2} and [part.stop for _, part in drawn.parts()] == [13, 26, 40]
    for view, rays in ((0, np.arange(13, 26)), (2, np.r_[0:13, 26:40])):
        origin, directions = cameras.rays(vectors[view], in_camera[rays])
        assert np.array_equal(placed.directions[rays], directions) and (placed.origins[rays] == origin).all()
        wanted = cameras.grad_step(vectors[view], in_camera[rays], points[rays], by_points[rays], by_directions[rays])
        np.testing.assert_allclose(found[view], wanted, rtol=1e-4)


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


# --- the scripts ------------------------------------------------------------------------------------------------------

def write_config(folder, **changes):
    """Write the configuration of a short run with trained cameras, with section__key=value changed. Return its name."""
    return write_demo_config(
        folder / "tiny.yaml", changes, data=dict(path="tiny", held_out_views=[8], cameras="cameras_linear_init.npz"),
        network=dict(width=64, feature=8, layers=6, without=["view"]), tracer=dict(samples=20),
        train=dict(steps=320, rays=256, learning_rate=1e-3, mask_weight=400, learning_rate_halved_at=[],
                   alpha_doubled_at=[], models=2, validations=2, validation_view=0, validation_downscale=2,
                   camera_learning_rate=5e-3)).name


def train(folder, *more, status=0, **changes):
    return run("train.py", "--context", "cpu", "--config", write_config(folder, **changes), *more, cwd=folder,
               status=status)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a tiny scene with inexact cameras, and a run on it."""
    folder = tmp_path_factory.mktemp("cameras")
    run("make_scene.py", "--output", "tiny", "--views", 8, "--held-out", 1, "--size", 32, "--camera-noise", 6, 0,
        cwd=folder)
    (folder / "said.txt").write_text(train(folder))
    return folder


MODEL = ("--config", "results_tiny/tiny.yaml", "--model-load-path", "results_tiny", "--context", "cpu")


def test_noisy_cameras_are_as_noisy_as_asked_for(folder):
    true, rng = some_poses(300), np.random.default_rng(0)
    true[:, :3, 3] *= 2.5 / np.linalg.norm(true[:, :3, 3], axis=1, keepdims=True)
    noisy = np.stack([make_scene.disturbed(pose, 4.0, 2.0, rng) for pose in true])
    turns = Rotation.from_matrix(np.swapaxes(noisy, 1, 2)[:, :3, :3] @ true[:, :3, :3]).magnitude()
    assert np.degrees(np.sqrt((turns ** 2).mean())) == pytest.approx(4, rel=0.1)
    moves = np.linalg.norm((noisy - true)[:, :3, 3], axis=1)
    assert np.sqrt((moves ** 2).mean()) == pytest.approx(0.02 * 2.5, rel=0.1)
    true, noisy = (datasets.load_cameras(folder / "tiny" / name, 9)
                   for name in ("cameras.npz", "cameras_linear_init.npz"))
    np.testing.assert_allclose(noisy[0], true[0], atol=1e-6)        # K
    np.testing.assert_allclose(noisy[1][:, :3, 3], true[1][:, :3, 3], atol=1e-6)
    assert "--camera-noise" in refused("make_scene.py", "--output", "more", "--camera-noise", -1, 2, cwd=folder)


def test_training_mends_cameras_and_says_so(folder):
    results = folder / "results_tiny"
    said = (folder / "said.txt").read_text()
    assert len(re.findall(r"cameras off by [\d.]+ degrees and [\d.]+ of", said)) == 2
    off = series(results, "camera_rotation")
    start = cameras.errors(*(datasets.load_cameras(folder / "tiny" / name, 9)[1][:8]
                             for name in ("cameras_linear_init.npz", "cameras.npz"))).rotation.mean()
    assert len(off) == 2 and off[-1] < 0.75 * start
    assert len(series(results, "camera_translation")) == 2
    pose = checkpoints.read_arrays(results / "model_00039.h5")[0]["cameras/pose"]
    start = cameras.pose_vectors(datasets.load_cameras(folder / "tiny" / "cameras_linear_init.npz", 9)[1])
    assert (pose[:8] != start[:8]).any(axis=1).all() and np.array_equal(pose[8], start[8])   # held out: unchanged
    nn.clear_parameters()
    nn.load_parameters(str(results / "model_00039.h5"))
    assert nn.get_parameters(grad_only=False)["cameras/pose"].shape == (9, 7)
    nn.clear_parameters()


def test_the_other_scripts_use_trained_cameras(folder):
    said = run("evaluate.py", *MODEL, cwd=folder)
    start, trained = (float(off) for off in re.findall(r"cameras .*: off by ([\d.]+) degrees", said))
    assert trained < 0.75 * start
    assert series(folder / "results_tiny", "camera_rotation_per_view").mean() == pytest.approx(trained, abs=1e-3)
    run("synthesize.py", *MODEL, "--views", 0, cwd=folder)
    run("extract.py", *MODEL, "--resolution", 32, cwd=folder)
    seen = (folder / "results_tiny" / "renders" / "view_000.png").read_bytes()
    arrays = checkpoints.read_arrays(folder / "results_tiny" / "model_00039.h5")[0]
    arrays["cameras/pose"][0, 4:] *= 1.2
    checkpoints.set_parameters(arrays)
    checkpoints.save_model(folder / "farther.h5")
    nn.clear_parameters()
    farther = (*MODEL[:3], "farther.h5", *MODEL[4:])
    run("synthesize.py", *farther, "--views", 0, "--monitor-path", "results", cwd=folder)
    assert (folder / "results_tiny" / "renders" / "view_000.png").read_bytes() != seen
    arrays["cameras/pose"] = arrays["cameras/pose"][:5]
    checkpoints.set_parameters(arrays)
    checkpoints.save_model(folder / "farther.h5")
    nn.clear_parameters()
    assert "farther.h5: has 5 trained cameras, and the scene 9 views" in refused(
        "synthesize.py", *farther, "--views", 0, "--monitor-path", "results", cwd=folder)


def test_a_resumed_run_with_cameras_is_the_one_that_was_not_interrupted(folder):
    """Take the rays of several views per step, which the fixture's run does not; 3 do not divide the 8 views."""
    changes = {"train__views_per_step": 3, "train__validations": 3, "train__models": 3, "train__steps": 90}
    train(folder, "--monitor-path", "whole", **changes)
    errors = series(folder / "whole_tiny", "camera_rotation")
    assert errors[-1] < errors[0]
    train(folder, "--monitor-path", "half", **{**changes, "train__steps": 30})
    train(folder, "--monitor-path", "half", "--resume", **changes)
    found, wanted = (checkpoints.read_arrays(folder / name / "state.h5")[0] for name in ("half_tiny", "whole_tiny"))
    assert set(found) == set(wanted) and "cameras/cameras/pose/m" in wanted
    for name in wanted:
        assert np.array_equal(found[name], wanted[name]), name
    for name in ("camera_rotation", "camera_translation", "psnr"):
        half, whole = (series(folder / run, name) for run in ("half_tiny", "whole_tiny"))
        assert half[-1] == whole[-1], name


def test_what_resuming_refuses(folder):
    train(folder, "--monitor-path", "exact", train__steps=8, train__camera_learning_rate=0)
    assert not checkpoints.read_arrays(folder / "exact_tiny" / "state.h5")[0].get("parameters/cameras/pose")
    write_config(folder, train__steps=16)
    said = refused("train.py", "--config", "tiny.yaml", "--monitor-path", "exact", "--resume", cwd=folder)
    assert "was begun without trained cameras" in said and "train.camera_learning_rate" in said
    assert "nowhere.npz: no such file" in refused(
        "train.py", "--config", write_config(folder, data__cameras="nowhere.npz"), cwd=folder)


@pytest.mark.parametrize("pose, word", [(np.zeros((9, 7)), "length 0"), (np.full((9, 7), np.nan), "not finite"),
                                        (np.ones((9, 6)), "(views, 7)")])
def test_cameras_that_no_model_may_have(tmp_path, pose, word):
    network.initialize(Network(64, 8, 4), np.random.default_rng(0))
    checkpoints.set_parameters({checkpoints.POSE: pose.astype(np.float32)})
    checkpoints.save_model(tmp_path / "model.h5")
    nn.clear_parameters()
    with pytest.raises(helper.UserError, match="cameras/pose") as refusal:
        checkpoints.load_model(tmp_path / "model.h5", architecture.parameter_shapes(Network(64, 8, 4)))
    assert word in str(refusal.value)


def test_a_run_without_the_renderers_normal_and_view(folder):
    without = {"network__without": ["normal", "view"], "train__camera_learning_rate": 0, "train__steps": 8}
    train(folder, "--monitor-path", "less", **without)
    arrays = checkpoints.read_arrays(folder / "less_tiny" / "model_00000.h5")[0]
    assert arrays["rendering/0/v"].shape == (3 + 8, 64)
    model = ("--model-load-path", "less_tiny", "--context", "cpu")
    run("evaluate.py", "--config", "less_tiny/tiny.yaml", *model, "--views", 0, cwd=folder)
    said = run("convert.py", "less_tiny/model_00000.h5", "--output", "less.pth", cwd=folder)
    assert "without: [view, normal]" in said
    run("convert.py", "less.pth", "--output", "back.h5", cwd=folder)
    write_config(folder)
    assert "rendering/0/v is (11, 64)" in refused("evaluate.py", "--config", "tiny.yaml", *model, cwd=folder)
    write_config(folder, network__without=["colour"])
    assert "network.without must be any of normal, view and feature" in refused("evaluate.py", "--config", "tiny.yaml",
                                                                               *model, cwd=folder)


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert "cameras are trained by one process, not 2" in refused(
        "train.py", "--config", write_config(folder), "--monitor-path", "several", cwd=folder)
