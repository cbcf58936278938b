"""Layers whose matrices stay as the file has them and are expanded when they are used; modules filled with them.

Only when a layer runs is its matrix expanded to the compute dtype, into one scratch buffer that the next layer uses
again. Biases, norms and convolutions, small as they are, are held in the compute dtype. Where the device cannot see
the map, `streaming` brings the stored bytes to it, block by block; every matrix knows its place in the file for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fluxsplit import fp8, tile_product
from fluxsplit.checkpoint import Part, Source
from fluxsplit.errors import FluxsplitError
from fluxsplit.file_spans import Span
from fluxsplit.weights import WeightFiles

_DAMAGED = "the file is damaged; download it again"
ROWS = 64
"""A multiple of what matrix products compute at once: a piece that ends between costs the longest ones 3 %."""


class Scratch:
    """One buffer for the matrix that is multiplied with now; the layers of a model take turns."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        """With a limit, matrices that are larger come in pieces of rows; it does not bound `bytes`."""
        self._bytes, self._limit_bytes = torch.empty(0, dtype=torch.uint8), limit_bytes
        self._matrices: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}

    def rows(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """How many rows of such a matrix come at once."""
        if self._limit_bytes is None:
            return shape[0]
        row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
        rows = self._limit_bytes // row_bytes
        if rows >= shape[0]:
            return shape[0]
        return max(1, rows - rows % ROWS if rows > ROWS else rows)

    def matrix(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised matrix; whatever was taken before is overwritten. Grows to the largest asked for."""
        known = self._matrices.get((shape, dtype))
        if known is not None and known.device == device:
            return known
        count = math.prod(shape) * dtype.itemsize
        with torch.inference_mode(False):  # to be usable in and out of it
            if count > self._bytes.numel() or device != self._bytes.device:
                self._matrices.clear()
                self._bytes = torch.empty(0, dtype=torch.uint8)  # gone before its successor is there
                self._bytes = torch.empty(count, dtype=torch.uint8, device=device)
            self._matrices[shape, dtype] = matrix = self._bytes[:count].view(dtype).view(shape)
        return matrix

    def bytes(self, count: int) -> torch.Tensor:
        """So many uninitialised bytes of a CPU's, instead of a matrix."""
        return self.matrix(torch.Size((count,)), torch.uint8, torch.device("cpu"))


class StoredLinear(nn.Module):
    """A Linear whose matrix stays as stored and is expanded to the input's dtype at each use."""

    weight = None  # T5's feed-forward asks whether it is a tensor, to cast its input to it

    def __init__(
        self,
        name: str,
        stored: torch.Tensor,
        scale: float | None,
        bias: torch.Tensor | None,
        span: Span | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.stored = stored  # [out, in]
        self.scale = scale
        self.bias = bias  # [out], in the compute dtype
        self.span = span  # where the matrix is in its file; None where it is in no one piece
        self._scratch = scratch or Scratch()
        self._checked = stored.dtype not in fp8.FLOAT8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        return self.each([x])[0]

    def each(self, xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What `forward` gives for all of `xs`, of one dtype and device; a matrix that is written out is so once."""
        self._check()
        x = xs[0]
        if self._is_ready(x):
            return [F.linear(x, self.stored, self.bias) for x in xs]
        if len(xs) > 1 and all(map(self._by_tiles, xs)):  # at once, since no row's bits depend on the others
            made = self.each([torch.cat([_flat(x) for x in xs])])[0]
            rows = made.split([_flat(x).shape[0] for x in xs])
            return [part.view(*x.shape[:-1], -1) for x, part in zip(xs, rows, strict=True)]
        is_whole = self._scratch.rows(self.stored.shape, x.dtype) == self.stored.shape[0]
        if is_whole and not self._by_tiles(x):
            matrix = self._expanded_rows(self.stored, x, self._factor)
            return [F.linear(x, matrix, self.bias) for x in xs]
        outs = [x.new_empty(*x.shape[:-1], self.stored.shape[0]) for x in xs]
        self._multiply_each(xs, outs)
        return outs

    def into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write what `forward` gives to out [..., out], which may be some columns of a wider tensor."""
        self._check()
        if self._is_ready(x):
            _multiply(x, self.stored, self.bias, 1.0, out)
        else:
            self._multiply_each([x], [out])

    def _by_tiles(self, x: torch.Tensor) -> bool:
        """Whether the matrix can be expanded while it is multiplied with."""
        # asked for every layer of a step, where a card's host has no time to lose
        return x.device.type == "cpu" and tile_product.multiplies(self.stored, _flat(x))

    def _is_ready(self, x: torch.Tensor) -> bool:
        """Whether the matrix can be multiplied with as it is stored."""
        return self.stored.dtype == x.dtype and self.stored.device == x.device and self.scale in (None, 1.0)

    def _multiply_each(self, xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
        if not all(map(self._by_tiles, xs)):
            self._by_pieces(xs, outs)
            return
        for x, out in zip(xs, outs, strict=True):
            tile_product.multiply_into(
                _flat(x), self.stored, self._factor, self.bias, _columns(out), self._scratch.bytes
            )

    def _by_pieces(self, xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
        """Expand some rows of the matrix at a time, all if there is room, and multiply with them."""
        x = xs[0]
        rows, power = self._scratch.rows(self.stored.shape, x.dtype), self._power(x)
        for start in range(0, self.stored.shape[0], rows):
            piece = slice(start, start + rows)
            matrix, bias = self._expanded_rows(self.stored[piece], x, self._factor / power), self.bias
            for x, out in zip(xs, outs, strict=True):
                _multiply(x, matrix, None if bias is None else bias[piece], power, out[..., piece])

    @property
    def _factor(self) -> float:
        return 1.0 if self.scale is None else self.scale

    def _power(self, x: torch.Tensor) -> float:
        """A power of two that the product is multiplied with rather than the matrix, which saves a pass over it.

        It changes no bit, as long as sums are kept in fp32: not for certain in fp16.
        """
        cheap = fp8.CHEAP_SCALE.get(self.stored.dtype, 1.0)
        fits = x.device.type == "cpu" and self.bias is not None and self._factor == 1.0 and x.dtype != torch.float16
        return 1 / cheap if fits else 1.0

    def _expanded_rows(self, stored: torch.Tensor, x: torch.Tensor, factor: float) -> torch.Tensor:
        """Stored rows in the scratch matrix, in x's dtype and on its device."""
        matrix = self._scratch.matrix(stored.shape, x.dtype, x.device)
        if stored.dtype in fp8.FLOAT8:
            fp8.expand_into(stored.to(x.device), matrix, factor)
        else:
            matrix.copy_(stored)
            if factor != 1.0:
                matrix.mul_(factor)
        return matrix

    def move(self, device: torch.device) -> None:
        """Keep the matrix on `device` from now on."""
        self.stored = self.stored.to(device)

    def make_dense(self, dtype: torch.dtype, device: torch.device) -> None:
        """Expand the matrix for good."""
        self.stored = self.expanded(dtype, device).clone()
        self.scale = None

    def expanded(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The matrix [out, in] in `dtype` on `device`; a copy unless it is stored so."""
        self._check()
        return _expand(self.stored.to(device), dtype, self.scale)

    def _check(self) -> None:
        """Once, as the expansion makes numbers of NaN codes."""
        if not self._checked:
            if fp8.has_nonfinite(self.stored):
                where = "" if self.span is None else f" of {Path(self.span.path).name}"
                raise FluxsplitError(f"{self.name}{where} holds NaN or infinity", _DAMAGED)
            self._checked = True


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


def _multiply(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, power: float, out: torch.Tensor
) -> None:
    """out = x matrixᵀ · power + bias; `out` [..., rows] may be some columns of a wider tensor."""
    if bias is None:
        torch.mm(_flat(x), matrix.t(), out=_columns(out))
    else:
        torch.addmm(bias, _flat(x), matrix.t(), alpha=power, out=_columns(out))


def _flat(x: torch.Tensor) -> torch.Tensor:
    """x [..., width] as [tokens, width]."""
    return x.reshape(-1, x.shape[-1])


def _columns(out: torch.Tensor) -> torch.Tensor:
    """The same of what is written to, never a copy."""
    return out.view(-1, out.shape[-1])


def _expand(stored: torch.Tensor, dtype: torch.dtype, scale: float | None) -> torch.Tensor:
    factor = 1.0 if scale is None else scale
    if stored.dtype in fp8.FLOAT8:
        return fp8.expand(stored, dtype, factor)
    expanded = stored.to(dtype)
    if factor == 1.0:
        return expanded
    # out of place where the cast was none: the map is read-only
    return expanded.mul_(factor) if stored.dtype != dtype else expanded * factor


def fill(
    module: nn.Module,
    part: Part,
    files: WeightFiles,
    dtype: torch.dtype,
    device: torch.device,
    scratch_bytes: int | None = None,
) -> None:
    """Give every parameter of `module` (on the meta device) its values from `part`, each exactly once.

    Linears and embeddings keep their matrices as stored; everything else becomes `dtype` on `device`. Of a matrix no
    more than `scratch_bytes` are expanded at once.
    Raises FluxsplitError naming parameters that are missing, left over or of another shape.
    """
    _check_names(module, part)
    scratch = Scratch(scratch_bytes)

    def small(name: str, parameter: torch.Tensor) -> torch.Tensor:
        """A bias, norm or convolution in the compute dtype, copied out of the map."""
        _check_shape(name, parameter.shape, part.sources[name])
        value = files.stored(part.sources[name]).view(parameter.shape).to(dtype=dtype, copy=True)
        if not bool(value.isfinite().all()):
            where = Path(part.sources[name].path).name
            raise FluxsplitError(f"{name} of {where} holds NaN or infinity", _DAMAGED)
        return value.to(device)

    for path, child in list(module.named_modules()):
        if isinstance(child, nn.Linear):
            source = part.sources[f"{path}.weight"]
            _check_shape(f"{path}.weight", child.weight.shape, source)
            bias = small(f"{path}.bias", child.bias) if child.bias is not None else None
            stored = files.stored(source).view(child.weight.shape)
            linear = StoredLinear(path, stored, files.scale(source), bias, _span(source), scratch)
            module.set_submodule(path, linear)
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


def _span(source: Source) -> Span | None:
    """Where a matrix is in its file, if it is there in one piece."""
    if len(source.runs) != 1:
        return None
    (first, last), info = source.runs[0], source.tensor
    row_bytes = (info.end - info.start) // max(1, info.shape[0])
    return Span(source.path, info.start + first * row_bytes, info.start + last * row_bytes)


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
