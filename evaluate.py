"""Measure a trained scene: PSNR and SSIM inside the masks, per view and over all views; the error of a mesh.

    python evaluate.py --config results_scan118/default.yaml --model-load-path results_scan118/model_01999.h5

Prints the numbers and writes them as nnabla's monitors to the run's folder.
"""
from itertools import product
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from nnabla.monitor import Monitor, MonitorSeries
from tqdm import tqdm

import datasets
import helper
import network
from metrics import images, meshes
from rendering import pixels
from training import cameras, checkpoints

# The two measures: the prefix of their monitors, and the table's two lines above them.
CENTRES, AREAS = "", "area_"
HEADINGS = {CENTRES: ("rays through pixel centres:", "the paper's measure"),
            AREAS: ("pixels as areas:", "the measure of the pictures")}


class Measure(NamedTuple):
    """What is measured of a render; adding those of several views gives that of all their masked pixels."""
    error: np.ndarray       # of images.squared_error
    similarity: np.ndarray  # of images.similarity
    missed: np.ndarray      # (2,): the masked pixels without a hit, and all masked pixels

    def numbers(self) -> Dict[str, float]:
        """Return PSNR in dB, SSIM, and the percentage of masked pixels without a hit."""
        return {"psnr": images.psnr(self.error), "ssim": images.ssim(self.similarity),
                "missed": 100 * self.missed[0] / self.missed[1]}


class ViewMeasure(NamedTuple):
    """What is measured of one rendered view."""
    view: int
    name: str                       # of its image
    measures: Dict[str, Measure]    # of CENTRES and AREAS


def main():
    parser = helper.argument_parser("Measure a trained scene.", model=True)
    parser.add_argument("--views", nargs="+", default=["all"], metavar="VIEW",
                        help="indices of the views to measure, or all, or none to measure only the mesh")
    parser.add_argument("--mesh", help="a mesh by extract.py, to compare by --ground-truth or --dtu")
    parser.add_argument("--ground-truth", help="a mesh or point cloud of the true surface, in the mesh's units")
    parser.add_argument("--dtu", metavar="FOLDER",
                        help="compare by DTU's protocol: the folder that holds its ObsMask*.mat, Plane*.mat and "
                             "stl*.ply")
    args = parser.parse_args()
    if bool(args.mesh) != bool(args.ground_truth or args.dtu):
        raise helper.UserError("--mesh needs --ground-truth or --dtu to compare with, and these need --mesh; give both")
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


def report(values: Dict[str, float], monitor: Monitor, template: str) -> None:
    """Print named values, formatted by the template, and write each to a monitor of its name."""
    for name, value in values.items():
        print(f"{name}: {template.format(value)}")
        MonitorSeries(name, monitor, interval=1, verbose=False).add(0, value)


def measure_cameras(conf, model: str, monitor: Monitor) -> None:
    """Print and write the errors of trained cameras, and print those before training.

    model: the path of the trained model. Does nothing without trained cameras or without true ones to compare with.
    """
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


def measure_views(words: Sequence[str], conf, model: str, monitor: Monitor) -> None:
    """Render the views that the command line names; print and write the measures of each view and over all.

    words: those after --views; model: the path of the trained model. Raises UserError if images are too small for SSIM.
    """
    scene = datasets.load_scene(conf.data.path, conf.data.downscale, conf.data.cameras)
    scene = scene._replace(poses=cameras.trained_poses(scene.poses, model))
    views = datasets.chosen_views(words, len(scene.images), "--views")
    if min(scene.images.shape[1:3]) < images.SSIM_WINDOW:
        raise helper.UserError(f"{conf.data.path}: images of {datasets.says_size(scene.images.shape[1:])} are too "
                               f"small for SSIM, which needs {images.SSIM_WINDOW} per side; lower data.downscale")
    sdf, shade = network.sdf_evaluator(), network.shader(conf.network)

    def measured_view(view):
        truth, mask = scene.images[view] / np.float32(255), scene.masks[view]
        camera = helper.Camera(scene.intrinsics[view], scene.poses[view], mask.shape)
        areas, centres = pixels.render_areas(sdf, shade, camera, conf.tracer, wanted=mask)
        return ViewMeasure(view, scene.names[view], {CENTRES: measure(centres, truth, mask),
                                                     AREAS: measure(areas, truth, mask)})

    measured = helper.side_by_side(measured_view, views, network.renders_at_once())
    report_views(list(tqdm(measured, total=len(views), unit="view", dynamic_ncols=True)), conf.data.held_out_views,
                 monitor)


def measure(render: pixels.Render, truth: np.ndarray, mask: np.ndarray) -> Measure:
    """Measure a render's colours, in which a pixel without a hit is white, against the photograph inside the mask.

    truth: (H, W, 3) in [0, 1]; mask: (H, W) bool.
    """
    return Measure(images.squared_error(render.rgb, truth, mask), images.similarity(render.rgb, truth, mask),
                   np.array([(render.alpha[mask] == 0).sum(), mask.sum()]))


def report_views(measured: List[ViewMeasure], held_out: Sequence[int], monitor: Monitor) -> None:
    """Print both measures of each view, and over all, trained and held-out views, as one table; write them."""
    width = max(26, *(len(m.name) + 10 for m in measured))
    for lines in zip(*HEADINGS.values()):
        print(" " * (width + 2) + "".join(f"{line:<40}" for line in lines).rstrip())
    for view, name, measures in measured:
        print(row(f"view {view:3d}  {name}", width, measures) + ("  held out" if view in held_out else ""))
    write_series("per_view", [(m.view, m.measures) for m in measured], monitor)
    groups = {"all": measured}
    if any(m.view in held_out for m in measured):
        groups.update(trained=[m for m in measured if m.view not in held_out],
                      held_out=[m for m in measured if m.view in held_out])
    for name, group in groups.items():
        if group:
            overall = {which: Measure(*map(sum, zip(*(m.measures[which] for m in group)))) for which in HEADINGS}
            print(row(f"{name.replace('_', ' ')} views ({len(group)}):", width, overall))
            write_series(f"{name}_views", [(0, overall)], monitor)


def row(label: str, width: int, measures: Dict[str, Measure]) -> str:
    """Return a line of the table, whose labels have `width` characters."""
    cell = "{psnr:7.2f} dB  SSIM {ssim:.3f}  missed {missed:5.2f}%    "
    return label.ljust(width) + "".join(cell.format(**measure.numbers()) for measure in measures.values()).rstrip()


def write_series(ending: str, rows: List[Tuple[int, Dict[str, Measure]]], monitor: Monitor) -> None:
    """Write the numbers of both measures to monitors such as area_psnr_per_view; rows: [(index, measures)]."""
    for prefix, name in product(HEADINGS, ("psnr", "ssim", "missed")):
        series = MonitorSeries(f"{prefix}{name}_{ending}", monitor, interval=1, verbose=False)
        for index, measures in rows:
            series.add(index, measures[prefix].numbers()[name])


if __name__ == "__main__":
    helper.run(main)
