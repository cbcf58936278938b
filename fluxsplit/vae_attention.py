"""Attention in the middle of a VAE: means of all values, weighted for some queries, by products and a softmax.

Fused kernels are not used: with one head of 512 channels they refuse, or err on some AMD builds. Keys come in blocks,
and what each block gives is merged exactly: sums are rescaled whenever a higher score is met (Milakov and Gimelshein,
arXiv 1805.02867). All of it is in fp32, whatever planes are kept in; but on a CPU that multiplies bf16 quickly, planes
in bf16 are multiplied as they are, each score the sum of two products (`attention` says why): three times as quick.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fluxsplit.attention import has_quick_bf16_products_only, scores_of
from fluxsplit.planes import Plane, sent


class BlockedAttention:
    """Attends to planes of keys and values in `dtype`, `together` of them at most at a time."""

    def __init__(self, dtype: torch.dtype, device: torch.device, together: int) -> None:
        self._device, self._together = device, together
        self._in_bf16 = dtype == torch.bfloat16 and device.type == "cpu" and has_quick_bf16_products_only()
        self._buffers: dict[str, torch.Tensor] = {}

    def means(self, query: torch.Tensor, keys: Plane, values: Plane) -> torch.Tensor:
        """softmax(query keysᵀ / sqrt(C)) values, fp32 [n, C], for queries [n, C] in the planes' dtype."""
        scale = keys.channels**-0.5
        query = query if self._in_bf16 else query.float() * scale
        highest = torch.full((len(query), 1), -torch.inf, device=self._device)
        total = torch.zeros_like(highest)
        gathered = torch.zeros_like(query, dtype=torch.float32)
        for some_keys, some_values in self._parts(keys, values):
            scores = self._scores(query, some_keys, scale)
            higher = torch.maximum(highest, scores.amax(1, keepdim=True))
            shares = scores.sub_(higher).exp_()
            fade = (highest - higher).exp_()
            total.mul_(fade).add_(shares.sum(1, keepdim=True))
            self._add(gathered.mul_(fade), shares, some_values)
            highest = higher
        return gathered.div_(total)

    def _scores(self, query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        """Scaled scores, fp32; the queries are scaled already where they are fp32."""
        shape = torch.Size((len(query), len(keys)))
        scores = self._buffer("scores", shape)
        if not self._in_bf16:
            return torch.mm(query, keys.T, out=scores)
        rounded, off = (self._buffer(name, shape, torch.bfloat16) for name in ("rounded", "off"))
        return scores_of(query, keys.T, rounded, off, scores).mul_(scale)

    def _add(self, gathered: torch.Tensor, shares: torch.Tensor, values: torch.Tensor) -> None:
        if self._in_bf16:
            gathered.add_(torch.mm(self._buffer("rounded", shares.shape, torch.bfloat16).copy_(shares), values))
        else:
            gathered.addmm_(shares, values)

    def _parts(self, keys: Plane, values: Plane) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All keys and values on the device, as they are multiplied, some [m, C] at a time."""
        both = zip(keys.pieces(0, keys.height), values.pieces(0, values.height), strict=True)
        for (_, key), (_, value) in both:
            flat = (sent(piece, self._device).reshape(-1, keys.channels) for piece in (key, value))
            for some in zip(*(piece.split(self._together) for piece in flat), strict=True):
                if self._in_bf16 or some[0].dtype == torch.float32:
                    yield some
                else:
                    names = ("keys", "values")
                    wide = (self._buffer(name, part.shape).copy_(part) for name, part in zip(names, some, strict=True))
                    some_keys, some_values = wide
                    yield some_keys, some_values

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory that is used again and again; new pieces would leave holes, half a million times."""
        held = self._buffers.get(name)
        if held is None or held.numel() < shape.numel():
            held = self._buffers[name] = torch.empty(shape.numel(), device=self._device, dtype=dtype)
        return held[: shape.numel()].view(shape)
