"""The options that several commands share: names, help and the section of the help page in which they stand."""

from __future__ import annotations

from typing import Annotated

import typer

from fluxsplit.defaults import KEEP, LOW_FREQUENCY_GUIDANCE, STRENGTH

FROM, KEEPING = "Source", "Keeping the composition"
FILES, PICTURE, SAMPLER, MACHINE, OUTPUT = "Model files", "Picture", "Sampling", "Machine", "Output"
UPSCALING = "Upscaling"

Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        rich_help_panel=PICTURE,
        help="What to show; repeatable; - reads one a line from stdin, but for lines that begin with #.",
    ),
]
PromptFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", rich_help_panel=PICTURE, help="File with one prompt a line; # starts a comment."),
]
Negative = Annotated[
    str | None,
    typer.Option(metavar="TEXT", rich_help_panel=PICTURE, help="What to steer away from; needs --cfg above 1."),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="WxH", rich_help_panel=PICTURE, help="Pixels, multiples of 8. [1024x1024; demo model 256x256]"
    ),
]
Seed = Annotated[
    list[str] | None,
    typer.Option(
        metavar="N|N..M", rich_help_panel=PICTURE, help="Seed or range; repeatable. [drawn, and printed on stderr]"
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        "--count", "-n", metavar="N", rich_help_panel=PICTURE, help="Images for each prompt: seeds s, s+1, ... [1]"
    ),
]
RerenderCount = Annotated[
    int | None,
    typer.Option("--count", "-n", metavar="N", rich_help_panel=PICTURE, help="Pictures of each: seeds s, s+1, ... [1]"),
]
RerenderImages = Annotated[
    list[str] | None, typer.Argument(metavar="[IMAGE]...", help="The same as --from.", show_default=False)
]
From = Annotated[
    list[str] | None,
    typer.Option(
        "--from",
        metavar="IMAGE",
        rich_help_panel=FROM,
        help="Picture or latent, a folder or glob of them, - for names on stdin; repeatable.",
    ),
]
FromPicks = Annotated[
    str | None,
    typer.Option("--from-picks", metavar="[DIR]", rich_help_panel=FROM, help="What was picked in a folder. [previews]"),
]
RerenderSize = Annotated[
    str | None,
    typer.Option("--size", metavar="WxH", rich_help_panel=PICTURE, help="Pixels, multiples of 8. [the picture's own]"),
]
Scale = Annotated[
    float | None,
    typer.Option(
        metavar="F",
        rich_help_panel=PICTURE,
        help="Times the size it was rendered at, before any upscaling, to 8 pixels.",
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        metavar="seed|noise|image|composition",
        rich_help_panel=KEEPING,
        help="What a picture of another size keeps: the seed's number alone, the large forms of its noise, the picture "
        f"itself under new noise, or both. [{KEEP}]",
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        rich_help_panel=KEEPING,
        help=f"Noise level, 0..1, from which the picture is drawn again. [{STRENGTH:g}]",
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        metavar="stretch|centre",
        rich_help_panel=KEEPING,
        help="At another aspect ratio: pull the picture, or put it into the middle. [stretch]",
    ),
]
LowFrequencyGuidance = Annotated[
    float | None,
    typer.Option(
        metavar="W",
        rich_help_panel=KEEPING,
        help=f"Hold the large forms to the picture in the first half of the steps, 0..1. [{LOW_FREQUENCY_GUIDANCE:g}]",
    ),
]
PreviewSize = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="WxH", rich_help_panel=PICTURE, help="Pixels, multiples of 8. [512x512; demo model 256x256]"
    ),
]
PreviewCount = Annotated[
    int | None,
    typer.Option(
        "--count",
        "-n",
        metavar="N",
        rich_help_panel=PICTURE,
        help="Pictures for each prompt: seeds s, s+1, ... [8; where seeds are given 1]",
    ),
]
Steps = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=SAMPLER, help="Sampling steps. [schnell 4, dev 20]")
]
Guidance = Annotated[
    float | None, typer.Option(metavar="X", rich_help_panel=SAMPLER, help="Distilled guidance of dev models. [3.5]")
]
Cfg = Annotated[
    float | None,
    typer.Option(metavar="X", rich_help_panel=SAMPLER, help="True guidance; above 1 a step takes twice as long. [1]"),
]
Sampler = Annotated[
    str | None, typer.Option(metavar="euler|heun|dpmpp_2m", rich_help_panel=SAMPLER, help="Sampler. [euler]")
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="simple|normal|beta|sgm_uniform", rich_help_panel=SAMPLER, help="How noise levels fall. [simple]"
    ),
]
Shift = Annotated[
    str | None,
    typer.Option(
        metavar="auto|MU",
        rich_help_panel=SAMPLER,
        help="Time shift mu; auto: by resolution for dev, none for schnell. ComfyUI: 1.15. [auto]",
    ),
]
Sigmas = Annotated[
    str | None,
    typer.Option(metavar="LIST", rich_help_panel=SAMPLER, help="The noise levels themselves, as 1,0.75,0.5,0.25,0."),
]
NoiseIndex = Annotated[
    int | None,
    typer.Option(metavar="I", rich_help_panel=SAMPLER, help="Item of a ComfyUI batch to take the noise of. [0]"),
]
TextEncoder = Annotated[
    str | None,
    typer.Option(metavar="FILE", rich_help_panel=FILES, help="T5 file, where the model file holds none."),
]
Clip = Annotated[
    str | None,
    typer.Option(metavar="FILE", rich_help_panel=FILES, help="CLIP-L file, where the model file holds none."),
]
Tokenizers = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel=FILES,
        help="Holds t5xxl/tokenizer.json, clip_l/vocab.json, clip_l/merges.txt.",
    ),
]
Conditioning = Annotated[
    str | None,
    typer.Option(metavar="FILE", rich_help_panel=FILES, help="An encoded prompt; no text encoder is needed then."),
]
Cache = Annotated[
    bool | None,
    typer.Option(
        "--cache/--no-cache", rich_help_panel=FILES, help="Keep encoded prompts, and use those that were kept. [cache]"
    ),
]
SaveConditioning = Annotated[
    str | None,
    typer.Option(metavar="FILE", rich_help_panel=FILES, help="Keep the encoded prompt for --conditioning."),
]
PreviewsOut = Annotated[
    str | None,
    typer.Option("--out", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="Folder for previews. [previews]"),
]
RendersOut = Annotated[
    str | None,
    typer.Option("--out", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="Folder for pictures. [renders]"),
]
LatentsOut = Annotated[
    str | None,
    typer.Option("--out", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="Folder for latent files. [latents]"),
]
LatentFormat = Annotated[
    str | None,
    typer.Option(metavar="pt|safetensors|latent", rich_help_panel=OUTPUT, help="Format of latent files. [pt]"),
]
DryRun = Annotated[
    bool | None, typer.Option("--dry-run", rich_help_panel=OUTPUT, help="Show what would be done, and do nothing.")
]

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="FILE",
        rich_help_panel=FILES,
        help="Weight file, diffusers folder, a file name in ComfyUI's folders, or demo.",
    ),
]
Vae = Annotated[
    str | None, typer.Option(metavar="FILE", rich_help_panel=FILES, help="VAE file, where the model file holds none.")
]
ComfyUI = Annotated[
    str | None,
    typer.Option(
        "--comfyui", metavar="DIR", rich_help_panel=FILES, help="ComfyUI's folder, searched for files. [~/ComfyUI]"
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="auto|cpu|cuda:N", rich_help_panel=MACHINE, help="Where to compute. [auto]")
]
VaeDtype = Annotated[
    str | None,
    typer.Option(
        "--vae-dtype",
        "--dtype",
        metavar="auto|fp32|bf16|fp16",
        rich_help_panel=MACHINE,
        help="What the VAE computes in; auto: bf16 on cards that are fast at it. [auto]",
    ),
]
VaeDtypeAlone = Annotated[
    str | None,
    typer.Option(
        "--vae-dtype",
        metavar="auto|fp32|bf16|fp16",
        rich_help_panel=MACHINE,
        help="What the VAE computes in; auto: bf16 on cards that are fast at it. [auto]",
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(metavar="auto|8G|75%", rich_help_panel=MACHINE, help="Memory to use on the device. [auto]"),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="auto|fp32|bf16|fp16", rich_help_panel=MACHINE, help="What to compute in. [auto]"),
]
Json = Annotated[bool | None, typer.Option("--json", rich_help_panel=OUTPUT, help="Results as JSON lines.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]
Quiet = Annotated[
    bool | None, typer.Option("--quiet/--no-quiet", "-q", rich_help_panel=OUTPUT, help="Only results and errors.")
]
Upscale = Annotated[
    str | None,
    typer.Option(
        "--upscale",
        "-u",
        metavar="2|4|NAME|FILE",
        rich_help_panel=UPSCALING,
        help="Enlarge by Real-ESRGAN or its like.",
    ),
]
UpscaleTo = Annotated[
    str | None, typer.Option(metavar="WxH", rich_help_panel=UPSCALING, help="Size to end with, by Lanczos.")
]
Fetch = Annotated[
    bool | None,
    typer.Option("--fetch/--no-fetch", rich_help_panel=UPSCALING, help="Download published weights that are missing."),
]
SkipExisting = Annotated[
    bool | None,
    typer.Option(
        "--skip-existing/--no-skip-existing",
        rich_help_panel=OUTPUT,
        help="Leave out what the folder holds already, made with the same settings.",
    ),
]
Peek = Annotated[
    bool | None,
    typer.Option("--peek/--no-peek", rich_help_panel=OUTPUT, help="Write a small preview beside each latent."),
]
PeekSteps = Annotated[
    bool | None,
    typer.Option(
        "--peek-steps/--no-peek-steps",
        rich_help_panel=OUTPUT,
        help="Keep peek.png in the folder of latents as the picture is after each step.",
    ),
]
Latents = Annotated[
    list[str], typer.Argument(metavar="LATENT...", help="Latent files, folders of them, or - for names on stdin.")
]
Pictures = Annotated[
    list[str], typer.Argument(metavar="IMAGE...", help="Pictures, folders of them, or - for names on stdin.")
]
EncodeFit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="cut|stretch",
        rich_help_panel=PICTURE,
        help="If --size has another aspect ratio: cut off what sticks out, or pull. [cut]",
    ),
]
EncodeSize = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="WxH",
        rich_help_panel=PICTURE,
        help="Resize first. [the picture's, cut to multiples of 8]",
    ),
]
DecodeTile = Annotated[
    int | None,
    typer.Option(
        "--tile",
        metavar="N",
        rich_help_panel=MACHINE,
        help="Decode in overlapped tiles of N pixels, inexactly; 0: never. [0]",
    ),
]
UpscaleTile = Annotated[
    str | None,
    typer.Option(
        "--tile", metavar="auto|N", rich_help_panel=MACHINE, help="Side of the tiles in pixels; 0 for none. [auto]"
    ),
]
EnlargingTile = Annotated[
    str | None,
    typer.Option(
        "--upscale-tile",
        metavar="auto|N",
        rich_help_panel=UPSCALING,
        help="Side of the tiles to enlarge in, in pixels; 0 for none. [auto]",
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        metavar="auto|linear|FILE", rich_help_panel=FILES, help="TAEF1's file; auto takes it where it is. [auto]"
    ),
]
DeleteLatents = Annotated[
    bool | None,
    typer.Option("--delete-latents/--keep-latents", rich_help_panel=OUTPUT, help="Remove latents once decoded. [keep]"),
]
PicturesOut = Annotated[
    str | None,
    typer.Option("--out", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="Folder for pictures. [images]"),
]
UpscaledOut = Annotated[
    str | None,
    typer.Option(
        "--out", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="Folder for the results. [that of each picture]"
    ),
]
PeeksOut = Annotated[
    str | None,
    typer.Option(
        "--out", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="Folder for previews. [that of each latent]"
    ),
]
Overwrite = Annotated[
    bool | None,
    typer.Option("--overwrite/--no-overwrite", rich_help_panel=OUTPUT, help="Replace pictures of the same name."),
]
OverwritePeeks = Annotated[
    bool | None,
    typer.Option("--overwrite/--no-overwrite", rich_help_panel=OUTPUT, help="Replace previews of the same name."),
]
