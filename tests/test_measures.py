"""PSNR and SSIM against known answers."""

import numpy as np
import pytest
import torch

from infworld.measures import MAX_PSNR, psnr, ssim


def pictures(shape=(3, 24, 32, 3), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 246, shape, dtype=np.uint8)


def test_psnr_of_known_errors():
    a = pictures()
    assert psnr(a, a).tolist() == [MAX_PSNR] * 3
    assert psnr(a, a + 10).tolist() == pytest.approx([20 * np.log10(255 / 10)] * 3)
    assert psnr(a[0], a[0] + 1).shape == () and psnr(a, a[:1]).shape == (3,)


def test_ssim_of_known_pictures():
    a = pictures()
    assert ssim(a, a).tolist() == [1.0] * 3
    grey, lighter = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 120, np.uint8)
    x, y, c = 100 / 255, 120 / 255, 0.01**2  # without contrast only the means count
    assert float(ssim(grey, lighter)) == pytest.approx((2 * x * y + c) / (x * x + y * y + c))
    assert abs(float(ssim(pictures(seed=1), pictures(seed=2)).mean())) < 0.05
    assert float(ssim(a[0], 245 - a[0])) < -0.5  # the negative


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a = pictures((2, 40, 50, 3))
    b = np.clip(a + np.random.default_rng(3).normal(0, 25, a.shape), 0, 255).astype(np.uint8)
    options = {"gaussian_weights": True, "use_sample_covariance": False, "data_range": 255, "channel_axis": -1}
    expected = [metrics.structural_similarity(x, y, **options) for x, y in zip(a, b, strict=True)]
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(expected, abs=1e-9)


def test_too_small_a_picture_is_named():
    with pytest.raises(ValueError, match="10 x 40"):
        ssim(np.zeros((10, 40, 3), np.uint8), np.zeros((10, 40, 3), np.uint8))
