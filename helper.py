"""What the scripts share: user errors, safe writing, configuration, nnabla's context, cameras and rays, randomness.

Imports nothing of the other scripts.
"""
import argparse
import contextlib
import ctypes
import errno
import math
import os
import re
import reprlib
import signal
import stat
import sys
import tempfile
from collections.abc import Hashable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import yaml


# --- errors and files -------------------------------------------------------------------------------------------------

class UserError(Exception):
    """Bad input: the message is one line that names the file, key or value, and the mend."""


def run(main):
    """Call `main()` as a script's body: a UserError ends it with its one line and status 2, Ctrl-C with status 130."""
    try:
        main()
    except UserError as error:
        said = "".join(c if c.isprintable() else " " for c in str(error))   # of a file's name that holds a line's end
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` (same suffix); rename it to `path` if the block succeeds, else remove it.

    A reader therefore sees the old file or the whole new one. Raises UserError where the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix="." + path.stem + "-", suffix=path.suffix, dir=str(path.parent))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose a folder that you may write to")
    os.close(handle)
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


@contextlib.contextmanager
def writing(path):
    """Within, an OSError (a full disk, most often) becomes the UserError that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        mend = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){mend}; the earlier file, if any, is "
                        "intact")


@contextlib.contextmanager
def new_folder(path):
    """Yield a temporary folder beside `path`, which is absent or empty; rename it to `path` if the block succeeds.

    Raises UserError where `path` holds anything, or cannot be written.
    """
    target = Path(os.path.abspath(path))
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{path}: is there already, and not empty; choose another --output or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=str(target.parent)) as temporary:
            folder = Path(temporary) / target.name
            folder.mkdir()
            yield folder
            folder.rename(target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output")


@contextlib.contextmanager
def held(folder):
    """Hold `folder` for this process within the block; UserError where another process holds it.

    Where the system or the folder's file system has no locks, nothing is held.
    """
    handle = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl    # not on Windows
        handle = os.open(str(folder), os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(f"{folder}: another training writes there; wait for its end or choose another "
                            "--monitor-path")
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


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


# --- configuration ----------------------------------------------------------------------------------------------------

MOST_TEXT = 1 << 16     # bytes of a configuration; ours have 3,000
MOST_EPOCHS = 100000    # the names of models have five digits
MOST_VIEWS = 100000


def between(least, most):
    """Return what SETTINGS has for numbers from `least` to `most`: a function that allows them, and the words."""
    return lambda v: least <= v <= most, f"between {least} and {most}"


def above_zero(most):
    """The same for numbers greater than 0, up to `most`."""
    return lambda v: 0 < v <= most, f"more than 0 and at most {most}"


def name_of(what):
    """The same for names of files and folders, which systems hold to 255 bytes between two slashes."""
    return (lambda v: v.strip() != "" and v.isprintable() and len(v) <= 1000
            and all(len(part.encode()) <= 200 for part in v.split("/")), what)


ASCENDING = (lambda v: len(v) <= 64 and all(0 <= e <= MOST_EPOCHS for e in v) and v == sorted(v),
             f"at most 64 epochs in ascending order, from 0 to {MOST_EPOCHS}")

# Every key of a configuration: its type and the values it may take. config/default.yaml says what each one means.
# The upper bounds are far beyond what is of use, and below what a computer cannot do at all.
SETTINGS = {
    "data": {
        "path": (str, name_of("a folder")),
        "cameras": (str, name_of("a file in the scene's folder")),
        "downscale": (int, between(1, 1000)),
        "held_out_views": ([int], (lambda v: all(0 <= i < MOST_VIEWS for i in v), "indices of views, from 0")),
    },
    "network": {
        "width": (int, between(64, 4096)),
        "feature": (int, between(1, 1024)),
        "layers": (int, between(2, 64)),
        "radius": (float, (lambda v: 0 < v < 1, "between 0 and 1")),
        "without": ([str], (lambda v: set(v) <= {"normal", "view", "feature"}, "any of normal, view and feature")),
    },
    "tracer": {
        "sphere_tracing_steps": (int, between(0, 1000)),
        "tolerance": (float, above_zero(1)),
        "samples": (int, between(2, 1000)),
        "refinement": (str, (lambda v: v in ("secant", "bisection"), "secant or bisection")),
        "refinement_steps": (int, between(0, 100)),
    },
    "train": {
        "epochs": (int, between(1, MOST_EPOCHS)),
        "rays": (int, between(2, 65536)),
        "outline_rays": (float, (lambda v: 0 <= v < 1, "0 or more and less than 1")),
        "learning_rate": (float, above_zero(100)),
        "learning_rate_halved_after": ([int], ASCENDING),
        "camera_learning_rate": (float, between(0, 100)),
        "alpha": (float, above_zero(1000000)),
        "alpha_doubled_after": ([int], ASCENDING),
        "mask_weight": (float, between(0, 1000000)),
        "eikonal_weight": (float, between(0, 1000000)),
        "seed": (int, between(0, 2 ** 32 - 1)),
        "save_every": (int, between(1, MOST_EPOCHS)),
        "validate_every": (int, between(1, MOST_EPOCHS)),
        "validation_view": (int, between(0, MOST_VIEWS - 1)),
        "validation_downscale": (int, between(1, 1000)),
    },
    "extract": {
        "coarse_resolution": (int, between(16, 512)),
        "resolution": (int, between(16, 1024)),
    },
}

# What numbers that are each allowed may come to when multiplied: as many weights, samples or activations, about.
MOST_TOGETHER = ((("network.width", "network.width", "network.layers"), 64 * 10 ** 6),
                 (("train.rays", "tracer.samples"), 16 * 10 ** 6),
                 (("train.rays", "network.width", "network.layers"), 500 * 10 ** 6))

# What the keys that a file may leave out are then.
OPTIONAL = {"data": {"cameras": "cameras.npz"}, "network": {"without": []},
            "train": {"outline_rays": 0.0, "camera_learning_rate": 0.0}}


class Shortened(reprlib.Repr):
    """repr for an error's one line: whatever a file holds, it says it in few letters."""

    def repr_int(self, x, level):
        return super().repr_int(x, level) if abs(x) < 10 ** 40 else "a number of more than 40 digits"


SHORT = Shortened()
SHORT.maxlevel = 2


class ConfigLoader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as in YAML 1.2 (YAML 1.1 wants 1.0e-4 and calls the short form a text), and
    in which a key given twice is an error, and an alias too: a few lines of them spell out a text without end."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(problem="a configuration has no aliases; write out what * stands for",
                                              problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(problem=f"the key {SHORT.repr(key)} is given twice",
                                                        problem_mark=key_node.start_mark)
            if isinstance(key, Hashable):       # SafeLoader refuses others
                seen.add(key)
        return super().construct_mapping(node, deep)


ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
                                   list("-+0123456789"))


def load_config(path):
    """Read a configuration file into nested namespaces: `conf.train.rays`.

    Raises UserError, naming the file and the key, for a file that cannot be read, a key that is unknown, missing, of
    the wrong type or out of range.
    """
    check_is_file(path)
    try:
        with open(str(path), "rb") as file:
            content = file.read(MOST_TEXT + 1)
        if len(content) > MOST_TEXT:
            raise UserError(f"{path}: has more than {MOST_TEXT} bytes, so it is no configuration")
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{path}: cannot read the configuration ({reason})") from error
    try:
        tree = yaml.load(text, Loader=ConfigLoader)
    except Exception as error:      # where a tag and its text do not fit, PyYAML raises nearly anything
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = (getattr(error, "problem", None) or "cannot be parsed")[:200]
        raise UserError(f"{path}{where}: not valid YAML ({problem})") from error
    sections = check_keys(path, "", tree, SETTINGS)
    for section, settings in SETTINGS.items():
        values = check_keys(path, section, tree[section], settings, OPTIONAL.get(section, {}))
        for key, (kind, (allowed, says)) in settings.items():
            values[key] = check_value(f"{path}: {section}.{key}", values[key], kind, allowed, says)
        sections[section] = values
    check_products(path, flat(sections))
    return SimpleNamespace(**{section: SimpleNamespace(**values) for section, values in sections.items()})


def check_keys(path, section, found, wanted, optional={}):
    """Return `found` as a dict if it has just the keys `wanted`, those of `optional` {key: value} filled in; raise
    UserError naming the first that differs."""
    prefix = section + "." if section else ""
    if not isinstance(found, dict):
        raise UserError(f"{path}: {section or 'the file'} must be a mapping with the keys {', '.join(wanted)}")
    for key in found:
        if key not in wanted:
            plain = isinstance(key, str) and key.isidentifier() and len(key) <= 80
            named = f"{prefix}{key}" if plain else SHORT.repr(key)
            raise UserError(f"{path}: unknown key {named}; the keys here are {', '.join(wanted)}")
    for key in wanted:
        if key not in found and key not in optional:
            raise UserError(f"{path}: the key {prefix}{key} is missing; see config/default.yaml")
    return {**optional, **found}


def check_value(where, value, kind, allowed, says):
    """Return `value` as `kind` (int, float, str, or [int] or [str] for a list); raise UserError otherwise."""
    names = {int: "a whole number", float: "a number", str: "a text"}
    if isinstance(kind, list):
        fits = isinstance(value, list) and all(type(v) is kind[0] for v in value)
        name = "a list of " + ("whole numbers" if kind[0] is int else "texts")
    elif kind is float:
        fits, name = type(value) in (int, float) and abs(value) < 1e300, names[kind]    # not infinite, not NaN
    else:
        fits, name = type(value) is kind, names[kind]
    if not fits:
        raise UserError(f"{where} must be {name}, not {SHORT.repr(value)}")
    value = float(value) if kind is float else value
    if not allowed(value):
        raise UserError(f"{where} must be {says}, not {SHORT.repr(value)}")
    return value


def check_products(where, values):
    """Raise UserError where numbers of {"section.key": value} are together more than MOST_TOGETHER allows.

    A product of which a key is not in `values` is left out.
    """
    for keys, most in MOST_TOGETHER:
        product = math.prod(values[key] for key in keys) if values.keys() >= set(keys) else 0
        if product > most:
            raise UserError(f"{where}: {' * '.join(keys)} must be at most {most:,}, not {product:,}; lower one of them")


def settings(conf):
    """Return a configuration as {"section.key": value}."""
    return flat({section: vars(keys) for section, keys in vars(conf).items()})


def flat(sections):
    """Return {section: {key: value}} as {"section.key": value}."""
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


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


def set_context(context, device_id):
    """Make `context` ("auto", "cpu" or "cudnn") nnabla's default and return its name, "cpu" or "cudnn".

    Raises UserError where the GPU is asked for and not there.
    """
    import nnabla as nn
    from nnabla.ext_utils import get_extension_context
    from nnabla.logger import logger
    logger.setLevel("WARNING")      # it would tell of every file saved, in the midst of the progress bar
    chosen, why = "cpu", ""
    if context != "cpu":
        chosen, why = gpu_or_reason(device_id)
        if context == "cudnn" and chosen == "cpu":
            raise UserError(f"--context cudnn: {why}; use --context cpu or mend that")
    nn.set_default_context(get_extension_context(chosen, device_id=str(device_id)))
    print(f"computing on {'GPU ' + str(device_id) if chosen == 'cudnn' else 'the CPU'}" + (f": {why}" if why else ""))
    return chosen


def gpu_or_reason(device_id):
    """Return ("cudnn", "") where nnabla can use that GPU, else ("cpu", one line that says why not)."""
    why = driver_complaint()
    if why:
        return "cpu", why
    load_cuda_libraries()
    try:
        import nnabla_ext.cudnn
    except ModuleNotFoundError:
        return "cpu", "nnabla's CUDA extension is not installed (requirements-gpu.txt names it)"
    except Exception as error:      # a library that is missing, a GPU that the extension calls unfit, ...
        return "cpu", f"nnabla's CUDA extension does not load: {str(error).splitlines()[0]} (see README.md)"
    try:
        count = nnabla_ext.cudnn.get_device_count()
        if not str(device_id).isdigit() or int(device_id) >= count:
            return "cpu", f"there is no CUDA device {device_id} (found {count})"
        nnabla_ext.cudnn.context(str(device_id))    # it asks another of the driver's libraries for the GPU's name
    except Exception as error:  # the extension raises what CUDA says, in a class of its own
        return "cpu", f"no usable CUDA device: {str(error).splitlines()[-1].rstrip('.')}"
    return "cudnn", ""


def driver_complaint():
    """Return what keeps the NVIDIA driver from offering a GPU, in one line, or "" where it offers one.

    The driver is asked first: without it, or without a device, nnabla's CUDA extension tells of several failures.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver, libcuda.so.1 (install it; in Docker, run with --gpus all)"
    status, said = driver.cuInit(0), ctypes.c_char_p()
    if status == 0:
        return ""
    driver.cuGetErrorString(status, ctypes.byref(said))
    reason = (said.value or b"error %d" % status).decode()
    return f"the NVIDIA driver offers no GPU: {reason} (see nvidia-smi and CUDA_VISIBLE_DEVICES)"


# What nnabla-ext-cuda120 links to, and what that needs in turn, each after what it needs itself.
CUDA_LIBRARIES = ("libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12", "libnvJitLink.so.12", "libcusparse.so.12",
                  "libcusolver.so.11", "libcurand.so.10", "libcufft.so.11", "libcudnn.so.8")


def load_cuda_libraries():
    """Load CUDA 12's libraries from the nvidia-*-cu12 packages, where they are installed.

    The linker does not look there, but it takes a library of the right name that is loaded already; so the user need
    not set LD_LIBRARY_PATH. What is in no package (CUDA's own installation, the Docker image) is left to the linker.
    """
    for name in CUDA_LIBRARIES:
        found = [path for folder in sys.path for path in Path(folder).glob(f"nvidia/*/lib/{name}")]
        with contextlib.suppress(OSError):      # the extension's import says what is missing
            if found:
                ctypes.CDLL(str(found[0]), ctypes.RTLD_GLOBAL)


def run_folder(conf, monitor_path):
    """Return the folder of a run, `{monitor_path}_{scan}`, where scan is the name of the scene's folder."""
    return Path(f"{monitor_path}_{Path(os.path.abspath(conf.data.path)).name}")


def new_run_folder(conf, monitor_path):
    """Make the folder of a new run and return it; an earlier run of that name is kept, under a name with a number."""
    folder = run_folder(conf, monitor_path)
    try:
        if folder.exists():
            number = 1
            while Path(f"{folder}.{number}").exists():
                number += 1
            with held(folder):
                folder.rename(f"{folder}.{number}")
            print(f"{folder} held an earlier run; it is now {folder}.{number}")
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --monitor-path")
    return folder


def copy_config(path, folder):
    """Copy a configuration file into the run's folder under its own name (unless it is that very file)."""
    target = Path(folder) / Path(path).name
    if not (target.exists() and target.samefile(path)):
        write_bytes(target, Path(path).read_bytes())


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
    """Return the unit vector (3,) that is up in a scene: the mean of its cameras' upward axes.

    poses: (N, 4, 4), camera to world, y down. Where the cameras disagree so much that there is none, the first one's.
    """
    up = -poses[:, :3, 1].mean(axis=0)
    length = np.linalg.norm(up)
    return up / length if length > 1e-3 else -poses[0, :3, 1]


# --- randomness -------------------------------------------------------------------------------------------------------

ORDER, PIXELS, SAMPLES = 1, 2, 3    # of the views in an epoch; of a step; of a step's tracing and its eikonal loss


def random_numbers(seed, purpose, number):
    """Return a numpy Generator that is a function of the seed, what it is for and the number of its epoch or step.

    Nothing of it is carried from step to step, so a run can be taken up at any.
    """
    return np.random.default_rng([seed, purpose, number])
