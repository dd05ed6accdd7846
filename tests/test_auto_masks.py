"""Masks from photographs and cameras alone, on small rendered scenes whose masks are known; and the parts."""
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import datasets
import helper
import make_scene
import prepare
from conftest import SHARED
from files import pictures, writing
from scenes import auto_masks, camera_files, mask_files, overview, segmentation, sparse_points, surroundings
from scenes.visual_hull import make_look

VIEWS, SIZE = 8, 160


def photographed(folder, scene, views=VIEWS, size=SIZE):
    """Write the photographs of a walk around a surroundings.Scene, and their cameras, to a folder. Return the masks."""
    masks, matrices = [], {}
    for index, camera in enumerate(make_scene.walk_cameras(views, 0, size)):
        image, mask = surroundings.render(scene, camera, np.random.default_rng(index))
        writing.write_image(folder / "image" / f"{index:03d}.png", image)
        matrices[f"world_mat_{index}"] = make_scene.world_matrices(camera.intrinsics, camera.pose)[0]
        masks.append(mask > 0)
    np.savez(folder / "cameras.npz", **matrices)
    return masks


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Return by kind of surroundings a folder of photographs and cameras, without masks, and the true masks."""
    folder = tmp_path_factory.mktemp("places")
    return {kind: (folder / kind, photographed(folder / kind, make_scene.floor_scene(kind)))
            for kind in surroundings.KINDS}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs prepare.py in tmp_path and returns status, stdout and the last line of stderr."""
    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        monkeypatch.setattr(overview, "draw", lambda *_, **__: None)
        status = 0
        try:
            helper.run(prepare.main)
        except SystemExit as stopped:
            status = stopped.code
        out, error = capsys.readouterr()
        return status, out, error.splitlines()[-1]
    return run


def shares(folder, masks):
    """Return the intersections over union of a scene's masks and the true ones."""
    found = [pictures.read_mask(path) for path in datasets.scene_files(folder)[1]]
    return np.array([auto_masks.overlap(*pair) for pair in zip(found, masks)])


@pytest.mark.parametrize("kind, least", [("textured", 0.88), ("clutter", 0.85), ("white", 0.85), ("black", 0.95)])
def test_the_object_is_found_in_every_place(kind, least, places, run, tmp_path):
    source, masks = places[kind]
    options = ("--masks", "auto") if kind == "white" else ()    # without masks, auto is the default
    status, out, error = run(source, "--output", "scene", *options)
    assert status == 0, error
    assert "masks: auto" in out and f"train.mask_weight: {prepare.FOUND_MASK_WEIGHT}" in out
    assert shares(tmp_path / "scene", masks).mean() > least


def test_points_of_a_camera_file_are_used_if_they_are_enough(places, monkeypatch):
    source, masks = places["black"]
    views, matched = camera_files.read_views(source)[0], []
    monkeypatch.setattr(sparse_points, "find_features", lambda *_: matched.append(1))
    points = make_scene.surface_samples(400, np.random.default_rng(0)) * make_scene.SCALE + make_scene.OFFSET
    makers = auto_masks.mask_makers(views, points=points)
    found = [maker(pictures.read_image(view.image)) for view, maker in zip(views, makers)]
    assert np.mean([auto_masks.overlap(*pair) for pair in zip(found, masks)]) > 0.95 and not matched
    with pytest.raises(AttributeError):     # too few: the photographs are matched, here by what finds nothing
        auto_masks.mask_makers(views, points=points[:100])
    assert len(matched) == VIEWS


def test_masks_that_are_there_are_taken(places, run, tmp_path):
    source, masks = places["black"]
    for index, mask in enumerate(masks):
        writing.write_image(tmp_path / "masks" / f"{index:03d}.png", mask[:, ::-1].astype(np.uint8) * 255)
    views = camera_files.read_views(source)[0]
    assert mask_files.mask_sources(views, None, tmp_path) == [tmp_path / "masks" / f"{i:03d}.png" for i in range(VIEWS)]
    assert mask_files.mask_sources(views, "auto", tmp_path) == ["auto"] * VIEWS
    assert mask_files.mask_sources(views, None, source) == ["auto"] * VIEWS


def two_teapots(points):
    """Return the sdf of a teapot in the middle and of another, half as large, beside it."""
    beside = make_scene.exact_sdf((points - np.float32((0.45, 0.6, -0.25))) / np.float32(0.4)) * np.float32(0.4)
    return np.minimum(make_scene.exact_sdf(points / np.float32(0.55)) * np.float32(0.55), beside)


def test_a_box_says_which_object_is_meant(tmp_path, monkeypatch):
    small = (0.45, 0.6, -0.25)

    def albedo(points):
        own = make_scene.painted(points)
        return np.where((np.linalg.norm(points - np.float32(small), axis=1) < 0.36)[:, None], own[:, ::-1], own)

    scene = make_scene.floor_scene("black")
    scene = scene._replace(sdf=two_teapots, shade=lambda points, _: albedo(points).astype(np.float32), light=None)
    cameras = make_scene.walk_cameras(8, 0, 160)
    looks, truth, features = [], [], []
    for camera in cameras:
        image, mask = surroundings.render(scene, camera, np.random.default_rng(0))
        origin, directions = helper.pixel_rays(helper.pixel_grid(*mask.shape), camera.intrinsics, camera.pose)
        aside = np.linalg.norm(np.cross(directions, np.float32(small) - origin), axis=1).reshape(mask.shape)
        truth.append((mask > 0) & (aside < 0.34))
        looks.append(make_look("x", image, mask > 0, camera.intrinsics, camera.pose))
        features.append(sparse_points.find_features(image, camera.intrinsics))
    points = sparse_points.triangulated(features, np.stack([camera.pose for camera in cameras]))
    rows, columns = np.nonzero(truth[0])
    box = np.array((columns.min() - 3, rows.min() - 3, columns.max() + 3, rows.max() + 3))
    plain = auto_masks.find_masks(looks, points)
    boxed = auto_masks.find_masks(looks, points, auto_masks.Subject(0, box))
    of_small = [np.mean([auto_masks.overlap(look.mask, mask) for look, mask in zip(found.looks, truth)])
                for found in (plain, boxed)]
    assert of_small[0] < 0.5 < 0.75 < of_small[1]


@pytest.mark.parametrize("text, says", [
    ("0:1,2,3", "give a photograph and a box in pixels"), ("0:1,2,3,x", "give a photograph"),
    ("1,2,3,4", "no photograph"), ("0:50,10,20,40", "does not lie in"), ("0:-1,2,20,40", "does not lie in 000.png"),
    ("nobody.png:1,2,3,4", "no photograph nobody.png"), (f"{VIEWS}:1,2,3,4", f"no photograph {VIEWS}"),
    ("000.png:1,2,3,nan", "give a photograph"), ("-1:1,2,3,4", "no photograph -1"),
    (f"003:1,2,{SIZE + 1},40", "does not lie in 003.png"),
])
def test_bad_boxes_are_refused_in_one_line(text, says, places, run, tmp_path):
    status, _, error = run(places["black"][0], "--output", "scene", f"--subject={text}")
    assert status == 2 and error.startswith("error: --subject") and says in error and not list(tmp_path.iterdir())


def test_a_box_is_for_automatic_masks(places, run, tmp_path):
    status, _, error = run(places["black"][0], "--output", "scene", "--masks", "background", "--subject", "0:1,2,30,40")
    assert status == 2 and error == "error: --subject is of --masks auto; add that, or leave it out"


def test_rembg_is_asked_for_by_name_where_it_is_missing(places, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)     # import then fails
    status, _, error = run(places["black"][0], "--output", "scene", "--masks", "rembg")
    assert status == 2 and "pip install" in error and "--masks auto" in error and not list(tmp_path.iterdir())


class Rembg:
    """The package's interface, as far as it is used: `remove` asks a session for the masks, as Pillow's pictures."""
    @staticmethod
    def new_session():
        class Session:
            @staticmethod
            def predict(picture):
                assert picture.mode == "RGB"
                return [picture.convert("HSV").getchannel("V").point(lambda value: 255 * (value > 40))]
        return Session()

    @staticmethod
    def remove(data, session=None, only_mask=False):
        masks = session.predict(Image.fromarray(data))
        assert only_mask and len(masks) == 1
        return np.asarray(masks[0])


def test_rembg_makes_the_masks(places, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", Rembg)
    source, masks = places["black"]
    status, out, error = run(source, "--output", "scene", "--masks", "rembg")
    assert status == 0 and "masks: rembg" in out, error
    assert shares(tmp_path / "scene", masks).mean() > 0.9


@pytest.mark.parametrize("failure", [OSError("Max retries exceeded with url: u2net.onnx\nno route"),
                                     ValueError("hash of downloaded file does not match")])
def test_a_network_of_rembg_that_cannot_be_fetched(failure, places, run, tmp_path, monkeypatch):
    def fail():
        raise failure

    monkeypatch.setattr(Rembg, "new_session", staticmethod(fail))
    monkeypatch.setitem(sys.modules, "rembg", Rembg)
    monkeypatch.setattr(camera_files, "read_views", lambda *_: pytest.fail("it is tried before the cameras"))
    status, _, error = run(places["black"][0], "--output", "scene", "--masks", "rembg")
    assert status == 2 and str(failure).splitlines()[0] in error and "--masks auto" in error
    assert not list(tmp_path.iterdir())


def test_photographs_of_nothing_end_in_one_line(tmp_path, run):
    source = tmp_path / "input"
    masks = photographed(source, make_scene.floor_scene("black"), 4, 64)
    for index, mask in enumerate(masks):
        writing.write_image(source / "image" / f"{index:03d}.png", np.full((*mask.shape, 3), 90, np.uint8))
    status, _, error = run(source, "--output", "scene")
    assert status == 2 and error.startswith("error: ") and "--subject" in error and not (tmp_path / "scene").exists()


# --- the parts --------------------------------------------------------------------------------------------------------

def test_points_and_table_lie_on_what_was_rendered(places):
    source = places["textured"][0]
    views = camera_files.read_views(source)[0]
    features = [sparse_points.find_features(pictures.read_image(view.image), view.intrinsics) for view in views]
    poses = np.stack([view.pose for view in views])
    points = (sparse_points.triangulated(features, poses) - make_scene.OFFSET) / make_scene.SCALE
    assert len(points) > 200
    off = np.minimum(np.abs(points[:, 2] - surroundings.FLOOR), np.abs(make_scene.exact_sdf(points.astype(np.float32))))
    assert np.median(off) < 0.02
    poses[:, :3, 3] = (poses[:, :3, 3] - make_scene.OFFSET) / make_scene.SCALE
    table = sparse_points.find_table(points, poses, 1.0)
    assert table.normal @ (0, 0, 1) > 0.999 and table.offset == pytest.approx(surroundings.FLOOR, abs=0.02)
    above = points[table.heights(points) > 0.1]
    assert sparse_points.find_table(above, poses, 1.0) is None      # the teapot itself is no table


def test_axes_meet_where_most_cameras_look():
    target = np.array((0.3, -0.2, 0.5))
    poses = np.stack([make_scene.look_at(3 * d, target, (0.1, 0.2, 1)) for d in make_scene.fibonacci_sphere(12)])
    assert sparse_points.axes_centre(poses) == pytest.approx(target, abs=1e-6)
    poses[0] = make_scene.look_at(poses[0, :3, 3], (1.5, 1.5, 0), (0, 0, 1))    # one looks elsewhere
    assert sparse_points.axes_centre(poses) == pytest.approx(target, abs=0.02)


def brute_cost(mask, evidence, costs):
    return (costs[0][:, :-1] * (mask[:, 1:] != mask[:, :-1])).sum() + (costs[1][:-1] * (mask[1:] != mask[:-1])).sum() \
        - evidence[mask].sum()


def test_a_cut_has_the_least_cost_of_all_masks():
    rng = np.random.default_rng(3)
    for _ in range(5):
        evidence, costs = rng.normal(size=(3, 4)), rng.uniform(0, 1.2, (2, 3, 4)).astype(np.float32)
        every = [np.array([number >> bit & 1 for bit in range(12)], bool).reshape(3, 4) for number in range(4096)]
        least = min(brute_cost(mask, evidence, costs) for mask in every)
        found = segmentation.cut(evidence, costs, np.full((3, 4), 0.5), steps=2000)
        assert brute_cost(found, evidence, costs) == pytest.approx(least, abs=1e-4)


def test_colours_speak_for_what_has_them():
    image = np.zeros((20, 20, 3), np.uint8)
    image[:, 10:] = (200, 40, 30)
    bins, weights = segmentation.colour_bins(image), np.zeros((20, 20))
    weights[:, 10:] = 1
    pair = segmentation.histogram(bins, weights), segmentation.histogram(bins, 1 - weights)
    says = segmentation.colour_evidence(pair, pair)
    assert says[bins[0, 15]] > 3 and says[bins[0, 5]] < -3
    green = segmentation.colour_bins(np.full((1, 1, 3), (20, 220, 60), np.uint8))[0, 0]
    assert abs(says[green]) < 0.1       # a colour that neither has says nothing


def test_a_view_says_nothing_of_what_it_does_not_show():
    camera = make_scene.walk_camera(0.0, 64)
    projection = (camera.intrinsics @ np.linalg.inv(camera.pose)[:3])[None]
    points = np.array([(0.0, 0, 0), (0, 30, 0), (20, 0, 10)])      # in the picture, beside it, behind the camera
    seen, met = auto_masks.votes(points, projection, np.ones((1, *camera.shape), bool))
    assert seen.tolist() == [1, 0, 0] and met.tolist() == [1, 0, 0]


def test_pictures_are_resampled_about_pixel_centres():
    rng = np.random.default_rng(0)
    fine = cv2.GaussianBlur(rng.normal(size=(60, 84)).astype(np.float32), (0, 0), 6)
    coarse = fine.reshape(20, 3, 28, 3).mean(axis=(1, 3))
    assert np.abs(auto_masks.resampled(coarse, 3, (60, 84)) - fine)[6:-6, 6:-6].max() < 0.1 * np.abs(fine).max()


def test_scans_of_dtu(tmp_path):
    scan = SHARED / "data" / "dtu_scan65"
    if not scan.is_dir():
        pytest.skip("DTU's scan 65 (shared/data/dtu_scan65) is not there")
    views = camera_files.read_views(scan / "cameras.npz")[0][::5]
    makers = auto_masks.mask_makers(views)
    masks = [pictures.read_mask(path) for path in datasets.scene_files(Path(scan))[1][::5]]
    found = [maker(pictures.read_image(view.image)) for view, maker in zip(views, makers)]
    assert np.mean([auto_masks.overlap(*pair) for pair in zip(found, masks)]) > 0.94
