"""Masks as people have them: a folder, an alpha channel, or an object before a plain background."""
import os
from pathlib import Path

import cv2
import numpy as np
import skimage.measure
import skimage.morphology

import datasets
from files import pictures
from helper import UserError
from scenes.camera_files import natural


def mask_sources(views, choice, root):
    """Return for each view where its mask comes from: a Path, "alpha" or "background".

    choice: --masks. Without it: the masks that the cameras' file names, a folder masks/ or mask/ beside the
    photographs or in the folder `root`, or the alpha channel. Raises UserError where there is none of these.
    """
    if choice in ("alpha", "background"):
        return [choice] * len(views)
    if choice is not None:
        return masks_in(Path(choice), views)
    if all(view.mask for view in views):
        return [view.mask for view in views]
    for parent in (root, views[0].image.parent, views[0].image.parent.parent):
        for folder in (parent / "masks", parent / "mask"):
            if os.path.isdir(str(folder)):
                return masks_in(folder, views)
    if has_alpha(views[0].image):
        return ["alpha"] * len(views)
    raise UserError(f"{root}: no masks found; put them into {root / 'masks'} under the names of the photographs, or "
                    "say --masks FOLDER, --masks alpha, or --masks background for an object before a plain background")


def masks_in(folder, views):
    """Return each view's mask in a folder: by the photograph's name, else, where the counts are equal, in order."""
    if not os.path.isdir(str(folder)):
        raise UserError(f"--masks {str(folder)[:1000]}: no such folder; name one, or alpha or background")
    found = [mask_named(folder, view.image) for view in views]
    if len(set(found) - {None}) < len(views):
        files = datasets.picture_files(folder, datasets.PHOTOGRAPHS)[0]
        if not any(found) and len(files) == len(views):
            print(f"notice: {folder}: no names of photographs; the masks are taken in the order of their names")
            return sorted(files, key=natural)
        image = next(v.image for i, v in enumerate(views) if found[i] is None or found[i] in found[:i])
        wanted = " or ".join(dict.fromkeys((f"{image.stem}.png", f"{image.name}.png")))
        if image.suffix.lower() == ".png":
            wanted = image.name
        raise UserError(f"{folder}: no mask for {image.name} ({len(views)} views, {len(files)} masks); name it like "
                        f"its photograph: {wanted}")
    return found


def mask_named(folder, image):
    """Return the mask of a photograph by its name, as people name them, with or without its folders; None if absent."""
    known = Path(os.path.abspath(str(image))).parts[1:]  # without .. and the root, which would lead elsewhere
    for parts in (3, 2, 1):
        tail = Path(*known[-parts:])
        names = [tail.name + ".png"] + [tail.stem + end + suffix for end in ("", "_mask") for suffix in
                                        datasets.PHOTOGRAPHS + tuple(s.upper() for s in datasets.PHOTOGRAPHS)]
        for name in names:
            if os.path.exists(str(folder / tail.parent / name)):    # not is_file: that fails for a name too long
                return folder / tail.parent / name
    return None


def has_alpha(path):
    """Tell whether a picture has transparent colours."""
    with pictures.opened(path) as (picture, _):
        return pictures.has_alpha(picture)


def background_mask(image, threshold=None):
    """Return the mask (H, W) bool of an object before a dark or uniform background.

    The background's colour is the median along the image's border. The object is what differs from it by more than
    `threshold` grey levels in some channel (None: by the spread along the border); then specks and gaps of a few
    pixels and small holes are closed and pieces below a tenth of the largest dropped.
    """
    smooth = cv2.GaussianBlur(image, (0, 0), max(0.5, max(image.shape[:2]) / 1500)).astype(np.float32)
    width = max(1, min(image.shape[:2]) // 40)
    border = np.concatenate([side.reshape(-1, 3) for side in (smooth[:width], smooth[-width:], smooth[:, :width],
                                                              smooth[:, -width:])])
    colour = np.median(border, axis=0)
    if threshold is None:  # of the border's pixels a quarter may be the object
        threshold = 8 + 2 * np.percentile(np.abs(border - colour).max(axis=1), 75)
    mask = (np.abs(smooth - colour).max(axis=2) > threshold).astype(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3 + 2 * (max(image.shape[:2]) // 800),) * 2)
    mask = cv2.morphologyEx(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc), cv2.MORPH_OPEN, disc) > 0
    mask = skimage.morphology.remove_small_holes(mask, mask.size // 1000)
    labels = skimage.measure.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= max(1, 0.1 * sizes.max()))[labels]
