"""Load scenes from disk, and draw batches of rays and pixels from them.

A scene is a folder in the format of IDR's authors. `image/` and `mask/` each hold one picture per view, paired by
sorted name. `cameras.npz` holds two matrices (4, 4) for each view i: the first three rows of `world_mat_i` are the
projection K [R | t] to pixels (x right, y down, z into the scene), and `scale_mat_i` maps the unit sphere to the
object's region of the world. In memory, everything is in the coordinates of that unit sphere, and pixel centres are at
integers (u, v).
"""
import contextlib
import hashlib
import io
import itertools
import math
import os
import sys
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
from tqdm import tqdm

from files import folders, picture_store, pictures
from files.picture_store import PictureStore, Region
from helper import (
    ORDER,
    PIXELS,
    UserError,
    check_is_file,
    decompose_projection,
    pixel_directions,
    pixel_rays,
    random_numbers,
    ray_matrices,
)
from tracing.compiling import compiled

SUFFIXES = (".png", ".jpg", ".jpeg")                            # of a scene's pictures
PHOTOGRAPHS = SUFFIXES + (".tif", ".tiff", ".webp", ".bmp", ".heic", ".heif")   # of photographs to make a scene from
OUTLINE_BAND = 1 / 40       # pixels this near to the mask's outline count as outline; in units of the shorter side
OBJECT_SHARE = 3 / 4        # share of the rays away from the outline that are drawn on the object
IN_MEMORY = 1 << 30         # bytes of a scene's pictures, 4 per pixel; more are kept in a file
MOST_CAMERAS = 1 << 24      # maximum bytes of a cameras.npz; 1,000 views by IDR's authors take 3 million
LARGEST_MATRIX = 4096       # maximum bytes of one of its entries, unpacked

FilePath = Union[str, Path]


class Scene(NamedTuple):
    images: np.ndarray      # (N, H, W, 3) uint8
    masks: np.ndarray       # (N, H, W) bool, True on the object
    intrinsics: np.ndarray  # (N, 3, 3) float64, pixels
    poses: np.ndarray       # (N, 4, 4) float64, camera to the unit sphere's coordinates
    scale_mat: np.ndarray   # (4, 4) float64, of the first view: the unit sphere's coordinates to the world's
    names: List[str]        # N file names of the images, without suffix
    store: Optional[PictureStore] = None    # where images and masks are, if they are too large for the memory


# --- loading ----------------------------------------------------------------------------------------------------------

def load_scene(path: FilePath, downscale: int = 1, cameras: str = "cameras.npz") -> Scene:
    """Load the scene in the folder `path`, shrunk by the whole factor `downscale`, as a Scene of N views.

    cameras: the name of the cameras' file in that folder.
    The pictures of a large scene are not held in memory, but in a file beside them, as files/picture_store.py says.
    Images are area-averaged, a mask's pixel is set if more than half of its area was, and the intrinsics are adapted
    exactly. Rows at the bottom and columns at the right that do not fill a pixel are cut off.
    Raises UserError if a file or folder is missing, unreadable or does not match the others, a camera is invalid, a
    mask is empty, or the factor leaves nothing of the images.
    """
    image_files, mask_files = scene_files(Path(path))
    intrinsics, poses, scale_mat = load_cameras(Path(path) / cameras, len(image_files))
    images, masks, store = load_pictures(Pictures(image_files, mask_files, downscale))
    intrinsics = shrink_intrinsics(intrinsics, downscale)
    return Scene(images, masks, intrinsics, poses, scale_mat, [file.stem for file in image_files], store)


def scene_files(path: Path) -> Tuple[List[Path], List[Path]]:
    """Return a scene's image files and mask files, in the order of the views; list ignored files on stderr.

    Raises UserError if a folder is missing or empty, or if the two hold different numbers of pictures.
    """
    if not os.path.isdir(str(path)):
        raise UserError(f"{path}: no such folder; a scene is a folder with image/, mask/ and cameras.npz")
    image_files, other_images = scene_pictures(path, "image")
    mask_files, other_masks = scene_pictures(path, "mask")
    if other_images + other_masks:
        names = [f"{file.parent.name}/{file.name}" for file in other_images + other_masks]
        print(f"notice: {path}: ignored {pictures.listed(names)} (not {', '.join(SUFFIXES)})", file=sys.stderr)
    for folder, files in ((path / "image", image_files), (path / "mask", mask_files)):
        if not files:
            raise UserError(f"{folder}: no images here; put one per view, as {', '.join(SUFFIXES)}; convert other "
                            "formats")
    if len(image_files) != len(mask_files):
        raise UserError(f"{path}: {len(image_files)} files in image/ but {len(mask_files)} in mask/; "
                        "each image needs one mask, paired by sorted name")
    return image_files, mask_files


def scene_pictures(path: Path, name: str) -> Tuple[List[Path], List[Path]]:
    """Return the pictures and the other files in the folder `name` of the scene `path`, as picture_files does.

    Raises UserError if the folder is missing.
    """
    if not os.path.isdir(str(path / name)):
        near = [folder for folder in neighbours(path) if os.path.isdir(str(folder / name))]
        hint = f"; {near[0]} is such a folder" if near else ""
        raise UserError(f"{path / name}: no such folder; a scene holds image/, mask/ and cameras.npz{hint}")
    return picture_files(path / name)


def neighbours(folder: Path) -> List[Path]:
    """Return the parent and the subfolders of `folder`, where a missing scene may be."""
    path = Path(os.path.abspath(str(folder)))
    try:
        inner = sorted(Path(entry.path) for entry in os.scandir(str(path)) if entry.is_dir())
    except OSError:
        inner = []
    return [path.parent, *inner]


def picture_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> Tuple[List[Path], List[Path]]:
    """Return the pictures in a folder and everything else in it, each sorted by name.

    Raises UserError if the folder is missing or cannot be listed.
    """
    if not os.path.isdir(str(folder)):
        raise UserError(f"{folder}: no such folder")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error
    # A hidden file is no picture, whatever its suffix: macOS keeps a "._name.jpg" beside a name.jpg.
    def is_picture(entry):
        return entry.suffix.lower() in suffixes and not entry.name.startswith(".") and not os.path.isdir(str(entry))

    found, others = [], []
    for entry in entries:
        (found if is_picture(entry) else others).append(entry)
    return found, others


class Pictures(NamedTuple):
    """The files of a scene's pictures, and by how much they are shrunk."""
    images: List[Path]
    masks: List[Path]
    downscale: int

    def key(self) -> str:
        """Return what tells these pictures from others, or from what they were before a change."""
        known = []
        for file in self.images + self.masks:
            with contextlib.suppress(OSError):      # whoever reads it says what is wrong
                status = os.stat(str(file))
                known.append([file.parent.name, file.name, status.st_size, status.st_mtime_ns])
        return hashlib.sha256(repr(known).encode()).hexdigest()


def load_pictures(files: Pictures) -> Tuple[np.ndarray, np.ndarray, Optional[PictureStore]]:
    """Return images (N, H, W, 3) uint8 and masks (N, H, W) bool, shrunk; those of a large scene are in a store."""
    path, key = files.images[0].parent.parent / f"pictures_{files.downscale}.cache", files.key()
    store = picture_store.open_store(path, key, len(files.images))
    if store is None:
        width, height = pictures.picture_size(files.images[0])
        needed = 4 * len(files.images) * width * height // files.downscale ** 2
        if needed <= IN_MEMORY or not fits(path, needed):
            return (*pictures_in_memory(files), None)
        with picture_store.alone(path.parent):      # others of the same training wait, and then find it
            store = picture_store.open_store(path, key, len(files.images)) or build_store(path, key, files)
    return store.images, store.masks, store


def fits(path: Path, needed: int) -> bool:
    """Return whether `needed` bytes of pictures fit at `path`. If not, tell so if memory has room, else UserError."""
    why, size = picture_store.why_not(path, needed), f"{needed / 1e9:.1f} GB"
    if why and needed * 1.25 > picture_store.free_memory():
        raise UserError(f"{path}: the pictures take {size}, too many for the memory, and the disk {why}; free some "
                        "space, put a folder with links to image/, mask/ and the cameras on another disk, or raise "
                        "data.downscale")
    if why:
        print(f"notice: {path}: the disk {why}, so the pictures are held in memory, {size}", file=sys.stderr)
    return not why


def build_store(path: Path, key: str, files: Pictures) -> PictureStore:
    """Decode all pictures into a new store at `path`."""
    folders.remove_unfinished(path.parent)
    size, doubtful = read_view(files, 0).size, []

    def read(view):
        loaded = read_view(files, view, size)
        doubtful.extend(loaded.doubtful)
        return picture_store.View(loaded.image, loaded.mask, mask_regions(loaded.mask))

    count, height, width = len(files.images), size[0] // files.downscale, size[1] // files.downscale
    print(f"preparing {path} ({4e-9 * count * height * width:.1f} GB), so that the pictures are decoded only once; it "
          "may be removed at any time")
    store = picture_store.build(path, key, (count, height, width), read, picture_store.num_workers(math.prod(size)))
    pictures.say_doubtful(sorted(doubtful))
    return store


def pictures_in_memory(files: Pictures) -> Tuple[np.ndarray, np.ndarray]:
    """Return images (N, H, W, 3) uint8 and masks (N, H, W) bool, read and shrunk one by one to save memory."""
    count, size, doubtful = len(files.images), None, []
    hidden = None if count >= 10 else True  # None: tqdm is hidden unless stderr is a terminal
    for view in tqdm(range(count), desc="loading images", unit="view", leave=False, disable=hidden):
        loaded = read_view(files, view, size)
        doubtful += loaded.doubtful
        if size is None:
            size, shrunk = loaded.size, (count, *loaded.mask.shape)
            images, masks = np.empty(shrunk + (3,), np.uint8), np.empty(shrunk, bool)
        images[view], masks[view] = loaded.image, loaded.mask
    pictures.say_doubtful(doubtful)
    return images, masks


class LoadedView(NamedTuple):
    """The pictures of a view."""
    image: np.ndarray           # (H, W, 3) uint8, shrunk
    mask: np.ndarray            # (H, W) bool, shrunk
    size: Tuple[int, int]       # height and width before
    doubtful: List[Path]        # the files of which the orientation is in doubt


def read_view(files: Pictures, view: int, size: Optional[Tuple[int, int]] = None) -> LoadedView:
    """Read the pictures of a view.

    size: height and width of the scene's first image, which this one must have; None for the first one.
    Raises UserError.
    """
    image_file, mask_file, factor = files.images[view], files.masks[view], files.downscale
    image, mask, doubtful = pictures.read_pair(image_file, mask_file)
    if size is None:
        size = image.shape[:2]
        check_downscale(size, factor, image_file)
    check_one_size(image_file, image.shape[:2], files.images[0], size)
    check_mask_size(mask_file, mask.shape, image_file, size)
    small_mask = shrink_mask(mask, factor)
    if not small_mask.any():
        raise UserError(f"{mask_file}: the mask of view {view} is empty"
                        + (f" at a downscale of {factor}" if mask.any() else "")
                        + "; the object must be white, more than half of 255")
    return LoadedView(shrink_image(image, factor), small_mask, size, doubtful)


def check_one_size(image_file: Path, size: Tuple[int, int], first_file: Path, first_size: Tuple[int, int]) -> None:
    """Raise UserError if an image's size (H, W) differs from that of the scene's first image."""
    if size != first_size:
        raise UserError(f"{image_file}: {says_size(size)}, but {first_file.name} is {says_size(first_size)}; all views "
                        "must have one size")


def check_mask_size(mask_file: Path, mask_size: Tuple[int, int], image_file: Path, size: Tuple[int, int]) -> None:
    """Raise UserError if a mask's size (H, W) differs from that of its image."""
    if mask_size != size:
        raise UserError(f"{mask_file}: {says_size(mask_size)}, but its image {image_file.name} is {says_size(size)}; a "
                        "mask has its image's size")


def says_size(size: Sequence[int]) -> str:
    """Return an array's shape (H, W, ...) in words, such as "1600x1200 pixels"."""
    return f"{size[1]}x{size[0]} pixels"


# --- cameras ----------------------------------------------------------------------------------------------------------

def load_cameras(path: Path, count: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the cameras of `count` views from a cameras.npz.

    Returns intrinsics (N, 3, 3), poses (N, 4, 4) and the first view's scale matrix (4, 4), all float64.
    Raises UserError if the file is not an .npz of numbers or has more cameras than views, if a matrix is missing, not
    finite or of the wrong shape, and if a camera is singular or has the unit sphere behind it.
    """
    matrices = read_matrices(path, count)
    intrinsics, poses = np.empty((count, 3, 3)), np.empty((count, 4, 4))
    for view in range(count):
        intrinsics[view], poses[view] = view_camera(path, matrices, view)
        with np.errstate(all="ignore"):     # what is not finite counts as behind
            # If the sphere's centre is 1 or more behind the camera, along its axis, no ray meets the sphere.
            behind = not poses[view, :3, 2] @ poses[view, :3, 3] <= 1.0
        if behind:
            raise UserError(f"{path}: the camera of view {view} (world_mat_{view} @ scale_mat_{view}) has the unit "
                            "sphere behind it; z must point into the scene, and scale_mat map the unit sphere to the "
                            "object")
    return intrinsics, poses, matrices["scale_mat_0"]


def view_camera(path: Path, matrices: Dict[str, np.ndarray], view: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return the intrinsics (3, 3) and the pose (4, 4) of a view; path, matrices: a cameras.npz, as read_matrices does.

    Raises UserError if the product of its two matrices is no camera.
    """
    with np.errstate(all="ignore"):     # an overflow is refused as not finite
        projection = matrices[f"world_mat_{view}"] @ matrices[f"scale_mat_{view}"]
    try:
        return decompose_projection(projection)
    except ValueError as error:
        raise UserError(f"{path}: the camera of view {view} cannot be used: {error}; mend world_mat_{view} and "
                        f"scale_mat_{view}") from error


def load_scene_cameras(path: FilePath, cameras: str = "cameras.npz") -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read only the cameras of the scene in the folder `path`; returns what load_cameras does."""
    return load_cameras(Path(path) / cameras, len(scene_files(Path(path))[0]))


def read_matrices(path: Path, count: int, kinds: Sequence[str] = ("world", "scale")) -> Dict[str, np.ndarray]:
    """Return {"world_mat_0": (4, 4) float64, ...} from a cameras.npz of exactly `count` cameras.

    kinds: the matrices of each camera, of "world" and "scale". Raises UserError as load_cameras does.
    """
    keys = [f"{kind}_mat_{view}" for view in range(count) for kind in kinds]
    check_is_file(path, f"a scene holds image/, mask/ and {path.name}")
    if path.stat().st_size > MOST_CAMERAS:
        raise UserError(f"{path}: has more than {MOST_CAMERAS} bytes; keep only world_mat_* and scale_mat_* in it")
    try:
        with zipfile.ZipFile(str(path)) as file:
            entries = {info.filename[:-4] if info.filename.endswith(".npy") else info.filename: info
                       for info in file.infolist()}
            found = {key: stored_matrix(file, entries[key]) for key in keys if key in entries}
    except Exception as error:  # zipfile, zlib and NumPy raise exceptions of their own
        raise UserError(f"{path}: not a readable .npz of numbers; write it with numpy.savez") from error
    for key in keys:
        if key not in found:
            raise UserError(f"{path}: the key {key} is missing; each of the {count} views in image/ has one")
        if not isinstance(found[key], np.ndarray):
            raise UserError(f"{path}: {key} is {found[key][:200]}; it must be numbers of shape (4, 4)")
        if not np.isfinite(found[key]).all():
            raise UserError(f"{path}: {key} has values that are not finite; mend this matrix")
    if f"world_mat_{count}" in entries:
        raise UserError(f"{path}: has more cameras than the {count} views in image/; camera i is that of the "
                        "i-th image by sorted name, so restore the missing images or renumber the cameras")
    return {key: matrix.astype(np.float64) for key, matrix in found.items()}


def stored_matrix(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Union[np.ndarray, str]:
    """Return the (4, 4) array of numbers in an entry of an open .npz, or a description of what is there instead.

    Unpacks no more than LARGEST_MATRIX bytes, whatever size the entry claims. Raises an exception of some kind if the
    entry is damaged.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):    # others may unpack to any size at once
        raise ValueError
    with file.open(info) as entry:
        content = io.BytesIO(entry.read(LARGEST_MATRIX))
    if content.getvalue()[:6] != np.lib.format.MAGIC_PREFIX:
        return "no array"
    version = np.lib.format.read_magic(content)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = read_header(content)
    if shape != (4, 4) or dtype.kind not in "fiu":
        return f"{dtype} of shape {shape}"
    content.seek(0)
    return np.lib.format.read_array(content, allow_pickle=False)


# --- shrinking --------------------------------------------------------------------------------------------------------

def check_downscale(shape: Sequence[int], factor: int, source: FilePath) -> None:
    """Raise UserError if shrinking images (H, W, ...) by `factor` leaves no pixel; `source` is named in the message."""
    if min(shape[:2]) < factor:
        raise UserError(f"{source}: a downscale of {factor} leaves nothing of {says_size(shape)}; "
                        f"choose {min(shape[:2])} or less")


def shrink_image(image: np.ndarray, factor: int) -> np.ndarray:
    """Return an image (H, W, 3) uint8 area-averaged by a whole factor, (H // factor, W // factor, 3) uint8."""
    if factor == 1:
        return image
    height, width = image.shape[0] // factor, image.shape[1] // factor
    cut = np.ascontiguousarray(image[:height * factor, :width * factor])
    return cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA)


def shrink_mask(mask: np.ndarray, factor: int) -> np.ndarray:
    """Return a mask (H, W) bool shrunk by a whole factor; a pixel is set if more than half of its area was."""
    if factor == 1:
        return mask
    height, width = mask.shape[0] // factor, mask.shape[1] // factor
    blocks = mask[:height * factor, :width * factor].reshape(height, factor, width, factor)
    return 2 * blocks.sum(axis=(1, 3)) > factor * factor


def shrink_intrinsics(intrinsics: np.ndarray, factor: float) -> np.ndarray:
    """Return the intrinsics (..., 3, 3) for images shrunk by `factor`: u' = (u - (factor - 1) / 2) / factor, v alike.

    The shift arises because the centre of a shrunk pixel is the mean of the centres that it covers.
    """
    shift = (1.0 - factor) / (2.0 * factor)
    return np.array([[1.0 / factor, 0.0, shift], [0.0, 1.0 / factor, shift], [0.0, 0.0, 1.0]]) @ intrinsics


# --- choosing views ---------------------------------------------------------------------------------------------------

def check_views(views: Iterable[int], count: int, source: str) -> None:
    """Raise UserError unless all `views` are indices of `count` views; `source` is named in the message."""
    for view in views:
        if not 0 <= view < count:
            raise UserError(f"{source}: there is no view {view}; the scene's views are 0 to {count - 1}")


def training_views(held_out: Sequence[int], count: int, source: str) -> List[int]:
    """Return the indices of `count` views without those held out; raise UserError if none is left."""
    check_views(held_out, count, source)
    views = [view for view in range(count) if view not in held_out]
    if not views:
        raise UserError(f"{source}: all {count} views are held out; leave at least one to train on")
    return views


def chosen_views(words: Sequence[Union[str, int]], count: int, source: str) -> List[int]:
    """Return the indices of the views that a command line names: "all", "0 8" or "0,8".

    Raises UserError, naming `source`, for anything else and for a view that does not exist.
    """
    words = ",".join(str(word) for word in words).split(",")
    if words == ["all"]:
        return list(range(count))
    for word in words:
        if not (word.isascii() and word.isdigit()):
            raise UserError(f"{source}: {word!r} is no view; give indices from 0, such as 0 8 16, or all")
    views = [int(word) for word in words]
    check_views(views, count, source)
    return views


def spread_views(poses: np.ndarray, first: int, count: int) -> List[int]:
    """Choose `count` views far apart, or all if there are fewer, starting with `first`.

    Each further view is the one whose camera is farthest, in angle from the origin, from the cameras chosen so far.
    poses: (N, 4, 4), camera to world.
    """
    sides = poses[:, :3, 3] / np.linalg.norm(poses[:, :3, 3], axis=1, keepdims=True)
    chosen = [first]
    while len(chosen) < min(count, len(poses)):
        nearness = (sides @ sides[chosen].T).max(axis=1)
        nearness[chosen] = np.inf
        chosen.append(int(nearness.argmin()))
    return chosen


# --- rays and pixels --------------------------------------------------------------------------------------------------

def view_rays(scene: Scene, view: int, uv: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the rays through the pixels `uv` of a view, with the pixels' colours and mask.

    uv: (N, 2), column and row, whole numbers.
    Returns origin (3,), unit directions (N, 3) and rgb (N, 3) in [-1, 1], all float32, and mask (N,) bool.
    """
    origin, directions = pixel_rays(uv, scene.intrinsics[view], scene.poses[view])
    return (origin, directions, *colors_and_mask(scene, view, uv))


def colors_and_mask(scene: Scene, view: Union[int, np.ndarray], uv: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return rgb (N, 3) float32 in [-1, 1] and mask (N,) bool at the pixels `uv` (N, 2) of a view, or of each its own.

    view: an index, or indices (N,).
    """
    u, v = np.asarray(uv).astype(np.int64).T
    return scene.images[view, v, u].astype(np.float32) / 127.5 - 1.0, scene.masks[view, v, u]


class Batch(NamedTuple):
    """R random rays of one or more views."""
    views: np.ndarray       # (V,) int64, in the order of their rays; one may come twice
    origins: np.ndarray     # (R, 3) float32
    directions: np.ndarray  # (R, 3) float32, unit length
    rgb: np.ndarray         # (R, 3) float32 in [-1, 1]
    mask: np.ndarray        # (R,) bool, True on the object
    weights: np.ndarray     # (R,) float32, of the rays in the losses; 1 on average

    def parts(self) -> Iterator[Tuple[int, slice]]:
        """Yield each view and the slice of its rays."""
        ends = ray_ends(len(self.directions), len(self.views))
        for view, start, end in zip(self.views, [0, *ends], ends):
            yield int(view), slice(start, end)


class Draw(NamedTuple):
    """How the rays of a batch are drawn."""
    num_rays: int
    seed: int = 0
    outline_fraction: float = 0.0   # fraction of the rays near the mask's outline, in [0, 1)
    views_per_step: int = 1


class Process(NamedTuple):
    """One of the processes that train together; a parallel.World serves as well."""
    rank: int = 0
    size: int = 1


def epoch_steps(num_views: int, views_per_step: int) -> int:
    """Return the number of steps in an epoch, in which every view is due once; views_per_step: of all processes."""
    return -(-num_views // views_per_step)


def ray_ends(num_rays: int, num_views: int) -> List[int]:
    """Divide the rays of a step among its views as evenly as can be; return where those of each view end."""
    return [(number + 1) * num_rays // num_views for number in range(num_views)]


def step_views(views: Sequence[int], draw: Draw, step: int, process: Process) -> np.ndarray:
    """Return the views (views_per_step,) int64 that a step of a process takes.

    All views stand in one endless row: every one of `views` once in a random order, then once in a new one, and so on.
    Steps, and in them the processes, take one piece after the other. So after any step every view was taken as often as
    any other, give or take once, also where the views of a step do not divide their number.
    """
    first = (step * process.size + process.rank) * draw.views_per_step
    turns, places = np.divmod(np.arange(first, first + draw.views_per_step), len(views))
    views, places = tuple(views), places.tolist()
    return np.array([view_order(views, draw.seed, turn)[place] for turn, place in zip(turns.tolist(), places)])


@lru_cache(maxsize=4)
def view_order(views: Tuple[int, ...], seed: int, turn: int) -> List[int]:
    """Return all views in the random order of a turn."""
    return random_numbers(seed, ORDER, turn).permutation(views).tolist()


def training_batches(scene: Scene, views: Sequence[int], draw: Draw, first_step: int = 0,
                     process: Optional[Process] = None) -> Iterator[Batch]:
    """Yield Batches without end, from that of first_step on: random pixels of views_per_step views.

    step_views chooses the views, and ray_ends divides the rays among them. Pixels are uniform over the image, on the
    object or not, and distinct unless the image has too few. With an outline_fraction, Strata draw them.
    process: None for a single one; of several, each gets batches of its own.
    A batch is a function of the seed, the step, the rank and the size.
    """
    steps = drawn_pixels(scene, views, draw, first_step, process or Process())
    width, ahead = scene.masks.shape[2], next(steps)
    matrices, centres = ray_matrices(scene.intrinsics, scene.poses), scene.poses[:, :3, 3].astype(np.float32)
    counts = np.diff([0, *ray_ends(draw.num_rays, draw.views_per_step)])
    while True:
        (drawn, pixels, weights), ahead = ahead, next(steps)        # one step ahead, so that a disk has time to read
        view, uv = np.repeat(drawn, counts), np.stack(np.divmod(pixels, width)[::-1], axis=1)
        yield Batch(drawn, centres[view], pixel_directions(uv, matrices[view]), *colors_and_mask(scene, view, uv),
                    weights)


class Strata(NamedTuple):
    """How the rays of a view are shared among the three regions of its mask. Arrays, as Numba takes many us for objects
    in objects."""
    starts: np.ndarray      # (K,) int32, of the regions' runs, one after the other
    before: np.ndarray      # (K + 3,) int32
    first: np.ndarray       # (4,) int64, each region's first run in `starts`, and K
    ends: np.ndarray        # (3,) float64, the share of the rays in the first region, in the first two, and in all
    weights: np.ndarray     # (3,) float32, of a ray in each

    @classmethod
    def of(cls, regions: List[Region], outline_fraction: float) -> "Strata":
        """Share the rays: outline_fraction of them near the outline, and OBJECT_SHARE of the rest on the object.

        The weights keep the expected loss that of uniform pixels, while its variance falls at the pixels that decide
        the shape. regions: the result of mask_regions.
        """
        sizes = np.array([region.size for region in regions])
        shares = np.array([outline_fraction, (1 - outline_fraction) * OBJECT_SHARE,
                           (1 - outline_fraction) * (1 - OBJECT_SHARE)])
        shares = np.where(sizes > 0, shares, 0.0)
        shares /= shares.sum()
        weights = np.divide(sizes / sizes.sum(), shares, out=np.zeros(3), where=shares > 0)
        starts, before = (np.concatenate(arrays) for arrays in zip(*regions))
        first = np.cumsum([0, *(len(region.starts) for region in regions)])
        return cls(starts, before, first, np.array([*np.cumsum(shares[:-1]), 1.0]), weights.astype(np.float32))


@compiled
def draw_from(starts, before, first, ends, weights, numbers, pixels, ray_weights):
    """Write random pixels of a view, flat indices (N,) int64, and their weights (N,) float32.

    starts to weights: the view's Strata; numbers: (N + 1,), uniform ones in [0, 1). The pixels are distinct unless a
    region has too few. A compiled loop, since a step asks for few pixels of each of many views.
    """
    count, drawn, shift = len(pixels), 0, numbers[0]        # rounds at random
    for k in range(3):
        last = min(int(ends[k] * count + shift), count)
        own_starts, own_before = starts[first[k]:first[k + 1]], before[first[k] + k:first[k + 1] + k + 1]
        chosen = random_subset(own_before[-1], numbers[1 + drawn:1 + last])
        for i in range(last - drawn):
            run = np.searchsorted(own_before, chosen[i], side="right") - 1
            pixels[drawn + i] = own_starts[run] + (chosen[i] - own_before[run])
            ray_weights[drawn + i] = weights[k]
        drawn = last


@compiled
def random_subset(size: int, uniform: np.ndarray) -> np.ndarray:
    """Return random whole numbers (N,) int64 below `size`, from N uniform ones in [0, 1); distinct ones if N <= size.

    Floyd's method: the i-th is below size - N + i + 1, or just that bound less 1 where it has come before. A hash table
    knows what has come.
    """
    count, places = len(uniform), 16
    while places < 2 * count:
        places *= 2
    numbers, table = np.empty(count, np.int64), np.full(places, -1)
    for i in range(count):
        last = size - 1 if count > size else size - count + i
        numbers[i] = int(uniform[i] * (last + 1))
        for number in (numbers[i], last):
            place = (number * 2654435761 >> 8) & (places - 1)
            while table[place] >= 0 and table[place] != number:
                place = (place + 1) & (places - 1)
            if table[place] < 0 and count <= size:
                table[place] = numbers[i] = number
                break
    return numbers


def drawn_pixels(scene: Scene, views: Sequence[int], draw: Draw, first_step: int,
                 process: Process) -> Iterator[Tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield for each step its views (V,) int64, and in their order the rays' flat pixel indices and weights, (R,).

    Of a scene in a store, the system begins to read them.
    """
    strata, num_pixels, ends = {}, math.prod(scene.masks.shape[1:]), ray_ends(draw.num_rays, draw.views_per_step)
    for step in itertools.count(first_step):
        rng, chosen = (random_numbers(draw.seed, PIXELS, step * process.size + process.rank),
                       step_views(views, draw, step, process))
        pixels, weights = np.empty(draw.num_rays, np.int64), np.ones(draw.num_rays, np.float32)
        numbers = rng.random(draw.num_rays + len(ends)) if draw.outline_fraction else None
        for place, (view, start, end) in enumerate(zip(chosen.tolist(), [0, *ends], ends)):
            part = pixels[start:end]
            if draw.outline_fraction:
                if view not in strata:
                    regions = scene.store.regions(view) if scene.store else mask_regions(scene.masks[view])
                    strata[view] = Strata.of(regions, draw.outline_fraction)
                draw_from(*strata[view], numbers[start + place:end + place + 1], part, weights[start:end])
            else:       # the order of the rays does not matter, so nothing is shuffled
                part[:] = rng.choice(num_pixels, end - start, replace=end - start > num_pixels, shuffle=False)
            if scene.store:
                scene.store.fetch(view, part)
        yield chosen, pixels, weights


def mask_regions(mask: np.ndarray) -> List[Region]:
    """Split the pixels of a mask (H, W) bool into three regions: near the outline, object, background.

    The outline's region reaches OUTLINE_BAND to either side of it.
    """
    near, band = np.ones(mask.shape, bool), OUTLINE_BAND * min(mask.shape)
    for side in (mask, ~mask):
        near &= cv2.distanceTransform(side.astype(np.uint8), cv2.DIST_L2, 5) <= band
    return [Region.of(region) for region in (near, mask & ~near, ~mask & ~near)]
