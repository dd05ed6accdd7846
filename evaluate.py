"""Measure a trained scene: PSNR of every view inside its mask and over all views; the Chamfer distance of a mesh.

    python evaluate.py --config results_scan118/default.yaml --model-load-path results_scan118/model_01999.h5

The table goes to the screen, the numbers to nnabla's monitors in the run's folder.
"""
from collections import namedtuple
from pathlib import Path

import numpy as np
from nnabla.monitor import Monitor, MonitorSeries
from scipy.spatial import cKDTree
from tqdm import tqdm

import datasets
import helper
import network
import synthesize

SURFACE_SAMPLES = 200000    # points taken of a mesh for the Chamfer distance

Chamfer = namedtuple("Chamfer", "accuracy completeness chamfer")


def main():
    parser = helper.argument_parser("Measure a trained scene.", model=True)
    parser.add_argument("--views", nargs="+", default=["all"], metavar="VIEW",
                        help="indices of the views to measure, or all")
    parser.add_argument("--mesh", help="a mesh of extract.py, to compare with --ground-truth")
    parser.add_argument("--ground-truth", help="a mesh or point cloud of the true surface, in the mesh's units")
    args = parser.parse_args()
    if bool(args.mesh) != bool(args.ground_truth):
        raise helper.UserError("--mesh and --ground-truth go together: the one is compared with the other")
    truth = load_points(args.ground_truth) if args.mesh else None
    mesh = load_points(args.mesh) if args.mesh else None
    conf, folder = helper.open_run(args, network.parameter_shapes)
    scene = datasets.load_scene(conf.data.path, conf.data.downscale)
    views = datasets.chosen_views(args.views, len(scene.images), "--views")

    errors = {}
    sdf = network.sdf_evaluator()
    for view in tqdm(views, unit="view", dynamic_ncols=True):
        render = synthesize.render_view(sdf, scene.intrinsics[view], scene.poses[view], scene.images.shape[1:3],
                                        conf.tracer, wanted=scene.masks[view])
        errors[view] = squared_error(render.rgb, scene.images[view] / np.float32(255), scene.masks[view])

    monitor = Monitor(str(folder))
    series = MonitorSeries("psnr_per_view", monitor, interval=1, verbose=False)
    for view, error in errors.items():
        held_out = "  held out" if view in conf.data.held_out_views else ""
        print(f"view {view:3d}  {scene.names[view]:<16} {psnr(error):6.2f} dB{held_out}")
        series.add(view, psnr(error))
    held_out = [v for v in views if v in conf.data.held_out_views]
    for name, group in (("all", views), ("trained", [v for v in views if v not in held_out]), ("held_out", held_out)):
        if group and (held_out or name == "all"):
            over = psnr(sum(errors[v] for v in group))
            print(f"{name.replace('_', ' ')} views ({len(group)}): {over:.2f} dB")
            MonitorSeries(f"psnr_{name}_views", monitor, interval=1, verbose=False).add(0, over)
    if args.mesh:
        for name, value in chamfer(mesh, truth)._asdict().items():
            print(f"{name}: {value:.5f}")
            MonitorSeries(name, monitor, interval=1, verbose=False).add(0, value)
    print(f"written to {folder}")


def squared_error(image, truth, mask):
    """(sum, count) as an array of 2: of (image - truth)^2 over the masked pixels and 3 channels; images in [0, 1]."""
    difference = (image[mask].astype(np.float64) - truth[mask]) ** 2
    return np.array([difference.sum(), difference.size])


def psnr(error):
    """PSNR in dB of one squared_error, or of the sum of several."""
    return -10.0 * np.log10(max(error[0] / error[1], 1e-12))


def load_points(path):
    """Points (N, 3) on the surface that a file holds: samples of a mesh, uniform over its area, or a point cloud."""
    import trimesh
    if not Path(path).is_file():
        raise helper.UserError(f"{path}: no such file")
    try:
        shape = trimesh.load(str(path))
        if isinstance(shape, trimesh.Scene):
            shape = trimesh.util.concatenate(list(shape.geometry.values()))
    except Exception as error:      # trimesh's readers raise whatever the bytes lead them to
        raise helper.UserError(f"{path}: not a mesh or point cloud that can be read ({type(error).__name__})")
    faces = getattr(shape, "faces", None)
    points = shape.vertices if faces is None or len(faces) == 0 else \
        trimesh.sample.sample_surface(shape, SURFACE_SAMPLES, seed=0)[0]
    if len(points) == 0 or not np.isfinite(points).all():
        raise helper.UserError(f"{path}: holds no points, or points that are not finite")
    return np.asarray(points, np.float64)


def chamfer(points, truth):
    """Chamfer distance of two samples of surfaces, (N, 3) and (M, 3), as (accuracy, completeness, chamfer).

    accuracy is the mean distance from the points to the truth, completeness the mean one from the truth to the points,
    chamfer their mean; all in the points' unit. Samples lie apart, so equal surfaces give a little more than 0.
    """
    accuracy = cKDTree(truth).query(points)[0].mean()
    completeness = cKDTree(points).query(truth)[0].mean()
    return Chamfer(accuracy, completeness, (accuracy + completeness) / 2)


if __name__ == "__main__":
    helper.run(main)
