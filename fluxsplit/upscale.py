"""Pixels → more pixels, by any single-image network that spandrel knows, whole or in blended tiles.

spandrel recognises a network by the names of its tensors and builds it; the tensors are read by `state_dict`, never
by spandrel, whose own loader unpickles. How large a tile may be is known before the first is computed: the network
is run once on the meta device, where tensors have sizes but no values, and the bytes alive at the same time are
counted. That is a property of the network, so it holds for every architecture without a table of them.
"""

from __future__ import annotations

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluxsplit.device import DTYPE_NAMES, exact_fp32
from fluxsplit.errors import FluxsplitError, OutOfMemory, UsageError
from fluxsplit.state_dict import StateDict, read_state_dict
from fluxsplit.tiles import OVERLAP_PX, Span, cut, smaller_tile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PROBE_PX = 128
WINDOW_PX = 32
"""A multiple of the windows that are in use: 8 (SwinIR, OmniSR), 16 (HAT), 8x32 (DAT)."""
WORKSPACE = {"cpu": 2.2, "cuda": 1.5}
"""What is taken with what convolution libraries want, as a multiple of the tensors alive. On a CPU oneDNN keeps its own
copies of input and output (scripts/bench_upscale.py); for graphics cards the figure is assumed, not measured."""
UNKNOWN_PIXEL_BYTES = 64_000
"""Of a network that cannot run on the meta device: more than any measured one needs in fp32."""
BUILD_SLACK_BYTES = 256 << 20
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")
TileDone = Callable[[int, int], None]
StoredWeights = dict[str, torch.Tensor]


class NotFinite(FluxsplitError):
    """The network gave NaN or infinity."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a picture is cut: side of the square tiles, 0 for none, and by how much they overlap, in pixels."""

    tile: int
    overlap: int = OVERLAP_PX


class Upscaler:
    """A network with its weights, that maps RGB [3, H, W] in 0..1 to [3, scale * H, scale * W]."""

    def __init__(self, path: str | Path, dtype: torch.dtype, device: torch.device) -> None:
        """Read and build; raises FluxsplitError where the file holds no network that enlarges single pictures."""
        exact_fp32()
        self.name = Path(path).name
        self._network = _build(self.name, read_state_dict(path))
        self.scale: int = self._network.scale
        self.multiple: int = self._network.size_requirements.multiple_of
        """Of a picture's sides; where it is none, the picture is mirrored at its end."""
        self.alignment = _alignment(self._network)
        """Of the origins of tiles."""
        self.architecture: str = self._network.architecture.name
        self.tiles_itself: bool = self._network.tiling.name == "INTERNAL"
        self.pixel_bytes = _pixel_bytes(self._network)
        """What it holds at its peak for each pixel that goes in, computing in fp32."""
        self._weights: StoredWeights = dict(self._network.model.state_dict())
        self._finite = True
        self._network.model.register_forward_hook(self._look)
        self.dtype, self.device = dtype, device
        self.compute_in(dtype)

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether the architecture works in `dtype`."""
        known = {torch.float16: self._network.supports_half, torch.bfloat16: self._network.supports_bfloat16}
        return bool(known.get(dtype, True))

    def compute_in(self, dtype: torch.dtype) -> None:
        """Cast the weights; raises UsageError where the architecture does not work in `dtype`."""
        if not self.supports(dtype):
            raise UsageError(f"{self.architecture} does not work in {DTYPE_NAMES[dtype]}", "use --dtype fp32")
        self._network.model.to(device=self.device, dtype=dtype)
        cast = {
            name: value.to(self.device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self._weights.items()
        }
        self._network.model.load_state_dict(cast, assign=True)  # from fp32 each time: what fp16 lost would stay lost
        self._network.model.requires_grad_(False)
        self.dtype = dtype

    def planned_bytes(self, width: int, height: int) -> float:
        """What computing a tile of this size takes beside the weights, in the present dtype."""
        return width * height * self.pixel_bytes * self.dtype.itemsize / 4 * WORKSPACE[self.device.type]

    @torch.inference_mode()
    def apply(self, pixels: torch.Tensor) -> torch.Tensor:
        """fp32 [3, h, w] on the CPU → fp32 [3, scale * h, scale * w] on the CPU; raises NotFinite.

        A network of one channel is given red, green and blue one after the other.
        """
        self._finite = True
        channels = self._network.input_channels
        moved = pixels.to(self.device, self.dtype)
        parts = [self._network(part[None])[0] for part in moved.split(channels)]
        if not self._finite:
            raise NotFinite(f"{self.name} gave NaN or infinity in {DTYPE_NAMES[self.dtype]}", "use --dtype fp32")
        return torch.cat(parts).float().cpu()

    def _look(self, module: Any, arguments: Any, output: torch.Tensor) -> None:
        """Before spandrel clamps it to 0..1, which makes a white pixel of infinity."""
        self._finite = self._finite and bool(output.isfinite().all())


def enlarge(network: Upscaler, pixels: torch.Tensor, tiling: Tiling, on_tile: TileDone) -> torch.Tensor:
    """RGB fp32 [3, H, W] in 0..1 → uint8 [scale * H, scale * W, 3].

    A tile that does not fit into memory is halved and the picture begun again; a result that is not finite is
    computed again in fp32. Raises OutOfMemory where the smallest tile does not fit either, NotFinite where fp32
    does not help.
    """
    while True:
        try:
            strips = [_levels(strip) for strip in enlarged_strips(network, pixels, tiling, on_tile)]
            return torch.cat(strips, dim=1).permute(1, 2, 0).contiguous()
        except NotFinite:
            if network.dtype == torch.float32:
                raise
            network.compute_in(torch.float32)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            tiling = _after_out_of_memory(network, pixels, tiling, error)
        _give_back(network.device)


def _after_out_of_memory(network: Upscaler, pixels: torch.Tensor, tiling: Tiling, error: BaseException) -> Tiling:
    height, width = pixels.shape[1:]
    tile = 0 if network.tiles_itself else smaller_tile(width, height, tiling.tile)
    if not tile:
        tried = f"{tiling.tile or max(width, height)} pixels"
        raise OutOfMemory(
            f"{network.name} does not fit into memory with tiles of {tried}: {str(error).splitlines()[0][:200]}",
            "close other programs, or use --device cpu",
        ) from None
    return Tiling(tile, tiling.overlap)


def _levels(strip: torch.Tensor) -> torch.Tensor:
    """0..1 → 0..255, to the nearest: rounding down, as ComfyUI does, would darken the picture a second time."""
    return (strip * 255).round_().to(torch.uint8)


def enlarged_strips(
    network: Upscaler, pixels: torch.Tensor, tiling: Tiling, on_tile: TileDone
) -> Iterator[torch.Tensor]:
    """The enlarged picture from top to bottom as fp32 [3, rows, scale * W] in 0..1, each strip as soon as it is final.

    Only one row of tiles is held in fp32.
    """
    height, width = pixels.shape[1:]
    if network.tiles_itself or not tiling.tile or max(height, width) <= tiling.tile:
        yield network.apply(pixels)
        on_tile(1, 1)
        return
    padded = _padded(pixels, network.multiple)
    rows = cut(padded.shape[1], tiling.tile, tiling.overlap, network.alignment)
    columns = cut(padded.shape[2], tiling.tile, tiling.overlap, network.alignment)
    scale, total = network.scale, len(rows) * len(columns)
    carried = torch.zeros(3, 0, padded.shape[2] * scale)
    for number, row in enumerate(rows):
        strip = torch.zeros(3, (row.keep_stop - row.keep_start) * scale, padded.shape[2] * scale)
        strip[:, : carried.shape[1]] = carried
        for place, column in enumerate(columns):
            tile = network.apply(padded[:, row.start : row.stop, column.start : column.stop].contiguous())
            kept = _faded(_kept(tile, row, column, scale), row, column, scale)
            strip[:, :, column.keep_start * scale : column.keep_stop * scale] += kept
            on_tile(number * len(columns) + place + 1, total)
        final = strip.shape[1] - row.fade_out * scale
        carried = strip[:, final:]
        last = min(final, height * scale - row.keep_start * scale)
        yield strip[:, :last, : width * scale]


def _kept(tile: torch.Tensor, row: Span, column: Span, scale: int) -> torch.Tensor:
    top, bottom = (row.keep_start - row.start) * scale, (row.keep_stop - row.start) * scale
    left, right = (column.keep_start - column.start) * scale, (column.keep_stop - column.start) * scale
    return tile[:, top:bottom, left:right]


def _faded(kept: torch.Tensor, row: Span, column: Span, scale: int) -> torch.Tensor:
    return kept * _weights(row, scale)[None, :, None] * _weights(column, scale)[None, None, :]


def _weights(span: Span, scale: int) -> torch.Tensor:
    """How much of each kept pixel is used, [keep_stop - keep_start, times scale]."""
    weights = torch.ones((span.keep_stop - span.keep_start) * scale)
    for fade, rising in ((span.fade_in * scale, True), (span.fade_out * scale, False)):
        if fade:
            ramp = (torch.arange(fade) + 0.5) / fade
            if rising:
                weights[:fade] = ramp
            else:
                weights[-fade:] = 1 - ramp
    return weights


def _padded(pixels: torch.Tensor, multiple: int) -> torch.Tensor:
    """Right and bottom mirrored up to the multiple, as spandrel does with a whole picture (`size_req.py`)."""
    height, width = pixels.shape[1:]
    more_rows, more_columns = -height % multiple, -width % multiple
    mirrored = (0, min(more_columns, width - 1), 0, min(more_rows, height - 1))
    padded = F.pad(pixels[None], mirrored, "reflect")
    rest = (0, more_columns - mirrored[1], 0, more_rows - mirrored[3])
    return F.pad(padded, rest, "replicate")[0]


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in text for word in _MEMORY_WORDS)


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _build(name: str, state: StateDict) -> Any:
    """spandrel's network for these tensors, in fp32 on the CPU."""
    loader, unknown, single = _spandrel()
    values = {key: _tensor(tensor.dtype, tensor.shape, tensor.data) for key, tensor in state.items()}
    for key, value in values.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FluxsplitError(f"{name} is refused: {key[:80]} holds NaN or infinity", "download it again")
    weight_bytes = sum(value.nbytes for value in values.values())
    try:
        with _bounded_memory(3 * weight_bytes + BUILD_SLACK_BYTES):
            network = loader().load_from_state_dict(values)
    except unknown:
        keys = ", ".join(key[:60] for key in list(values)[:3])
        raise FluxsplitError(
            f"{name} holds no upscaler that spandrel knows; its tensors are {keys}, ...", "name another --model"
        ) from None
    except Exception as error:  # spandrel builds by what the names and shapes say, and fails in as many ways
        detail = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise FluxsplitError(f"{name} is refused: its tensors do not fit together: {detail}") from error
    _check_kind(name, network, single)
    network.model.eval().requires_grad_(False).float()
    return network


def _check_kind(name: str, network: Any, single: Any) -> None:
    """Only what takes one picture of any size and gives one."""
    kind = network.architecture.name
    if not isinstance(network, single):
        raise FluxsplitError(f"{name} is {kind}, which fills in masked areas; it does not enlarge")
    if network.size_requirements.square or network.purpose == "FaceSR":
        raise FluxsplitError(f"{name} is {kind}, which restores cut-out faces of one size; it takes no other picture")
    if network.input_channels not in (1, 3) or network.output_channels != network.input_channels:
        channels = f"{network.input_channels} to {network.output_channels}"
        raise FluxsplitError(f"{name} is {kind} from {channels} channels; grey and RGB can be used")


def _spandrel() -> tuple[Any, type[Exception], Any]:
    try:
        from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError  # noqa: PLC0415
    except (ImportError, RuntimeError, OSError, AttributeError) as error:  # a torchvision of another torch
        raise FluxsplitError(
            f"upscaling needs spandrel and a torchvision that fits torch {torch.__version__}: "
            f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}",
            "install the torchvision of your torch build (see docs/upscaling.md); all else works without it",
        ) from error
    return ModelLoader, UnsupportedModelError, ImageModelDescriptor


def _tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype])
    value = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(shape)
    return value.float() if value.is_floating_point() else value


@contextlib.contextmanager
def _bounded_memory(extra_bytes: int) -> Iterator[None]:
    """No more than `extra_bytes` of new memory inside, so that shapes which lie end in an error; Linux only.

    With one thread, since a pool of them that is started inside would want stacks.
    """
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource  # noqa: PLC0415 - there is none on Windows

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    data_bytes = int(statm.read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes + extra_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        torch.set_num_threads(threads)


def _pixel_bytes(network: Any) -> float:
    """Bytes alive at the peak for each pixel that goes in, in fp32, the input not counted.

    On a copy without values, since several architectures keep something of their input in themselves; with values and
    on few pixels where an architecture (SPAN) does not run without.
    """
    for make, wanted_px, device in ((_on_meta, PROBE_PX, "meta"), (lambda model: model, PROBE_PX // 2, "cpu")):
        least_px = max(wanted_px, network.size_requirements.minimum)
        side = least_px + -least_px % network.size_requirements.multiple_of
        with contextlib.suppress(Exception):  # one that asks for values, or for what this machine has not
            model = make(network.model)
            probe = torch.zeros(1, network.input_channels, side, side, device=device)
            with torch.inference_mode(), _AliveBytes() as alive:
                model(probe)
            return float(alive.peak_bytes / side**2)
    return UNKNOWN_PIXEL_BYTES


def _alignment(network: Any) -> int:
    """What the origins of tiles are multiples of.

    Networks with attention cut their input into windows of 8 to 32 pixels, counted from its origin, and pad what is
    left at the end; spandrel therefore asks for no multiple. In a tile that begins elsewhere all windows are others:
    a tiny SwinIR then was off by 0.2 of 1, and by 2e-7 from a multiple of its window.
    """
    has_windows = any("attn" in name or "relative_position" in name for name in network.model.state_dict())
    return math.lcm(network.size_requirements.multiple_of, WINDOW_PX if has_windows else 1)


def _on_meta(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose tensors have no values, made without copying those of the model."""
    held = {id(value): value for value in (*model.parameters(), *model.buffers())}
    empty = {
        place: torch.nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
        if isinstance(value, torch.nn.Parameter)
        else torch.empty_like(value, device="meta")
        for place, value in held.items()
    }
    return copy.deepcopy(model, dict(empty))


class _AliveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as anything refers to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._alive: dict[int, int] = {}
        self._alive_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._alive:
            return
        self._alive[place] = storage.nbytes()
        self._alive_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
        weakref.finalize(storage, self._forget, place)

    def _forget(self, place: int) -> None:
        self._alive_bytes -= self._alive.pop(place)
