"""Pictures of strangers, read within bounds: PNG, JPEG, TIFF, WebP, BMP and PPM, by their content."""
import contextlib
import io
import os
import struct
import sys
import warnings
from typing import NamedTuple

import numpy as np

# Pillow opens what is imported; it does not look for the others where it is told the formats.
from PIL import (  # noqa: F401  # noqa: F401
    BmpImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from helper import UserError, check_is_file

MOST_PIXELS = 80 * 10 ** 6  # of a picture: a small file may unpack to more than the memory
MOST_BYTES = 10 ** 9        # of a picture's file: so many pixels of 16 bits, four channels, need less
MOST_SCANS = 50             # of a JPEG, each of which goes through all pixels; progressive ones have about ten
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM")  # by content; for others Pillow may run programs
COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # Pillow's 8-bit modes
WIDTH, HEIGHT, ORIENTATION = 256, 257, 274  # the numbers of TIFF's tags, which are EXIF's too
FURTHER_TAGS = (34665, 34853, 40965)        # those that lead to further directories of tags
TAG_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


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
    """Yield a picture as Pillow opens it, and its file; within, whatever fails becomes a UserError that it cannot be read.

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


def listed(names, most=8):
    """Return names for a line of text: the first ones, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
