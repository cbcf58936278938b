"""What the bench holds a run against: the products of a step by their shapes, and every code of float8."""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from headers import write
from simulated_card import Card
from small_flux import write_flux

import bench
import bench_floor
import bench_fp8
import synthetic_checkpoint
from bench_stage import Between, Blocks, Host, Moved
from bench_watch import AnonymousPeak, usage
from fluxsplit import checkpoint, fp8, reader
from fluxsplit.read_ahead import ReadAhead
from fluxsplit.reader import Reader
from fluxsplit.streaming import Streaming, layout
from fluxsplit.transformer import Flux
from fluxsplit.weights import WeightFiles


def test_the_products_of_a_full_step_are_those_that_others_counted(tmp_path: Path) -> None:
    dimensions = synthetic_checkpoint.Dimensions(dev=True)
    path = write(tmp_path / "dev.safetensors", synthetic_checkpoint.flux_shapes(dimensions), "F8_E4M3")
    counts = bench_floor.products(checkpoint.part(path, "transformer"), image_tokens=4096, text_tokens=512)
    tflop = sum(2 * math.prod(shape) * count for shape, count in counts.items()) / 1e12
    assert tflop == pytest.approx(59.5, rel=2e-3)  # 59,523 GFLOP in diffusers' published profile at 1024x1024


def test_a_wrong_expansion_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_fp8.compare_codes(fp8.FLOAT8[0], torch.bfloat16, torch.device("cpu")) == (254, 254, 2)
    true = fp8.expand
    monkeypatch.setattr(fp8, "expand", lambda codes, dtype: true(codes, dtype) * (codes.float() != 1.5))
    assert bench_fp8.compare_codes(fp8.FLOAT8[0], torch.bfloat16, torch.device("cpu"))[0] < 254


def test_what_is_read_for_a_card_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_flux(tmp_path / "flux.safetensors")
    flux = Flux(checkpoint.part(path, "transformer"), files := WeightFiles(), torch.float32, torch.device("cpu"))
    Card(monkeypatch, at_once=True)
    monkeypatch.setattr(Reader, "begin", Reader.begin)  # put back afterwards
    for what, name in ((Streaming, "brought_in"), (reader, "_copy")):
        monkeypatch.setattr(what, name, getattr(what, name))
    moved, host = Moved(), Host()
    moved.count()
    host.watch()
    loader = Streaming(flux.blocks, files, flux.device, once=True, as_card=True)
    for number in range(len(flux.blocks)):
        with loader.brought_in(number):
            time.sleep(0.002)
    loader.close()
    assert host.launching_s >= 0.002 * len(flux.blocks) and host.waiting_s > 0 and host.bringing_s > 0
    assert host.copies >= len(flux.blocks)
    matrices_bytes = sum(place.span.bytes for block in flux.blocks for place in layout(block).places)
    assert 0 < matrices_bytes <= moved.bytes < 1.01 * matrices_bytes, "with what lies between near neighbours"


def test_products_are_made_between_blocks_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_flux(tmp_path / "flux.safetensors")
    flux = Flux(checkpoint.part(path, "transformer"), files := WeightFiles(), torch.float32, torch.device("cpu"))
    monkeypatch.setattr(ReadAhead, "brought_in", ReadAhead.brought_in)  # put back afterwards
    between = Between(str(path), "16", "8", "fp32")
    assert between.make_one(lambda: 0.0) == 0
    read_s = iter((1.0, 1.5))
    assert between.make_one(lambda: next(read_s)) == 0.5
    (wall_s, cpu_s), (_, less_s) = between._taken_s[0][0], between._taken_s[1][0]
    assert wall_s > 0 and cpu_s > 0 > less_s + 0.4, "what was read meanwhile is none of a product"
    assert between.compute_s == (0.0, 0.0), "not all of them were made yet"
    between.begin_anew()
    blocks, products = Blocks(between), len(between._work)
    blocks.watch()
    loader = ReadAhead(flux.blocks, files, frozenset(), lambda count: None)
    told = []
    for step in range(products + 1):
        for number in range(len(flux.blocks)):
            with loader.brought_in(number):
                time.sleep(0.001)
        told.append(blocks.end_step(is_first=step == 0))
        if step == 0:
            assert between._made == 0, "what was made beside a cold step does not count"
    loader.close()
    assert all(len(step["blocks_s"]) == len(flux.blocks) for step in told)
    assert all(wall_s >= 0.001 and cpu_s >= 0 for step in told for wall_s, cpu_s in step["blocks_s"])
    assert between._made == products * len(flux.blocks)
    assert {len(taken_s) for taken_s in between._taken_s} == {len(flux.blocks)}
    counts = [count for count, _ in between._work]
    assert sum(counts) == sum(bench_floor.products(checkpoint.part(path, "transformer"), 16, 8).values()) + len(
        flux.blocks
    )
    between._taken_s = [[(1.0, 2.0), (3.0, 4.0)] for _ in counts]
    assert blocks.end_step(is_first=False)["between_s"] == (2 * sum(counts), 3 * sum(counts))


def test_a_step_is_put_together_of_what_each_block_took_at_its_best_and_on_average() -> None:
    args = argparse.Namespace(device="cpu", pictures=1)
    cold, slow_first, slow_second = [(9.0, 9.0)] * 2, [(3.0, 4.0), (1.0, 1.5)], [(1.0, 2.0), (2.0, 2.5)]
    seen = bench.Watched(blocks_s=[cold, slow_first, slow_second], between_s=(1.0, 2.5))
    found = bench.by_block(args, seen, {"quiet_compute_s": 2.0})
    assert (found["quiet_step_s"], found["quiet_step_cpu_s"], found["quiet_step_over_compute"]) == (2.0, 3.5, 1.75)
    assert (found["beside_step_s"], found["beside_step_cpu_s"], found["beside_step_over_compute"]) == (3.5, 5.0, 2.0)
    assert found["beside_wall_over_compute"] == 3.5
    assert "beside_step_s" not in bench.by_block(args, replace(seen, between_s=(0.0, 0.0)), {"quiet_compute_s": 2.0})
    assert bench.by_block(argparse.Namespace(device="cpu", pictures=2), seen, {}) == {}


def test_a_process_is_seen_to_take_memory_and_time() -> None:
    before, watch = usage(os.getpid()), AnonymousPeak(os.getpid())
    time.sleep(0.1)
    low_bytes, taken = watch.peak_bytes, torch.ones(1 << 26)
    for _ in range(10):
        taken += 1
        time.sleep(0.02)
    assert watch.stop() >= low_bytes + 200_000_000 > 200_000_000
    assert usage(os.getpid()).cpu_s > before.cpu_s
