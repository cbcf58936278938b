"""Weight files as tensors without a copy, assigned to modules built on the meta device, cast when used.

The file is mapped read-only and shared, so its pages belong to the page cache and cost no anonymous memory;
every weight matrix is a view into that map, float8 as stored. Only when a layer runs is its matrix expanded to
the compute dtype, and dropped again after the product. Biases, norms and convolutions, small as they are, are
held in the compute dtype.
"""

from __future__ import annotations

import math
import mmap
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fluxsplit import fp8
from fluxsplit.checkpoint import Part, Source
from fluxsplit.errors import FluxsplitError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class WeightFile:
    """A read-only shared map of a weight file."""

    def __init__(self, path: str) -> None:
        self.path = path
        with Path(path).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def bytes_at(self, start: int, stop: int) -> torch.Tensor:
        """Bytes start..stop of the file as a uint8 view; must not be written to."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=torch.uint8, count=stop - start, offset=start)

    def will_need(self, start: int, stop: int) -> None:
        """Ask the kernel to read these bytes ahead; does nothing where it cannot be asked."""
        if hasattr(mmap, "MADV_WILLNEED"):
            page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, stop - page)


class WeightFiles:
    """The maps of all files that the parts of a model are spread over, each opened once."""

    def __init__(self) -> None:
        self._files: dict[str, WeightFile] = {}

    def open(self, path: str) -> WeightFile:
        """The map of `path`."""
        if path not in self._files:
            self._files[path] = WeightFile(path)
        return self._files[path]

    def stored(self, source: Source) -> torch.Tensor:
        """A parameter as stored, [*source.shape], a view of the file unless its halves are exchanged."""
        info = source.tensor
        dtype = _DTYPES[source.dtype]
        row_bytes = math.prod(info.shape[1:]) * dtype.itemsize
        file = self.open(source.path)
        views = [file.bytes_at(info.start + a * row_bytes, info.start + b * row_bytes) for a, b in source.runs]
        raw = views[0] if len(views) == 1 else torch.cat(views)
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(source.shape)

    def scale(self, source: Source) -> float | None:
        """The factor that a scaled float8 matrix is to be multiplied with, or None."""
        if source.scale is None:
            return None
        raw = self.open(source.path).bytes_at(source.scale.start, source.scale.end)
        value = float(raw.clone().view(torch.float32))
        if not math.isfinite(value):
            raise FluxsplitError(f"{Path(source.path).name}: {source.scale.name} is {value}")
        return value


class StoredLinear(nn.Module):
    """A Linear whose matrix stays as stored and is expanded to the input's dtype at each use."""

    weight = None  # T5's feed-forward asks whether it is a tensor, to cast its input to it

    def __init__(self, name: str, stored: torch.Tensor, scale: float | None, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.name = name
        self.stored = stored  # [out, in]
        self.scale = scale
        self.bias = bias  # [out], in the compute dtype
        self._checked = stored.dtype not in fp8.FLOAT8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        return F.linear(x, self.expanded(x.dtype, x.device), self.bias)

    def move(self, device: torch.device) -> int:
        """Keep the matrix on `device` from now on; returns its bytes."""
        self.stored = self.stored.to(device)
        return self.stored.nbytes

    def make_dense(self, dtype: torch.dtype, device: torch.device) -> None:
        """Expand the matrix for good."""
        self.stored = self.expanded(dtype, device).clone()
        self.scale = None

    def expanded(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The matrix [out, in] in `dtype` on `device`; a copy unless it is stored so."""
        if not self._checked:
            if fp8.has_nonfinite(self.stored):
                raise FluxsplitError(f"{self.name} holds NaN or infinity", "the file is damaged; download it again")
            self._checked = True
        return _expand(self.stored.to(device), dtype, self.scale)


class StoredEmbedding(nn.Module):
    """An Embedding whose table stays as stored; only the rows that are looked up are expanded."""

    def __init__(self, stored: torch.Tensor, scale: float | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.stored = stored  # [vocabulary, width]
        self.scale = scale
        self.dtype = dtype
        self.device = device

    @property
    def weight(self) -> torch.Tensor:
        """The table as stored; CLIP asks its shape."""
        return self.stored

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] → rows [..., width]."""
        raw = self.stored.view(torch.uint8) if self.stored.dtype in fp8.FLOAT8 else self.stored
        rows = raw[ids.to(raw.device)].view(self.stored.dtype)
        return _expand(rows.to(self.device), self.dtype, self.scale)


def _expand(stored: torch.Tensor, dtype: torch.dtype, scale: float | None) -> torch.Tensor:
    factor = 1.0 if scale is None else scale
    if stored.dtype in fp8.FLOAT8:
        return fp8.expand(stored, dtype, factor)
    expanded = stored.to(dtype)
    if factor == 1.0:
        return expanded
    # out of place where the cast was none: the map is read-only
    return expanded.mul_(factor) if stored.dtype != dtype else expanded * factor


def fill(module: nn.Module, part: Part, files: WeightFiles, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter of `module` (on the meta device) its values from `part`, each exactly once.

    Linears and embeddings keep their matrices as stored; everything else becomes `dtype` on `device`.
    Raises FluxsplitError naming parameters that are missing, left over or of another shape.
    """
    _check_names(module, part)

    def small(name: str, parameter: torch.Tensor) -> torch.Tensor:
        """A bias, norm or convolution in the compute dtype, copied out of the map."""
        _check_shape(name, parameter.shape, part.sources[name])
        value = files.stored(part.sources[name]).view(parameter.shape).to(dtype=dtype, copy=True)
        if not bool(value.isfinite().all()):
            raise FluxsplitError(f"{name} holds NaN or infinity", "the file is damaged; download it again")
        return value.to(device)

    for path, child in list(module.named_modules()):
        if isinstance(child, nn.Linear):
            source = part.sources[f"{path}.weight"]
            _check_shape(f"{path}.weight", child.weight.shape, source)
            bias = small(f"{path}.bias", child.bias) if child.bias is not None else None
            stored = files.stored(source).view(child.weight.shape)
            module.set_submodule(path, StoredLinear(path, stored, files.scale(source), bias))
        elif isinstance(child, nn.Embedding):
            source = part.sources[f"{path}.weight"]
            _check_shape(f"{path}.weight", child.weight.shape, source)
            table = StoredEmbedding(files.stored(source), files.scale(source), dtype, device)
            module.set_submodule(path, table)
    for path, child in module.named_modules():
        for leaf, parameter in list(child.named_parameters(recurse=False)):
            value = small(f"{path}.{leaf}".lstrip("."), parameter)
            setattr(child, leaf, nn.Parameter(value, requires_grad=False))
    module.eval()


def keep_resident(module: nn.Module, device: torch.device, budget_bytes: int) -> int:
    """Copy matrices to `device`, in order, while they fit the budget; the rest are brought in at each use.

    Returns the bytes that stay.
    """
    kept = 0
    for child in module.modules():
        if isinstance(child, StoredLinear) and kept + child.stored.nbytes <= budget_bytes:
            kept += child.move(device)
    return kept


def _check_names(module: nn.Module, part: Part) -> None:
    wanted = {name for name, _ in module.named_parameters()}
    missing, extra = sorted(wanted - set(part.sources)), sorted(set(part.sources) - wanted)
    if missing or extra:
        shown = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in _labelled(missing, extra) if names]
        raise FluxsplitError(
            f"the {part.kind}'s weights do not fill the model: {'; '.join(shown)}",
            "the file is incomplete or of another model",
        )


def _labelled(missing: list[str], extra: list[str]) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    return ("missing", missing), ("left over", extra)


def _check_shape(name: str, wanted: torch.Size, source: Source) -> None:
    """1x1 convolutions may stand for Linears: trailing sides of 1 do not count."""
    if _significant(wanted) != _significant(source.shape):
        raise FluxsplitError(f"{name} is {list(source.shape)} in {Path(source.path).name}, expected {list(wanted)}")


def _significant(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    sides = list(shape)
    while sides and sides[-1] == 1:
        sides.pop()
    return tuple(sides)
