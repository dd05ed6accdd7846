"""Masks as people have them: a folder, an alpha channel, or an object before a plain background."""
import os
from pathlib import Path

import cv2
import numpy as np
import skimage.filters
import skimage.measure
import skimage.morphology

import datasets
from files import pictures
from helper import UserError
from scenes.camera_files import natural

DARK = 40   # grey levels: a background below is dark, and so is what differs from it by less


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

    The object is what differs from the background's colour by more than `threshold` grey levels in some channel
    (None: background_threshold's); then specks and gaps of a few pixels and small holes are closed and pieces below a
    tenth of the largest dropped.
    """
    difference = background_difference(image)[0]
    return cleaned(difference > (background_threshold(image) if threshold is None else threshold))


def background_threshold(image):
    """Return the difference from the background's colour, in grey levels, at which the object begins in an image.

    Before a dark background it is 0.6 of Otsu's threshold, which leaves a dim stand out, and at most DARK, below
    which an object has little. Before others, where the object's dark parts may differ as little as a stand does, it
    is what three quarters of the border's pixels keep below. It is above the noise of the border in both.
    """
    difference, border, brightness = background_difference(image)
    if brightness >= DARK:
        return 8 + 2 * float(np.percentile(border, 75))     # of the border's pixels a quarter may be the object
    low = 8 + 2 * float(np.median(border))                  # or more, be they object or stand
    bright = difference[difference > low]
    if not len(bright):
        return low
    difference = np.minimum(difference, np.percentile(bright, 90))  # or few highlights would part from all the rest
    return max(low, min(DARK, 0.6 * float(skimage.filters.threshold_otsu(difference))))


def background_difference(image):
    """Return how much the pixels of an image differ from its background, the background's brightness with it.

    All (H, W) and those along the border (N,), float32, the most of the channels, in grey levels. The background's
    colour is the median along the border; its brightness is its brightest channel.
    """
    smooth = cv2.GaussianBlur(image, (0, 0), max(0.5, max(image.shape[:2]) / 1500)).astype(np.float32)
    width = max(1, min(image.shape[:2]) // 40)
    border = np.concatenate([side.reshape(-1, 3) for side in (smooth[:width], smooth[-width:], smooth[:, :width],
                                                              smooth[:, -width:])])
    colour = np.median(border, axis=0)
    return np.abs(smooth - colour).max(axis=2), np.abs(border - colour).max(axis=1), float(colour.max())


def cleaned(mask):
    """Return a mask (H, W) bool without specks, gaps of a few pixels, small holes and small pieces."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3 + 2 * (max(mask.shape) // 800),) * 2)
    mask = mask.astype(np.uint8)
    mask = cv2.morphologyEx(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc), cv2.MORPH_OPEN, disc) > 0
    mask = skimage.morphology.remove_small_holes(mask, mask.size // 1000)
    labels = skimage.measure.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= max(1, 0.1 * sizes.max()))[labels]
