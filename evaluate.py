"""Measure a trained scene: PSNR and SSIM of every view inside its mask and over all views; how far a mesh is off.

    python evaluate.py --config results_scan118/default.yaml --model-load-path results_scan118/model_01999.h5

The table goes to the screen, the numbers to nnabla's monitors in the run's folder.
"""
from pathlib import Path

import numpy as np
from nnabla.monitor import Monitor, MonitorSeries
from tqdm import tqdm

import datasets
import helper
import network
import synthesize
from metrics import images, meshes
from training import cameras, checkpoints


def main():
    parser = helper.argument_parser("Measure a trained scene.", model=True)
    parser.add_argument("--views", nargs="+", default=["all"], metavar="VIEW",
                        help="indices of the views to measure, or all, or none for the mesh alone")
    parser.add_argument("--mesh", help="a mesh of extract.py, to compare with --ground-truth or by --dtu")
    parser.add_argument("--ground-truth", help="a mesh or point cloud of the true surface, in the mesh's units")
    parser.add_argument("--dtu", metavar="FOLDER",
                        help="compare as DTU does: the folder that holds its ObsMask*.mat, Plane*.mat and stl*.ply")
    args = parser.parse_args()
    if bool(args.mesh) != bool(args.ground_truth or args.dtu):
        raise helper.UserError("--mesh and --ground-truth go together, or --mesh and --dtu: the one is compared with "
                               "the other")
    mesh = meshes.load_shape(args.mesh) if args.mesh else None
    truth = meshes.load_shape(args.ground_truth) if args.ground_truth else None
    conf, folder = checkpoints.open_run(args)
    scan = meshes.load_dtu(args.dtu, Path(conf.data.path).resolve().name) if args.dtu else None
    monitor = Monitor(str(folder))
    if args.views != ["none"]:
        measure_views(args.views, conf, args.model_load_path, monitor)
    measure_cameras(conf, args.model_load_path, monitor)
    if truth is not None:
        distances, consistency = meshes.compare(meshes.surface(mesh), meshes.surface(truth))
        report(distances._asdict(), monitor, "{:.5f}")
        if consistency is not None:
            report({"normal_consistency": consistency}, monitor, "{:.4f}")
    if scan is not None:
        distances = meshes.compare_dtu(mesh, scan)
        report({f"dtu_{name}": value for name, value in distances._asdict().items()}, monitor, "{:.3f} mm")
    print(f"written to {folder}")


def report(values, monitor, form):
    """Print named values and write each to a monitor of its name."""
    for name, value in values.items():
        print(f"{name}: {form.format(value)}")
        MonitorSeries(name, monitor, interval=1, verbose=False).add(0, value)


def measure_cameras(conf, model, monitor):
    """Print how far off trained cameras are, and were before, and write monitors; nothing where that is not known."""
    if cameras.parameter() is None:
        return
    start = datasets.load_scene_cameras(conf.data.path, conf.data.cameras)[1]
    true = cameras.true_cameras(conf.data.path, conf.data.cameras, len(start))
    if true is None:
        return
    seen = [view for view in range(len(start)) if view not in conf.data.held_out_views]
    for which, poses in ((f"of {conf.data.cameras}", start), ("as trained", cameras.trained_poses(start, model))):
        off = cameras.errors(poses[seen], true.poses[seen])
        print(f"cameras {which}: {cameras.in_words(off, true.scale)}")
    for name, values in off._asdict().items() if off else ():
        series = MonitorSeries(f"camera_{name}_per_view", monitor, interval=1, verbose=False)
        for view, value in zip(seen, values):
            series.add(view, value)


def measure_views(words, conf, model, monitor):
    """Render the views that the command line names; print PSNR and SSIM of each and over all, and write monitors."""
    scene = datasets.load_scene(conf.data.path, conf.data.downscale, conf.data.cameras)
    scene = scene._replace(poses=cameras.trained_poses(scene.poses, model))
    views = datasets.chosen_views(words, len(scene.images), "--views")
    if min(scene.images.shape[1:3]) < images.SSIM_WINDOW:
        raise helper.UserError(f"{conf.data.path}: images of {datasets.says_size(scene.images.shape[1:])} are too "
                               f"small to measure; SSIM needs {images.SSIM_WINDOW} a side, so lower data.downscale")
    errors, likeness = {}, {}
    sdf, shade = network.sdf_evaluator(), network.shader(conf.network)
    for view in tqdm(views, unit="view", dynamic_ncols=True):
        truth, mask = scene.images[view] / np.float32(255), scene.masks[view]
        camera = helper.Camera(scene.intrinsics[view], scene.poses[view], mask.shape)
        render = synthesize.render_view(sdf, shade, camera, conf.tracer, wanted=mask)
        errors[view] = images.squared_error(render.rgb, truth, mask)
        likeness[view] = images.similarity(render.rgb, truth, mask)

    held_out = conf.data.held_out_views
    series = {name: MonitorSeries(f"{name}_per_view", monitor, interval=1, verbose=False) for name in ("psnr", "ssim")}
    for view in views:
        psnr, ssim = images.psnr(errors[view]), images.ssim(likeness[view])
        print(f"view {view:3d}  {scene.names[view]:<16} {psnr:6.2f} dB  SSIM {ssim:.3f}"
              + ("  held out" if view in held_out else ""))
        series["psnr"].add(view, psnr)
        series["ssim"].add(view, ssim)
    groups = {"all": views}
    if set(views) & set(held_out):
        groups.update(trained=[v for v in views if v not in held_out], held_out=[v for v in views if v in held_out])
    for name, group in groups.items():
        if group:
            over = {"psnr": images.psnr(sum(errors[v] for v in group)),
                    "ssim": images.ssim(sum(likeness[v] for v in group))}
            print(f"{name.replace('_', ' ')} views ({len(group)}): {over['psnr']:.2f} dB, SSIM {over['ssim']:.3f}")
            for measure, value in over.items():
                MonitorSeries(f"{measure}_{name}_views", monitor, interval=1, verbose=False).add(0, value)


if __name__ == "__main__":
    helper.run(main)
