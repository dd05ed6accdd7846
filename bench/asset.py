"""Measure a textured, light mesh of a run against the networks' own renders, in the views that were held out.

    python bench/asset.py --config results_demo/demo.yaml --model-load-path results_demo --faces 50000 --texture 1024

A software rasteriser draws the asset. PSNR is taken inside the masks against the photographs: of the networks, and of
the asset with either appearance. The angle is that between the normals of the asset's shading and the sdf's.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import datasets  # noqa: E402
import extract  # noqa: E402
import helper  # noqa: E402
import network  # noqa: E402
from assets import baking, decimation, photographs  # noqa: E402
from assets.surface import Surface, cut_by_sphere  # noqa: E402
from metrics import (
    meshes,  # noqa: E402
    rasterizer,  # noqa: E402
)
from rendering.pixels import render_view  # noqa: E402
from training import cameras, checkpoints  # noqa: E402


def main():
    parser = helper.argument_parser("Measure a textured, light mesh against the networks' renders.", model=True)
    parser.add_argument("--faces", type=int, default=extract.LIGHT)
    parser.add_argument("--texture", type=int, default=1024)
    args = parser.parse_args()
    conf, _ = checkpoints.open_run(args)
    scene = datasets.load_scene(conf.data.path, conf.data.downscale, conf.data.cameras)
    scene = scene._replace(poses=cameras.trained_poses(scene.poses, args.model_load_path))
    surface = Surface(network.sdf_evaluator(), network.shader(conf.network))
    full = extract.extract(surface.sdf, conf.extract.coarse_resolution, conf.extract.resolution)
    few = decimation.decimated(full, args.faces, surface)
    print(f"Chamfer distance to the full mesh: {meshes.mesh_distances(few, full).chamfer:.6f}")
    few = extract.with_colors(few, surface.shade, cut_by_sphere(few.vertices, surface.sdf))
    trained = datasets.training_views(conf.data.held_out_views, len(scene.images), args.config)
    seen = photographs.blended(photographs.photographs_of(scene, trained, surface.sdf, conf.tracer))
    assets = [baking.baked(few, args.texture, surface, appearance) for appearance in (None, seen)]
    compare(scene, conf, surface, assets)


def compare(scene, conf, surface, assets):
    """Print PSNR and the normals' mean angle in the held-out views, or in the validation view if there are none."""
    errors, pixels, angles = np.zeros(1 + len(assets)), 0, []
    for view in conf.data.held_out_views or [conf.train.validation_view]:
        camera = helper.Camera(scene.intrinsics[view], scene.poses[view], scene.masks[view].shape)
        render, mask = render_view(surface.sdf, surface.shade, camera, conf.tracer), scene.masks[view]
        pictures = [rasterizer.shown(asset, camera) for asset in assets]
        photograph = scene.images[view][mask] / 255
        errors += [((rgb[mask] - photograph) ** 2).sum() for rgb in (render.rgb, *(shown[0] for shown in pictures))]
        pixels += mask.sum()
        _, normals, where = pictures[0]
        both = mask & render.hit & where
        cosines = (normals[both] * helper.unit(render.normals[both])).sum(axis=1)
        angles.append(np.degrees(np.arccos(np.clip(cosines, -1, 1))))
    for name, value in zip(("networks", "asset, networks' colours", "asset, photographs"), errors / (3 * pixels)):
        print(f"PSNR in the masks, {name}: {-10 * np.log10(value):.2f} dB")
    print(f"angle between the normals: {np.concatenate(angles).mean():.2f} degrees on average")


if __name__ == "__main__":
    helper.run(main)
