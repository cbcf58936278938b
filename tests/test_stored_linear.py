"""A matrix that is expanded in pieces gives what it gives whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fluxsplit import fp8
from fluxsplit.errors import FluxsplitError
from fluxsplit.file_spans import Span
from fluxsplit.stored_layers import Scratch, StoredLinear

OUTPUTS, INPUTS = 200, 96


def linear(float8: torch.dtype, dtype: torch.dtype, scale: float | None, bias: bool, rows: int) -> StoredLinear:
    random = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (OUTPUTS, INPUTS), generator=random, dtype=torch.uint8)
    finite = torch.where((codes & 0x7F) < 0x7C, codes, 0x31)
    offsets = torch.randn(OUTPUTS, generator=random).to(dtype) if bias else None
    return StoredLinear("a", finite.view(float8), scale, offsets, scratch=Scratch(rows * INPUTS * dtype.itemsize))


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize(("scale", "bias"), [(None, True), (0.37, True), (None, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("float8", fp8.FLOAT8)
def test_pieces_give_what_the_whole_gives(
    float8: torch.dtype, dtype: torch.dtype, scale: float | None, bias: bool, rows: int
) -> None:
    layer = linear(float8, dtype, scale, bias, rows)
    x = (torch.randn(1, 33, INPUTS, generator=torch.Generator().manual_seed(4)) * 0.01).to(dtype)
    wanted = F.linear(x, fp8.expand(layer.stored, dtype, scale or 1.0), layer.bias)
    got = layer(x)
    assert got.shape == wanted.shape and got.is_contiguous()
    # not to the bit: a library may add up in another order where there are fewer rows
    assert (got - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()


def test_a_power_of_two_goes_to_the_product_only_where_no_bit_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    into = fp8.expand_into

    def noting(codes: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> None:
        asked.append(scale)
        into(codes, out, scale)

    monkeypatch.setattr(fp8, "expand_into", noting)
    e4m3 = torch.float8_e4m3fn
    for dtype, scale, bias, factor in (
        (torch.bfloat16, None, True, 2.0**-8),
        (torch.float32, None, True, 2.0**-8),
        (torch.float16, None, True, 1.0),
        (torch.bfloat16, 0.37, True, 0.37),
        (torch.bfloat16, None, False, 1.0),
    ):
        asked.clear()
        linear(e4m3, dtype, scale, bias, 64)(torch.ones(1, INPUTS, dtype=dtype))
        assert set(asked) == {factor}


def test_a_matrix_with_nan_is_named_with_its_file() -> None:
    codes = torch.full((2, 2), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    layer = StoredLinear("blocks.0.to_q", codes, None, None, Span("/models/flux.safetensors", 0, 4))
    with pytest.raises(FluxsplitError, match=r"to_q of flux\.safetensors holds NaN"):
        layer(torch.ones(1, 2))


def test_all_matrices_share_the_buffer_of_the_largest_however_often_they_are_taken() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    small = scratch.matrix(torch.Size((3, 8)), torch.bfloat16, cpu)
    large = scratch.matrix(torch.Size((5, 8)), torch.float32, cpu)
    again = scratch.matrix(torch.Size((3, 8)), torch.bfloat16, cpu)
    assert again.shape == small.shape and again.dtype == small.dtype
    assert again.data_ptr() == large.data_ptr(), "none of them is in the buffer that was too small"
    assert scratch.matrix(torch.Size((3, 8)), torch.bfloat16, cpu) is again
    assert scratch.matrix(torch.Size((5, 8)), torch.float32, cpu) is large
    assert scratch.matrix(torch.Size((3, 8)), torch.bfloat16, torch.device("meta")).device.type == "meta"
    assert scratch.matrix(torch.Size((3, 8)), torch.bfloat16, cpu).device == cpu


def test_a_buffer_of_inference_can_be_used_out_of_it() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    with torch.inference_mode():
        scratch.matrix(torch.Size((4, 3)), torch.float32, cpu).zero_()
    x = torch.ones(2, 3, requires_grad=True)
    F.linear(x, scratch.matrix(torch.Size((4, 3)), torch.float32, cpu).fill_(1.0)).sum().backward()
    assert x.grad is not None and bool((x.grad == 4).all())
