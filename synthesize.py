"""Render views of a trained scene as pictures, with normals and depth on request.

    python synthesize.py --config results_scan118/default.yaml --model-load-path results_scan118/model_01999.h5

Writes to renders/ in the run's folder.
"""
from collections import namedtuple

import numpy as np
from tqdm import tqdm

import datasets
import helper
import network
import ray_tracer

CHUNK = 1 << 15     # rays traced together; the memory of a render is that of a chunk, whatever the image's size

Render = namedtuple("Render", "rgb normals depth hit")


def main():
    parser = helper.argument_parser("Render views of a trained scene.", model=True)
    parser.add_argument("--views", nargs="+", default=None, metavar="VIEW",
                        help="indices of the views to render, or all; by default the validation view")
    parser.add_argument("--normals", action="store_true", help="also write the normals, as colours")
    parser.add_argument("--depth", action="store_true", help="also write the depth, as a picture and as numbers (.npy)")
    args = parser.parse_args()
    conf, folder = helper.open_run(args, network.parameter_shapes)
    scene = datasets.load_scene(conf.data.path, conf.data.downscale)
    views = datasets.chosen_views(args.views or [conf.train.validation_view], len(scene.images), "--views")
    sdf = network.sdf_evaluator()
    for view in tqdm(views, unit="view", dynamic_ncols=True):
        render = render_view(sdf, scene.intrinsics[view], scene.poses[view], scene.images.shape[1:3], conf.tracer)
        stem = folder / "renders" / f"view_{view:03d}"
        helper.write_image(f"{stem}.png", render.rgb)
        if args.normals:
            helper.write_image(f"{stem}_normals.png", normal_colors(render))
        if args.depth:
            helper.write_image(f"{stem}_depth.png", depth_grey(render))
            with helper.replacing(f"{stem}_depth.npy") as temporary:
                np.save(temporary, render.depth)
    print(f"rendered {len(views)} view{'s' if len(views) > 1 else ''}: {folder / 'renders'}")


def render_view(sdf, intrinsics, pose, shape, tracer, wanted=None):
    """Render a view with the current parameters.

    sdf: the callable of those parameters; intrinsics (3, 3), pose (4, 4), shape (height, width); tracer: the
    configuration's section; wanted: (H, W) bool, the pixels to render (all by default).
    Returns a Render: rgb (H, W, 3) in [0, 1], white where nothing is hit, normals (H, W, 3), the gradient of the sdf,
    depth (H, W), along the camera's axis in radii of the unit sphere, both 0 where nothing is hit, and hit (H, W) bool.
    """
    height, width = shape
    pixels = np.arange(height * width) if wanted is None else np.flatnonzero(wanted)
    origin, directions = helper.pixel_rays(helper.pixel_grid(height, width)[pixels], intrinsics, pose)
    rgb, normals = np.ones((height * width, 3), np.float32), np.zeros((height * width, 3), np.float32)
    depth, hits = np.zeros(height * width, np.float32), np.zeros(height * width, bool)
    for start in range(0, len(pixels), CHUNK):
        rays = directions[start:start + CHUNK]
        t, hit = ray_tracer.trace(sdf, origin, rays, **vars(tracer))
        shown = pixels[start:start + CHUNK][hit]
        t, rays = t[hit], rays[hit]
        rgb[shown], normals[shown] = network.shade(origin + t[:, None] * rays, rays)
        depth[shown] = t * (rays @ pose[:3, 2].astype(np.float32))
        hits[shown] = True
    return Render(rgb.reshape(height, width, 3), normals.reshape(height, width, 3), depth.reshape(height, width),
                  hits.reshape(height, width))


def normal_colors(render):
    """The unit normals as colours (H, W, 3) in [0, 1], (n + 1) / 2 in the scene's axes; white where nothing is hit."""
    length = np.maximum(np.linalg.norm(render.normals, axis=-1, keepdims=True), 1e-12)
    return np.where(render.hit[..., None], render.normals / length * 0.5 + 0.5, 1.0)


def depth_grey(render):
    """The depth as grey values (H, W) in [0, 1]: white nearest, dark grey farthest, black where nothing is hit."""
    if not render.hit.any():
        return np.zeros(render.depth.shape)
    near, far = render.depth[render.hit].min(), render.depth[render.hit].max()
    return np.where(render.hit, 1.0 - 0.8 * (render.depth - near) / max(far - near, 1e-6), 0.0)


if __name__ == "__main__":
    helper.run(main)
