"""A folder of photographs, or a video, without cameras -> a working folder with a COLMAP model of them.

The working folder `{output}_colmap` holds the photographs in `images/`: links to those that any program reads as meant,
PNG files of the others (HEIC, turned by EXIF), and a video's frames. Cameras are those of structure_from_motion.
"""
import os
import sys
from pathlib import Path
from typing import List, NamedTuple

import datasets
from files import pictures, writing
from helper import UserError
from scenes import camera_files, structure_from_motion, video_frames

PLAIN = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF")   # formats that stay as they are if they are not turned
UNREAD = (".avif", ".jxl", ".gif", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
SIDEWAYS = (5, 6, 7, 8)                                 # EXIF orientations that exchange width and height


class Source(NamedTuple):
    """Photographs without cameras."""
    paths: List[Path]       # the photographs, or one video
    is_video: bool


def without_cameras(source, images=None):
    """Return the Source that `source`, a folder or file, is, or None if it has cameras or is a camera file.

    images: the folder of the photographs, None to look for it.
    """
    source = Path(source)
    if source.suffix.lower() in video_frames.SUFFIXES and not source.is_dir():
        return Source([source], True)
    if not source.is_dir() or camera_files.cameras_of_folder(source, single=False):
        return None
    if any(camera_files.cameras_of_folder(folder, single=False) for folder in datasets.neighbours(source)):
        return None     # camera_files names that folder
    for folder in [Path(images)] if images else [source / "images", source / "image", source]:
        if os.path.isdir(str(folder)):
            found, others = datasets.picture_files(folder, datasets.PHOTOGRAPHS)
            say_unread(folder, found, others)
            if found:
                return Source(sorted(found, key=camera_files.natural_key), False)
    return None


def say_unread(folder, found, others):
    """Print a notice of pictures among `others` that cannot be read. Raise UserError if there are no other ones."""
    unread = [path.name for path in others if path.suffix.lower() in UNREAD]
    if unread and not found:
        raise UserError(f"{folder / unread[0]}: pictures of this kind are not read here; convert them to PNG or JPEG")
    if unread:
        print(f"notice: {folder}: {pictures.listed(unread, 3)}: not read here; convert them to PNG or JPEG")


def working_folder(output):
    """Return the folder, beside the scene `output`, in which its cameras are searched."""
    path = Path(os.path.abspath(str(output)))
    return path.with_name(path.name + "_colmap")


def find_cameras(source, output, frames):
    """Find the cameras of a Source. Return the working folder, which camera_files reads, and say what was left out.

    output: the scene's folder. frames: how many to take of a video. Raises UserError if most have no camera.
    """
    structure_from_motion.library()
    work = working_folder(output)
    try:
        (work / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{work}: cannot be made ({error.strerror}); choose another --output") from error
    if source.is_video:
        paths = video_frames.take(source.paths[0], work / "images", frames)
    else:
        paths = gathered(source.paths, work / "images")
    found = structure_from_motion.find_cameras(paths, work, source.is_video)
    for name, reason in found.left_out:
        print(f"look: {name}: left out, {reason}", file=sys.stderr)
    print(f"{work}: the cameras of {len(paths) - len(found.left_out)} of {len(paths)} photographs, a COLMAP model")
    return work


def gathered(paths, folder):
    """Bring photographs into a folder. Return their paths there, in the same order.

    Raises UserError if they have several sizes, or if one cannot be read.
    """
    headers = [pictures.read_header(path) for path in paths]
    turned = turned_sizes(paths, headers)
    names, kept = set(), []
    for path, header, upright in zip(paths, headers, turned):
        plain = header.kind in PLAIN and (not upright or header.orientation == 1)
        name = path.name if plain else path.stem + ".png"
        if name in names:
            name = path.name + ".png"
        names.add(name)
        kept.append(folder / name)
        if plain:
            link(path, folder / name)
        else:
            write_plain(path, folder / name, upright)
    for file in folder.iterdir():
        if file.name not in names and (file.is_symlink() or file.suffix == ".png"):
            file.unlink()
    return kept


def turned_sizes(paths, headers):
    """Return for each photograph whether to turn it as its EXIF orientation says.

    All are turned if they then have one size, none if only as stored they have. Raises UserError for several sizes.
    """
    upright = [header.size[::-1] if header.orientation in SIDEWAYS else header.size for header in headers]
    if len(set(upright)) == 1:
        return [True] * len(paths)
    stored = [header.size for header in headers]
    if len(set(stored)) == 1:
        return [False] * len(paths)
    usual = max(stored, key=stored.count)
    other = next(index for index, size in enumerate(stored) if size != usual)
    raise UserError(f"{paths[other]}: {datasets.says_size(stored[other][::-1])}, but {stored.count(usual)} of "
                    f"{len(paths)} photographs are {datasets.says_size(usual[::-1])}; a scene has one size: crop or "
                    "scale them alike, or leave the others out")


def link(path, target):
    """Let `target` stand for the file `path`: a link, or a copy where the system has no links."""
    path = Path(os.path.abspath(str(path)))
    if target.is_symlink() and os.readlink(str(target)) == str(path):
        return
    if target.is_symlink() or target.exists():
        target.unlink()
    try:
        target.symlink_to(path)
    except (OSError, NotImplementedError):
        writing.write_bytes(target, path.read_bytes())


def write_plain(path, target, upright):
    """Write a photograph as a PNG of 8 bits, turned as its EXIF orientation says if `upright`, unless it is there."""
    date = os.stat(str(path)).st_mtime_ns
    if target.exists() and not target.is_symlink() and os.stat(str(target)).st_mtime_ns == date:
        return
    if target.is_symlink():
        target.unlink()
    picture = pictures.read_picture(path, pictures.colours_and_alpha)
    pixels = pictures.turn(picture.pixels, picture.orientation) if upright else picture.pixels
    writing.write_image(target, pixels)
    os.utime(str(target), ns=(date, date))
