"""Photographs alone and videos: cameras found, what is left out or refused, pictures as cameras write them."""
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import textured
import trimesh
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

import datasets
import helper
import make_scene
import prepare
from conftest import ROOT, write_demo_config
from files import pictures, writing
from metrics import meshes
from scenes import auto_masks, camera_files, photographs, structure_from_motion, video_frames
from training import cameras

SIZE, VIEWS = 400, 12
NAMES = [f"Schöne Tasse {index:02d}.png" for index in range(VIEWS)]
needs_pycolmap = pytest.mark.skipif(sys.version_info < (3, 10), reason="pycolmap 4 has no wheel for this Python")


@pytest.fixture(scope="module")
def truth():
    """Return intrinsics, poses, images and masks of a walk around textured balls."""
    intrinsics, poses = textured.ring(VIEWS, SIZE)
    images, masks = zip(*[textured.render(intrinsics, pose, (3 * SIZE // 4, SIZE)) for pose in poses])
    return intrinsics, poses, images, masks


@pytest.fixture(scope="module")
def near():
    """Return six images of a part of such a walk, near one another."""
    intrinsics, poses = textured.ring(6, SIZE, 0, 2.0)
    return [textured.render(intrinsics, pose, (3 * SIZE // 4, SIZE))[0] for pose in poses]


@pytest.fixture()
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs prepare.py as the command line does: arguments to (status, all that it prints)."""
    monkeypatch.chdir(tmp_path)

    def run_prepare(*words):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, words)])
        status = 0
        try:
            helper.run(prepare.main)
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return run_prepare


@pytest.fixture()
def refused(run):
    """Return a function that runs prepare.py, checks that it refuses with one line, and returns that line."""
    def refuse(*words):
        status, said = run(*words)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(lines) == 1 and "Traceback" not in said and not Path("mine").exists()
        return lines[0]

    return refuse


def save(folder, images, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images):
        Image.fromarray(image).save(folder / name, compress_level=1)    # PNG's default takes thrice as long
    return folder


def random_image(seed):
    small = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((SIZE, 3 * SIZE // 4), Image.BICUBIC))


def errors(work, poses, indices=None):
    """Return training.cameras.Errors of a working folder's cameras; `indices` are those of its views in `poses`."""
    found = np.stack([view.pose for view in camera_files.read_views(work)[0]])
    return cameras.errors(found, poses if indices is None else poses[indices])


# --- cameras ----------------------------------------------------------------------------------------------------------

@needs_pycolmap
def test_photographs_alone_become_a_scene(truth, run, tmp_path):
    # Masks are given here. In the slow test below masks are found, too, and a model is trained.
    save(tmp_path / "shoe" / "images", truth[2])
    save(tmp_path / "shoe" / "masks", [mask.astype(np.uint8) * 255 for mask in truth[3]])
    save(tmp_path / "shoe" / "images", [random_image(9)], ["Schöne Tasse 05b.png"])
    status, said = run("shoe", "--output", "mine")
    assert status == 0 and said.count("left out") == 1 and "look: Schöne Tasse 05b.png: left out, it matches no" in said
    off = errors(tmp_path / "mine_colmap", truth[1])
    assert len(off.rotation) == VIEWS and off.rotation.max() < 0.4 and off.translation.max() < 0.02     # 2.7 away
    assert "prepare_mine_scale.html" in said and (tmp_path / "prepare_mine_scale.html").is_file()
    view = camera_files.read_views(tmp_path / "mine_colmap")[0][0]
    assert abs(view.intrinsics[0, 0] / truth[0][0, 0] - 1) < 0.01
    points, seen_by = camera_files.read_points3d(tmp_path / "mine_colmap" / "sparse" / "0")
    assert len(points) == len(seen_by) > 300 and min(len(set(images)) for images in seen_by) >= 2
    aligned = cameras.alignment(np.stack([view.pose[:3, 3] for view in camera_files.read_views("mine_colmap")[0]]),
                                truth[1][:, :3, 3])
    points = points @ aligned[:3, :3].T + aligned[:3, 3]
    away = [np.abs(np.linalg.norm(points - centre, axis=1) - radius) for centre, radius in textured.BALLS]
    assert np.median(np.min([*away, np.abs(points[:, 2] - textured.FLOOR)], axis=0)) < 0.01


@needs_pycolmap
@pytest.mark.slow
def test_photographs_alone_become_a_mesh(run, tmp_path, monkeypatch):
    """Photograph balls that hang above a floor, from 16 places, and compare the mesh in the end with the balls."""
    monkeypatch.setattr(textured, "FLOOR", -1.2)
    intrinsics = textured.ring(1, SIZE)[0]
    poses = np.stack([make_scene.look_at((2.4 * np.cos(a), 2.4 * np.sin(a), 0.2 + 0.5 * np.sin(a)), (0, 0, -0.1),
                                         (0.1 * np.sin(2 * a), 0, 1)) for a in np.arange(16) * np.pi / 8])
    images, masks = zip(*[textured.render(intrinsics, pose, (3 * SIZE // 4, SIZE)) for pose in poses])
    images = [(image * np.where(mask[..., None], (1, 0.6, 0.35), (0.5, 0.8, 1))).astype(np.uint8)
              for image, mask in zip(images, masks)]    # colours that tell the balls from the room
    save(tmp_path / "balls", images, [f"{index:02d}.png" for index in range(16)])
    status, said = run("balls", "--output", "mine")
    assert status == 0 and "masks: auto" in said and "left out" not in said
    found = [pictures.read_mask(path) for path in datasets.scene_files(tmp_path / "mine")[1]]
    assert np.mean([auto_masks.overlap(*pair) for pair in zip(found, masks)]) > 0.93
    write_demo_config(tmp_path / "balls.yaml", {}, data=dict(path="mine", downscale=4, held_out_views=[]),
                      train=dict(steps=3000, views_per_step=8, rays=256, learning_rate=4e-3, validation_view=0))
    model = ("--config", "results_mine/balls.yaml", "--model-load-path", "results_mine")
    for words in (("train.py", "--config", "balls.yaml", "--monitor-path", "results"),
                  ("extract.py", *model, "--world", "--output", "mesh.ply")):
        subprocess.run([sys.executable, ROOT / words[0], *words[1:], "--context", "cpu"], cwd=tmp_path, check=True)
    centres = np.stack([view.pose[:3, 3] for view in camera_files.read_views("mine_colmap")[0]])
    mesh = trimesh.load(tmp_path / "mesh.ply").apply_transform(cameras.alignment(centres, poses[:, :3, 3]))
    sphere = make_scene.fibonacci_sphere(20000)
    points = np.concatenate([centre + radius * sphere for centre, radius in textured.BALLS])
    depths = [radius - np.linalg.norm(points - centre, axis=1) for centre, radius in textured.BALLS]
    truth = trimesh.PointCloud(points[np.max(depths, axis=0) < 1e-6])
    near = meshes.compare(meshes.surface(mesh), meshes.surface(truth))[0]
    assert near.chamfer < 0.02 * 0.8, near      # of the radius of a sphere about the balls


@needs_pycolmap
def test_an_interrupted_search_goes_on(near, tmp_path, monkeypatch):
    work = tmp_path / "work"
    paths = [save(work / "images", near) / name for name in NAMES[:6]]
    calls = []

    def interrupted(progress, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(structure_from_motion, "map_views", interrupted)
        with pytest.raises(KeyboardInterrupt):
            structure_from_motion.find_cameras(paths, work)
    assert not (work / "sparse").exists()
    monkeypatch.setattr(structure_from_motion, "features", calls.append)
    monkeypatch.setattr(structure_from_motion, "run_on_pairs", lambda *words, **options: calls.append(words))
    found = structure_from_motion.find_cameras(paths, work)     # with the features and matches of before
    assert not calls and not found.left_out and len(camera_files.read_views(work)[0]) == 6
    monkeypatch.setattr(structure_from_motion, "map_views", interrupted)
    assert structure_from_motion.find_cameras(paths, work) == found     # nothing to do
    (work / "images" / NAMES[0]).write_bytes((work / "images" / NAMES[0]).read_bytes() + b" ")
    with pytest.raises(TypeError):      # the changed photographs' features are sought anew, by `calls.append`
        structure_from_motion.find_cameras(paths, work)


@needs_pycolmap
def test_an_object_that_turns_before_a_camera_that_stands_still(truth, tmp_path):
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    images = [textured.render(truth[0], truth[1][0], (3 * SIZE // 4, SIZE), angle)[0] for angle in angles]
    names = [f"{index:02d}.png" for index in range(12)]
    work = tmp_path / "work"
    paths = [save(work / "images", images, names) / name for name in names]
    assert not structure_from_motion.find_cameras(paths, work).left_out
    poses = np.tile(np.eye(4), (12, 1, 1))
    poses[:, :3, :3] = [textured.turn(np.eye(3), -angle).T for angle in angles]
    off = errors(work, poses @ truth[1][0])
    assert off.rotation.max() < 0.5 and off.translation.max() < 0.03


@needs_pycolmap
def test_refusals_say_how_to_photograph_better(truth, refused, tmp_path):
    save(tmp_path / "two", truth[2][:2])
    assert "only 2 photographs" in refused("two", "--output", "mine")
    save(tmp_path / "plain", [np.full((90, 120, 3), 200 + index, np.uint8) for index in range(5)])
    assert "none of 5 photographs could be placed; most often: it shows too little texture" in \
        refused("plain", "--output", "mine")
    save(tmp_path / "others", [random_image(index)[:150, :200] for index in range(4)])
    assert "matches no other photograph" in refused("others", "--output", "mine")


@needs_pycolmap
def test_two_groups_are_named(near, refused, tmp_path):
    mirrored = [np.ascontiguousarray(255 - image[:, ::-1]) for image in near[:5]]
    save(tmp_path / "shoe", near)
    save(tmp_path / "shoe", mirrored, [f"b{index}.png" for index in range(5)])
    said = refused("shoe", "--output", "mine")
    assert "two groups" in said and f"6 with {NAMES[0]} and 5 with b0.png" in said


def test_without_pycolmap_one_line_says_so(truth, refused, tmp_path, monkeypatch):
    save(tmp_path / "shoe", truth[2][:3])
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    assert "pip install -r requirements-photos.txt" in refused("shoe", "--output", "mine")
    assert not (tmp_path / "mine_colmap").exists()


def test_the_last_adjustment_leaves_out_the_largest_features():
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.synthesize_dataset(pycolmap.SyntheticDatasetOptions(num_points3D=200))
    rng, sizes = np.random.default_rng(0), {}

    class Database:
        @staticmethod
        def read_keypoints(number):
            return np.stack([sizes[number]] * 4, axis=1)

    def used(number):
        return np.array([point.has_point3D() for point in model.images[number].points2D])

    numbers = model.reg_image_ids()
    for number in numbers:
        sizes[number] = rng.permutation(len(model.images[number].points2D)).astype(np.float32)
    before = {number: used(number) for number in numbers}
    structure_from_motion.drop_coarse(model, Database)
    for number in numbers:
        limit = np.sort(sizes[number][before[number]])[int(0.75 * before[number].sum()) - 1]
        assert used(number).any() and sizes[number][used(number)].max() <= limit
    sparse = pycolmap.synthesize_dataset(pycolmap.SyntheticDatasetOptions(num_points3D=40))     # few: all stay
    count = sparse.compute_num_observations()
    sizes = {number: np.arange(len(sparse.images[number].points2D)) for number in sparse.reg_image_ids()}
    structure_from_motion.drop_coarse(sparse, Database)
    assert sparse.compute_num_observations() == count


def test_pairs_of_large_sets_and_videos_are_neighbours():
    def pairs(count, in_sequence):
        return [pair for block in structure_from_motion.pairs_to_match(count, in_sequence) for pair in block]

    assert len(pairs(80, False)) == len(set(pairs(80, False))) == 80 * 79 // 2
    large = pairs(500, False)
    assert len(set(large)) == len(large) < 500 * 25 and all(0 <= i < j < 500 for i, j in large)
    assert all((i, i + step) in set(large) for step in (1, 10, 64) for i in range(500 - step))


# --- videos -----------------------------------------------------------------------------------------------------------

@needs_pycolmap
def test_a_video_of_a_walk(truth, run, tmp_path):
    intrinsics, poses = textured.ring(32, 320, 0, 2.2)
    with writing.video_writer(tmp_path / "walk.mkv") as append:
        for pose in poses:
            image = textured.render(intrinsics, pose, (240, 320))[0]
            for repeat in range(2):     # of each place, a sharp frame and a blurred one
                append(np.asarray(Image.fromarray(image).resize((80, 60)).resize((320, 240))) if repeat else image)
    (tmp_path / "cut.mkv").write_bytes((tmp_path / "walk.mkv").read_bytes()[:-200000])
    status, said = run("cut.mkv", "--output", "mine", "--frames", "12")
    assert status == 0 and "masks: auto" in said
    frames = sorted(int(path.stem[6:]) for path in (tmp_path / "mine_colmap" / "images").iterdir())
    assert 10 <= len(frames) <= 12 and sum(frame % 2 for frame in frames) <= 1     # the last one, where it ends
    off = errors(tmp_path / "mine_colmap", poses, [frame // 2 for frame in frames])
    assert off.rotation.max() < 0.5 and off.translation.max() < 0.03


def test_videos_that_are_refused(refused, tmp_path):
    image = random_image(0)
    for name, frames in (("short", 5), ("still", 15)):
        with writing.video_writer(tmp_path / f"{name}.mp4") as append:
            for _ in range(frames):
                append(image)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "still.mp4").read_bytes()[:3000])    # MP4's index is at its end
    (tmp_path / "empty.mp4").write_bytes(b"")
    pytest.importorskip("pycolmap")
    for name, words in (("short", "only 5 frames"), ("still", "nothing moves"), ("cut", "ends too early"),
                        ("empty", "cannot be read as a video"), ("absent", "no such file")):
        assert words in refused(f"{name}.mp4", "--output", "mine")


def test_the_sharpest_frame_of_each_part_is_chosen():
    sharpness = np.tile([1.0, 3.0, 2.0, 0.5], 10)
    moved = np.concatenate([np.zeros(8), np.arange(32.0)])      # it stands still at first
    chosen = video_frames.choose(video_frames.Measures(sharpness, moved, 100), 8)
    assert len(chosen) == 8 and all(sharpness[frame] == 3.0 for frame in chosen) and sum(f < 8 for f in chosen) <= 1


# --- pictures as cameras write them -----------------------------------------------------------------------------------

def gathered(folder, target):
    target.mkdir()
    source = photographs.without_cameras(folder)
    return photographs.gathered(source.paths, target)


def test_every_kind_of_picture_is_read(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    image, kinds = random_image(1), tmp_path / "kinds"
    kinds.mkdir()
    picture = Image.fromarray(image)
    for name in ("A.JPG", "b.png", "c.webp", "d.tiff", "e.bmp", "f f.png"):
        picture.save(kinds / name, **({"quality": 95} if name[0] in "Ac" else {}))
    picture.convert("RGBA").save(kinds / "g.png")
    picture.convert("L").save(kinds / "h.png")
    Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(kinds / "i.png")
    heif.from_pillow(picture).save(kinds / "ü.HEIC", quality=95)
    paths = gathered(kinds, tmp_path / "images")
    assert [path.name for path in paths] == ["A.JPG", "b.png", "c.webp", "d.tiff", "e.bmp", "f f.png", "g.png", "h.png",
                                             "i.png", "ü.png"]
    for path in paths:
        grey = image[..., :1] if path.name == "i.png" else np.asarray(picture.convert("L"))[..., None] \
            if path.name == "h.png" else image
        assert np.abs(pictures.read_image(path).astype(int) - grey).mean() < 12, path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(orientation, tmp_path):
    image = random_image(2)
    stored = {1: image, 2: image[:, ::-1], 3: image[::-1, ::-1], 4: image[::-1], 5: image.swapaxes(0, 1),
              6: np.rot90(image), 7: np.rot90(image, 2).swapaxes(0, 1), 8: np.rot90(image, -1)}[orientation]
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    (tmp_path / "turned").mkdir()
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned" / "a.png", exif=exif)
    Image.fromarray(image).save(tmp_path / "turned" / "b.png")
    first, second = gathered(tmp_path / "turned", tmp_path / "images")
    picture = pictures.read_picture(first, pictures.colours)
    np.testing.assert_array_equal(picture.pixels, image)
    assert picture.orientation == 1 and second.is_symlink()


def test_portraits_among_landscapes_stay_as_stored_and_other_sizes_are_named(tmp_path):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    (tmp_path / "mixed").mkdir()
    for index in range(3):
        options = {"exif": exif} if index else {}
        Image.fromarray(random_image(index)).save(tmp_path / "mixed" / f"{index}.jpg", **options)
    assert all(path.is_symlink() for path in gathered(tmp_path / "mixed", tmp_path / "images"))
    Image.fromarray(random_image(1)[:200]).save(tmp_path / "mixed" / "odd.jpg")
    with pytest.raises(helper.UserError, match=r"odd.jpg: 400x200 pixels, but 3 of 4 photographs are 400x300"):
        gathered(tmp_path / "mixed", tmp_path / "other")


def test_the_focal_length_of_exif(tmp_path):
    exif = Image.Exif()
    exif[pictures.MODEL] = "Camera X"
    exif.get_ifd(0x8769).update({pictures.FOCAL_LENGTH: IFDRational(425, 100), pictures.FILM_FOCAL_LENGTH: 26})
    for name in ("a.jpg", "a.png", "a.webp"):
        Image.fromarray(random_image(0)).save(tmp_path / name, exif=exif)
        assert pictures.read_header(tmp_path / name).lens == (b"Camera X", 4.25, 26)
    Image.fromarray(random_image(0)).save(tmp_path / "plain.jpg")
    assert pictures.read_header(tmp_path / "plain.jpg").lens == (b"", 0.0, 0)


def test_pictures_that_are_refused_by_name(refused, tmp_path):
    pytest.importorskip("pycolmap")
    save(tmp_path / "huge", [random_image(index) for index in range(3)], ["a.png", "b.png", "c.png"])
    Image.new("1", (30000, 30000)).save(tmp_path / "huge" / "d.png")
    assert "d.png: has more than 80 million pixels" in refused("huge", "--output", "mine")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "shot.dng").write_bytes(b"II*\0")
    assert "shot.dng" in refused("raw", "--output", "mine")
    shutil.copytree(tmp_path / "huge", tmp_path / "broken")
    (tmp_path / "broken" / "d.png").write_bytes((tmp_path / "huge" / "a.png").read_bytes()[:2000])
    assert "d.png" in refused("broken", "--output", "mine")


def test_points_that_are_seen_from_one_side_are_left_out(tmp_path):
    """Cameras at (x, 0, 0) look along z, at points 10 away."""
    (tmp_path / "sparse").mkdir()
    model = tmp_path / "sparse"
    (model / "cameras.txt").write_text("1 PINHOLE 100 100 100 100 50 50\n")
    places = {7: 0.0, 2: 0.5, 9: 1.0, 4: 3.0}
    (model / "images.txt").write_text("".join(
        f"{number} 1 0 0 0 {-x} 0 0 1 {number}.png\n\n" for number, x in places.items()))
    seen = {"0.5 0 10": (7, 2, 9), "1.5 0 10": (7, 2, 4), "1 1 10": (7, 4), "2 0 10": (7, 7, 4), "3 0 10": (2, 9, 4, 1)}
    (model / "points3D.txt").write_text("".join(
        f"{number} {point} 0 0 0 0.5 {' '.join(f'{image} 0' for image in images)}\n"
        for number, (point, images) in enumerate(seen.items())))
    for number in places:
        (tmp_path / f"{number}.png").touch()
    found = camera_files.sparse_points_of(tmp_path)
    np.testing.assert_array_equal(found, [(1.5, 0, 10), (3, 0, 10)])


def test_the_points_of_a_model_as_text_and_bytes(tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.synthesize_dataset(pycolmap.SyntheticDatasetOptions(num_points3D=20))
    model.write_binary(str(tmp_path))
    (tmp_path / "text").mkdir()
    model.write_text(str(tmp_path / "text"))
    points, seen_by = camera_files.read_points3d(tmp_path)
    true = [model.points3D[number] for number in sorted(model.points3D)]
    order = np.lexsort(points.T)
    expected = np.array([point.xyz for point in true])
    np.testing.assert_array_equal(points[order], expected[np.lexsort(expected.T)])
    assert sorted(map(len, seen_by)) == sorted(point.track.length() for point in true)
    thrice = camera_files.sparse_points_of(tmp_path)
    assert len(thrice) == sum(len(set(images)) > 2 for images in seen_by) and set(map(tuple, thrice)) <= set(
        map(tuple, points))
    assert len(camera_files.sparse_points_of(tmp_path / "nowhere")) == 0
    text, text_seen_by = camera_files.read_points3d(tmp_path / "text")
    np.testing.assert_allclose(text[np.lexsort(text.T)], points[order], atol=1e-6)
    assert sorted(set(np.concatenate(text_seen_by))) == sorted(set(np.concatenate(seen_by)))
    content = (tmp_path / "points3D.bin").read_bytes()
    for length in (4, 60, len(content) - 3):
        (tmp_path / "points3D.bin").write_bytes(content[:length])
        with pytest.raises(helper.UserError, match="ends too early"):
            camera_files.read_points3d(tmp_path)
    assert len(camera_files.read_points3d(tmp_path / "nowhere")[0]) == 0
