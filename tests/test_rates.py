"""What is measured of the machine before a plan: that it is measured where it counts, and only there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxsplit import tile_product
from fluxsplit.device import device_info
from fluxsplit.memory_plan import PIECE_BYTES
from fluxsplit.rates import _seconds, feed_bytes_per_s, with_file_rates, with_rates

CPU = torch.device("cpu")


def test_every_rate_of_a_cpu_is_measured() -> None:
    info = with_rates(device_info(CPU), CPU, torch.float32, hidden=64, head=16, tokens=80)
    rates = (
        info.flops_per_s,
        info.attention_flops_per_s,
        info.expand_elements_per_s,
        info.elementwise_per_s,
        info.gelu_per_s,
    )
    assert all(rate is not None and 0 < rate < 1e15 for rate in rates), rates
    assert info.bus_bytes_per_s is None


@pytest.mark.parametrize(("has_tiles", "float8"), [(True, True), (False, True), (True, False)])
def test_expansion_is_measured_where_products_do_not_expand_as_they_go(
    has_tiles: bool, float8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied: list[int] = []

    def multiply_into(x: torch.Tensor, *others: object) -> None:
        multiplied.append(x.shape[0])

    monkeypatch.setattr(tile_product, "multiplies", lambda codes, x: has_tiles)
    monkeypatch.setattr(tile_product, "multiply_into", multiply_into)
    info = with_rates(device_info(CPU), CPU, torch.bfloat16, hidden=64, head=16, tokens=80, float8=float8)
    assert info.flops_per_s and (info.expand_elements_per_s is None) is (has_tiles and float8)
    assert set(multiplied) == ({80} if has_tiles and float8 else set())


def test_the_disk_is_measured_only_where_weights_do_not_stay_in_ram(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(8 << 20))
    info = device_info(CPU)
    assert info.ram_bytes
    assert with_file_rates(info, str(path), 8 << 20) is info
    short = with_file_rates(replace(info, ram_bytes=4 << 20), str(path), 8 << 20)
    assert short.disk_bytes_per_s is not None and 0 < short.disk_bytes_per_s < 1e12
    path.write_bytes(b"")
    assert with_file_rates(replace(info, ram_bytes=0), str(path), 8 << 20).disk_bytes_per_s is None


def test_a_bus_is_no_faster_than_it_is_fed(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(PIECE_BYTES))
    fed_bytes_per_s = feed_bytes_per_s(str(path), 2)
    assert fed_bytes_per_s is not None and 0 < fed_bytes_per_s < 1e12
    fed = with_file_rates(replace(device_info(CPU), bus_bytes_per_s=1e15), str(path), PIECE_BYTES)
    assert fed.feed_bytes_per_s is not None and fed.feed_bytes_per_s < 1e12
    assert with_file_rates(device_info(CPU), str(path), PIECE_BYTES).feed_bytes_per_s is None
    path.write_bytes(bytes(1000))
    assert feed_bytes_per_s(str(path), 2) is None


def test_a_sample_is_longer_than_the_kernels_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that other threads used are added up every 4 ms only: short runs would seem to take none of them."""
    now_s = 0.0

    def run() -> None:
        nonlocal now_s
        now_s += 0.001

    def cpu_s() -> float:
        return now_s + now_s // 0.004 * 0.004

    monkeypatch.setattr("fluxsplit.rates.time.perf_counter", lambda: now_s)
    monkeypatch.setattr("fluxsplit.rates.time.process_time", cpu_s)
    monkeypatch.setattr("fluxsplit.rates.torch.get_num_threads", lambda: 2)
    assert _seconds(CPU, run=run)["run"] == pytest.approx(0.001, rel=0.1)


def test_what_slows_one_turn_of_all_rates_slows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's work for a tenth of a second, which is one turn of four rates: it is in no rate."""
    now_s, disturbed_s = 0.0, (1.0, 1.12)

    def run() -> None:
        nonlocal now_s
        now_s += 0.003 if disturbed_s[0] <= now_s < disturbed_s[1] else 0.001

    monkeypatch.setattr("fluxsplit.rates.time.perf_counter", lambda: now_s)
    monkeypatch.setattr("fluxsplit.rates.time.process_time", lambda: now_s)
    monkeypatch.setattr("fluxsplit.rates.torch.get_num_threads", lambda: 1)
    for begin_s in (0.7, 0.85, 0.95, 0.999):
        now_s = begin_s
        assert _seconds(CPU, **dict.fromkeys("abcd", run)) == pytest.approx(dict.fromkeys("abcd", 0.001)), begin_s
        assert now_s > disturbed_s[1] or begin_s < 0.8
