"""Extract the surface of a trained scene as a mesh, by marching cubes twice, and make an asset of it.

    python extract.py --config results_scan118/default.yaml --model-load-path results_scan118/model_01999.h5

The first pass is coarse: it finds the object, drops floating pieces, and yields the object's orientation. The second
pass is fine, on a grid in that orientation, which grows where the object reaches beyond it. Nothing is learnt outside
the unit sphere, so a surface that leaves the sphere is closed by it. The networks give every vertex its normal and its
colour. --faces makes the mesh light, --texture gives it textures, --upright stands it on the ground.
Writes mesh.ply to the run's folder, or asset.glb with --texture, in the coordinates of the unit sphere; --output and
--world change that.
"""
import argparse
import shlex
from pathlib import Path
from typing import Callable, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import trimesh
from scipy.ndimage import label
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from skimage.measure import marching_cubes
from tqdm import tqdm

import datasets
import helper
import network
from assets import appearance, baking, decimation, formats, orientation, page, photographs
from assets.decimation import is_closed
from assets.surface import Surface, cut_by_sphere, in_sphere
from config import settings
from files import writing
from metrics import meshes
from tracing.compiling import compiled, in_threads
from training import cameras, checkpoints

SLACK = 1.5         # assumed bound on the sdf's slope; a steeper sdf may lose parts that touch no other part
APART = 1e-3        # minimum |sdf| at a point of the grid, in cells; smaller values are raised to it
LEAF = 2            # blocks of the grid are halved down to this many points per side
LAYERS = 16         # of a grid's cells that a thread looks through in one turn
SHADED = 1 << 16    # vertices shaded per batch
SUFFIXES = (".ply", ".obj", ".glb", ".stl", ".html")
METRES = {"mm": 0.001, "cm": 0.01, "m": 1.0}
LIGHT = 50000       # faces of a mesh with textures, unless --faces says otherwise
NO_SURFACE = ("the sdf has no zero set in the unit sphere, so there is no surface to extract; check masks and cameras, "
              "the usual causes, in the training's renders")


class Grid(NamedTuple):
    """The points (indices * cell + low) @ axes, for indices below counts (3,). The axes (3, 3) are a rotation."""
    axes: np.ndarray
    low: np.ndarray
    counts: np.ndarray
    cell: float


class Frame(NamedTuple):
    """A scene's cameras, as far as the files need them."""
    poses: np.ndarray       # (N, 4, 4), in the unit sphere's coordinates
    scale_mat: np.ndarray   # (4, 4), from there to the world's
    view: int               # whose camera sees the object's front


def main():
    args = parse_arguments()
    check_arguments(args)
    conf, folder = checkpoints.open_run(args)
    paths = [Path(path) for path in args.output or [folder / ("asset.glb" if args.texture else "mesh.ply")]]
    frame = frame_of(args, conf, paths)
    surface = Surface(network.sdf_evaluator(), network.shader(conf.network))
    blended = appearance_of(args, conf, surface)
    mesh = extract(surface.sdf, conf.extract.coarse_resolution, args.resolution or conf.extract.resolution)
    say_cut(mesh, surface.sdf, conf.data.path)
    if args.faces or args.texture:
        mesh = light_mesh(mesh, args.faces or LIGHT, surface)
    mesh = with_colors(mesh, surface.shade, cut_by_sphere(mesh.vertices, surface.sdf))
    shape = mesh
    if args.texture:
        shape = baking.baked(mesh, args.texture, surface, look_of(args, conf, frame, mesh, surface), blended)
    closed = is_closed(mesh)
    for path in paths:
        write_file(path, shape, closed, args, frame)
        print(f"{path}: {len(mesh.vertices)} vertices, {len(mesh.faces)} faces, "
              f"{'watertight' if closed else 'not watertight'}"
              + (f", texture of {args.texture}x{args.texture}" if holds_texture(path, shape) else ""))


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = helper.argument_parser("Extract the surface of a trained scene as a mesh.", model=True)
    parser.add_argument("--resolution", type=int, default=None,
                        help="cells along the longest side, instead of the configuration's extract.resolution")
    parser.add_argument("--output", nargs="+", default=None, metavar="FILE",
                        help=f"files to write, each of the kind that its name ends in: {', '.join(SUFFIXES)}; by "
                             "default mesh.ply in the run's folder, or asset.glb with --texture")
    parser.add_argument("--faces", type=int, default=None,
                        help=f"make the mesh light: about this many faces; {LIGHT} with --texture, else all by default")
    parser.add_argument("--texture", type=int, default=None, metavar="SIDE",
                        help="give .glb, .obj and .html files textures of SIDE x SIDE texels, of colours and normals")
    parser.add_argument("--appearance", choices=("networks", "photographs"), default="networks",
                        help="the texture's colours: the means of what the networks show the cameras, or of the "
                             "photographs that see the surface best; held-out views are left aside")
    parser.add_argument("--highlights", action="store_true",
                        help="find a light whose highlights explain how the colours change with the view, and take "
                             "them off the texture; a .glb and a page add them again as the eye moves")
    parser.add_argument("--lit", action="store_true",
                        help="let viewers light a .glb; by default they show the colours, which hold the light of the "
                             "photographs, as they are")
    parser.add_argument("--upright", action="store_true",
                        help="stand the object on the ground at the origin: y is up in .glb and .obj, z in .stl, .ply")
    parser.add_argument("--world", nargs="?", const="units", default=None, choices=("units", *METRES), metavar="UNIT",
                        help="in world units, through the scene's scale_mat_0, instead of the unit sphere's. mm, cm "
                             "or m says what a world unit is; then .glb is in metres, .stl in mm")
    parser.add_argument("--unit", choices=tuple(METRES), default=None,
                        help="the unit of the files, .glb apart, where --world says what a world unit is")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for options that are out of range or do not go together, before anything is loaded."""
    if args.resolution is not None:
        settings.check_value("--resolution", args.resolution, settings.keys_of(settings.Extract)["resolution"])
    for name, value, least, most in (("--faces", args.faces, decimation.FEWEST, decimation.MOST),
                                     ("--texture", args.texture, baking.SMALLEST, baking.LARGEST)):
        if value is not None and not least <= value <= most:
            raise helper.UserError(f"{name} must be {least} to {most}, not {value}")
    for path in args.output or []:
        if Path(path).suffix.lower() not in SUFFIXES:
            raise helper.UserError(f"--output {path}: the name must end in {', '.join(SUFFIXES)}")
        writing.check_target(path)
    kinds = {Path(path).suffix.lower() for path in args.output or ["asset.glb"]}
    if args.texture and not kinds & set(formats.TEXTURED):
        raise helper.UserError(f"--texture: .ply and .stl hold no textures; name a {', '.join(formats.TEXTURED)} too")
    if args.appearance == "photographs" and not args.texture:
        raise helper.UserError("--appearance photographs colours a texture; add --texture 2048")
    if args.highlights and not (args.texture and kinds & {".glb", ".html"}):
        raise helper.UserError("--highlights need a texture, in a .glb or .html; add --texture 2048 or such a file")
    if args.highlights and args.lit:
        raise helper.UserError("--highlights brings a light of its own and --lit leaves lights to the viewer; give one")
    if args.unit and args.world not in METRES:
        raise helper.UserError("--unit needs to know what a world unit is; add --world mm, cm or m")


def frame_of(args: argparse.Namespace, conf: settings.Configuration, paths: List[Path]) -> Optional[Frame]:
    """Return the scene's Frame, or None if nothing needs one. A .glb and a texture do without a scene if it is gone.
    """
    kinds = {path.suffix.lower() for path in paths}
    needed = args.world or args.upright or args.highlights or ".html" in kinds
    if not needed and ".glb" not in kinds and not args.texture:
        return None
    try:
        poses, scale_mat = datasets.load_scene_cameras(conf.data.path, conf.data.cameras)[1:]
    except helper.UserError:
        if needed:
            raise
        return None
    poses = cameras.trained_poses(poses, args.model_load_path)
    datasets.check_views([conf.train.validation_view], len(poses), f"{args.config}: train.validation_view")
    return Frame(poses, scale_mat, conf.train.validation_view)


def appearance_of(args: argparse.Namespace, conf: settings.Configuration, surface: Surface) -> Optional[Callable]:
    """Return the appearance for baking.baked that --appearance names; None is the networks'."""
    if args.appearance == "networks":
        return None
    scene = datasets.load_scene(conf.data.path, conf.data.downscale, conf.data.cameras)
    scene = scene._replace(poses=cameras.trained_poses(scene.poses, args.model_load_path))
    views = datasets.training_views(conf.data.held_out_views, len(scene.images),
                                    f"{args.config}: data.held_out_views")
    return photographs.blended(photographs.photographs_of(scene, views, surface.sdf, conf.tracer))


def look_of(args: argparse.Namespace, conf: settings.Configuration, frame: Optional[Frame], mesh: trimesh.Trimesh,
            surface: Surface) -> Optional[appearance.Look]:
    """Return the Look of a mesh for the cameras of the trained views, and tell its light; None without cameras."""
    if frame is None:
        print(f"notice: no cameras in {conf.data.path}, so the texture's colours are those seen along the normals")
        return None
    source = f"{args.config}: data.held_out_views"
    views = datasets.training_views(conf.data.held_out_views, len(frame.poses), source)
    look, explained = appearance.look_of(mesh, surface, frame.poses[views, :3, 3], args.highlights)
    if look.light:
        print(f"highlights: one light explains {explained:.0%} of how the colours change with the view; roughness "
              f"{look.light.alpha ** 0.5:.2f}")
    elif args.highlights:
        print(f"notice: no highlights, as no light explains more than {max(explained, 0):.0%} of how the colours "
              "change with the view")
    return look


def say_cut(mesh: trimesh.Trimesh, sdf: Callable, scene_path: str) -> None:
    """Print a notice if the unit sphere closes the mesh somewhere, with its share of the area."""
    cut = cut_by_sphere(mesh.vertices, sdf)
    if cut.any():
        share = mesh.area_faces[cut[mesh.faces].all(axis=1)].sum() / mesh.area
        print("notice: the surface leaves the unit sphere, and nothing is learnt outside it; the sphere closes the "
              f"mesh there, with {share:.1%} of its area (prepare.py {shlex.quote(scene_path)} --check shows if "
              "the object reaches beyond it)")


def light_mesh(mesh: trimesh.Trimesh, faces: int, surface: Surface) -> trimesh.Trimesh:
    """Return a mesh of about that many faces, and print how far it is from the full one."""
    few = decimation.decimated(mesh, faces, surface)
    if few is mesh:
        print(f"the mesh has {len(mesh.faces)} faces, no more than the {faces} wanted, and stays as it is")
        return mesh
    distance = meshes.mesh_distances(few, mesh).chamfer
    print(f"{len(few.faces)} of {len(mesh.faces)} faces; Chamfer distance to the full mesh: {distance:.6f} of the unit "
          "sphere's radius")
    return few


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


def crossed_cells(values: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return sparse_grid's cells of values (X, Y, Z), and their corners that are inf or -inf, as flat indices.

    The values of these corners become finite, with the same signs, so that a call does not return them again.
    """
    crossed = np.zeros(values.shape, bool)
    unknown = in_threads(lambda part: look_at_layers(values, crossed, part.start, part.stop), len(values) - 1, LAYERS)
    return crossed, np.concatenate(unknown)


@compiled
def look_at_layers(values, crossed, first, end):
    """Do crossed_cells' work for the cells of the layers from first to end; returns the corners."""
    unknown, inside = [0 for _ in range(0)], np.empty(values.shape[2], np.int8)
    for i in range(first, end):
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
    return np.array(unknown)


def largest_component(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Return the connected component of a mesh with the largest area."""
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    first, others, count = faces[:, 0], faces[:, 1:], len(vertices)
    edges = coo_matrix((np.ones(others.size, np.int8), (first.repeat(2), others.ravel())), (count, count))
    number, labels = connected_components(edges, directed=False)
    if number == 1:
        return mesh
    kept = labels == np.bincount(labels[first], meshes.areas_of(vertices, faces)).argmax()
    return trimesh.Trimesh(vertices[kept], (np.cumsum(kept) - 1)[faces[kept[first]]], process=False)


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


def holds_texture(path: Path, shape: Union[trimesh.Trimesh, baking.Asset]) -> bool:
    """Return whether a file of this name holds the textures of the shape."""
    return isinstance(shape, baking.Asset) and path.suffix.lower() in formats.TEXTURED


def write_file(path: Path, shape: Union[trimesh.Trimesh, baking.Asset], closed: bool, args: argparse.Namespace,
               frame: Optional[Frame]) -> None:
    """Write a mesh or an Asset, in the unit sphere's coordinates, where and in the coordinates that args ask for.

    closed: whether the mesh is.
    """
    kind = path.suffix.lower()
    matrix = placement(kind, formats.mesh_of(shape), args, frame)
    placed = formats.moved(shape, matrix)
    unit, per_unit = "radii", 1.0
    if frame:
        unit = args.world if args.world in METRES else "units"
        per_unit = length_scale(frame.scale_mat) / length_scale(matrix)
    facts = formats.facts_of(placed, closed, unit, per_unit)
    if kind == ".html":
        writing.write_bytes(path, page.page(placed, path.stem, facts).encode(errors="replace"))
    else:
        formats.write(path, placed, facts, args.lit)


def length_scale(matrix: np.ndarray) -> float:
    """Return by what an affine matrix (4, 4) multiplies lengths, on average."""
    return float(np.cbrt(abs(np.linalg.det(matrix[:3, :3]))))


def placement(kind: str, mesh: trimesh.Trimesh, args: argparse.Namespace, frame: Optional[Frame]) -> np.ndarray:
    """Return the matrix (4, 4) from the unit sphere's coordinates to those of a file of a kind, such as ".glb".

    A page is upright in any case, in the scene's units.
    """
    matrix = frame.scale_mat if args.world and kind != ".html" else np.eye(4)
    if args.world in METRES and kind != ".html":
        unit = {".glb": "m", ".stl": args.unit or "mm"}.get(kind, args.unit or args.world)
        matrix = np.diag([METRES[args.world] / METRES[unit]] * 3 + [1.0]) @ matrix
    if kind != ".html" and not args.upright:
        return matrix
    vertical = "z" if kind in (".stl", ".ply") else "y"
    turn = matrix[:3, :3] / np.cbrt(np.linalg.det(matrix[:3, :3]))
    vertices, up = trimesh.transform_points(mesh.vertices, matrix), turn @ helper.upright(frame.poses)
    if args.upright:
        up = orientation.standing_up(vertices, up)
    rotation = orientation.turned_up(up, turn @ -frame.poses[frame.view, :3, 2], vertical)
    return (orientation.on_ground(vertices, rotation, vertical) if args.upright else rotation) @ matrix


if __name__ == "__main__":
    helper.run(main)
