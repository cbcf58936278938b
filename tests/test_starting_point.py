"""Enlarged latents, starts at a sigma, guidance: each against what it must be."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch

from fluxsplit.cosine_basis import coefficients
from fluxsplit.enlarge import enlarged
from fluxsplit.errors import FluxsplitError
from fluxsplit.latent_space import LatentSpace
from fluxsplit.latents import LatentFile
from fluxsplit.low_frequency_guidance import guidance_towards
from fluxsplit.noise import initial_noise
from fluxsplit.recipe import Recipe, WeightsStamp
from fluxsplit.schedule import from_sigma, sigmas
from fluxsplit.start import NoiseGrid, Start
from fluxsplit.starting_point import starting_point

SPACE = LatentSpace(0.5, 0.1)
STAMP = WeightsStamp("x")


def preview(height: int = 16, width: int = 24) -> LatentFile:
    """A latent file of smooth values."""
    y, x = torch.arange(height)[:, None] / height, torch.arange(width)[None, :] / width
    tensor = torch.stack([torch.cos(math.pi * (y + 0.1 * k * x)) for k in range(16)])[None].contiguous()
    payload = tensor.view(torch.uint8).numpy().tobytes()
    return LatentFile("x.pt", "pt", (1, 16, height, width), payload, None, {}, hashlib.sha256(payload).hexdigest())


def recipe(start: Start | None, levels: tuple[float, ...] = (1.0, 0.5, 0.0)) -> Recipe:
    """A recipe for 384x192 pixels."""
    return Recipe(
        prompt="a", seed=7, width=384, height=192, steps=len(levels) - 1, sigmas=levels, sampler="euler",
        scheduler="simple", shift=None, guidance=None, cfg=1.0, negative="", noise_index=0, variant="schnell",
        transformer=STAMP, text_encoder=STAMP, clip=STAMP, dtype="fp32", device="cpu", start=start,
    )  # fmt: skip


GRID = NoiseGrid(7, 192, 128)


def test_without_a_start_it_is_the_noise_of_the_seed() -> None:
    point = starting_point(recipe(None), None, SPACE)
    assert torch.equal(point.latents, initial_noise(7, 24, 48)) and point.guide is None


def test_composition_starts_between_enlarged_preview_and_coupled_noise() -> None:
    latent = preview()
    start = Start("composition", (GRID,), 0.9, latent_sha256=latent.payload_sha256)
    point = starting_point(recipe(start, (0.9, 0.45, 0.0)), latent, SPACE)
    clean = SPACE.to_model(torch.frombuffer(bytearray(latent.payload), dtype=torch.float32).view(latent.shape))
    low = coefficients(point.latents)[..., :16, :24]
    r = math.sqrt(24 * 48 / (16 * 24))
    want = r * 0.1 * coefficients(clean) + 0.9 * coefficients(initial_noise(7, 16, 24))
    assert torch.allclose(low, want, atol=1e-4)
    # ... which is a multiple of the preview's own path at sigma = s / (r (1 - s) + s), as the room says
    sigma = 0.9 / (r * 0.1 + 0.9)
    own = (1 - sigma) * coefficients(clean) + sigma * coefficients(initial_noise(7, 16, 24))
    assert torch.allclose(low, own * 0.9 / sigma, atol=1e-4)
    assert pytest.approx(r * sigma / (1 + (r - 1) * sigma)) == 0.9


def test_image_starts_with_the_noise_of_the_new_size() -> None:
    latent = preview()
    start = Start("image", (), 0.7, latent_sha256=latent.payload_sha256)
    point = starting_point(recipe(start, (0.7, 0.35, 0.0)), latent, SPACE)
    clean = SPACE.to_model(torch.frombuffer(bytearray(latent.payload), dtype=torch.float32).view(latent.shape))
    assert torch.allclose(point.latents, 0.3 * enlarged(clean, 24, 48) + 0.7 * initial_noise(7, 24, 48), atol=1e-6)


def test_another_latent_than_the_recipe_names_is_refused() -> None:
    start = Start("composition", (GRID,), 0.9, latent_sha256="0" * 64)
    for other in (preview(), None):
        with pytest.raises(FluxsplitError, match="SHA-256"):
            starting_point(recipe(start), other, SPACE)


@pytest.mark.parametrize("size", [(24, 48), (37, 23), (9, 40), (16, 24)])
@pytest.mark.parametrize("fit", ["stretch", "centre"])
def test_enlarging_keeps_values(size: tuple[int, int], fit: str) -> None:
    assert torch.allclose(enlarged(torch.full((1, 16, 16, 24), 0.7), *size, fit), torch.full((1, 16, *size), 0.7))
    smooth = torch.frombuffer(bytearray(preview().payload), dtype=torch.float32).view(1, 16, 16, 24)
    large = enlarged(smooth, *size, fit)
    assert large.shape == (1, 16, *size) and large.dtype == torch.float32
    assert abs(float(large.mean() - smooth.mean())) < 0.2 and float(large.abs().max()) < 1.2


def test_centre_leaves_the_picture_its_shape() -> None:
    square = torch.zeros(1, 16, 16, 16)
    square[..., 4:12, 4:12] = 1
    wide = enlarged(square, 32, 64, "centre")
    inside = wide[0, 0] > 0.5
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    assert (len(rows), len(columns)) == (16, 16) and (int(rows[0]), int(columns[0])) == (8, 24)
    stretched = enlarged(square, 32, 64)[0, 0] > 0.5
    assert int(stretched.any(0).sum()) == 32


def test_guidance_moves_the_low_band_and_nothing_else() -> None:
    target = enlarged(torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1)), 32, 32)
    levels = (1.0, 0.75, 0.5, 0.25, 0.0)
    guide = guidance_towards(target, (16, 16), levels, 0.8)
    clean = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(2))
    have, want = coefficients(guide(clean, 1.0)), coefficients(clean)
    want[..., :8, :8] += 0.8 * (coefficients(target)[..., :8, :8] - want[..., :8, :8])
    assert torch.allclose(have, want, atol=1e-5)
    half = coefficients(guide(clean, 0.75))[..., :8, :8] - coefficients(clean)[..., :8, :8]
    full = have[..., :8, :8] - coefficients(clean)[..., :8, :8]
    assert torch.allclose(half * 2, full, atol=1e-5)
    assert torch.equal(guide(clean, 0.5), clean) and torch.equal(guide(clean, 0.25), clean)


@pytest.mark.parametrize("strength", [0.3, 0.7, 0.9, 0.95, 1.0])
@pytest.mark.parametrize(("variant", "mu"), [("schnell", None), ("dev", 1.15)])
def test_a_start_in_the_middle_takes_as_many_steps(strength: float, variant: str, mu: float | None) -> None:
    for steps in (1, 4, 8):
        levels = from_sigma(sigmas("simple", steps, variant, mu), strength, mu)
        assert len(levels) == steps + 1 and levels[0] == strength and levels[-1] == 0
        replace(recipe(None), steps=steps, sigmas=levels)  # refuses levels that do not fall


def test_it_is_what_comfyui_calls_denoise() -> None:
    """int(n / d) steps planned, the last n taken: exact where n / d is whole."""
    for mu in (None, 1.15):
        planned = sigmas("simple", 8, "dev", mu)
        ours = from_sigma(sigmas("simple", 4, "dev", mu), planned[4], mu)
        assert ours == pytest.approx(planned[4:], abs=1e-6)
    assert from_sigma((1.0, 0.75, 0.5, 0.25, 0.0), 0.9, None) == pytest.approx((0.9, 0.675, 0.45, 0.225, 0.0))
