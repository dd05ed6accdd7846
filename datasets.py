"""Scenes on disk -> rays and pixels.

A scene is a folder in the convention of IDR's authors: `image/` and `mask/` hold one picture per view each,
paired by sorted name; `cameras.npz` holds per view i `world_mat_i` (4, 4), whose first three rows are the
projection K [R | t] to pixels (x right, y down, z into the scene), and `scale_mat_i` (4, 4), which maps the
unit sphere to the object's region of the world. Here everything is in the coordinates of that unit sphere,
and pixel centres are at integers (u, v).
"""
import io
import itertools
import os
import sys
import zipfile
from pathlib import Path
from typing import Iterator, List, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from files import pictures
from helper import ORDER, PIXELS, UserError, check_is_file, decompose_projection, pixel_rays, random_numbers

SUFFIXES = (".png", ".jpg", ".jpeg")                            # of a scene's pictures
PHOTOGRAPHS = SUFFIXES + (".tif", ".tiff", ".webp", ".bmp")     # of what a scene is made from
OUTLINE_BAND = 1 / 40       # of an image's shorter side: the pixels that count as near the outline of its mask
OBJECT_SHARE = 3 / 4        # on the object, of the rays that are not drawn near the outline
MOST_CAMERAS = 1 << 24      # bytes of a cameras.npz; 1,000 views of IDR's authors take 3 million
LARGEST_MATRIX = 4096       # bytes of an entry of it, as unpacked


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
        print(f"notice: {path}: ignored {pictures.listed(names)} (not {', '.join(SUFFIXES)})", file=sys.stderr)
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
        image, mask, doubts = pictures.read_pair(image_files[view], mask_files[view])
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
    pictures.say_doubtful(doubtful)
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
        with np.errstate(all="ignore"):     # what is not finite is refused
            try:
                projection = matrices[f"world_mat_{view}"] @ matrices[f"scale_mat_{view}"]
                intrinsics[view], poses[view] = decompose_projection(projection)
            except ValueError as error:
                raise UserError(f"{where} cannot be used: {error}; mend these two matrices") from error
            # The sphere reaches 1 beyond its centre along the camera's axis: no ray of such a camera meets it.
            behind = not poses[view, :3, 2] @ poses[view, :3, 3] <= 1.0
        if behind:
            raise UserError(f"{where} has the unit sphere behind it; z must point into the scene, and "
                            "scale_mat map the unit sphere to the object")
    return intrinsics, poses, matrices["scale_mat_0"]


def load_scene_cameras(path, cameras="cameras.npz"):
    """Read the cameras of the scene in the folder `path`, as load_cameras does, without its pictures."""
    return load_cameras(Path(path) / cameras, len(scene_files(Path(path))[0]))


def read_matrices(path, count, kinds=("world", "scale")):
    """Return {"world_mat_i" and "scale_mat_i": (4, 4) float64} of a cameras.npz with just `count` cameras."""
    keys = [f"{kind}_mat_{view}" for view in range(count) for kind in kinds]
    check_is_file(path, f"a scene holds image/, mask/ and {path.name}")
    if path.stat().st_size > MOST_CAMERAS:
        raise UserError(f"{path}: has more than {MOST_CAMERAS} bytes; leave in it only world_mat_* and scale_mat_*")
    try:
        with zipfile.ZipFile(str(path)) as file:
            entries = {info.filename[:-4] if info.filename.endswith(".npy") else info.filename: info
                       for info in file.infolist()}
            found = {key: stored_matrix(file, entries[key]) for key in keys if key in entries}
    except Exception as error:  # zipfile, zlib and numpy each raise their own
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


def stored_matrix(file, info):
    """Return the (4, 4) array of numbers that an entry of an open .npz holds, or the words for what it holds instead.

    No more than LARGEST_MATRIX bytes are unpacked, whatever the entry's size is said to be.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):    # others unpack whole chunks at once
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


def epoch_steps(num_views: int, num_processes=1) -> int:
    """Return the number of steps of an epoch, in which every view comes; each process takes one view per step."""
    return -(-num_views // num_processes)


class Draw(NamedTuple):
    """How the rays of a batch are drawn."""
    num_rays: int
    seed: int = 0
    outline_fraction: float = 0.0   # of the rays near the mask's outline, from 0 to less than 1


class Process(NamedTuple):
    """One of the processes that train together; a parallel.World serves as well."""
    rank: int = 0
    size: int = 1


def training_batches(scene, views, draw: Draw, first_step=0, process=Process()) -> Iterator[Batch]:
    """Yield Batches for ever, from that of first_step on: each is one view and num_rays random pixels of it.

    Each of `views` comes once in every epoch, in an order that is shuffled anew for each. The pixels are uniform over
    the whole image, object or not, and differ from one another unless the image has fewer. With an outline_fraction
    they are drawn by draw_pixels.
    Each of several processes takes batches of its own: an epoch has 1 / size as many steps, and its last step takes the
    epoch's first views again where size does not divide them. A batch is a function of the seed, the step, the rank and
    the size.
    """
    num_rays, (rank, size) = draw.num_rays, (process.rank, process.size)
    height, width = scene.masks.shape[1:]
    regions = {}
    for step in itertools.count(first_step):
        epoch, position = divmod(step, epoch_steps(len(views), size))
        view = random_numbers(draw.seed, ORDER, epoch).permutation(views)[(position * size + rank) % len(views)]
        # No shuffle: the order of the rays does not matter.
        rng = random_numbers(draw.seed, PIXELS, step * size + rank)
        if draw.outline_fraction:
            if view not in regions:
                regions[view] = mask_regions(scene.masks[view])
            pixels, weights = draw_pixels(regions[view], num_rays, draw.outline_fraction, rng)
        else:
            pixels = rng.choice(height * width, num_rays, replace=num_rays > height * width, shuffle=False)
            weights = np.ones(num_rays, np.float32)
        yield Batch(int(view), *view_rays(scene, view, np.stack([pixels % width, pixels // width], axis=1)), weights)


def mask_regions(mask):
    """Return the numbers of the pixels of a mask (H, W) bool as three int32 arrays: those near its outline (by up to
    OUTLINE_BAND of the shorter side), the others on the object, and the others."""
    inside = mask.astype(np.uint8)
    distance = np.maximum(*(cv2.distanceTransform(side, cv2.DIST_L2, 5) for side in (inside, 1 - inside)))
    near = distance <= OUTLINE_BAND * min(mask.shape)
    return [np.flatnonzero(region).astype(np.int32) for region in (near, mask & ~near, ~mask & ~near)]


def draw_pixels(regions, num_rays, outline_fraction, rng):
    """Draw pixels, a fraction of them near the outline, and most of the others on the object (stratified sampling).

    regions: what mask_regions gives. Returns the pixels' numbers (num_rays,) and weights (num_rays,) float32. With these
    weights a sum over the pixels has the mean that it has over uniform pixels: the loss is the same, but it varies less
    from step to step at the pixels that decide the shape.
    """
    sizes = np.array([len(region) for region in regions])
    shares = np.array([outline_fraction, (1 - outline_fraction) * OBJECT_SHARE,
                       (1 - outline_fraction) * (1 - OBJECT_SHARE)])
    shares = np.where(sizes > 0, shares, 0.0)
    shares /= shares.sum()
    ends = np.floor(np.cumsum(shares[:-1]) * num_rays + rng.random()).astype(int)   # random rounding: right on average
    counts = np.diff(ends, prepend=0, append=num_rays)
    pixels = [rng.choice(region, count, replace=count > len(region), shuffle=False)
              for region, count in zip(regions, counts) if count]
    weights = np.divide(sizes / sizes.sum(), shares, out=np.zeros(3), where=shares > 0)
    return np.concatenate(pixels), np.repeat(weights, counts).astype(np.float32)
