"""How far a render is from its photograph, inside the mask: PSNR and SSIM. Images (H, W, 3) are in [0, 1]."""
import numpy as np
from skimage.metrics import structural_similarity

SSIM_WINDOW = 11        # pixels: a Gaussian of 1.5, cut at 3.5 times that (Wang et al., 2004)


def squared_error(image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return (sum, count), of (image - truth)^2 over the pixels of mask (H, W) bool and the 3 channels.

    The sum of several views' pairs is the pair of all their pixels.
    """
    difference = (image[mask].astype(np.float64) - truth[mask]) ** 2
    return np.array([difference.sum(), difference.size])


def psnr(error: np.ndarray) -> float:
    """Return the PSNR in dB of a squared_error, or of the sum of several."""
    return -10.0 * np.log10(max(error[0] / error[1], 1e-12))


def similarity(image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return (sum, count), of SSIM's map over the pixels of mask (H, W) bool, the mean of the channels.

    Outside the mask both images show the photograph, so that no window sees an edge that is not the object's.
    """
    pasted = np.where(mask[..., None], image, truth)
    similar = structural_similarity(truth, pasted, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5,
                                    use_sample_covariance=False, full=True)[1]
    return np.array([similar.mean(axis=-1)[mask].sum(dtype=np.float64), mask.sum()])


def ssim(likeness: np.ndarray) -> float:
    """Return the mean SSIM of a `similarity`, or of the sum of several."""
    return likeness[0] / likeness[1]
