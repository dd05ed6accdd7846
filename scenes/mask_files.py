"""Masks from a folder, from an alpha channel, or of an object before a plain background."""
import os
import textwrap
from pathlib import Path

import cv2
import numpy as np
import skimage.filters
import skimage.measure
import skimage.morphology

import datasets
from files import pictures
from helper import UserError
from scenes.camera_files import natural_key

DRAWN = ("auto", "rembg", "alpha", "background")     # masks that are made from the photographs themselves
DARK = 40   # grey levels: a background is dark below this; what differs from it by less counts as dark, too


def mask_sources(views, choice, root):
    """Return the source of each view's mask: a Path, or a word of DRAWN.

    choice: the value of --masks. If None, the first of these: the masks named in the camera file; a folder masks/ or
    mask/ in the folder `root`, or beside the photographs or their folder; the alpha channel; "auto". Raises UserError
    for a folder without a mask for each view.
    """
    if choice in DRAWN:
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
    return ["auto"] * len(views)


def masks_in(folder, views):
    """Return the path of each view's mask in a folder, by the photograph's name.

    If no name fits and there are as many masks as views, they are taken in the order of their names. Raises UserError
    otherwise.
    """
    if not os.path.isdir(str(folder)):
        raise UserError(f"--masks {str(folder)[:1000]}: no such folder; name one, or {', '.join(DRAWN[:-1])} or "
                        f"{DRAWN[-1]}")
    found = [mask_named(folder, view.image) for view in views]
    if len(set(found) - {None}) < len(views):
        files = datasets.picture_files(folder, datasets.PHOTOGRAPHS)[0]
        if not any(found) and len(files) == len(views):
            print(f"notice: {folder}: no names of photographs; the masks are taken in the order of their names")
            return sorted(files, key=natural_key)
        image = next(v.image for i, v in enumerate(views) if found[i] is None or found[i] in found[:i])
        wanted = " or ".join(dict.fromkeys((f"{image.stem}.png", f"{image.name}.png")))
        if image.suffix.lower() == ".png":
            wanted = image.name
        raise UserError(f"{folder}: no mask for {image.name} ({len(views)} views, {len(files)} masks); name it like "
                        f"its photograph: {wanted}")
    return found


def mask_named(folder, image):
    """Return the path of a photograph's mask in a folder, None if absent.

    For a/x.jpg it is x.jpg.png, x.png, x.jpg, ..., x_mask.png, ..., in the folder's subfolder a/ or in itself.
    """
    known = Path(os.path.abspath(str(image))).parts[1:]  # .. and the root would lead out of the folder
    for parts in (3, 2, 1):
        tail = Path(*known[-parts:])
        names = [tail.name + ".png"] + [tail.stem + end + suffix for end in ("", "_mask") for suffix in
                                        datasets.PHOTOGRAPHS + tuple(s.upper() for s in datasets.PHOTOGRAPHS)]
        for name in names:
            if os.path.exists(str(folder / tail.parent / name)):    # Path.exists raises for a name that is too long
                return folder / tail.parent / name
    return None


def has_alpha(path):
    """Tell whether the picture at `path` has transparent colours."""
    with pictures.opened(path) as (picture, _):
        return pictures.has_alpha(picture)


def rembg_masks():
    """Return a function that makes the mask (H, W) bool of an image (H, W, 3) uint8 by the package rembg.

    rembg fetches its network at the first use, and keeps it. Raises UserError if rembg is not installed, or its network
    cannot be had.
    """
    try:
        import rembg
    except (ImportError, SystemExit) as error:      # some versions exit where onnxruntime is missing
        raise UserError("--masks rembg: the package rembg is not installed; pip install \"rembg[cpu]\", or say --masks "
                        "auto") from error
    try:
        session = rembg.new_session()
    except Exception as error:      # of requests, pooch, onnxruntime or the system
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")
        raise UserError(f"--masks rembg: its network cannot be fetched or read ({reason}); connect to the internet for "
                        "the first use, or put u2net.onnx into ~/.u2net, or say --masks auto") from error
    return lambda image: cleaned(np.asarray(rembg.remove(image, session=session, only_mask=True)) > 127)


def background_mask(image, threshold=None):
    """Return the mask (H, W) bool of an object before a dark or uniform background.

    image: (H, W, 3) uint8. The object differs from the background's colour by more than `threshold` grey levels in some
    channel (None: found_threshold's). The mask is then cleaned.
    """
    difference, border, brightness = background_difference(image)
    if threshold is None:
        threshold = found_threshold(difference, border, brightness)
    return cleaned(difference > threshold)


def background_threshold(image):
    """Return the threshold, in grey levels, that background_mask finds for an image."""
    return found_threshold(*background_difference(image))


def found_threshold(difference, border, brightness):
    """Return the threshold, in grey levels, by which the object differs from the background's colour.

    The parameters are the results of background_difference.
    Before a dark background it is 0.6 of Otsu's threshold, which excludes a dim stand, and at most DARK, since little
    of an object is darker. Before other backgrounds a dark part of the object may differ as little as a stand does.
    There it is 8 plus twice the 75th percentile of the differences along the border. In both cases it is above the
    border's noise.
    """
    if brightness >= DARK:
        return 8 + 2 * float(np.percentile(border, 75))     # a quarter of the border may show the object
    low = 8 + 2 * float(np.median(border))                  # and here a half, object or stand
    bright = difference[difference > low]
    if not len(bright):
        return low
    difference = np.minimum(difference, np.percentile(bright, 90))  # else a few highlights may decide
    return max(low, min(DARK, 0.6 * float(skimage.filters.threshold_otsu(difference))))


def background_hint(views, threshold):
    """Return words on the masks that --masks background made of camera_files.Views. threshold: --threshold, or None."""
    if threshold is None:
        found = [background_threshold(pictures.read_image(view.image)) for view in views]
        threshold = f"found at {min(found):.0f} to {max(found):.0f} grey levels"
    return f" (of --masks background, --threshold {threshold}; another may be better)"


def background_difference(image):
    """Return the differences of an image's pixels from its background's colour, and the background's brightness.

    The differences are the maxima over the channels, in grey levels, float32: (H, W) of all pixels, (N,) of those along
    the border. The colour is the median along the border, the brightness its brightest channel.
    """
    smooth = cv2.GaussianBlur(image, (0, 0), max(0.5, max(image.shape[:2]) / 1500)).astype(np.float32)
    width = max(1, min(image.shape[:2]) // 40)
    border = np.concatenate([side.reshape(-1, 3) for side in (smooth[:width], smooth[-width:], smooth[:, :width],
                                                              smooth[:, -width:])])
    colour = np.median(border, axis=0)
    return np.abs(smooth - colour).max(axis=2), np.abs(border - colour).max(axis=1), float(colour.max())


def cleaned(mask):
    """Return a mask (H, W) bool without specks, gaps and small holes, nor pieces below a tenth of the largest."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3 + 2 * (max(mask.shape) // 800),) * 2)
    mask = mask.astype(np.uint8)
    mask = cv2.morphologyEx(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc), cv2.MORPH_OPEN, disc) > 0
    return without_specks(mask)


def without_specks(mask):
    """Return a mask (H, W) bool without small holes, nor pieces below a tenth of the largest."""
    mask = skimage.morphology.remove_small_holes(mask, mask.size // 1000)
    labels = skimage.measure.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= max(1, 0.1 * sizes.max()))[labels]
