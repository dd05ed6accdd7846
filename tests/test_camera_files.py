"""Other programs' camera files: bad numbers, strange names, folders on the wrong level; and the pictures copied."""
import json
import os
import struct

import cv2
import numpy as np
import pytest
from PIL import Image
from test_datasets import refusal, save_turned, smooth

import prepare
from files import pictures
from scenes import camera_files, mask_files
from scenes.views import read_view, undistorted

WIDTH, HEIGHT, VIEWS = 24, 18, 4


def names(suffix=".png"):
    return [f"view_{index}{suffix}" for index in range(VIEWS)]


def save(path, suffix=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(smooth()).save(path, suffix, **options)


def save_masks(folder, named, shape=(HEIGHT, WIDTH)):
    folder.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(shape, np.uint8)
    mask[3:9, 4:20] = 255
    for name in named:
        Image.fromarray(mask).save(folder / name)


def colmap(folder, named, binary=True, size=(WIDTH, HEIGHT), lens=(30.0, 12.0, 9.0), pose=(1, 0, 0, 0, 0.1, 0.2, 3)):
    """Write a COLMAP model of one SIMPLE_PINHOLE camera and the images `named`."""
    (folder / "sparse").mkdir(parents=True, exist_ok=True)
    if binary:
        (folder / "sparse/cameras.bin").write_bytes(struct.pack("<QiiQQ3d", 1, 1, 0, *size, *lens))
        (folder / "sparse/images.bin").write_bytes(struct.pack("<Q", len(named)) + b"".join(
            struct.pack("<i7di", 1, *pose, 1) + name.encode() + b"\0" + struct.pack("<Q", 0) for name in named))
    else:
        (folder / "sparse/cameras.txt").write_text(f"1 SIMPLE_PINHOLE {size[0]} {size[1]} {' '.join(map(str, lens))}")
        (folder / "sparse/images.txt").write_text("".join(f"1 {' '.join(map(str, pose))} 1 {name}\n\n"
                                                          for name in named))
    return folder


def transforms(folder, named, **changes):
    matrix = np.diag((1.0, -1, -1, 1)).tolist()
    frames = [{"file_path": f"images/{name}", "transform_matrix": matrix} for name in named]
    tree = {"fl_x": 30.0, "w": WIDTH, "h": HEIGHT, "frames": frames, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "transforms.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
    return folder


def middlebury(folder, named, first=None):
    line = " 30 0 12 0 30 9 0 0 1 1 0 0 0 1 0 0 0 1 0 0 3\n"
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{len(named) if first is None else first}\n" + "".join(f"images/{name}{line}" for name in named)
    (folder / "some_par.txt").write_text(text)
    return folder


def plain(folder, named):
    camera = {"K": [[30, 0, 12], [0, 30, 9], [0, 0, 1]], "R": np.eye(3).tolist(), "t": [0, 0, 3]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.json").write_text(json.dumps({name: camera for name in named}))
    return folder


def unnormalised(folder, named):
    matrix = np.diag((30.0, 30, 1, 1))
    matrix[:2, 2], matrix[2, 3] = (12, 9), 3
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "cameras.npz", **{f"world_mat_{index}": matrix for index in range(len(named))})
    return folder


FORMS = (colmap, transforms, middlebury, plain, unnormalised)


def written(source, target, downscale=1):
    """Write the scene's pictures as prepare.py does. Return their paths and their images."""
    views = camera_files.read_views(source)[0]
    target.mkdir()
    prepare.write_pictures(target, views, mask_files.mask_sources(views, None, source), None, downscale)
    files = sorted((target / "image").iterdir())
    return files, [pictures.read_image(file) for file in files]


# --- formats and orientations -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".tif", ".webp", ".bmp", ".TIFF"])
def test_photographs_of_other_formats_become_png(form, suffix, tmp_path):
    source = form(tmp_path / "input", names(suffix))
    for name in names(suffix):
        save(source / "images" / name, **({"lossless": True} if suffix == ".webp" else {}))
    save_masks(source / "masks", names(suffix))
    files, images = written(source, tmp_path / "scene")
    assert [file.suffix for file in files] == [".png"] * VIEWS
    assert all(Image.open(file).format == "PNG" for file in files)
    np.testing.assert_array_equal(images, [smooth()] * VIEWS)


def test_photographs_are_copied_under_their_format(tmp_path):
    source = colmap(tmp_path / "input", ["a.jpg", "b.png", "c.png"])
    save(source / "images/a.jpg")
    save(source / "images/b.png")
    save(source / "images/c.png", "JPEG")   # the suffix is wrong
    save_masks(source / "masks", ["a.png", "b.png", "c.png"])
    files = written(source, tmp_path / "scene")[0]
    assert [file.name for file in files] == ["000_a.jpg", "001_b.png", "002_c.jpg"]
    for file, name in zip(files, ("a.jpg", "b.png", "c.png")):
        assert file.read_bytes() == (source / "images" / name).read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("meant", ["stored", "turned"])
def test_the_cameras_size_decides_the_orientation(suffix, orientation, meant, tmp_path, capsys):
    shape = pictures.turn(smooth(), orientation if meant == "turned" else 1).shape
    source = colmap(tmp_path / "input", names(suffix), size=(2 * shape[1], 2 * shape[0]))   # since halved
    (source / "images").mkdir()
    for name in names(suffix):
        save_turned(source / "images" / name, smooth(), orientation)
    save_masks(source / "masks", names(), shape[:2])
    files, images = written(source, tmp_path / "scene")
    told = orientation != 3
    expected = pictures.turn(smooth(), orientation if meant == "turned" and told else 1)
    np.testing.assert_array_equal(images, [expected] * VIEWS)
    for file in files:
        with Image.open(file) as picture:   # other programs do not turn it
            assert picture.getexif().get(pictures.ORIENTATION, 1) == 1
    notices = [line for line in capsys.readouterr().err.splitlines() if line.startswith("notice")]
    assert len(notices) == (0 if told else 1) and all("view_0" in notice for notice in notices)


def test_the_mask_decides_the_orientation_if_the_camera_has_no_size(tmp_path, capsys):
    source = plain(tmp_path / "input", names())
    (source / "images").mkdir()
    for name in names():
        save_turned(source / "images" / name, smooth(), 6)
    save_masks(source / "masks", names(), (WIDTH, HEIGHT))
    np.testing.assert_array_equal(written(source, tmp_path / "scene")[1], [pictures.turn(smooth(), 6)] * VIEWS)
    assert "notice" not in capsys.readouterr().err
    save_masks(source / "masks", names())
    np.testing.assert_array_equal(written(source, tmp_path / "other")[1], [smooth()] * VIEWS)
    view = camera_files.read_views(source)[0][0]
    assert read_view(view, "background", None).doubtful == [view.image]  # no mask tells


# --- missing and misplaced files --------------------------------------------------------------------------------------

class Arguments:
    images = masks = threshold = subject = None
    downscale = 1

    def __init__(self, source, output):
        self.input, self.output = str(source), str(output)


def test_missing_photographs_and_masks_are_named(tmp_path):
    source = colmap(tmp_path / "input", names())
    for name in names():
        save(source / "images" / name)
    save_masks(source / "masks", names()[:2])
    message = refusal(prepare.prepare, Arguments(source, tmp_path / "scene"))
    assert message.endswith("its photograph: view_2.png")
    (source / "images/view_2.png").unlink()
    message = refusal(prepare.prepare, Arguments(source, tmp_path / "scene"))
    assert "view_2.png" in message and "1 of 4 is missing" in message and "restore" in message
    assert "--images" not in message
    for name in ("view_0.png", "view_1.png"):
        (source / "images" / name).unlink()
    assert "--images" in refusal(prepare.prepare, Arguments(source, tmp_path / "scene"))
    source = transforms(tmp_path / "blender", names(), w=None)
    assert "view_0.png: no such photograph" in refusal(camera_files.read_views, source)


@pytest.mark.parametrize("form", FORMS)
def test_the_folder_above_or_below_is_named(form, tmp_path):
    source = form(tmp_path / "workspace" / "input", names())
    for name in names():
        save(source / "images" / name)
    for folder in (tmp_path / "workspace", source / "images"):
        message = refusal(camera_files.read_views, folder)
        assert f"in {source}; name that folder" in message
    (tmp_path / "empty").mkdir()
    assert "no photographs or video" in refusal(camera_files.read_views, tmp_path / "empty")


def test_pipes_and_folders_are_refused(tmp_path):
    source = colmap(tmp_path / "input", names())
    for name in names():
        save(source / "images" / name)
    save_masks(source / "masks", names())
    for file in (source / "masks/view_1.png", source / "images/view_2.png"):
        file.unlink()
        os.mkfifo(str(file))
        message = refusal(prepare.prepare, Arguments(source, tmp_path / "scene"))
        assert str(file) in message and "not a regular file" in message
        file.unlink()
        save_masks(source / "masks", [file.name])
    (source / "images/view_2.png").mkdir()
    assert "not a regular file" in refusal(prepare.prepare, Arguments(source, tmp_path / "scene"))
    os.mkfifo(str(tmp_path / "pipe_par.txt"))
    assert "not a regular file" in refusal(camera_files.read_views, tmp_path / "pipe_par.txt")


# --- bad numbers ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("size", [(0, HEIGHT), (WIDTH, 0), (2 ** 63, HEIGHT)])
def test_refuses_bad_image_sizes_of_colmap(binary, size, tmp_path):
    source = colmap(tmp_path, names(), binary, size)
    save(source / "images" / names()[0])
    assert "width and height" in refusal(camera_files.read_views, source)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("lens, pose", [
    ((1e300, 12.0, 9.0), (1, 0, 0, 0, 0, 0, 3)), ((1e-300, 12.0, 9.0), (1, 0, 0, 0, 0, 0, 3)),
    ((30.0, float("nan"), 9.0), (1, 0, 0, 0, 0, 0, 3)), ((30.0, -1e12, 9.0), (1, 0, 0, 0, 0, 0, 3)),
    ((30.0, 12.0, 9.0), (1e308, 1e308, 0, 0, 0, 0, 3)), ((30.0, 12.0, 9.0), (1, 0, 0, 0, float("inf"), 0, 3)),
    ((30.0, 12.0, 9.0), (1, 0, 0, 0, 0, 1e200, 3)), ((-30.0, 12.0, 9.0), (1, 0, 0, 0, 0, 0, 3))])
def test_refuses_bad_numbers_of_colmap(binary, lens, pose, tmp_path, recwarn):
    source = colmap(tmp_path, names(), binary, lens=lens, pose=pose)
    save(source / "images" / names()[0])
    assert str(tmp_path) in refusal(camera_files.read_views, source)
    assert not recwarn.list


@pytest.mark.parametrize("changes", [
    {"w": 0}, {"h": -HEIGHT}, {"w": 1e9}, {"w": float("nan")}, {"fl_x": 10 ** 5000}, {"fl_x": float("inf")},
    {"fl_x": 0}, {"cx": 1e300}, {"k1": 1e300}, {"k1": [1]}, {"w": "²"}, {"camera_model": ["OPENCV"]}, {"w": 0, "h": 0,
     "fl_x": None, "camera_angle_x": 0.8}, {"fl_x": None, "camera_angle_x": 1e-300}, {"frames": []}, {"frames": [1]}])
def test_refuses_bad_numbers_of_transforms(changes, tmp_path, recwarn):
    if changes.get("fl_x") == 10 ** 5000:   # more digits than json.dumps writes
        source = transforms(tmp_path, names(), fl_x="many")
        text = (source / "transforms.json").read_text().replace('"many"', "1" * 5000)
        (source / "transforms.json").write_text(text)
    else:
        source = transforms(tmp_path, names(), **changes)
    assert "transforms.json" in refusal(camera_files.read_views, source)
    assert not recwarn.list


def test_refuses_json_that_is_deep_long_or_repeats_keys(tmp_path):
    source = transforms(tmp_path, ["a.png", "a.png"])
    assert "two cameras of a.png" in refusal(camera_files.read_views, source)
    (tmp_path / "transforms.json").write_text("[" * 10 ** 6)
    assert "cannot be parsed" in refusal(camera_files.read_views, source)
    (tmp_path / "transforms.json").write_text('{"frames": ' + "[" * 500 + "]" * 500 + "}")
    assert "frames" in refusal(camera_files.read_views, source)
    (tmp_path / "transforms.json").write_text('{"frames": [], "w": 3, "frames": []}')
    assert "'frames' is given twice" in refusal(camera_files.read_views, source)
    (tmp_path / "transforms.json").write_text('{"frames": [' + "{}," * 30000 + "{}]}")
    assert "more than" in refusal(camera_files.read_views, source)
    (tmp_path / "transforms.json").write_bytes(b" " * (camera_files.MOST_TEXT + 1))
    assert "MB" in refusal(camera_files.read_views, source)


@pytest.mark.parametrize("first", ["²", "0", "", "-4", "9" * 5000, "4.0"])
def test_refuses_a_bad_count_of_middlebury(first, tmp_path):
    assert "first line" in refusal(camera_files.read_views, middlebury(tmp_path, names(), first))
    assert "first line" in refusal(camera_files.read_views, middlebury(tmp_path, [], first))


@pytest.mark.parametrize("word", ["nan", "1e999", "x", "1e308"])
def test_refuses_bad_numbers_of_middlebury(word, tmp_path, recwarn):
    source = middlebury(tmp_path, names())
    text = (source / "some_par.txt").read_text()
    for place in (1, 9, 15, 21):
        lines = [line.split() for line in text.splitlines()]
        lines[2][place] = word
        (source / "some_par.txt").write_text("\n".join(map(" ".join, lines)))
        assert "some_par.txt" in refusal(camera_files.read_views, source)
    assert not recwarn.list


@pytest.mark.parametrize("fisheye, coefficients, words", [
    (True, (-1.0, 0, 0, 0), "folds"), (True, (1e11, -1e11, 0, 0), "folds"), (False, (-9.0, 0, 0, 0), "folds"),
    (False, (0, 0, 0, 0, 0, -8.0), "folds")])
def test_refuses_distortion_that_folds_the_image(fisheye, coefficients, words, tmp_path):
    save(tmp_path / "a.png")
    intrinsics = camera_files.camera_matrix(9.0, 9.0, 11.5, 8.5)
    view = camera_files.View(tmp_path / "a.png", None, intrinsics, np.eye(4), (WIDTH, HEIGHT), coefficients, fisheye)
    assert words in refusal(read_view, view, "background", None)


def test_distortion_that_folds_the_corners_leaves_them_black():
    """Beyond the fold OpenCV shows places a second time. The real lens saw nothing there."""
    white = np.full((300, 400, 3), 255, np.uint8)
    intrinsics = camera_files.camera_matrix(180.0, 180.0, 199.5, 149.5)
    view = camera_files.View("a.png", None, intrinsics, np.eye(4), None, (-0.3, 0, 0, 0), False)
    straight = undistorted(white, intrinsics, view)
    radius = np.hypot(*(np.mgrid[:300, :400] - np.array((149.5, 199.5)).reshape(2, 1, 1))) / 180
    assert (straight[radius < 1.04] == 255).all()
    assert (straight[radius > 1.07] == 0).all() and (radius > 1.07).any()   # 1 - 3 * 0.3 r^2 is 0 at 1.054
    assert (cv2.undistort(white, intrinsics, np.array(view.distortion))[radius > 1.07] == 255).any()


# --- names ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a/" * 900 + "b.png", "a\0.png", "\ud800.png", "9" * 5000, "",
                                  "é" * 200 + ".png"])
def test_refuses_impossible_file_names(name, tmp_path):
    for source in (plain(tmp_path / "plain", [name]), transforms(tmp_path / "nerf", [name + "/.."] if not name else
                                                                 [name], w=None)):
        save(source / "images/a.png")
        message = refusal(camera_files.read_views, source)
        assert len(message) < 600 and str(source) in message


def test_numbers_in_names_are_sorted_by_value():
    assert sorted(["1²2", "v10", "v9", "v09", "v" + "9" * 5000, "²", "a"], key=camera_files.natural_key) == \
        ["1²2", "a", "v9", "v09", "v10", "v" + "9" * 5000, "²"]


def test_odd_but_possible_file_names(tmp_path):
    odd = ["1²2.png", "x" * 240 + ".png", "²³.png", "ü\n1.png"]
    source = plain(tmp_path / "input", odd)
    for name in odd:
        save(source / "images" / name)
    save_masks(source / "masks", odd[:3] + [odd[3] + ".png"])
    files = written(source, tmp_path / "scene")[0]
    assert len(files) == 4 and all(len(file.name) < 120 and file.name.isascii() for file in files)
    assert len({file.name for file in (tmp_path / "scene/mask").iterdir()}) == 4


def test_too_long_names_on_the_command_line(tmp_path):
    source = plain(tmp_path, names())
    save(tmp_path / "images/view_0.png")
    assert "no such" in refusal(camera_files.read_views, "x" * 5000)
    assert "--images" in refusal(camera_files.read_views, source, "x" * 300)
    assert "--masks" in refusal(mask_files.mask_sources, camera_files.read_views(source)[0], "x" * 300, source)


def test_lines_of_text_models_are_bounded(tmp_path, monkeypatch):
    source = colmap(tmp_path, names(), binary=False)
    save(source / "images" / names()[0])
    assert len(camera_files.read_views(source)[0]) == VIEWS
    monkeypatch.setattr(camera_files, "MOST_LINE", 20)
    assert "too long" in refusal(camera_files.read_views, source)
    monkeypatch.setattr(camera_files, "MOST_VIEWS", 2)
    assert "more than 2" in refusal(camera_files.check_count, source, 3)
