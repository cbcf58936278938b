"""The commands that render, decode and enlarge: which options each has, and what its help page says.

Each is one row of a table: options are named once (`cli_options`) and come in groups, since typer would have every
command spell all of them out as parameters that no command reads by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fluxsplit.cli_help import GroupedCommand, PromptCommand, RerenderCommand
from fluxsplit.cli_options import (
    Cache,
    Cfg,
    Clip,
    ComfyUI,
    Conditioning,
    Count,
    Decoder,
    DecodeTile,
    DeleteLatents,
    Device,
    DryRun,
    Dtype,
    EncodeFit,
    EncodeSize,
    EnlargingTile,
    Fetch,
    Fit,
    From,
    FromPicks,
    Guidance,
    Json,
    Keep,
    LatentFormat,
    Latents,
    LatentsOut,
    LowFrequencyGuidance,
    Model,
    Negative,
    NoiseIndex,
    Overwrite,
    OverwritePeeks,
    Peek,
    PeeksOut,
    PeekSteps,
    Pictures,
    PicturesOut,
    PreviewCount,
    PreviewSize,
    PreviewsOut,
    Prompt,
    PromptFile,
    Quiet,
    RendersOut,
    RerenderCount,
    RerenderImages,
    RerenderSize,
    Sampler,
    SaveConditioning,
    Scale,
    Scheduler,
    Seed,
    Shift,
    Sigmas,
    Size,
    SkipExisting,
    Steps,
    Strength,
    TextEncoder,
    Tokenizers,
    Upscale,
    UpscaledOut,
    UpscaleTile,
    UpscaleTo,
    Vae,
    VaeDtype,
    VaeDtypeAlone,
    Vram,
)

Options = dict[str, Any]
"""Annotated types by parameter name, in the order of the help page."""

SAMPLING: Options = {
    "steps": Steps,
    "guidance": Guidance,
    "cfg": Cfg,
    "sampler": Sampler,
    "scheduler": Scheduler,
    "shift": Shift,
    "sigmas": Sigmas,
}
MODEL_FILES: Options = {
    "model": Model,
    "text_encoder": TextEncoder,
    "clip": Clip,
    "vae": Vae,
    "tokenizers": Tokenizers,
    "comfyui": ComfyUI,
}
VAE_STAGE: Options = {
    "vae": Vae,
    "model": Model,
    "comfyui": ComfyUI,
    "vae_dtype": VaeDtype,
    "device": Device,
    "vram": Vram,
}
UPSCALING_BY: Options = {"upscale": Upscale, "upscale_to": UpscaleTo, "fetch": Fetch}
RESULTS: Options = {"json": Json, "quiet": Quiet}


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its flags, its help, and whether its arguments may be left out."""

    name: str
    summary: str
    """For the list of commands."""
    description: str
    """First lines of its own help page."""
    options: Options
    examples: str
    required: str = ""
    """The argument that must be given."""
    kind: type[GroupedCommand] = GroupedCommand


COMMANDS: tuple[Command, ...] = (
    Command(
        name="sample",
        summary="Render prompts to latent files.",
        description="Render prompts to latent files, one for each prompt and seed; their paths are printed on stdout.",
        options={
            "prompt": Prompt,
            "prompt_file": PromptFile,
            "negative": Negative,
            "size": Size,
            "seed": Seed,
            "count": Count,
            **SAMPLING,
            "noise_index": NoiseIndex,
            **MODEL_FILES,
            "conditioning": Conditioning,
            "save_conditioning": SaveConditioning,
            "cache": Cache,
            "dtype": Dtype,
            "vram": Vram,
            "device": Device,
            "out": LatentsOut,
            "format": LatentFormat,
            "skip_existing": SkipExisting,
            "dry_run": DryRun,
            "peek": Peek,
            "peek_steps": PeekSteps,
            **RESULTS,
        },
        examples="""Examples:
  fluxsplit sample -p "a red circle above a blue square on white"
  fluxsplit sample -m flux1-schnell-fp8.safetensors -p "a lighthouse at dusk" -n 4 --size 1152x896
  fluxsplit sample -m flux1-dev-fp8.safetensors --prompt-file prompts.txt --seed 7..15 --steps 28
  fluxsplit sample -p "a fox" | fluxsplit decode -
""",
        kind=PromptCommand,
    ),
    Command(
        name="preview",
        summary="Render small pictures to choose from.",
        description="Render small pictures, numbered, with their latents and a sheet of them; "
        "their paths are printed on stdout.",
        options={
            "prompt": Prompt,
            "prompt_file": PromptFile,
            "negative": Negative,
            "size": PreviewSize,
            "seed": Seed,
            "count": PreviewCount,
            **SAMPLING,
            **MODEL_FILES,
            "conditioning": Conditioning,
            "cache": Cache,
            "dtype": Dtype,
            "vae_dtype": VaeDtypeAlone,
            "vram": Vram,
            "device": Device,
            "out": PreviewsOut,
            "format": LatentFormat,
            "skip_existing": SkipExisting,
            "dry_run": DryRun,
            **RESULTS,
        },
        examples="""Examples:
  fluxsplit preview -p "a red circle above a blue square on white"
  fluxsplit preview -m flux1-schnell-fp8.safetensors --prompt-file prompts.txt -n 4 --size 576x472
""",
        kind=PromptCommand,
    ),
    Command(
        name="rerender",
        summary="Render pictures again, larger or otherwise.",
        description="Render pictures again from the recipes in them, whichever tool wrote them; "
        "paths are printed on stdout.\n\nEvery setting of a recipe can be overridden by its flag.",
        options={
            "images": RerenderImages,
            "from_": From,
            "from_picks": FromPicks,
            "size": RerenderSize,
            "scale": Scale,
            "keep": Keep,
            "strength": Strength,
            "fit": Fit,
            "low_frequency_guidance": LowFrequencyGuidance,
            "prompt": Prompt,
            "negative": Negative,
            "seed": Seed,
            "count": RerenderCount,
            **SAMPLING,
            "noise_index": NoiseIndex,
            **MODEL_FILES,
            "conditioning": Conditioning,
            "cache": Cache,
            **UPSCALING_BY,
            "upscale_tile": EnlargingTile,
            "dtype": Dtype,
            "vae_dtype": VaeDtypeAlone,
            "vram": Vram,
            "device": Device,
            "out": RendersOut,
            "dry_run": DryRun,
            **RESULTS,
        },
        examples="""Examples:
  fluxsplit rerender --from previews/0007.png --size 1152x944
  fluxsplit rerender --from-picks --scale 2 --upscale 2
  fluxsplit rerender ComfyUI_00042_.png --scale 1.5 --keep composition --strength 0.8
  fluxsplit rerender --from previews --steps 8 --out more-steps
""",
        kind=RerenderCommand,
    ),
    Command(
        name="decode",
        summary="Decode latent files to PNGs.",
        description="Decode latent files to PNGs that carry their recipe; their paths are printed on stdout.",
        options={
            "latents": Latents,
            **VAE_STAGE,
            "tile": DecodeTile,
            "out": PicturesOut,
            "overwrite": Overwrite,
            "delete_latents": DeleteLatents,
            **UPSCALING_BY,
            "upscale_tile": EnlargingTile,
            "dry_run": DryRun,
            **RESULTS,
        },
        examples="""Examples:
  fluxsplit decode latents
  fluxsplit decode latents/*.pt --out pictures --delete-latents
  fluxsplit decode ComfyUI_00001_.latent --vae ae.safetensors
  fluxsplit decode latents --upscale 2
""",
        required="latents",
    ),
    Command(
        name="encode",
        summary="Encode pictures to latent files.",
        description="Encode pictures to latent files, as for image-to-image; their paths are printed on stdout.",
        options={
            "pictures": Pictures,
            "size": EncodeSize,
            "fit": EncodeFit,
            **VAE_STAGE,
            "out": LatentsOut,
            "format": LatentFormat,
            "dry_run": DryRun,
            **RESULTS,
        },
        examples="""Examples:
  fluxsplit encode photo.jpg --vae ae.safetensors --size 1152x896
  fluxsplit encode images/*.png --model flux1-schnell-fp8.safetensors --format latent
""",
        required="pictures",
    ),
    Command(
        name="upscale",
        summary="Enlarge pictures.",
        description="Enlarge pictures by a network, twofold unless told otherwise; their recipes are kept.",
        options={
            "pictures": Pictures,
            **UPSCALING_BY,
            "tile": UpscaleTile,
            "vram": Vram,
            "comfyui": ComfyUI,
            "dtype": Dtype,
            "device": Device,
            "out": UpscaledOut,
            "overwrite": Overwrite,
            "dry_run": DryRun,
            **RESULTS,
        },
        examples="""Examples:
  fluxsplit upscale images/*.png
  fluxsplit upscale photo.jpg --upscale 4 --fetch --out large
  fluxsplit upscale images --upscale 4x-UltraSharp.pth --upscale-to 3840x2160
""",
        required="pictures",
    ),
    Command(
        name="peek",
        summary="Make small previews of latents.",
        description="Make small previews of latents without a VAE, in milliseconds; by TAEF1 where its weights are.",
        options={
            "latents": Latents,
            "decoder": Decoder,
            "comfyui": ComfyUI,
            "device": Device,
            "out": PeeksOut,
            "overwrite": OverwritePeeks,
            **RESULTS,
        },
        examples="""Examples:
  fluxsplit peek latents
  fluxsplit peek latents/*.pt --decoder linear --out previews
""",
        required="latents",
    ),
)
