"""Bounded reading of untrusted pictures: PNG, JPEG, TIFF, WebP, BMP and PPM, recognised by content. And HEIC."""
import contextlib
import io
import os
import struct
import sys
import warnings
from typing import NamedTuple, Tuple

import numpy as np

# Image.open knows the formats of the plugins imported here; with `formats` given, it imports no others.
from PIL import (  # noqa: F401
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

MOST_PIXELS = 80 * 10 ** 6  # per picture; a small file may decompress to more than the memory holds
MOST_BYTES = 10 ** 9        # per file; MOST_PIXELS with four 16-bit channels need less
MOST_SCANS = 50             # per JPEG; each scan passes over all pixels, and progressive JPEGs have about ten
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM")  # Pillow runs external programs for some others (EPS)
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")    # in its first bytes
COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # Pillow's 8-bit modes
WIDTH, HEIGHT, ORIENTATION = 256, 257, 274  # tag numbers of TIFF and EXIF
MODEL, FOCAL_LENGTH, FILM_FOCAL_LENGTH = 272, 37386, 41989
FURTHER_TAGS = (34665, 34853, 40965)        # tags that point to further directories: EXIF, GPS, interoperability
# {field type: bytes per value}
TAG_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


class Header(NamedTuple):
    """What a picture file says of itself."""
    size: Tuple[int, int]   # width and height as stored
    orientation: int        # EXIF orientation, 1 to 8
    kind: str               # Pillow's name of the format
    lens: Tuple             # EXIF: the camera's model (bytes), its focal length in mm and as of 35 mm film; 0 if absent


class Picture(NamedTuple):
    """A picture as stored in its file. COLMAP and most libraries take it so; viewers apply the EXIF orientation."""
    pixels: np.ndarray      # (H, W, ...)
    orientation: int        # EXIF orientation, 1 to 8; 1: upright as stored
    kind: str               # Pillow's name of the format, such as "PNG"


def read_image(path):
    """Read a picture as RGB, (H, W, 3) uint8, without any alpha channel. Raises as read_picture does."""
    return read_picture(path, colours).pixels


def read_mask(path):
    """Read a picture as a mask, (H, W) bool: True where grey, and alpha if any, exceed half of the maximum."""
    return read_picture(path, on_object).pixels


def read_pair(image_file, mask_file):
    """Read an image (H, W, 3) uint8 and its mask (H, W) bool.

    EXIF orientations are applied if the two have the same proportions only then; see as_meant. Returns the image,
    the mask, and a list of the paths whose orientation remains in doubt.
    """
    image, mask = read_picture(image_file, colours), read_picture(mask_file, on_object)
    pixels, image_doubt = as_meant(image, mask.pixels.shape)
    mask_pixels, mask_doubt = as_meant(mask, pixels.shape)
    return pixels, mask_pixels, [image_file] * image_doubt + [mask_file] * mask_doubt


def as_meant(picture, shape):
    """Return (pixels, doubt) of a Picture, with its EXIF orientation applied if the proportions require it.

    shape: (h, w, ...) with the required proportions, or None if unknown. The pixels are turned if they match `shape`
    only when turned; otherwise they are as stored. doubt: there is an orientation, but `shape` does not tell whether
    to apply it.
    """
    turned = turn(picture.pixels, picture.orientation)
    as_stored, as_turned = (shape is not None and alike(pixels.shape, shape) for pixels in (picture.pixels, turned))
    if as_turned and not as_stored:
        return np.ascontiguousarray(turned), False
    return picture.pixels, picture.orientation != 1 and not (as_stored and not as_turned)


def alike(shape, other):
    """Return whether two shapes (h, w, ...) have the same aspect ratio within 2 %, as downscaling rounds the sides."""
    return abs(shape[1] * other[0] / (shape[0] * other[1]) - 1) <= 0.02


def turn(pixels, orientation):
    """Apply an EXIF orientation, 1 to 8, to pixels (H, W, ...), and return a view of them."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels


def say_doubtful(files):
    """Print one notice on the pictures `files` whose EXIF orientation may or may not apply (see as_meant)."""
    if files:
        print(f"notice: {listed([str(file) for file in files], 3)}: marked as turned (EXIF orientation), but the sizes "
              "do not tell whether cameras and masks belong to the turned picture; taken as stored, not turned. If "
              "they belong to the turned one, save the pictures turned, without the mark", file=sys.stderr)


@contextlib.contextmanager
def opened(path):
    """Open a picture and yield (Pillow's picture, its file). Errors within the block become a UserError, too.

    Raises UserError for anything but a regular file, and for a file that is too large or not a picture.
    """
    check_is_file(path)
    try:
        with warnings.catch_warnings(), open(str(path), "rb") as file:
            warnings.simplefilter("ignore")     # on large pictures (we have our own bound) and odd metadata
            if os.path.getsize(str(path)) > MOST_BYTES:
                raise UserError(f"{path}: is larger than {MOST_BYTES // 10 ** 6} MB; shrink it")
            check_tags(path, file)
            file.seek(0)
            check_scans(path, file)
            file.seek(0)
            formats = FORMATS + heic_format(path, file)
            file.seek(0)
            with Image.open(file, formats=formats) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise too_large(path)
                yield picture, file
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise too_large(path) from error
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, ...
        raise unreadable(path, error) from error


def heic_format(path, file):
    """Return Pillow's names of the formats that an open file requires beyond FORMATS: ("HEIF",) for HEIC, else ().

    Raises UserError if pillow-heif, which reads HEIC, is missing.
    """
    head = file.read(12)
    if head[4:8] != b"ftyp" or head[8:] not in HEIC_BRANDS:
        return ()
    try:
        import pillow_heif
    except ImportError as error:
        raise UserError(f"{path}: HEIC, for which pillow-heif is needed: pip install -r requirements-photos.txt; or "
                        "convert it to PNG or JPEG") from error
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def too_large(path):
    """Return the UserError for a picture with more than MOST_PIXELS."""
    return UserError(f"{path}: has more than {MOST_PIXELS // 10 ** 6} million pixels; shrink it")


def unreadable(path, error):
    """Return the UserError for a picture that Pillow failed to read with `error`."""
    reason = getattr(error, "strerror", None) or "truncated, or not in the format that its name says"
    if isinstance(error, MemoryError):
        reason = "not enough memory"
    elif isinstance(error, UnidentifiedImageError):
        with open(str(path), "rb") as file:
            if file.read(8)[4:] == b"ftyp":
                return UserError(f"{path}: AVIF, a damaged HEIC or a video, which cannot be read; convert it to PNG or "
                                 "JPEG")
        reason = "it is not PNG, JPEG, TIFF, WebP or BMP, or is truncated"
    return UserError(f"{path}: cannot be read as an image ({reason}); replace this file")


def read_picture(path, convert):
    """Read the first frame of a picture file as a Picture.

    The file may be grey, palette, RGB or CMYK, with or without alpha, of 1, 8 or 16 bits.
    convert: function from Pillow's 8-bit picture to the pixels, such as `colours`, `alpha` or `on_object`.
    Raises UserError if the file is unreadable or too large.
    """
    with opened(path) as (picture, file):
        kind, is_tiff = picture.format, picture.format == "TIFF"
        orientation = stored_orientation(file) if is_tiff else 1
        picture.load()
        if not is_tiff:     # a PNG's EXIF data may follow its pixels
            orientation = stored_orientation(exif_file(picture))
        pixels = convert(eight_bits(path, picture))
        if is_tiff:         # Pillow applies the orientation to TIFF alone; undo it
            pixels = np.ascontiguousarray(turn(pixels, {6: 8, 8: 6}.get(orientation, orientation)))
        return Picture(pixels, orientation, kind)


def read_header(path):
    """Return the Header of a picture file. Raises UserError if it is unreadable or too large."""
    width, height = picture_size(path)
    with opened(path) as (picture, file):
        if picture.format == "TIFF":
            content = file
        else:
            if picture.format == "PNG":
                picture.load()      # its EXIF data may follow its pixels
            content = exif_file(picture)
        return Header((width, height), stored_orientation(content), picture.format, lens_tags(content))


def exif_file(picture):
    """Return the EXIF data of Pillow's picture as a binary file, which is empty if there are none."""
    exif = picture.info.get("exif") or b""
    return io.BytesIO(exif[6:] if exif.startswith(b"Exif\0\0") else exif)


def lens_tags(file):
    """Return Header's `lens` from a TIFF file or EXIF data."""
    entries = directory(file)
    exif = [entry for tag, _, _, value in entries if tag == FURTHER_TAGS[0] for entry in directory(file, value)]
    order = ">" if file.seek(0) == 0 and file.read(2) == b"MM" else "<"
    model, focal, film = b"", 0.0, 0
    for tag, kind, count, value in entries + exif:
        if tag == MODEL and 4 < count < 200:
            file.seek(value)
            model = file.read(count).rstrip(b"\0 ")
        elif tag == FOCAL_LENGTH and kind == 5:     # two integers
            file.seek(value)
            parts = file.read(8)
            above, below = struct.unpack(order + "II", parts) if len(parts) == 8 else (0, 1)
            focal = above / below if below else 0.0
        elif tag == FILM_FOCAL_LENGTH:
            film = value
    return model, focal, film


def eight_bits(path, picture):
    """Return Pillow's picture with at most 8 bits per channel. Raises UserError unless it has 1, 8 or 16 bits."""
    if picture.mode.startswith("I"):    # 16-bit grey; Pillow's own conversion clips it at 255
        grey = np.asarray(picture)
        if grey.min() >= 0 and grey.max() < 1 << 16:
            scaled = (np.arange(1 << 16) / 257.0 + 0.5).astype(np.uint8)
            return Image.fromarray(scaled[grey.astype(np.uint16)])
    if picture.mode not in COLOURS:
        raise UserError(f"{path}: its pixels ({picture.mode}) are not colours of 8 or 16 bits; convert it to PNG or "
                        "JPEG")
    return picture


def has_alpha(picture):
    """Return whether Pillow's picture has transparency."""
    return "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info


def colours(picture):
    """Return the RGB colours of Pillow's picture, (H, W, 3) uint8."""
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def colours_and_alpha(picture):
    """Return the colours of Pillow's picture, and its alpha channel if it has one, (H, W, 3 or 4) uint8."""
    return np.asarray(picture.convert("RGBA")) if has_alpha(picture) else colours(picture)


def alpha(picture):
    """Return an (H, W) bool mask, True where Pillow's picture is more than half opaque."""
    return np.asarray(picture.convert("RGBA").getchannel("A")) > 127    # via RGBA: palettes may be transparent, too


def grey(picture):
    """Return the brightness of Pillow's picture, (H, W) uint8."""
    return np.asarray(picture.convert("RGB").convert("L"))


def on_object(picture):
    """Return Pillow's picture as a mask, (H, W) bool: True where grey, and alpha if any, exceed half."""
    if has_alpha(picture):
        return alpha(picture) & (np.asarray(picture.convert("RGB").convert("L")) > 127)
    return np.asarray(picture.convert("L")) > 127


def check_scans(path, file):
    """Raise UserError for a JPEG with more than MOST_SCANS scans, which may take minutes to decode."""
    chunks = iter(lambda: file.read(1 << 24), b"")
    if file.read(2) == b"\xff\xd8" and sum(chunk.count(b"\xff\xda") for chunk in chunks) > MOST_SCANS:
        raise UserError(f"{path}: a JPEG of more than {MOST_SCANS} scans; save it again")


def check_tags(path, file):
    """Raise UserError for a TIFF whose tags claim more bytes than the file has, by referring to the same ones often."""
    claimed, offsets = 0, [None]
    while offsets:
        for tag, kind, count, value in directory(file, offsets.pop()):
            claimed += count * TAG_SIZES.get(kind, 1)
            if tag in FURTHER_TAGS and len(offsets) < 9:
                offsets.append(value)
    if claimed > os.path.getsize(str(path)) + 1000:
        raise UserError(f"{path}: its tags claim {claimed} bytes, more than the file has; replace it")


def stored_orientation(file):
    """Return the orientation, 1 to 8, in the first directory of a TIFF file or of EXIF data; 1 if there is none."""
    found = [value for tag, _, _, value in directory(file) if tag == ORIENTATION]
    return found[0] if found and 1 <= found[0] <= 8 else 1


def directory(file, offset=None):
    """Return the entries [(tag, field type, count, value or offset of the values)] of a directory of a TIFF or BigTIFF.

    file: open binary file, TIFF or EXIF data (same layout); offset: of the directory, None for the first one.
    Returns [] for anything else, and the whole entries of a truncated directory.
    """
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
    """Return the width and height of a picture as stored. Raises UserError if it is unreadable or too large."""
    with opened(path) as (picture, file):
        width, height = picture.size
        if picture.format == "TIFF":    # Pillow may have applied the orientation to its size
            stored = {tag: value for tag, _, _, value in directory(file)}
            width, height = stored.get(WIDTH, width), stored.get(HEIGHT, height)
        return width, height


def listed(names, most=8):
    """Return the first `most` names, comma-separated, and the number of the others: "a, b and 3 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
