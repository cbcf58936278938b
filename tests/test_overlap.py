"""What streams is hidden behind what is computed: seconds of a step of full-size FLUX.1, by a simulated clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import pytest
import torch
from diffusers import FluxTransformer2DModel  # noqa: F401  before our rooms, as conftest.py has it believe in accelerate
from headers import write
from simulated_time import H200, Machine, Speed

import synthetic_checkpoint
from fluxsplit import checkpoint
from fluxsplit.memory import DeviceInfo
from fluxsplit.memory_plan import PIECE_BYTES, plan_memory
from fluxsplit.model_sizes import read_model
from fluxsplit.streaming import Streaming
from fluxsplit.transformer import Flux
from fluxsplit.weights import WeightFiles
from fluxsplit.work import Work

GB = 10**9
CPU = torch.device("cpu")
STEPS, WARM = 13, 6
LIMIT = 1.15
SINGLE_BYTES = 113_246_208
"""A single block's matrices, half a double one's."""
DESKTOP = Speed(bus_bytes_per_s=12e9, read_bytes_per_s=12e9, compute_s=3.8, launch_s=0.15)
"""A card of 25 TFLOP/s on PCIe 3, with six cores before it."""


@dataclass(frozen=True)
class Seen:
    """A run; seconds are of a warm step."""

    step_s: float
    bus_s: float
    streamed_bytes: int
    pinned_bytes: int
    copies: float


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = synthetic_checkpoint.flux_shapes(synthetic_checkpoint.Dimensions())
    return write(tmp_path_factory.mktemp("weights") / "flux.safetensors", shapes, "F8_E4M3")


def run(
    path: Path, machine: Machine, budget_gb: float, *, kind: str = "cuda", cores: int = 16, ahead: bool = True
) -> Seen:
    """Steps of 1152x944 as the plan for the budget has them."""
    part, files = checkpoint.part(path, "transformer"), WeightFiles()
    device = DeviceInfo(
        kind, "simulated", 100 * GB, 100 * GB, ram_bytes=120 * GB, growing_segments=True, processor_cores=cores
    )
    plan = plan_memory(read_model(part, "bf16"), Work(((1152, 944),), 256), device, int(budget_gb * GB), "bf16")
    flux = Flux(part, files, torch.bfloat16, CPU)
    loader = Streaming(
        flux.blocks,
        files,
        CPU,
        resident=frozenset(plan.resident),
        slots=plan.slots,
        ahead=ahead,
        readers=plan.readers,
        pieces=plan.pieces,
        spare_bytes=plan.spare_bytes,
        pinnable=frozenset(plan.pinnable),
        as_card=True,
    )
    steps_s, buses_s, copies = [], [], []
    for _ in range(STEPS):
        began_s, used_s, begun = machine.now_s, machine.bus_s, machine.copies
        for number in range(len(flux.blocks)):
            with loader.brought_in(number):
                machine.compute_block(len(flux.blocks))
        machine.wait_until(machine.compute.ready_s)  # as for the look whether all is finite
        steps_s.append(machine.now_s - began_s)
        buses_s.append(machine.bus_s - used_s)
        copies.append(machine.copies - begun)
    pinned_bytes = loader._reader.pinned_bytes
    loader.close()
    warm_s, warm_bus_s, warm_copies = (median(each[WARM:]) for each in (steps_s, buses_s, copies))
    return Seen(warm_s, warm_bus_s, plan.streamed_bytes, pinned_bytes, warm_copies)


@pytest.mark.parametrize("budget_gb", [12, 8, 6, 4, 3, 2])
def test_a_step_takes_what_computing_takes_on_the_fastest_card(
    path: Path, budget_gb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With at most half of what streams pinned."""
    seen = run(path, Machine(monkeypatch, H200), budget_gb)
    assert seen.bus_s == pytest.approx(seen.streamed_bytes / H200.bus_bytes_per_s, rel=0.1)
    assert seen.step_s <= LIMIT * max(H200.compute_s, seen.bus_s)
    assert seen.pinned_bytes <= seen.streamed_bytes / 2


@pytest.mark.parametrize("budget_gb", [8, 4, 2])
def test_few_copies_bring_what_streams(path: Path, budget_gb: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single block's matrices are one run, a double one's two; a run takes its pieces, a pinned one three copies."""
    seen = run(path, Machine(monkeypatch, H200), budget_gb)
    runs, pinned_runs = seen.streamed_bytes / SINGLE_BYTES, seen.pinned_bytes / SINGLE_BYTES
    pieces = -(-SINGLE_BYTES // PIECE_BYTES)
    assert seen.copies <= (runs - pinned_runs) * pieces + (pinned_runs + 1) * 3


@pytest.mark.parametrize("kind", ["cuda", "hip"])
@pytest.mark.parametrize("budget_gb", [7.5, 4, 2])
@pytest.mark.parametrize("compute_s", [3.8, 1.2])
def test_a_desktop_only_computes_and_pins_nothing(
    path: Path, budget_gb: float, compute_s: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1152x944 and 512x512."""
    speed = replace(DESKTOP, compute_s=compute_s)
    seen = run(path, Machine(monkeypatch, speed), budget_gb, kind=kind, cores=6)
    assert seen.streamed_bytes > 1.5 * GB
    assert seen.step_s <= 1.02 * compute_s
    assert not seen.pinned_bytes


def test_a_slow_bus_is_never_idle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = replace(DESKTOP, bus_bytes_per_s=3e9, compute_s=0.4)
    seen = run(path, Machine(monkeypatch, speed), 2, cores=6)
    assert seen.bus_s > 4 * speed.compute_s
    assert seen.step_s <= 1.05 * seen.bus_s


def test_without_reading_ahead_little_is_hidden(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock can tell one from the other."""
    seen = run(path, Machine(monkeypatch, H200), 1.5, ahead=False)
    assert seen.step_s > 1.4 * H200.compute_s
