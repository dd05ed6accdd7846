"""Test scenes on disk (what is read, what is refused), cameras against pixels, and training batches."""

import io
import itertools
import os
import resource
import shutil
import socket
import struct
import time
import tracemalloc
import zipfile
from multiprocessing.pool import ThreadPool

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

import datasets
import helper
from conftest import link_scan65
from files import picture_store, pictures

WIDTH, HEIGHT, VIEWS = 24, 18, 3
SCALE_MAT = np.array([[5.0, 0, 0, 1], [0, 5, 0, 2], [0, 0, 5, 3], [0, 0, 0, 1]])


# --- tiny scenes ------------------------------------------------------------------------------------------------------

def look_at_origin(centre):
    """Return [R | t] (4, 4), world to camera, of a camera at `centre` (3,) that looks at the origin."""
    z = -np.array(centre, float) / np.linalg.norm(centre)
    x = np.cross(z, [0.2, 1.0, 0.1])
    x /= np.linalg.norm(x)
    rotation = np.stack([x, np.cross(z, x), z])
    extrinsics = np.eye(4)
    extrinsics[:3] = np.column_stack([rotation, -rotation @ centre])
    return extrinsics


def cameras():
    """Return the arrays of a cameras.npz for VIEWS views around the sphere that SCALE_MAT maps to."""
    intrinsics = np.eye(4)
    intrinsics[:3, :3] = [[30.0, 0.5, 11.0], [0, 32, 9], [0, 0, 1]]
    arrays = {}
    for view, centre in enumerate(((0, 0, -3.0), (2.5, 1, -1), (-1, 2, 2.2))):
        arrays[f"world_mat_{view}"] = intrinsics @ look_at_origin(centre) @ np.linalg.inv(SCALE_MAT)
        arrays[f"scale_mat_{view}"] = SCALE_MAT
    return arrays


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a valid scene, in which a test damages one thing."""
    rng = np.random.default_rng(0)
    scene = tmp_path / "scene"
    for view in range(VIEWS):
        save(scene / "image" / f"{view:03d}.png", rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[4:14, 5 + view:18] = 255
        save(scene / "mask" / f"{view:03d}.png", mask)
    np.savez(scene / "cameras.npz", **cameras())
    return scene


def change_cameras(folder, **changes):
    """Rewrite cameras.npz with some arrays replaced, added or (None) left out."""
    arrays = {**cameras(), **changes}
    np.savez(folder / "cameras.npz", **{key: value for key, value in arrays.items() if value is not None})


def refusal(function, *arguments):
    """Call a function that must raise UserError in one line; return the message."""
    with pytest.raises(helper.UserError) as raised:
        function(*arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


def refused(folder, *named, downscale=1):
    """Check that loading the scene in `folder` raises UserError in one line with all the words `named`."""
    message = refusal(datasets.load_scene, folder, downscale)
    for word in named:
        assert str(word) in message


# --- what is read -----------------------------------------------------------------------------------------------------

def test_loads_what_was_written(folder, capsys):
    scene = datasets.load_scene(str(folder))
    assert scene.images.shape == (VIEWS, HEIGHT, WIDTH, 3) and scene.images.dtype == np.uint8
    assert scene.masks.shape == (VIEWS, HEIGHT, WIDTH) and scene.masks.dtype == bool
    assert scene.intrinsics.shape == (VIEWS, 3, 3) and scene.poses.shape == (VIEWS, 4, 4)
    assert scene.intrinsics.dtype == scene.poses.dtype == scene.scale_mat.dtype == np.float64
    assert scene.names == ["000", "001", "002"]
    np.testing.assert_array_equal(scene.scale_mat, SCALE_MAT)
    for view in range(VIEWS):
        image, mask = (np.asarray(Image.open(folder / kind / f"00{view}.png")) for kind in ("image", "mask"))
        np.testing.assert_array_equal(scene.images[view], image)
        np.testing.assert_array_equal(scene.masks[view], mask > 0)
    assert capsys.readouterr().err == ""


def test_cameras_are_those_of_the_unit_sphere(folder):
    scene = datasets.load_scene(folder)
    for view, centre in enumerate(((0, 0, -3.0), (2.5, 1, -1), (-1, 2, 2.2))):
        np.testing.assert_allclose(scene.intrinsics[view], [[30, 0.5, 11], [0, 32, 9], [0, 0, 1]], atol=1e-8)
        np.testing.assert_allclose(scene.poses[view], np.linalg.inv(look_at_origin(centre)), atol=1e-9)


def test_scale_matrix_is_that_of_the_first_view(folder):
    other = np.diag([2.0, 2, 2, 1])
    change_cameras(folder, scale_mat_1=other)
    np.testing.assert_array_equal(datasets.load_scene(folder).scale_mat, SCALE_MAT)


def test_jpeg_and_upper_case_suffixes(folder):
    for view, suffix in enumerate((".JPG", ".jpeg", ".PNG")):
        smooth = np.repeat(np.linspace(0, 255, WIDTH)[None], HEIGHT, axis=0)
        grey = smooth.astype(np.uint8)
        (folder / f"image/00{view}.png").unlink()
        Image.fromarray(np.stack([grey] * 3, axis=2)).save(folder / f"image/00{view}{suffix}", quality=97)
        mask = Image.open(folder / f"mask/00{view}.png").copy()
        (folder / f"mask/00{view}.png").unlink()
        mask.save(folder / f"mask/00{view}{suffix}", quality=90)
    scene = datasets.load_scene(folder)
    assert np.abs(scene.images - smooth[None, :, :, None]).max() < 4
    assert scene.masks[:, 4:14, 8:17].all() and not scene.masks[:, :3].any()
    assert scene.names == ["000", "001", "002"]


def test_files_are_paired_by_sorted_name(folder):
    for view, name in enumerate(("c", "b", "a")):
        (folder / f"image/00{view}.png").rename(folder / f"image/{name}.png")
    before = [np.asarray(Image.open(folder / f"image/{name}.png")) for name in "abc"]
    scene = datasets.load_scene(folder)
    assert scene.names == ["a", "b", "c"]
    np.testing.assert_array_equal(scene.images, before)
    assert not scene.masks[2, :, 6].any() and scene.masks[0, 4:14, 6].all()  # masks are sorted on their own


@pytest.mark.parametrize("kind", ["1", "L", "LA", "P", "RGB", "RGBA", "16 bits"])
def test_masks_of_every_kind(folder, kind):
    grey = np.zeros((HEIGHT, WIDTH), np.uint8)
    grey[3:9, 2:20], grey[9:12, 2:20] = 128, 127
    if kind == "1":
        picture = Image.fromarray(grey).point(lambda value: 255 * (value > 127)).convert("1")
    elif kind == "16 bits":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey).convert(kind)
    picture.save(folder / "mask/001.png")
    np.testing.assert_array_equal(datasets.load_scene(folder).masks[1], grey > 127)


def test_mask_in_the_alpha_channel(folder):
    rgba = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)
    rgba[:, :7, 3] = 0
    save(folder / "mask/001.png", rgba)
    mask = datasets.load_scene(folder).masks[1]
    assert mask[:, 7:].all() and not mask[:, :7].any()


def test_grey_image_becomes_rgb(folder):
    grey = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH).astype(np.uint8)
    save(folder / "image/001.png", grey)
    np.testing.assert_array_equal(datasets.load_scene(folder).images[1], np.stack([grey] * 3, axis=2))


def test_alpha_channel_of_an_image_is_left_out(folder):
    rgba = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    save(folder / "image/001.png", rgba)
    np.testing.assert_array_equal(datasets.load_scene(folder).images[1], rgba[..., :3])


def test_sixteen_bit_images_are_scaled(folder):
    colours = np.random.default_rng(1).integers(0, 1 << 16, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    cv2.imwrite(str(folder / "image/001.png"), colours[..., ::-1])
    cv2.imwrite(str(folder / "image/002.png"), colours[..., 0])
    images = datasets.load_scene(folder).images
    assert np.abs(images[1] - colours / 257).max() <= 1.0
    assert np.abs(images[2, ..., 1] - colours[..., 0] / 257).max() <= 0.5001


def test_stray_files_are_ignored_with_one_notice(folder, capsys):
    expected = datasets.load_scene(folder)
    shutil.copy(str(folder / "image/000.png"), str(folder / "image/._000.png"))
    for name in ("image/Thumbs.db", "image/.DS_Store", "mask/notes.txt"):
        (folder / name).write_text("stray")
    (folder / "mask" / "old.png").mkdir()
    scene = datasets.load_scene(folder)
    np.testing.assert_array_equal(scene.images, expected.images)
    np.testing.assert_array_equal(scene.masks, expected.masks)
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and notice.startswith("notice:")
    for name in ("image/._000.png", "image/Thumbs.db", "image/.DS_Store", "mask/notes.txt", "mask/old.png"):
        assert name in notice


# --- formats and orientations -----------------------------------------------------------------------------------------

def smooth(height=HEIGHT, width=WIDTH):
    """Return a photograph (height, width, 3) uint8 with little JPEG loss and four different corners."""
    v, u = np.mgrid[:height, :width]
    return np.stack([200 * u // width, 200 * v // height, 20 + 0 * u], axis=2).astype(np.uint8)


@pytest.mark.parametrize("suffix, mode, options", [
    (".tif", "RGB", {}), (".tif", "RGB", {"compression": "tiff_lzw"}), (".tiff", "RGB", {"compression": "jpeg"}),
    (".tif", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (5, 5))]}),
    (".tif", "RGB", {"big_tiff": True}),
    (".webp", "RGB", {"lossless": True}), (".webp", "RGB", {"save_all": True, "lossless": True, "append_images":
                                                            [Image.new("RGB", (WIDTH, HEIGHT))]}),
    (".bmp", "RGB", {}), (".jpg", "CMYK", {"quality": 98}), (".tif", "CMYK", {}), (".png", "RGBA", {}),
    (".mpo", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT))], "quality": 98})])
def test_every_format_and_kind_is_read(tmp_path, suffix, mode, options):
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(smooth()).convert(mode).save(path, **options)
    found = pictures.read_image(path)
    assert found.shape == (HEIGHT, WIDTH, 3) and np.abs(found.astype(int) - smooth()).max() < 16
    assert pictures.picture_size(path) == (WIDTH, HEIGHT)
    assert pictures.read_mask(path).shape == (HEIGHT, WIDTH)


def test_sixteen_bit_tiff_and_palettes(tmp_path):
    grey = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 150
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    assert np.abs(pictures.read_image(tmp_path / "grey.tif")[..., 0] - grey / 257).max() <= 0.5001
    cv2.imwrite(str(tmp_path / "colours.tif"), np.stack([grey] * 3, axis=2))
    assert np.abs(pictures.read_image(tmp_path / "colours.tif")[..., 0] - grey / 257).max() <= 1
    flat = Image.fromarray(smooth()).convert("P")
    flat.save(tmp_path / "flat.png")
    np.testing.assert_array_equal(pictures.read_image(tmp_path / "flat.png"), np.asarray(flat.convert("RGB")))
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    assert "convert it to PNG" in refusal(pictures.read_image, tmp_path / "float.tif")


def test_heic_is_named(tmp_path):
    path = tmp_path / "phone.jpg"   # some programs name phones' HEIC files so
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    assert "HEIC" in refusal(pictures.read_image, path) and "PNG or JPEG" in refusal(pictures.picture_size, path)


def save_turned(path, stored, orientation):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    options = {"tiffinfo": {pictures.ORIENTATION: orientation}} if path.suffix == ".tif" else {"exif": exif}
    Image.fromarray(stored).save(path, quality=98, **({"lossless": True} if path.suffix == ".webp" else {}), **options)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_as_stored_and_turn_as_viewers_turn_them(tmp_path, suffix, orientation):
    path = tmp_path / f"turned{suffix}"
    save_turned(path, smooth(), orientation)
    found = pictures.read_picture(path, pictures.colours)
    assert found.orientation == orientation
    assert pictures.picture_size(path) == (WIDTH, HEIGHT)
    assert np.abs(found.pixels.astype(int) - smooth()).max() < 12
    with Image.open(path) as picture:
        viewed = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    turned = pictures.turn(found.pixels, orientation)
    assert turned.shape == viewed.shape and np.abs(turned.astype(int) - viewed).max() < 4


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_masks_tell_how_sideways_photographs_are_meant(folder, capsys, orientation):
    turned = pictures.turn(smooth(), orientation)
    for view in range(VIEWS):
        save_turned(folder / f"image/00{view}.png", smooth(), orientation)
    scene = datasets.load_scene(folder)     # the masks fit the stored pixels
    np.testing.assert_array_equal(scene.images[1], smooth())
    notice = capsys.readouterr().err
    if orientation == 3:    # ambiguous: both fit
        assert notice.count("\n") == 1 and "000.png" in notice and "not turned" in notice
    else:
        assert notice == ""
    for view in range(VIEWS):
        mask = np.asarray(Image.open(folder / f"mask/00{view}.png"))
        save(folder / f"mask/00{view}.png", np.ascontiguousarray(pictures.turn(mask, orientation)))
    if orientation in (6, 8):
        scene = datasets.load_scene(folder)
        np.testing.assert_array_equal(scene.images[2], turned)
        assert scene.masks.shape == (VIEWS, WIDTH, HEIGHT)
        for view in range(VIEWS):   # the mask has the mark itself, as some programs copy it
            save_turned(folder / f"mask/00{view}.png", np.full((HEIGHT, WIDTH), 255, np.uint8), orientation)
        np.testing.assert_array_equal(datasets.load_scene(folder).images[2], smooth())
    assert capsys.readouterr().err == ""


# --- shrinking --------------------------------------------------------------------------------------------------------

def test_downscale_averages_areas(folder):
    full, small = datasets.load_scene(folder), datasets.load_scene(folder, 2)
    assert small.images.shape == (VIEWS, 9, 12, 3) and small.images.dtype == np.uint8
    averaged = full.images.reshape(VIEWS, 9, 2, 12, 2, 3).mean(axis=(2, 4))
    assert np.abs(small.images - averaged).max() <= 0.5
    covered = full.masks.reshape(VIEWS, 9, 2, 12, 2).mean(axis=(2, 4))
    np.testing.assert_array_equal(small.masks, covered > 0.5)
    assert (covered == 0.5).any()  # else the threshold would not be tested
    np.testing.assert_array_equal(small.poses, full.poses)


def test_downscale_cuts_off_what_fills_no_pixel(folder):
    full, small = datasets.load_scene(folder), datasets.load_scene(folder, 5)
    assert small.images.shape == (VIEWS, 3, 4, 3)
    averaged = full.images[:, :15, :20].reshape(VIEWS, 3, 5, 4, 5, 3).mean(axis=(2, 4))
    assert np.abs(small.images - averaged).max() <= 0.5
    covered = full.masks[:, :15, :20].reshape(VIEWS, 3, 5, 4, 5).mean(axis=(2, 4))
    np.testing.assert_array_equal(small.masks, covered > 0.5)


@pytest.mark.parametrize("downscale", [1, 4])
def test_points_lie_on_the_rays_of_their_pixels(folder, downscale):
    scene = datasets.load_scene(folder, downscale)
    points = np.random.default_rng(2).uniform(-0.5, 0.5, (50, 3))
    for view in range(VIEWS):
        arrays = cameras()
        projection = (arrays[f"world_mat_{view}"] @ arrays[f"scale_mat_{view}"])[:3]
        full = np.column_stack([points, np.ones(50)]) @ projection.T
        full = full[:, :2] / full[:, 2:]
        # Shrunk by 4, the pixel at 0 covers the centres 0 to 3, whose mean is 1.5.
        uv = full if downscale == 1 else (full - 1.5) / 4
        origin, directions = helper.pixel_rays(uv, scene.intrinsics[view], scene.poses[view])
        along = ((points - origin) * directions).sum(axis=1, keepdims=True)
        assert (along > 0).all()
        assert np.abs(origin + along * directions - points).max() < 1e-5


# --- what is refused --------------------------------------------------------------------------------------------------

def test_refuses_missing_folders_and_files(folder):
    refused(folder.parent / "nowhere", folder.parent / "nowhere", "no such folder")
    for name in ("cameras.npz", "mask", "image"):  # removed one after the other; each is reported first
        path = folder / name
        path.unlink() if path.is_file() else shutil.rmtree(str(path))
        refused(folder, path, "no such")


@pytest.mark.parametrize("name", ["image", "mask"])
def test_refuses_a_folder_without_images(folder, name):
    for file in (folder / name).iterdir():
        file.rename(file.with_suffix(".tif"))
    refused(folder, folder / name, "no images", ".png")


def test_refuses_counts_that_differ(folder):
    (folder / "mask/001.png").unlink()
    refused(folder, folder, "3 files in image/", "2 in mask/")


def test_refuses_cameras_that_are_too_many(folder):
    for name in ("image", "mask"):
        (folder / name / "001.png").unlink()
    refused(folder, folder / "cameras.npz", "2 views")


def test_refuses_sizes_that_differ(folder):
    save(folder / "mask/001.png", np.full((HEIGHT, WIDTH - 1), 255, np.uint8))
    refused(folder, folder / "mask/001.png", "23x18", "24x18")
    save(folder / "image/001.png", np.zeros((HEIGHT, WIDTH - 1, 3), np.uint8))
    refused(folder, folder / "image/001.png", "23x18", "24x18")


@pytest.mark.parametrize("name", ["image/001.png", "mask/002.png"])
def test_refuses_unreadable_pictures(folder, name):
    whole = (folder / name).read_bytes()
    for content in (b"", whole[:3], whole[:60], b"not a picture"):
        (folder / name).write_bytes(content)
        refused(folder, folder / name, "cannot be read")


def test_refuses_a_truncated_jpeg(folder):
    path = folder / "image/001.jpg"
    (folder / "image/001.png").unlink()
    save(path, np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, path, "truncated")


def test_refuses_what_is_no_regular_file(folder, monkeypatch):
    path = folder / "image/001.png"
    path.unlink()
    os.mkfifo(str(path))
    refused(folder, path, "not a regular file")
    path.unlink()
    path.symlink_to("nowhere")
    refused(folder, path, "no such file")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(folder, path, "not a regular file")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(path.parent)  # a socket's path must be short
        listener.bind(path.name)
        refused(folder, path, "not a regular file")
    assert "too long" in refusal(pictures.read_image, folder / ("x" * 300 + ".png"))
    assert "no file name" in refusal(pictures.read_image, folder / "x\0.png")


def test_refuses_a_tiff_whose_tags_share_their_bytes(tmp_path):
    """2000 tags that share a megabyte would unpack to 2 GB, in the first directory or in that of the EXIF tags."""
    def entries(count, first):
        return b"".join(struct.pack("<HHII", first + tag, 7, 1 << 20, 8) for tag in range(count))
    picture = io.BytesIO()
    Image.fromarray(smooth()).save(picture, "TIFF")
    whole = bytearray(b"II*\0" + struct.pack("<I", 8 + (1 << 20)) + bytes(1 << 20))
    for bomb in (struct.pack("<H", 2001) + struct.pack("<HHII", 256, 3, 1, 8) + entries(2000, 40000) + bytes(4),
                 struct.pack("<H", 1) + struct.pack("<HHII", pictures.FURTHER_TAGS[0], 4, 1, len(whole) + 18) + bytes(4)
                 + struct.pack("<H", 2000) + entries(2000, 40000) + bytes(4)):
        (tmp_path / "bomb.tif").write_bytes(whole + bomb)
        assert "more than the file has" in refusal(pictures.read_image, tmp_path / "bomb.tif")
    assert pictures.directory(picture)


def test_refuses_a_jpeg_of_endless_scans(tmp_path):
    content = io.BytesIO()
    Image.fromarray(smooth()).save(content, "JPEG", progressive=True)
    whole = content.getvalue()
    scan = whole[whole.rindex(b"\xff\xda"):-2]
    (tmp_path / "bomb.jpg").write_bytes(whole[:-2] + 60 * scan + whole[-2:])
    assert "scans" in refusal(pictures.read_image, tmp_path / "bomb.jpg")


def test_names_the_folder_that_is_meant(folder):
    refused(folder.parent, "no such folder", folder)
    refused(folder / "mask", "no such folder", folder)


@pytest.mark.parametrize("key", ["world_mat_1", "scale_mat_2"])
def test_refuses_bad_cameras(folder, key):
    path = folder / "cameras.npz"
    change_cameras(folder, **{key: None})
    refused(folder, path, key, "missing")
    change_cameras(folder, **{key: np.eye(3)})
    refused(folder, path, key, "(3, 3)")
    change_cameras(folder, **{key: np.full((4, 4), "x")})
    refused(folder, path, key, "numbers")
    for value in (np.nan, np.inf):
        broken = np.eye(4)
        broken[1, 2] = value
        change_cameras(folder, **{key: broken})
        refused(folder, path, f"{key} has values that are not finite")
    change_cameras(folder, **{key: np.zeros((4, 4))})
    refused(folder, path, f"view {key[-1]}", "singular")


def test_refuses_a_camera_that_looks_away(folder):
    turned = np.diag([-1.0, 1, -1, 1]) @ look_at_origin((0, 0, -3.0)) @ np.linalg.inv(SCALE_MAT)
    change_cameras(folder, world_mat_1=turned)
    refused(folder, folder / "cameras.npz", "view 1", "behind")


def test_refuses_what_is_no_npz(folder):
    path = folder / "cameras.npz"
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:len(whole) // 2]):
        path.write_bytes(content)
        refused(folder, path, "not a readable .npz")
    with path.open("wb") as file:
        np.save(file, np.eye(4))
    refused(folder, path, "not a readable .npz")


def in_little_memory(call, *arguments):
    tracemalloc.start()
    try:
        message = call(*arguments)
        assert tracemalloc.get_traced_memory()[1] < 2 ** 24
        return message
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("suffix", ["", ".npy"])
def test_matrices_that_unpack_to_any_size(folder, compression, suffix):
    path, large = folder / "cameras.npz", b"\x93NUMPY\1\0\x76\0" + bytes(2 ** 25)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 4)}".ljust(117) + b"\n"
    for content in (large, large[:10] + header + bytes(2 ** 25), large[:10] + header):
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("world_mat_0" + suffix, content)
        in_little_memory(refused, folder, path, "cameras.npz: ")
        whole = bytearray(path.read_bytes())
        place = whole.index(b"PK\1\2")
        whole[place + 24:place + 28] = (128).to_bytes(4, "little")        # a false size
        path.write_bytes(whole)
        in_little_memory(refused, folder, path, "cameras.npz: ")


def test_matrices_without_a_suffix(folder):
    """numpy.load reads them as well."""
    wanted = datasets.load_cameras(folder / "cameras.npz", VIEWS)
    with zipfile.ZipFile(folder / "cameras.npz") as file:
        entries = {name[:-4]: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(folder / "cameras.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    for found, expected in zip(datasets.load_cameras(folder / "cameras.npz", VIEWS), wanted):
        assert np.array_equal(found, expected)


def test_cameras_that_are_no_file_or_a_large_one(folder):
    path = folder / "cameras.npz"
    with path.open("ab") as file:
        file.truncate(2 ** 25)
    refused(folder, path, "more than 16777216 bytes")
    path.unlink()
    os.mkfifo(str(path))
    refused(folder, path, "not a regular file", "a scene holds")


class Trap:
    """An object whose pickle, when loaded, creates the given file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_unpickles_nothing(folder, tmp_path):
    change_cameras(folder, world_mat_1=np.array([Trap(tmp_path / "sprung")], dtype=object))
    refused(folder, folder / "cameras.npz", "world_mat_1 is object")
    assert not (tmp_path / "sprung").exists()


def test_refuses_an_empty_mask(folder):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    save(folder / "mask/001.png", mask)
    refused(folder, folder / "mask/001.png", "view 1", "empty")
    mask[8, 8] = 255
    save(folder / "mask/001.png", mask)
    datasets.load_scene(folder)
    refused(folder, folder / "mask/001.png", "view 1", "downscale of 2", downscale=2)


def test_refuses_a_downscale_that_leaves_nothing(folder):
    datasets.check_downscale((HEIGHT, WIDTH), HEIGHT, "anyone")
    refused(folder, "000.png", "24x18", "19", "18 or less", downscale=19)
    message = refusal(datasets.check_downscale, (HEIGHT, WIDTH), 19, "train.validation_downscale")
    assert "train.validation_downscale" in message and "24x18" in message


def test_views_that_are_not_there():
    datasets.check_views([0, 2], 3, "--views")
    for view in (3, -1):
        message = refusal(datasets.check_views, [0, view], 3, "data.held_out_views")
        assert "data.held_out_views" in message and f"no view {view};" in message and "0 to 2" in message


def test_training_views():
    assert datasets.training_views([1, 3], 5, "a.yaml") == [0, 2, 4]
    assert "a.yaml" in refusal(datasets.training_views, [0, 1, 2], 3, "a.yaml")
    assert "no view 7" in refusal(datasets.training_views, [7], 3, "a.yaml")


def test_chosen_views():
    assert datasets.chosen_views(["all"], 3, "--views") == [0, 1, 2]
    assert datasets.chosen_views([2], 3, "--views") == [2]
    assert datasets.chosen_views(["2", "0"], 3, "--views") == [2, 0]
    assert datasets.chosen_views(["2,0"], 3, "--views") == [2, 0]
    for words in (["x"], ["1", "all"], ["-1"], [""], ["1.5"], ["3"]):
        message = refusal(datasets.chosen_views, words, 3, "--views")
        assert "--views" in message and words[-1] in message


# --- rays and the training feed ---------------------------------------------------------------------------------------

def test_view_rays(folder):
    scene = datasets.load_scene(folder)
    uv = np.array([[0, 0], [23, 17], [7, 4]], np.float32)
    origin, directions, rgb, mask = datasets.view_rays(scene, 1, uv)
    assert origin.shape == (3,) and {x.dtype for x in (origin, directions, rgb)} == {np.dtype(np.float32)}
    expected = helper.pixel_rays(uv, scene.intrinsics[1], scene.poses[1])
    np.testing.assert_array_equal(origin, expected[0])
    np.testing.assert_array_equal(directions, expected[1])
    np.testing.assert_array_equal(np.rint((rgb + 1) * 127.5), scene.images[1, [0, 17, 4], [0, 23, 7]])
    assert rgb.min() >= -1 and rgb.max() <= 1
    assert mask.tolist() == [False, False, True] and mask.dtype == bool


def numbered_scene(height, width, views=3):
    """Return a scene whose colours encode the pixel's index (256 red + green); every other pixel is in the mask."""
    numbers = np.arange(height * width).reshape(height, width)
    image = np.stack([numbers // 256, numbers % 256, 0 * numbers], axis=2).astype(np.uint8)
    pose = np.linalg.inv(look_at_origin((0, 0, -3.0)))
    intrinsics = np.array([[30.0, 0, 11], [0, 30, 9], [0, 0, 1]])
    return datasets.Scene(np.stack([image] * views), np.stack([numbers % 2 == 0] * views),
                          np.stack([intrinsics] * views), np.stack([pose] * views), np.eye(4), ["x"] * views)


def pixel_numbers(batch):
    red, green = np.rint((batch.rgb[:, :2] + 1) * 127.5).astype(int).T
    return red * 256 + green


def take(count, scene, views, rays, seed, first_step=0, outline_fraction=0.0):
    batches = datasets.training_batches(scene, views, datasets.Draw(rays, seed, outline_fraction), first_step)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def test_every_view_once_in_each_epoch():
    views = [0, 2, 3, 5, 6, 7]
    order = [int(batch.views[0]) for batch in take(60, numbered_scene(4, 5, 8), views, 4, 0)]
    epochs = [order[i:i + 6] for i in range(0, 60, 6)]
    assert all(sorted(epoch) == views for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3  # a new order in each epoch


def test_a_batch_is_of_one_view_and_its_pixels():
    scene = numbered_scene(18, 24)
    scene.poses[1, 0, 3] = 0.5
    for batch in take(6, scene, [0, 1], 50, 0):
        numbers = pixel_numbers(batch)
        assert len(set(numbers)) == 50
        uv = np.stack([numbers % 24, numbers // 24], axis=1)
        origin, *rest = datasets.view_rays(scene, batch.views[0], uv)
        for got, expected in zip(batch[1:], (np.tile(origin, (50, 1)), *rest)):
            np.testing.assert_array_equal(got, expected)
            assert got.dtype == expected.dtype and got.shape == expected.shape


@pytest.mark.parametrize("per_step, ranks, rays", [(1, 1, 7), (2, 1, 9), (4, 1, 8), (3, 2, 10), (16, 1, 16), (2, 4, 5)])
def test_every_view_is_taken_as_often_as_any_other(per_step, ranks, rays):
    scene, views = numbered_scene(9, 11, 7), [0, 1, 2, 4, 6]
    draw = datasets.Draw(rays, 3, views_per_step=per_step)
    rows = [datasets.training_batches(scene, views, draw, 0, datasets.Process(rank, ranks)) for rank in range(ranks)]
    seen = np.zeros(7, int)
    for step in range(40):
        for row in rows:
            batch = next(row)
            seen += np.bincount(batch.views, minlength=7)
            counts = [part.stop - part.start for _, part in batch.parts()]
            assert sum(counts) == len(batch.rgb) == rays and max(counts) - min(counts) <= 1
        assert seen[[3, 5]].sum() == 0 and np.ptp(seen[views]) <= 1, step
    again = next(datasets.training_batches(scene, views, draw, 7, datasets.Process(ranks - 1, ranks)))
    row = datasets.training_batches(scene, views, draw, 0, datasets.Process(ranks - 1, ranks))
    for got, expected in zip([next(row) for _ in range(8)][-1], again):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("outline_fraction", [0.0, 0.5])
def test_the_rays_of_several_views_are_those_of_their_views(outline_fraction):
    scene = numbered_scene(18, 24, 4)
    scene.images[..., 2] = np.arange(4)[:, None, None]
    scene.poses[:, 0, 3] = 0.1 * np.arange(4)
    draw = datasets.Draw(40, 1, outline_fraction, views_per_step=2)
    for batch in itertools.islice(datasets.training_batches(scene, [0, 1, 3], draw), 9):
        assert [array.shape[0] for array in batch[1:]] == [40] * 5
        for view, part in batch.parts():
            numbers = pixel_numbers(batch)[part]
            assert (np.rint((batch.rgb[part, 2] + 1) * 127.5) == view).all() and len(set(numbers)) == 20
            origin, directions, _, mask = datasets.view_rays(scene, view, np.stack([numbers % 24, numbers // 24], 1))
            assert np.array_equal(batch.directions[part], directions) and np.array_equal(batch.mask[part], mask)
            assert (batch.origins[part] == origin).all()
        assert batch.weights.mean() == pytest.approx(1, abs=0 if outline_fraction == 0 else 0.5)


@pytest.mark.parametrize("size, count", [(1, 1), (7, 7), (50, 20), (50, 49), (40000, 3000)])
def test_a_random_subset_is_distinct_and_uniform(size, count):
    rng, seen = np.random.default_rng(0), np.zeros(size)
    for _ in range(400 if size < 100 else 4):
        numbers = datasets.random_subset(size, rng.random(count))
        assert len(set(numbers.tolist())) == count and numbers.min() >= 0 and numbers.max() < size
        seen[numbers] += 1
    expected = seen.sum() / size
    assert ((seen - expected) ** 2 / expected).sum() / size < 2


def test_a_random_subset_of_too_few_repeats_itself():
    numbers = datasets.random_subset(5, np.random.default_rng(0).random(1000))
    assert np.bincount(numbers, minlength=5).min() > 150 and len(np.bincount(numbers)) == 5
    assert datasets.random_subset(5, np.full(9, 1 - 2.0 ** -53)).tolist() == [4] * 9


def test_the_same_seed_gives_the_same_batches():
    scene = numbered_scene(18, 24)

    def numbers(seed):
        return [(batch.views.tolist(), pixel_numbers(batch).tolist()) for batch in take(9, scene, [0, 1, 2], 20, seed)]

    assert numbers(5) == numbers(5)
    assert numbers(5) != numbers(6)


def test_batches_from_a_step_on_are_those_of_a_whole_run():
    scene, views = numbered_scene(18, 24), [0, 1, 2]
    whole = [(batch.views.tolist(), pixel_numbers(batch).tolist()) for batch in take(12, scene, views, 20, 5)]
    for start in (1, 3, 8):
        rest = [(batch.views.tolist(), pixel_numbers(batch).tolist())
                for batch in take(12 - start, scene, views, 20, 5, start)]
        assert rest == whole[start:]
    assert len({numbers[0] for _, numbers in whole}) > 6      # new pixels in each step


@pytest.mark.parametrize("height, width, rays", [(10, 12, 40), (120, 125, 200)])  # NumPy has two algorithms
def test_pixels_are_uniform_over_the_whole_image(height, width, rays):
    batches = take(200, numbered_scene(height, width), [0], rays, 1)
    numbers = np.concatenate([pixel_numbers(batch) for batch in batches])
    counts = np.histogram(numbers, bins=20, range=(0, height * width))[0]
    expected = 200 * rays / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-squared of 19 degrees: below 44 in 99.9 %
    assert abs((numbers % 2).mean() - 0.5) < 0.02            # in the mask and outside alike


def disc_scene(mask_everywhere=None, size=60):
    v, u = np.mgrid[:size, :size]
    mask = (u - 28.0) ** 2 + (v - 31.0) ** 2 < 15.0 ** 2 if mask_everywhere is None else np.full((size, size),
                                                                                                mask_everywhere)
    return numbered_scene(size, size)._replace(masks=np.stack([mask] * 2))


def test_rays_at_the_outline_come_often_and_count_little():
    scene, rays = disc_scene(), 101
    near, inside, outside = (region.pixels(np.arange(region.size)) for region in datasets.mask_regions(scene.masks[0]))
    assert np.array_equal(np.sort(np.concatenate([near, inside, outside])), np.arange(60 * 60))
    v, u = np.divmod(near, 60)
    assert np.abs(np.hypot(u - 28.0, v - 31.0) - 15.0).max() < 2.5 and scene.masks[0].ravel()[near].any()
    assert scene.masks[0].ravel()[inside].all() and not scene.masks[0].ravel()[outside].any()
    batches = take(400, scene, [0], rays, 1, 0, 0.5)
    numbers = np.stack([pixel_numbers(batch) for batch in batches])
    assert all(len(set(row)) == rays for row in numbers)
    assert np.isin(numbers, near).sum(axis=1).tolist().count(50) in range(100, 300)     # 50 or 51
    assert np.isin(numbers, inside).mean() == pytest.approx(0.5 * datasets.OBJECT_SHARE, abs=0.003)
    # The expected weighted sum over pixels equals that of uniform pixels, in each region and overall.
    weights = np.stack([batch.weights for batch in batches])
    assert weights.dtype == np.float32
    for region in (near, inside, outside):
        counted = (weights * np.isin(numbers, region)).mean()
        assert counted == pytest.approx(len(region) / 3600, rel=0.01)
    counts = np.bincount(numbers.ravel(), weights.ravel(), minlength=3600)
    assert np.corrcoef(counts, np.isin(np.arange(3600), near))[0, 1] < 0.1
    again = take(3, scene, [0], rays, 1, 397, 0.5)
    assert [pixel_numbers(batch).tolist() for batch in again] == numbers[397:].tolist()


@pytest.mark.parametrize("mask_everywhere", [True, False])
def test_rays_at_the_outline_where_there_is_none(mask_everywhere):
    batch, = take(1, disc_scene(mask_everywhere), [0], 100, 1, 0, 0.5)
    assert len(set(pixel_numbers(batch))) == 100 and np.all(batch.weights == 1.0)


def test_more_rays_at_the_outline_than_pixels():
    batch, = take(1, disc_scene(size=48), [0], 2000, 1, 0, 0.9)
    assert len(batch.directions) == 2000 and batch.weights.mean() == pytest.approx(1.0, rel=0.01)


def test_all_pixels_and_more_than_all():
    scene = numbered_scene(4, 5)
    assert sorted(pixel_numbers(take(1, scene, [0], 20, 0)[0])) == list(range(20))
    assert len(take(1, scene, [0], 50, 0)[0].directions) == 50


def test_an_error_in_the_feed_reaches_the_reader():
    scene = numbered_scene(4, 5)
    scene = scene._replace(images=scene.images[:1])
    with pytest.raises(IndexError):
        list(itertools.islice(datasets.training_batches(scene, [0, 1], datasets.Draw(10)), 2))


# --- large scenes -----------------------------------------------------------------------------------------------------

@pytest.fixture
def large(folder, monkeypatch):
    """Return a scene in memory, and let all further scenes be too large for it."""
    scene = datasets.load_scene(folder)
    monkeypatch.setattr(datasets, "IN_MEMORY", 0)
    return scene


def store_of(folder):
    return folder / "pictures_1.cache"


def test_a_large_scene_is_the_same_from_its_file(folder, large, monkeypatch, capsys):
    for again in (0, 1):
        scene = datasets.load_scene(folder)
        assert scene.store and np.array_equal(scene.images, large.images) and np.array_equal(scene.masks, large.masks)
        for draw in (datasets.Draw(30, 1), datasets.Draw(30, 1, 0.5, 2)):
            batches = (datasets.training_batches(s, range(VIEWS), draw, 3) for s in (scene, large))
            for found, expected in itertools.islice(zip(*batches), 9):
                assert all(np.array_equal(a, b) for a, b in zip(found, expected))
        assert capsys.readouterr().out.count("decoded only once") == (1 - again)
        monkeypatch.setattr(datasets, "read_view", None)     # the second time nothing is decoded
    assert sorted(path.name for path in folder.iterdir()) == ["cameras.npz", "image", "mask", "pictures_1.cache"]


def test_the_file_of_a_large_scene_is_made_anew_when_a_picture_changes(folder, large):
    before = datasets.load_scene(folder)
    save(folder / "image" / "001.png", np.full((HEIGHT, WIDTH, 3), 77, np.uint8))
    scene = datasets.load_scene(folder)
    assert (scene.images[1] == 77).all() and np.array_equal(scene.images[0], large.images[0])
    store_of(folder).unlink()       # an open one is not touched
    assert np.array_equal(before.images, large.images) and (datasets.load_scene(folder).images[1] == 77).all()
    small = datasets.load_scene(folder, 2)
    assert small.store and small.images.shape == (VIEWS, HEIGHT // 2, WIDTH // 2, 3)


def test_a_damaged_file_of_a_large_scene_is_made_anew(folder, large):
    datasets.load_scene(folder)
    whole = store_of(folder).read_bytes()
    for damaged in (b"", b"x", whole[:-1], whole[1:], whole[:-8] + b"\xff" * 8, whole.replace(b'"size"', b'"sizf"'),
                    whole.replace(b'"key": "', b'"key": "0'), whole + b"0",
                    whole.replace(b'"runs": [[', b'"runs": [[9')):
        store_of(folder).write_bytes(damaged)
        assert np.array_equal(datasets.load_scene(folder).images, large.images)
        assert store_of(folder).read_bytes() == whole
    runs = VIEWS * HEIGHT * WIDTH * 4
    store_of(folder).write_bytes(whole[:runs] + b"\xff" * 4 + whole[runs + 4:])
    with pytest.raises(helper.UserError, match="pictures_1.cache: damaged; remove it"):
        next(datasets.training_batches(datasets.load_scene(folder), range(VIEWS), datasets.Draw(9, 0, 0.5, VIEWS)))


@pytest.mark.skipif(not hasattr(picture_store.mmap, "MADV_WILLNEED"), reason="the system takes no such advice")
def test_the_pixels_of_a_large_scene_are_asked_for(folder, large, monkeypatch):
    store, asked = datasets.load_scene(folder).store, []
    monkeypatch.setattr(store, "_ask", lambda start, end: asked.append((start, end)))
    pixels = np.array([HEIGHT * WIDTH - 1, 0, 7], np.int32)
    store.fetch(VIEWS - 1, pixels)
    store.asking.shutdown()             # waits
    places = (VIEWS - 1) * HEIGHT * WIDTH * 4 + 4 * pixels
    assert all(any(start <= place < end for start, end in asked) for place in places.tolist())
    assert all(start % picture_store.mmap.PAGESIZE == 0 and end - start == picture_store.mmap.PAGESIZE
               for start, end in asked)
    store = datasets.load_scene(folder).store
    store.asking.submit(store._ask_for_pages, places.astype(np.int64)).result()     # the system takes it


def test_a_large_scene_where_there_is_no_room(folder, large, monkeypatch, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(helper.UserError, match="pictures_1.cache: cannot be written .*free some space"):
            datasets.load_scene(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    scene = datasets.load_scene(folder)
    assert scene.store is None and np.array_equal(scene.images, large.images)
    assert "the disk has 0.0 GB left, so the pictures are held in memory" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(picture_store, "free_memory", lambda: 0)
    with pytest.raises(helper.UserError, match="too many for the memory, and the disk cannot be written; free some"):
        datasets.load_scene(folder)
    assert not store_of(folder).exists() and not list(folder.glob(".*"))


def test_a_wrong_picture_of_a_large_scene_leaves_no_file(folder, large):
    save(folder / "mask" / "002.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(helper.UserError, match="002.png: the mask of view 2 is empty"):
        datasets.load_scene(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["cameras.npz", "image", "mask"]


def test_processes_that_start_at_once_decode_a_large_scene_once(folder, large, monkeypatch):
    read, seen = datasets.read_view, []
    monkeypatch.setattr(datasets, "read_view", lambda *wanted: (seen.append(wanted), time.sleep(0.02),
                                                                read(*wanted))[2])
    with ThreadPool(3) as pool:
        scenes = pool.map(datasets.load_scene, [folder] * 3)
    assert len(seen) == VIEWS + 1       # the first one is read for its size too
    assert all(np.array_equal(scene.images, large.images) for scene in scenes)


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_a_region_knows_its_pixels(share):
    chosen = np.random.default_rng(3).random((7, 9)) < share
    region = picture_store.Region.of(chosen)
    assert region.size == chosen.sum()
    assert np.array_equal(region.pixels(np.arange(region.size)), np.flatnonzero(chosen))


# --- the real thing ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scan65(tmp_path_factory):
    """Return four views of DTU's scan 65 at 1/8 of their size."""
    folder = tmp_path_factory.mktemp("data") / "dtu_scan65"
    link_scan65(folder, (0, 16, 32, 48), ("world", "scale"))
    return datasets.load_scene(folder, 8)


def test_scan65_loads(scan65):
    assert scan65.images.shape == (4, 150, 200, 3)
    assert scan65.names == ["000000", "000016", "000032", "000048"]
    assert all(0.03 < mask.mean() < 0.6 for mask in scan65.masks)
    on_object = scan65.images[scan65.masks].mean()
    assert 20 < on_object < 235


def test_scan65_cameras_look_at_the_origin(scan65):
    for intrinsics, pose in zip(scan65.intrinsics, scan65.poses):
        centre, axis = pose[:3, 3], pose[:3, 2]
        assert 1.5 < np.linalg.norm(centre) < 6
        assert axis @ -centre / np.linalg.norm(centre) > 0.9
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-9)
        assert 350 < intrinsics[0, 0] < 370 and abs(intrinsics[0, 1]) < 0.1


def test_scan65_masks_lie_in_the_unit_sphere(scan65):
    for view, mask in enumerate(scan65.masks):
        v, u = np.nonzero(mask)
        origin, directions, _, _ = datasets.view_rays(scan65, view, np.stack([u, v], axis=1))
        nearest = np.linalg.norm(np.cross(np.broadcast_to(origin, directions.shape), directions), axis=1)
        assert (nearest < 1.0).mean() > 0.999


def test_spread_views_lie_far_apart():
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, :3, 3] = [[2, 0, 0], [3, 0.1, 0], [0, 2, 0], [-1, 0, 0], [0, -0.5, 0.5]]
    assert datasets.spread_views(poses, 0, 2) == [0, 3]
    assert datasets.spread_views(poses, 0, 4) == [0, 3, 2, 4]
    assert sorted(datasets.spread_views(poses, 1, 9)) == [0, 1, 2, 3, 4]
