"""From photographs to a scene: cameras and masks as other programs write them, the visual hull, checks, and the overview picture.

prepare.py puts these together. What a scene is once it is on disk, datasets.py says.
"""
