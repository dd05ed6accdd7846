"""The paths of a camera, and videos."""
import imageio.v2 as imageio
import numpy as np
import pytest

import helper
import make_scene
import synthesize


def ring(*degrees):
    """Poses of level cameras at these places of a circle about z, a little above the middle."""
    return np.stack([make_scene.look_at((2.5 * np.cos(a), 2.5 * np.sin(a), 0.8), (0, 0, 0), (0, 0, 1))
                     for a in np.radians(degrees)])


def test_a_turntable_goes_once_around_the_upright_axis():
    poses = synthesize.turntable(ring(10, 130, 250), 1, 36)
    assert poses == pytest.approx(ring(*(130 + 10 * np.arange(36))), abs=1e-9)


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
    with helper.video_writer(path) as append:
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
        with helper.video_writer(tmp_path / "video.mp4") as append:
            append(np.zeros((16, 16, 3)))
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
