"""Extract the surface of a trained scene as a mesh, by marching cubes twice.

    python extract.py --config results_scan118/default.yaml --model-load-path results_scan118/model_01999.h5

The first pass is coarse: it finds the object, drops what floats beside it, and gives its orientation. The second is
fine, on a grid in that orientation. The networks give every vertex its normal and its colour. Writes mesh.ply to the
run's folder, in the frame of the unit sphere; --output and --world say otherwise.
"""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import trimesh
import trimesh.viewer
from skimage.measure import marching_cubes
from tqdm import tqdm

import cameras
import checkpoints
import datasets
import helper
import network

SLACK = 1.5         # how much steeper than 1 the sdf may be before a block with surface in it is passed over
APART = 1e-3        # of a cell: where the sdf at a point of the grid is nearer to 0, it is moved away to that
LEAF = 2            # blocks of the fine grid are halved down to this many points a side
SHADED = 1 << 15    # vertices that get their normals and colours together
SUFFIXES = (".ply", ".obj", ".glb", ".html")


def main():
    parser = helper.argument_parser("Extract the surface of a trained scene as a mesh.", model=True)
    parser.add_argument("--resolution", type=int, default=None,
                        help="marching cubes cells along the longest side, instead of the configuration's")
    parser.add_argument("--output", nargs="+", default=None, metavar="FILE",
                        help=f"where the mesh goes, the kind by the name: {', '.join(SUFFIXES)}; by default mesh.ply "
                             "in the run's folder")
    parser.add_argument("--world", action="store_true",
                        help="in the world's units, through the scene's scale_mat_0, not the unit sphere's")
    args = parser.parse_args()
    if args.resolution is not None and args.resolution < 16:
        raise helper.UserError(f"--resolution must be 16 or more, not {args.resolution}")
    for path in args.output or []:
        if Path(path).suffix.lower() not in SUFFIXES:
            raise helper.UserError(f"--output {path}: the name must end in {', '.join(SUFFIXES)}")
    conf, folder = checkpoints.open_run(args, network.parameter_shapes)
    paths = [Path(path) for path in args.output or [folder / "mesh.ply"]]
    poses = scale_mat = None
    if args.world or any(path.suffix.lower() == ".html" for path in paths):
        poses, scale_mat = datasets.load_scene_cameras(conf.data.path, conf.data.cameras)[1:]
        poses = cameras.trained_poses(poses, args.model_load_path)
        datasets.check_views([conf.train.validation_view], len(poses), f"{args.config}: train.validation_view")

    mesh = extract(network.sdf_evaluator(), conf.extract.coarse_resolution, args.resolution or conf.extract.resolution)
    mesh = with_colors(mesh, conf.network.without)
    for path in paths:
        with helper.replacing(path) as temporary:
            if path.suffix.lower() == ".html":
                temporary.write_text(page(mesh, path.stem, poses, conf.train.validation_view), encoding="utf-8")
            else:
                write_mesh(temporary, transformed(mesh, scale_mat) if args.world else mesh)
        print(f"{path}: {len(mesh.vertices)} vertices, {len(mesh.faces)} faces, "
              f"{'watertight' if mesh.is_watertight else 'not watertight'}")


def extract(sdf, coarse_resolution, resolution):
    """The largest component of the zero set of an sdf in the unit sphere, as a trimesh.Trimesh.

    sdf: points (N, 3) float32 -> (N,) float32; the resolutions are cells along the longest side of the grid of each
    pass. Raises UserError where the sdf has no zero set in the cube [-1, 1]^3.
    """
    cell = 2.0 / coarse_resolution
    coarse = largest_component(grid_mesh(sdf, np.eye(3), np.full(3, -1.0), np.full(3, 1.0), cell))
    axes, low, high = oriented_box(coarse)
    cell_fine = (high - low + 2 * cell).max() / resolution
    return largest_component(grid_mesh(sdf, axes, low - cell, high + cell, cell_fine))


def oriented_box(mesh):
    """The principal axes of a mesh's surface, as rows of a rotation (3, 3), and its box along them, low and high (3,)."""
    middles = (mesh.triangles + np.roll(mesh.triangles, 1, axis=1)) / 2     # with equal weights, exact to second order
    weights = mesh.area_faces / mesh.area
    offsets = middles - np.einsum("f,fmx->x", weights, middles) / 3
    axes = np.linalg.eigh(np.einsum("f,fmx,fmy->xy", weights, offsets, offsets))[1].T[::-1].copy()
    axes[2] *= np.sign(np.linalg.det(axes))     # a rotation, no mirror image: the faces keep their side
    along = mesh.vertices @ axes.T
    return axes, along.min(axis=0), along.max(axis=0)


def grid_mesh(sdf, axes, low, high, cell):
    """Marching cubes of an sdf on the grid of step `cell` from `low` to `high` along `axes` (rows): a mesh in x."""
    counts = np.ceil((high - low) / cell).astype(int) + 1
    values = sparse_grid(sdf, axes, low, counts, cell)
    if not (values.min() < 0 < values.max()):
        raise helper.UserError("the sdf has no zero set in the unit sphere, so there is no surface to extract; "
                               "look at the training's renders: masks and cameras are the usual causes")
    # A surface through points of the grid would get triangles without area, or with as good as none; to drop these
    # later leaves holes.
    close = np.abs(values) < APART * cell
    values[close] = np.where(values[close] < 0, -APART * cell, APART * cell)
    vertices, faces = marching_cubes(values, 0.0)[:2]
    return trimesh.Trimesh((vertices * cell + low) @ axes, faces, process=False)


def sparse_grid(sdf, axes, low, counts, cell):
    """The sdf on a grid of `counts` points, evaluated only near the surface; elsewhere a value of its sign.

    The grid is cut into blocks, and a block is kept and halved while the sdf at its centre is less than the half
    diagonal of the block and its neighbouring points, times SLACK: only there can an edge of the grid cross the
    surface if the sdf is no steeper than SLACK.
    """
    size = LEAF * 2 ** max(int(np.log2(min(counts) / LEAF / 4)), 0)
    corners = np.stack(np.meshgrid(*(np.arange(0, n, size) for n in counts), indexing="ij"), axis=-1).reshape(-1, 3)
    values = np.full(counts, np.nan, np.float32)

    def evaluate(indices):
        out = np.empty(len(indices), np.float32)
        for start in tqdm(range(0, len(indices), 1 << 18), unit="block", leave=False, dynamic_ncols=True,
                          disable=len(indices) <= 1 << 18):
            part = slice(start, start + (1 << 18))
            out[part] = sdf(((indices[part] * cell + low) @ axes).astype(np.float32))
        return out

    while True:
        centres = evaluate(corners + (size - 1) / 2)
        near = np.abs(centres) <= SLACK * (size + 1) * cell * 3 ** 0.5 / 2
        for corner, value in zip(corners[~near], centres[~near]):
            values[tuple(slice(c, c + size) for c in corner)] = value
        corners = corners[near]
        if size <= LEAF:
            break
        size //= 2
        octants = np.stack(np.meshgrid(*[(0, size)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
        corners = (corners[:, None] + octants).reshape(-1, 3)
        corners = corners[(corners < counts).all(axis=1)]
    offsets = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    indices = (corners[:, None] + offsets).reshape(-1, 3)
    indices = indices[(indices < counts).all(axis=1)]
    values[tuple(indices.T)] = evaluate(indices)
    return values


def largest_component(mesh):
    """The connected component of a mesh with the largest area."""
    parts = trimesh.graph.connected_components(mesh.face_adjacency, nodes=np.arange(len(mesh.faces)))
    areas = mesh.area_faces
    part = max(parts, key=lambda faces: areas[faces].sum())
    return mesh.submesh([part], append=True)


# --- normals, colours, files ------------------------------------------------------------------------------------------

def with_colors(mesh, without=()):
    """A mesh with the vertex normals and vertex colours of the current parameters; without: as network.rendering.

    A normal is the direction of the sdf's gradient, a colour what the renderer shows to who looks along the normal.
    """
    points = mesh.vertices.astype(np.float32)
    rgb, normals = np.empty_like(points), np.empty_like(points)
    for start in tqdm(range(0, len(points), SHADED), desc="colours", unit="block", leave=False, dynamic_ncols=True,
                      disable=len(points) <= SHADED):
        part = slice(start, start + SHADED)
        rgb[part], normals[part] = network.shade(points[part], without=without)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=trimesh.unitize(normals),
                           vertex_colors=np.rint(255 * np.clip(rgb, 0, 1)).astype(np.uint8), process=False)


def transformed(mesh, matrix):
    """A mesh with normals and colours, moved by an affine matrix (4, 4) such as scale_mat_0; normals stay normal."""
    moved = mesh.copy()
    moved.apply_transform(matrix)       # turns the faces over where the matrix mirrors
    moved.vertex_normals = trimesh.unitize(mesh.vertex_normals @ np.linalg.inv(matrix[:3, :3]))
    return moved


def write_mesh(path, mesh):
    """Write a mesh with normals and colours as .ply, .obj or .glb, by the path's suffix."""
    if path.suffix.lower() == ".glb":
        encoded = mesh.visual.vertex_colors[:, :3] / np.float32(255)
        linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)  # glTF wants that
        mesh = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=mesh.vertex_normals, process=False,
                               vertex_attributes={"_COLOR_0": linear.astype(np.float32)})
        path.write_bytes(unlit_glb(trimesh.Scene(mesh)))
    else:
        mesh.export(str(path))


def unlit_glb(scene):
    """A trimesh.Scene as the bytes of a GLB that shows vertex colours as they are: they hold the photographs' light.

    A vertex attribute _COLOR_0, (N, 3) float32, becomes the colours: trimesh's own have 8 bits, too few for that.
    """
    def finish(tree):
        tree["materials"] = [{"extensions": {"KHR_materials_unlit": {}},
                              "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}]
        tree.setdefault("extensionsUsed", []).append("KHR_materials_unlit")
        for primitive in (primitive for mesh in tree["meshes"] for primitive in mesh["primitives"]):
            primitive["material"] = 0
            if "_COLOR_0" in primitive["attributes"]:
                primitive["attributes"]["COLOR_0"] = primitive["attributes"].pop("_COLOR_0")

    return scene.export(file_type="glb", tree_postprocessor=finish)


def page(mesh, title, poses, view):
    """A page of HTML in which the coloured mesh turns under the mouse; it holds all that it needs (trimesh's viewer).

    The mesh stands upright and is first seen from the side of the camera of `view`; poses: (N, 4, 4), all cameras'.
    """
    up = helper.upright(poses)
    right = helper.rightwards(up, -poses[view, :3, 2])
    axes = np.stack([right, up, np.cross(right, up)])       # the viewer's: y is up
    low, high = mesh.bounds
    centre, size = (low + high) / 2, np.linalg.norm(high - low) / 2
    upright = np.eye(4)
    upright[:3, :3], upright[:3, 3] = axes / size, -axes @ centre / size
    backwards = np.array([0.0, 0.3, 1.0]) / np.linalg.norm([0.0, 0.3, 1.0])
    camera = np.eye(4)
    camera[:3] = np.stack([[1.0, 0.0, 0.0], np.cross(backwards, [1.0, 0.0, 0.0]), backwards, 2.2 * backwards], axis=1)

    scene = trimesh.Scene(camera=trimesh.scene.Camera(resolution=(800, 600), fov=(56, 44)), camera_transform=camera)
    scene.add_geometry(mesh, transform=upright)
    # trimesh's function asks a scene for its camera and its GLB alone; this GLB has a material that the scene cannot.
    html = trimesh.viewer.scene_to_html(SimpleNamespace(camera=scene.camera, export=lambda file_type: unlit_glb(scene)))
    return html.replace("<title>trimesh: threejs viewer</title>", f"<title>{title}</title>")


if __name__ == "__main__":
    helper.run(main)
