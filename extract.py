"""Extract the surface of a trained scene as a mesh, by marching cubes twice.

    python extract.py --config results_scan118/default.yaml --model-load-path results_scan118/model_01999.h5

The first pass is coarse: it finds the object, drops what floats beside it, and gives its orientation. The second is
fine, on a grid in that orientation. Writes mesh.ply to the run's folder, in the frame of the unit sphere.
"""
import numpy as np
import trimesh
from skimage.measure import marching_cubes
from tqdm import tqdm

import helper
import network

SLACK = 1.5         # how much steeper than 1 the sdf may be before a block with surface in it is passed over
LEAF = 4            # blocks of the fine grid are halved down to this many points a side


def main():
    parser = helper.argument_parser("Extract the surface of a trained scene as a mesh.", model=True)
    parser.add_argument("--resolution", type=int, default=None,
                        help="marching cubes cells along the longest side, instead of the configuration's")
    args = parser.parse_args()
    if args.resolution is not None and args.resolution < 16:
        raise helper.UserError(f"--resolution must be 16 or more, not {args.resolution}")
    conf, folder = helper.open_run(args, network.parameter_shapes)
    mesh = extract(network.sdf_evaluator(), conf.extract.coarse_resolution, args.resolution or conf.extract.resolution)
    with helper.replacing(folder / "mesh.ply") as temporary:
        mesh.export(temporary)
    print(f"{folder / 'mesh.ply'}: {len(mesh.vertices)} vertices, {len(mesh.faces)} faces, "
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
    largest = mesh.submesh([part], append=True)
    largest.merge_vertices()
    # Where the sdf is 0 on a point of the grid, marching cubes makes triangles without area.
    largest.update_faces(largest.nondegenerate_faces())
    largest.remove_unreferenced_vertices()
    return largest


if __name__ == "__main__":
    helper.run(main)
