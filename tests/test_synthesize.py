"""Test camera paths, videos, and one model's appearance on another's shape."""
import imageio.v2 as imageio
import nnabla as nn
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import helper
import make_scene
import network
import synthesize
from backends import architecture, context
from config.settings import Network
from files import writing
from training import checkpoints


def ring(*degrees):
    """Return poses of level cameras at these angles of a circle about z, slightly above the centre."""
    return np.stack([make_scene.look_at((2.5 * np.cos(a), 2.5 * np.sin(a), 0.8), (0, 0, 0), (0, 0, 1))
                     for a in np.radians(degrees)])


def test_a_turntable_goes_once_around_the_upright_axis():
    poses = synthesize.turntable(ring(10, 130, 250), 1, 36)
    assert poses == pytest.approx(ring(*(130 + 10 * np.arange(36))), abs=1e-9)


def rolled(poses, *degrees):
    """Return the poses, with each camera rolled about its axis by the next of these angles, cyclically."""
    rolls = Rotation.from_euler("z", [degrees[i % len(degrees)] for i in range(len(poses))], degrees=True).as_matrix()
    poses = poses.copy()
    poses[:, :3, :3] = poses[:, :3, :3] @ rolls
    return poses


def dome(count, least=0.0):
    """Return poses of cameras on a hemisphere, or on its part above the height `least`, looking at its centre."""
    places = make_scene.fibonacci_sphere(int(2 * count / (1 - least)))
    return np.stack([make_scene.look_at(2.5 * place, (0, 0, 0), (0, 0, 1)) for place in places if place[2] > least])


def off(poses):
    """Return the angle in degrees between z and helper.upright of these poses, both under an arbitrary rotation."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec((0.3, -1.1, 0.7)).as_matrix()
    return np.degrees(np.arccos(np.clip(helper.upright(turn @ poses) @ turn[:3, 2], -1, 1)))


CIRCLE = np.linspace(0, 360, 16, endpoint=False)


@pytest.mark.parametrize("degrees", [(90,), (-90,), (90, -90), (0, 90), (0, 90, 0, -90)])
@pytest.mark.parametrize("poses", [ring(*CIRCLE), ring(0, 120, 240), ring(*CIRCLE[:10]), dome(16), dome(60),
                                   dome(20, 0.5)], ids=["ring", "three", "arc", "sparse dome", "dome", "cap"])
def test_up_is_the_axis_of_cameras_that_lie_on_their_sides(poses, degrees):
    assert off(rolled(poses, *degrees)) < 10


@pytest.mark.parametrize("poses", [ring(10), ring(10, 40), ring(*CIRCLE[:4]), ring(*CIRCLE), dome(60)])
def test_up_is_the_mean_of_the_cameras_where_they_agree(poses):
    mean = -poses[:, :3, 1].mean(axis=0)
    assert helper.upright(poses) @ mean / np.linalg.norm(mean) > np.cos(np.radians(3))
    mean = -rolled(poses, 180)[:, :3, 1].mean(axis=0)       # photographs upside down are taken as they are
    assert helper.upright(rolled(poses, 180)) @ mean > 0


def test_up_where_nothing_says_it():
    for poses in (rolled(ring(0, 180), 90), rolled(ring(0, 180), 90, -90), rolled(ring(5, 5), 0, 180),
                  rolled(np.eye(4)[None].repeat(4, axis=0), 0, 90, 180, 270)):
        assert np.linalg.norm(helper.upright(poses)) == pytest.approx(1)
    one = rolled(ring(10), 90)
    assert helper.upright(one) == pytest.approx(-one[0, :3, 1])


def test_a_turntable_of_photographs_that_lie_on_their_side_turns_about_the_rings_axis():
    poses = rolled(ring(*CIRCLE), 90)
    heights = synthesize.turntable(poses, 1, 12)[:, 2, 3]
    assert heights == pytest.approx(poses[:, 2, 3].mean())


def test_right_of_someone_who_looks_along_any_direction():
    assert helper.rightwards(np.array((0.0, 0, 1)), np.array((0.0, -3, 1))) == pytest.approx([1, 0, 0])
    for back in ((0, 0, 1), (0, 0, -5), (0, 0, 0)):
        right = helper.rightwards(np.array((0.0, 0, 1)), np.array(back, float))
        assert np.linalg.norm(right) == pytest.approx(1) and right[2] == 0


def test_between_cameras_of_a_ring_lie_those_of_the_ring():
    intrinsics = np.stack([np.diag([f, f, 1.0]) for f in (100.0, 200.0, 250.0)])
    between, poses = synthesize.between_cameras(intrinsics, ring(0, 40, 60), 9)
    assert poses == pytest.approx(ring(0, 10, 20, 30, 40, 45, 50, 55, 60), abs=1e-9)
    assert between[:, 0, 0] == pytest.approx([100, 125, 150, 175, 200, 212.5, 225, 237.5, 250])


def test_the_way_between_opposite_cameras_does_not_lead_through_the_object():
    poses = synthesize.between_cameras(np.eye(3)[None].repeat(2, axis=0), ring(0, 179), 20)[1]
    assert np.linalg.norm(poses[:, :3, 3], axis=1) == pytest.approx(np.hypot(2.5, 0.8))


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_video_holds_its_frames(tmp_path, suffix):
    path = tmp_path / f"video{suffix}"
    with writing.video_writer(path) as append:
        for level in (0.1, 0.5, 0.9):
            append(np.full((33, 46, 3), (level, 0.5, 0.2)))
    with imageio.get_reader(path) as reader:
        frames = [frame[..., :3] for frame in reader]
    assert len(frames) == 3 and frames[0].shape == (34, 46, 3)
    for frame, level in zip(frames, (0.1, 0.5, 0.9)):
        assert np.abs(frame - 255 * np.array((level, 0.5, 0.2))).mean() < 5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_interrupted_video_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with writing.video_writer(tmp_path / "video.mp4") as append:
            append(np.zeros((16, 16, 3)))
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_another_models_renderer_colours_this_models_shape(tmp_path):
    context.set_context("cpu", "0")

    def parameters(part):
        return [p.d.copy() for layer in network.layer_parameters(part) for p in layer]

    stored = {}
    for name, width, feature, seed in (("other", 80, 8, 1), ("unfit", 64, 5, 2), ("ours", 64, 8, 0)):
        network.initialize(Network(width, feature, 9), np.random.default_rng(seed))
        checkpoints.save_model(tmp_path / f"{name}.h5")
        stored[name] = {part: parameters(part) for part in ("implicit", "rendering")}
    synthesize.take_appearance(tmp_path / "other.h5", Network(64, 8, 9))
    for part, owner in (("implicit", "ours"), ("rendering", "other")):
        assert len(parameters(part)) == len(stored[owner][part])
        assert all(map(np.array_equal, parameters(part), stored[owner][part]))
    points = np.random.default_rng(3).normal(size=(50, 3)).astype(np.float32)
    rgb, normals = network.shade(points, -points)
    nn.clear_parameters()
    checkpoints.load_model(tmp_path / "ours.h5", architecture.parameter_shapes(Network(64, 8, 9)))
    own_rgb, own_normals = network.shade(points, -points)
    assert np.array_equal(normals, own_normals) and np.abs(rgb - own_rgb).max() > 0.01
    with pytest.raises(helper.UserError, match="unfit.h5.* 38 numbers .* 41, with network.feature 8, .* the same"):
        synthesize.take_appearance(tmp_path / "unfit.h5", Network(64, 8, 9))


@pytest.mark.parametrize("without", [["view"], ["normal"], ["feature"], ["view", "normal"], ["normal", "feature"],
                                     ["view", "normal", "feature"]])
def test_another_models_renderer_that_is_not_given_everything(tmp_path, without):
    context.set_context("cpu", "0")
    points = np.random.default_rng(3).normal(size=(50, 3)).astype(np.float32)
    feature = 5 if "feature" in without else 8
    network.initialize(Network(80, feature, 9, without=list(without)), np.random.default_rng(1))
    checkpoints.save_model(tmp_path / "other.h5")
    network.initialize(Network(80, 8, 9), np.random.default_rng(1))
    checkpoints.save_model(tmp_path / "whole.h5")
    network.initialize(Network(64, 8, 6, without=list(without)), np.random.default_rng(0))
    own_rgb, own_normals = network.shade(points, -points, without)
    synthesize.take_appearance(tmp_path / "other.h5", Network(64, 8, 6, without=list(without)))
    rgb, normals = network.shade(points, -points, without)
    assert np.array_equal(normals, own_normals) and np.abs(rgb - own_rgb).max() > 1e-3
    with pytest.raises(helper.UserError, match="whole.h5: .* 41 numbers .* network.without"):
        synthesize.take_appearance(tmp_path / "whole.h5", Network(64, 8, 6, without=list(without)))
