"""Extract the surface of a trained scene as a mesh, by marching cubes twice.

    python extract.py --config results_scan118/default.yaml --model-load-path results_scan118/model_01999.h5

The first pass is coarse: it finds the object, drops what floats beside it, and gives its orientation. The second is
fine, on a grid in that orientation, which grows where the object goes on beyond it. Outside the unit sphere nothing is
learnt: a surface that leaves it is closed by the sphere. The networks give every vertex its normal and its colour.
Writes mesh.ply to the run's folder, in the frame of the unit sphere; --output and --world say otherwise.
"""
import html
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import trimesh
import trimesh.viewer
from scipy.ndimage import label
from skimage.measure import marching_cubes
from tqdm import tqdm

import datasets
import helper
import network
from files import writing
from training import cameras, checkpoints

SLACK = 1.5         # how much steeper than 1 the sdf may be before a block with surface in it is passed over
APART = 1e-3        # of a cell: where the sdf at a point of the grid is nearer to 0, it is moved away to that
LEAF = 2            # blocks of the fine grid are halved down to this many points a side
SHADED = 1 << 15    # vertices that get their normals and colours together
SUFFIXES = (".ply", ".obj", ".glb", ".html")
NO_SURFACE = ("the sdf has no zero set in the unit sphere, so there is no surface to extract; look at the training's "
              "renders: masks and cameras are the usual causes")


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
        writing.check_target(path)
    conf, folder = checkpoints.open_run(args)
    paths = [Path(path) for path in args.output or [folder / "mesh.ply"]]
    poses = scale_mat = None
    if args.world or any(path.suffix.lower() == ".html" for path in paths):
        poses, scale_mat = datasets.load_scene_cameras(conf.data.path, conf.data.cameras)[1:]
        poses = cameras.trained_poses(poses, args.model_load_path)
        datasets.check_views([conf.train.validation_view], len(poses), f"{args.config}: train.validation_view")

    sdf = network.sdf_evaluator()
    mesh = extract(sdf, conf.extract.coarse_resolution, args.resolution or conf.extract.resolution)
    cut = cut_by_sphere(mesh.vertices, sdf)
    if cut.any():
        share = mesh.area_faces[cut[mesh.faces].all(axis=1)].sum() / mesh.area
        print("notice: the surface leaves the unit sphere, outside of which nothing is learnt; the sphere closes the "
              f"mesh there, with {share:.1%} of its area (prepare.py {shlex.quote(conf.data.path)} --check tells of an "
              "object that reaches beyond it)")
    mesh = with_colors(mesh, network.shader(conf.network), cut)
    for path in paths:
        with writing.replacing(path) as temporary:
            if path.suffix.lower() == ".html":
                temporary.write_bytes(page(mesh, path.stem, poses, conf.train.validation_view).encode(errors="replace"))
            else:
                write_mesh(temporary, transformed(mesh, scale_mat) if args.world else mesh)
        print(f"{path}: {len(mesh.vertices)} vertices, {len(mesh.faces)} faces, "
              f"{'watertight' if mesh.is_watertight else 'not watertight'}")


def extract(sdf, coarse_resolution, resolution):
    """The largest component of the zero set of an sdf in the unit sphere, as a trimesh.Trimesh.

    sdf: points (N, 3) float32 -> (N,) float32; the resolutions are cells along the longest side of the grid of each
    pass. Where the unit sphere cuts the shape, it closes the mesh. Raises UserError where the sdf has no zero set in
    the sphere.
    """
    inside = in_sphere(sdf)
    values, cell = coarse_grid(inside, coarse_resolution, resolution)
    coarse = largest_component(surface(values, np.eye(3), np.full(3, -1.0), cell))
    if cut_by_sphere(coarse.vertices, sdf).all():
        raise helper.UserError(NO_SURFACE)
    axes, low, high = oriented_box(coarse)
    step = cell
    while True:
        cell_fine = (high - low + 2 * cell).max() / resolution
        mesh = largest_component(grid_mesh(inside, axes, low - cell, high + cell, cell_fine))
        at_low, at_high = sides_reached(mesh, axes, low - cell, high + cell, cell_fine)
        if not (at_low.any() or at_high.any()):
            return mesh
        # A part that is too thin for the coarse pass goes on beyond the box.
        along = thin_parts(values, cell, coarse) @ axes.T
        low = np.minimum(low - step * at_low, along.min(axis=0))
        high = np.maximum(high + step * at_high, along.max(axis=0))
        step *= 2


def in_sphere(sdf):
    """The sdf of the part of a shape that is in the unit sphere."""
    return lambda points: np.maximum(sdf(points), np.linalg.norm(points, axis=1) - 1)


def cut_by_sphere(vertices, sdf):
    """Which vertices (V, 3) of a mesh are on the unit sphere and inside the shape that it cuts: (V,) bool."""
    height = np.linalg.norm(vertices, axis=1) - 1
    cut = height > -0.01        # those of the cut are nearer still; most other vertices need no sdf
    if cut.any():
        cut[cut] = sdf(vertices[cut].astype(np.float32)) < height[cut] - 1e-4
    return cut


def coarse_grid(sdf, coarse_resolution, resolution):
    """The sdf on a grid over the cube [-1, 1]^3, as sparse_grid, and the grid's step.

    Where a shape is so thin that no point of the grid is in it, the grid is made finer, up to `resolution`.
    """
    cell = 2.0 / coarse_resolution
    while True:
        values = grid_values(sdf, np.eye(3), np.full(3, -1.0), np.full(3, 1.0), cell)
        if values.min() < 0 or cell <= 2.0 / resolution or not (values < reach(cell)).any():
            return values, cell
        cell /= 2


def reach(cell):
    """The most that the sdf may be at the point of a grid that is nearest to a point of the surface."""
    return SLACK * cell * 3 ** 0.5 / 2


def thin_parts(values, cell, mesh):
    """The points (P, 3) of the coarse grid near a mesh of it and near all that may be connected to the mesh between the
    grid's points."""
    labels = label(values < reach(cell), np.ones((3, 3, 3)))[0]
    near = labels[tuple(np.rint((mesh.vertices + 1) / cell).astype(int).T)]
    return np.argwhere(np.isin(labels, near[near > 0])) * cell - 1


def sides_reached(mesh, axes, low, high, cell):
    """At which sides of its grid a mesh ends: those at low and those at high, (3,) bool each. As grid_mesh."""
    along = mesh.vertices @ axes.T
    last = low + np.ceil((high - low) / cell) * cell
    return along.min(axis=0) < low + 1e-4 * cell, along.max(axis=0) > last - 1e-4 * cell


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
    return surface(grid_values(sdf, axes, low, high, cell), axes, low, cell)


def grid_values(sdf, axes, low, high, cell):
    """The sdf on that grid, as sparse_grid."""
    return sparse_grid(sdf, axes, low, np.ceil((high - low) / cell).astype(int) + 1, cell)


def surface(values, axes, low, cell):
    """Marching cubes of the values of a grid, of which those near 0 are changed: a mesh in x. As grid_mesh."""
    if not (values.min() < 0 < values.max()):
        raise helper.UserError(NO_SURFACE)
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

def with_colors(mesh, shade, cut=None):
    """A mesh with vertex normals and vertex colours from `shade`, which network.shader gives.

    A normal is the direction of the sdf's gradient, a colour what the renderer shows to who looks along the normal. The
    vertices of `cut` (V,) bool, where the unit sphere cuts the shape, get the sphere's normals.
    """
    points = mesh.vertices.astype(np.float32)
    rgb, normals = np.empty_like(points), np.empty_like(points)
    for start in tqdm(range(0, len(points), SHADED), desc="colours", unit="block", leave=False, dynamic_ncols=True,
                      disable=len(points) <= SHADED):
        part = slice(start, start + SHADED)
        rgb[part], normals[part] = shade(points[part])
    if cut is not None:
        normals[cut] = points[cut]
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
    page = trimesh.viewer.scene_to_html(SimpleNamespace(camera=scene.camera, export=lambda file_type: unlit_glb(scene)))
    return page.replace("<title>trimesh: threejs viewer</title>", f"<title>{html.escape(title)}</title>")


if __name__ == "__main__":
    helper.run(main)
