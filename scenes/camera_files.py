"""Cameras as other programs write them -> views: COLMAP, NeRF's transforms.json, Middlebury, cameras.npz, K R t.

The files are not trusted: nothing is unpickled, the paths that they name must stay inside the folder to which they are
relative, and bad values are refused in one line. COLMAP and transforms.json have pixel centres at half-integers; here,
as everywhere else, they are at integers.
"""
import json
import os
import re
import struct
from collections import ChainMap, Counter
from pathlib import Path
from typing import NamedTuple, Optional, Tuple

import numpy as np

import datasets
from files import pictures
from helper import SHORT, UserError, check_is_file, decompose_projection, unit

FORMATS = """a COLMAP model (cameras and images, .bin or .txt, in the folder itself, sparse/ or sparse/0/), \
transforms.json, cameras.npz, a Middlebury *_par.txt, or cameras.json with K, R and t of each image"""
MAX_NAME = 4096             # bytes of a name in a COLMAP file; a longer one means a broken file
MOST_TEXT = 20 * 10 ** 6    # bytes of a text file that is read whole; parsed JSON may take forty times the memory
MOST_LINE = 10 ** 8         # characters of a line of COLMAP's, which may hold all keypoints of an image
MOST_VIEWS = 20000
MOST_POINTS = 10 ** 7
MAX_PART, MAX_PATH = 255, 1000  # bytes of a file's name, the usual limit, and of a path in a camera file
FARTHEST = 1e12             # the largest number in a camera; beyond, double precision gives noise
LONGEST_SIDE = 10 ** 6      # pixels of a camera's image
WIDE = 10.0                 # degrees, about, between two directions from which a point is seen, for it to lie well

# COLMAP's camera models in the order of their numbers in cameras.bin: name and parameters. Distortion coefficients have
# OpenCV's names.
COLMAP_MODELS = [
    ("SIMPLE_PINHOLE", "f cx cy"),
    ("PINHOLE", "fx fy cx cy"),
    ("SIMPLE_RADIAL", "f cx cy k1"),
    ("RADIAL", "f cx cy k1 k2"),
    ("OPENCV", "fx fy cx cy k1 k2 p1 p2"),
    ("OPENCV_FISHEYE", "fx fy cx cy k1 k2 k3 k4"),
    ("FULL_OPENCV", "fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6"),
    ("FOV", "fx fy cx cy omega"),
    ("SIMPLE_RADIAL_FISHEYE", "f cx cy k1"),
    ("RADIAL_FISHEYE", "f cx cy k1 k2"),
    ("THIN_PRISM_FISHEYE", "fx fy cx cy k1 k2 p1 p2 k3 k4 sx1 sy1"),
]
UNUSABLE = ("FOV", "THIN_PRISM_FISHEYE")    # OpenCV cannot undo their distortion
OPENCV_ORDER = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")


class View(NamedTuple):
    image: Path                             # the photograph
    mask: Optional[Path]                    # its mask, if the camera file names one
    intrinsics: np.ndarray                  # (3, 3) float64, pixels
    pose: np.ndarray                        # (4, 4) float64, camera to world; x right, y down, z into the scene
    size: Optional[Tuple[int, int]] = None  # width and height of the image for these intrinsics, if known
    distortion: Tuple[float, ...] = ()      # OpenCV's coefficients; () for a pinhole camera
    fisheye: bool = False                   # the coefficients are of OpenCV's fisheye model


def read_views(source, images=None):
    """Read the Views of `source`, a folder or a camera file.

    images: the folder of the photographs, None to look for it. Returns the Views in the order of their names and a text
    that says what was read. Raises UserError if no cameras are recognised or a file is bad.
    """
    source = Path(source)
    if not os.path.exists(str(source)):
        raise UserError(f"{str(source)[:1000]}: no such file or folder; name the folder of your photographs and "
                        "cameras")
    if images is not None and not os.path.isdir(str(images)):
        raise UserError(f"--images {str(images)[:1000]}: no such folder")
    reader, path = recognise(source)
    root = source if source.is_dir() else source.parent
    with np.errstate(all="ignore"):     # values that are not finite are refused below
        views = reader(path, Path(images) if images else None)
        check_views(path, views)
    relative = os.path.relpath(str(path), str(root))
    return views, f"{len(views)} cameras of {path.name if relative == '.' else relative} ({TITLES[reader]})"


def recognise(source):
    """Return the reader for a folder or a camera file, and the path to read. Raise UserError if there is none."""
    if source.is_dir():
        found = cameras_of_folder(source)
        if found:
            return found
        near = [str(folder) for folder in datasets.neighbours(source) if cameras_of_folder(folder, False)]
        if near:
            raise UserError(f"{source}: no cameras found here, but in {pictures.listed(near, 3)}; name that folder")
        raise UserError(f"{source}: no cameras found, and no photographs or video to find them from; wanted "
                        f"are photographs, or {FORMATS}")
    check_is_file(source)
    for fits, reader in ((source.suffix == ".json" and "transforms" in source.name, read_transforms),
                         (source.suffix == ".json", read_krt),
                         (source.suffix == ".npz", read_npz),
                         (source.name.endswith("_par.txt"), read_middlebury)):
        if fits:
            return reader, source
    raise UserError(f"{source}: not a camera file that is known here; name {FORMATS}")


def cameras_of_folder(folder, single=True):
    """Return the reader for the cameras in a folder and the path to read, None if there are none.

    With `single`, raises UserError if there are several files of a format.
    """
    for name in ("transforms.json", "transforms_train.json"):
        if os.path.isfile(str(folder / name)):
            return read_transforms, folder / name
    models = colmap_models(folder)
    if models:
        return read_colmap, largest_model(models) if single else models[0]
    for pattern, reader in (("cameras.npz", read_npz), ("*_par.txt", read_middlebury), ("cameras.json", read_krt)):
        found = sorted(folder.glob(pattern))
        if len(found) > 1 and single:
            raise UserError(f"{folder}: has {len(found)} files {pattern}; name the one to read instead of the folder")
        if found:
            return reader, found[0]
    return None


# --- shared by the readers --------------------------------------------------------------------------------------------

def natural_key(name):
    """Return a sort key by which view_2 comes before view_10."""
    parts = re.split(r"([0-9]+)", str(name))    # text, digits, text, ...
    digits = [part.lstrip("0") for part in parts[1::2]]     # ordered by length first; int() refuses long ones
    keys = [(-1, part) for part in parts]
    keys[1::2] = [(len(part), part) for part in digits]
    return keys


def path_inside(folder, name, source):
    """Return folder / name for a path in the file `source`. Raise UserError if it leads out of the folder.

    Links in the folder are followed: the user made them, but not the name.
    """
    name = str(name).replace("\\", "/")
    path = os.path.normpath(name)
    if "\0" in name or path in (".", "..") or path.startswith("../") or os.path.isabs(path) or name[1:2] == ":":
        raise UserError(f"{source}: the path {name[:200]!r} leads out of {folder}; only files inside it are read")
    content = path.encode("utf-8", "replace")
    if max(map(len, content.split(b"/"))) > MAX_PART or len(content) > MAX_PATH or content.decode() != path:
        raise UserError(f"{source}: the path {name[:60]!a}... is too long for a file's, or no text; mend this name")
    return Path(folder) / path


def read_text(path):
    """Return the contents of a text file. Raise UserError if it is too large or cannot be read."""
    check_is_file(path)
    try:
        if os.path.getsize(str(path)) > MOST_TEXT:
            raise UserError(f"{path}: has more than {MOST_TEXT // 10 ** 6} MB, too much for cameras; name another file")
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def unreadable(path, error):
    """Return the UserError for a text file that cannot be read."""
    return UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not a text file'})")


def text_lines(path):
    """Yield (number from 1, line) of a text file of any size. Raise UserError if it cannot be read."""
    check_is_file(path)
    try:
        with open(str(path), encoding="utf-8-sig") as file:
            for index, line in enumerate(iter(lambda: file.readline(MOST_LINE), ""), 1):
                if len(line) == MOST_LINE:
                    raise UserError(f"{path}, line {index}: too long to be COLMAP's; copy the model again")
                yield index, line
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def text_rows(path):
    """Yield (number from 1, words) of the lines of a text file that are neither empty nor comments, as text_lines."""
    for index, line in text_lines(path):
        words = line.split()
        if words and not words[0].startswith("#"):
            yield index, words


def read_json(path, wanted):
    """Return the mapping in a JSON file, all numbers as floats. Raise UserError for other contents.

    wanted: what it must hold, for the message.
    """
    def mapping(pairs):
        tree = dict(pairs)
        if len(tree) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise UserError(f"{path}: the key {twice[:200]!r} is given twice; remove one")
        return tree

    try:    # integers as floats, too: int() is slow for long ones, or refuses them
        tree = json.loads(read_text(path), parse_int=float, object_pairs_hook=mapping)
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if hasattr(error, "lineno") else ""
        raise UserError(f"{path}{where}: not valid JSON ({getattr(error, 'msg', 'it cannot be parsed')})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping with {wanted}")
    return tree


def finite_number(value, where):
    """Return `value` if it is a finite float. Raise UserError naming `where` otherwise."""
    if not (type(value) is float and abs(value) < FARTHEST):
        raise UserError(f"{where} must be a finite number, not {SHORT.repr(value)}")
    return value


def matrix(value, shapes, where):
    """Return nested lists as a finite float64 array of one of the `shapes`. Raise UserError naming `where` if unfit."""
    try:
        array = np.array(value, np.float64)
        fits = array.shape in shapes and bool(np.isfinite(array).all())
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise UserError(f"{where} must be finite numbers of shape {' or '.join(str(shape) for shape in shapes)}") \
            from None
    return array


def camera_matrix(fx, fy, cx, cy):
    """Return the intrinsics (3, 3)."""
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def pose_from(rotation, translation):
    """Return the pose (4, 4), camera to world, of x_camera = R x_world + t."""
    pose = np.eye(4)
    pose[:3, :3] = rotation.T
    pose[:3, 3] = -rotation.T @ translation
    return pose


def check_count(path, count):
    """Raise UserError for more views than anyone trains on, which would take long to read."""
    if count > MOST_VIEWS:
        raise UserError(f"{path}: has more than {MOST_VIEWS} cameras; leave some out")


def check_views(path, views):
    """Raise UserError unless there are Views, of different photographs and with usable cameras."""
    if not views:
        raise UserError(f"{path}: has no cameras; name another file or folder")
    seen = set()
    for view in views:
        if view.image in seen:
            raise UserError(f"{path}: has two cameras of {view.image.name}; remove one")
        seen.add(view.image)
        check_camera(path, view)


def check_camera(path, view):
    """Raise UserError for a View whose pose is no rigid motion, whose focal lengths or image size are not positive, or
    whose numbers are not finite or too large to compute with."""
    where = f"{path}: the camera of {view.image.name}"
    for values in (view.pose, view.intrinsics, view.distortion):
        if not (np.isfinite(values).all() and np.abs(values).max(initial=0) < FARTHEST):
            raise UserError(f"{where} has values that are not finite, or huge; mend or remove this view")
    rotation = view.pose[:3, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-2 or np.linalg.det(rotation) < 0:
        raise UserError(f"{where}: its rotation is {'mirrored' if np.linalg.det(rotation) < 0 else 'not a rotation'}; "
                        "R R^T must be 1 and det R 1, without scale")
    if not (view.intrinsics[0, 0] > 0 and view.intrinsics[1, 1] > 0):
        raise UserError(f"{where}: its focal length must be more than 0")
    if view.size and not all(1 <= side <= LONGEST_SIDE for side in view.size):
        raise UserError(f"{where} is for an image of {SHORT.repr(view.size[0])}x{SHORT.repr(view.size[1])} pixels; "
                        f"mend its width and height, which are from 1 to {LONGEST_SIDE}")
    try:
        decompose_projection(view.intrinsics @ np.linalg.inv(view.pose)[:3])
    except (ValueError, np.linalg.LinAlgError) as error:
        raise UserError(f"{where} cannot be used: {error}; mend or remove this view") from error


def picture_folder(folders):
    """Return the first of the folders with photographs. Raise UserError if none has any."""
    for folder in folders:
        if os.path.isdir(str(folder)) and datasets.picture_files(folder, datasets.PHOTOGRAPHS)[0]:
            return folder
    raise UserError(f"{' or '.join(str(f) for f in folders)}: no photographs ({', '.join(datasets.PHOTOGRAPHS)}) "
                    "there; say with --images where they are, and convert others to PNG or JPEG")


# --- COLMAP -----------------------------------------------------------------------------------------------------------
# Why not pycolmap (3.12.5 is the last with wheels for Python 3.8; 54 MB): it insists on points and tracks, which are
# not needed here, accepts a truncated cameras.bin, and loops forever on other truncated files.

def colmap_models(folder):
    """Return the folders of COLMAP models: `folder` itself, and where COLMAP and nerfstudio put them in it."""
    places = [folder, folder / "sparse"] + sorted((folder / "sparse").glob("[0-9]*"), key=natural_key)
    places += sorted((folder / "colmap" / "sparse").glob("[0-9]*"), key=natural_key)
    return [place for place in places
            if any(all(os.path.isfile(str(place / f"{name}{suffix}")) for name in ("cameras", "images"))
                   for suffix in (".bin", ".txt"))]


def largest_model(models, say=print):
    """Return the model with the most images, and say so: COLMAP makes several if photographs do not connect."""
    if len(models) == 1:
        return models[0]
    counts = [len(colmap_images(model)) for model in models]
    best = counts.index(max(counts))
    say(f"notice: {len(models)} COLMAP models, of {', '.join(map(str, counts))} images; reading {models[best]}; to "
        "read another, name its folder")
    return models[best]


def read_colmap(model, images):
    """Read the COLMAP model, text or binary, in the folder `model` as Views."""
    cameras, posed = colmap_cameras(model), colmap_images(model)
    if not posed:
        raise UserError(f"{model}: no image is registered in this model; COLMAP found no cameras")
    # images/ lies beside the model, or up to three levels up as in a workspace with images/ and sparse/0/.
    parents = [model, model.absolute().parent, model.absolute().parent.parent, model.absolute().parent.parent.parent]
    folder = images or picture_folder([parent / "images" for parent in parents])
    views = []
    for _, name, rotation, translation, camera in sorted(posed, key=lambda entry: natural_key(entry[1])):
        if camera not in cameras:
            raise UserError(f"{model}: image {name[:200]} has the camera {str(camera)[:20]}, which the model's cameras "
                            "lack")
        image = path_inside(folder, name, model)
        views.append(View(image, None, pose=pose_from(rotation, translation), **cameras[camera]))
    return views


def colmap_cameras(model):
    """Return {camera's number: View's intrinsics, size, distortion and fisheye} of a COLMAP model."""
    path = model / "cameras.bin"
    if path.is_file():
        rows = binary_cameras(path)
    else:
        path = model / "cameras.txt"
        rows = text_cameras(path)
    return {camera: colmap_intrinsics(f"{path}: camera {str(camera)[:20]}", *row) for camera, *row in rows}


def colmap_images(model):
    """Return (number, name, rotation (3, 3), translation (3,), camera's number) for each image of a COLMAP model."""
    path = model / "images.bin"
    rows = binary_images(path) if path.is_file() else text_images(model / "images.txt")
    return [(number, name, quaternion_rotation(values[:4], f"{model}: image {name[:200]}"), np.array(values[4:7]),
             camera) for number, name, values, camera in rows]


def colmap_intrinsics(where, name, width, height, values):
    """Return View's intrinsics, size, distortion and fisheye as a dict. values: parameters of COLMAP's model `name`."""
    names = dict(COLMAP_MODELS).get(name)
    if names is None or name in UNUSABLE:
        raise UserError(f"{where}: the model {name[:40]} cannot be undistorted here; run colmap image_undistorter and "
                        "give this script its output folder")
    if len(values) != len(names.split()) or not np.isfinite(values).all():
        raise UserError(f"{where}: {name} has the {len(names.split())} finite parameters {names}, not {len(values)}")
    p = dict(zip(names.split(), values))
    k = camera_matrix(p.get("fx", p.get("f")), p.get("fy", p.get("f")), p["cx"] - 0.5, p["cy"] - 0.5)
    fisheye = name.endswith("FISHEYE")
    order = ("k1", "k2", "k3", "k4") if fisheye else OPENCV_ORDER
    distortion = tuple(p.get(key, 0.0) for key in order)
    return {"intrinsics": k, "size": (width, height), "fisheye": fisheye and any(distortion),
            "distortion": distortion if any(distortion) else ()}


def quaternion_rotation(q, where):
    """Return the rotation (3, 3) of a quaternion w, x, y, z. Raise UserError if it is 0 or not finite."""
    q = np.array(q, np.float64)
    length = np.linalg.norm(q)
    if not (np.isfinite(length) and length > 1e-6):
        raise UserError(f"{where}: its quaternion {q.tolist()} is no rotation")
    w, x, y, z = q / length
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def unpack(file, layout):
    """Return the next little-endian values of a binary file. Raise ValueError at its end. layout: as struct's."""
    size = struct.calcsize("<" + layout)
    content = file.read(size)
    if len(content) < size:
        raise ValueError("it ends too early: truncated, or not COLMAP's")
    return struct.unpack("<" + layout, content)


def binary_rows(path, read_row, most=None):
    """Return [read_row(file), ...] for the entries of a COLMAP binary file. Raise UserError if it is damaged.

    most: how many entries there may be, None for as many as there may be views.
    """
    try:
        with open(str(path), "rb") as file:
            count, = unpack(file, "Q")
            if most is None:
                check_count(path, count)
            elif count > most:
                raise ValueError(f"it has more than {most} entries")
            rows = [read_row(file) for _ in range(count)]
            if file.read(1):
                raise ValueError("it goes on after its last entry: not COLMAP's, or damaged")
            return rows
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        reason = "a name is not text" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{path}: {reason}; copy the model again") from error


def binary_cameras(path):
    """Return (number, model's name, width, height, parameters) of each camera in a cameras.bin."""
    def row(file):
        camera, model, width, height = unpack(file, "iiQQ")
        if not 0 <= model < len(COLMAP_MODELS):
            raise ValueError(f"camera {camera} has the unknown model {model}")
        name, names = COLMAP_MODELS[model]
        return camera, name, width, height, unpack(file, f"{len(names.split())}d")
    return binary_rows(path, row)


def binary_images(path):
    """Return (number, name, quaternion and translation, camera's number) of each image in an images.bin."""
    size = os.path.getsize(str(path))

    def row(file):
        number, *values, camera = unpack(file, "i7di")
        start, name = file.tell(), file.read(MAX_NAME)
        if b"\0" not in name:
            raise ValueError("a name does not end: truncated, or not COLMAP's")
        name = name[:name.index(b"\0")]
        file.seek(start + len(name) + 1)
        points, = unpack(file, "Q")
        if file.tell() + 24 * points > size:
            raise ValueError("it ends too early: truncated, or not COLMAP's")
        file.seek(24 * points, os.SEEK_CUR)  # x, y and the 3D point's number of each keypoint
        return number, name.decode("utf-8"), values, camera
    return binary_rows(path, row)


def parse_int(word):
    """Return a word as an int. Raise ValueError if it is none, or too long: int() is slow for many digits."""
    if len(word) > 20:
        raise ValueError
    return int(word)


def read_points3d(model):
    """Return the sparse points of the COLMAP model in a folder, and which images see them.

    Returns points (N, 3) float64, in the model's world units, and a list of N arrays of the images' numbers in the
    model. N is 0 if the model has no points. Raises UserError if the file is damaged.
    """
    path = Path(model) / "points3D.bin"
    rows = (binary_points3d(path) if path.is_file() else
            text_points3d(path.with_suffix(".txt")) if path.with_suffix(".txt").is_file() else [])
    points = np.array([point for point, _ in rows], np.float64).reshape(-1, 3)
    kept = np.isfinite(points).all(axis=1)
    return points[kept], [images for (_, images), good in zip(rows, kept) if good]


def sparse_points_of(source):
    """Return the points (N, 3) float64 of the COLMAP model that `read_views` reads which lie well.

    At least three images see them, from directions some WIDE degrees apart. In a video, or among hundreds of
    photographs, many points are seen by neighbours alone, and are far off along the rays.
    source: as for read_views. N is 0 for cameras of another format. Raises UserError if the points' file is damaged.
    """
    reader, path = cameras_of_folder(Path(source), single=False) or (None, None)
    if reader is not read_colmap:
        return np.zeros((0, 3))
    model = largest_model(colmap_models(Path(source)), say=lambda text: None)
    points, seen_by = read_points3d(model)
    places = {number: -rotation.T @ translation for number, _, rotation, translation, _ in colmap_images(model)}
    return points[seen_widely(points, seen_by, places)] if len(points) else points


def seen_widely(points, seen_by, places):
    """Return which points (N,) bool at least three cameras see, from directions some WIDE degrees apart.

    seen_by: N arrays of cameras' numbers; places: {camera's number: where it is (3,)}. Others' numbers do not count.
    """
    numbers = np.array(sorted(places))
    centres = np.stack([places[number] for number in numbers])
    point, image = np.repeat(np.arange(len(points)), list(map(len, seen_by))), np.concatenate(seen_by)
    known = np.isin(image, numbers)
    point, image = np.unique(np.stack([point[known], image[known]]), axis=1)
    rays = unit(points[point] - centres[np.searchsorted(numbers, image)])
    middle = unit(np.stack([np.bincount(point, rays[:, axis], len(points)) for axis in range(3)], axis=1))
    least = np.ones(len(points))
    np.minimum.at(least, point, (rays * middle[point]).sum(axis=1))
    return (np.bincount(point, minlength=len(points)) >= 3) & (least <= np.cos(np.radians(WIDE / 2)))


def binary_points3d(path):
    """Return (x, y, z), the numbers of the images that see it, of each point in a points3D.bin."""
    size = os.path.getsize(str(path))

    def row(file):
        values = unpack(file, "Q3d3BdQ")
        if file.tell() + 8 * values[-1] > size:
            raise ValueError("it ends too early: truncated, or not COLMAP's")
        return values[1:4], np.frombuffer(file.read(8 * values[-1]), "<i4")[::2]    # image and keypoint in turn
    return binary_rows(path, row, most=MOST_POINTS)


def text_points3d(path):
    """Return the rows of a points3D.txt as binary_points3d does."""
    rows = []
    for index, words in text_rows(path):
        try:
            rows.append(([float(word) for word in words[1:4]], np.array(words[8::2], np.int32)))
        except (ValueError, OverflowError):
            raise UserError(f"{path}, line {index}: wanted are number, x, y, z, colour, error, and pairs of image "
                            "and keypoint") from None
        if len(rows[-1][0]) < 3:
            raise UserError(f"{path}, line {index}: has no x, y, z")
    return rows


def text_cameras(path):
    """Return the rows of a cameras.txt as binary_cameras does."""
    rows = []
    for index, words in text_rows(path):
        try:
            camera, width, height = (parse_int(words[place]) for place in (0, 2, 3))
            rows.append((camera, words[1], width, height, [float(word) for word in words[4:]]))
        except (ValueError, IndexError):
            raise UserError(f"{path}, line {index}: wanted are number, model, width, height and parameters") from None
        check_count(path, len(rows))
    return rows


def text_images(path):
    """Return the rows of an images.txt as binary_images does. It has two lines per image, the second of keypoints."""
    rows, keypoints_follow = [], False
    for index, line in text_lines(path):
        if line.startswith("#") or not (line.strip() or keypoints_follow):
            continue
        if not keypoints_follow:
            words = line.split(None, 9)
            try:
                rows.append((parse_int(words[0]), words[9].strip(), [float(word) for word in words[1:8]],
                             parse_int(words[8])))
            except (ValueError, IndexError):
                raise UserError(f"{path}, line {index}: wanted are number, quaternion, translation, camera and name, "
                                "and a line of keypoints, which may be empty") from None
            check_count(path, len(rows))
        keypoints_follow = not keypoints_follow
    return rows


# --- NeRF's transforms.json: Blender, instant-ngp, nerfstudio ---------------------------------------------------------

PERSPECTIVE = ("PERSPECTIVE", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV")


def read_transforms(path, images):
    """Read a transforms.json (camera to world, y up, z backwards) as Views. Frames may have intrinsics of their own."""
    tree = read_json(path, "frames")
    frames = tree.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise UserError(f"{path}: frames must be a list of frames, each with file_path and transform_matrix")
    check_count(path, len(frames))
    views = []
    for index, frame in enumerate(frames):
        where = f"{path}: frames[{index}]"
        if not isinstance(frame.get("file_path"), str):
            raise UserError(f"{where}.file_path must name the image of this frame")
        name = Path(frame["file_path"]).name if images else frame["file_path"]
        image = path_inside(images or path.parent, name, where)
        if image.suffix.lower() not in datasets.PHOTOGRAPHS:    # Blender writes names without suffix
            named = [image.with_name(image.name + suffix) for suffix in datasets.PHOTOGRAPHS]
            image = next((path for path in named if os.path.isfile(str(path))), image)
        mask = frame.get("mask_path")
        pose = matrix(frame.get("transform_matrix"), ((4, 4), (3, 4)), f"{where}.transform_matrix")
        pose = np.vstack([pose[:3], (0, 0, 0, 1)]) @ np.diag((1.0, -1.0, -1.0, 1.0))
        views.append(View(image, path_inside(path.parent, mask, where) if isinstance(mask, str) else None, pose=pose,
                          **transforms_intrinsics(where, ChainMap(frame, tree), image)))
    return sorted(views, key=lambda view: natural_key(view.image))


def transforms_intrinsics(where, keys, image):
    """Return View's intrinsics, size, distortion and fisheye as a dict. keys: a frame's, then the file's."""
    def get(key, default=None):
        return finite_number(keys[key], f"{where}: {key}") if keys.get(key) is not None else default

    name = keys.get("camera_model", "OPENCV")
    fisheye = name == "OPENCV_FISHEYE" or keys.get("is_fisheye") is True
    if not fisheye and name not in PERSPECTIVE:
        raise UserError(f"{where}: the camera_model {str(name)[:40]} is not known here; one of "
                        f"{', '.join(PERSPECTIVE)} or OPENCV_FISHEYE is")
    width, height = get("w"), get("h")
    if width is None or height is None:
        if not os.path.exists(str(image)):
            raise UserError(f"{image}: no such photograph; restore it or remove its frame, {where}; or say with "
                            "--images where the photographs are")
        width, height = pictures.picture_size(image)
    fx, fy = get("fl_x"), get("fl_y")
    for axis, size in (("x", width), ("y", height)):
        angle = get(f"camera_angle_{axis}")
        if axis == "x" and fx is None and angle:
            fx = size / 2 / np.tan(angle / 2)
        if axis == "y" and fy is None and angle:
            fy = size / 2 / np.tan(angle / 2)
    if fx is None and fy is None:
        raise UserError(f"{where}: has no focal length; wanted is fl_x, or camera_angle_x in radians")
    fx, fy = fx if fx is not None else fy, fy if fy is not None else fx
    order = ("k1", "k2", "k3", "k4") if fisheye else OPENCV_ORDER[:5]
    if not fisheye and get("k4"):
        raise UserError(f"{where}: k4 is only known of a camera_model OPENCV_FISHEYE; undistort the images first")
    distortion = tuple(get(key, 0.0) for key in order)
    return {"intrinsics": camera_matrix(fx, fy, get("cx", width / 2) - 0.5, get("cy", height / 2) - 0.5),
            "size": (int(width), int(height)), "fisheye": fisheye and any(distortion),
            "distortion": distortion if any(distortion) else ()}


# --- other formats ----------------------------------------------------------------------------------------------------

def read_middlebury(path, images):
    """Read a Middlebury *_par.txt as Views: the count, then "name k11 ... k33 r11 ... r33 t1 t2 t3" per image."""
    lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    folder, views = images or path.parent, []
    if not lines or lines[0][0].lstrip("0") != str(len(lines) - 1) or len(lines) == 1:
        raise UserError(f"{path}: its first line must be the number of the lines that follow, here {len(lines) - 1}")
    check_count(path, len(lines))
    for index, words in enumerate(lines[1:], 2):
        try:
            values = np.array([float(word) for word in words[1:]])
            fits = len(values) == 21 and bool(np.isfinite(values).all())
        except ValueError:
            fits = False
        if not fits:
            raise UserError(f"{path}, line {index}: wanted are a name and the 21 finite numbers of K, R and t")
        k, rotation = values[:9].reshape(3, 3), values[9:18].reshape(3, 3)
        k = k / values[8] if values[8] else np.full((3, 3), np.nan)     # NaN is refused later
        views.append(View(path_inside(folder, words[0], path), None, k, pose_from(rotation, values[18:])))
    return sorted(views, key=lambda view: natural_key(view.image))


def read_krt(path, images):
    """Read a cameras.json as Views: {"name of the image": {"K": 3x3, "R": 3x3, "t": 3}}, x_camera = R x_world + t."""
    tree = read_json(path, 'an entry "name of the image": {"K": 3x3, "R": 3x3, "t": 3} per view')
    check_count(path, len(tree))
    folder = images or picture_folder([path.parent / "images", path.parent / "image", path.parent])
    views = []
    for name in sorted(tree, key=natural_key):
        entry = tree[name] if isinstance(tree[name], dict) else {}
        k, r = (matrix(entry.get(key), ((3, 3),), f"{path}: {key} of {name[:200]}") for key in "KR")
        t = matrix(entry.get("t"), ((3,), (3, 1)), f"{path}: t of {name[:200]}")
        if abs(k[2, 2] - 1) > 1e-6 or np.abs(k[2, :2]).max() > 1e-6 or abs(k[1, 0]) > 1e-6:
            raise UserError(f"{path}: K of {name[:200]} must be [[fx, skew, cx], [0, fy, cy], [0, 0, 1]]")
        views.append(View(path_inside(folder, name, path), None, k, pose_from(r, t.ravel())))
    return views


def read_npz(path, images):
    """Read a cameras.npz as Views, ignoring scale_mat_i. Camera i belongs to the i-th image by sorted name."""
    folder = images or picture_folder([path.parent / "image", path.parent / "images", path.parent])
    files = datasets.picture_files(folder, datasets.PHOTOGRAPHS)[0]
    matrices, views = datasets.read_matrices(path, len(files), kinds=("world",)), []
    for index, file in enumerate(files):
        try:
            intrinsics, pose = decompose_projection(matrices[f"world_mat_{index}"])
        except ValueError as error:
            raise UserError(f"{path}: world_mat_{index} cannot be used: {error}; mend this matrix") from error
        views.append(View(file, None, intrinsics, pose))
    return views


TITLES = {read_colmap: "a COLMAP model", read_transforms: "NeRF's axes: y up, z backwards", read_krt: "K, R, t",
          read_middlebury: "Middlebury's K, R, t", read_npz: "world_mat"}
