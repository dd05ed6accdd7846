"""Shared by all scripts: user errors, signals, the command line, cameras and rays, random numbers.

Imports no other module of this project.
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
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Tuple

import cv2
import numpy as np

# --- errors and files -------------------------------------------------------------------------------------------------

REFUSED_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """Bad input. The message is one line: the file, key or value at fault, and how to fix it."""


def run(main):
    """Run `main()` as a script. A UserError prints one line and exits with status 2; Ctrl-C exits with status 130."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # damaged pictures are reported as a UserError instead
    for stream in (sys.stdout, sys.stderr):     # file names may have characters that the terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        except OSError as error:    # a path that the system refuses, wherever it is first used
            if error.filename is None or error.errno not in REFUSED_PATHS:
                raise
            raise UserError(f"{error.filename}: {error.strerror}; choose another path") from error
    except UserError as error:
        said = "".join(c if c.isprintable() else " " for c in str(error))   # file names may contain line breaks
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Shortened(reprlib.Repr):
    """A repr for one-line messages: short for any value."""

    def repr_int(self, x, level):
        return super().repr_int(x, level) if abs(x) < 10 ** 40 else "a number of more than 40 digits"


SHORT = Shortened()
SHORT.maxlevel = 2


def check_is_file(path, mend=""):
    """Raise UserError unless `path` is a regular file or a link to one. The message ends with `mend`.

    Reading a named pipe may block forever, and reading a device may never end.
    """
    mend = f"; {mend}" if mend else ""
    try:
        mode = os.stat(str(path)).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file{mend}") from error
    except (OSError, ValueError) as error:      # ValueError: a null byte in the name
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'no file name'})") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file{mend}")


@contextlib.contextmanager
def stop_signals():
    """Yield a list. Within the block, SIGINT (Ctrl-C), SIGTERM and SIGHUP only append their number to it.

    A second Ctrl-C ends the process at once. Signals that were ignored before (nohup) stay ignored.
    """
    noted, before = [], {}

    def note(number, frame):
        noted.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGINT:     # not print(), which may be what was interrupted
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
    """Return an argument parser with --context and --device-id.

    config: add --config, --set and --monitor-path; model: add --model-load-path.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if config:
        parser.add_argument("--config", required=True, help="configuration file, such as config/default.yaml")
        parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE",
                            help="change a key of the configuration, such as train.steps=4000; can be repeated")
        parser.add_argument("--monitor-path", default=None if model else "results",
                            help="write the results to the folder {monitor_path}_{scan}"
                                 + ("; by default beside the model" if model else ""))
    if model:
        parser.add_argument("--model-load-path", required=True,
                            help="a model_*.h5, or the folder of a training run (its newest model)")
    parser.add_argument("--context", choices=("auto", "cpu", "cudnn"), default="auto",
                        help="where to compute; auto: the GPU if nnabla's CUDA extension and a device are found")
    parser.add_argument("--device-id", default="0", help="number of the GPU")
    return parser


# --- cameras and rays -------------------------------------------------------------------------------------------------

@np.errstate(all="ignore")      # results that are not finite raise ValueError below
def decompose_projection(projection):
    """Decompose a projection matrix P = K [R | t] into intrinsics and pose.

    projection: (3, 4) or (4, 4), world to pixels; camera axes x right, y down, z forward.
    Returns the intrinsics K (3, 3) with K[2, 2] = 1, and the pose (4, 4), camera to world, both float64.
    Raises ValueError if the matrix is not that of a camera.
    """
    projection = np.asarray(projection, np.float64)[:3, :4]
    if not np.isfinite(projection).all():
        raise ValueError("it has values that are not finite")
    try:
        condition = np.linalg.cond(projection[:, :3])
    except np.linalg.LinAlgError as error:      # no ValueError before NumPy 1.25
        raise ValueError("it is singular") from error
    if condition > 1e12:
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
    """A pinhole camera and its image size."""
    intrinsics: np.ndarray      # (3, 3), pixels
    pose: np.ndarray            # (4, 4), camera to unit sphere coordinates
    shape: Tuple[int, int]      # height, width


def pixel_rays(uv, intrinsics, pose):
    """Return the camera centre (3,) and the unit directions (N, 3) of the rays through N pixels, float32.

    uv: (N, 2), column and row, pixel centres at integers; intrinsics (3, 3) and pose (4, 4): see
    decompose_projection.
    """
    return pose[:3, 3].astype(np.float32), pixel_directions(uv, ray_matrices(intrinsics, pose))


def ray_matrices(intrinsics, pose):
    """Return the matrices (..., 3, 3) from (column, row, 1) of a pixel to a vector along its ray.

    intrinsics (..., 3, 3) and pose (..., 4, 4): see decompose_projection.
    """
    return pose[..., :3, :3] @ np.linalg.inv(intrinsics)


def pixel_directions(uv, matrices):
    """Return the unit directions (N, 3) float32 of the rays through the pixels uv (N, 2).

    matrices: (3, 3), or (N, 3, 3) for each pixel's own, the result of ray_matrices.
    """
    uv = np.asarray(uv, np.float64)
    directions = uv[:, :1] * matrices[..., 0] + uv[:, 1:] * matrices[..., 1] + matrices[..., 2]
    return (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)


def unit(vectors):
    """Return vectors (..., 3) scaled to length 1, of the same dtype; 0 stays 0."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def pixel_grid(height, width):
    """Return the pixel coordinates (column, row) of an image, row by row: (height * width, 2) float32."""
    v, u = np.mgrid[:height, :width]
    return np.stack([u.ravel(), v.ravel()], axis=1).astype(np.float32)


def upright(poses):
    """Estimate the up direction of a scene from its cameras, a unit vector (3,).

    poses: (N, 4, 4), camera to world, y down, cameras around the origin.

    1. If the cameras' upward axes agree, up is their mean.
    2. If those of at least half of the cameras agree (portraits mixed with landscapes), it is the mean of these.
    3. Otherwise the cameras are rolled or look down. Up is the direction in which their positions, seen from the
       origin, vary least: the normal of a ring, the axis of a dome. Its sign follows the mean upward axis or, where
       that is near zero along it, the side on which the cameras stand.
    4. If no direction varies least, up is the mean upward axis or, where that nearly vanishes, the mean over the
       largest group that agrees.
    """
    ups, places = -poses[:, :3, 1], poses[:, :3, 3]
    places = unit(places)
    mean, alike = ups.mean(axis=0), ups @ ups.T > np.cos(np.radians(30))
    if np.linalg.norm(mean) < 0.75:     # 0.79 for cameras all around an object, from level to straight down
        group = alike[alike.sum(axis=1).argmax()]
        spread, axes = np.linalg.eigh(np.cov(places.T))     # ascending; the axes are columns
        if group.sum() >= max(3, len(poses) / 2):
            mean = ups[group].mean(axis=0)
        elif spread[0] < 0.6 * spread[1] - 1e-9:    # false if isotropic, or if all positions are on one line (0 and 0)
            ends = axes[:, 0] @ mean, axes[:, 0] @ places.mean(axis=0)
            mean = axes[:, 0] * np.copysign(1, ends[0] if abs(ends[0]) > 0.1 else ends[1])
        elif np.linalg.norm(mean) < 0.3:
            mean = ups[group].mean(axis=0)
    return mean / np.linalg.norm(mean)


def rightwards(up, back):
    """Return the unit vector (3,) normal to `up` that points right in a view along -back. up, back: (3,)."""
    for towards in (back, *np.eye(3)):  # if the view is straight down or up, any direction will do
        right = np.cross(up, towards)
        if np.linalg.norm(right) > 0.05 * np.linalg.norm(towards):
            break
    return right / np.linalg.norm(right)


# --- randomness -------------------------------------------------------------------------------------------------------

def side_by_side(function, items, threads):
    """Return an iterator over function(item) of the items in order; so many threads work ahead, each at one item."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(function, items)


# Purposes of random numbers: the order of views in an epoch, the pixels of a step, and the sample positions of a step
# (ray tracing and eikonal loss).
ORDER, PIXELS, SAMPLES = 1, 2, 3


def random_numbers(seed, purpose, number):
    """Return a numpy Generator that depends only on the seed, the purpose and the number of the epoch or step.

    No generator state is carried between steps, so a run can resume at any step.
    """
    return np.random.default_rng([seed, purpose, number])
