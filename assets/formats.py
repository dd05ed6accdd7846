"""Meshes as files: GLB, OBJ with MTL and PNG, STL and PLY, with textures or with colours at the vertices."""
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple, Union

import cv2
import numpy as np
import trimesh

import helper
from assets import atlas as atlases
from assets.baking import Asset, triple
from assets.highlights import REFLECTED, Light
from files import writing
from tracing.compiling import compiled

TEXTURED = (".glb", ".obj", ".html")        # the kinds that hold textures
GENERATOR = "IDR in nnabla, extract.py"
FLOAT, UNSIGNED = 5126, 5125                # glTF's component types
VERTICES, INDICES = 34962, 34963            # and its targets of buffer views
SAMPLER = {"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}    # linear, mipmaps, clamped
UNLIT = "KHR_materials_unlit"
SPECULAR, LIGHTS = "KHR_materials_specular", "KHR_lights_punctual"
USUAL = 0.04        # share of light that a dielectric of KHR_materials_specular reflects frontally


class Facts(NamedTuple):
    """What a page says of a mesh."""
    faces: int
    vertices: int
    watertight: bool
    volume: Optional[float]     # in units cubed; None unless watertight
    extent: List[float]         # three lengths in units, along the file's axes
    unit: str                   # such as "world units", "m"
    per_unit: float             # the file's lengths times this are in units


def mesh_of(shape: Union[trimesh.Trimesh, Asset]) -> trimesh.Trimesh:
    """Return the mesh of an Asset, or a mesh itself."""
    return shape.mesh if isinstance(shape, Asset) else shape


def facts_of(shape: Union[trimesh.Trimesh, Asset], closed: bool, unit: str, per_unit: float) -> Facts:
    """Return the Facts of a mesh or an Asset; unit: a name, and the mesh's lengths times per_unit are in it."""
    mesh = mesh_of(shape)
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)     # trimesh would hash them
    volume = enclosed(vertices, faces) * per_unit ** 3 if closed else None
    return Facts(len(faces), len(vertices), bool(closed), volume, (np.ptp(vertices, axis=0) * per_unit).tolist(), unit,
                 float(per_unit))


@compiled
def enclosed(vertices, faces):
    """Return the volume in a closed mesh of vertices (V, 3) and faces (F, 3), as trimesh does in far more time.
    """
    total = 0.0
    for face in range(len(faces)):
        total += triple(vertices[faces[face, 0]], vertices[faces[face, 1]], vertices[faces[face, 2]])
    return total / 6


# --- moving -----------------------------------------------------------------------------------------------------------

def transformed(mesh: trimesh.Trimesh, matrix: np.ndarray) -> trimesh.Trimesh:
    """Return a mesh with normals and colours, moved by an affine matrix (4, 4) such as scale_mat_0.

    Normals move by the inverse transpose and are normalised.
    """
    normals = trimesh.unitize(mesh.vertex_normals @ np.linalg.inv(matrix[:3, :3]))
    faces = mesh.faces[:, ::-1] if np.linalg.det(matrix[:3, :3]) < 0 else mesh.faces     # a reflection turns them over
    return trimesh.Trimesh(trimesh.transform_points(mesh.vertices, matrix), faces, vertex_normals=normals,
                           vertex_colors=mesh.visual.vertex_colors, process=False)


def moved(shape: Union[trimesh.Trimesh, Asset], matrix: np.ndarray) -> Union[trimesh.Trimesh, Asset]:
    """Return a mesh or an Asset moved by a similarity (4, 4); the normal map, in tangent space, stays as it is."""
    if np.array_equal(matrix, np.eye(4)):
        return shape        # to the last bit
    if not isinstance(shape, Asset):
        return transformed(shape, matrix)
    faces = shape.atlas.faces[:, ::-1] if np.linalg.det(matrix[:3, :3]) < 0 else shape.atlas.faces
    light = shape.light and shape.light._replace(direction=helper.unit(matrix[:3, :3] @ shape.light.direction))
    return shape._replace(mesh=transformed(shape.mesh, matrix), atlas=shape.atlas._replace(faces=faces), light=light)


# --- files ------------------------------------------------------------------------------------------------------------

def write(path: Path, shape: Union[trimesh.Trimesh, Asset], facts: Facts, lit: bool = False) -> List[Path]:
    """Write a mesh or an Asset as .glb, .obj, .stl or .ply, by the path's suffix, and return the files.

    PLY and STL hold no textures: a PLY has the vertices' colours. lit: a GLB is lit by the viewer, with the normal map.
    All files are replaced, or, if one cannot be written, none.
    """
    kind, mesh = path.suffix.lower(), mesh_of(shape)
    if kind == ".glb":
        content = textured_glb(shape, facts, lit) if isinstance(shape, Asset) else colored_glb(mesh, facts, lit)
        contents = {path: content}
    elif kind == ".obj" and isinstance(shape, Asset):
        contents = textured_obj(path, shape)
    else:
        plain = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False) if kind == ".stl" else mesh
        content = plain.export(file_type=kind[1:])
        contents = {path: content.encode() if isinstance(content, str) else content}
    write_all(contents)
    return list(contents)


def write_all(contents: Dict[Path, bytes]) -> None:
    """Write {path: content}; the files are replaced only when all are written, the first one last."""
    with ExitStack() as stack:
        for path, content in contents.items():
            temporary = stack.enter_context(writing.replacing(path))
            with writing.writing(path):     # names this file, not the one that is open longest
                temporary.write_bytes(content)


# --- GLB --------------------------------------------------------------------------------------------------------------

def colored_glb(mesh: trimesh.Trimesh, facts: Facts, lit: bool = False) -> bytes:
    """Return a mesh with vertex colours as a GLB."""
    encoded = mesh.visual.vertex_colors[:, :3] / np.float32(255)
    # glTF's vertex colours are linear, not sRGB.
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    parts = {"POSITION": mesh.vertices, "NORMAL": mesh.vertex_normals, "COLOR_0": linear}
    return glb(parts, mesh.faces, {}, glb_tree(facts, lit, {}))


def textured_glb(asset: Asset, facts: Facts, lit: bool = False, quality: Optional[int] = None) -> bytes:
    """Return an Asset as a GLB. quality: of JPEG, for textures a few times as small; None writes PNG.

    The material is unlit unless `lit`, since the colours hold the light of the photographs. A viewer that does not know
    KHR_materials_unlit lights it. With a light of its own, the asset shines in its colours and reflects that light.
    """
    mesh, atlas, glossy = asset.mesh, asset.atlas, asset.light is not None and not lit
    parts = {"POSITION": mesh.vertices[atlas.vertices], "NORMAL": mesh.vertex_normals[atlas.vertices],
             "TANGENT": atlases.tangents_of(mesh, atlas), "TEXCOORD_0": atlas.uv}
    colors = {"below_highlights": asset.below} if glossy else {"base_color": asset.base_color}
    images = encoded_images({**colors, "normal": asset.normal_map}, quality)
    tree = glossy_tree(facts, asset.light) if glossy else glb_tree(facts, lit, {"baseColorTexture": {"index": 0}})
    tree["materials"][0]["normalTexture"] = {"index": 1}
    tree["samplers"] = [SAMPLER]
    tree["textures"] = [{"source": number, "sampler": 0} for number in range(len(images))]
    return glb(parts, atlas.faces, images, tree)


def glb_tree(facts: Facts, lit: bool, base_color: dict) -> dict:
    """Return glTF's JSON tree of one mesh with one material, without its data."""
    material = {"name": "surface",
                "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0, **base_color}}
    tree = {"asset": {"version": "2.0", "generator": GENERATOR, "extras": facts._asdict()}, "scene": 0,
            "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0, "name": "object"}], "materials": [material]}
    if not lit:
        material["extensions"] = {UNLIT: {}}
        tree["extensionsUsed"] = [UNLIT]
    return tree


def glossy_tree(facts: Facts, light: Light) -> dict:
    """Return the JSON tree of a mesh that shines in the colours of texture 0, and reflects a light and nothing else."""
    tree = glb_tree(facts, True, {"baseColorFactor": [0.0, 0.0, 0.0, 1.0]})
    material = tree["materials"][0]
    material["pbrMetallicRoughness"]["roughnessFactor"] = float(np.sqrt(light.alpha))
    # The same share at any angle: a colour of 1 / USUAL makes the frontal share that of the flattest view.
    material.update(emissiveFactor=[1.0, 1.0, 1.0], emissiveTexture={"index": 0}, extensions={
        SPECULAR: {"specularFactor": REFLECTED, "specularColorFactor": [1 / USUAL] * 3}})
    intensity = float(light.color.max())
    turn = trimesh.geometry.align_vectors([0, 0, 1], light.direction)       # a light shines along its node's -z
    w, x, y, z = trimesh.transformations.quaternion_from_matrix(turn)
    tree["nodes"].append({"name": "light", "rotation": [float(value) for value in (x, y, z, w)],
                          "extensions": {LIGHTS: {"light": 0}}})
    tree["scenes"][0]["nodes"].append(1)
    tree["extensions"] = {LIGHTS: {"lights": [{"type": "directional", "intensity": intensity,
                                               "color": (light.color / max(intensity, 1e-12)).tolist()}]}}
    tree["extensionsUsed"] = [SPECULAR, LIGHTS]
    return tree


def encoded_images(images: Dict[str, np.ndarray], quality: Optional[int]) -> Dict[str, Tuple[str, bytes]]:
    """Return encoded_image of each image, computed in parallel."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(images, pool.map(lambda image: encoded_image(image, quality), images.values())))


def encoded_image(image: np.ndarray, quality: Optional[int]) -> Tuple[str, bytes]:
    """Return the MIME type and the bytes of an image (H, W, 3) uint8, as PNG, or as JPEG of a quality of 1 to 100."""
    if quality is None:
        return "image/png", cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 4])[1].tobytes()
    how = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return "image/jpeg", cv2.imencode(".jpg", image[..., ::-1], how)[1].tobytes()


def glb(parts: Dict[str, np.ndarray], faces: np.ndarray, images: Dict[str, Tuple[str, bytes]], tree: dict) -> bytes:
    """Return a GLB of one mesh: the tree with accessors, buffer views and images added, and the data.

    parts: {attribute: (W, C)}, written as float32; faces: (F, 3); images: {name: (MIME type, bytes)}.
    Source: the glTF 2.0 specification.
    """
    data, views, accessors = bytearray(), [], []

    def add(content, **view):
        data.extend(b"\0" * (-len(data) % 4))
        views.append({"buffer": 0, "byteOffset": len(data), "byteLength": len(content), **view})
        data.extend(content)
        return len(views) - 1

    def accessor(array, kind, component, target):
        accessors.append({"bufferView": add(array.tobytes(), target=target), "componentType": component,
                          "count": len(array), "type": kind})
        return len(accessors) - 1

    attributes = {}
    for name, values in parts.items():
        values = np.ascontiguousarray(values, np.float32)
        attributes[name] = accessor(values, f"VEC{values.shape[1]}", FLOAT, VERTICES)
        if name == "POSITION":
            accessors[-1].update(min=values.min(axis=0).tolist(), max=values.max(axis=0).tolist())
    indices = accessor(np.ascontiguousarray(faces, np.uint32).ravel(), "SCALAR", UNSIGNED, INDICES)
    tree = {**tree, "meshes": [{"primitives": [{"attributes": attributes, "indices": indices, "material": 0}]}]}
    if images:
        tree["images"] = [{"name": name, "bufferView": add(content), "mimeType": mime}
                          for name, (mime, content) in images.items()]
    data.extend(b"\0" * (-len(data) % 4))
    text = json.dumps({**tree, "accessors": accessors, "bufferViews": views,
                       "buffers": [{"byteLength": len(data)}]}).encode()
    text += b" " * (-len(text) % 4)
    chunks = b"".join(struct.pack("<I4s", len(chunk), kind) + chunk
                      for kind, chunk in ((b"JSON", text), (b"BIN\0", bytes(data))))
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


# --- OBJ --------------------------------------------------------------------------------------------------------------

def textured_obj(path: Path, asset: Asset) -> Dict[Path, bytes]:
    """Return {file: content} of an Asset as OBJ: the mesh, its material (MTL) and the two textures (PNG).

    The OBJ comes first. Vertices at seams are not doubled, so a closed mesh stays closed.
    """
    mesh, atlas = asset.mesh, asset.atlas
    material, color, normal = (path.with_name(path.stem + ending) for ending in (".mtl", ".png", "_normal.png"))
    uv = atlas.uv * [1, -1] + [0, 1]    # v goes up in OBJ
    corners = np.stack([mesh.faces, atlas.faces, mesh.faces], axis=2).reshape(-1, 9) + 1
    text = "".join([f"# {GENERATOR}\nmtllib {material.name}\nusemtl surface\n",
                    rows("v %.7g %.7g %.7g\n", mesh.vertices), rows("vt %.6f %.6f\n", uv),
                    rows("vn %.5f %.5f %.5f\n", mesh.vertex_normals), rows("f %d/%d/%d %d/%d/%d %d/%d/%d\n", corners)])
    words = f"newmtl surface\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {color.name}\nnorm {normal.name}\n"
    images = encoded_images({color: asset.base_color, normal: asset.normal_map}, None)
    return {path: text.encode(errors="replace"), material: words.encode(errors="replace"),
            color: images[color][1], normal: images[normal][1]}


def rows(form: str, values: np.ndarray) -> str:
    """Return the rows of an array (N, C) in a format of C numbers each."""
    return (form * len(values)) % tuple(values.ravel().tolist())
