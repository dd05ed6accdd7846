"""How well `prepare.py --masks auto` finds the masks that a scene has.

    python bench/masks.py data/dtu/scan65 data/table
    python bench/masks.py data/dtu/scan24 --subject 0:0,0,1250,1200
    python bench/masks.py data/dtu/scan24 --cameras work/      with other cameras, as bench/find_cameras.py finds them

For each scene it makes the masks from image/ and its cameras alone, and compares them with those in mask/: intersection
over union of each view, their mean, the worst, and the time.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: E402
import helper  # noqa: E402
from scenes import auto_masks, camera_files  # noqa: E402
from scenes.views import read_view  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description="Compare the masks of prepare.py --masks auto with a scene's.")
    parser.add_argument("scenes", nargs="+", help="folders with image/, mask/ and cameras.npz")
    parser.add_argument("--subject", metavar="VIEW:X0,Y0,X1,Y1", help="as for prepare.py")
    parser.add_argument("--cameras", help="a folder or file with the cameras; by default the scene's cameras.npz")
    parser.add_argument("--views", action="store_true", help="print every view's number, too")
    args = parser.parse_args()
    for scene in args.scenes:
        names, shares, seconds = compare(Path(scene), args.subject, args.cameras or Path(scene) / "cameras.npz")
        worst = int(np.argmin(shares))
        if args.views:
            print("\n".join(f"  {name}: {share:.4f}" for name, share in zip(names, shares)))
        print(f"{scene}: {len(shares)} views, mean IoU {np.mean(shares):.4f}, worst {shares[worst]:.4f} "
              f"({names[worst]}), {seconds:.0f} s")


def compare(scene, subject, cameras):
    """Return the views' names, the intersections over union (V,) of found and given masks, and the time in seconds.

    The given masks are compared as the cameras see them, without distortion.
    """
    views = camera_files.read_views(cameras)[0]
    masks = {image.name: mask for image, mask in zip(*datasets.scene_files(scene)[:2])}
    start = time.perf_counter()
    makers = auto_masks.mask_makers(views, auto_masks.read_subject(subject, views) if subject else None,
                                    camera_files.sparse_points_of(cameras))
    shares = []
    for view, maker in zip(tqdm(views, desc="outlines", unit="view", dynamic_ncols=True), makers):
        given = read_view(view, masks[view.image.name], None).mask
        shares.append(auto_masks.overlap(read_view(view, maker, None).mask, given))
    return [view.image.name for view in views], np.array(shares), time.perf_counter() - start


if __name__ == "__main__":
    helper.run(main)
