"""Extract the surface of a trained scene as a mesh, by marching cubes twice.

    python extract.py --config results_scan118/default.yaml --model-load-path results_scan118/model_01999.h5

The first pass is coarse: it finds the object, drops floating pieces, and yields the object's orientation. The second
pass is fine, on a grid in that orientation, which grows where the object reaches beyond it. Nothing is learnt outside
the unit sphere, so a surface that leaves the sphere is closed by it. The networks give every vertex its normal and its
colour.
Writes mesh.ply to the run's folder, in the coordinates of the unit sphere; --output and --world change that.
"""
import argparse
import html
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple, Optional, Tuple

import numpy as np
import trimesh
import trimesh.viewer
from scipy.ndimage import label
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from skimage.measure import marching_cubes
from tqdm import tqdm

import datasets
import helper
import network
from config import settings
from files import writing
from ray_tracer import compiled
from training import cameras, checkpoints

SLACK = 1.5         # assumed bound on the sdf's slope; a steeper sdf may lose parts that touch no other part
APART = 1e-3        # minimum |sdf| at a point of the grid, in cells; smaller values are raised to it
LEAF = 2            # blocks of the grid are halved down to this many points per side
SHADED = 1 << 16    # vertices shaded per batch
SUFFIXES = (".ply", ".obj", ".glb", ".html")
NO_SURFACE = ("the sdf has no zero set in the unit sphere, so there is no surface to extract; check masks and cameras, "
              "the usual causes, in the training's renders")


class Grid(NamedTuple):
    """The points (indices * cell + low) @ axes, for indices below counts (3,). The axes (3, 3) are a rotation."""
    axes: np.ndarray
    low: np.ndarray
    counts: np.ndarray
    cell: float


def main():
    args = parse_arguments()
    check_arguments(args)
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
        print("notice: the surface leaves the unit sphere, and nothing is learnt outside it; the sphere closes the "
              f"mesh there, with {share:.1%} of its area (prepare.py {shlex.quote(conf.data.path)} --check shows if "
              "the object reaches beyond it)")
    mesh = with_colors(mesh, network.shader(conf.network), cut)
    for path in paths:
        with writing.replacing(path) as temporary:
            if path.suffix.lower() == ".html":
                temporary.write_bytes(page(mesh, path.stem, poses, conf.train.validation_view).encode(errors="replace"))
            else:
                write_mesh(temporary, transformed(mesh, scale_mat) if args.world else mesh)
        print(f"{path}: {len(mesh.vertices)} vertices, {len(mesh.faces)} faces, "
              f"{'watertight' if is_closed(mesh) else 'not watertight'}")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = helper.argument_parser("Extract the surface of a trained scene as a mesh.", model=True)
    parser.add_argument("--resolution", type=int, default=None,
                        help="cells along the longest side, instead of the configuration's extract.resolution")
    parser.add_argument("--output", nargs="+", default=None, metavar="FILE",
                        help=f"files to write, each of the kind that its name ends in: {', '.join(SUFFIXES)}; by "
                             "default mesh.ply in the run's folder")
    parser.add_argument("--world", action="store_true",
                        help="in world units, through the scene's scale_mat_0, instead of the unit sphere's")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for options that are out of range, before anything is loaded."""
    if args.resolution is not None:
        settings.check_value("--resolution", args.resolution, settings.keys_of(settings.Extract)["resolution"])
    for path in args.output or []:
        if Path(path).suffix.lower() not in SUFFIXES:
            raise helper.UserError(f"--output {path}: the name must end in {', '.join(SUFFIXES)}")
        writing.check_target(path)


def extract(sdf: Callable, coarse_resolution: int, resolution: int) -> trimesh.Trimesh:
    """Return the largest connected component of an sdf's zero set in the unit sphere.

    The resolutions are cells along the longest side of each pass's grid. Where the unit sphere cuts the shape, it
    closes the mesh. Raises UserError if the sdf has no zero set in the sphere.
    """
    inside = in_sphere(sdf)
    values, crossed, grid = coarse_grid(inside, coarse_resolution, resolution)
    coarse, cell = largest_component(surface(values, crossed, grid)), grid.cell
    if cut_by_sphere(coarse.vertices, sdf).all():
        raise helper.UserError(NO_SURFACE)
    axes, low, high = oriented_box(coarse)
    step = cell
    while True:
        cell_fine = (high - low + 2 * cell).max() / resolution
        grid = grid_over(axes, low - cell, high + cell, cell_fine)
        mesh = largest_component(surface(*sparse_grid(inside, grid), grid))
        at_low, at_high = sides_reached(mesh, grid)
        if not (at_low.any() or at_high.any()):
            return mesh
        # A part too thin for the coarse pass reaches beyond the box.
        along = thin_parts(values, cell, coarse) @ axes.T
        low = np.minimum(low - step * at_low, along.min(axis=0))
        high = np.maximum(high + step * at_high, along.max(axis=0))
        step *= 2


# --- the coarse pass --------------------------------------------------------------------------------------------------

def in_sphere(sdf: Callable) -> Callable:
    """Return the sdf of a shape's intersection with the unit sphere."""
    return lambda points: np.maximum(sdf(points), np.sqrt(np.einsum("nc,nc->n", points, points)) - 1)


def cut_by_sphere(vertices: np.ndarray, sdf: Callable) -> np.ndarray:
    """Return which vertices (V, 3) of a mesh lie on the unit sphere inside the shape that it cuts, (V,) bool."""
    height = np.linalg.norm(vertices, axis=1) - 1
    cut = height > -0.01        # a generous bound that saves most evaluations
    if cut.any():
        cut[cut] = sdf(vertices[cut].astype(np.float32)) < height[cut] - 1e-4
    return cut


def coarse_grid(sdf: Callable, coarse_resolution: int, resolution: int) -> Tuple[np.ndarray, np.ndarray, Grid]:
    """Return sparse_grid's values and cells for a grid over the cube [-1, 1]^3, and the grid.

    If the shape is so thin that no grid point lies in it, the grid is refined, at most to `resolution`.
    """
    cell = 2.0 / coarse_resolution
    while True:
        grid = grid_over(np.eye(3), np.full(3, -1.0), np.full(3, 1.0), cell)
        values, crossed = sparse_grid(sdf, grid, reach(cell))
        if values.min() < 0 or cell <= 2.0 / resolution or not (values < reach(cell)).any():
            return values, crossed, grid
        cell /= 2


def reach(cell: float) -> float:
    """Return the largest sdf possible at the grid point nearest to a surface point; cell: the grid's step."""
    return SLACK * cell * 3 ** 0.5 / 2


def thin_parts(values: np.ndarray, cell: float, mesh: trimesh.Trimesh) -> np.ndarray:
    """Return the points (P, 3) of the coarse grid near the mesh, or near a part that may be connected to it.

    Such a connection may be too thin for the grid, so every grid point that may be near the surface counts.
    values: (X, Y, Z), the grid over [-1, 1]^3; cell: its step; mesh: a component of its surface.
    """
    labels = label(values < reach(cell), np.ones((3, 3, 3)))[0]
    near = labels[tuple(np.rint((mesh.vertices + 1) / cell).astype(int).T)]
    return np.argwhere(np.isin(labels, near[near > 0])) * cell - 1


# --- grids and meshes -------------------------------------------------------------------------------------------------

def grid_over(axes: np.ndarray, low: np.ndarray, high: np.ndarray, cell: float) -> Grid:
    """Return a grid from low to at least high, (3,) each, along axes (3, 3)."""
    return Grid(axes, low, np.ceil((high - low) / cell).astype(int) + 1, cell)


def sides_reached(mesh: trimesh.Trimesh, grid: Grid) -> Tuple[np.ndarray, np.ndarray]:
    """Return at which low and at which high sides of its grid a mesh ends, (3,) bool each."""
    along = mesh.vertices @ grid.axes.T
    last = grid.low + (grid.counts - 1) * grid.cell
    return along.min(axis=0) < grid.low + 1e-4 * grid.cell, along.max(axis=0) > last - 1e-4 * grid.cell


def oriented_box(mesh: trimesh.Trimesh) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the principal axes of a mesh's surface, rows of a rotation (3, 3), and its box along them, low, high (3,).
    """
    # Equal weights at the middles of the edges integrate second moments exactly.
    middles = (mesh.triangles + np.roll(mesh.triangles, 1, axis=1)) / 2
    weights = mesh.area_faces / mesh.area
    offsets = middles - np.einsum("f,fmx->x", weights, middles) / 3
    axes = np.linalg.eigh(np.einsum("f,fmx,fmy->xy", weights, offsets, offsets))[1].T[::-1].copy()
    axes[2] *= np.sign(np.linalg.det(axes))     # a rotation, not a reflection: faces keep their orientation
    along = mesh.vertices @ axes.T
    return axes, along.min(axis=0), along.max(axis=0)


def surface(values: np.ndarray, crossed: np.ndarray, grid: Grid) -> trimesh.Trimesh:
    """Return the zero set of sparse_grid's values as a mesh, by marching cubes.

    Raises UserError if it crosses no cell.
    """
    if not crossed.any():
        raise helper.UserError(NO_SURFACE)
    vertices, faces = marching_cubes(values, 0.0, mask=crossed)[:2]
    return trimesh.Trimesh((vertices * grid.cell + grid.low) @ grid.axes, faces, process=False)


def sparse_grid(sdf: Callable, grid: Grid, exact: float = 0.0) -> Tuple[np.ndarray, np.ndarray]:
    """Return the sdf on a grid where it matters, and the cells that the surface crosses.

    The sdf (X, Y, Z) float32 is known at all corners of these cells and where |sdf| <= exact; elsewhere it is inf or
    -inf, by its sign. The cells (X, Y, Z) bool are marked at their last corners, as marching_cubes wants its mask.

    First come the signs. The grid is cut into blocks. A block is halved while the sdf at its centre, with a slope of at
    most SLACK, leaves a sign in it open; the points of the last blocks are evaluated. Then come the corners of crossed
    cells that are still unknown, until none is. If the slope exceeds SLACK, these correct wrong signs beside a surface.
    """
    def sdf_at(indices):
        out = np.empty(len(indices), np.float32)
        for start in tqdm(range(0, len(indices), 1 << 18), unit="block", leave=False, dynamic_ncols=True,
                          disable=len(indices) <= 1 << 18):
            part = slice(start, start + (1 << 18))
            out[part] = sdf(((indices[part] * grid.cell + grid.low) @ grid.axes).astype(np.float32))
        return out

    def evaluate(indices):
        # A surface through grid points would have triangles of no or almost no area; dropping these leaves holes.
        out, least = sdf_at(indices), np.float32(APART * grid.cell)
        values[tuple(indices.T)] = np.where(out < 0, np.minimum(out, -least), np.maximum(out, least))

    values = np.empty(grid.counts, np.float32)
    part = LEAF * 2 ** max(int(np.log2(min(grid.counts) / LEAF / 4)), 0)
    blocks = np.argwhere(np.ones(-(-grid.counts // part), bool)).astype(np.int32, "C") * part
    while part > 1:
        size, part = part, part // 2 if part > LEAF else 1
        centres = sdf_at(blocks + (size - 1) / 2)
        unclear = np.abs(centres) <= exact + SLACK * grid.cell * 3 ** 0.5 / 2 * (size - 1)
        blocks = divided(values, blocks, np.where(unclear, 0, np.copysign(np.float32(np.inf), centres)), size, part)
    evaluate(blocks)
    while True:
        crossed, unknown = crossed_cells(values)
        if not len(unknown):
            return values, crossed
        evaluate(np.stack(np.unravel_index(unknown, values.shape), axis=1))


@compiled
def divided(values, blocks, signs, size, part):
    """Set the values of each block (N, 3) of `size` points per side to its sign (N,), inf or -inf; divide those of 0.

    A block is named by its first point. Returns the blocks (M, 3) of `part` points per side.
    """
    parts, last = np.empty((np.sum(signs == 0) * (size // part) ** 3, 3), np.int32), 0
    for n in range(len(blocks)):
        x, y, z = blocks[n]
        if signs[n] != 0:
            values[x:x + size, y:y + size, z:z + size] = signs[n]
            continue
        for i in range(x, min(x + size, values.shape[0]), part):
            for j in range(y, min(y + size, values.shape[1]), part):
                for k in range(z, min(z + size, values.shape[2]), part):
                    parts[last] = i, j, k
                    last += 1
    return parts[:last]


@compiled
def crossed_cells(values):
    """Return sparse_grid's cells of values (X, Y, Z), and their corners that are inf or -inf, as flat indices.

    The values of these corners become finite, with the same signs, so that each is returned once.
    """
    crossed, unknown = np.zeros(values.shape, np.bool_), [0 for _ in range(0)]
    inside = np.empty(values.shape[2], np.int8)
    for i in range(values.shape[0] - 1):
        for j in range(values.shape[1] - 1):
            a, b, c, d = values[i, j], values[i, j + 1], values[i + 1, j], values[i + 1, j + 1]
            for k in range(len(inside)):
                inside[k] = (a[k] < 0) + (b[k] < 0) + (c[k] < 0) + (d[k] < 0)
            for k in range(1, len(inside)):
                if 0 < inside[k - 1] + inside[k] < 8:
                    crossed[i + 1, j + 1, k] = True
                    for corner in np.ndindex((2, 2, 2)):
                        x, y, z = i + corner[0], j + corner[1], k - corner[2]
                        if np.isinf(values[x, y, z]):
                            values[x, y, z] = np.copysign(1.0, values[x, y, z])
                            unknown.append((x * values.shape[1] + y) * values.shape[2] + z)
    return crossed, np.array(unknown)


def largest_component(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Return the connected component of a mesh with the largest area."""
    first, others, count = mesh.faces[:, 0], mesh.faces[:, 1:], len(mesh.vertices)
    edges = coo_matrix((np.ones(others.size, np.int8), (first.repeat(2), others.ravel())), (count, count))
    number, labels = connected_components(edges, directed=False)
    if number == 1:
        return mesh
    kept = labels == np.bincount(labels[first], mesh.area_faces).argmax()
    return trimesh.Trimesh(mesh.vertices[kept], (np.cumsum(kept) - 1)[mesh.faces[kept[first]]], process=False)


def is_closed(mesh: trimesh.Trimesh) -> bool:
    """Return whether every edge of a mesh has two faces, as its is_watertight does in far more time."""
    ends = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    edges = np.sort(ends[:, 0] * len(mesh.vertices) + ends[:, 1])
    return len(edges) % 2 == 0 and (edges[::2] == edges[1::2]).all() and (edges[2::2] != edges[1:-1:2]).all()


# --- normals, colours, files ------------------------------------------------------------------------------------------

def with_colors(mesh: trimesh.Trimesh, shade: Callable, cut: Optional[np.ndarray] = None) -> trimesh.Trimesh:
    """Return a mesh with vertex normals and vertex colours from `shade`, such as network.shader's.

    A normal is the direction of the sdf's gradient. A colour is the renderer's for a view along the normal. The
    vertices `cut` (V,) bool, where the unit sphere cuts the shape, get the sphere's normals.
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


def transformed(mesh: trimesh.Trimesh, matrix: np.ndarray) -> trimesh.Trimesh:
    """Return a mesh with normals and colours, moved by an affine matrix (4, 4) such as scale_mat_0.

    Normals move by the inverse transpose and are normalised.
    """
    normals = trimesh.unitize(mesh.vertex_normals @ np.linalg.inv(matrix[:3, :3]))
    faces = mesh.faces[:, ::-1] if np.linalg.det(matrix[:3, :3]) < 0 else mesh.faces     # a reflection turns them over
    return trimesh.Trimesh(trimesh.transform_points(mesh.vertices, matrix), faces, vertex_normals=normals,
                           vertex_colors=mesh.visual.vertex_colors, process=False)


def write_mesh(path: Path, mesh: trimesh.Trimesh) -> None:
    """Write a mesh with normals and colours as .ply, .obj or .glb, by the path's suffix."""
    if path.suffix.lower() == ".glb":
        encoded = mesh.visual.vertex_colors[:, :3] / np.float32(255)
        # glTF's vertex colours are linear, not sRGB.
        linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
        mesh = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=mesh.vertex_normals, process=False,
                               vertex_attributes={"_COLOR_0": linear.astype(np.float32)})
        path.write_bytes(unlit_glb(trimesh.Scene(mesh)))
    else:
        mesh.export(str(path))


def unlit_glb(scene: trimesh.Scene) -> bytes:
    """Return a scene as a GLB that shows vertex colours without lighting, since they include the photographs' light.

    A vertex attribute _COLOR_0, (N, 3) float32, becomes the colours: linear ones need more than trimesh's 8 bits.
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


def page(mesh: trimesh.Trimesh, title: str, poses: np.ndarray, view: int) -> str:
    """Return a self-contained HTML page in which the mouse turns the coloured mesh, with trimesh's viewer.

    The mesh stands upright and is first seen from the side of the camera of `view`. poses: (N, 4, 4), of all cameras.
    """
    up = helper.upright(poses)
    right = helper.rightwards(up, -poses[view, :3, 2])
    axes = np.stack([right, up, np.cross(right, up)])       # of the viewer, where y is up
    low, high = mesh.bounds
    centre, size = (low + high) / 2, np.linalg.norm(high - low) / 2
    upright = np.eye(4)
    upright[:3, :3], upright[:3, 3] = axes / size, -axes @ centre / size
    backwards = np.array([0.0, 0.3, 1.0]) / np.linalg.norm([0.0, 0.3, 1.0])
    camera = np.eye(4)
    camera[:3] = np.stack([[1.0, 0.0, 0.0], np.cross(backwards, [1.0, 0.0, 0.0]), backwards, 2.2 * backwards], axis=1)

    scene = trimesh.Scene(camera=trimesh.scene.Camera(resolution=(800, 600), fov=(56, 44)), camera_transform=camera)
    scene.add_geometry(mesh, transform=upright)
    # scene_to_html takes only the camera and the GLB from its scene. So it gets a GLB with the unlit material, which a
    # trimesh.Scene cannot export.
    page = trimesh.viewer.scene_to_html(SimpleNamespace(camera=scene.camera, export=lambda file_type: unlit_glb(scene)))
    return page.replace("<title>trimesh: threejs viewer</title>", f"<title>{html.escape(title)}</title>")


if __name__ == "__main__":
    helper.run(main)
