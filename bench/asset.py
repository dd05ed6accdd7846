"""Measure a textured, light mesh of a run against the networks' own renders, in the views that were held out.

    python bench/asset.py --config results_demo/demo.yaml --model-load-path results_demo --faces 50000 --texture 1024

A software rasteriser draws the asset. PSNR is taken inside the masks against the photographs: of the networks, and of
the asset with the colours of either appearance, without and with highlights; for rays through pixel centres and for
pixels as areas. The last column is the share of the squared error, at pixel centres, of pixels that show no surface.
The angle is that between the normals of the asset's shading and the sdf's.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import datasets  # noqa: E402
import extract  # noqa: E402
import helper  # noqa: E402
import network  # noqa: E402
from assets import appearance, baking, decimation, photographs  # noqa: E402
from assets.surface import Surface, cut_by_sphere  # noqa: E402
from metrics import (
    meshes,  # noqa: E402
    rasterizer,  # noqa: E402
)
from rendering.pixels import render_areas  # noqa: E402
from training import cameras, checkpoints  # noqa: E402

FINER = 4       # samples per side of a pixel as an area


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
    look, explained = appearance.look_of(few, surface, scene.poses[trained, :3, 3], True)
    print(f"light: {look.light}, which explains {explained:.1%} of how the colours change with the view")
    seen = photographs.blended(photographs.photographs_of(scene, trained, surface.sdf, conf.tracer))
    assets = {"networks' colours along the normals": baking.baked(few, args.texture, surface)}
    for name, blended in (("networks' colours", None), ("photographs", seen)):
        asset = baking.baked(few, args.texture, surface, look, blended)
        assets[name] = asset._replace(light=None)
        if asset.light:
            assets[f"{name}, highlights"] = asset
    compare(scene, conf, surface, assets)


def compare(scene, conf, surface, assets):
    """Print PSNR and the normals' mean angle in the held-out views, or in the validation view if there are none."""
    errors, pixels, angles = {}, 0, []
    for view in conf.data.held_out_views or [conf.train.validation_view]:
        camera = helper.Camera(scene.intrinsics[view], scene.poses[view], scene.masks[view].shape)
        areas, centres = render_areas(surface.sdf, surface.shade, camera, conf.tracer)
        mask, pictures = scene.masks[view], {"networks": (areas.rgb, centres.rgb, centres.hit)}
        for name, asset in assets.items():
            rgb, normals, where = rasterizer.shown(asset, camera)
            pictures[name] = (as_areas(asset, camera), rgb, where)
        for name, (area, centre, shown) in pictures.items():
            squares = [((rgb - scene.images[view] / 255) ** 2).sum(axis=-1) for rgb in (area, centre)]
            sums = squares[1][mask].sum(), squares[0][mask].sum(), squares[1][mask & ~shown].sum()
            errors[name] = errors.get(name, 0) + np.array(sums)
        pixels += mask.sum()
        both = mask & centres.hit & where
        cosines = (normals[both] * helper.unit(centres.normals[both])).sum(axis=1)
        angles.append(np.degrees(np.arccos(np.clip(cosines, -1, 1))))
    for name, sums in errors.items():
        centre, area = -10 * np.log10(sums[:2] / (3 * pixels))
        print(f"PSNR in the masks, {name}: {centre:.2f} dB, pixels as areas {area:.2f} dB, no surface "
              f"{sums[2] / sums[0]:.0%}")
    print(f"angle between the normals: {np.concatenate(angles).mean():.2f} degrees on average")


def as_areas(asset, camera):
    """Return the picture (H, W, 3) of an asset of which each pixel is the mean of those of FINER^2 that show it."""
    height, width = camera.shape
    intrinsics = datasets.shrink_intrinsics(camera.intrinsics, 1 / FINER)
    rgb, _, where = rasterizer.shown(asset, helper.Camera(intrinsics, camera.pose, (height * FINER, width * FINER)))
    blocks = np.concatenate([rgb * where[..., None], where[..., None]], axis=-1)
    sums = blocks.reshape(height, FINER, width, FINER, 4).sum(axis=(1, 3))
    return np.where(sums[..., 3:] > 0, sums[..., :3] / np.maximum(sums[..., 3:], 1), 1.0)


if __name__ == "__main__":
    helper.run(main)
