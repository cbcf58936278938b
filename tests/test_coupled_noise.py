"""Coupled noise is white and Gaussian at every ratio, and keeps the preview's low frequencies."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from fluxsplit.cosine_basis import coefficients, dct_matrix, frame_size, planes
from fluxsplit.coupled_noise import coupled_noise, noise_of_grids
from fluxsplit.noise import initial_noise
from fluxsplit.start import NoiseGrid

RATIOS = [
    ((16, 16), (32, 32), "stretch"),  # whole
    ((16, 16), (37, 23), "stretch"),  # fractional, rectangular, odd
    ((16, 24), (30, 36), "stretch"),  # another aspect ratio
    ((16, 24), (41, 33), "centre"),
    ((30, 22), (17, 13), "stretch"),  # smaller
]
SAMPLES = 24
"""Noises of 16 planes each."""


@lru_cache
def noises(old: tuple[int, int], new: tuple[int, int], fit: str) -> torch.Tensor:
    """Planes [SAMPLES * 16, H, W] of coupled noise, one seed for each sixteen."""
    made = [
        noise_of_grids((NoiseGrid(seed, old[1] * 8, old[0] * 8, 0, fit), NoiseGrid(seed, new[1] * 8, new[0] * 8)))
        for seed in range(SAMPLES)
    ]
    return torch.cat(made)[:, :].reshape(-1, *new).double()


def z_mean(values: torch.Tensor) -> float:
    """How many standard errors the mean of independent values of variance 1 is off 0."""
    return float(values.mean()) * math.sqrt(values.numel())


@pytest.mark.parametrize(("old", "new", "fit"), RATIOS)
def test_mean_and_variance(old: tuple[int, int], new: tuple[int, int], fit: str) -> None:
    planes = noises(old, new, fit)
    assert abs(z_mean(planes)) < 4
    assert abs(float(planes.var()) - 1) < 4 * math.sqrt(2 / planes.numel())


@pytest.mark.parametrize(("old", "new", "fit"), RATIOS)
def test_every_pixel_has_the_same_variance(old: tuple[int, int], new: tuple[int, int], fit: str) -> None:
    planes = noises(old, new, fit)
    count = len(planes)
    squares = (planes**2).sum(0)  # chi-square with `count` degrees of freedom at each pixel
    z = (squares - count) / math.sqrt(2 * count)
    assert float(z.abs().max()) < 5.5 and abs(float(z.var()) - 1) < 6 * math.sqrt(2 / z.numel())


@pytest.mark.parametrize(("old", "new", "fit"), RATIOS)
def test_neighbours_do_not_hang_together(old: tuple[int, int], new: tuple[int, int], fit: str) -> None:
    planes = noises(old, new, fit)
    for dy in range(5):
        for dx in range(-4, 5):
            if (dy, dx) <= (0, 0):
                continue
            a = planes[:, dy:, max(dx, 0) : planes.shape[2] + min(dx, 0)]
            b = planes[:, : planes.shape[1] - dy, max(-dx, 0) : planes.shape[2] - max(dx, 0)]
            assert abs(z_mean(a * b)) < 4.5, (dy, dx)


@pytest.mark.parametrize(("old", "new", "fit"), RATIOS)
def test_the_spectrum_is_flat(old: tuple[int, int], new: tuple[int, int], fit: str) -> None:
    planes = noises(old, new, fit)
    height, width = new
    power = (torch.fft.fft2(planes).abs() ** 2).mean(0) / (height * width)
    ky, kx = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None, :]
    ring = (torch.hypot(ky, kx.expand(height, width)) * 16).long()
    for number in range(int(ring.max()) + 1):
        inside = power[ring == number]
        if inside.numel() > 1:  # conjugate pairs: half of them are independent
            error = math.sqrt(2 / (inside.numel() * len(planes)))
            assert abs(float(inside.mean()) - 1) < 4.5 * error, number


@pytest.mark.parametrize(("old", "new", "fit"), RATIOS)
def test_values_are_gaussian(old: tuple[int, int], new: tuple[int, int], fit: str) -> None:
    values = noises(old, new, fit).flatten().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(values)) < 5 * math.sqrt(24 / len(values))


def test_the_tests_above_notice_enlarged_pixels() -> None:
    small = torch.cat([initial_noise(seed, 16, 16) for seed in range(4)])
    bilinear = F.interpolate(small, size=(37, 23), mode="bilinear").double()
    nearest = F.interpolate(small, size=(37, 23), mode="nearest").double()
    assert abs(float(bilinear.var()) - 1) > 40 * math.sqrt(2 / bilinear.numel())
    assert z_mean(nearest[..., 1:] * nearest[..., :-1]) > 40


def test_noise_drawn_again_from_the_seed_would_not_be_white() -> None:
    """Why the fresh part has a seed of its own: the preview's numbers are the beginning of the seed's stream."""
    correlation = []
    for seed in range(SAMPLES):
        small, again = initial_noise(seed, 16, 16), initial_noise(seed, 32, 32)
        assert torch.equal(small.flatten(), again.flatten()[: small.numel()])
        coupled = noise_of_grids((NoiseGrid(seed, 128, 128), NoiseGrid(seed, 256, 256)))
        high = coefficients(coupled)
        high[..., :16, :16] = 0
        correlation.append(float((high.flatten()[: small.numel()] * small.flatten().double()).sum()))
    assert abs(sum(correlation)) / math.sqrt(SAMPLES * 16 * 256) < 4.5


@pytest.mark.parametrize(("old", "new", "fit"), [ratio for ratio in RATIOS if ratio[2] == "stretch"])
def test_low_frequencies_are_the_previews(old: tuple[int, int], new: tuple[int, int], fit: str) -> None:
    small = initial_noise(3, *old)
    large = noise_of_grids((NoiseGrid(3, old[1] * 8, old[0] * 8, 0, fit), NoiseGrid(3, new[1] * 8, new[0] * 8)))
    rows, columns = min(old[0], new[0]), min(old[1], new[1])
    have, want = coefficients(large)[..., :rows, :columns], coefficients(small)[..., :rows, :columns]
    assert torch.allclose(have, want, atol=1e-5)
    assert large.dtype == torch.float32 and large.shape == (1, 16, *new)


def test_the_same_size_is_the_same_noise_to_the_bit() -> None:
    small = initial_noise(7, 15, 17)
    assert torch.equal(coupled_noise(small, torch.randn(1, 16, 15, 17)), small)
    assert torch.equal(noise_of_grids((NoiseGrid(7, 136, 120), NoiseGrid(9, 136, 120))), small)


def test_a_chain_keeps_what_each_picture_had() -> None:
    grids = (NoiseGrid(7, 128, 128), NoiseGrid(7, 256, 192), NoiseGrid(8, 512, 384))
    middle, last = noise_of_grids(grids[:2]), noise_of_grids(grids)
    assert torch.allclose(coefficients(last)[..., :24, :32], coefficients(middle), atol=1e-5)
    assert not torch.equal(last, noise_of_grids((*grids[:2], NoiseGrid(9, 512, 384)))), "another seed, other detail"


def test_centred_noise_lies_in_the_middle() -> None:
    assert frame_size((16, 24), (48, 48)) == (24, 24) and frame_size((17, 23), (34, 46)) == (17, 23)
    small = initial_noise(3, 16, 24)
    large = noise_of_grids((NoiseGrid(3, 192, 128, 0, "centre"), NoiseGrid(3, 192, 192)))
    assert torch.equal(large[..., 4:20, :], small), "at the preview's own scale the frame is the picture"


def test_the_basis_is_orthonormal() -> None:
    for size in (1, 2, 17, 118):
        assert torch.allclose(dct_matrix(size) @ dct_matrix(size).T, torch.eye(size).double(), atol=1e-12)
    plane = torch.randn(2, 3, 7, 12)
    assert torch.allclose(planes(coefficients(plane)).float(), plane, atol=1e-6)
