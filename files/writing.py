"""Files that are written whole or not at all: beside their place, and renamed into it."""
import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path

import numpy as np

from files.folders import UNFINISHED, check_held, lock, stands_at
from helper import UserError


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` (same suffix); rename it to `path` if the block succeeds, else remove it.

    A reader therefore sees the old file or the whole new one. What a killed process leaves, remove_unfinished removes.
    Raises UserError where the folder cannot be written, and where this process holds it and it was moved.
    """
    path = Path(path)
    check_target(path)
    check_held(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = locked_temporary(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose a folder that you may write "
                        "to") from error
    try:
        with writing(path):
            yield Path(temporary)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; a user's results are ordinary ones
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())     # or, after a power cut, the new name may stand over an empty file
            os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if handle is not None:
            os.close(handle)


def check_target(path):
    """Raise UserError where no file can be written at `path`: a folder is there, its name is too long, ..."""
    try:
        if stat.S_ISDIR(os.stat(str(path)).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another name") from error


@contextlib.contextmanager
def writing(path):
    """Within, an OSError (a full disk, most often) becomes the UserError that `path` cannot be written."""
    check_held(path)
    try:
        yield
    except OSError as error:
        check_held(path)
        mend = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){mend}; the earlier file, if any, is "
                        "intact") from error


def locked_temporary(path):
    """Make a temporary file for `path` beside it; return its handle and its path, a text.

    The handle holds a lock, by which remove_unfinished sees that the file is in use; where there are no locks it is
    None. Raises OSError.
    """
    while True:
        handle, temporary = tempfile.mkstemp(prefix=UNFINISHED, suffix=path.suffix, dir=str(path.parent))
        if not lock(handle):
            os.close(handle)
            return None, temporary
        if stands_at(handle, temporary):
            return handle, temporary
        os.close(handle)    # it was removed before it had its lock


def write_bytes(path, content):
    """Write `content` to `path`, replacing it whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def image_bytes(image):
    """Return an image, floats in [0, 1] or uint8, as uint8."""
    return image if image.dtype == np.uint8 else (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def write_image(path, image):
    """Write `image` (H, W, 3) or (H, W), floats in [0, 1] or uint8, as a picture, replacing `path` whole."""
    import imageio.v2 as imageio  # here: the tracer's and the networks' users need no image library
    with replacing(path) as temporary:
        imageio.imwrite(temporary, image_bytes(image))


FRAME_TIME = 40     # ms: 25 frames a second, which GIF too can say (it counts in hundredths of a second)


@contextlib.contextmanager
def video_writer(path):
    """Yield a function that appends an image (H, W, 3) as a frame to a video, .mp4 (H.264) or .gif by the name.

    The frames are 40 ms apart. `path` is replaced whole, after the last one.
    """
    import imageio.v2 as imageio
    if Path(path).suffix.lower() == ".gif":
        kind = {"format": "GIF", "duration": FRAME_TIME, "loop": 0}
    else:
        kind = {"format": "FFMPEG", "fps": 1000 // FRAME_TIME, "quality": 8, "macro_block_size": 1}
    with replacing(path) as temporary, imageio.get_writer(temporary, **kind) as writer:
        def append(image):
            odd = np.array(image.shape[:2]) % 2     # H.264 wants even sizes
            writer.append_data(np.pad(image_bytes(image), ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge"))

        yield append


def copy_config(path, folder):
    """Copy a configuration file into the run's folder under its own name (unless it is that very file)."""
    target = Path(folder) / Path(path).name
    if not (target.exists() and target.samefile(path)):
        write_bytes(target, Path(path).read_bytes())
