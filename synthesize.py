"""Render a trained scene: views as pictures, with normals and depth on request, or a moving camera as a video.

    python synthesize.py --config results_scan118/default.yaml --model-load-path results_scan118/model_01999.h5

Writes to renders/ in the run's folder.
"""
import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterable, List, Tuple

import numpy as np
from scipy.spatial.transform import Rotation, Slerp
from tqdm import tqdm

import datasets
import helper
import network
import ray_tracer
from files import writing
from rendering.pixels import BACKGROUNDS, Render, clay, depth_grey, normal_colors, on_background, render_areas
from training import cameras, checkpoints

SHAPE_VIEWS, SHAPE_SIDE = 4, 96        # of shape_picture: the number of views, and the longer side of each in pixels


def main():
    args = parse_arguments()
    check_arguments(args)
    conf, folder = checkpoints.open_run(args)
    if args.appearance_model_path:
        take_appearance(checkpoints.model_file(args.appearance_model_path), conf.network)
    scene = datasets.load_scene(conf.data.path, conf.data.downscale, conf.data.cameras)
    scene = scene._replace(poses=cameras.trained_poses(scene.poses, args.model_load_path))
    words = args.views or (["all"] if args.path == "cameras" else [conf.train.validation_view])
    views = datasets.chosen_views(words, len(scene.images), "--views")
    if args.path == "cameras" and len(views) < 2:
        raise helper.UserError("--path cameras goes between cameras; --views must name two or more")
    height, width = scene.images.shape[1:3]
    intrinsics, shape = resized(scene.intrinsics, (height, width), args.height or height)
    views_cameras = [helper.Camera(*view, shape) for view in zip(intrinsics, scene.poses)]
    sdf, shade = network.sdf_evaluator(), network.shader(conf.network)
    if args.path:
        path = Path(args.output or folder / "renders" / f"{args.path}{name_ending(args)}.mp4")
        frame_cameras = path_of(args, views_cameras, views)
        renders = (render_areas(sdf, shade, camera, conf.tracer)[0] for camera in frame_cameras)
        write_video(path, tqdm(renders, total=args.frames, unit="frame", dynamic_ncols=True), args)
        print(f"rendered {args.frames} frames: {path}")
        return

    def render(view):
        write_view(folder / "renders" / f"view_{view:03d}{name_ending(args)}",
                   render_areas(sdf, shade, views_cameras[view], conf.tracer)[0], args)

    rendered = helper.side_by_side(render, views, network.renders_at_once())
    list(tqdm(rendered, total=len(views), unit="view", dynamic_ncols=True))
    print(f"rendered {len(views)} view{'s' if len(views) > 1 else ''}: {folder / 'renders'}")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = helper.argument_parser("Render views of a trained scene, or a moving camera.", model=True)
    parser.add_argument("--views", nargs="+", default=None, metavar="VIEW",
                        help="indices of the views to render, or all; by default the validation view. With --path: the "
                             "turntable's first view, or the cameras to pass through (by default all)")
    parser.add_argument("--path", choices=("turntable", "cameras"),
                        help="render a video: once around the object, or from camera to camera")
    parser.add_argument("--output", metavar="FILE",
                        help="the video's file, .mp4 or .gif; by default an .mp4 named after the path, in renders/")
    parser.add_argument("--frames", type=int, default=100, help="number of the video's frames, 25 per second")
    parser.add_argument("--height", type=int, default=None, help="pixels; by default that of the scene's images")
    parser.add_argument("--normals", action="store_true", help="also write the normals, as colours")
    parser.add_argument("--depth", action="store_true", help="also write the depth, as a picture and as numbers (.npy)")
    parser.add_argument("--background", choices=tuple(BACKGROUNDS), default="white",
                        help="what is behind the object; transparent, not for videos: PNG with alpha, the share of "
                             "each pixel that the object covers")
    parser.add_argument("--appearance-model-path", metavar="MODEL",
                        help="another run's model_*.h5, or its folder, whose renderer colours this model's shape")
    return parser.parse_args()


def name_ending(args: argparse.Namespace) -> str:
    """Return the ending of a render's file name, before the suffix."""
    return "_appearance" if args.appearance_model_path else ""


def write_view(stem: Path, render: Render, args: argparse.Namespace) -> None:
    """Write the pictures of a render that the command line asks for; their names begin with `stem`."""
    writing.write_image(f"{stem}.png", on_background(render.rgb, render.alpha, args.background))
    if args.normals:
        writing.write_image(f"{stem}_normals.png", normal_colors(render, args.background))
    if args.depth:
        writing.write_image(f"{stem}_depth.png", depth_grey(render))
        with writing.replacing(f"{stem}_depth.npy") as temporary:
            np.save(temporary, render.depth)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for options that are out of range or do not go together, before anything is loaded."""
    if args.output and not args.path:
        raise helper.UserError("--output names a video; add --path turntable or --path cameras")
    if args.output and Path(args.output).suffix.lower() not in (".mp4", ".gif"):
        raise helper.UserError(f"--output {args.output}: the name must end in .mp4 or .gif")
    if args.output:
        writing.check_target(args.output)
    if args.path and args.depth:
        raise helper.UserError("--depth is for single views; leave out --depth or --path")
    if args.path and BACKGROUNDS[args.background] is None:
        raise helper.UserError("--background transparent is for single views; for a video take white or black")
    if args.frames < 2:
        raise helper.UserError(f"--frames must be 2 or more, not {args.frames}")
    if args.height is not None and not 8 <= args.height <= 8192:
        raise helper.UserError(f"--height must be 8 to 8192, not {args.height}")


def take_appearance(path: Path, net) -> None:
    """Replace the current rendering network with that of the model at `path`: its colours on our shape.

    net: our configuration's network section. Raises UserError if the other renderer takes different inputs.
    """
    arrays, _ = checkpoints.read_arrays(path)
    first = arrays.get("rendering/0/v")
    if first is None or first.ndim != 2:
        raise helper.UserError(f"{path}: has no rendering network; it was saved by another program")
    shapes = {name: shape for name, shape
              in network.parameter_shapes(replace(net, width=first.shape[1])).items()
              if name.startswith("rendering/")}
    given = shapes["rendering/0/v"][0]
    if first.shape[0] != given:
        raise helper.UserError(f"{path}: its renderer takes {first.shape[0]} numbers per point, but the shape's model "
                               f"gives {given}, with network.feature {net.feature}, network.view_bands "
                               f"{net.view_bands} and network.without {net.without}; train both models with the same")
    checkpoints.check_parameters(path, arrays, shapes)
    checkpoints.set_parameters({name: arrays[name] for name in shapes})


# --- the path of a camera ---------------------------------------------------------------------------------------------

def resized(intrinsics: np.ndarray, shape: Tuple[int, int],
            height: int) -> Tuple[np.ndarray, Tuple[int, int]]:
    """Return the intrinsics (N, 3, 3) and the shape (height, width) of images resized from `shape` to `height`."""
    factor = shape[0] / height
    return datasets.shrink_intrinsics(intrinsics, factor), (height, max(round(shape[1] / factor), 1))


def path_of(args: argparse.Namespace, views_cameras: List[helper.Camera], views: List[int]) -> List[helper.Camera]:
    """Return the camera of each frame of the path that the command line asks for."""
    intrinsics, poses, shapes = zip(*views_cameras)
    if args.path == "turntable":
        along = [intrinsics[views[0]]] * args.frames, turntable(np.stack(poses), views[0], args.frames)
    else:
        along = between_cameras(np.stack(intrinsics)[views], np.stack(poses)[views], args.frames)
    return [helper.Camera(*camera, shapes[0]) for camera in zip(*along)]


def turntable(poses: np.ndarray, view: int, frames: int) -> np.ndarray:
    """Return the poses (frames, 4, 4) of a view's camera on one turn around the upright axis through the origin.

    poses: (N, 4, 4), of all cameras; helper.upright derives the axis from them.
    """
    turns = np.eye(4)[None].repeat(frames, axis=0)
    angles = 2 * np.pi * np.arange(frames) / frames     # the next frame would be the first again
    turns[:, :3, :3] = Rotation.from_rotvec(angles[:, None] * helper.upright(poses)).as_matrix()
    return turns @ poses[view]


def between_cameras(intrinsics: np.ndarray, poses: np.ndarray, frames: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return intrinsics (frames, 3, 3) and poses (frames, 4, 4) on a path from the first camera through all the others.

    intrinsics: (N, 3, 3); poses: (N, 4, 4), camera to world. Rotations are interpolated by slerp; the intrinsics and
    the origin's position in the camera's coordinates, linearly. So the object keeps its place in the image, and the
    camera goes around it; interpolating the camera's centre could lead through the object.
    """
    times = np.linspace(0, len(poses) - 1, frames)
    before = np.minimum(times.astype(int), len(poses) - 2)
    weight = (times - before)[:, None]
    rotations = Slerp(np.arange(len(poses)), Rotation.from_matrix(poses[:, :3, :3]))(times).as_matrix()
    origins = -np.einsum("nji,nj->ni", poses[:, :3, :3], poses[:, :3, 3])
    origins = (1 - weight) * origins[before] + weight * origins[before + 1]
    path = np.eye(4)[None].repeat(frames, axis=0)
    path[:, :3, :3] = rotations
    path[:, :3, 3] = -np.einsum("nij,nj->ni", rotations, origins)
    return (1 - weight[..., None]) * intrinsics[before] + weight[..., None] * intrinsics[before + 1], path


def write_video(path: Path, renders: Iterable[Render], args: argparse.Namespace) -> None:
    """Write renders as the frames of a video at `path`; with --normals, also a video of the normals beside it."""
    with ExitStack() as stack:
        append = stack.enter_context(writing.video_writer(path))
        if args.normals:
            beside = path.with_name(f"{path.stem}_normals{path.suffix}")
            append_normals = stack.enter_context(writing.video_writer(beside))
        for render in renders:
            append(on_background(render.rgb, render.alpha, args.background))
            if args.normals:
                append_normals(normal_colors(render, args.background))


# --- the shape --------------------------------------------------------------------------------------------------------

def shape_picture(sdf: ray_tracer.Sdf, shade: Callable, scene: datasets.Scene, view: int,
                  tracer) -> np.ndarray:
    """Return small pictures of the surface as clay, side by side (H, W, 3): from `view` and from views far apart.

    sdf, shade and tracer are those of render_areas.
    """
    factor = max(max(scene.images.shape[1:3]) / SHAPE_SIDE, 1.0)
    shape = tuple(max(round(side / factor), 1) for side in scene.images.shape[1:3])
    pictures = []
    for index in datasets.spread_views(scene.poses, view, SHAPE_VIEWS):
        camera = helper.Camera(datasets.shrink_intrinsics(scene.intrinsics[index], factor), scene.poses[index], shape)
        render = render_areas(sdf, shade, camera, tracer)[0]
        pictures.append(on_background(clay(render.normals, camera.pose), render.alpha, "white"))
    return np.concatenate(pictures, axis=1)


if __name__ == "__main__":
    helper.run(main)
