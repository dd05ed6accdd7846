"""Test PSNR and SSIM on cases with a known answer."""
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from metrics import images


def test_psnr_counts_the_masked_pixels_alone():
    truth = np.zeros((4, 5, 3))
    image, mask = truth.copy(), np.zeros((4, 5), bool)
    mask[1, 2:4] = True
    image[1, 2] = 0.1           # half of the masked pixels are off by 0.1
    image[0, 0] = 1.0           # outside the mask
    error = images.squared_error(image, truth, mask)
    assert images.psnr(error) == pytest.approx(-10 * np.log10(0.01 / 2))


def test_psnr_over_views_is_over_their_pixels():
    few = np.array([3 * 10 * 0.01, 3 * 10])
    many = np.array([0.0, 3 * 990])
    assert images.psnr(few + many) == pytest.approx(-10 * np.log10(0.01 * 10 / 1000))


def test_ssim_of_flat_images_is_what_their_means_make_it():
    image, truth = np.full((16, 20, 3), 0.5), np.full((16, 20, 3), 0.25)
    similarity = images.similarity(image, truth, np.ones((16, 20), bool))
    assert images.ssim(similarity) == pytest.approx((2 * 0.5 * 0.25 + 0.01 ** 2) / (0.5 ** 2 + 0.25 ** 2 + 0.01 ** 2))


def test_ssim_counts_the_masked_pixels_alone():
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=(24, 24, 3)).astype(np.float32)
    mask = np.zeros((24, 24), bool)
    mask[8:16, 6:20] = True
    image = np.where(mask[..., None], truth, 1.0)       # right inside the mask, white outside
    assert images.ssim(images.similarity(image, truth, mask)) == pytest.approx(1.0)
    image[mask] = image[mask][::-1]
    wrong = images.similarity(image, truth, mask)
    assert images.ssim(wrong) < 0.5 and wrong[1] == mask.sum()
    image[~mask] = 0.0
    assert images.similarity(image, truth, mask) == pytest.approx(wrong)


@pytest.mark.parametrize("rows, columns", [((20, 31), (30, 47)), ((0, 3), (0, 60)), ((40, 48), (57, 60)),
                                           ((5, 6), (9, 10))])
def test_ssim_is_that_of_the_whole_images_to_the_bit(rows, columns):
    rng = np.random.default_rng(1)
    image, truth = rng.uniform(size=(2, 48, 60, 3)).astype(np.float32)
    mask = np.zeros((48, 60), bool)
    mask[slice(*rows), slice(*columns)] = True
    pasted = np.where(mask[..., None], image, truth)
    whole = structural_similarity(truth, pasted, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5,
                                  use_sample_covariance=False, full=True)[1]
    assert images.similarity(image, truth, mask)[0] == whole.mean(axis=-1)[mask].sum(dtype=np.float64)
