"""Scenes on disk -> rays and pixels.

A scene is a folder in the convention of IDR's authors: `image/` and `mask/` hold one picture per view each,
paired by sorted name; `cameras.npz` holds per view i `world_mat_i` (4, 4), whose first three rows are the
projection K [R | t] to pixels (x right, y down, z into the scene), and `scale_mat_i` (4, 4), which maps the
unit sphere to the object's region of the world. Here everything is in the coordinates of that unit sphere,
and pixel centres are at integers (u, v).
"""
import contextlib
import io
import itertools
import logging
import os
import struct
import sys
import warnings
from pathlib import Path
from typing import List, NamedTuple

import cv2
import numpy as np
# Pillow opens what is imported; it does not look for the others where it is told the formats.
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, PpmImagePlugin  # noqa: F401
from PIL import TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401
from tqdm import tqdm

from helper import ORDER, PIXELS, UserError, check_is_file, decompose_projection, pixel_rays, random_numbers

SUFFIXES = (".png", ".jpg", ".jpeg")                            # of a scene's pictures
PHOTOGRAPHS = SUFFIXES + (".tif", ".tiff", ".webp", ".bmp")     # of what a scene is made from
MOST_PIXELS = 80 * 10 ** 6  # of a picture: a small file may unpack to more than the memory
MOST_BYTES = 10 ** 9        # of a picture's file: so many pixels of 16 bits, four channels, need less
MOST_SCANS = 50             # of a JPEG, each of which goes through all pixels; progressive ones have about ten
OUTLINE_BAND = 1 / 40       # of an image's shorter side: the pixels that count as near the outline of its mask
OBJECT_SHARE = 3 / 4        # on the object, of the rays that are not drawn near the outline
LARGEST_MATRIX = 10 ** 5    # bytes of an entry of cameras.npz, as unpacked
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM")  # by content; for others Pillow may run programs
COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # Pillow's 8-bit modes
WIDTH, HEIGHT, ORIENTATION = 256, 257, 274  # the numbers of TIFF's tags, which are EXIF's too
FURTHER_TAGS = (34665, 34853, 40965)        # those that lead to further directories of tags
TAG_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of damaged pictures is told in one line


class Scene(NamedTuple):
    images: np.ndarray      # (N, H, W, 3) uint8
    masks: np.ndarray       # (N, H, W) bool, True on the object
    intrinsics: np.ndarray  # (N, 3, 3) float64, pixels
    poses: np.ndarray       # (N, 4, 4) float64, camera to the unit sphere's coordinates
    scale_mat: np.ndarray   # (4, 4) float64, of the first view: the unit sphere's coordinates to the world's
    names: List[str]        # N file names of the images, without suffix


# --- loading ----------------------------------------------------------------------------------------------

def load_scene(path, downscale=1, cameras="cameras.npz"):
    """Load the scene in the folder `path`, shrunk by the whole factor `downscale`, as a Scene of N views.

    cameras: the file there that holds them.

    Images are area-averaged, a mask's pixel is set where more than half of what it covers is, and the
    intrinsics follow exactly. Rows at the bottom and columns at the right that fill no pixel are cut off.
    Raises UserError for a file or folder that is missing, unreadable or does not fit the others, for a camera
    that is none, for a mask without a set pixel and for a factor that leaves nothing of the images.
    """
    image_files, mask_files = scene_files(Path(path))
    intrinsics, poses, scale_mat = load_cameras(Path(path) / cameras, len(image_files))
    images, masks = load_pictures(image_files, mask_files, downscale)
    intrinsics = shrink_intrinsics(intrinsics, downscale)
    return Scene(images, masks, intrinsics, poses, scale_mat, [file.stem for file in image_files])


def scene_files(path):
    """Return a scene's image files and mask files, view by view; name on stderr what else is there."""
    if not os.path.isdir(str(path)):
        raise UserError(f"{path}: no such folder; a scene is a folder with image/, mask/ and cameras.npz")
    image_files, strays = scene_pictures(path, "image")
    mask_files, more = scene_pictures(path, "mask")
    if strays + more:
        names = [f"{file.parent.name}/{file.name}" for file in strays + more]
        print(f"notice: {path}: ignored {listed(names)} (not {', '.join(SUFFIXES)})", file=sys.stderr)
    for folder, files in ((path / "image", image_files), (path / "mask", mask_files)):
        if not files:
            raise UserError(f"{folder}: no images here; put one per view, as {', '.join(SUFFIXES)}, and convert "
                            "others")
    if len(image_files) != len(mask_files):
        raise UserError(f"{path}: {len(image_files)} files in image/ but {len(mask_files)} in mask/; "
                        "each image needs one mask, paired by sorted name")
    return image_files, mask_files


def scene_pictures(path, name):
    """Return what picture_files does of the folder `name` of the scene `path`; UserError where it is not there."""
    if not os.path.isdir(str(path / name)):
        near = [folder for folder in neighbours(path) if os.path.isdir(str(folder / name))]
        hint = f"; {near[0]} is such a folder" if near else ""
        raise UserError(f"{path / name}: no such folder; a scene holds image/, mask/ and cameras.npz{hint}")
    return picture_files(path / name)


def neighbours(folder):
    """Return the folder above and the folders in `folder`, where one that was not found may lie."""
    path = Path(os.path.abspath(str(folder)))
    try:
        inner = sorted(Path(entry.path) for entry in os.scandir(str(path)) if entry.is_dir())
    except OSError:
        inner = []
    return [path.parent, *inner]


def listed(names, most=8):
    """Return names for a line of text: the first ones, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def picture_files(folder, suffixes=SUFFIXES):
    """Return the pictures in a folder, by sorted name, and the strays: everything else that lies there."""
    if not os.path.isdir(str(folder)):
        raise UserError(f"{folder}: no such folder")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error
    # Hidden files are strays whatever their suffix: macOS keeps a "._name.jpg" beside a name.jpg.
    pictures = [entry for entry in entries if entry.suffix.lower() in suffixes and not entry.name.startswith(".")
                and not os.path.isdir(str(entry))]
    return pictures, [entry for entry in entries if entry not in set(pictures)]


def load_pictures(image_files, mask_files, downscale):
    """Read and shrink the pictures one by one: images (N, H, W, 3) uint8 and masks (N, H, W) bool."""
    count, size, images, masks, doubtful = len(image_files), None, None, None, []
    hidden = None if count >= 10 else True  # None: hidden unless stderr is a terminal
    for view in tqdm(range(count), desc="loading images", unit="view", leave=False, disable=hidden):
        image, mask, doubts = read_pair(image_files[view], mask_files[view])
        doubtful += doubts
        if size is None:
            size = image.shape[:2]
            check_downscale(size, downscale, image_files[0])
            shrunk = (count, size[0] // downscale, size[1] // downscale)
            images, masks = np.empty(shrunk + (3,), np.uint8), np.empty(shrunk, bool)
        check_one_size(image_files[view], image.shape[:2], image_files[0], size)
        check_mask_size(mask_files[view], mask.shape, image_files[view], size)
        images[view], masks[view] = shrink_image(image, downscale), shrink_mask(mask, downscale)
        if not masks[view].any():
            raise UserError(f"{mask_files[view]}: the mask of view {view} is empty"
                            + (f" at a downscale of {downscale}" if mask.any() else "")
                            + "; the object must be white, more than half of 255")
    say_doubtful(doubtful)
    return images, masks


def check_one_size(image_file, size, first_file, first_size):
    """Raise UserError where an image's size (H, W) is not that of the scene's first image."""
    if size != first_size:
        raise UserError(f"{image_file}: {says_size(size)}, but {first_file.name} is {says_size(first_size)}; all views "
                        "must have one size")


def check_mask_size(mask_file, mask_size, image_file, size):
    """Raise UserError where a mask's size (H, W) is not that of its image."""
    if mask_size != size:
        raise UserError(f"{mask_file}: {says_size(mask_size)}, but its image {image_file.name} is {says_size(size)}; a "
                        "mask has its image's size")


def says_size(size):
    """Return the words for an array's shape (H, W, ...), such as "1600x1200 pixels"."""
    return f"{size[1]}x{size[0]} pixels"


# --- pictures ---------------------------------------------------------------------------------------------

class Picture(NamedTuple):
    """A picture as its file stores it, which is how COLMAP and most libraries see it; viewers turn it."""
    pixels: np.ndarray      # (H, W, ...)
    orientation: int        # EXIF's, 1 to 8; 1: not to be turned
    kind: str               # Pillow's name of the format, such as "PNG"


def read_image(path):
    """Read a picture of any kind as (H, W, 3) uint8, RGB; an alpha channel is left out."""
    return read_picture(path, colours).pixels


def read_mask(path):
    """Read a picture of any kind as (H, W) bool: set where its grey value, and any alpha, exceeds half."""
    return read_picture(path, on_object).pixels


def read_pair(image_file, mask_file):
    """Read an image (H, W, 3) uint8 and its mask (H, W) bool; returns both and the paths of which as_meant is unsure.

    Each is turned by its EXIF orientation where only so it has the other's proportions.
    """
    image, mask = read_picture(image_file, colours), read_picture(mask_file, on_object)
    pixels, image_doubt = as_meant(image, mask.pixels.shape)
    mask_pixels, mask_doubt = as_meant(mask, pixels.shape)
    return pixels, mask_pixels, [image_file] * image_doubt + [mask_file] * mask_doubt


def as_meant(picture, shape):
    """Return a Picture's pixels as stored, or turned by its orientation where only so they have the proportions of
    `shape`, (h, w, ...) or None for unknown; and whether that was left open by an orientation and sizes that fit both.
    """
    turned = turn(picture.pixels, picture.orientation)
    as_stored, as_turned = (shape is not None and alike(pixels.shape, shape) for pixels in (picture.pixels, turned))
    if as_turned and not as_stored:
        return np.ascontiguousarray(turned), False
    return picture.pixels, picture.orientation != 1 and not (as_stored and not as_turned)


def alike(shape, other):
    """Tell whether two shapes (h, w, ...) have the same proportions, up to the rounding of a shrunk image's sides."""
    return abs(shape[1] * other[0] / (shape[0] * other[1]) - 1) <= 0.02


def turn(pixels, orientation):
    """Return pixels (H, W, ...) turned and mirrored as an EXIF orientation, 1 to 8, says; a view of them."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels


def say_doubtful(files):
    """Print a notice on pictures with an EXIF orientation that were taken as stored for want of a sign."""
    if files:
        print(f"notice: {listed([str(file) for file in files], 3)}: marked as turned (EXIF orientation), and no size "
              "tells whether cameras and masks are for the turned picture; taken as stored, not turned. If they are "
              "for the turned one, save the pictures turned, without the mark", file=sys.stderr)


@contextlib.contextmanager
def opened(path):
    """Yield a picture as Pillow opens it, and its file; what fails within becomes a UserError that it cannot be read.

    Raises UserError for what is no regular file, too large, or no picture.
    """
    check_is_file(path)
    try:
        with warnings.catch_warnings(), open(str(path), "rb") as file:
            warnings.simplefilter("ignore")     # on large pictures, whose bound is ours, and on odd metadata
            if os.path.getsize(str(path)) > MOST_BYTES:
                raise UserError(f"{path}: is larger than {MOST_BYTES // 10 ** 6} MB; shrink it")
            check_tags(path, file)
            file.seek(0)
            check_scans(path, file)
            file.seek(0)
            with Image.open(file, formats=FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise too_large(path)
                yield picture, file
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise too_large(path) from error
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, ...
        raise unreadable(path, error) from error


def too_large(path):
    return UserError(f"{path}: has more than {MOST_PIXELS // 10 ** 6} million pixels; shrink it")


def unreadable(path, error):
    """Return the UserError for a picture at which a reader of Pillow's failed with `error`."""
    reason = getattr(error, "strerror", None) or "truncated, or not of the format that its name says"
    if isinstance(error, MemoryError):
        reason = "not enough memory"
    elif isinstance(error, UnidentifiedImageError):
        with open(str(path), "rb") as file:
            if file.read(8)[4:] == b"ftyp":
                return UserError(f"{path}: HEIC, AVIF or a video, which are not read here; convert it to PNG or JPEG")
        reason = "it is not PNG, JPEG, TIFF, WebP or BMP, or is truncated"
    return UserError(f"{path}: cannot be read as an image ({reason}); replace this file")


def read_picture(path, convert):
    """Read a picture (grey, palette, RGB, CMYK, any with alpha; 1, 8 or 16 bits; the first frame) as a Picture.

    convert: from Pillow's picture of 8 bits to the pixels. Raises UserError where it is unreadable or too large.
    """
    with opened(path) as (picture, file):
        kind, is_tiff = picture.format, picture.format == "TIFF"
        orientation = stored_orientation(file) if is_tiff else 1
        picture.load()
        if not is_tiff:     # PNG's is known only now
            exif = picture.info.get("exif", b"")
            orientation = stored_orientation(io.BytesIO(exif[6:] if exif.startswith(b"Exif\0\0") else exif))
        pixels = convert(eight_bits(path, picture))
        if is_tiff:         # of these alone Pillow turns the pixels; back
            pixels = np.ascontiguousarray(turn(pixels, {6: 8, 8: 6}.get(orientation, orientation)))
        return Picture(pixels, orientation, kind)


def eight_bits(path, picture):
    """Return Pillow's picture with 8 bits per channel; UserError for other numbers than 1, 8 or 16 bits."""
    if picture.mode.startswith("I"):    # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(picture)
        if grey.min() >= 0 and grey.max() < 1 << 16:
            scaled = (np.arange(1 << 16) / 257.0 + 0.5).astype(np.uint8)
            return Image.fromarray(scaled[grey.astype(np.uint16)])
    if picture.mode not in COLOURS:
        raise UserError(f"{path}: its pixels ({picture.mode}) are not colours of 8 or 16 bits; convert it to PNG or "
                        "JPEG")
    return picture


def has_alpha(picture):
    """Tell whether Pillow's picture has transparent colours."""
    return "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info


def colours(picture):
    """Return the colours (H, W, 3) uint8 of Pillow's picture."""
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def alpha(picture):
    """Return where Pillow's picture is more than half opaque, (H, W) bool."""
    return np.asarray(picture.convert("RGBA").getchannel("A")) > 127    # RGBA: a palette may have transparent colours


def on_object(picture):
    """Return where Pillow's picture, as a mask, is set, (H, W) bool."""
    if has_alpha(picture):
        return alpha(picture) & (np.asarray(picture.convert("RGB").convert("L")) > 127)
    return np.asarray(picture.convert("L")) > 127


def check_scans(path, file):
    """Raise UserError for a JPEG of so many scans that it takes minutes to read."""
    chunks = iter(lambda: file.read(1 << 24), b"")
    if file.read(2) == b"\xff\xd8" and sum(chunk.count(b"\xff\xda") for chunk in chunks) > MOST_SCANS:
        raise UserError(f"{path}: a JPEG of more than {MOST_SCANS} scans; save it anew")


def check_tags(path, file):
    """Raise UserError for a TIFF whose tags take more bytes than the file has: they name the same ones many times."""
    claimed, offsets = 0, [None]
    while offsets:
        for tag, kind, count, value in directory(file, offsets.pop()):
            claimed += count * TAG_SIZES.get(kind, 1)
            if tag in FURTHER_TAGS and len(offsets) < 9:
                offsets.append(value)
    if claimed > os.path.getsize(str(path)) + 1000:
        raise UserError(f"{path}: its tags say that they take {claimed} bytes, more than the file has; replace it")


def stored_orientation(file):
    """Return the orientation, 1 to 8, that the first directory of a TIFF or of EXIF data says; 1 where it says none."""
    found = [value for tag, _, _, value in directory(file) if tag == ORIENTATION]
    return found[0] if found and 1 <= found[0] <= 8 else 1


def directory(file, offset=None):
    """Return (tag, kind, count, value or offset of the values) for the entries of a directory of a TIFF, or of EXIF
    data, whose form is the same; the first directory, or that at `offset`. Nothing of what is no TIFF."""
    file.seek(0)
    head = file.read(16)
    order, big = {b"II": "<", b"MM": ">"}.get(head[:2]), head[2:4] in (b"+\0", b"\0+")
    try:
        if order is None or not (big or head[2:4] in (b"*\0", b"\0*")):
            return []
        file.seek(struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0]
                  if offset is None else offset)
        count, = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
        entry = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
        content = file.read(entry.size * min(count, 1 << 16))
    except (struct.error, OverflowError, OSError, ValueError):
        return []
    whole = content[:len(content) // entry.size * entry.size]
    return [(tag, kind, number, struct.unpack_from(order + {3: "H"}.get(kind, "Q" if big and kind > 12 else "I"),
                                                   value)[0])
            for tag, kind, number, value in entry.iter_unpack(whole)]


def picture_size(path):
    """Return the width and height of a picture as stored; UserError where it is unreadable or too large."""
    with opened(path) as (picture, file):
        width, height = picture.size
        if picture.format == "TIFF":    # Pillow may have turned the size already
            stored = {tag: value for tag, _, _, value in directory(file)}
            width, height = stored.get(WIDTH, width), stored.get(HEIGHT, height)
        return width, height


# --- cameras ----------------------------------------------------------------------------------------------

def load_cameras(path, count):
    """Read the cameras of `count` views from a cameras.npz.

    Returns intrinsics (N, 3, 3), poses (N, 4, 4) and the first view's scale matrix (4, 4), all float64.
    Raises UserError for a file that is no .npz of numbers, for a matrix that is missing, of another shape or
    not finite, for a camera that is singular or has the unit sphere behind it, and for too many cameras.
    """
    matrices = read_matrices(path, count)
    intrinsics, poses = np.empty((count, 3, 3)), np.empty((count, 4, 4))
    for view in range(count):
        where = f"{path}: the camera of view {view} (world_mat_{view} @ scale_mat_{view})"
        try:
            with np.errstate(over="ignore", invalid="ignore"):      # decompose_projection refuses it
                projection = matrices[f"world_mat_{view}"] @ matrices[f"scale_mat_{view}"]
            intrinsics[view], poses[view] = decompose_projection(projection)
        except ValueError as error:
            raise UserError(f"{where} cannot be used: {error}; mend these two matrices")
        # The sphere reaches 1 beyond its centre along the camera's axis: no ray of such a camera meets it.
        if poses[view, :3, 2] @ poses[view, :3, 3] > 1.0:
            raise UserError(f"{where} has the unit sphere behind it; z must point into the scene, and "
                            "scale_mat map the unit sphere to the object")
    return intrinsics, poses, matrices["scale_mat_0"]


def load_scene_cameras(path, cameras="cameras.npz"):
    """Read the cameras of the scene in the folder `path`, as load_cameras does, without its pictures."""
    return load_cameras(Path(path) / cameras, len(scene_files(Path(path))[0]))


def read_matrices(path, count, kinds=("world", "scale")):
    """Return {"world_mat_i" and "scale_mat_i": (4, 4) float64} of a cameras.npz with just `count` cameras."""
    keys = [f"{kind}_mat_{view}" for view in range(count) for kind in kinds]
    if not path.is_file():
        raise UserError(f"{path}: no such file; a scene holds image/, mask/ and {path.name}")
    try:
        with np.load(str(path), allow_pickle=False) as file:
            sizes = {entry.filename: entry.file_size for entry in file.zip.infolist()}
            if any(sizes.get(f"{key}.npy", 0) > LARGEST_MATRIX for key in keys):    # it may unpack to any size
                raise ValueError
            found = {key: file[key] for key in keys if key in file.files}
            more = f"world_mat_{count}" in file.files
    except Exception:  # zipfile, zlib, pickle and numpy each raise their own; an .npy is no context manager
        raise UserError(f"{path}: not a readable .npz of numbers; write it with numpy.savez")
    for key in keys:
        if key not in found:
            raise UserError(f"{path}: the key {key} is missing; each of the {count} views in image/ has one")
        matrix = np.asarray(found[key])     # bytes, where the entry is no array
        if matrix.shape != (4, 4) or matrix.dtype.kind not in "fiu":
            raise UserError(f"{path}: {key} is {matrix.dtype} of shape {matrix.shape}; it must be numbers of shape "
                            "(4, 4)")
        if not np.isfinite(found[key]).all():
            raise UserError(f"{path}: {key} has values that are not finite; mend this matrix")
    if more:
        raise UserError(f"{path}: has more cameras than the {count} views in image/; camera i is that of the "
                        "i-th image by sorted name, so restore the missing images or renumber the cameras")
    return {key: matrix.astype(np.float64) for key, matrix in found.items()}


# --- shrinking --------------------------------------------------------------------------------------------

def check_downscale(shape, factor, source):
    """Raise UserError where images (H, W, ...) shrunk by `factor` have no pixel; `source` says who asks."""
    if min(shape[:2]) < factor:
        raise UserError(f"{source}: a downscale of {factor} leaves nothing of {says_size(shape)}; "
                        f"choose {min(shape[:2])} or less")


def shrink_image(image, factor):
    """Area-average an image (H, W, 3) uint8 by a whole factor, cropping what does not fill a pixel; uint8."""
    if factor == 1:
        return image
    height, width = image.shape[0] // factor, image.shape[1] // factor
    return cv2.resize(image[:height * factor, :width * factor], (width, height), interpolation=cv2.INTER_AREA)


def shrink_mask(mask, factor):
    """Shrink a mask (H, W) bool by a whole factor: set where more than half of what a pixel covers is set."""
    if factor == 1:
        return mask
    height, width = mask.shape[0] // factor, mask.shape[1] // factor
    blocks = mask[:height * factor, :width * factor].reshape(height, factor, width, factor)
    return 2 * blocks.sum(axis=(1, 3)) > factor * factor


def shrink_intrinsics(intrinsics, factor):
    """Return the intrinsics (..., 3, 3) for images shrunk by `factor`: u' = (u - (factor - 1) / 2) / factor.

    The shift, in v as in u, is there as a shrunk pixel's centre is the mean of the centres that it covers.
    """
    shift = (1.0 - factor) / (2.0 * factor)
    return np.array([[1.0 / factor, 0.0, shift], [0.0, 1.0 / factor, shift], [0.0, 0.0, 1.0]]) @ intrinsics


# --- choosing views ---------------------------------------------------------------------------------------

def check_views(views, count, source):
    """Raise UserError unless all `views` are indices of `count` views; `source` says where they stand."""
    for view in views:
        if not 0 <= view < count:
            raise UserError(f"{source}: there is no view {view}; the scene's views are 0 to {count - 1}")


def training_views(held_out, count, source):
    """Return the indices of `count` views that are not held out; raise UserError where none is left."""
    check_views(held_out, count, source)
    views = [view for view in range(count) if view not in held_out]
    if not views:
        raise UserError(f"{source}: all {count} views are held out; leave at least one to train on")
    return views


def chosen_views(words, count, source):
    """Return the views that a command line names, as in "all", "0 8" or "0,8"; raise UserError for others."""
    words = ",".join(str(word) for word in words).split(",")
    if words == ["all"]:
        return list(range(count))
    for word in words:
        if not (word.isascii() and word.isdigit()):
            raise UserError(f"{source}: {word!r} is no view; give indices from 0, such as 0 8 16, or all")
    views = [int(word) for word in words]
    check_views(views, count, source)
    return views


# --- rays and pixels --------------------------------------------------------------------------------------

def spread_views(poses, first, count):
    """Choose `count` views (all, where there are fewer), beginning with `first`: each next one is that whose camera is
    farthest from those before it, as seen from the origin. poses: (N, 4, 4), camera to world."""
    sides = poses[:, :3, 3] / np.linalg.norm(poses[:, :3, 3], axis=1, keepdims=True)
    chosen = [first]
    while len(chosen) < min(count, len(poses)):
        nearness = (sides @ sides[chosen].T).max(axis=1)
        nearness[chosen] = np.inf
        chosen.append(int(nearness.argmin()))
    return chosen


def view_rays(scene, view, uv):
    """Return the rays of the pixels `uv` of a view, and what the view shows there.

    uv: (N, 2), column and row, whole numbers. Returns origin (3,), unit directions (N, 3) and rgb (N, 3) in
    [-1, 1], all float32, and mask (N,) bool.
    """
    origin, directions = pixel_rays(uv, scene.intrinsics[view], scene.poses[view])
    u, v = np.asarray(uv).astype(np.int64).T
    rgb = scene.images[view, v, u].astype(np.float32) / 127.5 - 1.0
    return origin, directions, rgb, scene.masks[view, v, u]


class Batch(NamedTuple):
    view: int
    origin: np.ndarray      # (3,) float32
    directions: np.ndarray  # (R, 3) float32, unit length
    rgb: np.ndarray         # (R, 3) float32 in [-1, 1]
    mask: np.ndarray        # (R,) bool, True on the object
    weights: np.ndarray     # (R,) float32, of the rays in the losses; 1 on average


def epoch_steps(views, ranks=1):
    """Return the steps of an epoch in which `ranks` processes take one of `views` views each and every view comes."""
    return -(-views // ranks)


def training_batches(scene, views, rays, seed, start=0, rank=0, ranks=1, outline_rays=0.0):
    """Yield Batches for ever, from that of the step `start` on: each is one view and `rays` random pixels of it.

    Each of `views` comes once in every epoch (len(views) steps), in an order shuffled anew for each. The pixels
    are uniform over the whole image, object or not, and differ from one another unless the image has fewer; with
    `outline_rays`, from 0 to less than 1, they are drawn as by draw_pixels.
    Of several processes, `ranks`, each takes the batches of its `rank`: an epoch has 1/ranks as many steps, and
    its last step takes the epoch's first views again where `ranks` does not divide them. A batch is a function
    of the seed, the step, the rank and the ranks.
    """
    height, width = scene.masks.shape[1:]
    regions = {}
    for step in itertools.count(start):
        epoch, position = divmod(step, epoch_steps(len(views), ranks))
        view = random_numbers(seed, ORDER, epoch).permutation(views)[(position * ranks + rank) % len(views)]
        # No shuffle: the order of the rays is of no use.
        rng = random_numbers(seed, PIXELS, step * ranks + rank)
        if outline_rays:
            if view not in regions:
                regions[view] = mask_regions(scene.masks[view])
            pixels, weights = draw_pixels(regions[view], rays, outline_rays, rng)
        else:
            pixels = rng.choice(height * width, rays, replace=rays > height * width, shuffle=False)
            weights = np.ones(rays, np.float32)
        yield Batch(int(view), *view_rays(scene, view, np.stack([pixels % width, pixels // width], axis=1)), weights)


def mask_regions(mask):
    """Return the numbers of the pixels of a mask (H, W) bool as three int32 arrays: those near its outline (by up to
    OUTLINE_BAND of the shorter side), the others on the object, and the others."""
    inside = mask.astype(np.uint8)
    distance = np.maximum(*(cv2.distanceTransform(side, cv2.DIST_L2, 5) for side in (inside, 1 - inside)))
    near = distance <= OUTLINE_BAND * min(mask.shape)
    return [np.flatnonzero(region).astype(np.int32) for region in (near, mask & ~near, ~mask & ~near)]


def draw_pixels(regions, rays, outline_rays, rng):
    """Draw `rays` pixels, the share `outline_rays` of them near the outline, and of the others most on the object.

    regions: what mask_regions gives. Returns the pixels' numbers (rays,), and weights (rays,) float32 with which a sum
    over them is on average what it is for uniform pixels: the loss is the same, but it varies less from step to step
    where the pixels are that decide the shape (stratified sampling).
    """
    sizes = np.array([len(region) for region in regions])
    shares = np.array([outline_rays, (1 - outline_rays) * OBJECT_SHARE, (1 - outline_rays) * (1 - OBJECT_SHARE)])
    shares = np.where(sizes > 0, shares, 0.0)
    shares /= shares.sum()
    ends = np.floor(np.cumsum(shares[:-1]) * rays + rng.random()).astype(int)   # by chance up or down: right on average
    counts = np.diff(ends, prepend=0, append=rays)
    pixels = [rng.choice(region, count, replace=count > len(region), shuffle=False)
              for region, count in zip(regions, counts) if count]
    weights = np.divide(sizes / sizes.sum(), shares, out=np.zeros(3), where=shares > 0)
    return np.concatenate(pixels), np.repeat(weights, counts).astype(np.float32)
