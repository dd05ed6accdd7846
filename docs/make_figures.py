"""Make the pictures of the README and the docs, each by its option. Scenes must be where the runs' configurations say.

    python docs/make_figures.py --method --initial --demo results_demo --scan results_scan65 scan65_cpu.png
    python docs/make_figures.py --check data/demo
    python docs/make_figures.py --psnr docs/scans_psnr.csv --cameras docs/scan65_cameras.csv
    python docs/make_figures.py --turntable results_demo
    python docs/make_figures.py --outline results_demo
    python docs/make_figures.py --swapped data/demo data/blue       # a scene to train a second model on
    python docs/make_figures.py --appearance results_demo results_blue
    python docs/make_figures.py --asset results_demo
    python docs/make_figures.py --spectrum results_scan65 results_scan24
"""
import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Sequence, Tuple

import cv2
import numpy as np
import trimesh
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from PIL import Image

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import datasets  # noqa: E402
import extract  # noqa: E402
import helper  # noqa: E402
import make_scene  # noqa: E402
import network  # noqa: E402
import prepare  # noqa: E402
import ray_tracer  # noqa: E402
import report  # noqa: E402
import synthesize  # noqa: E402
from assets import appearance, baking, decimation  # noqa: E402
from assets.surface import Surface  # noqa: E402
from backends import architecture, context  # noqa: E402
from config import settings  # noqa: E402
from files import folders, pictures, writing  # noqa: E402
from metrics import rasterizer  # noqa: E402
from rendering import pixels  # noqa: E402
from training import checkpoints  # noqa: E402

OVERSAMPLING = 2    # renders are larger by this factor and averaged, for smooth edges
INK, GREY, BLUE, ORANGE, GREEN = "#1d2b3a", "#7b8794", "#1f77b4", "#d9730d", "#2a8c55"


def main():
    parser = argparse.ArgumentParser(description="Make the pictures of the README and the docs.")
    parser.add_argument("--method", action="store_true", help="the diagram of the method")
    parser.add_argument("--initial", action="store_true", help="the initial surface, by network.py and ray_tracer.py")
    parser.add_argument("--demo", metavar="FOLDER", help="the run of make demo, after extract.py")
    parser.add_argument("--scan", nargs=2, metavar=("FOLDER", "PICTURE"), action="append", default=[],
                        help="a run on a scan of DTU, after extract.py, and the name of its picture")
    parser.add_argument("--check", metavar="SCENE", help="prepare.py --check's picture of a scene")
    parser.add_argument("--psnr", metavar="TABLE", help="PSNR over training time, of runs on DTU's scans")
    parser.add_argument("--spectrum", nargs="+", metavar="FOLDER", help="runs' errors over spatial frequency")
    parser.add_argument("--cameras", metavar="TABLE", help="camera errors per epoch, of a run on DTU's scan 65")
    parser.add_argument("--turntable", metavar="FOLDER", help="a turntable of a run of make demo")
    parser.add_argument("--outline", metavar="FOLDER", help="part of an outline of a run of make demo, much enlarged")
    parser.add_argument("--swapped", nargs=2, metavar=("SCENE", "COPY"),
                        help="copy a scene with red and blue swapped")
    parser.add_argument("--appearance", nargs=2, metavar="FOLDER", help="two runs' shapes in each other's colours")
    parser.add_argument("--asset", metavar="FOLDER", help="the asset of a run of make demo, beside the render")
    parser.add_argument("--report", metavar="FOLDER", help="the upper part of a run's report.html, drawn by Chromium")
    args = parser.parse_args()
    if args.method:
        draw_method(DOCS / "method.png")
    if args.initial:
        copy_initial()
    if args.demo:
        write_labelled(DOCS / "demo.png", demo_picture(Path(args.demo), views=(36, 37), size=288),
                       columns=("a held-out view", "another held-out view", "its normals", "its shape"),
                       rows=("true", "learnt"))
    if args.check:
        prepare.check(args.check)
        with Image.open(str(prepare.picture_path(args.check))) as picture:  # a palette saves two thirds of the file
            picture.convert("RGB").quantize(256).save(str(DOCS / "prepare.png"), optimize=True)
    if args.psnr:
        draw_psnr(DOCS / "scans_psnr.png", np.loadtxt(args.psnr, delimiter=",", skiprows=7))
    if args.spectrum:
        draw_spectrum(DOCS / "spectrum.png", [spectrum(Path(folder), view=20) for folder in args.spectrum])
    if args.cameras:
        draw_cameras(DOCS / "scan65_cameras.png", np.loadtxt(args.cameras, delimiter=",", skiprows=3))
    if args.turntable:
        write_turntable(Path(args.turntable))
    if args.outline:
        write_labelled(DOCS / "outline.png", outline_picture(Path(args.outline)),
                       columns=("rays through centres", "pixels as areas", "transparent"))
    if args.swapped:
        swap_red_and_blue(*map(Path, args.swapped))
    if args.appearance:
        write_labelled(DOCS / "appearance.png", appearance_picture([Path(folder) for folder in args.appearance]),
                       columns=("the first one's renderer", "the second one's"), rows=("first shape", "second shape"))
    if args.asset:
        write_labelled(DOCS / "asset.png", asset_picture(Path(args.asset)),
                       ("the networks' render", "the asset", "its 5,000 faces", "its colours", "its normal map"))
    if args.report:
        photograph_report(Path(args.report) / report.PAGE, DOCS / "report.jpg")
    for folder, picture in args.scan:
        draw_scan(Path(folder), DOCS / picture)


def draw_scan(folder: Path, path: Path) -> None:
    """Draw view 20 of a run on a scan of DTU, its normals and its mesh. UserError unless the path ends in .png."""
    if path.suffix != ".png":
        raise helper.UserError(f"{path.name}: a picture needs a name that ends in .png")
    write_labelled(path, scan_picture(folder, view=20, shape=(340, 390)),
                   ("view 20", "its normals", "the extracted mesh"))


def draw_psnr(path: Path, table: np.ndarray) -> None:
    """Plot the PSNR over training time, table (N, 3) of scan, seconds and dB; scan 0 is the authors' code on scan 65.

    A time of -1 is the end of the run, over all views at full size; -2 is the paper's, after its hours.
    """
    figure = Figure(figsize=(8.4, 3.4), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel="minutes of training", ylabel="PSNR in the mask, dB", ylim=(17, 30), xlim=(0, 8.5))
    for scan, color in ((65, BLUE), (24, GREEN)):
        seconds, decibels = table[table[:, 0] == scan, 1:].T
        axes.plot(seconds[seconds > 0] / 60, decibels[seconds > 0], "o-", markersize=4, color=color,
                  label=f"scan {scan}, view 0 at 400x300")
        axes.plot(seconds.max() / 60, decibels[seconds == -1], "*", markersize=13, color=color,
                  label="all 49 views at 1600x1200")
        axes.axhline(decibels[seconds == -2], color=color, linestyle=":", linewidth=1.2, label="the same, the paper")
    axes.plot(*(table[table[:, 0] == 0, 1:] / [60, 1]).T, "D", color=ORANGE,
              label="scan 65, the authors' code,\n7 views at 400x300")
    axes.grid(color=GREY, alpha=0.25)
    figure.legend(frameon=False, loc="outside right upper", fontsize=9)
    figure.savefig(path)


def spectrum(folder: Path, view: int, side: int = 256) -> Tuple[str, np.ndarray, np.ndarray]:
    """Return the name of a run's scene, and the power of a photograph and of the render's error over frequency.

    Both are of the square of `side` pixels in the middle of what the camera sees of the object, where all rays hit. The
    powers (side / 2,) are means over the directions, of frequencies 0, 1 / side, 2 / side, ... cycles per pixel.
    """
    conf = load_run(folder)[0]
    scene = datasets.load_scene(conf.data.path)
    inside = np.pad(scene.masks[view], 1).astype(np.uint8)
    row, column = np.unravel_index(cv2.distanceTransform(inside, cv2.DIST_L2, 5).argmax(), inside.shape)
    corner = np.array([column, row]) - 1 - side // 2
    intrinsics = scene.intrinsics[view].copy()
    intrinsics[:2, 2] -= corner
    found = rendered(conf, intrinsics, scene.poses[view], (side, side))
    photograph = scene.images[view, corner[1]:corner[1] + side, corner[0]:corner[0] + side] / 255
    away = np.where(found.hit[..., None], found.rgb - photograph, 0)
    window = np.outer(np.hanning(side), np.hanning(side))[..., None]
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(side) * side] * 2)).round().astype(int).ravel()
    powers = []
    for image in (photograph - photograph.mean(axis=(0, 1)), away):
        power = (np.abs(np.fft.fft2(image * window, axes=(0, 1))) ** 2).sum(axis=-1).ravel()
        powers.append((np.bincount(frequency, power) / np.bincount(frequency))[:side // 2])
    return Path(conf.data.path).name, powers[0], powers[1]


def draw_spectrum(path: Path, runs: Sequence[Tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Plot the share of a photograph's power that a render's error has, over the size of details."""
    figure = Figure(figsize=(6.4, 3.2), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel="cycles per pixel of 1600x1200", ylabel="power of the error / of the photograph",
                              xscale="log", xlim=(1 / 256, 0.5), ylim=(0, 1.5))
    for (name, photograph, error), color in zip(runs, (BLUE, GREEN, ORANGE)):
        frequency = np.arange(len(error)) / (2 * len(error))
        axes.plot(frequency[1:], (error / photograph)[1:], color=color, label=name)
    axes.grid(color=GREY, alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def draw_cameras(path: Path, table: np.ndarray) -> None:
    """Plot the errors of trained cameras, table (N, 3) of epochs, degrees and radii, in one panel each."""
    figure = Figure(figsize=(6.4, 2.4), dpi=130, layout="constrained")
    titles = "rotation, degrees", "translation, radii of the sphere"
    for axes, column, title in zip(figure.subplots(1, 2), (1, 2), titles):
        axes.plot(table[:, 0], table[:, column], "o-", markersize=4, color=BLUE)
        axes.set(xlabel="epochs", title=title, xlim=(0, None), ylim=(0, None))
        axes.title.set_size("medium")
        axes.grid(color=GREY, alpha=0.25)
    figure.savefig(path)


# --- renders and meshes -----------------------------------------------------------------------------------------------

Cameras = List[Tuple[np.ndarray, np.ndarray]]     # intrinsics (3, 3) and pose (4, 4) of each view


def load_run(folder: Path) -> Tuple[settings.Configuration, Cameras, trimesh.Trimesh]:
    """Load a run's newest model into nnabla's parameters; return its configuration, cameras and mesh."""
    conf = settings.load_config(next(folder.glob("*.yaml")))
    context.set_context("auto", "0")
    shapes = architecture.parameter_shapes(conf.network)
    checkpoints.load_model(checkpoints.model_file(folder), shapes)
    cameras = datasets.load_scene_cameras(conf.data.path)[:2]
    return conf, list(zip(*cameras)), trimesh.load(folder / "mesh.ply")


def rendered(conf: settings.Configuration, intrinsics: np.ndarray, pose: np.ndarray,
             shape: Tuple[int, int]) -> pixels.Render:
    """Render the model that load_run has loaded, as an image of `shape` (height, width)."""
    camera = helper.Camera(intrinsics, pose, shape)
    return pixels.render_view(network.sdf_evaluator(), network.shader(conf.network), camera, conf.tracer)


def write_turntable(folder: Path, size: int = 160, frames: int = 36) -> None:
    """Write docs/turntable.gif, a run rendered by synthesize.py, in few frames and colours to keep it small."""
    with tempfile.TemporaryDirectory() as temporary:
        video = Path(temporary) / "round.gif"
        config = next(folder.glob("*.yaml"))
        subprocess.run([sys.executable, str(DOCS.parent / "synthesize.py"), "--config", str(config),
                        "--model-load-path", str(folder), "--path", "turntable", "--views", "36", "--height", str(size),
                        "--frames", str(frames), "--output", str(video)], check=True)
        with Image.open(str(video)) as pictures:
            images = []
            for i in range(frames):
                pictures.seek(i)
                images.append(pictures.convert("RGB"))
    palette = Image.fromarray(np.concatenate([np.asarray(image) for image in images])).quantize(160)
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    with writing.replacing(DOCS / "turntable.gif") as temporary:
        first.save(str(temporary), save_all=True, append_images=rest, duration=80, loop=0)


def swap_red_and_blue(scene: Path, target: Path) -> None:
    """Copy a scene to `target` with red and blue swapped in its images."""
    with folders.new_folder(target) as folder:
        for name in ("mask", "image"):
            shutil.copytree(str(scene / name), str(folder / name))
        shutil.copyfile(str(scene / "cameras.npz"), str(folder / "cameras.npz"))
        for path in datasets.picture_files(folder / "image")[0]:
            writing.write_image(path, pictures.read_image(path)[..., ::-1])


def appearance_picture(runs: Sequence[Path], view: int = 36, size: int = 288) -> np.ndarray:
    """Return a picture (H, W, 3) with a row for each run's shape and a column for each run's renderer."""
    rows = []
    for shape_of in runs:
        row = []
        for colors_of in runs:
            conf, cameras, _ = load_run(shape_of)
            synthesize.take_appearance(checkpoints.model_file(colors_of), conf.network)
            intrinsics, pose = cameras[view]
            side = round(2 * intrinsics[0, 2] + 1)
            intrinsics = datasets.shrink_intrinsics(intrinsics, side / (size * OVERSAMPLING))
            shape = size * OVERSAMPLING, size * OVERSAMPLING
            render = rendered(conf, intrinsics, pose, shape)
            row.append(shrink(render.rgb)[size // 10:size - size // 12])
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


def asset_picture(folder: Path, view: int = 36, size: int = 230, faces: int = 5000) -> np.ndarray:
    """Return a picture (H, W, 3) of a light asset of a run: a render, the asset, its wireframe and its textures."""
    conf, cameras, _ = load_run(folder)
    surface = Surface(network.sdf_evaluator(), network.shader(conf.network))
    full = extract.extract(surface.sdf, conf.extract.coarse_resolution, conf.extract.resolution)
    mesh = extract.with_colors(decimation.decimated(full, faces, surface), surface.shade)
    views = datasets.training_views(conf.data.held_out_views, len(cameras), "data.held_out_views")
    centres = np.stack([cameras[number][1][:3, 3] for number in views])
    asset = baking.baked(mesh, size * OVERSAMPLING, surface, appearance.look_of(mesh, surface, centres, True)[0])
    shape = size * OVERSAMPLING, size * OVERSAMPLING
    camera = helper.Camera(*framed(mesh, *cameras[view], shape), shape)
    rgb, normals, _ = rasterizer.shown(asset, camera)
    wires = np.where(rasterizer.edges_shown(mesh, camera)[..., None], 0.2, pixels.clay(normals, camera.pose))
    images = (rendered(conf, *camera).rgb, rgb, wires, asset.base_color / 255, asset.normal_map / 255)
    return np.concatenate([np.pad(shrink(image), ((0, 0), (4, 4), (0, 0)), constant_values=1.0) for image in images],
                          axis=1)


def outline_picture(folder: Path, view: int = 36, pixel: int = 8) -> np.ndarray:
    """Return a picture (H, W, 3) of the upper half of a view, its pixels enlarged to `pixel` on each side.

    Columns: rendered by one ray per pixel, with pixels as areas, and the latter's transparent picture on a chessboard.
    """
    conf, cameras, _ = load_run(folder)
    intrinsics, pose = cameras[view]
    side = round(2 * intrinsics[0, 2] + 1)
    camera = helper.Camera(intrinsics, pose, (side, side))
    areas, centres = pixels.render_areas(network.sdf_evaluator(), network.shader(conf.network), camera, conf.tracer)
    part = np.s_[side // 8:side // 2, side // 4:side * 3 // 4]
    images = [pixels.on_background(render.rgb, render.alpha, "white") for render in (centres, areas)]
    images.append(pixels.on_background(areas.rgb, areas.alpha, "transparent"))
    *images, above = [image[part].repeat(pixel, axis=0).repeat(pixel, axis=1) for image in images]
    rows, columns = np.indices(above.shape[:2]) // pixel
    board = np.where((rows + columns) % 2, 0.55, 0.8)[..., None]
    images.append(above[..., 3:] * above[..., :3] + (1 - above[..., 3:]) * board)
    return np.concatenate([np.pad(image, ((0, 0), (4, 4), (0, 0)), constant_values=1) for image in images], axis=1)


def demo_picture(folder: Path, views: Tuple[int, int], size: int) -> np.ndarray:
    """Return a picture (H, W, 3) of the true object above the learnt one.

    Columns: the two views, then normals and clay of the second.
    """
    conf, cameras, mesh = load_run(folder)
    columns = []
    for view in views:
        intrinsics, pose = cameras[view]
        side = round(2 * intrinsics[0, 2] + 1)        # per side, as the principal point is the image's centre
        intrinsics = datasets.shrink_intrinsics(intrinsics, side / (size * OVERSAMPLING))
        truth, mask = make_scene.render(intrinsics, pose, size * OVERSAMPLING)
        ours = rendered(conf, intrinsics, pose, mask.shape)
        columns.append((np.where(mask[..., None] > 0, truth / 255, 1.0), ours.rgb))
    true_normals = exact_normals(intrinsics, pose, size * OVERSAMPLING)
    columns.append((normal_colors(true_normals), normal_colors(ours.normals)))
    mesh_shown = pixels.clay(mesh_normals(mesh, intrinsics, pose, mask.shape), pose)
    columns.append((pixels.clay(true_normals, pose), mesh_shown))
    top, bottom = size // 10, size - size // 12     # the rows that show something
    columns = [[shrink(image)[top:bottom] for image in column] for column in columns]
    return np.concatenate([np.concatenate(column) for column in columns], axis=1)


def scan_picture(folder: Path, view: int, shape: Tuple[int, int]) -> np.ndarray:
    """Return a picture (H, W, 3) of a learnt scan in one view: its colours, its normals and the extracted mesh."""
    conf, cameras, mesh = load_run(folder)
    shape = shape[0] * OVERSAMPLING, shape[1] * OVERSAMPLING
    intrinsics, pose = framed(mesh, *cameras[view], shape)
    ours = rendered(conf, intrinsics, pose, shape)
    images = ours.rgb, normal_colors(ours.normals), pixels.clay(mesh_normals(mesh, intrinsics, pose, shape), pose)
    return np.concatenate([shrink(image) for image in images], axis=1)


def framed(mesh: trimesh.Trimesh, intrinsics: np.ndarray, pose: np.ndarray,
           shape: Tuple[int, int]) -> Tuple[np.ndarray, np.ndarray]:
    """Return the camera's intrinsics and pose, the intrinsics changed so that the mesh fills an image of `shape`."""
    corners = (mesh.vertices - pose[:3, 3]) @ pose[:3, :3] @ intrinsics.T
    corners = corners[:, :2] / corners[:, 2:]
    low, high = corners.min(axis=0), corners.max(axis=0)
    scale = 0.94 * (np.array(shape[::-1]) / (high - low)).min()
    shift = (np.array(shape[::-1]) - 1) / 2 - scale * (low + high) / 2
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1]]) @ intrinsics, pose


def write_labelled(path: Path, image: np.ndarray, columns: Sequence[str], rows: Sequence[str] = ()) -> None:
    """Write a picture of panels with labels above its columns and beside its rows."""
    height, width, above, beside = *image.shape[:2], 26, 30 * bool(rows)
    figure = Figure(figsize=((width + beside) / 100, (height + above) / 100), dpi=100)
    figure.figimage(image, beside, 0)
    for i, words in enumerate(columns):
        x = (beside + width * (i + 0.5) / len(columns)) / (width + beside)
        figure.text(x, 1 - 5 / (height + above), words, ha="center", va="top", fontsize=12, color=INK)
    for i, words in enumerate(rows):
        y = height * (1 - (i + 0.5) / len(rows)) / (height + above)
        figure.text(8 / (width + beside), y, words, va="center", rotation=90, fontsize=12, color=INK)
    with writing.replacing(path) as temporary:
        figure.savefig(temporary)


def exact_normals(intrinsics: np.ndarray, pose: np.ndarray, size: int) -> np.ndarray:
    """Return the unit normals (size, size, 3) of make_scene's object in a view; 0 on the background."""
    origin, directions = helper.pixel_rays(helper.pixel_grid(size, size), intrinsics, pose)
    t, hit = ray_tracer.trace(make_scene.exact_sdf, origin, directions, sphere_tracing_steps=200)
    normals = np.zeros((size * size, 3), np.float32)
    normals[hit] = make_scene.exact_normals(origin + t[hit, None] * directions[hit])
    return normals.reshape(size, size, 3)


def mesh_normals(mesh: trimesh.Trimesh, intrinsics: np.ndarray, pose: np.ndarray,
                 shape: Tuple[int, int]) -> np.ndarray:
    """Return the normals (H, W, 3) of a mesh in a view; 0 on the background.

    Each triangle is sampled more densely than the pixels, and each pixel shows its point nearest to the camera.
    """
    corners = (mesh.vertices - pose[:3, 3]) @ pose[:3, :3]
    projected = corners[:, :2] / corners[:, 2:] * intrinsics[[0, 1], [0, 1]]
    steps = int(np.ceil(2 * np.linalg.norm(np.diff(projected[mesh.faces], axis=1), axis=-1).max())) + 1
    u, v = np.mgrid[:steps + 1, :steps + 1] / steps
    weights = np.stack([u, v, 1 - u - v], axis=-1)[u + v < 1 + 1e-9]
    nearest, normals = np.full(shape[0] * shape[1], np.inf), np.zeros((shape[0] * shape[1], 3))
    for weight in weights:
        points = np.einsum("c,fcx->fx", weight, corners[mesh.faces])
        column, row = np.rint((points @ intrinsics.T)[:, :2] / points[:, 2:]).astype(int).T
        seen = np.flatnonzero((row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1]))
        pixel = row[seen] * shape[1] + column[seen]
        farthest_first = np.argsort(-points[seen, 2])
        seen, pixel = seen[farthest_first], pixel[farthest_first]
        closer = points[seen, 2] < nearest[pixel]
        seen, pixel = seen[closer], pixel[closer]
        nearest[pixel] = points[seen, 2]
        normals[pixel] = np.einsum("c,fcx->fx", weight, mesh.vertex_normals[mesh.faces[seen]])
    return normals.reshape(shape + (3,))


def normal_colors(normals: np.ndarray) -> np.ndarray:
    """Return normals (H, W, 3) as colours, (n + 1) / 2 in the scene's axes; white where they are 0."""
    return np.where((normals != 0).any(axis=-1, keepdims=True), helper.unit(normals) / 2 + 0.5, 1.0)


def shrink(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) with blocks of OVERSAMPLING x OVERSAMPLING pixels averaged."""
    height, width = np.array(image.shape[:2]) // OVERSAMPLING
    return image.reshape(height, OVERSAMPLING, width, OVERSAMPLING, 3).mean(axis=(1, 3))


def copy_initial() -> None:
    """Run network.py and ray_tracer.py on the initial surface and copy their pictures to docs/."""
    with tempfile.TemporaryDirectory() as folder:
        for command in (("network.py", "-Ds", "512", "-R", "0.75"), ("ray_tracer.py", "-L", "9")):
            script = DOCS.parent / command[0]
            subprocess.run([sys.executable, str(script), *command[1:]], cwd=folder, check=True)
        for picture in Path(folder).glob("*.png"):
            shutil.copyfile(str(picture), str(DOCS / picture.name))


def photograph_report(page: Path, path: Path) -> None:
    """Write the upper part of an HTML page as a small picture, drawn by headless Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        raise helper.UserError("no Chromium here to draw the page with; install one (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                        f"--user-data-dir={folder}/profile", "--window-size=1180,1930", "--virtual-time-budget=2000",
                        f"--screenshot={picture}", page.resolve().as_uri()], check=True, stderr=subprocess.DEVNULL)
        with Image.open(str(picture)) as image, writing.replacing(path) as temporary:
            image.convert("RGB").resize((900, round(image.height * 900 / image.width)), Image.LANCZOS).save(
                str(temporary), quality=85, optimize=True)


# --- the diagram ------------------------------------------------------------------------------------------------------

def draw_method(path: Path) -> None:
    """Draw the diagram of the method: the rays (left) and the parts with their connections (right)."""
    figure = Figure(figsize=(12.6, 4.9), dpi=120)
    figure.patch.set_facecolor("white")
    draw_rays(figure.add_axes([0.0, 0.0, 0.36, 1.0]))
    draw_parts(figure.add_axes([0.37, 0.0, 0.63, 1.0]))
    with writing.replacing(path) as temporary:
        figure.savefig(temporary)


def flat_sdf(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the sdf of an object in two dimensions: a smooth union of three discs."""
    discs = ((-0.32, -0.40, 0.26), (0.25, 0.08, 0.40), (0.28, -0.46, 0.22))
    return -np.log(sum(np.exp(-9 * (np.hypot(x - a, y - b) - r)) for a, b, r in discs)) / 9


def draw_rays(axes) -> None:
    """Draw the object in its unit sphere, a ray that hits it, a ray that misses it, and the uniform points."""
    axes.set(xlim=(-2.12, 1.22), ylim=(-1.62, 1.78), aspect="equal")
    axes.axis("off")
    x, y = np.meshgrid(np.linspace(-1.1, 1.1, 400), np.linspace(-1.1, 1.1, 400))
    sdf = np.where(np.hypot(x, y) < 0.995, flat_sdf(x, y), np.nan)
    axes.contourf(x, y, sdf, [-1, 0], colors=["#dfe5ec"])
    axes.contour(x, y, sdf, [0.15, 0.3, 0.45], colors=["#c3ccd6"], linewidths=0.8)
    axes.contour(x, y, sdf, [0], colors=[INK], linewidths=2.2)
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor=GREY, linestyle=(0, (5, 4)), linewidth=1.2))

    eye = np.array([-2.0, 0.35])
    hit_ray, side_ray = helper.unit(np.array([1.9, -0.38])), helper.unit(np.array([2.0, 0.52]))
    near = entry(eye, hit_ray)
    t = near
    for _ in range(40):     # sphere tracing; only its long steps are drawn
        step = flat_sdf(*(eye + t * hit_ray))
        if step > 0.03:
            here = eye + t * hit_ray
            axes.add_patch(Circle(here, step, fill=False, edgecolor=BLUE, linewidth=0.8, alpha=0.6))
            axes.plot(*here, ".", color=BLUE, markersize=4)
        t += step
    hit = eye + t * hit_ray
    chord = eye + np.linspace(entry(eye, side_ray), entry(eye, side_ray, 1), 24)[:, None] * side_ray
    least = chord[flat_sdf(*chord.T).argmin()]
    axes.plot(*np.stack([eye, hit]).T, color=BLUE, linewidth=1.6)
    axes.plot(*np.stack([eye, chord[-1]]).T, color=ORANGE, linewidth=1.6)
    axes.plot(*chord.T, ".", color=ORANGE, markersize=3.5)
    axes.plot(*hit, "o", color=BLUE, markersize=9, zorder=5)
    axes.plot(*least, "o", color=ORANGE, markersize=9, zorder=5)
    random = np.random.default_rng(3).uniform(-1.05, 1.05, (34, 2))
    axes.plot(*random.T, "+", color=GREEN, markersize=6, alpha=0.9)

    axes.plot(*eye, "o", color=INK, markersize=7)
    axes.plot([-1.72, -1.72], [-0.02, 0.70], color=INK, linewidth=2.5)
    axes.text(-2.04, 0.84, "a view", color=INK, fontsize=12)
    axes.text(0.0, -1.2, "unit sphere", color=GREY, fontsize=11.5, ha="center")
    axes.text(0.22, 0.02, "sdf < 0", color=INK, fontsize=12, ha="center", va="center")
    for height, colour, marker, words in ((1.62, BLUE, "o", "hit in the mask: carries the colour loss"),
                                          (1.41, ORANGE, "o", "other rays: least sdf carries the mask loss"),
                                          (1.20, GREEN, "+", "eikonal: random points, and all of the above")):
        axes.plot(-1.98, height, marker, color=colour, markersize=8)
        axes.text(-1.86, height, words, color=colour, fontsize=11.5, va="center")


def entry(eye: np.ndarray, direction: np.ndarray, side: int = -1) -> float:
    """Return the distance at which a ray enters (side -1) or leaves (side 1) the unit circle."""
    along = eye @ direction
    return -along + side * np.sqrt(along ** 2 - eye @ eye + 1)


def draw_parts(axes) -> None:
    """Draw the networks, the ray tracer and the losses as boxes, joined by arrows."""
    axes.set(xlim=(0, 100), ylim=(0, 62))
    axes.axis("off")
    box(axes, (0.5, 39), (21, 18), "ray tracer",
        "sphere tracing,\nsamples, secant;\nno gradient", GREY, dashed=True)
    box(axes, (28.5, 39), (27, 18), "differentiable hit",
        "$\\hat{x} = c + (t_0 - \\frac{f(x_0;\\theta) - f_0}{n_0 \\cdot v})\\, v$", BLUE)
    box(axes, (60.5, 39), (18, 18), "renderer",
        "$\\gamma_4$ of the view,\n5 affine layers,\nReLU, tanh", BLUE)
    box(axes, (0.5, 9), (78, 18), "implicit network  $f(x;\\theta)$",
        "$\\gamma_6(x)$  $\\rightarrow$  9 affine layers, softplus  $\\rightarrow$  sdf, feature;    "
        "$n = \\nabla_x$ sdf", INK)
    box(axes, (86, 39), (13.5, 18), "colour", "$|I - rgb|_1$", BLUE, filled=True)
    box(axes, (86, 19), (13.5, 14), "mask", "CE($O$,\n$\\sigma(-\\alpha\\,$sdf))", ORANGE, filled=True)
    box(axes, (86, 3), (13.5, 12), "eikonal", "$(|n| - 1)^2$", GREEN, filled=True)
    arrow(axes, (21.5, 48), (28.5, 48), BLUE, "$t_0$")
    arrow(axes, (55.5, 48), (60.5, 48), BLUE, "$\\hat{x}$")
    arrow(axes, (78.5, 48), (86, 48), BLUE, "rgb")
    arrow(axes, (8, 39), (8, 27), GREY, "points", dashed=True, side="left")
    arrow(axes, (13, 27), (13, 39), GREY, "sdf", dashed=True, side="right")
    arrow(axes, (41, 27), (41, 39), BLUE, "$f(x_0;\\theta)$", side="right")
    arrow(axes, (70, 27), (70, 39), BLUE, "$n$, feature", side="right")
    arrow(axes, (78.5, 24), (86, 24), ORANGE, "sdf")
    arrow(axes, (78.5, 12), (86, 12), GREEN, "$n$")
    axes.text(39.5, 4, "loss = colour + 100 mask + 0.1 eikonal;  solid arrows carry its gradient back",
              color=GREY, fontsize=11.5, ha="center")


def box(axes, corner, size, title: str, words: str, colour: str, dashed: bool = False, filled: bool = False) -> None:
    """Draw a box with a title and words below it."""
    face = colour if filled else "white"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=1.6", facecolor=face,
                                  edgecolor=colour, linewidth=1.8, linestyle="--" if dashed else "-"))
    centre, top = corner[0] + size[0] / 2, corner[1] + size[1]
    axes.text(centre, top - 3.2, title, ha="center", va="center", fontsize=13, fontweight="bold",
              color="white" if filled else INK)
    axes.text(centre, (corner[1] + top - 5.5) / 2, words, ha="center", va="center", fontsize=12,
              color="white" if filled else INK, linespacing=1.35)


def arrow(axes, start, end, colour: str, words: str, dashed: bool = False, side: str = "above") -> None:
    """Draw an arrow with words above it, or at its left or right side."""
    style = dict(arrowstyle="-|>", color=colour, linewidth=1.8, mutation_scale=15, shrinkA=0, shrinkB=0)
    axes.annotate("", end, start, arrowprops=dict(style, linestyle="--" if dashed else "-"))
    middle = (np.array(start) + end) / 2 + {"above": (0, 2.2), "left": (-0.8, 0), "right": (0.8, 0)}[side]
    axes.text(*middle, words, color=colour, fontsize=12, va="center",
              ha={"above": "center", "left": "right", "right": "left"}[side])


if __name__ == "__main__":
    helper.run(main)
