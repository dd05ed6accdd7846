"""PSNR and SSIM of a render against its photograph, inside the mask. Images are (H, W, 3) in [0, 1]."""
from typing import Tuple

import numpy as np
from skimage.metrics import structural_similarity

SSIM_WINDOW = 11        # pixels: a Gaussian of sigma 1.5, cut at 3.5 sigma (Wang et al., 2004)


def squared_error(image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return (2,): the sum of (image - truth)^2 over the pixels of mask (H, W) bool and the channels, and their count.

    Adding the results of several views gives that of all their pixels.
    """
    difference = (image[mask].astype(np.float64) - truth[mask]) ** 2
    return np.array([difference.sum(), difference.size])


def psnr(error: np.ndarray) -> float:
    """Return the PSNR in dB of a squared_error result (2,), or of the sum of several."""
    return -10.0 * np.log10(max(error[0] / error[1], 1e-12))


def similarity(image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return (2,): the sum of the channels' mean SSIM map over the pixels of mask (H, W) bool, and their count.

    Outside the mask both images are set to the photograph, so that no window sees an artificial edge.
    """
    window = _surroundings(mask)
    image, truth, mask = image[window], truth[window], mask[window]
    pasted = np.where(mask[..., None], image, truth)
    similar = structural_similarity(truth, pasted, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5,
                                    use_sample_covariance=False, full=True)[1]
    return np.array([similar.mean(axis=-1)[mask].sum(dtype=np.float64), mask.sum()])


def _surroundings(mask: np.ndarray) -> Tuple[slice, slice]:
    """Return the rows and columns that the SSIM windows around the pixels of mask (H, W) bool reach.

    At least SSIM_WINDOW of each where the mask has them.
    """
    slices = []
    for axis, size in zip((1, 0), mask.shape):
        reached = np.flatnonzero(mask.any(axis=axis))
        start = max(reached[0] - SSIM_WINDOW // 2, 0)
        stop = min(max(reached[-1] + SSIM_WINDOW // 2 + 1, start + SSIM_WINDOW), size)
        slices.append(slice(min(start, max(stop - SSIM_WINDOW, 0)), stop))
    return slices[0], slices[1]


def ssim(similarity_sum: np.ndarray) -> float:
    """Return the mean SSIM of a similarity result (2,), or of the sum of several."""
    return similarity_sum[0] / similarity_sum[1]
