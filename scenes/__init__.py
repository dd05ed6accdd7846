"""From photographs to a scene: other programs' cameras and masks, the visual hull, the checks, the overview picture.

prepare.py puts these together. datasets.py defines the scene on disk.
"""
