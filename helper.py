"""What the scripts share: user errors, safe writing, configuration, nnabla's context, cameras and rays, randomness.

Imports nothing of the other scripts.
"""
import argparse
import contextlib
import errno
import logging
import os
import reprlib
import signal
import stat
import sys
from typing import NamedTuple, Tuple

import cv2
import numpy as np

# --- errors and files -------------------------------------------------------------------------------------------------

REFUSED_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """Bad input: the message is one line that names the file, key or value, and the mend."""


def run(main):
    """Call `main()` as a script's body: a UserError ends it with its one line and status 2, Ctrl-C with status 130."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of a damaged picture is told in one line
    for stream in (sys.stdout, sys.stderr):     # a file's name may hold what the terminal's encoding has not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        except OSError as error:    # of a path that the system refuses, wherever it is first looked at
            if error.filename is None or error.errno not in REFUSED_PATHS:
                raise
            raise UserError(f"{error.filename}: {error.strerror}; choose another path") from error
    except UserError as error:
        said = "".join(c if c.isprintable() else " " for c in str(error))   # of a file's name that holds a line's end
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Shortened(reprlib.Repr):
    """repr for an error's one line: short, whatever a file holds."""

    def repr_int(self, x, level):
        return super().repr_int(x, level) if abs(x) < 10 ** 40 else "a number of more than 40 digits"


SHORT = Shortened()
SHORT.maxlevel = 2


def check_is_file(path, mend=""):
    """Raise UserError, with the words of `mend` at its end, unless `path` is a regular file or a link to one.

    A named pipe would keep its reader waiting without end, and a device may have no end.
    """
    mend = f"; {mend}" if mend else ""
    try:
        mode = os.stat(str(path)).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file{mend}") from error
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the name
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'no file name'})") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file{mend}")


@contextlib.contextmanager
def stop_signals():
    """Yield a list; the first SIGINT (Ctrl-C), SIGTERM or SIGHUP within appends its number, and nothing else happens.

    A second Ctrl-C ends the process at once. A signal that is ignored, as nohup has it, stays so.
    """
    noted, before = [], {}

    def note(number, frame):
        noted.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGINT:     # not print: it may be what was interrupted
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")

    try:
        for number in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")):
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the command line -------------------------------------------------------------------------------------------------

def argument_parser(description, config=True, model=False):
    """Return the argument parser that the scripts share: --context, --device-id and, where asked for, the files."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if config:
        parser.add_argument("--config", required=True, help="the configuration, such as config/default.yaml")
        parser.add_argument("--monitor-path", default=None if model else "results",
                            help="the results land in {monitor_path}_{scan}"
                                 + ("; by default beside the model" if model else ""))
    if model:
        parser.add_argument("--model-load-path", required=True,
                            help="a model_*.h5 of a training run, or its folder for the newest one there")
    parser.add_argument("--context", choices=("auto", "cpu", "cudnn"), default="auto",
                        help="where to compute; auto is the GPU where nnabla's CUDA extension and a device are there")
    parser.add_argument("--device-id", default="0", help="which GPU")
    return parser


# --- cameras and rays -------------------------------------------------------------------------------------------------

@np.errstate(all="ignore")      # what is not finite in the end is refused
def decompose_projection(projection):
    """Decompose P = K [R | t] into intrinsics and pose.

    projection: (3, 4) or (4, 4), x right, y down, z into the scene, pixels. Returns intrinsics (3, 3) with a 1 at its
    end and pose (4, 4), camera to world, both float64. Raises ValueError for a matrix that is no camera.
    """
    projection = np.asarray(projection, np.float64)[:3, :4]
    if not np.isfinite(projection).all():
        raise ValueError("it has values that are not finite")
    if np.linalg.cond(projection[:, :3]) > 1e12:
        raise ValueError("it is singular")
    if np.linalg.det(projection[:, :3]) < 0:  # P and -P are the same projection
        projection = -projection
    intrinsics, rotation, centre = cv2.decomposeProjectionMatrix(projection)[:3]
    pose = np.eye(4)
    pose[:3, :3] = rotation.T
    pose[:3, 3] = centre[:3, 0] / centre[3, 0]
    intrinsics = intrinsics / intrinsics[2, 2]
    if not (np.isfinite(pose).all() and np.isfinite(intrinsics).all()):
        raise ValueError("its numbers are too large or too small")
    return intrinsics, pose


class Camera(NamedTuple):
    """A pinhole camera and the size of its image."""
    intrinsics: np.ndarray      # (3, 3), pixels
    pose: np.ndarray            # (4, 4), camera to the unit sphere's coordinates
    shape: Tuple[int, int]      # height and width


def pixel_rays(uv, intrinsics, pose):
    """Return the camera centre (3,) and the unit directions (N, 3) of the rays through pixels, float32.

    uv: (N, 2), column and row, pixel centres at integers; intrinsics (3, 3) and pose (4, 4) as decompose_projection
    gives them.
    """
    homogeneous = np.concatenate([np.asarray(uv, np.float64), np.ones((len(uv), 1))], axis=1)
    directions = homogeneous @ np.linalg.inv(intrinsics).T @ pose[:3, :3].T
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return pose[:3, 3].astype(np.float32), directions.astype(np.float32)


def pixel_grid(height, width):
    """Return the (height * width, 2) float32 pixel coordinates (column, row) of an image, row by row."""
    v, u = np.mgrid[:height, :width]
    return np.stack([u.ravel(), v.ravel()], axis=1).astype(np.float32)


def upright(poses):
    """Return the unit vector (3,) that is up in a scene.

    poses: (N, 4, 4), camera to world, y down, around the origin. It is the mean of the cameras' upward axes where
    these agree, or that of half the cameras where these do, as in a set with both portraits and landscapes. Else the
    photographs lie on their sides, or look down, and it is the direction in which the cameras, seen from the origin,
    vary least: the normal of a ring, the axis of a dome. The images' tops say which end of it is up or, where they
    cancel, the side on which the cameras stand. Without such a direction the upward axes decide after all.
    """
    ups, places = -poses[:, :3, 1], poses[:, :3, 3]
    places = places / np.maximum(np.linalg.norm(places, axis=1, keepdims=True), 1e-12)
    mean, alike = ups.mean(axis=0), ups @ ups.T > np.cos(np.radians(30))
    if np.linalg.norm(mean) < 0.75:     # of cameras all around an object, level to straight down, it is 0.79
        group = alike[alike.sum(axis=1).argmax()]
        spread, axes = np.linalg.eigh(np.cov(places.T))     # ascending; the axes are columns
        if group.sum() >= max(3, len(poses) / 2):
            mean = ups[group].mean(axis=0)
        elif spread[0] < 0.6 * spread[1] - 1e-9:    # neither alike in all directions nor 0 and 0, all on a line
            ends = axes[:, 0] @ mean, axes[:, 0] @ places.mean(axis=0)
            mean = axes[:, 0] * np.copysign(1, ends[0] if abs(ends[0]) > 0.1 else ends[1])
        elif np.linalg.norm(mean) < 0.3:
            mean = ups[group].mean(axis=0)
    return mean / np.linalg.norm(mean)


def rightwards(up, back):
    """Return the unit vector (3,) across `up` that points right for someone who looks along -back, both (3,)."""
    for towards in (back, *np.eye(3)):  # looking straight down or up, any direction does
        right = np.cross(up, towards)
        if np.linalg.norm(right) > 0.05 * np.linalg.norm(towards):
            break
    return right / np.linalg.norm(right)


# --- randomness -------------------------------------------------------------------------------------------------------

ORDER, PIXELS, SAMPLES = 1, 2, 3    # of the views in an epoch; of a step; of a step's tracing and its eikonal loss


def random_numbers(seed, purpose, number):
    """Return a numpy Generator that is a function of the seed, what it is for and the number of its epoch or step.

    Nothing of it is carried from step to step, so a run can be taken up at any.
    """
    return np.random.default_rng([seed, purpose, number])
