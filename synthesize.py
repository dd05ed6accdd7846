"""Render views of a trained scene as pictures, with normals and depth on request, or a moving camera as a video.

    python synthesize.py --config results_scan118/default.yaml --model-load-path results_scan118/model_01999.h5

Writes to renders/ in the run's folder.
"""
from collections import namedtuple
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation, Slerp
from tqdm import tqdm

import datasets
import helper
import network
import ray_tracer
from backends import architecture
from files import writing
from training import cameras, checkpoints

CHUNK = 1 << 15     # rays traced together; the memory of a render is that of a chunk, whatever the image's size
SHAPE_VIEWS, SHAPE_SIDE = 4, 96        # of shape_picture: how many views, and the most pixels of their longer side

Render = namedtuple("Render", "rgb normals depth hit")


def main():
    parser = helper.argument_parser("Render views of a trained scene, or a moving camera.", model=True)
    parser.add_argument("--views", nargs="+", default=None, metavar="VIEW",
                        help="indices of the views to render, or all; by default the validation view. Of a path: where "
                             "the turntable starts, or between which cameras to go (by default all)")
    parser.add_argument("--path", choices=("turntable", "cameras"),
                        help="a video: once around the object, or from camera to camera")
    parser.add_argument("--output", metavar="FILE",
                        help="the video, .mp4 or .gif by its name; by default an .mp4 of the path's name in renders/")
    parser.add_argument("--frames", type=int, default=100, help="of a video, which shows 25 a second")
    parser.add_argument("--height", type=int, default=None, help="pixels; by default that of the scene's images")
    parser.add_argument("--normals", action="store_true", help="also write the normals, as colours")
    parser.add_argument("--depth", action="store_true", help="also write the depth, as a picture and as numbers (.npy)")
    parser.add_argument("--appearance-model-path", metavar="MODEL",
                        help="another run's model_*.h5, or its folder, whose renderer colours this model's shape")
    args = parser.parse_args()
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
        path = Path(args.output or folder / "renders" / f"{args.path}{ending(args)}.mp4")
        along = path_of(args, views_cameras, views)
        renders = (render_view(sdf, shade, camera, conf.tracer) for camera in along)
        write_video(path, tqdm(renders, total=args.frames, unit="frame", dynamic_ncols=True), args.normals)
        print(f"rendered {args.frames} frames: {path}")
        return
    for view in tqdm(views, unit="view", dynamic_ncols=True):
        write_view(folder / "renders" / f"view_{view:03d}{ending(args)}",
                   render_view(sdf, shade, views_cameras[view], conf.tracer), args)
    print(f"rendered {len(views)} view{'s' if len(views) > 1 else ''}: {folder / 'renders'}")


def ending(args):
    """Return what the names of renders end in."""
    return "_appearance" if args.appearance_model_path else ""


def write_view(stem, render, args):
    """Write a Render's pictures under names that begin with `stem`, those that the command line asks for."""
    writing.write_image(f"{stem}.png", render.rgb)
    if args.normals:
        writing.write_image(f"{stem}_normals.png", normal_colors(render))
    if args.depth:
        writing.write_image(f"{stem}_depth.png", depth_grey(render))
        with writing.replacing(f"{stem}_depth.npy") as temporary:
            np.save(temporary, render.depth)


def check_arguments(args):
    """Raise UserError for options that do not fit together, before anything is loaded."""
    if args.output and not args.path:
        raise helper.UserError("--output names a video, which --path turntable or --path cameras makes")
    if args.output and Path(args.output).suffix.lower() not in (".mp4", ".gif"):
        raise helper.UserError(f"--output {args.output}: the name must end in .mp4 or .gif")
    if args.output:
        writing.check_target(args.output)
    if args.path and args.depth:
        raise helper.UserError("--depth writes numbers for single views; leave it or --path out")
    if args.frames < 2:
        raise helper.UserError(f"--frames must be 2 or more, not {args.frames}")
    if args.height is not None and not 8 <= args.height <= 8192:
        raise helper.UserError(f"--height must be 8 to 8192, not {args.height}")


def take_appearance(path, net):
    """Put another model's rendering network in the place of the current one: its colours on our shape.

    net: our configuration's network section. Raises UserError where the other renderer does not take its inputs.
    """
    arrays, _ = checkpoints.read_arrays(path)
    first = arrays.get("rendering/0/v")
    if first is None or first.ndim != 2:
        raise helper.UserError(f"{path}: has no rendering network; it was saved by another program")
    shapes = {name: shape for name, shape
              in architecture.parameter_shapes(replace(net, width=first.shape[1])).items()
              if name.startswith("rendering/")}
    given = shapes["rendering/0/v"][0]
    if first.shape[0] != given:
        raise helper.UserError(f"{path}: its renderer takes {first.shape[0]} numbers of a point, and the shape's model "
                               f"gives {given}, with network.feature {net.feature} and network.without {net.without}; "
                               "train both with the same")
    checkpoints.check_parameters(path, arrays, shapes)
    checkpoints.set_parameters({name: arrays[name] for name in shapes})


# --- the path of a camera ---------------------------------------------------------------------------------------------

def resized(intrinsics, shape, height):
    """The intrinsics and the shape (height, width) of images resized from `shape` to that height."""
    factor = shape[0] / height
    return datasets.shrink_intrinsics(intrinsics, factor), (height, max(round(shape[1] / factor), 1))


def path_of(args, views_cameras, views):
    """Return the helper.Cameras along the path that the command line asks for."""
    intrinsics, poses, shapes = zip(*views_cameras)
    if args.path == "turntable":
        along = [intrinsics[views[0]]] * args.frames, turntable(np.stack(poses), views[0], args.frames)
    else:
        along = between_cameras(np.stack(intrinsics)[views], np.stack(poses)[views], args.frames)
    return [helper.Camera(*camera, shapes[0]) for camera in zip(*along)]


def turntable(poses, view, frames):
    """The poses (frames, 4, 4) of a view's camera going once around the upright axis through the origin.

    poses: (N, 4, 4), all cameras', which say what is upright, as helper.upright.
    """
    turns = np.eye(4)[None].repeat(frames, axis=0)
    angles = 2 * np.pi * np.arange(frames) / frames     # the next frame would be the first again
    turns[:, :3, :3] = Rotation.from_rotvec(angles[:, None] * helper.upright(poses)).as_matrix()
    return turns @ poses[view]


def between_cameras(intrinsics, poses, frames):
    """The intrinsics (frames, 3, 3) and poses (frames, 4, 4) on the way from the first camera through all to the last.

    Orientations by slerp; linearly the intrinsics and, seen from the camera, the place of the origin. So the object
    keeps its place in the image, and the camera goes around it where its own place, taken linearly, would lead through.
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


def write_video(path, renders, normals):
    """Write Renders as the frames of a video at `path`, and with `normals` a second one of these beside it."""
    with ExitStack() as stack:
        append = stack.enter_context(writing.video_writer(path))
        if normals:
            beside = path.with_name(f"{path.stem}_normals{path.suffix}")
            append_normals = stack.enter_context(writing.video_writer(beside))
        for render in renders:
            append(render.rgb)
            if normals:
                append_normals(normal_colors(render))


# --- a view -----------------------------------------------------------------------------------------------------------

def render_view(sdf, shade, camera, tracer, wanted=None):
    """Render what a camera sees.

    sdf: points to sdf, as network.sdf_evaluator gives it; shade: points and directions to rgb and normals, as
    network.shader gives it; camera: a helper.Camera; tracer: the configuration's section; wanted: (H, W) bool, the
    pixels to render, by default all.
    Returns a Render: rgb (H, W, 3) in [0, 1], white where nothing is hit; normals (H, W, 3), the sdf's gradient, and
    depth (H, W), along the camera's axis in radii of the unit sphere, both 0 where nothing is hit; and hit (H, W) bool.
    """
    height, width = camera.shape
    pixels = np.arange(height * width) if wanted is None else np.flatnonzero(wanted)
    uv = helper.pixel_grid(height, width)[pixels]
    origin, directions = helper.pixel_rays(uv, camera.intrinsics, camera.pose)
    rgb, normals = np.ones((height * width, 3), np.float32), np.zeros((height * width, 3), np.float32)
    depth, hits = np.zeros(height * width, np.float32), np.zeros(height * width, bool)
    for start in range(0, len(pixels), CHUNK):
        rays = directions[start:start + CHUNK]
        t, hit = ray_tracer.trace(sdf, origin, rays, **vars(tracer))
        shown = pixels[start:start + CHUNK][hit]
        t, rays = t[hit], rays[hit]
        rgb[shown], normals[shown] = shade(origin + t[:, None] * rays, rays)
        depth[shown] = t * (rays @ camera.pose[:3, 2].astype(np.float32))
        hits[shown] = True
    return Render(rgb.reshape(height, width, 3), normals.reshape(height, width, 3), depth.reshape(height, width),
                  hits.reshape(height, width))


def normal_colors(render):
    """The unit normals as colours (H, W, 3) in [0, 1], (n + 1) / 2 in the scene's axes; white where nothing is hit."""
    return np.where(render.hit[..., None], unit(render.normals) * 0.5 + 0.5, 1.0)


def unit(vectors):
    """Vectors (..., 3) at length 1; 0 stays 0."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def depth_grey(render):
    """The depth as grey values (H, W) in [0, 1]: white nearest, dark grey farthest, black where nothing is hit."""
    if not render.hit.any():
        return np.zeros(render.depth.shape)
    near, far = render.depth[render.hit].min(), render.depth[render.hit].max()
    return np.where(render.hit, 1.0 - 0.8 * (render.depth - near) / max(far - near, 1e-6), 0.0)


def clay(normals, pose):
    """A shape as grey clay (H, W, 3) in [0, 1], lit from the camera's upper left, a little from the right.

    normals: (H, W, 3) of any length, 0 where nothing is hit, which is white; pose (4, 4): the camera's.
    """
    inwards = unit(normals) @ pose[:3, :3]
    key, fill = (inwards @ unit(np.array(light)) for light in ((-0.5, -0.7, -0.75), (0.8, 0.1, -0.4)))
    grey = 0.16 + 0.66 * np.maximum(key, 0) + 0.16 * np.maximum(fill, 0)
    return np.where((normals != 0).any(axis=-1, keepdims=True), grey[..., None] * np.array([0.98, 0.96, 0.92]), 1.0)


def shape_picture(sdf, shade, scene, view, tracer):
    """Return the surface as clay (H, W, 3), seen small from `view` and from the scene's views that lie farthest apart.

    sdf, shade and tracer as in render_view.
    """
    factor = max(max(scene.images.shape[1:3]) / SHAPE_SIDE, 1.0)
    shape = tuple(max(round(side / factor), 1) for side in scene.images.shape[1:3])
    pictures = []
    for index in datasets.spread_views(scene.poses, view, SHAPE_VIEWS):
        camera = helper.Camera(datasets.shrink_intrinsics(scene.intrinsics[index], factor), scene.poses[index], shape)
        pictures.append(clay(render_view(sdf, shade, camera, tracer).normals, camera.pose))
    return np.concatenate(pictures, axis=1)


if __name__ == "__main__":
    helper.run(main)
