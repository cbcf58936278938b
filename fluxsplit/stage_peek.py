"""The peek stage: latents → pictures by TAEF1, a VAE's decoder distilled to five megabytes.

madebyollin's TAEF1 comes as a bare decoder (`taef1_decoder`, layers numbered from the clamp, which has no weights) and
as diffusers' AutoencoderTiny (`decoder.layers.N`, without the clamp in the count). It takes latents as the transformer
sees them.

A peek is to be small. TAEF1 holds 1.2 KB for each pixel it makes, 3.7 GB for 2048x1536, so that latents of larger
pictures are averaged down to `MAX_SIDE` first.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from fluxsplit import durable
from fluxsplit.device import pick_device
from fluxsplit.diffusers_models import DecoderTiny
from fluxsplit.errors import FluxsplitError
from fluxsplit.events import Events
from fluxsplit.fingerprint import weights_stamp
from fluxsplit.jobs import PeekJob
from fluxsplit.latent_space import LatentSpace
from fluxsplit.latents import LatentFile, read_latents
from fluxsplit.metadata import ImageRecord, encode_png, png_text_chunks
from fluxsplit.peek import SUFFIX
from fluxsplit.recipe import LATENT_CHANNELS, WeightsStamp
from fluxsplit.single_files import Failures
from fluxsplit.state_dict import StateDict, read_state_dict

MAX_SIDE = 96
"""Of latents that TAEF1 decodes: 768 pixels."""
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def run(job: PeekJob, events: Events) -> None:
    """Draw `job.latents`; one that fails is reported and the rest go on."""
    device = pick_device(job.device)
    decoder = taef1(read_state_dict(job.weights), Path(job.weights).name).to(device)
    stamp = weights_stamp(job.weights)
    failures = Failures(events)
    for number, path in enumerate(job.latents):
        with failures.told_of(path):
            for latent in read_latents(path):
                made = _draw(decoder, latent, job, stamp, device)
                recipe = latent.recipe.to_object() if latent.recipe else None
                events.send("result", path=str(made), source=path, recipe=recipe)
        events.send("decode", done=number + 1, total=len(job.latents))


def taef1(state: StateDict, name: str) -> torch.nn.Module:
    """TAEF1's decoder with its weights, fp32 on the CPU; raises FluxsplitError for any other network."""
    values = {}
    for key, tensor in state.items():
        if tensor.dtype not in _TORCH or not tensor.data:
            raise FluxsplitError(f"{name} is refused: {key[:80]} is {tensor.dtype}")
        value = torch.frombuffer(bytearray(tensor.data), dtype=_TORCH[tensor.dtype]).view(tensor.shape)
        values[_diffusers_name(key)] = value.float()
    with torch.device("meta"):
        decoder: torch.nn.Module = DecoderTiny(LATENT_CHANNELS, 3, (3, 3, 3, 1), (64, 64, 64, 64), 2, "relu", "nearest")
    own = {key: value for key, value in values.items() if key.startswith("layers.")}
    try:
        decoder.load_state_dict(own, strict=True, assign=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()[:160] if "\n" in str(error) else str(error)[:160]
        raise FluxsplitError(f"{name} is not TAEF1's decoder: {detail}", "use --decoder linear") from None
    return decoder.eval().requires_grad_(False)


def _diffusers_name(key: str) -> str:
    first, _, rest = key.partition(".")
    if first.isdecimal():
        return f"layers.{int(first) - 1}.{rest}"
    return key.removeprefix("decoder.")


def _small(latents: torch.Tensor) -> torch.Tensor:
    """Latents [1, 16, h, w], neither side above `MAX_SIDE`."""
    height, width = latents.shape[2:]
    longer = max(height, width)
    if longer <= MAX_SIDE:
        return latents
    size = [max(1, round(side * MAX_SIDE / longer)) for side in (height, width)]
    return F.interpolate(latents, size=size, mode="area")


@torch.inference_mode()
def _draw(
    decoder: torch.nn.Module, latent: LatentFile, job: PeekJob, stamp: WeightsStamp, device: torch.device
) -> Path:
    vae_space = torch.frombuffer(bytearray(latent.payload), dtype=torch.float32).view(latent.shape)
    small = _small(LatentSpace().to_model(vae_space))
    decoded: torch.Tensor = decoder(small.to(device))[0]  # [3, 8h, 8w] in -1..1
    if not bool(decoded.isfinite().all()):
        raise FluxsplitError(f"{stamp.name} gave NaN or infinity")
    levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round_().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
    record = ImageRecord(latent.recipe, latent.payload_sha256, stamp)
    texts = png_text_chunks(record, latent.foreign)
    png = encode_png(levels.numpy().tobytes(), levels.shape[1], levels.shape[0], texts)
    folder = Path(job.out or Path(latent.path).parent)
    if job.overwrite:
        return durable.replace(folder / (latent.stem + SUFFIX), png)
    return durable.write_once(folder, latent.stem, SUFFIX, png)
