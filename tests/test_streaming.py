"""Blocks brought in as they are needed: the bits of a model that is all there, and no picture from a broken file."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_card import Card
from small_flux import image, sample, write_conditioning, write_flux

from fluxsplit import background_reads, checkpoint, pinned, reader, weights
from fluxsplit import streaming as streaming_room
from fluxsplit.conditioning import Conditioning, read_conditioning
from fluxsplit.errors import FluxsplitError
from fluxsplit.file_spans import Span, with_surroundings
from fluxsplit.read_ahead import ReadAhead, spans
from fluxsplit.reader import Run
from fluxsplit.stored_layers import StoredLinear
from fluxsplit.streaming import Streaming, attach, layout
from fluxsplit.transformer import Flux, Forward
from fluxsplit.weights import WeightFile, WeightFiles, as_buffer

CPU = torch.device("cpu")
BLOCKS = 5


class Count:
    """Bytes that were read."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self.bytes += count


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_flux(tmp_path / "flux.safetensors")


@pytest.fixture
def text(tmp_path: Path) -> Conditioning:
    return read_conditioning(write_conditioning(tmp_path / "text", 0))


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of everything that is pinned at the time."""
    found: list[int] = []

    def pin(memory: torch.Tensor, *, read_only: bool = False) -> bool:
        assert read_only and memory.data_ptr() % mmap.PAGESIZE == 0 == memory.numel() % mmap.PAGESIZE
        found.append(memory.numel())
        return True

    monkeypatch.setattr(pinned, "pin", pin)
    monkeypatch.setattr(pinned, "unpin", lambda memory: found.remove(memory.numel()))
    return found


@pytest.fixture
def by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the C library has no reads that go on by themselves."""
    monkeypatch.setattr(background_reads, "_works", lambda: False)


@pytest.fixture
def loaders() -> Iterator[list[Streaming | ReadAhead]]:
    made: list[Streaming | ReadAhead] = []
    yield made
    for loader in made:
        loader.close()


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Flux, WeightFiles]:
    files = WeightFiles()
    return Flux(checkpoint.part(path, "transformer"), files, dtype, CPU), files


def forwards(text: Conditioning, count: int = 2) -> list[Forward]:
    generator = torch.Generator().manual_seed(1)
    return [Forward(torch.randn(1, 16, 6 + n, 4, generator=generator), 0.9 - n / 10, text, None) for n in range(count)]


def is_in_ram(file: WeightFile, start: int, stop: int) -> bool:
    """Whether the kernel has all these bytes in the page cache."""
    first = start - start % mmap.PAGESIZE
    pages = ctypes.create_string_buffer(-(-(stop - first) // mmap.PAGESIZE))
    address = ctypes.c_void_p(file.bytes_at(0, 1).data_ptr() + first)
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(stop - first), pages) == 0
    return b"\0" not in pages.raw


def not_in_ram(path: Path, count: int) -> WeightFile:
    """A file of so many bytes, of which the kernel has none in the page cache; skips where it keeps them."""
    with path.open("wb") as file:
        file.write(random.Random(0).randbytes(count))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    opened = WeightFile(str(path))
    if is_in_ram(opened, 0, count):
        pytest.skip("this file system keeps its pages")
    return opened


def block_bytes(flux: Flux) -> int:
    return sum(place.span.bytes for block in flux.blocks for place in layout(block).places)


@pytest.mark.parametrize("stored", ["e4m3", "e5m2", "bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_is_resident_to_the_bit(
    tmp_path: Path,
    text: Conditioning,
    stored: str,
    dtype: torch.dtype,
    loaders: list[Streaming | ReadAhead],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over random plans: which blocks stay, how many slots, thread or none, a card's pieces or not, how often."""
    Card(monkeypatch, at_once=True)
    path = write_flux(tmp_path / "weights", stored)
    flux, _ = load(path, dtype)
    wanted = flux.velocities(forwards(text))
    assert all(bool(v.abs().max() > 0) for v in wanted)
    generator = random.Random(f"{stored}{dtype}")
    for _ in range(8):
        flux, files = load(path, dtype)
        resident = frozenset(n for n in range(BLOCKS) if generator.random() < 0.4)
        ahead = generator.random() < 0.6
        slots = generator.choice([2, 3] if ahead else [1, 2])
        how: dict[str, Any] = {"as_card": generator.random() < 0.5, "piece_bytes": generator.choice([1000, 1 << 20])}
        loader = Streaming(flux.blocks, files, CPU, resident=resident, slots=slots, ahead=ahead, **how)
        loaders.append(loader)
        flux.loader = loader
        for _ in range(generator.choice([1, 3])):
            got = flux.velocities(forwards(text))
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), (resident, slots, ahead, how)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_whatever_a_card_does_first_no_byte_is_read_too_early_or_written_too_soon(
    path: Path, ahead: bool, slots: int, monkeypatch: pytest.MonkeyPatch, pins: list[int]
) -> None:
    """Every order that the events allow: a computation sees the block it was given, as often as it is brought in."""
    monkeypatch.setattr(reader, "LATE_BLOCKS", 0)  # always
    for seed in range(24):
        monkeypatch.setattr(background_reads, "_works", lambda seed=seed: bool(seed % 5))
        card = Card(monkeypatch, seed)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device, card=card: card.run())
        flux, files = load(path)
        how: dict[str, Any] = {"as_card": True, "piece_bytes": 1 << (11 + seed % 4), "slots": slots, "ahead": ahead}
        how["spare_bytes"] = 256 * (0, 3, 70, 1000)[seed // 5 % 4]
        how |= {"readers": 1 + seed % 4, "pieces": (None, 1, 2, 9)[seed // 3 % 4]}
        how["pinnable"] = (frozenset(range(BLOCKS)), frozenset(range(0, BLOCKS, 2)), frozenset[int]())[seed % 3]
        loader = Streaming(flux.blocks, files, CPU, resident=frozenset({seed % BLOCKS}), **how)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number in [*range(BLOCKS)] * 3:
            with loader.brought_in(number):
                for place in loader._layouts[number].places:
                    wanted = place.mapped.view(torch.uint8)
                    seen.append((torch.zeros_like(wanted), wanted))
                    seen[-1][0].copy_(place.linear.stored.view(torch.uint8), non_blocking=True)
        for block in loader._coming if seed % 2 else ():  # with copies under way
            if block.place is not None:
                loader._reader.wait(block.filling)
        assert bool(pins) == bool(how["pinnable"] and loader._reader.pinned_bytes)
        assert sum(pins) <= sum(loader._layouts[number].bytes for number in how["pinnable"])
        loader.close()
        assert not pins, "what was pinned is pinned no more"
        over = [loader._ring._memory]
        for memory in over:  # as whoever is given this memory next
            memory.copy_(torch.full_like(memory, 7), non_blocking=True)
        card.run()
        assert card.copies > 3 * BLOCKS
        assert all(torch.equal(got, wanted) for got, wanted in seen)
        assert all(bool((memory == 7).all()) for memory in over)


def test_spans_of_a_file_are_pinned_as_they_lie(tmp_path: Path, pins: list[int]) -> None:
    place = tmp_path / "weights"
    page = mmap.PAGESIZE
    data = random.Random(0).randbytes(10 * page)
    place.write_bytes(data)
    ends = ((3, 5 * page - 480), (5 * page - 480, 5 * page - 380), (5 * page, 7 * page), (7 * page + 1, 10 * page - 9))
    some = [Span(str(place), *both) for both in ends]
    held = pinned.FilePins(WeightFiles())
    assert held.parts(some[0]) is None
    assert held.add(some)
    for span in some:
        parts = held.parts(span)
        assert parts is not None
        assert b"".join(part.numpy().tobytes() for part in parts) == data[span.start : span.stop]
    assert sum(pins) == held.bytes == (3 + 0 + 2 + 1) * page
    held.close()
    assert not pins and held.parts(some[0]) is None


def test_where_the_driver_refuses_a_pin_nothing_is_lost(
    path: Path, text: Conditioning, loaders: list[Streaming | ReadAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of a block's matrices, after which no pin is asked for."""
    Card(monkeypatch, at_once=True)
    flux, _ = load(path)
    wanted = flux.velocities(forwards(text))
    monkeypatch.setattr(reader, "LATE_BLOCKS", 0)
    answers = iter([True, False])
    monkeypatch.setattr(pinned, "pin", lambda memory, read_only: next(answers))
    unpinned: list[int] = []
    monkeypatch.setattr(pinned, "unpin", lambda memory: unpinned.append(memory.numel()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    flux, files = load(path)
    flux.loader = loader = Streaming(flux.blocks, files, CPU, as_card=True, pinnable=frozenset(range(BLOCKS)))
    for _ in range(4):
        got = flux.velocities(forwards(text))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    loader.close()
    assert next(answers, None) is None and len(unpinned) == 1


def test_a_file_that_is_cut_short_is_not_pinned(path: Path, pins: list[int]) -> None:
    """A look at a page beyond its end would end the process."""
    size = path.stat().st_size
    held = pinned.FilePins(WeightFiles())
    held._files.open(str(path))
    truncate(path)
    with pytest.raises(FluxsplitError, match="changed during the run"):
        held.add([Span(str(path), size - 10000, size - 3)])
    assert not pins


def test_what_is_pinned_once_is_not_pinned_twice(path: Path, pins: list[int]) -> None:
    held, span = pinned.FilePins(WeightFiles()), Span(str(path), 5, 20000)
    assert held.add([span]) and held.add([span])
    assert len(pins) == 1


@pytest.mark.parametrize("slots", [1, 2])
def test_a_card_is_read_for_by_as_many_threads_whether_blocks_take_turns_or_not(
    path: Path, slots: int, loaders: list[Streaming | ReadAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(monkeypatch, at_once=True)
    flux, files = load(path)
    everything = frozenset(range(BLOCKS))
    for resident in (everything, frozenset[int]()):
        loader = Streaming(
            flux.blocks, files, CPU, as_card=True, readers=3, ahead=slots > 1, slots=slots, resident=resident
        )
        loaders.append(loader)
        with loader.brought_in(0):
            pass
        if sys.platform == "linux":
            (handles,) = loader._reader.reads._handles.values()  # type: ignore[attr-defined]
            assert len(handles) == 3


@pytest.mark.parametrize(
    ("read_s", "is_idle", "pinned"),
    [(0.0, True, 0), (0.0004, True, 0), (0.0006, True, BLOCKS - 2), (0.0006, False, 0)],
)
def test_what_is_pinned_is_what_a_card_waits_for_again_and_again(
    path: Path, read_s: float, is_idle: bool, pinned: int, monkeypatch: pytest.MonkeyPatch, pins: list[int]
) -> None:
    """By a clock that goes on while one waits for a block to be read: from the third on, in the second pass."""
    Card(monkeypatch, at_once=True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    now_s = 0.0

    class Slow:
        """Reads at the last moment."""

        def __init__(self, threads: int) -> None:
            pass

        def begin(self, file: WeightFile, start: int, memory: torch.Tensor, *, alone: bool) -> Slow:
            self._read = lambda: file.read_into(as_buffer(memory), start)
            return self

        def is_done(self) -> bool:
            return False

        def wait(self) -> None:
            nonlocal now_s
            now_s += read_s
            self._read()

        def close(self) -> None:
            pass

    class Computed:
        def query(self) -> bool:
            return is_idle

    wait = reader.Reader.wait
    monkeypatch.setattr(reader.Reader, "wait", lambda self, filling, computed: wait(self, filling, Computed()))  # type: ignore[arg-type]
    monkeypatch.setattr(reader, "reads_by", Slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    flux, files = load(path)
    how: dict[str, Any] = {"pinnable": frozenset(range(BLOCKS)), "ahead": False, "pieces": 1, "piece_bytes": 1 << 20}
    loader = Streaming(flux.blocks, files, CPU, as_card=True, **how)
    for number in 2 * [*range(BLOCKS)]:
        with loader.brought_in(number):
            pass
    late = range(BLOCKS - pinned, BLOCKS)
    assert len(loader._reader._pins._parts) == sum(len(loader._runs[number]) for number in late)
    loader.close()
    assert not pins


@pytest.mark.parametrize("fleeting", [(), (1, 3), tuple(range(BLOCKS))])
def test_what_does_not_stay_in_ram_is_read_in_every_pass_and_given_back(
    path: Path, text: Conditioning, fleeting: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(monkeypatch, at_once=True)
    read, alone_bytes, given = Count(), Count(), set[tuple[int, int]]()
    monkeypatch.setattr(WeightFile, "give_back", lambda self, start, stop: given.add((start, stop)))
    monkeypatch.setattr(background_reads, "_works", lambda: False)
    read_into = WeightFile.read_into

    def reading(self: WeightFile, buffer: memoryview, start: int, *, alone: bool = False) -> None:
        read(len(buffer))
        alone_bytes(alone * len(buffer))
        read_into(self, buffer, start, alone=alone)

    monkeypatch.setattr(WeightFile, "read_into", reading)
    flux, files = load(path)
    wanted = flux.velocities(forwards(text))
    options: dict[str, Any] = {"as_card": True, "ahead": False, "slots": 1, "fleeting": frozenset(fleeting)}
    flux.loader = Streaming(flux.blocks, files, CPU, **options)
    counts, spans = [], [[run.span for run in runs] for runs in flux.loader._runs]
    for _ in range(3):
        given.clear()
        assert all(map(torch.equal, flux.velocities(forwards(text)), wanted))
        counts.append((read.bytes, alone_bytes.bytes))
        for number, of_block in enumerate(spans):
            for span in of_block:
                most = max([0, *(min(stop, span.stop) - max(start, span.start) for start, stop in given)])
                assert most == (span.bytes if number in fleeting else 0)
        everywhere = list(chain.from_iterable(spans))
        widened = [w for number in fleeting for w in with_surroundings(spans[number], everywhere)]
        assert {(span.start, span.stop) for span in widened} < given or not fleeting, "and each piece as it comes"
    everything, alone = read.bytes // 3, alone_bytes.bytes // 3
    assert counts == [((n + 1) * everything, (n + 1) * alone) for n in range(3)]
    assert everything >= block_bytes(flux)
    assert (alone > 0) == bool(fleeting) and (everything == alone) == (len(fleeting) == BLOCKS)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are mapped ahead on Linux alone")
def test_bytes_are_brought_into_ram_and_given_back(tmp_path: Path) -> None:
    opened, within = not_in_ram(tmp_path / "bytes", 20 << 20), (5000, (20 << 20) - 3)
    opened.map_pages(*within)
    assert is_in_ram(opened, *within)
    opened.give_back(*within)
    assert not is_in_ram(opened, *within)


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that is asked")
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("reads_large", [False, True])
def test_a_file_is_to_be_mapped_in_large_pages(
    path: Path, reads_large: bool, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And said to be read at random while a part of it is read alone, unless the kernel reads single pages then."""
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without large pages")
    opened, during = WeightFile(str(path)), list[list[str]]()
    populate = weights._madvise

    def watching(address: int, count: int, advice: int) -> int:
        if advice == weights.MADV_POPULATE_READ:
            during.extend(flags_of(path))
        return populate(address, count, advice)

    monkeypatch.setattr(weights, "reads_large_pages_at_random", lambda: reads_large)
    monkeypatch.setattr(weights, "_madvise", watching)
    opened.map_pages(0, 1, alone=alone)
    assert during and all("hg" in flags for flags in during)
    assert any("rr" in flags for flags in during) == (reads_large and alone)
    assert all("hg" in flags and "rr" not in flags for flags in flags_of(path))
    assert opened.bytes_at(0, 8).tolist() == list(path.read_bytes()[:8])


def flags_of(path: Path) -> list[list[str]]:
    """What Linux was told of each piece of this process's memory that is a map of the file."""
    maps = Path("/proc/self/smaps").read_text().split("VmFlags:")
    found = [after.split("\n")[0].split() for before, after in pairwise(maps) if str(path) in before]
    assert found
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that is asked")
@pytest.mark.parametrize("by_library", [False, True])
def test_what_is_read_alone_brings_nothing_else_into_ram(
    by_library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_library and not background_reads._works():
        pytest.skip("the C library has no such reads")
    monkeypatch.setattr(background_reads, "_works", lambda: by_library)
    first, stop, last = 4 << 20, 32 << 20, 64 << 20

    def in_ram_besides(alone: bool) -> int:
        """Of the pages that were not asked for, how many were brought in."""
        opened, reads = not_in_ram(tmp_path / "bytes", last), background_reads.reads_by(2)
        memory = torch.zeros(stop - first, dtype=torch.uint8)
        reads.begin(opened, first, memory, alone=alone).wait()
        reads.close()
        others = (*range(0, first, mmap.PAGESIZE), *range(stop, last, mmap.PAGESIZE))
        count = sum(is_in_ram(opened, page, page + 1) for page in others)
        assert is_in_ram(opened, first, stop)
        assert memory.numpy().tobytes() == (tmp_path / "bytes").read_bytes()[first:stop]
        return count

    if not in_ram_besides(alone=False):
        pytest.skip("nothing is read ahead here")
    assert in_ram_besides(alone=True) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="pages are mapped ahead on Linux alone")
def test_what_lies_behind_is_not_brought_into_ram(tmp_path: Path) -> None:
    opened = not_in_ram(tmp_path / "bytes", 48 << 20)
    if not opened._has_large_pages or not weights.reads_large_pages_at_random():
        pytest.skip("this kernel reads ahead")
    opened.map_pages(4 << 20, 18 << 20, alone=True)  # in windows of 4 MB it would be read to 20, or further
    assert is_in_ram(opened, 4 << 20, 18 << 20)
    for page in range(18 << 20, 48 << 20, mmap.PAGESIZE):
        assert not is_in_ram(opened, page, page + 1), page


@pytest.mark.parametrize(
    ("release", "large", "reads"),
    [
        ("6.8.0-45-generic", "2097152\n", True),
        ("5.19.0", "2097152", True),
        ("5.15.153.1-microsoft-standard-WSL2", "2097152", False),
        ("6.11.0-arm64-64k", "536870912", False),
        ("6.8.0", None, False),
        ("unknown", "2097152", False),
    ],
)
def test_only_a_kernel_that_reads_large_pages_is_told_of_memory_read_at_random(
    release: str, large: str | None, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path, *_: Any) -> str:
        if large is None:
            raise FileNotFoundError(str(path))
        return large

    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert weights.reads_large_pages_at_random.__wrapped__() is reads


def test_in_fp16_text_and_image_stay_views_of_one_tensor(path: Path, text: Conditioning) -> None:
    """As single blocks return them: to clip one of them into a new tensor would hold both twice."""
    flux, _ = load(path, torch.float16)
    with torch.inference_mode():
        stream = flux._begin(forwards(text, 1)[0])
        for number in range(BLOCKS):
            flux._through(stream, number)
    assert stream.text.untyped_storage().data_ptr() == stream.image.untyped_storage().data_ptr()


@pytest.mark.parametrize("streamed", [(), (0, 3), tuple(range(BLOCKS))])
def test_read_ahead_and_given_back_is_the_same_to_the_bit(
    path: Path, text: Conditioning, streamed: tuple[int, ...], loaders: list[Streaming | ReadAhead]
) -> None:
    flux, files = load(path)
    wanted = flux.velocities(forwards(text))
    count = Count()
    loader = ReadAhead(flux.blocks, files, frozenset(streamed), count)
    loaders.append(loader)
    flux.loader = loader
    for _ in range(3):
        got = flux.velocities(forwards(text))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert count.bytes >= block_bytes(flux)


@pytest.mark.parametrize("pictures", [1, 8])
def test_a_pass_reads_every_streamed_byte_once_however_many_pictures(
    path: Path, text: Conditioning, pictures: int, loaders: list[Streaming | ReadAhead]
) -> None:
    """Without reading ahead, so that the count is of what a pass asked for and not of what comes next."""
    flux, files = load(path)
    count = Count()
    loader = Streaming(flux.blocks, files, CPU, resident=frozenset({1}), slots=1, ahead=False, on_read=count)
    loaders.append(loader)
    flux.loader = loader
    everything = block_bytes(flux)
    stays = sum(place.span.bytes for place in layout(flux.blocks[1]).places)
    assert count.bytes == stays
    for passes in (1, 2, 3):
        flux.velocities(forwards(text, pictures))
        assert count.bytes == stays + passes * (everything - stays)


@pytest.mark.parametrize("ahead", [True, False])
def test_what_is_needed_once_is_brought_in_once(
    path: Path, text: Conditioning, ahead: bool, loaders: list[Streaming | ReadAhead]
) -> None:
    flux, files = load(path)
    wanted, count = flux.velocities(forwards(text)), Count()
    loader = Streaming(flux.blocks, files, CPU, once=True, ahead=ahead, on_read=count)
    loaders.append(loader)
    flux.loader = loader
    assert all(torch.equal(a, b) for a, b in zip(flux.velocities(forwards(text)), wanted, strict=True))
    assert count.bytes == block_bytes(flux) and not loader._coming
    with pytest.raises(FluxsplitError, match="block 0 was asked for"):
        flux.velocities(forwards(text))
    mapped = Count()
    ahead_of_it = ReadAhead(flux.blocks, files, frozenset(range(BLOCKS)), mapped, once=True)
    loaders.append(ahead_of_it)
    loader.close()
    flux.loader = ahead_of_it
    assert all(torch.equal(a, b) for a, b in zip(flux.velocities(forwards(text)), wanted, strict=True))
    ahead_of_it.close()
    assert mapped.bytes == block_bytes(flux), "not the first two again"


def test_eight_latents_all_streamed_have_the_bits_of_their_single_runs(tmp_path: Path, path: Path) -> None:
    """Through the stage: eight 512x512 pictures in one call against each alone, nothing staying."""
    texts = [write_conditioning(tmp_path / f"text-{n}", n) for n in range(2)]
    images = [image(texts[n % 2], n, (512, 512), steps=1) for n in range(8)]
    everything = {"resident": (), "streamed": tuple(range(BLOCKS))}
    together, _ = sample(path, images, tmp_path / "together", plan=everything)
    for latent, one in zip(together, images, strict=True):
        (alone,), _ = sample(path, [one], tmp_path / "alone")
        assert torch.equal(latent, alone)


def test_spans_of_a_block_are_joined_where_they_touch(path: Path) -> None:
    flux, _ = load(path)
    single = spans(layout(flux.blocks[3]))
    assert len(single) < len(layout(flux.blocks[3]).places)
    assert sum(span.bytes for span in single) == sum(p.span.bytes for p in layout(flux.blocks[3]).places)


@pytest.mark.parametrize(
    ("ranges", "wanted"),
    [
        ([("a", 100, 150)], [("a", 90, 180)]),  # up to its neighbours
        ([("a", 190, 200)], [("a", 190, 200)]),  # which touch it
        ([("a", 100, 120), ("a", 130, 150)], [("a", 90, 180)]),  # and what is between them
        ([("b", 2**26, 2**26 + 9)], [("b", 2**25, 2**26 + 9 + 2**25)]),  # no further than the kernel reads
        ([("b", 10, 20)], [("b", 0, 20 + 2**25)]),
        ([("b", 10, 20), ("a", 100, 150)], [("a", 90, 180), ("b", 0, 20 + 2**25)]),
    ],
)
def test_with_a_block_goes_what_lies_round_it(
    ranges: list[tuple[str, int, int]], wanted: list[tuple[str, int, int]]
) -> None:
    others = [("a", 50, 90), ("a", 200, 300), ("a", 180, 190), ("c", 95, 110)]
    own = [Span(*span) for span in ranges]
    assert with_surroundings(own, [*own, *(Span(*other) for other in others)]) == [Span(*span) for span in wanted]


@pytest.mark.parametrize("kept", [False, True])
def test_nothing_that_a_step_needs_goes_with_a_block(
    path: Path, text: Conditioning, kept: bool, loaders: list[Streaming | ReadAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other block, and nothing of what is kept; what else lies round it does."""
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(WeightFile, "give_back", lambda self, start, stop: given.append((start, stop)))
    flux, files = load(path)
    inside = [span for block in flux.blocks for span in spans(layout(block))]
    of_blocks = {id(child) for block in flux.blocks for child in block.modules()}
    others = [c for c in flux.module.modules() if isinstance(c, StoredLinear) and id(c) not in of_blocks]
    outside = [linear.span for linear in others if linear.span]
    loader = ReadAhead(flux.blocks, files, frozenset({1}), lambda count: None, kept=outside if kept else ())
    loaders.append(loader)
    flux.loader = loader
    flux.velocities(forwards(text))
    own = spans(layout(flux.blocks[1]))
    stays = [*(span for span in inside if span not in own), *(outside if kept else ())]
    assert all(any(a <= span.start and span.stop <= b for a, b in given) for span in own)
    assert not any(a < span.stop and span.start < b for a, b in given for span in stays)
    assert sum(b - a for a, b in given) > sum(span.bytes for span in own)


def test_a_run_that_streams_drops_nothing_that_stays(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while modulations are computed nor in its steps; it does drop the block that streams, and modulations."""
    given: list[tuple[int, int]] = []
    give_back = WeightFile.give_back

    def watching(self: WeightFile, start: int, stop: int) -> None:
        given.append((start, stop))
        give_back(self, start, stop)

    monkeypatch.setattr(WeightFile, "give_back", watching)
    one = image(write_conditioning(tmp_path / "text", 0), 0, (64, 64), steps=2)
    sample(path, [one], tmp_path / "out", plan={"resident": (0, 1, 3, 4), "streamed": (2,)})
    flux, _ = load(path)
    streams = {id(child) for child in flux.blocks[2].modules()}
    for child in flux.module.modules():
        if isinstance(child, StoredLinear) and child.span:
            dropped = [(a, b) for a, b in given if a < child.span.stop and child.span.start < b]
            assert bool(dropped) == (id(child) in streams), child.name
    assert len({start for start, _ in given}) > len(spans(layout(flux.blocks[2])))


@pytest.mark.parametrize("as_mapped", [False, True])
def test_near_neighbours_are_one_copy_with_what_lies_between_them(as_mapped: bool) -> None:
    """Not those that are far, in another file, off where matrices begin on a card, or with too much between them."""
    ends = {"a": [(1128, 51200), (51556, 101560), (101732, 161448)], "b": [(161448, 170000)]}
    ends["c"] = [(0, 25600), (25856, 51200), (51712, 60000), (2**21, 2**21 + 256)]
    linears = [
        StoredLinear("", torch.zeros(1, stop - start, dtype=torch.uint8), None, None, Span(path, start, stop))
        for path, both in reversed(ends.items())
        for start, stop in reversed(both)
    ]
    found = layout(torch.nn.ModuleList(linears), as_mapped)
    runs = [(run.span.path, run.span.start, run.span.stop) for run in streaming_room._runs(found)]
    off = [("a", 1128, 161448)] if as_mapped else [("a", 1128, 51200), ("a", 51556, 161448)]
    assert runs == [
        *off,
        ("b", 161448, 170000),
        ("c", 0, 51200),
        ("c", 51712, 60000),
        ("c", 2**21, 2**21 + 256),
    ]
    where = sorted((place.offset, place.offset + place.span.bytes) for place in found.places)
    assert all(first[1] <= second[0] for first, second in pairwise(where)) and where[-1][1] <= found.bytes
    for place in found.places:
        (first,) = [start for path, start, stop in runs if path == place.span.path and start <= place.span.start < stop]
        assert place.offset % 256 == (place.span.start % 256 if as_mapped else (place.span.start - first) % 256)


@pytest.mark.parametrize("as_mapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_matrix_begins_where_its_dtype_can(tmp_path: Path, dtype: torch.dtype, as_mapped: bool) -> None:
    """float8 anywhere in the file and wider ones near behind it; a span that lies in another one; all of it copied."""
    place = tmp_path / "weights"
    place.write_bytes(random.Random(2).randbytes(300_000))
    file = WeightFiles().open(str(place))

    def matrix(start: int, count: int, dtype: torch.dtype) -> StoredLinear:
        raw = file.bytes_at(start, start + count)
        mapped = (raw if start % dtype.itemsize == 0 else raw.clone()).view(dtype).view(1, -1)
        return StoredLinear("", mapped, None, None, Span(str(place), start, start + count))

    for start in (1001, 1002, 1004):
        block = torch.nn.ModuleList(
            [
                matrix(start, 65_536, torch.uint8),
                matrix(start + 65_536, 65_536, dtype),
                matrix(start + 131_328, 65_536, torch.uint8),
                matrix(start + 131_328, 512, torch.uint8),
            ]
        )
        wanted = [linear.stored.view(torch.uint8).clone() for linear in block]  # type: ignore[operator, union-attr]
        found = layout(block, as_mapped)
        memory = torch.zeros(found.bytes, dtype=torch.uint8)
        for run in streaming_room._runs(found):
            memory[run.at : run.at + run.span.bytes] = file.bytes_at(run.span.start, run.span.stop)
        attach(found, memory)
        got = [linear.stored.view(torch.uint8) for linear in block]  # type: ignore[operator, union-attr]
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("most", [100, 120, 1000])
def test_pieces_bring_every_byte_even_of_spans_that_overlap(most: int) -> None:
    runs = [Run(Span("b", 0, 300), 0), Run(Span("b", 100, 400), 512), Run(Span("b", 450, 451), 1024)]
    brought = [bytearray(300), bytearray(300), bytearray(1)]
    for part in reader._shared(runs, most):
        first, stop = part[0].span.start, max(run.span.stop for run in part)
        assert all(run.span.start >= first for run in part) and stop - first <= most
        for run in part:
            number = run.at // 512
            at = run.at - 512 * number
            brought[number][at : at + run.span.bytes] = bytes([1]) * run.span.bytes
    assert all(all(one) for one in brought)


def streaming(flux: Flux, files: WeightFiles, **options: Any) -> Streaming:
    loader = Streaming(flux.blocks, files, CPU, **options)
    flux.loader = loader
    return loader


def kill(thread: threading.Thread) -> None:
    """Raise SystemExit inside a thread, as an interpreter that shuts down does."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


@pytest.mark.usefixtures("by_threads")
def test_a_reader_thread_that_is_killed_stops_the_run(path: Path, text: Conditioning) -> None:
    """Killed while it waits for work: it takes the next block with it, or tells of it."""
    flux, files = load(path)
    loader = streaming(flux, files)
    flux.velocities(forwards(text))
    reads = loader._reader.reads
    assert isinstance(reads, background_reads.ThreadReads)
    kill(reads.threads[0])
    with pytest.raises(FluxsplitError, match=r"thread that reads the weights (was )?ended"):
        for _ in range(5):  # a pass may still find its slots filled
            flux.velocities(forwards(text))


@pytest.mark.usefixtures("by_threads")
def test_a_reader_thread_that_is_gone_without_a_word_stops_the_run(
    path: Path, text: Conditioning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_reads.ThreadReads, "_work", lambda self: None)
    flux, files = load(path)
    streaming(flux, files)
    with pytest.raises(FluxsplitError, match="the thread that reads the weights ended"):
        flux.velocities(forwards(text))


@pytest.mark.usefixtures("by_threads")
def test_a_reader_thread_that_is_killed_at_a_read_stops_the_run(
    path: Path, text: Conditioning, monkeypatch: pytest.MonkeyPatch
) -> None:
    flux, files = load(path)

    def ended(*_: Any, **__: Any) -> None:
        raise SystemExit

    streaming(flux, files)
    monkeypatch.setattr("fluxsplit.weights.WeightFile.read_into", ended)
    with pytest.raises(FluxsplitError, match="thread that reads the weights was ended by SystemExit"):
        for _ in range(2):
            flux.velocities(forwards(text))


def test_a_killed_reader_stops_a_run_over_the_map(path: Path, text: Conditioning) -> None:
    flux, files = load(path)
    loader = ReadAhead(flux.blocks, files, frozenset(range(BLOCKS)), lambda count: None)
    flux.loader = loader
    flux.velocities(forwards(text))
    kill(loader._thread)
    loader._wanted.put(0)
    loader._thread.join(10)
    with pytest.raises(FluxsplitError, match="was ended by SystemExit"):
        flux.velocities(forwards(text))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    """Other bytes, as many."""
    time.sleep(0.02)  # a tick of the file system's clock
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x01" * 100)


def exchange(path: Path) -> None:
    """Another file under the name."""
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes())
    new.replace(path)


@pytest.mark.parametrize(
    ("damage", "said"), [(truncate, "cut short|changed"), (overwrite, "changed"), (exchange, "changed")]
)
@pytest.mark.parametrize("ahead", [True, False])
def test_a_file_that_changes_under_the_run_stops_it(
    path: Path, text: Conditioning, damage: Any, said: str, ahead: bool, loaders: list[Streaming | ReadAhead]
) -> None:
    flux, files = load(path)
    loader = streaming(flux, files, ahead=ahead)
    loaders.append(loader)
    flux.velocities(forwards(text))
    damage(path)
    with pytest.raises(FluxsplitError, match=said):
        for number in 3 * [*range(BLOCKS)]:  # no forward: what is mapped of a file that was cut must not be touched
            with loader.brought_in(number):
                pass
    with pytest.raises(FluxsplitError, match="changed"):
        files.check_unchanged()


@pytest.mark.parametrize("damage", [truncate, overwrite, exchange])
def test_no_picture_is_written_from_a_file_that_changed(
    tmp_path: Path, path: Path, damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged after the last block of the last step: nothing is there to be read any more, only the check."""
    done = 0
    end = Flux._end

    def damaging(self: Flux, stream: Any) -> torch.Tensor:
        nonlocal done
        done += 1
        output = end(self, stream)
        if done == 2:
            damage(path)
        return output

    monkeypatch.setattr(Flux, "_end", damaging)
    latents, recorder = sample(path, [image(write_conditioning(tmp_path / "text", 0))], tmp_path / "out")
    assert latents == [] and not list((tmp_path / "out").glob("*"))
    (failed,) = recorder.of("failed")
    assert "changed during the run" in failed["message"]


def test_a_read_past_the_end_is_an_error(path: Path) -> None:
    file = WeightFiles().open(str(path))
    with pytest.raises(FluxsplitError, match="cut short"):
        file.read_into(memoryview(bytearray(100)), path.stat().st_size - 10)


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [frozenset(), frozenset({0, 2}), frozenset(range(BLOCKS))])
@pytest.mark.parametrize(("ahead", "pinnable"), [(True, ()), (True, range(BLOCKS)), (True, (1,)), (False, ())])
def test_on_a_card_streamed_is_resident_to_the_bit(
    path: Path,
    text: Conditioning,
    resident: frozenset[int],
    ahead: bool,
    pinnable: Sequence[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With pieces so small that every matrix takes several, over several passes; the last from pinned pages."""
    monkeypatch.setattr(reader, "LATE_BLOCKS", 0)
    card = torch.device("cuda", 0)

    def velocities(**options: Any) -> list[torch.Tensor]:
        files = WeightFiles()
        flux = Flux(checkpoint.part(path, "transformer"), files, torch.float16, card)
        inside = {id(child) for block in flux.blocks for child in block.modules()}
        for child in flux.module.modules():
            if id(child) not in inside and hasattr(child, "move"):
                child.move(card)
        loader = Streaming(flux.blocks, files, card, **options)
        flux.loader = loader
        for _ in range(12):
            found = flux.velocities(forwards(text, 3))
        streams = bool(options.get("pinnable", frozenset()) - resident)
        assert bool(loader._reader.pinned_bytes) == (streams and pinned.can_pin(card))
        loader.close()
        return [velocity.cpu() for velocity in found]

    wanted = velocities(resident=frozenset(range(BLOCKS)))
    got = velocities(resident=resident, ahead=ahead, slots=2, piece_bytes=1000, pinnable=frozenset(pinnable))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_on_a_card_the_stage_gives_every_picture_the_bits_it_has_alone(tmp_path: Path, path: Path, dtype: str) -> None:
    """Several pictures in one call, everything streamed, against each alone with everything there."""
    texts = [write_conditioning(tmp_path / f"text-{n}", n) for n in range(2)]
    images = [image(texts[n % 2], n, (512, 512 - 16 * n), steps=2) for n in range(4)]
    everything = {"resident": (), "streamed": tuple(range(BLOCKS)), "slots": 2, "together": 4}
    together, recorder = sample(path, images, tmp_path / "together", dtype, plan=everything, device="cuda:0")
    assert recorder.of("plan")[0]["device"] in ("cuda", "hip")
    assert len(together) == 4
    for latent, one in zip(together, images, strict=True):
        (alone,), _ = sample(path, [one], tmp_path / "alone", dtype, device="cuda:0")
        assert torch.equal(latent, alone)
        assert float(latent.std()) > 0.1
