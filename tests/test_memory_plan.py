"""The memory plan: pure arithmetic over a header, checked on every card and budget that people have."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_flux import image, write_conditioning, write_flux

from fluxsplit import checkpoint
from fluxsplit.errors import UsageError
from fluxsplit.memory import DeviceInfo
from fluxsplit.memory_plan import ONCE_PIECE_BYTES, PIECE_BYTES, MemoryPlan, _pinnable, plan_memory, smaller_budget
from fluxsplit.model_sizes import Block, Model, read_model
from fluxsplit.work import Work, text_tokens, tokens_of, work_of

GB = 10**9
DOUBLE, SINGLE = 226_500_000, 113_300_000
DOUBLE_ONCE, SINGLE_ONCE = 113_250_000, 28_300_000
SCHNELL = Model(
    blocks=(
        *(Block(f"double {n}", DOUBLE, DOUBLE) for n in range(19)),
        *(Block(f"single {n}", SINGLE, SINGLE) for n in range(38)),
    ),
    hidden=3072,
    head=128,
    small_bytes=50_000_000,
    small_elements=3_000_000,
    modulation_bytes=19 * DOUBLE_ONCE + 38 * SINGLE_ONCE,
    modulation_block_bytes=DOUBLE_ONCE,
    modulation_outputs=1_050_000,
    largest_elements=3072 * 18432,
)
CARD = DeviceInfo(
    "cuda", "a card", 24 * GB, 24 * GB, flops_per_s=25e12, expand_elements_per_s=2e11, bus_bytes_per_s=12e9
)
RDNA2 = replace(CARD, kind="hip", fused_attention=False)
CPU = DeviceInfo("cpu", "cpu", 20 * GB, 24 * GB, unified=True, flops_per_s=4e11, expand_elements_per_s=2.5e9)
ONE = Work(((1152, 944),), 256)


def plan(
    budget_gb: float, work: Work = ONE, device: DeviceInfo = CARD, dtype: str = "bf16", model: Model = SCHNELL
) -> MemoryPlan:
    return plan_memory(model, work, device, int(budget_gb * GB), dtype)


@pytest.mark.parametrize("device", [CARD, RDNA2])
@pytest.mark.parametrize("budget_gb", [2, 4, 6, 8, 12, 16, 24])
def test_every_budget_of_a_card_has_a_plan_within_it(device: DeviceInfo, budget_gb: int) -> None:
    got = plan(budget_gb, device=device)
    assert got.peak_bytes <= budget_gb * GB
    assert sorted((*got.resident, *got.streamed)) == list(range(57))
    assert got.resident_bytes + got.streamed_bytes == sum(block.bytes for block in SCHNELL.blocks)
    assert got.peak_bytes == got.base_bytes + got.scratch_bytes + got.activation_bytes + got.state_bytes + (
        got.resident_bytes + got.slots * got.slot_bytes + got.spare_bytes
    )
    assert got.spare_bytes <= got.slot_bytes
    if got.spare_bytes:
        assert got.peak_bytes <= 0.98 * budget_gb * GB
        assert got.spare_bytes == got.slot_bytes or got.peak_bytes > 0.98 * budget_gb * GB - 1000
    assert (got.query_chunk is None) == device.fused_attention
    assert got.smallest_bytes <= got.peak_bytes
    assert bool(got.streamed) == (budget_gb < 12)


def test_a_small_picture_is_planned_with_room_for_what_comes_before_its_steps() -> None:
    small = Work(((256, 256),), 64)
    got, model = plan(24, small), replace(SCHNELL, modulation_block_bytes=0)
    more = 2 * DOUBLE_ONCE - got.activation_bytes - got.state_bytes
    assert more > 0
    assert got.peak_bytes - plan(24, small, model=model).peak_bytes == more


def test_scores_of_bf16_count_as_the_fp32_they_are() -> None:
    half, bf16 = plan(12, device=RDNA2, dtype="fp16"), plan(12, device=RDNA2)
    assert half.query_chunk == 2 * (bf16.query_chunk or 0) > 0, "pieces of as many bytes"
    tokens = tokens_of(1152, 944, 256)
    assert bf16.activation_bytes - half.activation_bytes == tokens * 3072 * 4, "keys in fp32"


def test_segments_that_do_not_grow_take_room_too() -> None:
    rigid = plan(8, device=replace(CARD, growing_segments=False))
    assert rigid.peak_bytes <= 8 * GB and rigid.streamed_bytes > plan(8).streamed_bytes
    parts = rigid.scratch_bytes + rigid.activation_bytes + rigid.state_bytes + rigid.resident_bytes
    assert rigid.peak_bytes == rigid.base_bytes + parts + rigid.slots * rigid.slot_bytes + rigid.spare_bytes
    assert plan(2, device=replace(CPU, growing_segments=False)).peak_bytes == plan(2, device=CPU).peak_bytes


def test_what_a_chip_takes_of_the_ram_is_no_room_for_the_page_cache() -> None:
    chip = replace(CARD, unified=True, ram_bytes=6 * GB)
    assert not plan(5.5, device=replace(chip, unified=False)).fleeting
    assert len(plan(5.5, device=chip).fleeting) >= len(plan(5.5, device=chip).streamed) - 2


@pytest.mark.parametrize("budget_gb", [2, 4, 6, 8])
def test_at_most_half_of_what_streams_is_pinned(budget_gb: int) -> None:
    """Whatever RAM there is; spread so that in any few blocks there is as much to read as in others."""
    got = plan(budget_gb, device=replace(CARD, ram_bytes=1000 * GB))
    assert set(got.pinnable) <= set(got.streamed)
    read = [0 if number in got.pinnable else SCHNELL.blocks[number].bytes for number in got.streamed]
    each = sum(read) / len(read)
    sums = [sum(read[start : start + 6]) for start in range(len(read) - 5)]
    assert all(abs(some - 6 * each) <= DOUBLE for some in sums[3:]), "the first few may be more"
    assert got.pinnable_bytes == sum(SCHNELL.blocks[number].bytes for number in got.pinnable)
    assert 0.5 * got.streamed_bytes - DOUBLE <= got.pinnable_bytes <= 0.5 * got.streamed_bytes


def test_what_may_be_pinned_is_a_quarter_of_the_free_ram_and_none_where_it_stalls() -> None:
    short = plan(2, device=replace(CARD, ram_bytes=14 * GB))
    assert not short.fleeting and 3.5 * GB - DOUBLE <= short.pinnable_bytes <= 3.5 * GB
    assert plan(2, device=RDNA2).pinnable == plan(2, device=replace(CARD, unified=True)).pinnable == ()
    assert plan(24).pinnable == ()


def test_no_order_of_blocks_has_more_pinned_than_the_ram_allows() -> None:
    cached = [*range(19), *range(19, 33)]
    for ram_gb in (1, 3, 6.25, 9, 14):
        chosen = _pinnable(SCHNELL, replace(CARD, ram_bytes=int(ram_gb * GB)), cached)
        assert sum(SCHNELL.blocks[number].bytes for number in chosen) <= ram_gb * GB / 4


def test_three_blocks_of_those_that_stream_have_room_in_pinned_ram() -> None:
    def pinned(cores: int, budget_gb: float) -> tuple[int, int]:
        got = plan(budget_gb, device=replace(CARD, processor_cores=cores))
        assert got.pinned_bytes == got.pieces * PIECE_BYTES + 2 * got.readers * ONCE_PIECE_BYTES
        return got.readers, got.pieces

    assert [pinned(cores, 24) for cores in (2, 4, 6, 7, 16)] == [(1, 2), (2, 4), (4, 8), (5, 10), (8, 16)]
    assert [pinned(2, budget_gb)[1] for budget_gb in (8, 2)] == [21, 42], "single blocks, double ones"


def test_modulations_of_every_step_and_text_are_ram() -> None:
    def state(texts: int, **options: Any) -> int:
        work = Work(((512, 512),) * 8, 256, times=20, texts=texts)
        return plan(2, work, **options).state_bytes

    each = 20 * SCHNELL.modulation_outputs * 2
    assert [state(texts, device=CPU) - state(1, device=CPU) for texts in (2, 4, 8)] == [each, 3 * each, 3 * each]
    assert state(8) == state(1), "a card holds those of the step that is computed"


def test_the_work_of_a_command(tmp_path: Path) -> None:
    texts = [write_conditioning(tmp_path / f"text-{n}", n, tokens=5 + n) for n in range(3)]
    images = [image(texts[0]), image(texts[1], steps=None), image(texts[0], size=(64, 64), sigmas=(1.0, 0.5, 0.2, 0.0))]
    assert work_of(images, 4) == Work(((48, 32), (48, 32), (64, 64)), 6, times=4, texts=2)
    guided = image(texts[0], steps=7, cfg=2.0, negative_conditioning=texts[2])
    assert work_of([*images, guided], 4) == Work(((48, 32), (48, 32), (64, 64), (48, 32)), 7, 2, times=14, texts=2)


def test_more_memory_never_streams_more() -> None:
    streamed = [plan(budget / 4).streamed_bytes for budget in range(8, 64)]
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[0] > 0 == streamed[-1]


def test_a_card_of_12_gb_keeps_every_block_and_one_of_8_gb_most() -> None:
    """ComfyUI keeps 40 % on a 6700 XT of 12 GB."""
    assert not plan(11, device=RDNA2, dtype="fp16").streamed
    got = plan(7.5, device=RDNA2, dtype="fp16")
    assert got.resident_bytes > 0.6 * sum(block.bytes for block in SCHNELL.blocks)
    assert all(SCHNELL.blocks[number].name.startswith("single") for number in got.streamed)
    assert got.slots == 2 and got.slot_bytes == SINGLE
    gaps = [b - a for a, b in zip(got.streamed, got.streamed[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1, "spread among those that stay"


def test_too_small_a_budget_names_the_smallest_that_works() -> None:
    with pytest.raises(UsageError, match="1152x944 needs at least") as caught:
        plan(0.5)
    smallest = int(caught.value.hint.split("--vram ")[1].split("M")[0])
    assert f"needs at least {smallest:,} MB" in caught.value.message
    got = plan(smallest / 1000)
    assert got.slots == 1 and len(got.streamed) == 57
    with pytest.raises(UsageError):
        plan((smallest - 2) / 1000)


def test_what_the_device_does_not_have_free_is_not_advised() -> None:
    with pytest.raises(UsageError, match="needs at least") as caught:
        plan(0.5, device=replace(RDNA2, free_bytes=600_000_000))
    assert caught.value.hint == "give a smaller --size: 600 MB are free"


def test_pictures_advance_together_where_something_streams() -> None:
    eight = Work(((512, 512),) * 8, 256)
    assert plan(4, eight).together == 8
    alone = plan(4, replace(eight, sizes=eight.sizes[:1]))
    assert 0 <= plan(4, eight).streamed_bytes - alone.streamed_bytes <= SINGLE, "what they hold is one block's room"
    assert plan(24, eight).together == 1, "one after the other where nothing is gained"
    assert plan(7, Work(((512, 512),) * 100, 256)).together == 16
    larger = Work(((1024, 1024),) * 8, 256)
    six = plan(6, larger), plan(6, replace(larger, sizes=larger.sizes[:6]))
    assert [got.together for got in six] == [8, 6]
    assert len(six[0].streamed) == len(six[1].streamed) + 1, "one more streams, for which eight advance and not six"


def test_a_cpu_that_multiplies_by_tiles_needs_more_in_16_bits_alone() -> None:
    def more_bytes(dtype: str) -> int:
        tiles = replace(CPU, tile_products=True)
        return plan(8, device=tiles, dtype=dtype).peak_bytes - plan(8, device=CPU, dtype=dtype).peak_bytes

    assert more_bytes("fp32") == 0
    assert more_bytes("bf16") == 25_000_000 + 16 * 4504 * 3072
    assert plan(8, device=replace(CARD, tile_products=True)) == plan(8)


def test_seconds_are_those_of_the_slowest_way() -> None:
    fast = replace(CARD, bus_bytes_per_s=1e12)
    slow = replace(CARD, bus_bytes_per_s=1e9)
    assert plan(2, device=fast).limit == "compute" and plan(2, device=slow).limit == "bus"
    assert plan(2, device=slow).step_s == pytest.approx(plan(2, device=slow).streamed_bytes / 1e9)
    eight = Work(((1152, 944),) * 8, 256)
    shared = plan(2, eight, replace(CARD, bus_bytes_per_s=1e8))
    assert shared.together > 1 and shared.limit == "bus"
    assert shared.step_s == pytest.approx(shared.streamed_bytes / 1e8 / shared.together), "moved once for all of them"
    assert plan(24).step_s == pytest.approx(72.4e12 / 25e12, rel=0.05), "72.4 TFLOP a step, and the expansion"
    assert plan(24, device=replace(CARD, flops_per_s=None)).step_s is None
    values = 4 * 4504 * 3072 * 57
    gelu_s = plan(24, device=replace(CARD, gelu_per_s=1e9)).step_s - plan(24).step_s  # type: ignore[operator]
    assert gelu_s == pytest.approx(values / 1e9, rel=0.05), "in the middle of every block's MLP"


def test_the_disk_is_the_limit_where_the_file_does_not_stay_in_ram() -> None:
    slow = replace(CARD, disk_bytes_per_s=2e8)
    assert plan(2, device=replace(slow, ram_bytes=32 * GB)).limit == "compute"
    assert plan(2, device=replace(slow, ram_bytes=32 * GB)).fleeting == ()
    short = plan(2, device=replace(slow, ram_bytes=5 * GB))
    assert (short.limit, short.step_s) == ("disk", short.fleeting_bytes / 2e8)
    assert 0 < short.fleeting_bytes < short.streamed_bytes and set(short.fleeting) < set(short.streamed)
    stays = short.streamed_bytes - short.fleeting_bytes + short.slots * short.slot_bytes
    assert stays < 5 * GB < stays + DOUBLE + GB, "as many as fit do stay"
    small = replace(CPU, free_bytes=6 * GB, disk_bytes_per_s=2e8)
    short = plan(3, Work(((256, 256),), 64), small)
    assert (short.limit, short.step_s) == ("disk", short.streamed_bytes / 2e8)
    assert 0 < short.streamed_bytes < sum(block.bytes for block in SCHNELL.blocks)
    assert plan(3, device=replace(CPU, disk_bytes_per_s=2e8)).limit == "compute"


def test_a_cpu_counts_anonymous_memory_and_caches_what_fits() -> None:
    got = plan(0.9, Work(((256, 256),), 64), CPU)
    assert got.streamed == () and got.slots == 0 and got.peak_bytes < 0.7 * GB
    small = plan(0.9, Work(((256, 256),), 64), replace(CPU, free_bytes=8 * GB))
    assert 0 < small.streamed_bytes < 6 * GB
    assert small.resident_bytes <= 8 * GB
    assert small.peak_bytes == got.peak_bytes


def test_guidance_and_dtype_cost_what_they_cost() -> None:
    assert plan(8, replace(ONE, forwards=2)).state_bytes == 2 * plan(8).state_bytes
    assert plan(8, dtype="fp32").activation_bytes > plan(8).activation_bytes
    assert plan(24, replace(ONE, forwards=2)).step_s == pytest.approx(2 * (plan(24).step_s or 0))


def test_the_next_smaller_budget_ends_at_the_smallest() -> None:
    got: MemoryPlan = plan(12)
    seen = [got.budget_bytes]
    while (smaller := smaller_budget(got)) is not None:
        assert smaller < got.budget_bytes
        got = plan_memory(SCHNELL, ONE, CARD, smaller, "bf16")
        seen.append(smaller)
    assert len(seen) > 3 and got.slots == 1


def test_random_models_and_budgets_never_exceed_the_budget() -> None:
    generator = random.Random(0)
    for _ in range(300):
        model = Model(
            tuple(
                Block(f"{kind} {n}", size := generator.randrange(1, 400_000_000), generator.choice([0, size]))
                for kind in ("double", "single")
                for n in range(generator.randrange(1, 20))
            ),
            hidden=generator.choice([64, 1024, 3072]),
            head=32,
            small_bytes=generator.randrange(60_000_000),
            small_elements=generator.randrange(5_000_000),
            modulation_bytes=generator.randrange(1 << 32),
            modulation_block_bytes=generator.randrange(1 << 27),
            modulation_outputs=generator.randrange(1 << 20),
            largest_elements=generator.randrange(40_000_000),
        )
        sizes = tuple((generator.randrange(16, 1600), generator.randrange(16, 1600)) for _ in range(3))
        device = generator.choice([CARD, RDNA2, replace(CPU, free_bytes=generator.randrange(GB, 20 * GB))])
        budget = generator.uniform(0.1, 12)
        try:
            got = plan(budget, Work(sizes, 256), device, generator.choice(["fp32", "bf16", "fp16"]), model)
        except UsageError as error:
            least = error.message.split("at least ")[1].split(" MB")[0].replace(",", "")
            assert float(least) / 1000 >= budget - 0.01
            continue
        assert got.peak_bytes <= budget * GB
        assert sorted((*got.resident, *got.streamed)) == list(range(len(model.blocks)))


def test_the_header_of_a_file(tmp_path: Path) -> None:
    path = write_flux(tmp_path / "flux.safetensors")
    part = checkpoint.part(path, "transformer")
    model = read_model(part, "bf16")
    names = ["double 0", "double 1", "single 0", "single 1", "single 2"]
    assert [block.name for block in model.blocks] == names
    double, once = 2 * (3 * 64 * 64 + 64 * 64 + 2 * 4 * 64 * 64), 2 * 6 * 64 * 64
    assert model.blocks[0] == Block("double 0", double, double)
    assert (model.hidden, model.head, model.largest_elements) == (64, 32, 6 * 64 * 64)
    assert (model.modulation_bytes, model.modulation_block_bytes) == (2 * once + 3 * 3 * 64 * 64, once)
    wide = read_model(checkpoint.part(write_flux(tmp_path / "wide", "bf16"), "transformer"), "bf16")
    assert wide.blocks[0].bytes == 2 * double and wide.blocks[0].elements == wide.largest_elements == 0


def test_text_tokens_of_a_conditioning(tmp_path: Path) -> None:
    assert text_tokens(write_conditioning(tmp_path / "text", 0, tokens=300)) == 300
    assert text_tokens(str(tmp_path / "none")) == text_tokens("") == 256
