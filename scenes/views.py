"""A view's photograph and mask -> pixels of a pinhole camera: turned as its camera has it, distortion undone."""
from typing import List, NamedTuple

import cv2
import numpy as np
from numpy.polynomial.polynomial import polyval

import datasets
from files import pictures
from helper import UserError
from scenes import mask_files


class PinholeView(NamedTuple):
    """A view's pixels without distortion."""
    image: np.ndarray               # (H, W, 3) uint8
    mask: np.ndarray                # (H, W) bool
    intrinsics: np.ndarray          # (3, 3) float64, for images of this size
    photograph: pictures.Picture    # as its file stores it
    doubtful: List                  # the paths of the pictures of whose orientation pictures.as_meant is unsure


def read_view(view, mask_source, threshold):
    """Read a camera_files.View as a PinholeView.

    mask_source: a path, "alpha", "background", or a function that makes the mask (H, W) bool of the image without
    distortion; threshold: for mask_files.background_mask. A picture is turned by its
    EXIF orientation if only then it fits its camera, or photograph and mask fit each other. Raises UserError for
    pictures that cannot be read, sizes that do not fit and distortion that cannot be undone.
    """
    photograph = pictures.read_picture(view.image, pictures.colours)
    drawn = callable(mask_source) or mask_source in mask_files.DRAWN
    stored_mask = None if drawn else pictures.read_picture(mask_source, pictures.on_object)
    shape = view.size[::-1] if view.size else None if drawn else stored_mask.pixels.shape
    image, image_doubt = pictures.as_meant(photograph, shape)
    intrinsics, mask_doubt = resized_intrinsics(view, image.shape), False
    if callable(mask_source):
        image = undistorted(image, intrinsics, view) if view.distortion else image
        return PinholeView(image, mask_source(image), intrinsics, photograph, [view.image] * image_doubt)
    if mask_source == "background":
        mask = mask_files.background_mask(image, threshold)
    elif mask_source == "alpha":
        if not mask_files.has_alpha(view.image):
            raise UserError(f"{view.image}: has no alpha channel; put masks into a folder and name it with --masks")
        mask = pictures.as_meant(pictures.read_picture(view.image, pictures.alpha), shape)[0]
    else:
        mask, mask_doubt = pictures.as_meant(stored_mask, image.shape)
    if mask.shape != image.shape[:2]:
        raise UserError(f"{mask_source}: {datasets.says_size(mask.shape)}, but its photograph {view.image.name} is "
                        f"{datasets.says_size(image.shape)}; a mask has its photograph's size")
    if view.distortion:
        image = undistorted(image, intrinsics, view)
        mask = undistorted(mask.astype(np.uint8) * 255, intrinsics, view) > 127
    return PinholeView(image, mask, intrinsics, photograph, [view.image] * image_doubt + [mask_source] * mask_doubt)


def resized_intrinsics(view, shape):
    """Return a view's intrinsics (3, 3) for its photograph of shape (H, W, 3). Raises UserError if the camera is for an
    image of other proportions."""
    if not view.size or view.size == shape[1::-1]:
        return view.intrinsics
    if not pictures.alike(shape, view.size[::-1]):
        raise UserError(f"{view.image}: {datasets.says_size(shape)}, but its camera is for "
                        f"{view.size[0]}x{view.size[1]}; give the photographs that the cameras were made from")
    scale = np.divide(shape[1::-1], view.size)
    shift = (scale - 1) / 2  # pixel centres are at integers, before and after
    return np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]], [0, 0, 1]]) @ view.intrinsics


def undistorted(picture, intrinsics, view):
    """Return a picture (H, W, ...) as a pinhole camera of the same intrinsics sees it.

    It is black where the lens saw nothing.
    """
    coefficients, end = np.array(view.distortion), valid_radius(picture.shape[:2], intrinsics, view)
    try:
        if view.fisheye:
            straight = cv2.fisheye.undistortImage(picture, intrinsics, coefficients, Knew=intrinsics)
        else:
            straight = cv2.undistort(picture, intrinsics, coefficients)
    except cv2.error as error:      # for instance sides that are too long for it
        raise UserError(f"{view.image}: its distortion cannot be undone ({error.err}); undistort it before") from error
    if np.isfinite(end):
        straight[np.hypot(*image_plane(picture.shape[:2], intrinsics)) > end] = 0
    return straight


def image_plane(shape, intrinsics):
    """Return x (w,) and y (h, 1) of an image's pixels, in focal lengths from the principal point. shape: (h, w)."""
    x, y = ((np.arange(shape[1 - axis]) - intrinsics[axis, 2]) / intrinsics[axis, axis] for axis in (0, 1))
    return x.astype(np.float32), y.astype(np.float32)[:, None]


def valid_radius(shape, intrinsics, view):
    """Return the radius, in focal lengths from the principal point, up to which the distorted radius grows; inf if it
    grows everywhere in the image (h, w). Beyond, the model shows places a second time.

    Raises UserError for coefficients that fold the middle of the image, or stretch it more than tenfold.
    """
    with np.errstate(all="ignore"):
        r = np.linspace(0, np.hypot(*(np.abs(side).max() for side in image_plane(shape, intrinsics))), 2000)
        if view.fisheye:
            angle = np.arctan(r)
            bent = angle * polyval(angle ** 2, (1, *view.distortion))
        else:
            k1, k2, _, _, k3, k4, k5, k6 = (*view.distortion, 0, 0, 0, 0)[:8]
            bent = r * polyval(r ** 2, (1, k1, k2, k3)) / polyval(r ** 2, (1, k4, k5, k6))
        grows = np.diff(bent) > 0   # False for NaN
        stretch = bent[len(r) // 2] / r[len(r) // 2]
    end = np.inf if grows.all() else r[grows.argmin()]
    if end < 0.5 * r[-1] or not 0.1 < stretch < 10:
        raise UserError(f"{view.image}: its camera's distortion {tuple(view.distortion)} folds or tears the image; "
                        "mend these coefficients")
    return end
