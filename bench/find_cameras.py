"""Find the cameras of a scene's photographs alone and compare them with its own cameras.

    python bench/find_cameras.py ../shared/data/dtu_scan65 --work /tmp/scan65

Prints the views that were placed, the errors of the camera centres (in radii of the unit sphere) and of the rotations
(in degrees) after the best similarity alignment, and the time: wall, and user and system of all cores.
"""
import argparse
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import datasets
import helper
from scenes import camera_files, structure_from_motion
from training import cameras


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", help="a scene with image/ and cameras.npz")
    parser.add_argument("--work", required=True, help="the working folder, new or of an interrupted run")
    args = parser.parse_args()
    images, work = datasets.scene_files(Path(args.scene))[0], Path(args.work)
    (work / "images").mkdir(parents=True, exist_ok=True)
    for image in images:
        if not (work / "images" / image.name).exists():
            (work / "images" / image.name).symlink_to(image.absolute())
    start = time.time()
    found = structure_from_motion.find_cameras([work / "images" / image.name for image in images], work)
    wall, used = time.time() - start, resource.getrusage(resource.RUSAGE_SELF)
    views = camera_files.read_views(work)[0]
    matrices = datasets.read_matrices(Path(args.scene) / "cameras.npz", len(images))
    places = [[image.name for image in images].index(view.image.name) for view in views]
    true_poses = [datasets.view_camera(Path(args.scene) / "cameras.npz", matrices, place)[1] for place in places]
    off = cameras.errors(np.stack([view.pose for view in views]), np.stack(true_poses))
    print(f"{len(views)} of {len(images)} views placed; left out: {found.left_out}")
    print("cameras", cameras.in_words(off, 1.0))
    print(f"{wall:.0f} s wall, {used.ru_utime + used.ru_stime:.0f} s user and system, {os.cpu_count()} cores")


if __name__ == "__main__":
    helper.run(main)
