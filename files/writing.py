"""Atomic writing: a file is written under a temporary name beside its target, then renamed to it."""
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

    Readers see either the old file or the whole new one. If the process is killed, remove_unfinished cleans up later.
    Raises UserError if the file cannot be written, or if a folder that this process holds was moved.
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
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp creates private files; results get default permissions
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())     # without it, a power cut may leave an empty file under the new name
            os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if handle is not None:
            os.close(handle)


def check_target(path):
    """Raise UserError if `path` cannot be a file: it is a folder, its name is too long, ..."""
    try:
        if stat.S_ISDIR(os.stat(str(path)).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another name") from error


@contextlib.contextmanager
def writing(path):
    """Turn an OSError within the block (most often a full disk) into a UserError: `path` cannot be written."""
    check_held(path)
    try:
        yield
    except OSError as error:
        check_held(path)
        mend = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){mend}; the earlier file, if any, is "
                        "intact") from error


def locked_temporary(path):
    """Create a temporary file beside `path`, and return its handle and its path (str).

    The handle holds a lock, which tells remove_unfinished that the file is in use. It is None if there are no locks.
    Raises OSError.
    """
    while True:
        handle, temporary = tempfile.mkstemp(prefix=UNFINISHED, suffix=path.suffix, dir=str(path.parent))
        if not lock(handle):
            os.close(handle)
            return None, temporary
        if stands_at(handle, temporary):
            return handle, temporary
        os.close(handle)    # remove_unfinished removed it before it was locked


def write_bytes(path, content):
    """Write `content` (bytes) to `path` atomically. Raises UserError as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def image_bytes(image):
    """Convert an image from floats in [0, 1] to uint8; uint8 is returned as it is."""
    return image if image.dtype == np.uint8 else (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def write_image(path, image):
    """Write `image` (H, W), (H, W, 3) or (H, W, 4), floats in [0, 1] or uint8, to `path` atomically, format by suffix.
    """
    import imageio.v2 as imageio  # imported here, as only writers of images need it
    with replacing(path) as temporary:
        imageio.imwrite(temporary, image_bytes(image))


FRAME_TIME = 40     # ms: 25 frames per second; a multiple of 10 ms, the unit of GIF


@contextlib.contextmanager
def video_writer(path):
    """Yield a function append(image) that adds a frame (H, W, 3), floats in [0, 1] or uint8, to a video.

    The suffix of `path` decides the format: .gif, else H.264. Frames are 40 ms apart. `path` is replaced at the end.
    """
    import imageio.v2 as imageio
    if Path(path).suffix.lower() == ".gif":
        kind = {"format": "GIF", "duration": FRAME_TIME, "loop": 0}
    else:
        kind = {"format": "FFMPEG", "fps": 1000 // FRAME_TIME, "quality": 8, "macro_block_size": 1}
    with replacing(path) as temporary, imageio.get_writer(temporary, **kind) as writer:
        def append(image):
            odd = np.array(image.shape[:2]) % 2     # H.264 requires even sizes
            writer.append_data(np.pad(image_bytes(image), ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge"))

        yield append


def copy_config(path, folder):
    """Copy a configuration file into the run's folder, unless it is already that file."""
    target = Path(folder) / Path(path).name
    if not (target.exists() and target.samefile(path)):
        write_bytes(target, Path(path).read_bytes())
