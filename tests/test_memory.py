"""Budgets as people type them, and the memory of this machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fluxsplit import memory
from fluxsplit.device import device_info
from fluxsplit.errors import UsageError
from fluxsplit.memory import DeviceInfo, auto_bytes, budget_bytes, free_ram_bytes, total_ram_bytes

CARD = DeviceInfo("cuda", "a card", free_bytes=11_000_000_000, total_bytes=12_884_901_888)
RAM = DeviceInfo("cpu", "cpu", free_bytes=10_000_000_000, total_bytes=24_000_000_000, unified=True)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("8G", 8_000_000_000),
        ("8GB", 8_000_000_000),
        (" 7.5 g ", 7_500_000_000),
        ("8GiB", 8 << 30),
        ("800M", 800_000_000),
        ("800MiB", 800 << 20),
        ("123456789", 123_456_789),
        ("75%", 8_250_000_000),
        ("12.5 %", 1_375_000_000),
        ("100%", 11_000_000_000),
    ],
)
def test_amounts_and_shares(text: str, wanted: int) -> None:
    assert budget_bytes(text, CARD) == wanted


@pytest.mark.parametrize(
    "text", ["", "8T", "eight", "-1G", "8 G 2", "1e9", "nan", "150%", "0%", "0", "0G", "%", "8,5G"]
)
def test_what_is_no_amount_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--vram"):
        budget_bytes(text, CARD)


def test_more_than_is_free_is_refused_with_the_figures() -> None:
    with pytest.raises(UsageError, match=r"--vram 12G is more than a card has: 11\.0 GB of 12\.9 GB are free"):
        budget_bytes("12G", CARD)


def test_after_memory_ran_out_an_amount_is_a_bound() -> None:
    """Another program may have taken of it meanwhile, and who gave no amount is not to be told of one."""
    assert budget_bytes("8G", CARD, again=True) == 8_000_000_000
    assert budget_bytes("12G", CARD, again=True) == budget_bytes("10.9G", CARD, again=True) == auto_bytes(CARD)
    assert budget_bytes("75%", CARD, again=True) == budget_bytes("75%", CARD)


@pytest.mark.parametrize(("integrated", "free"), [(True, 13_000_000_000), (False, 2_000_000_000)])
def test_where_ram_is_the_cards_memory_cached_files_are_free(
    monkeypatch: pytest.MonkeyPatch, integrated: bool, free: int
) -> None:
    chip = SimpleNamespace(name="a chip", is_integrated=integrated, major=8, multi_processor_count=16)
    for name, value in (
        ("mem_get_info", (2_000_000_000, 16_000_000_000)),
        ("memory_reserved", 0),
        ("memory_allocated", 0),
        ("get_device_properties", chip),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr("fluxsplit.device.free_ram_bytes", lambda: 13_000_000_000)
    info = device_info(torch.device("cuda", 0))
    assert (info.free_bytes, info.unified) == (free, integrated)


def test_a_forgotten_unit_is_asked_for() -> None:
    with pytest.raises(UsageError, match="is 8 bytes") as raised:
        budget_bytes("8", CARD)
    assert "8G" in raised.value.hint


def test_auto_leaves_a_desktop_its_share() -> None:
    assert auto_bytes(CARD) == budget_bytes("auto", CARD) == budget_bytes("AUTO", CARD)
    assert CARD.free_bytes - auto_bytes(CARD) == int(CARD.total_bytes * memory.DESKTOP_SHARE)
    small = DeviceInfo("hip", "a card", free_bytes=300_000_000, total_bytes=4_000_000_000)
    assert auto_bytes(small) == 0
    assert auto_bytes(RAM) == 7_500_000_000


def test_the_memory_of_this_machine() -> None:
    assert 0 < free_ram_bytes() <= total_ram_bytes() < 1 << 50


def test_a_container_limits_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"memory.max": 2_000_000_000, "memory.current": 1_500_000_000}
    monkeypatch.setattr(memory, "_container", figures.get)
    monkeypatch.setattr(memory, "_container_file_bytes", lambda: 100_000_000)
    assert free_ram_bytes() == 600_000_000
    assert total_ram_bytes() == 2_000_000_000


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'tpu'"):
        DeviceInfo("tpu", "", 1, 1)


def test_the_cpu_as_torch_sees_it() -> None:
    import torch

    from fluxsplit.device import device_info

    info = device_info(torch.device("cpu"))
    assert (info.kind, info.name, info.unified) == ("cpu", "cpu", True)
    assert 0 < info.free_bytes <= info.total_bytes
    assert info.cores == torch.get_num_threads()


@pytest.mark.gpu
def test_what_the_allocator_keeps_is_free_for_the_next_picture() -> None:
    card = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before_bytes = device_info(card).free_bytes
    held = torch.empty(1 << 30, dtype=torch.uint8, device=card)
    assert device_info(card).free_bytes <= before_bytes - (1 << 30)
    del held
    assert torch.cuda.memory_reserved(card) >= 1 << 30
    assert abs(device_info(card).free_bytes - before_bytes) < 64 << 20
