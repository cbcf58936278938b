"""What the text encoders make of a prompt, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from fluxsplit.conditioning_header import MAX_FILE_BYTES
from fluxsplit.errors import FluxsplitError


@dataclass(frozen=True, slots=True)
class Conditioning:
    """T5's hidden states t5 [1, T, D] and CLIP's pooled [1, P], fp32."""

    t5: torch.Tensor
    pooled: torch.Tensor


def conditioning_bytes(conditioning: Conditioning, prompt: str) -> bytes:
    """A conditioning file: safetensors with `t5` [1, T, D] and `pooled` [1, P], fp32, and the prompt as metadata."""
    tensors = {"t5": conditioning.t5.cpu().contiguous(), "pooled": conditioning.pooled.cpu().contiguous()}
    return save_safetensors(tensors, metadata={"prompt": json.dumps(prompt)})


def read_conditioning(path: str) -> Conditioning:
    """The two tensors in a file, as fp32; raises FluxsplitError where they are not there, or not finite.

    Their shapes are for `conditioning_header.check_shapes` to judge, which knows the transformer's.
    """
    place = Path(path)
    try:
        if place.stat().st_size > MAX_FILE_BYTES:
            raise FluxsplitError(f"{place.name} is {place.stat().st_size} bytes, too large for a conditioning")
        tensors = load_safetensors(place.read_bytes())
    except FluxsplitError:
        raise
    except Exception as error:  # safetensors raises its own kinds for damage
        raise FluxsplitError(f"{place} cannot be read as a conditioning: {error}") from error
    t5, pooled = tensors.get("t5"), tensors.get("pooled")
    if t5 is None or pooled is None:
        found = {name[:40]: list(tensor.shape) for name, tensor in tensors.items()}
        raise FluxsplitError(f"{place.name} holds {found}", "a conditioning holds t5 [1, T, D] and pooled [1, P]")
    if not (t5.is_floating_point() and pooled.is_floating_point()):
        raise FluxsplitError(f"{place.name} holds {t5.dtype} and {pooled.dtype}", "a conditioning holds fractions")
    t5, pooled = t5.float(), pooled.float()
    for name, tensor in (("t5", t5), ("pooled", pooled)):
        if not bool(tensor.isfinite().all()):
            raise FluxsplitError(f"{place.name}: {name} holds NaN or infinity", "encode the prompt again")
    return Conditioning(t5, pooled)
