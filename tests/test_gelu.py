"""GELU that is looked up has torch's bits for all values there are, and changes nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fluxsplit import gelu

DTYPES = (torch.bfloat16, torch.float16)
needs_loop = pytest.mark.skipif(gelu._loop() is None, reason="no llvmlite")


@pytest.fixture(autouse=True)
def _small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gelu, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(gelu, "SHARE_ELEMENTS", 64)


@pytest.fixture
def loop_anew() -> Iterator[None]:
    gelu._loop.cache_clear()
    yield
    gelu._loop.cache_clear()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many elements torch was asked, the tables' own left out."""
    for dtype in DTYPES:
        gelu._table(dtype)
    asked, compute = list[int](), gelu._computed_

    def noting(x: torch.Tensor) -> torch.Tensor:
        asked.append(x.numel())
        return compute(x)

    monkeypatch.setattr(gelu, "_computed_", noting)
    return asked


def everything(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


@needs_loop
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_is_what_torch_computes(dtype: torch.dtype, computed: list[int]) -> None:
    x = everything(dtype)
    wanted = F.gelu(x, approximate="tanh")
    got = gelu.gelu_(x.clone().view(1, 64, 1024)).view(-1)
    assert not computed
    assert torch.equal(got.isnan(), wanted.isnan()) and bool(got[x.isnan()].isnan().all())
    finite = ~wanted.isnan()
    assert torch.equal(got.view(torch.int16)[finite], wanted.view(torch.int16)[finite])
    exact = F.gelu(x[x.isfinite()].double(), approximate="tanh")
    assert torch.allclose(got[x.isfinite()].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@needs_loop
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_columns_of_a_wider_tensor_are_changed_and_nothing_else(threads: int, rows: int, computed: list[int]) -> None:
    wide = torch.randn(1, rows, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    before, count = wide.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            assert gelu.gelu_(wide[..., 30:91]).data_ptr() == wide[..., 30:].data_ptr()
    finally:
        torch.set_num_threads(count)
    assert not computed
    assert torch.equal(wide[..., 30:91], F.gelu(before[..., 30:91], approximate="tanh"))
    before[..., 30:91] = wide[..., 30:91]
    assert torch.equal(wide, before)


def test_what_cannot_be_looked_up_is_computed(computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    for x in (
        torch.randn(1, 8, 16, generator=random),
        torch.randn(2, 8, 16, generator=random).bfloat16()[..., :12],  # rows that are not equally far apart
        torch.randn(16, 8, generator=random).bfloat16().t(),
        torch.randn(1, 0, 16, generator=random).bfloat16()[..., ::2],
    ):
        wanted = F.gelu(x, approximate="tanh")
        assert torch.equal(gelu.gelu_(x), wanted)
    assert len(computed) == 4
    monkeypatch.setattr(gelu, "MIN_ELEMENTS", 1000)
    gelu.gelu_(torch.ones(1, 9, 111, dtype=torch.bfloat16))
    assert computed[4:] == [999]


def test_without_llvmlite_torch_computes_the_same(
    computed: list[int], monkeypatch: pytest.MonkeyPatch, loop_anew: None
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "llvmlite"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    x = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = F.gelu(x, approximate="tanh")
    assert torch.equal(gelu.gelu_(x), wanted) and computed == [x.numel()]
