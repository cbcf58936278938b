"""The product by tiles is exact where there is nothing to round, rounds once elsewhere, and touches nothing else."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_flux import by_seed, image, sample, write_conditioning, write_flux

from fluxsplit import tile_product
from fluxsplit.stored_layers import Scratch, StoredLinear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16 = torch.bfloat16
HAS_TILES = tile_product._kernel(E4M3) is not None
needs_tiles = pytest.mark.skipif(not HAS_TILES, reason="a processor without AMX, or not Linux, or no llvmlite")
GUARD = 4096


@pytest.fixture(autouse=True)
def _small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_product, "MIN_SIDE", 0)


@pytest.fixture
def kernel_anew() -> Iterator[None]:
    tile_product._kernel.cache_clear()
    yield
    tile_product._kernel.cache_clear()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many tokens the products by tiles were, in order."""
    asked: list[int] = []
    multiply = tile_product.multiply_into

    def noting(x: torch.Tensor, *others: object) -> None:
        asked.append(x.shape[0])
        multiply(x, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(tile_product, "multiply_into", noting)
    return asked


def room(count: int) -> torch.Tensor:
    """Full of what would be seen if it were read before it is written: NaN."""
    return torch.full((count,), 0xFF, dtype=torch.uint8)


def whole(*shape: int, seed: int = 0) -> torch.Tensor:
    """Whole numbers that e4m3 and bf16 have, and whose products add up exactly in fp32."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(x: torch.Tensor, codes: torch.Tensor, scale: float = 1.0, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((x.shape[0], codes.shape[0]), torch.nan, dtype=BF16)
    tile_product.multiply_into(x, codes, scale, bias, out, room)
    return out


@needs_tiles
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("tokens", "rows", "inputs"),
    [
        (1, 32, 32),  # the least
        (1, 3072, 64),
        (16, 32, 32),
        (17, 64, 32),
        (33, 96, 3072),
        (512, 32, 64),
        (513, 64, 96),  # in two pieces
        (1100, 32, 32),
        (300, 2080, 64),  # more rows than have room at a time
        (500, 64, 4096),  # several depths, the last one shorter
        (40, 1056, 15360),
    ],
)
def test_whole_numbers_are_multiplied_exactly(
    tokens: int, rows: int, inputs: int, count: int, threads: Callable[[int], None]
) -> None:
    threads(count)
    x, matrix, bias = whole(tokens, inputs), whole(rows, inputs, seed=1), whole(rows, seed=2)
    for float8, scale, with_bias in ((E4M3, 1.0, True), (E5M2, 0.25, False)):
        matrix = matrix.to(float8).float()
        wanted = x.double() @ matrix.double().t() * scale + with_bias * bias
        got = product(x.to(BF16), matrix.to(float8), scale, bias.to(BF16) if with_bias else None)
        assert torch.equal(got, wanted.float().to(BF16))


@needs_tiles
def test_all_codes_are_expanded_exactly() -> None:
    for float8 in (E4M3, E5M2):
        everything = torch.arange(256, dtype=torch.uint8).view(float8)
        finite = everything[everything.float().isfinite()]
        codes = torch.zeros(256, 32).to(float8)
        codes.view(torch.uint8)[torch.arange(len(finite)), 5] = finite.view(torch.uint8)
        x = torch.zeros(16, 32, dtype=BF16)
        x[:, 5] = 1.0
        got = product(x, codes)
        assert torch.equal(got[3, : len(finite)].float(), finite.float())


@needs_tiles
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_random_values_are_as_near_as_torchs_product(scale: float) -> None:
    x, codes, bias = values(200, 3072).to(BF16), values(96, 3072, seed=1).to(E4M3), values(96, seed=2).to(BF16)
    exact = x.double() @ codes.double().t() * scale + bias.double()
    got = product(x, codes, scale, bias)
    spacing = 2.0 ** (exact.abs().log2().floor() - 7)
    off = (got.double() - exact).abs() / spacing
    assert off.max() <= 0.6 and off.mean() <= 0.26, "rounded once: half a step at most, a quarter on average"
    torchs = F.linear(x, codes.to(BF16), bias) if scale == 1.0 else None
    assert torchs is None or (got != torchs).float().mean() < 0.01


@needs_tiles
def test_bits_depend_on_neither_tokens_nor_threads_nor_depth(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, codes, bias = values(700, 1024).to(BF16), values(192, 1024, seed=1).to(E4M3), values(192, seed=2).to(BF16)
    wanted = product(x, codes, 0.5, bias)
    assert torch.equal(product(x[5:45], codes, 0.5, bias), wanted[5:45])
    for count in (2, 3, 5):
        threads(count)
        assert torch.equal(product(x, codes, 0.5, bias), wanted)
    monkeypatch.setattr(tile_product, "CACHED_BYTES", 1 << 16)
    monkeypatch.setattr(tile_product, "MAX_ROWS", 64)
    assert tile_product._depth(352, 1024) == 96
    assert torch.equal(product(x, codes, 0.5, bias), wanted)


@needs_tiles
@pytest.mark.parametrize("cached_bytes", [1 << 20, 1 << 12])
@pytest.mark.parametrize("count", [1, 3])
def test_columns_of_wider_tensors_are_read_and_written_and_nothing_else(
    count: int, cached_bytes: int, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(count)
    wide, codes = values(45, 200).to(BF16), values(96, 64, seed=1).to(E4M3)
    x = wide[2:43, 7:71]  # begins in the middle of a vector
    monkeypatch.setattr(tile_product, "CACHED_BYTES", cached_bytes)
    monkeypatch.setattr(tile_product, "MAX_ROWS", 64)
    out = torch.full((45, 150), -7.0, dtype=BF16)
    rooms: list[torch.Tensor] = []

    def guarded(count: int) -> torch.Tensor:
        rooms.append(torch.full((count + 2 * GUARD,), 0x5A, dtype=torch.uint8))
        return rooms[-1][GUARD:-GUARD]

    tile_product.multiply_into(x, codes, 1.0, None, out[2:43, 9:105], guarded)
    assert torch.equal(out[2:43, 9:105], product(x.contiguous(), codes))
    out[2:43, 9:105] = -7.0
    assert bool((out == -7.0).all())
    assert rooms and all(bool((each[:GUARD] == 0x5A).all() and (each[-GUARD:] == 0x5A).all()) for each in rooms)


@needs_tiles
def test_nothing_behind_codes_and_tokens_is_read(threads: Callable[[int], None]) -> None:
    """Both end where their page does, and the next one may not be read."""
    threads(2)
    codes, x = values(96, 64, seed=1).to(E4M3), values(45, 64).to(BF16)
    wanted = product(x, codes)
    for name, whole_tensor in (("codes", codes), ("x", x)):
        count = whole_tensor.numel() * whole_tensor.itemsize
        pages = -(-count // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        everything = torch.frombuffer(memory, dtype=torch.uint8)
        at_end = everything[pages * mmap.PAGESIZE - count : pages * mmap.PAGESIZE]
        at_end.copy_(whole_tensor.view(torch.uint8).flatten())
        placed = at_end.view(whole_tensor.dtype).view(whole_tensor.shape)
        libc = ctypes.CDLL(None)
        closed = ctypes.c_void_p(everything.data_ptr() + pages * mmap.PAGESIZE)
        assert libc.mprotect(closed, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        got = product(placed, codes) if name == "x" else product(x, placed)
        assert torch.equal(got, wanted), name
        assert libc.mprotect(closed, ctypes.c_size_t(mmap.PAGESIZE), 3) == 0


@needs_tiles
def test_codes_may_begin_at_any_byte_and_inference_in_threads(threads: Callable[[int], None]) -> None:
    threads(3)
    with torch.inference_mode():
        codes, x = values(96, 64, seed=1).to(E4M3), values(45, 64).to(BF16)
        raw = torch.zeros(96 * 64 + 5, dtype=torch.uint8)
        raw[5:] = codes.view(torch.uint8).flatten()
        assert torch.equal(product(x, raw[5:].view(E4M3).view(96, 64)), product(x, codes))


@needs_tiles
def test_what_is_not_finite_stays_with_its_token() -> None:
    x, codes = values(50, 64).to(BF16), values(32, 64, seed=1).to(E4M3)
    wanted = product(x, codes)
    x[7, 3], x[20, 60], x[20, 61] = torch.nan, torch.inf, -torch.inf
    got = product(x, codes)
    assert bool(got[7].isnan().all())
    assert not bool(got[20].isfinite().any())
    others = [i for i in range(50) if i not in (7, 20)]
    assert torch.equal(got[others], wanted[others])


@needs_tiles
def test_what_it_does_not_take_is_refused() -> None:
    x, codes, out = torch.ones(20, 64, dtype=BF16), torch.ones(32, 64).to(E4M3), torch.empty(20, 32, dtype=BF16)
    bias = torch.ones(32, dtype=BF16)
    assert tile_product.multiplies(codes, x)
    for bad_x, bad_codes in (
        (x.float(), codes),
        (x[:0], codes),
        (x.t().contiguous().t(), codes),
        (x, codes[:20]),
        (x[:, :48], codes[:, :48].clone()),
        (x[:, :32], codes[:, :32]),
        (x, codes.view(torch.uint8)),
        (x.to("meta"), codes),
    ):
        assert not tile_product.multiplies(bad_codes, bad_x)
        with pytest.raises(ValueError, match="into"):
            tile_product.multiply_into(bad_x, bad_codes, 1.0, None, out, room)
    for bad_x, bad_bias, bad_out in (
        (x[:, :32], bias, out),
        (x, bias[:16], out),
        (x, bias.float(), out),
        (x, bias, out[:19]),
        (x, bias, out.float()),
        (x, bias, out.t().contiguous().t()),
        (x, bias.to("meta"), out),
        (x, bias, out.to("meta")),
    ):
        with pytest.raises(ValueError, match="into"):
            tile_product.multiply_into(bad_x, codes, 1.0, bad_bias, bad_out, room)


@needs_tiles
def test_too_little_room_is_refused() -> None:
    x, codes, out = torch.ones(20, 64, dtype=BF16), torch.ones(32, 64).to(E4M3), torch.empty(20, 32, dtype=BF16)
    for small in (lambda count: room(count - 1), lambda count: room(count + 1)[1:], lambda count: room(2 * count)[::2]):
        with pytest.raises(ValueError, match="bytes of room"):
            tile_product.multiply_into(x, codes, 1.0, None, out, small)


def test_room_hardly_grows_with_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llvmlite")
    from fluxsplit import tile_kernel

    asked: list[int] = []

    def asking(count: int) -> torch.Tensor:
        asked.append(count)
        return torch.empty(count, dtype=torch.uint8)

    def nothing(*arguments: object) -> None: ...

    kernel = tile_product._Kernel(nothing, nothing, tile_kernel.packed_bytes, tile_kernel.work_bytes)
    x, codes = torch.empty(512, 15360, dtype=BF16), torch.empty(3072, 15360).to(E4M3)
    for threads in (1, 2, 16, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = torch.empty(512, 3072, dtype=BF16)
        depth = tile_product._depth(512, 15360)
        tile_product._multiply(kernel, x, codes, 1.0, torch.empty(3072, dtype=BF16), out, asking, depth)
    assert max(asked) < 40e6 and asked[0] < 20e6, asked


@needs_tiles
def test_layers_use_it_for_each_picture_alike(multiplied: list[int]) -> None:
    codes, bias = values(96, 64, seed=1).to(E4M3), values(96, seed=2).to(BF16)
    layer = StoredLinear("a", codes, 0.5, bias, scratch=Scratch(1 << 12))
    xs = [values(1, 40, 64, seed=seed).to(BF16) for seed in (3, 4)]
    together, wide = layer.each(xs), torch.zeros(1, 40, 100, dtype=BF16)
    layer.into(xs[0], wide[..., 4:])
    assert multiplied == [80, 40], "several at once"
    for x, out in zip(xs, together, strict=True):
        assert out.shape == (1, 40, 96) and torch.equal(out, layer(x))
        assert torch.equal(out[0], product(x[0], codes, 0.5, bias))
    assert torch.equal(wide[..., 4:], together[0]) and not wide[..., :4].any()
    multiplied.clear()
    one, few = layer.each([xs[0][:, :1], xs[1][:, :3]])
    assert multiplied == [4]
    assert torch.equal(one, together[0][:, :1]) and torch.equal(few, together[1][:, :3])


@needs_tiles
def test_a_whole_run_by_tiles_is_torchs_to_rounding_and_each_picture_that_of_its_own_run(
    tmp_path: Path, multiplied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    flux = write_flux(tmp_path / "flux.safetensors")
    text = write_conditioning(tmp_path / "text", 1, 20)
    images = [image(text, seed, (128, 128)) for seed in (1, 2)]
    _, recorder = sample(flux, images, tmp_path / "tiles", "bf16")
    by_tiles = by_seed(recorder)
    assert {20, 64, 84} <= set(multiplied), "text, picture and both"
    alone, _ = sample(flux, images[1:], tmp_path / "alone", "bf16")
    assert torch.equal(alone[0], by_tiles[2])
    monkeypatch.setattr(tile_product, "MIN_SIDE", 1 << 30)
    multiplied.clear()
    _, recorder = sample(flux, images, tmp_path / "torch", "bf16")
    assert not multiplied
    for seed, latents in by_seed(recorder).items():
        assert (latents.float() - by_tiles[seed].float()).abs().max() < 0.05 * latents.float().std()


def check_torch_multiplies() -> None:
    codes = values(32, 64, seed=1).to(E4M3)
    assert not tile_product.multiplies(codes, torch.ones(20, 64, dtype=BF16))
    x = whole(20, 64).to(BF16)
    assert torch.equal(StoredLinear("a", codes, None, None)(x), F.linear(x, codes.to(BF16)))


def test_without_llvmlite_torch_multiplies(monkeypatch: pytest.MonkeyPatch, kernel_anew: None) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "llvmlite"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    monkeypatch.delitem(sys.modules, "fluxsplit.tile_kernel", raising=False)
    monkeypatch.delattr("fluxsplit.tile_kernel", raising=False)
    check_torch_multiplies()


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (sys, "platform", "darwin"),
        (torch.cpu, "_is_amx_tile_supported", lambda: False),
        (torch.cpu, "_init_amx", lambda: False),
    ],
)
def test_where_there_are_no_tiles_torch_multiplies(
    where: object, name: str, value: object, monkeypatch: pytest.MonkeyPatch, kernel_anew: None
) -> None:
    monkeypatch.setattr(where, name, value)
    check_torch_multiplies()


def test_a_model_of_small_matrices_compiles_nothing(monkeypatch: pytest.MonkeyPatch, kernel_anew: None) -> None:
    monkeypatch.setattr(tile_product, "MIN_SIDE", 2048)
    check_torch_multiplies()
    assert tile_product._kernel.cache_info().currsize == 0


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError, AttributeError, TypeError, ValueError])
def test_an_llvmlite_of_another_time_is_not_used(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, kernel_anew: None
) -> None:
    def failing(float8: torch.dtype) -> tile_product._Kernel:
        raise error("PointerType.__init__() missing 1 required positional argument: 'pointee'")

    monkeypatch.setattr(tile_product, "_compiled", failing)
    check_torch_multiplies()


def test_what_llvm_has_no_code_for_is_not_compiled(monkeypatch: pytest.MonkeyPatch, kernel_anew: None) -> None:
    """It would end the process."""
    monkeypatch.setattr(tile_product, "has_features", lambda *names: "amx-bf16" not in names)
    check_torch_multiplies()


@needs_tiles
def test_a_kernel_that_errs_is_not_used(monkeypatch: pytest.MonkeyPatch, kernel_anew: None) -> None:
    compiled = tile_product._compiled

    def without_scale(float8: torch.dtype) -> tile_product._Kernel:
        kernel = compiled(float8)
        return replace(kernel, multiply=lambda *arguments: kernel.multiply(*arguments[:-1], 1.0))

    monkeypatch.setattr(tile_product, "_compiled", without_scale)
    check_torch_multiplies()


def test_the_kernel_is_llvms_language_on_any_machine() -> None:
    llvm = pytest.importorskip("llvmlite.binding")
    from fluxsplit import compiled_expansion, tile_kernel

    assert tile_product._PAIR == tile_kernel.PAIR
    for float8 in (E4M3, E5M2):
        module = llvm.parse_assembly(tile_kernel.source())
        module.link_in(llvm.parse_assembly(compiled_expansion.source(float8, BF16, exact=True)))
        module.verify()
        assert {f.name for f in module.functions if not f.is_declaration} == {"pack", "multiply", "expand"}
