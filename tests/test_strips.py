"""Strips give what diffusers' own VAE gives in one piece, whatever their height and wherever activations live."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file

import synthetic_checkpoint
from fluxsplit import checkpoint, vae_attention
from fluxsplit.convolution import convolve, phase_kernels
from fluxsplit.decode_plan import VaePlan, block_size, blocks_held
from fluxsplit.errors import FluxsplitError
from fluxsplit.group_norm import EPSILON, Moments, NotFinite
from fluxsplit.models import demo_files
from fluxsplit.pinned import pin
from fluxsplit.planes import MADE_TOGETHER, Home, Plane
from fluxsplit.tiled_vae import TiledVae
from fluxsplit.vae import Vae, levels, load_vae
from fluxsplit.vae_passes import VaeShape
from fluxsplit.weights import WeightFiles

CPU = torch.device("cpu")
TOLERANCE = 2e-5
STRIPS = (1 << 10, 1 << 13, 1 << 15, 1 << 17, 1 << 24)
"""From one row of everything to the whole picture at once."""


def loaded(path: Path | str) -> Vae:
    return load_vae(checkpoint.part(path, "vae"), WeightFiles(), CPU)


def stock(vae: Vae) -> Any:
    """diffusers' module with the same weights."""
    module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(vae.shape.widths),
        up_block_types=("UpDecoderBlock2D",) * len(vae.shape.widths),
        block_out_channels=vae.shape.widths,
        layers_per_block=vae.shape.blocks,
        latent_channels=16,
        norm_num_groups=vae.shape.groups,
        use_quant_conv="quant_conv.weight" in vae.part.sources,
        use_post_quant_conv="post_quant_conv.weight" in vae.part.sources,
        mid_block_add_attention=vae.shape.attention,
    ).eval()
    sides = {name: parameter.shape for name, parameter in module.named_parameters()}
    module.load_state_dict({n: vae.parameter(n, torch.float32).view(side) for n, side in sides.items()}, strict=True)
    return module


@pytest.fixture(scope="module")
def random_vae(tmp_path_factory: pytest.TempPathFactory) -> Vae:
    """Widths 32, 32, 64, 64 with attention and with both quantising convolutions, which FLUX.1's VAE lacks."""
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    shapes = synthetic_checkpoint.vae_shapes(synthetic_checkpoint.TINY)
    for name, count in (("quant_conv", 32), ("post_quant_conv", 16)):
        shapes |= {f"{name}.weight": (count, count, 1, 1), f"{name}.bias": (count,)}
    synthetic_checkpoint.write(path, shapes, "fp32", seed=3)
    return loaded(path)


@pytest.fixture(scope="module", params=["random", "demo"])
def vae(request: pytest.FixtureRequest, random_vae: Vae) -> Vae:
    """The random VAE, and the demo model's without attention and with 8 groups."""
    return random_vae if request.param == "random" else loaded(demo_files().vae)


def plan(strip_bytes: int, home: str = "device", dtype: str = "fp32") -> VaePlan:
    return VaePlan(dtype, home, strip_bytes, 0, 0)


def decoded(vae: Vae, latents: torch.Tensor, how: VaePlan, folder: Path | str = "") -> torch.Tensor:
    """The picture [H, W, 3] in -1..1; every row must come once, in order."""
    rows: list[torch.Tensor] = []

    def sink(start: int, part: torch.Tensor) -> None:
        assert start == sum(map(len, rows))
        rows.append(part.float().clone())

    vae.decode_rows(latents, how, sink, folder=str(folder))
    return torch.cat(rows)


@pytest.mark.parametrize(("height", "width"), [(9, 11), (1, 1), (3, 17), (16, 2)])
@torch.inference_mode()
def test_decoding_in_strips_is_decoding_in_one_piece(vae: Vae, height: int, width: int, tmp_path: Path) -> None:
    latents = torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(height))
    whole = stock(vae).decode(latents).sample[0].permute(1, 2, 0)
    for strip_bytes in STRIPS:
        for home in ("device", "ram", "disk"):
            got = decoded(vae, latents, plan(strip_bytes, home), tmp_path)
            assert got.shape == whole.shape == (8 * height, 8 * width, 3)
            assert float((got - whole).abs().max()) <= TOLERANCE, (strip_bytes, home)
    assert not list(tmp_path.iterdir()), "spill files have no names"


@pytest.mark.parametrize(("height", "width"), [(72, 88), (8, 8), (136, 16)])
@torch.inference_mode()
def test_encoding_in_strips_is_encoding_in_one_piece(vae: Vae, height: int, width: int) -> None:
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    unit = (pixels.float() / 127.5 - 1).permute(2, 0, 1)[None]
    whole = stock(vae).encode(unit).latent_dist.mode()
    for strip_bytes in STRIPS:
        got = vae.encode(pixels, plan(strip_bytes))
        assert got.shape == whole.shape == (1, 16, height // 8, width // 8)
        assert float((got - whole).abs().max()) <= TOLERANCE * max(1, float(whole.abs().max())), strip_bytes


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@torch.inference_mode()
def test_16_bits_are_as_near_to_fp32_as_the_stock_vae_is(random_vae: Vae, dtype: str) -> None:
    latents = torch.randn(1, 16, 10, 12, generator=torch.Generator().manual_seed(2))
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    module = stock(random_vae)
    exact = module.decode(latents).sample[0].permute(1, 2, 0)
    half = module.to(torch_dtype).decode(latents.to(torch_dtype)).sample[0].permute(1, 2, 0).float()
    ours = decoded(random_vae, latents, plan(1 << 15, dtype=dtype))
    assert 0 < float((ours - exact).abs().mean()) <= 1.1 * float((half - exact).abs().mean())


def test_activations_out_of_range_are_found(random_vae: Vae, tmp_path: Path) -> None:
    """fp16 ends at 65504: the first convolution's results go over it."""
    weights = load_file(random_vae.part.sources["decoder.conv_in.weight"].path)
    weights["decoder.conv_in.weight"] *= 1e5
    save_file(weights, tmp_path / "large.safetensors")
    large = loaded(tmp_path / "large.safetensors")
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    with pytest.raises(NotFinite):
        large.decode(latents, plan(1 << 15, dtype="fp16"))
    assert large.decode(latents, plan(1 << 15)).float().std() > 1
    with pytest.raises(NotFinite):
        levels(torch.tensor([[[0.0, float("nan"), 1.0]]]))


def test_weights_that_are_damaged_missing_or_strange(random_vae: Vae, tmp_path: Path) -> None:
    weights = load_file(random_vae.part.sources["decoder.conv_in.weight"].path)
    cases: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "nan": (weights | {"decoder.conv_out.bias": torch.tensor([0.0, torch.nan, 0.0])}, "conv_out.bias holds NaN"),
        "missing": ({n: w for n, w in weights.items() if n != "decoder.norm_out.bias"}, "1 missing"),
        "shape": (weights | {"decoder.conv_out.bias": torch.zeros(4)}, r"conv_out.bias is \[4\], expected \[3\]"),
    }
    for name, (changed, words) in cases.items():
        save_file(changed, tmp_path / f"{name}.safetensors")
        with pytest.raises(FluxsplitError, match=words):
            loaded(tmp_path / f"{name}.safetensors").decode(torch.zeros(1, 16, 2, 2), plan(1 << 15))


def test_phases_are_nearest_2x_and_a_3x3_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(5, 7, 6, generator=generator)  # [H, W, C]
    weight, bias = torch.randn(4, 6, 3, 3, generator=generator), torch.randn(4, generator=generator)
    enlarged = F.interpolate(plane.permute(2, 0, 1)[None], scale_factor=2.0, mode="nearest")
    wanted = F.conv2d(enlarged, weight, bias, padding=1)[0].permute(1, 2, 0)
    padded = F.pad(plane, (0, 0, 0, 0, 1, 1))
    got = torch.empty(10, 14, 4)
    for parity, kernel in enumerate(phase_kernels(weight)):
        both = convolve(padded[parity : parity + 6], kernel, bias.repeat(2), padding=(0, 1))
        got[parity::2, 0::2], got[parity::2, 1::2] = both[:, :-1, :4], both[:, 1:, 4:]
    assert float((got - wanted).abs().max()) < 1e-5


def test_statistics_do_not_cancel() -> None:
    """A mean a thousand times the deviation, where the mean of squares has no digit left in fp32."""
    rows = 1000 + torch.randn(40, 30, 16, generator=torch.Generator().manual_seed(0))
    moments = Moments(16, CPU)
    for part in rows.split([1, 7, 20, 12]):
        moments.update(part)
    scale, shift = moments.affine(torch.ones(16), torch.zeros(16), 4)
    exact = F.group_norm(rows.double().permute(2, 0, 1)[None], 4, eps=EPSILON)[0].permute(1, 2, 0)
    assert float((rows.double() * scale.double() + shift.double() - exact).abs().max()) < 2e-4
    spread = rows.double().view(40, 30, 4, 4).var((0, 1, 3), correction=0).sqrt().repeat_interleave(4)
    assert float((scale.double() * spread - 1).abs().max()) < 5e-6


def test_tiles_are_diffusers_own(random_vae: Vae) -> None:
    latents = torch.randn(1, 16, 20, 12, generator=torch.Generator().manual_seed(4))
    module = stock(random_vae)
    tiled, whole = TiledVae(random_vae, "fp32"), module.decode(latents).sample[0].permute(1, 2, 0).detach()
    assert float((tiled.values(latents, 0) - whole).abs().max()) == 0
    assert float((tiled.values(latents, 64) - whole).abs().max()) > 0.01, "tiles are not exact"
    assert tiled.decode(latents, 64).shape == (160, 96, 3)


def test_planes_give_back_what_was_read(tmp_path: Path) -> None:
    for home in ("device", "ram", "disk"):
        plane = Plane((1500, 64, 32), torch.float32, Home(home, CPU, folder=str(tmp_path)))  # 12 MB: two blocks
        for start, piece in plane.pieces(0, 1500):
            piece.copy_(torch.arange(start, start + len(piece))[:, None, None].expand_as(piece))
        pieces = list(plane.pieces(1000, 1100))
        assert len(pieces) == 2
        assert torch.cat([piece for _, piece in pieces])[:, 3, 5].tolist() == list(range(1000, 1100))
        assert len(plane._blocks) == 2
        plane.release(1100)
        assert len(plane._blocks) == 1
        plane.close()
        assert not plane._blocks


def test_a_disk_that_is_full_is_an_error_and_no_crash(tmp_path: Path) -> None:
    plane = Plane((1, 1 << 30, 1 << 13), torch.float32, Home("disk", CPU, folder=str(tmp_path)))  # 35 TB
    with pytest.raises(FluxsplitError, match="cannot keep activations"):
        next(iter(plane.pieces(0, 1)))


def test_the_decoder_needs_no_diffusers() -> None:
    script = "import sys, fluxsplit.stage_decode, fluxsplit.stage_encode; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_shape_is_read_off_the_weights(random_vae: Vae) -> None:
    assert random_vae.shape == VaeShape((32, 32, 64, 64), 1, 32, True, 16)
    assert loaded(demo_files().vae).shape == VaeShape((16, 24, 48, 64), 1, 8, False, 16)


def test_blocks_are_used_again_those_of_the_device_first() -> None:
    home = Home("ram", CPU, block_bytes=8 << 20, kept_blocks=2)
    sizes = (5 << 20, 8 << 20, *[3 << 20] * MADE_TOGETHER, (8 << 20) + 1)
    blocks = [home.take(count) for count in sizes]
    assert [block.memory.numel() for block in blocks] == [8 << 20] * (2 + MADE_TOGETHER) + [(8 << 20) + 1]
    places = [block.memory.data_ptr() for block in blocks]
    assert abs(places[0] - places[1]) == 8 << 20, "one piece of memory"
    assert max(places[2:-1]) - min(places[2:-1]) == (MADE_TOGETHER - 1) * (8 << 20), "another one"
    for block in blocks:
        home.give(block)
    again = [home.take(1).memory.data_ptr() for _ in blocks]
    assert set(again[:2]) == set(places[:2]) and set(again[2:-1]) == set(places[2:-1]) and again[-1] not in places


@pytest.mark.parametrize("home", ["device", "ram", "disk"])
def test_after_a_picture_its_memory_is_free_for_the_next(
    random_vae: Vae, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not when Python comes to look for cycles: a card has no room for the planes of two."""
    made: list[weakref.ref[Any]] = []

    def noted(*args: Any, **options: Any) -> Home:
        made.append(weakref.ref(it := Home(*args, **options)))
        made.extend(weakref.ref(block.memory) for blocks in it._free.values() for block in blocks)
        return it

    monkeypatch.setattr("fluxsplit.strips.Home", noted)
    how = VaePlan("fp32", home, 1 << 15, 0, 0, 1 << 20, 3)
    gc.disable()
    try:
        random_vae.decode_rows(torch.zeros(1, 16, 8, 8), how, lambda start, rows: None, folder=str(tmp_path))
        assert len(made) == 4 and not any(ref() is not None for ref in made)
    finally:
        gc.enable()


@pytest.mark.parametrize(("height", "width"), [(9, 11), (40, 24), (64, 4)])
def test_the_plan_knows_how_many_blocks_there_are(
    vae: Vae, height: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the planned ones they would go to a folder that is not there."""
    monkeypatch.setattr("fluxsplit.decode_plan.BLOCK_BYTES", 1 << 14)
    passes = vae.decoder_passes(height, width)
    latents = torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(0))
    whole = decoded(vae, latents, plan(1 << 17))
    block_bytes = block_size(passes, 4)
    for strip_bytes in STRIPS:
        blocks = blocks_held(passes, 4, strip_bytes, block_bytes)
        how = VaePlan("fp32", "disk", strip_bytes, 0, 0, block_bytes, blocks)
        got = decoded(vae, latents, how, tmp_path / "nowhere")
        assert float((got - whole).abs().max()) <= TOLERANCE
    blocks = blocks_held(passes, 4, 1 << 15, block_bytes)
    with pytest.raises(FluxsplitError, match="cannot keep activations"):
        decoded(vae, latents, VaePlan("fp32", "disk", 1 << 15, 0, 0, block_bytes, blocks - 8), tmp_path / "nowhere")
    half, every = (VaePlan("fp32", "ram", 1 << 15, 0, 0, block_bytes, count) for count in (blocks // 2, blocks))
    assert torch.equal(decoded(vae, latents, half), decoded(vae, latents, every))


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["device", "ram", "disk"])
@pytest.mark.parametrize("strip_bytes", STRIPS)
@torch.inference_mode()
def test_on_a_card_strips_are_the_picture_of_the_cpu(
    random_vae: Vae, home: str, strip_bytes: int, tmp_path: Path
) -> None:
    card = load_vae(random_vae.part, random_vae.files, torch.device("cuda", 0))
    latents = torch.randn(1, 16, 19, 23, generator=torch.Generator().manual_seed(0))
    whole = decoded(random_vae, latents, plan(STRIPS[-1]))
    for dtype, tolerance in (("fp32", 1e-4), ("bf16", 0.1)):
        got = decoded(card, latents, plan(strip_bytes, home, dtype), tmp_path).cpu()
        assert float((got - whole).abs().max()) <= tolerance, dtype
    pixels = torch.randint(0, 256, (72, 88, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    encoded = card.encode(pixels, plan(strip_bytes, home), folder=str(tmp_path))
    wanted = random_vae.encode(pixels, plan(STRIPS[-1]))
    assert float((encoded - wanted).abs().max()) <= 1e-4 * max(1, float(wanted.abs().max()))


@pytest.mark.gpu
@torch.inference_mode()
def test_planes_partly_on_a_card_are_the_same_picture(random_vae: Vae, tmp_path: Path) -> None:
    card = load_vae(random_vae.part, random_vae.files, torch.device("cuda", 0))
    latents = torch.randn(1, 16, 96, 88, generator=torch.Generator().manual_seed(0))
    passes = card.decoder_passes(96, 88)
    for dtype, item_bytes in (("fp32", 4), ("bf16", 2)):
        block_bytes = block_size(passes, item_bytes)
        blocks = blocks_held(passes, item_bytes, 1 << 20, block_bytes)
        whole = decoded(card, latents, VaePlan(dtype, "device", 1 << 20, 0, 0, block_bytes, blocks))
        for home in ("ram", "disk"):
            for kept in (0, 1, blocks // 2):
                got = decoded(card, latents, VaePlan(dtype, home, 1 << 20, 0, 0, block_bytes, kept), tmp_path)
                assert torch.equal(got, whole), (dtype, home, kept)


@pytest.mark.gpu
def test_a_card_that_may_pin_no_more_goes_on() -> None:
    device = torch.device("cuda", 0)
    pinned = torch.empty(8 << 20, dtype=torch.uint8, pin_memory=True)
    assert not pin(pinned), "it is pinned already"
    assert float(torch.ones(4, device=device).sum()) == 4


@pytest.mark.parametrize("in_bf16", [False, True])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_means_by_blocks_are_those_of_the_whole_softmax(
    in_bf16: bool, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 scores have 16 digits: with the 8 that products of bf16 give, a score of 40 is off by an eighth."""
    if in_bf16 and not vae_attention.has_quick_bf16_products_only():
        pytest.skip("this CPU multiplies otherwise")
    monkeypatch.setattr(vae_attention, "has_quick_bf16_products_only", lambda: in_bf16)
    random = torch.Generator().manual_seed(0)
    home = Home("device", CPU)
    query, keys, values = (torch.randn(12 * 25, 64, generator=random).mul(spread).bfloat16() for _ in range(3))
    planes = [Plane((12, 25, 64), torch.bfloat16, home) for _ in range(2)]
    for plane, tokens in zip(planes, (keys, values), strict=True):
        for start, piece in plane.pieces(0, 12):
            piece.copy_(tokens.view(12, 25, 64)[start : start + len(piece)])
    scores = query.double() @ keys.double().T / 8
    wanted = scores.softmax(1) @ values.double()
    got = vae_attention.BlockedAttention(torch.bfloat16, CPU, 70).means(query, *planes)
    error = (got - wanted).abs().max() / wanted.abs().max()
    assert got.dtype == torch.float32 and error < (0.01 if in_bf16 else 1e-4)
    in_8_digits = scores.bfloat16().double().softmax(1) @ values.double()
    if spread > 1:
        assert (in_8_digits - wanted).abs().max() > 3 * (got - wanted).abs().max(), "so that it would be seen"
