"""prepare.py on the embedded scene in every format of cameras and masks: what it writes, refuses and says."""
import json
import struct
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
from conftest import SHARED, link_scan65
from files import pictures
from scenes import camera_files, mask_files, overview
from scenes.visual_hull import Hull, agreements, enclosing_sphere, find_hull, make_look, touches_border

SIZE, VIEWS = 64, 8
NAMES = [f"view_{index + 5}.png" for index in range(VIEWS)]  # view_10 comes after view_9, not before view_5


# --- the embedded scene in every format -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def truth():
    """Return intrinsics (3, 3), poses (N, 4, 4) in world units, images and masks of views of the embedded scene."""
    intrinsics, poses, images, masks = make_scene.camera_intrinsics(SIZE), [], [], []
    for direction in make_scene.fibonacci_sphere(VIEWS):
        pose = make_scene.look_at(3.1 * direction, np.zeros(3), (0, 0, 1))
        image, mask = make_scene.render(intrinsics, pose, SIZE)
        pose[:3, 3] = make_scene.SCALE * pose[:3, 3] + make_scene.OFFSET
        poses.append(pose), images.append(image), masks.append(mask)
    return intrinsics, np.stack(poses), images, masks


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def photographs(folder, truth, where="images", masks="masks"):
    for name, image, mask in zip(NAMES, *truth[2:]):
        save(folder / where / name, image)
        if masks:
            save(folder / masks / name, mask)


def quaternion(rotation):
    """Return the quaternion w, x, y, z of a rotation (3, 3)."""
    vector = cv2.Rodrigues(rotation)[0][:, 0]
    angle = np.linalg.norm(vector)
    return np.concatenate([[np.cos(angle / 2)], np.sin(angle / 2) * vector / max(angle, 1e-12)])


def colmap(folder, truth, binary=True, model="SIMPLE_RADIAL", extra=(0.0,)):
    """Write a COLMAP workspace. Its pixel centres are at half-integers."""
    k, poses = truth[:2]
    photographs(folder, truth)
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    focal = [k[0, 0]] if model.startswith("SIMPLE") or model.startswith("RADIAL") else [k[0, 0], k[1, 1]]
    values = [*focal, k[0, 2] + 0.5, k[1, 2] + 0.5, *extra]
    lines, content = [], struct.pack("<Q", VIEWS)
    for index, (name, pose) in enumerate(zip(NAMES, poses)):
        motion = [*quaternion(pose[:3, :3].T), *(-pose[:3, :3].T @ pose[:3, 3])]
        lines.append(f"{index + 1} {' '.join(map(repr, map(float, motion)))} 7 {name}\n1.0 2.0 -1\n")
        content += struct.pack("<i7di", index + 1, *motion, 7) + name.encode() + b"\0"
        content += struct.pack("<Q2dq", 1, 1.0, 2.0, -1)
    if binary:
        number = [name for name, _ in camera_files.COLMAP_MODELS].index(model)
        (sparse / "cameras.bin").write_bytes(struct.pack(f"<QiiQQ{len(values)}d", 1, 7, number, SIZE, SIZE, *values))
        (sparse / "images.bin").write_bytes(content)
    else:
        parameters = " ".join(repr(float(value)) for value in values)
        (sparse / "cameras.txt").write_text(f"# a comment\n7 {model} {SIZE} {SIZE} {parameters}\n")
        (sparse / "images.txt").write_text("# a comment\n" + "".join(reversed(lines)))
    return folder


def colmap_text(folder, truth):
    return colmap(folder, truth, binary=False)


def nerfstudio(folder, truth, **changes):
    k, poses = truth[:2]
    photographs(folder, truth, masks="mattes")
    frames = [{"file_path": f"images/{name}", "mask_path": f"mattes/{name}",
               "transform_matrix": (pose @ np.diag((1, -1, -1, 1))).tolist()} for name, pose in zip(NAMES, poses)]
    tree = {"camera_model": "OPENCV", "fl_x": k[0, 0], "fl_y": k[1, 1], "cx": k[0, 2] + 0.5, "cy": k[1, 2] + 0.5,
            "w": SIZE, "h": SIZE, "k1": 0, "k2": 0, "p1": 0, "p2": 0, "frames": frames[::-1], **changes}
    (folder / "transforms.json").write_text(json.dumps(tree))
    return folder


def blender(folder, truth):
    """Write a scene like NeRF's synthetic ones: one angle, names without suffix, masks in the alpha channel."""
    k, poses, images, masks = truth
    for name, image, mask in zip(NAMES, images, masks):
        save(folder / "train" / name, np.dstack([image, mask]))
    frames = [{"file_path": f"./train/{name[:-4]}", "transform_matrix": (pose @ np.diag((1, -1, -1, 1))).tolist()}
              for name, pose in zip(NAMES, poses)]
    tree = {"camera_angle_x": 2 * np.arctan(SIZE / 2 / k[0, 0]), "frames": frames}
    (folder / "transforms_train.json").write_text(json.dumps(tree))
    return folder


def middlebury(folder, truth):
    k, poses = truth[:2]
    photographs(folder, truth, where=".")
    lines = [str(VIEWS)]
    for name, pose in zip(NAMES, poses):
        rotation = pose[:3, :3].T
        numbers = [*k.ravel(), *rotation.ravel(), *(-rotation @ pose[:3, 3])]
        lines.append(" ".join([name] + [repr(float(number)) for number in numbers]))
    (folder / "teapot_par.txt").write_text("\n".join(lines) + "\n")
    return folder


def plain(folder, truth):
    k, poses = truth[:2]
    photographs(folder, truth)
    tree = {name: {"K": k.tolist(), "R": pose[:3, :3].T.tolist(), "t": (-pose[:3, :3].T @ pose[:3, 3]).tolist()}
            for name, pose in zip(NAMES, poses)}
    (folder / "cameras.json").write_text(json.dumps(tree))
    return folder


def unnormalised(folder, truth):
    """Write the authors' format without scale_mat. Its names sort as plain text."""
    k, poses, images, masks = truth
    arrays = {}
    for index, (pose, image, mask) in enumerate(zip(poses, images, masks)):
        save(folder / "image" / f"{index:03d}.png", image)
        save(folder / "mask" / f"{index:03d}.png", mask)
        matrix = np.linalg.inv(pose)
        matrix[:3] = k @ matrix[:3]
        arrays[f"world_mat_{index}"] = -0.5 * matrix  # a projection's scale and sign do not matter
    np.savez(folder / "cameras.npz", **arrays)
    return folder


FORMS = (colmap, colmap_text, nerfstudio, blender, middlebury, plain, unnormalised)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs the script in this process, in tmp_path, and returns status, stdout and messages."""
    def run(*arguments, drawn=False):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        with monkeypatch.context() as patch:
            if not drawn:
                patch.setattr(overview, "draw", lambda *_, **__: None)
            try:
                helper.run(prepare.main)
                status = 0
            except SystemExit as stopped:
                status = stopped.code
        out, error = capsys.readouterr()
        said = [line for line in error.splitlines() if line.startswith(("error:", "wrong:", "look:", "notice:"))]
        return status, out, "\n".join(said)
    return run


@pytest.fixture
def refused(run, tmp_path):
    """Return a function that asserts that the script refuses in one line with all `words`, and writes nothing."""
    def refused(source, *words, options=()):
        before = sorted(tmp_path.rglob("*"))
        status, _, error = run(source, "--output", tmp_path / "scene", *options)
        assert status == 2 and error.splitlines()[-1].startswith("error:")
        for word in words:
            assert str(word) in error.splitlines()[-1]
        assert sorted(tmp_path.rglob("*")) == before
        return error
    return refused


def world_points():
    """Return points (N, 3) of the object's surface in world units."""
    return make_scene.surface_mesh(48).vertices * make_scene.SCALE + make_scene.OFFSET


# --- what it writes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_scene(form, truth, run, tmp_path):
    k, poses, images, masks = truth
    source = tmp_path / "input"
    source.mkdir()
    status, out, error = run(form(source, truth), "--output", "scenes/mine")
    assert (status, error) == (0, "") and "8 views" in out
    scene = datasets.load_scene(tmp_path / "scenes" / "mine")
    np.testing.assert_array_equal(scene.images, images)
    np.testing.assert_array_equal(scene.masks, np.stack(masks) > 0)
    centre, radius = scene.scale_mat[:3, 3], scene.scale_mat[0, 0]
    np.testing.assert_array_equal(scene.scale_mat[:3, :3], radius * np.eye(3))
    for intrinsics, found, pose in zip(scene.intrinsics, scene.poses, poses):
        np.testing.assert_allclose(intrinsics, k, atol=1e-6)
        np.testing.assert_allclose(found[:3, :3], pose[:3, :3], atol=1e-7)
        np.testing.assert_allclose(radius * found[:3, 3] + centre, pose[:3, 3], atol=1e-4)
    away = np.linalg.norm(world_points() - centre, axis=1) / radius
    assert 0.4 < away.max() < 0.92  # the object fills the unit sphere well
    for view, mask in enumerate(scene.masks):
        v, u = np.nonzero(mask)
        origin, directions, _, _ = datasets.view_rays(scene, view, np.stack([u, v], axis=1))
        assert np.linalg.norm(np.cross(origin[None], directions), axis=1).max() < 1


def distorted(picture, k, coefficients, fisheye):
    """Return a picture as a lens with these coefficients shows it."""
    grid = helper.pixel_grid(SIZE, SIZE)[:, None].astype(np.float64)
    undo = cv2.fisheye.undistortPoints if fisheye else cv2.undistortPoints
    maps = undo(grid, k, np.array(coefficients), None, k).reshape(SIZE, SIZE, 2).astype(np.float32)
    return cv2.remap(picture, maps, None, cv2.INTER_LINEAR)


@pytest.mark.parametrize("model, extra, coefficients", [
    ("SIMPLE_RADIAL", (0.3,), (0.3, 0, 0, 0)), ("OPENCV", (0.3, 0.2, 0.02, -0.02), (0.3, 0.2, 0.02, -0.02)),
    ("OPENCV_FISHEYE", (0.8, 0.2, 0, 0), (0.8, 0.2, 0, 0)), ("transforms.json", (), (0.3, 0.2, 0.02, -0.02))])
def test_distortion_is_undone(model, extra, coefficients, truth, run, tmp_path):
    k, poses, images, masks = truth
    fisheye = model.endswith("FISHEYE")
    bent = [[distorted(picture, k, coefficients, fisheye) for picture in pictures] for pictures in (images, masks)]
    source = tmp_path / "input"
    source.mkdir()
    if model == "transforms.json":
        nerfstudio(source, (k, poses, *bent), **dict(zip(("k1", "k2", "p1", "p2"), coefficients)))
    else:
        colmap(source, (k, poses, *bent), model=model, extra=extra)
    assert run(source, "--output", "mine")[0] == 0
    scene = datasets.load_scene(tmp_path / "mine")
    differs = np.mean([(bent > 127) != (mask > 0) for bent, mask in zip(bent[1], masks)])
    assert np.mean(scene.masks != (np.stack(masks) > 0)) < 0.25 * differs


def test_downscale_and_photographs_of_another_size(truth, run, tmp_path):
    source = colmap(tmp_path / "input", truth)
    assert run(source, "--output", "half", "--downscale", 2)[0] == 0
    half = datasets.load_scene(tmp_path / "half")
    whole = truth[0]
    np.testing.assert_allclose(half.intrinsics[0], datasets.shrink_intrinsics(whole, 2), atol=1e-6)
    for name in NAMES:  # the photographs were larger when COLMAP saw them
        for where in ("images", "masks"):
            picture = Image.open(source / where / name)
            picture.resize((SIZE // 2, SIZE // 2), Image.BOX).save(source / where / name)
    assert run(source, "--output", "small")[0] == 0
    np.testing.assert_allclose(datasets.load_scene(tmp_path / "small").intrinsics, half.intrinsics, atol=1e-6)


def test_masks_are_found_in_every_place(truth, tmp_path):
    source = colmap(tmp_path / "input", truth)
    views = camera_files.read_views(source)[0]
    assert [mask.name for mask in mask_files.mask_sources(views, None, source)] == NAMES
    for name in NAMES:
        (source / "masks" / name).rename(source / "masks" / f"{name}.png")  # COLMAP's own names
    assert [mask.name for mask in mask_files.mask_sources(views, None, source)] == [f"{name}.png" for name in NAMES]
    for index, name in enumerate(NAMES):
        (source / "masks" / f"{name}.png").rename(source / "masks" / f"{index:03d}.png")
    assert [m.name for m in mask_files.mask_sources(views, None, source)] == [f"{i:03d}.png" for i in range(VIEWS)]
    (source / "masks" / "003.png").unlink()
    with pytest.raises(helper.UserError, match="no mask for view_5.png"):
        mask_files.mask_sources(views, None, source)


def test_a_photograph_is_not_its_own_mask(truth, tmp_path, monkeypatch):
    source = colmap(tmp_path / "input", truth)
    monkeypatch.chdir(source / "sparse")  # so photographs are ../images/view_5.png, next to ../masks
    views = camera_files.read_views("..")[0]
    sources = mask_files.mask_sources(views, None, Path(".."))
    assert [mask.resolve() for mask in sources] == [source.resolve() / "masks" / name for name in NAMES]


def test_masks_from_the_background(truth, run, tmp_path):
    k, _, images, masks = truth
    rng = np.random.default_rng(0)
    for image, mask in zip(images, masks):
        noisy = np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
        noisy[3:4, 5:7] = 255  # a speck
        found = mask_files.background_mask(noisy)
        assert (found & (mask > 0)).sum() / (found | (mask > 0)).sum() > 0.93
    dark = [np.where(mask[..., None] > 0, image, 10).astype(np.uint8) for image, mask in zip(images, masks)]
    source = middlebury(tmp_path / "input", (*truth[:2], dark, masks))
    assert run(source, "--output", "mine", "--masks", "background")[0] == 0
    agree = datasets.load_scene(tmp_path / "mine").masks == (np.stack(masks) > 0)
    assert agree.mean() > 0.97


def on_a_stand(truth, level, rng):
    """Return the images on a noisy black background, with the object on a post `level` grey levels bright."""
    k, poses, images, masks = truth
    column, row = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    shown = []
    for image, mask in zip(images, masks):
        stand = (np.abs(column - SIZE / 2) < 0.2 * SIZE) & (row > 0.6 * SIZE)
        grey = rng.normal(0, 2, image.shape) + np.where(stand, level * (1 + 0.15 * np.sin(column / 3)), 0)[..., None]
        shown.append(np.clip(np.where(mask[..., None] > 0, image, grey), 0, 255).astype(np.uint8))
    return shown


def overlap(mask, wanted):
    return (mask & wanted).sum() / (mask | wanted).sum()


@pytest.mark.parametrize("level", [10, 20, 30])
def test_a_dark_stand_before_a_dark_background_is_not_the_object(level, truth):
    shown = on_a_stand(truth, level, np.random.default_rng(0))
    found = [overlap(mask_files.background_mask(image), mask > 0) for image, mask in zip(shown, truth[3])]
    assert np.median(found) > 0.97 and min(found) > 0.94
    for image in shown:
        assert 8 < mask_files.background_threshold(image) <= mask_files.DARK


def test_the_threshold_of_dim_or_empty_images_is_above_the_noise(truth):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 2, (SIZE, SIZE, 3))
    assert not mask_files.background_mask(np.clip(noise, 0, 255).astype(np.uint8)).any()
    assert not mask_files.background_mask(np.zeros((SIZE, SIZE, 3), np.uint8)).any()
    wanted = truth[3][0] > 0
    dim = np.clip(np.where(wanted[..., None], 30, 0) + noise, 0, 255)
    assert overlap(mask_files.background_mask(dim.astype(np.uint8)), wanted) > 0.97
    dim[wanted & (rng.random(wanted.shape) < 0.03)] = 255    # highlights
    assert overlap(mask_files.background_mask(dim.astype(np.uint8)), wanted) > 0.9


def test_messages_on_masks_made_from_the_background_name_the_threshold(truth, run, tmp_path):
    images = on_a_stand(truth, 60, np.random.default_rng(0))
    source = middlebury(tmp_path / "input", (*truth[:2], images, truth[3]))
    _, _, error = run(source, "--output", "mine", "--masks", "background")
    assert "the mask touches" in error
    assert all("--threshold found at " in line for line in error.splitlines() if "the mask touches" in line)
    status, _, error = run(source, "--output", "other", "--masks", "background", "--threshold", 254)
    assert status == 2 and "mask is empty" in error
    assert all("--threshold 254" in line for line in error.splitlines())


@pytest.mark.parametrize("level", [255, 128])
def test_masks_without_an_object_are_reported_in_one_line(level, truth, run, refused, tmp_path):
    source = plain(tmp_path / "input", truth)
    for name, image in zip(NAMES, truth[2]):
        save(source / "images" / name, np.dstack([image, np.full(image.shape[:2], level, np.uint8)]))
    error = refused(source, "two views with masks", options=("--masks", "alpha"))
    assert error.startswith("wrong: views 0, 1, ") and "white everywhere" in error and error.count("\n") == 1


def test_a_few_white_masks_are_told_from_many(truth, run, tmp_path):
    white = truth[3][:1] + [np.full_like(truth[3][0], 255)] + truth[3][2:]
    status, _, error = run(plain(tmp_path / "input", (*truth[:3], white)), "--output", "mine")
    assert status == 0 and "look: view 1 (view_6.png): " in error


def test_inverted_masks_are_refused_by_prepare_too(truth, refused, tmp_path):
    inverted = (*truth[:3], [255 - mask for mask in truth[3]])
    refused(plain(tmp_path / "input", inverted), "black and white of the masks exchanged", "prepare_scene.png")


def test_the_hull_holds_the_object(truth):
    k, poses, images, masks = truth
    looks = [make_look(*view[:2], view[2] > 0, k, view[3]) for view in zip(NAMES, images, masks, poses)]
    hull = find_hull(looks)
    nearest = np.sqrt(((world_points()[::20, None] - hull.points[None, ::7]) ** 2).sum(axis=2).min(axis=1))
    assert nearest.max() < 7 * hull.spacing
    assert agreements(hull, looks).min() > 0.95
    centre, radius = enclosing_sphere(hull, looks)
    assert np.linalg.norm(hull.points - centre, axis=1).max() < radius


def close_ups(zoom, count=9):
    """Return intrinsics, poses, images and masks of cameras so close to the object that every image cuts it off."""
    k = make_scene.camera_intrinsics(SIZE)
    k[:2, :2] *= zoom
    directions = make_scene.fibonacci_sphere(400)
    directions = directions[directions @ np.array((0.86, 0, 0.51)) > 0.77][::400 // (9 * count)][:count]
    poses, images, masks = [], [], []
    for direction in directions:
        pose = make_scene.look_at(make_scene.DISTANCE * direction, np.zeros(3), (0, 0, 1))
        image, mask = make_scene.render(k, pose, SIZE)
        poses.append(pose), images.append(image), masks.append(mask)
    return k, np.stack(poses), images, masks


def scene_of(folder, views, radius=None):
    """Write close_ups in the authors' format. radius: the unit sphere's, None for no scale_mat."""
    k, poses, images, masks = views
    arrays = {}
    for index, (pose, image, mask) in enumerate(zip(poses, images, masks)):
        save(folder / "image" / f"{index:03d}.png", image)
        save(folder / "mask" / f"{index:03d}.png", mask)
        arrays[f"world_mat_{index}"] = np.linalg.inv(pose)
        arrays[f"world_mat_{index}"][:3] = k @ arrays[f"world_mat_{index}"][:3]
        if radius:
            arrays[f"scale_mat_{index}"] = np.diag((radius, radius, radius, 1.0))
    np.savez(folder / "cameras.npz", **arrays)
    return folder


def test_an_object_that_the_images_cut_off_is_not_wrong(run, tmp_path):
    views = close_ups(1.7)
    assert all(touches_border(mask) for mask in views[3])
    status, _, error = run("--check", scene_of(tmp_path / "right", views, 1.0))
    assert status == 0 and error.startswith("notice: views 0, 1, ") and error.count("\n") == 0
    for radius, words in ((0.4, "wrong:"), (3.0, "inside the unit sphere")):    # a wrong sphere is still found
        status, _, error = run("--check", scene_of(tmp_path / f"{radius}", views, radius))
        assert status == 2 and words in error
    inverted = (*views[:3], [255 - mask for mask in views[3]])
    status, _, error = run("--check", scene_of(tmp_path / "inverted", inverted, 1.0))
    assert status == 2 and "black and white of the masks exchanged" in error


def test_the_sphere_of_an_object_that_the_images_cut_off(run, tmp_path):
    status, _, error = run(scene_of(tmp_path / "input", close_ups(1.7)), "--output", "mine")
    assert status == 0 and "the unit sphere is a guess" in error and error.count("\n") == 1
    scene = datasets.load_scene(tmp_path / "mine")
    assert np.linalg.norm(scene.scale_mat[:3, 3]) < 0.2 and 0.6 < scene.scale_mat[0, 0] < 1.2
    status, _, error = run("--check", "mine")
    assert status == 0 and error.startswith("notice: ") and error.count("\n") == 0


def test_no_camera_is_inside_the_sphere_of_a_near_object(truth, run, tmp_path):
    hull = Hull(0.45 * make_scene.fibonacci_sphere(500), 0.02)
    looks = []
    for direction in make_scene.fibonacci_sphere(VIEWS):
        pose = make_scene.look_at(direction, np.zeros(3), (0, 0, 1))
        looks.append(make_look("x", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), bool), np.eye(3), pose))
    assert 0.45 < enclosing_sphere(hull, looks)[1] < 1


# --- what it says of wrong scenes -----------------------------------------------------------------------------------

def test_check_of_a_good_scene_and_its_picture(truth, run, tmp_path):
    source = unnormalised(tmp_path / "input", truth)
    assert run(source, "--output", "mine")[0] == 0
    status, out, error = run("mine", "--check", drawn=True)
    assert (status, error) == (0, "") and "nothing wrong" in out
    picture = pictures.read_image(tmp_path / "prepare_mine.png")
    orange = np.abs(picture.astype(int) - overview.ORANGE).max(axis=2) < 60
    assert orange.mean() > 0.002 and picture.shape[1] > 800
    assert not (np.abs(picture.astype(int) - overview.RED).max(axis=2) < 20).mean() > 0.001


def test_the_picture_shows_every_view_with_its_agreement_the_worst_first(truth, tmp_path, monkeypatch):
    k, poses, images, masks = truth
    looks = [make_look(name, image, mask > 0, k, pose) for name, pose, image, mask in zip(NAMES, poses, images, masks)]
    hull = find_hull(looks)
    looks[5] = looks[5]._replace(mask=np.roll(looks[5].mask, 12, axis=1))
    looks[2] = looks[2]._replace(mask=np.roll(looks[2].mask, 5, axis=1))
    drawn, sheet = [], overview.contact_sheet

    def noted(looks, shown, shares, *rest):
        drawn.append((shown, shares))
        return sheet(looks, shown, shares, *rest)

    monkeypatch.setattr(overview, "contact_sheet", noted)
    overview.draw(tmp_path / "picture.png", "title", looks, hull, [])
    (shown, shares), picture = drawn[0], pictures.read_image(tmp_path / "picture.png")
    assert shown[:2] == [5, 2] and sorted(shown) == list(range(VIEWS)) and shares[5] < shares[2] < 0.95 < shares[0]
    assert picture.shape[1] > 1800      # a tile is at least 240 pixels wide


@pytest.mark.parametrize("name", ["o$\\frac{$", "$x$ & 100%", "\u4e2d\u6587"])
def test_a_picture_of_any_name(name, truth, run, tmp_path, recwarn):
    source = unnormalised(tmp_path / "input", truth)
    status, _, error = run(source, "--output", name, drawn=True)
    assert (status, error) == (0, "") and (tmp_path / f"prepare_{name}.png").is_file()
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def wrong_cameras(truth, change):
    k, poses, images, masks = truth
    return (k, np.stack(change(list(poses))), images, masks)


@pytest.mark.parametrize("words, change", [
    ("OpenGL", lambda poses: [pose @ np.diag((1, -1, -1, 1)) for pose in poses]),
    ("upside down", lambda poses: [pose @ np.diag((-1, -1, 1, 1)) for pose in poses]),
    ("one place later", lambda poses: poses[1:] + poses[:1]),
    ("inverted", lambda poses: [np.linalg.inv(pose) for pose in poses])])
def test_wrong_cameras_are_named_and_nothing_is_written(words, change, truth, refused, tmp_path):
    error = refused(plain(tmp_path / "input", wrong_cameras(truth, change)), words, "prepare_scene.png")
    assert error.startswith("wrong: ")


def test_a_picture_is_drawn_of_wrong_cameras(truth, run, tmp_path):
    source = plain(tmp_path / "input", wrong_cameras(truth, lambda poses: [p @ np.diag((1, -1, -1, 1)) for p in poses]))
    assert run(source, "--output", "mine", drawn=True)[0] == 2
    picture = pictures.read_image(tmp_path / "prepare_mine.png")
    assert (np.abs(picture.astype(int) - overview.RED).max(axis=2) < 20).mean() > 0.002
    assert not (tmp_path / "mine").exists()


def test_one_wrong_view_is_named(truth, run, tmp_path):
    changed = wrong_cameras(truth, lambda poses: poses[:3] + [poses[6]] + poses[4:])
    status, _, error = run(plain(tmp_path / "input", changed), "--output", "mine")
    assert status == 0 and error.startswith("look: view 3 (view_8.png): ") and error.count("\n") == 0
    datasets.load_scene(tmp_path / "mine")
    status, out, error = run("--check", "mine")     # judges as prepare did
    assert status == 0 and error.startswith("look: view 3 (003_view_8.png): ") and "`look`" in out


def test_one_view_that_looks_away_is_refused_by_name(truth, refused, tmp_path):
    changed = wrong_cameras(truth, lambda poses: poses[:3] + [poses[3] @ np.diag((1, -1, -1, 1))] + poses[4:])
    refused(plain(tmp_path / "input", changed), "view 3 (view_8.png)", "behind the camera")


def spoiled(tmp_path, truth, change):
    """Write a good scene, call `change` on the arrays of its cameras.npz, and return its folder."""
    folder = unnormalised(tmp_path / "scene", truth)
    scale_mat = np.diag((300.0, 300, 300, 1))
    scale_mat[:3, 3] = make_scene.OFFSET
    with np.load(folder / "cameras.npz") as stored:
        arrays = {**stored, **{f"scale_mat_{index}": scale_mat.copy() for index in range(VIEWS)}}
    change(arrays)
    np.savez(folder / "cameras.npz", **arrays)
    return folder


def scale_by(factor):
    def change(arrays):
        for index in range(VIEWS):
            arrays[f"scale_mat_{index}"][:3, :3] *= factor
    return change


@pytest.mark.parametrize("words, change", [
    ("", lambda arrays: None),
    ("miss the unit sphere", scale_by(0.3)),
    ("inside the unit sphere", scale_by(4)),
    ("so training starts far from it", scale_by(2.8)),
    ("scale_mat of the views differ", lambda arrays: arrays.update(scale_mat_2=np.diag((9.0, 9, 9, 1)))),
    ("round", lambda arrays: [arrays[f"scale_mat_{i}"].__setitem__((0, 0), 200.0) for i in range(VIEWS)])])
def test_check_of_scale_matrices(words, change, truth, run, tmp_path):
    status, out, error = run("--check", spoiled(tmp_path, truth, change))
    assert (status, error) == (0, "") if not words else (status == 2 and words in error)


@pytest.mark.parametrize("size", [1e155, 1e200])
def test_check_of_overflowing_cameras(size, truth, run, tmp_path, recwarn):
    folder = spoiled(tmp_path, truth, lambda arrays: arrays.update(
        world_mat_3=arrays["world_mat_3"] * size, scale_mat_3=arrays["scale_mat_3"] * size))
    status, _, error = run("--check", folder)
    assert status == 2 and "cameras.npz: the camera of view 3 cannot be used" in error and "\n" not in error
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_check_of_masks(truth, run, tmp_path):
    folder = spoiled(tmp_path, truth, lambda arrays: None)
    mask = np.asarray(Image.open(folder / "mask/002.png"))
    save(folder / "mask/002.png", mask // 255)              # 1 where it should be 255
    save(folder / "mask/004.png", np.roll(mask, SIZE // 2, axis=1))
    status, _, error = run("--check", folder)
    assert status == 2 and "view 2 (002.png): the mask is empty" in error
    assert "notice: view 4 (004.png): the mask touches" in error and "look: view 4 (004.png)" in error
    for index in range(VIEWS):
        save(folder / f"mask/{index:03d}.png", 255 - truth[3][index])
    status, _, error = run("--check", folder)
    assert status == 2 and "background black" in error and "black and white of the masks exchanged" in error


# --- what it refuses ------------------------------------------------------------------------------------------------

def test_refusals_leave_existing_files_alone(truth, run, refused, tmp_path):
    source = colmap(tmp_path / "input", truth)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    status, _, error = run(source, "--output", "full")
    assert status == 2 and "not empty" in error and [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert run(source)[0] == 2
    refused(tmp_path / "nowhere", "no such file or folder")
    refused(tmp_path / "full", "no cameras found", "COLMAP")
    refused(source, "--downscale", options=("--downscale", 0))
    refused(source, "--threshold", options=("--threshold", 300))
    refused(source, "no such folder", options=("--masks", "nowhere"))
    refused(source, "no alpha channel", options=("--masks", "alpha"))
    (source / "images" / "view_7.png").unlink()
    refused(source, "view_7.png", "1 of 8")


def test_truncated_colmap_files(truth, tmp_path):
    source = colmap(tmp_path / "input", truth)
    for name in ("cameras.bin", "images.bin"):
        path = source / "sparse" / "0" / name
        whole = path.read_bytes()
        for length in list(range(0, 120)) + list(range(120, len(whole), 37)) + [len(whole) - 1]:
            if length < len(whole):
                path.write_bytes(whole[:length])
                with pytest.raises(helper.UserError, match=name):
                    camera_files.read_views(source)
        for broken in (whole + b"\0", b"\xff" * len(whole), whole[:8] + b"\xff" * (len(whole) - 8)):
            path.write_bytes(broken)
            with pytest.raises(helper.UserError, match=name):
                camera_files.read_views(source)
        path.write_bytes(whole)
    assert len(camera_files.read_views(source)[0]) == VIEWS


@pytest.mark.parametrize("form", FORMS)
def test_random_damage_is_refused_in_one_line_or_harmless(form, truth, tmp_path):
    source = tmp_path / "input"
    source.mkdir()
    form(source, truth)
    rng = np.random.default_rng(0)
    names = ("*.bin", "*.txt", "*.json", "*.npz")
    for path in [path for name in names for path in source.rglob(name)]:
        whole = path.read_bytes()
        for _ in range(40):
            content = bytearray(whole)
            for place in rng.integers(0, len(whole), 3):
                content[place] = rng.integers(0, 256)
            path.write_bytes(content)
            try:
                for view in camera_files.read_views(source)[0]:
                    assert np.isfinite(view.pose).all() and np.isfinite(view.intrinsics).all()
            except helper.UserError as error:
                assert "\n" not in str(error)
        path.write_bytes(whole)


@pytest.mark.parametrize("words, changes", [
    (("frames",), {"frames": []}), (("frames",), {"frames": [1]}), (("frames[0].file_path",), {"frames": [{}]}),
    (("camera_model", "EQUIRECTANGULAR"), {"camera_model": "EQUIRECTANGULAR"}),
    (("fl_x", "number"), {"fl_x": "wide"}), (("fl_x", "number"), {"fl_x": float("nan")}),
    (("focal length",), {"fl_x": None, "fl_y": None}), (("focal length", "more than 0"), {"fl_x": -5}),
    (("k4",), {"k4": 0.1})])
def test_refuses_wrong_keys_of_transforms(words, changes, truth, refused, tmp_path):
    refused(nerfstudio(tmp_path / "input", truth, **changes), "transforms.json", *words)


@pytest.mark.parametrize("words, pose", [
    ("shape", np.eye(3)), ("shape", "x"), ("finite", np.full((4, 4), np.nan)), ("mirrored", np.diag((1.0, 1, -1, 1))),
    ("not a rotation", np.diag((2.0, 2, 2, 1)))])
def test_refuses_wrong_matrices(words, pose, truth, refused, tmp_path):
    source = nerfstudio(tmp_path / "input", truth)
    tree = json.loads((source / "transforms.json").read_text())
    tree["frames"][0]["transform_matrix"] = pose if isinstance(pose, str) else pose.tolist()
    (source / "transforms.json").write_text(json.dumps(tree))
    refused(source, "transforms.json", words)
    (source / "transforms.json").write_text('{"frames": [')
    refused(source, "transforms.json", "line 1", "not valid JSON")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "images/../../secret.png", "..\\secret.png",
                                  "C:/secret.png", "a\0b.png", ".."])
def test_no_path_leads_out_of_the_folder(name, truth, refused, tmp_path):
    save(tmp_path / "secret.png", truth[2][0])
    source = nerfstudio(tmp_path / "nerf", truth)
    tree = json.loads((source / "transforms.json").read_text())
    for key in ("mask_path", "file_path"):
        tree["frames"][0][key] = name
        (source / "transforms.json").write_text(json.dumps(tree))
        refused(source, "transforms.json", "leads out of")
    source = colmap_text(tmp_path / "colmap", truth)
    text = (source / "sparse/0/images.txt").read_text()
    (source / "sparse/0/images.txt").write_text(text.replace("view_7.png", name))
    refused(source, "leads out of")


def test_sizes_are_bounded(truth, refused, tmp_path, monkeypatch):
    source = colmap(tmp_path / "input", truth)
    monkeypatch.setattr(pictures, "MOST_PIXELS", SIZE * SIZE - 1)
    refused(source, "view_5.png", "million pixels")


def test_sizes_that_differ(truth, refused, tmp_path):
    source = colmap(tmp_path / "input", truth)
    save(source / "masks" / "view_6.png", truth[3][1][:-1])
    refused(source, "view_6.png", "64x63")
    save(source / "masks" / "view_6.png", truth[3][1])
    save(source / "images" / "view_6.png", np.zeros((SIZE // 2, SIZE, 3), np.uint8))
    refused(source, "view_6.png", "64x32")


# --- DTU's scans ----------------------------------------------------------------------------------------------------

def test_scan65_is_normalised_as_its_authors_did(tmp_path, run, capsys):
    folder = tmp_path / "input"
    link_scan65(folder, range(0, 49, 4), ("world",))
    authors = np.load(SHARED / "data" / "dtu_scan65" / "cameras.npz")["scale_mat_0"]
    assert run(folder, "--output", "scan65", "--downscale", 4)[0] == 0
    scale_mat = datasets.load_scene(tmp_path / "scan65").scale_mat
    assert np.linalg.norm(scale_mat[:3, 3] - authors[:3, 3]) < 0.1 * authors[0, 0]
    assert 0.9 < scale_mat[0, 0] / authors[0, 0] < 1.15


def test_scan24_is_right_and_its_sphere_is_found(tmp_path, run):
    source = SHARED / "data" / "dtu_scan24"
    if not source.is_dir():
        pytest.skip("DTU's scan 24 (shared/data/dtu_scan24) is not there")
    with np.load(source / "cameras.npz") as stored:
        for folder, kinds in (("right", ("world", "scale")), ("anew", ("world",))):
            for name in ("image", "mask"):
                (tmp_path / folder / name).mkdir(parents=True)
                for path in sorted((source / name).iterdir())[::5]:
                    (tmp_path / folder / name / path.name).symlink_to(path)
            np.savez(tmp_path / folder / "cameras.npz", **{f"{kind}_mat_{index}": stored[f"{kind}_mat_{5 * index}"]
                                                           for index in range(10) for kind in kinds})
        authors = stored["scale_mat_0"]
    status, out, error = run("--check", "right")        # its masks touch three borders or all four
    assert status == 0 and "nothing wrong" in out and error.startswith("notice: views 0, 1, ") and "\n" not in error
    status, _, error = run("anew", "--output", "scan24", "--downscale", 4)
    assert status == 0 and "the unit sphere is a guess" in error
    scale_mat = datasets.load_scene(tmp_path / "scan24").scale_mat
    assert np.linalg.norm(scale_mat[:3, 3] - authors[:3, 3]) < 0.2 * authors[0, 0]
    assert 1 / 1.3 < scale_mat[0, 0] / authors[0, 0] < 1.3
