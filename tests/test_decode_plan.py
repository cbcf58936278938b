"""The plan of a VAE: the same passes as diffusers' modules, sizes that fit the budget."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fluxsplit.decode_plan import (
    DTYPE_BYTES,
    HOMES,
    attention_tokens,
    block_size,
    blocks_held,
    device_peak,
    plan_vae,
    planes_peak,
    strip_rows,
)
from fluxsplit.errors import OutOfMemory
from fluxsplit.memory import DeviceInfo
from fluxsplit.vae_passes import VaeShape, passes_of_decoder, passes_of_encoder

FLUX = VaeShape()
GB = 10**9
CPU = DeviceInfo("cpu", "cpu", 16 * GB, 16 * GB, ram_bytes=16 * GB)


def card(ram_bytes: int, *, growing_segments: bool = True) -> DeviceInfo:
    return DeviceInfo("cuda", "card", 48 * GB, 48 * GB, ram_bytes=ram_bytes, growing_segments=growing_segments)


def test_the_decoder_of_flux_in_numbers() -> None:
    passes = passes_of_decoder(FLUX, 118, 144)
    assert len(passes) == 1 + 2 * 2 + 1 + 2 * 4 * 3 + 3 + 1  # convolutions in blocks, attention, enlarging, in and out
    assert (passes[-1].out_height, passes[-1].out_width, passes[-1].outputs) == (944, 1152, 3)
    assert sum(one.kind == "attention" for one in passes) == 1
    assert [one.weights for one in passes if one.shortcut] == [
        "decoder.up_blocks.2.resnets.0.conv1",
        "decoder.up_blocks.3.resnets.0.conv1",
    ]


def test_every_plane_is_written_before_it_is_read_and_given_back() -> None:
    for passes, held in ((passes_of_decoder(FLUX, 16, 24), "latents"), (passes_of_encoder(FLUX, 128, 192), "image")):
        alive = {held: (passes[0].height, passes[0].width, passes[0].inputs)}
        for one in passes:
            assert alive[one.source] == (one.height, one.width, one.inputs), one
            made = (one.out_height, one.out_width, one.outputs)
            if one.adds:
                assert alive[one.target] == made, one
            if one.last_use:
                del alive[one.source]
            alive[one.target] = made
            if one.shortcut:
                alive["x"] = made
        assert set(alive) == {passes[-1].target}


def test_two_planes_at_full_size_are_the_peak() -> None:
    """FLUX.1 at 944x1152: two of 128 channels, or one of 256 while the next two grow in its place."""
    full = 944 * 1152 * 128 * 4
    assert 2 * full <= planes_peak(passes_of_decoder(FLUX, 118, 144), 4) <= 2 * full + 72_000_000
    assert planes_peak(passes_of_encoder(FLUX, 944, 1152), 4) <= 2 * full + 72_000_000


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_a_plan_fits_its_budget_or_is_refused(dtype: str) -> None:
    homes = set()
    for side in (8, 64, 128, 256, 512):
        passes = passes_of_decoder(FLUX, side, side)
        for budget in (GB // 20, GB // 8, GB // 4, GB, 4 * GB, 12 * GB, 48 * GB):
            for device in (CPU, card(16 * GB), card(16 * GB, growing_segments=False)):
                try:
                    plan = plan_vae(passes, dtype, budget, device)
                except OutOfMemory as error:
                    assert budget <= (GB // 4 if device is CPU else GB), (side, budget, error)
                    continue
                homes.add(plan.home)
                assert plan.device_bytes <= budget and plan.home in HOMES
    assert homes == set(HOMES)


def test_the_same_budget_holds_any_size() -> None:
    """What is on the device is bounded: only the planes on disk grow with the picture."""
    plans = [plan_vae(passes_of_decoder(FLUX, side, side), "fp32", GB // 4, CPU) for side in (128, 256, 512)]
    assert {plan.home for plan in plans} == {"disk"}
    assert plans[-1].planes_bytes == pytest.approx(16 * plans[0].planes_bytes, rel=0.2)


def test_a_smaller_plan_is_smaller() -> None:
    passes = passes_of_decoder(FLUX, 128, 128)
    plans = [plan_vae(passes, "bf16", 8 * GB, card(64 * GB), smaller=n) for n in range(3)]
    assert plans[0].home == "device" and plans[2].home == "ram"
    assert all(small.device_bytes <= 0.75 * large.device_bytes for large, small in pairwise(plans))


def test_what_fits_of_the_planes_stays_on_the_card() -> None:
    passes = passes_of_decoder(FLUX, 256, 256)
    plans = [plan_vae(passes, "fp32", budget * GB, card(64 * GB)) for budget in (1, 2, 4, 8)]
    assert [plan.home for plan in plans] == ["ram", "ram", "ram", "device"]
    everything = blocks_held(passes, 4, plans[3].strip_bytes, plans[3].block_bytes)
    assert plans[3].kept_blocks == everything and plans[3].elsewhere_bytes == 0
    for plan, budget in zip(plans[:3], (1, 2, 4), strict=True):
        assert 0.94 * budget * GB < plan.device_bytes <= budget * GB
        assert plan.elsewhere_bytes + plan.kept_blocks * plan.block_bytes == plan.planes_bytes
    short = plan_vae(passes, "fp32", 2 * GB, card(3 * GB))
    assert short.home == "disk" and short.kept_blocks == plans[1].kept_blocks


def test_after_the_smallest_plan_comes_the_smallest_plan() -> None:
    """It is tried again: what took the memory may be gone, and the pictures after it may fit."""
    passes = passes_of_decoder(FLUX, 128, 128)
    plans = [plan_vae(passes, "fp32", GB // 10, CPU, smaller=n) for n in range(5)]
    assert plans[0].device_bytes < GB // 10 and plans[4] == plans[3]


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_blocks_of_one_size_waste_little_at_any_width(dtype: str) -> None:
    """Rows that are a little more than a half of a block would leave the other half of it."""
    item = DTYPE_BYTES[dtype]
    for width in (1024, 1152, 2048, 2752, 4096, 4160, 5120, 5504, 8192):
        for passes in (passes_of_decoder(FLUX, width // 8, width // 8), passes_of_encoder(FLUX, width, width)):
            block_bytes = block_size(passes, item)
            held = blocks_held(passes, item, 64 << 20, block_bytes) * block_bytes
            assert held < 1.05 * planes_peak(passes, item) + 3 * (64 << 20) + 8 * block_bytes, (width, block_bytes)


def test_where_ram_is_the_cards_memory_both_count() -> None:
    passes = passes_of_decoder(FLUX, 512, 512)
    apart, unified = (DeviceInfo("hip", "card", 16 * GB, 16 * GB, ram_bytes=16 * GB, unified=u) for u in (False, True))
    assert plan_vae(passes, "fp32", 14 * GB, apart).home == "ram"
    plan = plan_vae(passes, "fp32", 14 * GB, unified)
    assert plan.home == "disk" or plan.elsewhere_bytes + plan.device_bytes <= 16 * GB


def test_what_cannot_fit_says_what_it_needs() -> None:
    with pytest.raises(OutOfMemory, match=r"4096x4096 in fp32 .* and 10.0 MB may be used"):
        plan_vae(passes_of_decoder(FLUX, 512, 512), "fp32", 10_000_000, CPU)


def test_strips_cover_their_plane_evenly() -> None:
    for one in passes_of_decoder(FLUX, 37, 61):
        for strip_bytes in (1, 1 << 16, 1 << 20, 1 << 30):
            rows = strip_rows(one, strip_bytes)
            assert 1 <= rows <= max(one.height, one.out_height)
        assert strip_rows(one, 1) == 1 and strip_rows(one, 1 << 40) == one.height


def test_chunks_of_the_attention_are_bounded() -> None:
    for height, width in ((1, 1), (10, 10), (118, 144), (512, 512)):
        attention = next(one for one in passes_of_decoder(FLUX, height, width) if one.kind == "attention")
        for item_bytes in (2, 4):
            queries, keys = attention_tokens(attention, item_bytes, 6 << 20)
            assert 1 <= queries <= height * width and 1 <= keys <= height * width
            assert 4 * queries * keys <= 6 << 20
    assert device_peak(passes_of_decoder(FLUX, 512, 512), 6 << 20, 4, "disk", on_cpu=True) < GB // 4
