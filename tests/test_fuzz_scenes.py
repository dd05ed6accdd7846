"""Readers of a scene's files return, or refuse in one line, whatever the bytes, within bounds of time and memory.

The files are pictures, cameras in every form with their views, and the meshes and MATLAB files of evaluate.py.
"""
import io
import json
import struct

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.io
import trimesh
from hypothesis import given
from PIL import Image

import helper
from files import pictures
from fuzzing import damaged, keeps_its_promise
from metrics import meshes
from scenes import camera_files
from scenes.views import read_view

WIDTH, HEIGHT = 24, 18
EXTREME = [0, -1, 1, 7, 1e-320, 1e-12, 1e9, -1e15, 1e30, 1e300, 1.7e308, float("nan"), float("inf"), -float("inf"),
           2 ** 31, 2 ** 63, 10 ** 30]
NAMES = ["a.png", "b.png", "", ".", "..", "../a.png", "/etc/passwd", "a" * 300 + ".png", "a/" * 900 + "b.png",
         "x" * 250 + "/a.png", "1²2.png", "9" * 5000, "a\0.png", "\ud800.png", "a\nb.png", "C:\\a.png", "pipe.png",
         "folder.png", "link.png", "é.heic"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of photographs a.png and b.png, a folder folder.png and a broken link link.png."""
    path = tmp_path_factory.mktemp("scene")
    for name in ("a.png", "b.png"):
        picture(name).save(path / name)
    (path / "folder.png").mkdir()
    (path / "link.png").symlink_to("nowhere")
    return path


def picture(name="a"):
    rng = np.random.default_rng(len(name) + ord(name[0]))
    return Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


# --- pictures ---------------------------------------------------------------------------------------------------------

def some_pictures():
    """Yield small pictures of all formats and kinds as bytes."""
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    rgb, found = picture(), []
    for kind, options in (("PNG", {"exif": exif}), ("JPEG", {"exif": exif, "progressive": True}), ("JPEG", {}),
                          ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw", "tiffinfo": {274: 6}}),
                          ("TIFF", {"compression": "jpeg"}), ("TIFF", {"big_tiff": True}), ("WEBP", {"exif": exif}),
                          ("WEBP", {"lossless": True}), ("BMP", {}), ("PPM", {}),
                          ("MPO", {"save_all": True, "append_images": [picture("b")]})):
        found.append((rgb, kind, options))
    found += [(rgb.convert("P"), "PNG", {"transparency": 3}), (rgb.convert("CMYK"), "JPEG", {}),
              (rgb.convert("1"), "TIFF", {"compression": "group4"}), (rgb.convert("RGBA"), "PNG", {}),
              (Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)), "TIFF", {}),
              (Image.fromarray(np.ones((HEIGHT, WIDTH), np.float32)), "TIFF", {})]
    for image, kind, options in found:
        content = io.BytesIO()
        image.save(content, kind, **options)
        yield content.getvalue()


@given(st.sampled_from(list(some_pictures())).flatmap(damaged))
def test_any_picture(folder, content):
    path = folder / "any"
    path.write_bytes(content)
    image = keeps_its_promise(lambda: pictures.read_image(path))
    if not isinstance(image, helper.UserError):
        assert image.dtype == np.uint8 and image.shape[2:] == (3,)
        mask = keeps_its_promise(lambda: pictures.read_mask(path))
        assert mask.shape == image.shape[:2] and mask.dtype == bool
    size = keeps_its_promise(lambda: pictures.picture_size(path))
    assert isinstance(image, helper.UserError) or size == image.shape[1::-1]


# --- cameras ----------------------------------------------------------------------------------------------------------

def read_all(path, images):
    """Read all that prepare.py reads: the cameras, and the photographs with their distortion undone."""
    views = camera_files.read_views(path, images)[0]
    for view in views:
        helper.check_is_file(view.image)
        read_view(view, "background", None)
    return views


def numbers(usual):
    """Draw a copy of the list `usual`, with up to three of its numbers replaced by extreme ones."""
    def replaced(places):
        return [EXTREME[places[i] % len(EXTREME)] if i in places else value for i, value in enumerate(usual)]
    places = st.dictionaries(st.integers(0, len(usual) - 1), st.integers(0, len(EXTREME) - 1), max_size=3)
    return st.one_of(st.just(list(usual)), places.map(replaced))


names = st.one_of(st.sampled_from(["a.png", "b.png"]), st.sampled_from(NAMES), st.text(max_size=20))
LENS = [30.0, 31.0, 12.0, 9.0, 0.1, -0.02, 0.01, 0.01, 0.001, 0.0, 0.0, 0.0]
POSE = [1.0, 0.0, 0.0, 0.0, 0.1, 0.2, 3.0]


def packed(layout, *values):
    """Return struct.pack of numbers; those too large for the layout wrap."""
    sizes = {"i": 32, "Q": 64}
    whole = [int(value) % 2 ** sizes[kind] if np.isfinite(float(value)) else 0 for kind, value in zip(layout, values)]
    return struct.pack("<" + layout, *(value - 2 ** 32 if kind == "i" and value >= 2 ** 31 else value
                                       for kind, value in zip(layout, whole)))


@st.composite
def colmap_binary(draw):
    """Draw a cameras.bin and an images.bin with extreme numbers and strange names, or damaged."""
    model = draw(st.integers(-1, 11))
    count = len(camera_files.COLMAP_MODELS[max(model, 0) % 11][1].split())
    sizes, lens = draw(numbers([1, WIDTH, HEIGHT, 1])), draw(numbers(LENS[:count]))
    cameras = packed("Q", sizes[3]) + struct.pack("<i", 1) + packed("i", model) + packed("QQ", *sizes[1:3])
    cameras += struct.pack(f"<{count}d", *map(float, lens))
    images = struct.pack("<Q", 2)
    for _ in range(2):
        name = draw(names).encode("utf-8", "surrogatepass")
        images += struct.pack("<i7d", 1, *map(float, draw(numbers(POSE)))) + struct.pack("<i", 1) + name + b"\0"
        images += packed("Q", draw(numbers([0]))[0])
    return draw(st.one_of(st.just(cameras), damaged(cameras))), draw(st.one_of(st.just(images), damaged(images)))


def read_colmap(folder, kind, files):
    """Write the two files of a COLMAP model, of kind "bin" or "txt", and read it."""
    (folder / kind).mkdir(exist_ok=True)
    for name, content in zip(("cameras", "images"), files):
        (folder / kind / f"{name}.{kind}").write_bytes(content)
    keeps_its_promise(lambda: read_all(folder / kind, folder))


@given(colmap_binary())
def test_any_binary_colmap_model(folder, files):
    read_colmap(folder, "bin", files)


@st.composite
def colmap_text(draw):
    model, parameters = draw(st.sampled_from(camera_files.COLMAP_MODELS))
    lens = draw(numbers([1, WIDTH, HEIGHT] + LENS[:len(parameters.split())]))
    cameras = " ".join(map(str, [lens[0], model, *lens[1:]])) + "\n"
    images = "".join(" ".join(map(str, [index, *draw(numbers(POSE)), draw(numbers([1]))[0], draw(names)])) + "\n\n"
                     for index in range(2))
    return [draw(st.one_of(st.just(text), damaged(text)))
            for text in (part.encode("utf-8", "surrogatepass") for part in (cameras, images))]


@given(colmap_text())
def test_any_text_colmap_model(folder, files):
    read_colmap(folder, "txt", files)


anything = st.recursive(st.one_of(st.sampled_from(EXTREME + ["²", "1", True, None, "nan", ""]), st.text(max_size=5)),
                        lambda inner: st.one_of(st.lists(inner, max_size=4),
                                                st.dictionaries(st.text(max_size=3), inner, max_size=3)), max_leaves=6)


@st.composite
def mangled(draw, tree):
    """Draw a copy of a JSON `tree` with a few values replaced or left out."""
    if draw(st.integers(0, 24)) == 0:
        return draw(anything)
    if isinstance(tree, dict):
        return {key: draw(mangled(value)) for key, value in tree.items() if draw(st.integers(0, 40))}
    if isinstance(tree, list) and tree and all(isinstance(value, float) for value in tree):
        return draw(numbers(tree))
    return [draw(mangled(value)) for value in tree] if isinstance(tree, list) else tree


MATRIX = [[1.0, 0.0, 0.0, 0.1], [0.0, -1.0, 0.0, 0.2], [0.0, 0.0, -1.0, 3.0], [0.0, 0.0, 0.0, 1.0]]


@st.composite
def transforms(draw):
    frames = [{"file_path": draw(names), "transform_matrix": MATRIX} for _ in range(2)]
    keys = ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "w", "h", "camera_angle_x")
    values = draw(numbers(LENS[:4] + LENS[4:10] + [WIDTH, HEIGHT, 0.8]))
    left_out = draw(st.sets(st.sampled_from(keys), max_size=4))
    model = draw(st.sampled_from(["OPENCV", "OPENCV_FISHEYE", "PINHOLE", [], 1]))
    tree = {"frames": frames, "camera_model": model, **{k: v for k, v in zip(keys, values) if k not in left_out}}
    text = json.dumps(draw(mangled(tree))).encode()
    return draw(st.one_of(st.just(text), damaged(text)))


@given(transforms())
def test_any_transforms(folder, content):
    (folder / "transforms.json").write_bytes(content)
    for images in (folder, None):
        keeps_its_promise(lambda images=images: read_all(folder / "transforms.json", images))


@st.composite
def plain_cameras(draw):
    camera = {"K": [[30.0, 0.0, 12.0], [0.0, 30.0, 9.0], [0.0, 0.0, 1.0]],
              "R": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], "t": [0.0, 0.0, 3.0]}
    text = json.dumps(draw(mangled({draw(names): camera, draw(names): camera}))).encode()
    return draw(st.one_of(st.just(text), damaged(text)))


@given(plain_cameras())
def test_any_plain_cameras(folder, content):
    (folder / "cameras.json").write_bytes(content)
    keeps_its_promise(lambda: read_all(folder / "cameras.json", folder))


@st.composite
def middlebury(draw):
    usual = [30.0, 0, 12, 0, 30, 9, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 3]
    first = draw(st.sampled_from(["2", "2", "2", "2 x", "02", "²", "0", "-2", "9" * 5000, "", "2.0", "nan"]))
    lines = [first] + [" ".join(map(str, [draw(names)] + draw(numbers(usual)))) for _ in range(2)]
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    return draw(st.one_of(st.just(text), damaged(text)))


@given(middlebury())
def test_any_middlebury_cameras(folder, content):
    (folder / "any_par.txt").write_bytes(content)
    keeps_its_promise(lambda: read_all(folder / "any_par.txt", folder))


# --- evaluate.py's files ----------------------------------------------------------------------------------------------

def shapes():
    """Yield (format, contents) of small meshes and point clouds."""
    box = trimesh.creation.box()
    cloud = trimesh.Trimesh(box.vertices, vertex_normals=box.vertex_normals, process=False)
    yield from ((kind, box.export(file_type=kind)) for kind in ("ply", "obj", "stl", "glb", "off", "stl_ascii"))
    yield "ply", box.export(file_type="ply", encoding="ascii")
    yield "ply", cloud.export(file_type="ply")
    lines = [" ".join(map(str, np.concatenate(pair))) for pair in zip(cloud.vertices, cloud.vertex_normals)]
    names = "".join(f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz"))
    yield "ply", f"ply\nformat ascii 1.0\nelement vertex {len(lines)}\n{names}end_header\n" + "\n".join(lines) + "\n"


SHAPES = [(kind[:3], content if isinstance(content, bytes) else content.encode()) for kind, content in shapes()]


@st.composite
def shape_files(draw):
    """Draw (format, bytes) of a damaged mesh, or of one with extreme numbers."""
    kind, content = draw(st.sampled_from(SHAPES))
    words = content.split(b" ")
    if draw(st.booleans()) and len(words) > 5:
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(words) - 1))
            words[place] = str(draw(st.sampled_from(EXTREME))).encode() + words[place][len(words[place].strip()):]
        return kind, b" ".join(words)
    return kind, draw(damaged(content))


@given(shape_files())
def test_any_mesh(folder, file):
    kind, content = file
    path = folder / f"any.{kind}"
    path.write_bytes(content)
    shape = keeps_its_promise(lambda: meshes.load_shape(path))
    if not isinstance(shape, helper.UserError):
        points, normals = meshes.surface(shape, 100)
        assert np.isfinite(points).all() and points.shape[1:] == (3,)
        assert normals is None or np.isfinite(normals).all()


CLAIMS = [{"count": 10 ** 9}, {"count": 10 ** 30}, {"count": -1}, {"count": 1e300}, {"bufferView": None},
          {"bufferView": 99}, {"byteOffset": -8}, {"type": "MAT4"}, {"componentType": 5130}]


@given(st.lists(st.tuples(st.sampled_from(["accessors", "bufferViews", "meshes", "nodes", "buffers", "scenes"]),
                          st.one_of(st.sampled_from(CLAIMS + [{"uri": "/etc/passwd"}, {"children": [0, 0]},
                                                              {"byteLength": 10 ** 9}, {"byteStride": 1}]),
                                    st.dictionaries(st.text(max_size=5), anything, max_size=2))), max_size=3))
def test_any_glb(folder, changes):
    tree, rest = glb_parts(trimesh.creation.box().export(file_type="glb"))
    for key, change in changes:
        for entry in tree.get(key, []):
            entry.update(change)
            for name in [name for name, value in change.items() if value is None]:
                del entry[name]
    path = folder / "any.glb"
    path.write_bytes(glb(tree, rest))
    keeps_its_promise(lambda: meshes.load_shape(path))


def glb_parts(content):
    """Return the JSON tree of a GLB, and the bytes after it."""
    length, = struct.unpack_from("<I", content, 12)
    return json.loads(content[20:20 + length]), content[20 + length:]


def glb(tree, rest):
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    return struct.pack("<4sIIII", b"glTF", 2, 20 + len(text) + len(rest), len(text), 0x4E4F534A) + text + rest


def matlab(**options):
    content = io.BytesIO()
    scipy.io.savemat(content, {"P": np.arange(12.0).reshape(3, 4), "ObsMask": np.ones((4, 3, 2), np.uint8), "Res": 0.5,
                               "more": {"a": "text"}}, **options)
    return content.getvalue()


@given(st.sampled_from([matlab(), matlab(do_compression=True)]).flatmap(damaged))
def test_any_matlab_file(folder, content):
    path = folder / "any.mat"
    path.write_bytes(content)
    arrays = keeps_its_promise(lambda: meshes.read_mat(path, "P", "ObsMask"))
    assert isinstance(arrays, helper.UserError) or all(isinstance(array, np.ndarray) for array in arrays)
