"""The `fluxsplit` command: arguments → jobs, events → terminal; and the one place where errors are caught."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fluxsplit import __version__
from fluxsplit.cli_help import GroupedCommand, RerenderCommand
from fluxsplit.cli_options import (
    FILES,
    MACHINE,
    OUTPUT,
    PICTURE,
    Cache,
    Cfg,
    Clip,
    ComfyUI,
    Conditioning,
    Count,
    Debug,
    Device,
    DryRun,
    Dtype,
    Fetch,
    Fit,
    From,
    FromPicks,
    Guidance,
    Json,
    Keep,
    LatentFormat,
    LatentsOut,
    LowFrequencyGuidance,
    Model,
    Negative,
    NoiseIndex,
    Peek,
    PeekSteps,
    PreviewCount,
    PreviewSize,
    PreviewsOut,
    Prompt,
    PromptFile,
    Quiet,
    RendersOut,
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
    Steps,
    Strength,
    TextEncoder,
    Tokenizers,
    Upscale,
    UpscaleTo,
    Vae,
    VaeDtype,
    VaeDtypeAlone,
    Vram,
)
from fluxsplit.errors import INTERRUPTED_EXIT_CODE, FluxsplitError

if TYPE_CHECKING:
    from fluxsplit.progress import Progress

app = typer.Typer(
    name="fluxsplit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 1 some items failed, 2 usage, 3 a model file is missing, 4 out of memory, "
    "130 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fluxsplit {__version__}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """FLUX.1 pictures on small graphics cards: encode, sample and decode in processes of their own."""


SAMPLE_EXAMPLES = """Examples:
  fluxsplit sample -p "a red circle above a blue square on white"
  fluxsplit sample -m flux1-schnell-fp8.safetensors -p "a lighthouse at dusk" -n 4 --size 1152x896
  fluxsplit sample -m flux1-dev-fp8.safetensors --prompt-file prompts.txt --seed 7..15 --steps 28
  fluxsplit sample -p "a fox" | fluxsplit decode -
"""
PREVIEW_EXAMPLES = """Examples:
  fluxsplit preview -p "a red circle above a blue square on white"
  fluxsplit preview -m flux1-schnell-fp8.safetensors --prompt-file prompts.txt -n 4 --size 576x472
"""
GALLERY_EXAMPLES = """Examples:
  fluxsplit gallery
  fluxsplit gallery images --renders large --rerender "--model flux1-dev-fp8.safetensors"
"""
RERENDER_EXAMPLES = """Examples:
  fluxsplit rerender --from previews/0007.png --size 1152x944
  fluxsplit rerender --from-picks --scale 2 --upscale 2
  fluxsplit rerender ComfyUI_00042_.png --scale 1.5 --keep composition --strength 0.8
  fluxsplit rerender --from previews --steps 8 --out more-steps
"""
DECODE_EXAMPLES = """Examples:
  fluxsplit decode latents
  fluxsplit decode latents/*.pt --out pictures --delete-latents
  fluxsplit decode ComfyUI_00001_.latent --vae ae.safetensors
  fluxsplit decode latents --upscale 2
"""
PEEK_EXAMPLES = """Examples:
  fluxsplit peek latents
  fluxsplit peek latents/*.pt --decoder linear --out previews
"""
ENCODE_EXAMPLES = """Examples:
  fluxsplit encode photo.jpg --vae ae.safetensors --size 1152x896
  fluxsplit encode images/*.png --model flux1-schnell-fp8.safetensors --format latent
"""
UPSCALE_EXAMPLES = """Examples:
  fluxsplit upscale images/*.png
  fluxsplit upscale photo.jpg --upscale 4 --fetch --out large
  fluxsplit upscale images --upscale 4x-UltraSharp.pth --upscale-to 3840x2160
"""


@app.command(cls=GroupedCommand, epilog=SAMPLE_EXAMPLES, short_help="Render prompts to latent files.")
def sample(
    context: typer.Context,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    negative: Negative = None,
    size: Size = None,
    seed: Seed = None,
    count: Count = None,
    steps: Steps = None,
    guidance: Guidance = None,
    cfg: Cfg = None,
    sampler: Sampler = None,
    scheduler: Scheduler = None,
    shift: Shift = None,
    sigmas: Sigmas = None,
    noise_index: NoiseIndex = None,
    model: Model = None,
    text_encoder: TextEncoder = None,
    clip: Clip = None,
    vae: Vae = None,
    tokenizers: Tokenizers = None,
    comfyui: ComfyUI = None,
    conditioning: Conditioning = None,
    save_conditioning: SaveConditioning = None,
    cache: Cache = None,
    dtype: Dtype = None,
    vram: Vram = None,
    device: Device = None,
    out: LatentsOut = None,
    format: LatentFormat = None,
    dry_run: DryRun = None,
    peek: Peek = None,
    peek_steps: PeekSteps = None,
    json: Json = None,
    quiet: Quiet = None,
    debug: Debug = False,
) -> None:
    """Render prompts to latent files, one for each prompt and seed; their paths are printed on stdout."""
    raise typer.Exit(_run("sample", _given(context)))


@app.command(cls=GroupedCommand, epilog=PREVIEW_EXAMPLES, short_help="Render small pictures to choose from.")
def preview(
    context: typer.Context,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    negative: Negative = None,
    size: PreviewSize = None,
    seed: Seed = None,
    count: PreviewCount = None,
    steps: Steps = None,
    guidance: Guidance = None,
    cfg: Cfg = None,
    sampler: Sampler = None,
    scheduler: Scheduler = None,
    shift: Shift = None,
    sigmas: Sigmas = None,
    model: Model = None,
    text_encoder: TextEncoder = None,
    clip: Clip = None,
    vae: Vae = None,
    tokenizers: Tokenizers = None,
    comfyui: ComfyUI = None,
    cache: Cache = None,
    dtype: Dtype = None,
    vae_dtype: VaeDtypeAlone = None,
    vram: Vram = None,
    device: Device = None,
    out: PreviewsOut = None,
    format: LatentFormat = None,
    dry_run: DryRun = None,
    json: Json = None,
    quiet: Quiet = None,
    debug: Debug = False,
) -> None:
    """Render small pictures, numbered, with their latents and a sheet of them; their paths are printed on stdout."""
    raise typer.Exit(_run("preview", _given(context)))


@app.command(cls=RerenderCommand, epilog=RERENDER_EXAMPLES, short_help="Render pictures again, larger or otherwise.")
def rerender(
    context: typer.Context,
    images: RerenderImages = None,
    from_: From = None,
    from_picks: FromPicks = None,
    size: RerenderSize = None,
    scale: Scale = None,
    keep: Keep = None,
    strength: Strength = None,
    fit: Fit = None,
    low_frequency_guidance: LowFrequencyGuidance = None,
    prompt: Prompt = None,
    negative: Negative = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    cfg: Cfg = None,
    sampler: Sampler = None,
    scheduler: Scheduler = None,
    shift: Shift = None,
    sigmas: Sigmas = None,
    noise_index: NoiseIndex = None,
    model: Model = None,
    text_encoder: TextEncoder = None,
    clip: Clip = None,
    vae: Vae = None,
    tokenizers: Tokenizers = None,
    comfyui: ComfyUI = None,
    cache: Cache = None,
    upscale: Upscale = None,
    upscale_to: UpscaleTo = None,
    fetch: Fetch = None,
    dtype: Dtype = None,
    vae_dtype: VaeDtypeAlone = None,
    vram: Vram = None,
    device: Device = None,
    out: RendersOut = None,
    dry_run: DryRun = None,
    json: Json = None,
    quiet: Quiet = None,
    debug: Debug = False,
) -> None:
    """Render pictures again from the recipes in them, whichever tool wrote them; paths are printed on stdout.

    Every setting of a recipe can be overridden by its flag.
    """
    raise typer.Exit(_run("rerender", _given(context)))


@app.command(cls=GroupedCommand, epilog=DECODE_EXAMPLES, short_help="Decode latent files to PNGs.")
def decode(
    context: typer.Context,
    latents: Annotated[
        list[str], typer.Argument(metavar="LATENT", help="Latent files, folders of them, or - for names on stdin.")
    ],
    vae: Vae = None,
    model: Model = None,
    comfyui: ComfyUI = None,
    vae_dtype: VaeDtype = None,
    device: Device = None,
    vram: Vram = None,
    tile: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=MACHINE,
            help="Decode in overlapped tiles of N pixels, inexactly; 0: never. [0]",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="Folder for pictures. [images]"),
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite/--no-overwrite", rich_help_panel=OUTPUT, help="Replace pictures of the same name."),
    ] = None,
    delete_latents: Annotated[
        bool | None,
        typer.Option(
            "--delete-latents/--keep-latents", rich_help_panel=OUTPUT, help="Remove latents once decoded. [keep]"
        ),
    ] = None,
    upscale: Upscale = None,
    upscale_to: UpscaleTo = None,
    fetch: Fetch = None,
    json: Json = None,
    quiet: Quiet = None,
    debug: Debug = False,
) -> None:
    """Decode latent files to PNGs that carry their recipe; their paths are printed on stdout."""
    raise typer.Exit(_run("decode", _given(context)))


@app.command(cls=GroupedCommand, epilog=ENCODE_EXAMPLES, short_help="Encode pictures to latent files.")
def encode(
    context: typer.Context,
    pictures: Annotated[
        list[str], typer.Argument(metavar="IMG", help="Pictures, folders of them, or - for names on stdin.")
    ],
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH", rich_help_panel=PICTURE, help="Resize first. [the picture's, cut to multiples of 8]"
        ),
    ] = None,
    vae: Vae = None,
    model: Model = None,
    comfyui: ComfyUI = None,
    vae_dtype: VaeDtype = None,
    device: Device = None,
    vram: Vram = None,
    out: LatentsOut = None,
    format: LatentFormat = None,
    json: Json = None,
    quiet: Quiet = None,
    debug: Debug = False,
) -> None:
    """Encode pictures to latent files, as for image-to-image; their paths are printed on stdout."""
    raise typer.Exit(_run("encode", _given(context)))


@app.command(cls=GroupedCommand, epilog=UPSCALE_EXAMPLES, short_help="Enlarge pictures.")
def upscale(
    context: typer.Context,
    pictures: Annotated[
        list[str], typer.Argument(metavar="IMG", help="Pictures, folders of them, or - for names on stdin.")
    ],
    upscale: Upscale = None,
    upscale_to: UpscaleTo = None,
    fetch: Fetch = None,
    tile: Annotated[
        str | None,
        typer.Option(metavar="auto|N", rich_help_panel=MACHINE, help="Side of the tiles in pixels; 0 for none. [auto]"),
    ] = None,
    vram: Vram = None,
    comfyui: ComfyUI = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="Folder for the results. [that of each picture]"
        ),
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite/--no-overwrite", rich_help_panel=OUTPUT, help="Replace pictures of the same name."),
    ] = None,
    json: Json = None,
    quiet: Quiet = None,
    debug: Debug = False,
) -> None:
    """Enlarge pictures by a network, twofold unless told otherwise; their recipes are kept."""
    raise typer.Exit(_run("upscale", _given(context)))


@app.command(cls=GroupedCommand, epilog=PEEK_EXAMPLES, short_help="Make small previews of latents.")
def peek(
    context: typer.Context,
    latents: Annotated[
        list[str], typer.Argument(metavar="LATENT", help="Latent files, folders of them, or - for names on stdin.")
    ],
    decoder: Annotated[
        str | None,
        typer.Option(
            metavar="auto|linear|FILE", rich_help_panel=FILES, help="TAEF1's file; auto takes it where it is. [auto]"
        ),
    ] = None,
    comfyui: ComfyUI = None,
    device: Device = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="Folder for previews. [that of each latent]"
        ),
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite/--no-overwrite", rich_help_panel=OUTPUT, help="Replace previews of the same name."),
    ] = None,
    json: Json = None,
    quiet: Quiet = None,
    debug: Debug = False,
) -> None:
    """Make small previews of latents without a VAE, in milliseconds; by TAEF1 where its weights are."""
    raise typer.Exit(_run("peek", _given(context)))


@app.command(cls=GroupedCommand, epilog=GALLERY_EXAMPLES, short_help="Choose pictures on a local web page.")
def gallery(
    context: typer.Context,
    folder: Annotated[str | None, typer.Argument(metavar="[DIR]", help="Folder of pictures. [previews]")] = None,
    renders: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of results. [renders]")] = None,
    rerender: Annotated[
        str | None, typer.Option(metavar="FLAGS", help='Flags for rerender, as "--model flux1-dev.safetensors".')
    ] = None,
    port: Annotated[int | None, typer.Option(metavar="N", help="Port on 127.0.0.1. [a free one]")] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Print the address only; open no browser.")] = False,
    debug: Debug = False,
) -> None:
    """Choose pictures on a local web page, and render the picks larger; its address is printed on stdout."""
    from fluxsplit.cli_gallery import run_gallery  # noqa: PLC0415

    raise typer.Exit(run_gallery(_given(context)))


@app.command(cls=GroupedCommand, short_help="Say what files hold.")
def info(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Latents, pictures or weight files.")],
    form: Annotated[
        str | None,
        typer.Option("--as", metavar="a1111|cli|json", help="Only the recipe: as parameters, as a command, as JSON."),
    ] = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Say what latents, pictures (of any known tool) and weight files hold."""
    from fluxsplit.cli_info import run_info  # noqa: PLC0415  only where it is needed

    raise typer.Exit(run_info(files, bool(json), form))


@app.command(cls=GroupedCommand, short_help="Make copies to show elsewhere.")
def export(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Pictures.")],
    target: Annotated[
        str, typer.Option("--for", metavar="pixelfed|civitai|web", help="Where the copies are to be shown.")
    ],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the copies go.")] = "exports",
    no_ai_mark: Annotated[bool, typer.Option("--no-ai-mark", help="Leave out the mark that an AI made it.")] = False,
    debug: Debug = False,
) -> None:
    """Make copies that fit: size, format, and metadata kept or dropped on purpose.

    pixelfed: JPEG up to 15 MB without metadata, the prompt beside it as alt text; civitai: PNG with parameters;
    web: small WebP without metadata.
    """
    from fluxsplit.cli_export import run_export  # noqa: PLC0415  only where it is needed

    raise typer.Exit(run_export(files, target, out, not no_ai_mark))


@app.command(cls=GroupedCommand, short_help="Run a workflow file.")
def run(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE.toml", help="One table, named as its command."),
    ],
    debug: Debug = False,
) -> None:
    """Run a workflow file: the settings of one command, named as their flags."""
    from fluxsplit.settings import read_workflow  # noqa: PLC0415

    raise typer.Exit(_run(*read_workflow(Path(file).expanduser())))


def _given(context: typer.Context) -> dict[str, Any]:
    """The flags that were given, by name."""
    given = {name.rstrip("_"): value for name, value in context.params.items() if value not in (None, [], ())}
    return {name: value for name, value in given.items() if name != "debug"}


def _runner(command: str) -> Callable[[dict[str, Any], dict[str, Any], Progress], int] | None:
    """The function of a command that plans and runs in one; None for those that can show their plan."""
    if command == "decode":
        from fluxsplit.cli_decode import decode  # noqa: PLC0415

        return decode
    if command == "encode":
        from fluxsplit.cli_encode import encode  # noqa: PLC0415

        return encode
    if command == "peek":
        from fluxsplit.cli_peek import peek  # noqa: PLC0415

        return peek
    if command == "rerender":
        from fluxsplit.cli_rerender import rerender  # noqa: PLC0415

        return rerender
    if command == "upscale":
        from fluxsplit.cli_upscale import upscale  # noqa: PLC0415

        return upscale
    return None


def _run(command: str, given: dict[str, Any]) -> int:
    """Plan, then do, with progress on stderr and results on stdout; returns the exit code."""
    from fluxsplit.progress import Progress  # noqa: PLC0415
    from fluxsplit.settings import defaults  # noqa: PLC0415

    settings = defaults(command, os.environ)
    quiet = bool(given.get("quiet", settings.get("quiet", False)))
    with Progress(json_lines=bool(given.get("json")), quiet=quiet) as progress:
        if (runner := _runner(command)) is not None:
            return runner(given, settings, progress)
        return _render(command, given, settings, progress)


def _render(command: str, given: dict[str, Any], settings: dict[str, Any], progress: Progress) -> int:
    """`sample` and `preview`: plan, then do, or show the plan."""
    if command == "preview":
        from fluxsplit.cli_preview import plan_preview, run_preview  # noqa: PLC0415

        plan = plan_preview(given, settings)
        if not given.get("dry_run"):
            return run_preview(plan, given, settings, progress)
    else:
        from fluxsplit.cli_sample import plan_sample, run_sample  # noqa: PLC0415

        plan = plan_sample(given, settings)
        if not given.get("dry_run"):
            return run_sample(plan, progress)
    from fluxsplit.dry_run import plan_json, print_plan  # noqa: PLC0415

    for note in plan.notes:
        progress.note(note)
    print(plan_json(plan)) if given.get("json") else print_plan(plan)
    return 0


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit; every error ends here as one line on stderr."""
    words = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):  # names of files need not be valid text
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="surrogateescape" if os.name == "posix" else "replace")  # type: ignore[union-attr]
    _interrupt_on("SIGTERM", "SIGHUP", "SIGBREAK")
    try:
        app(words)
    except FluxsplitError as error:
        _fail(error.line(), error, "--debug" in words)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        sys.exit(1)
    except Exception as error:
        _fail(
            f"{type(error).__name__}: {error}; this is a bug, run with --debug for its place", error, "--debug" in words
        )
        sys.exit(1)
    sys.exit(0)


def _fail(line: str, error: BaseException, debug: bool) -> None:
    if debug:
        import traceback  # noqa: PLC0415

        traceback.print_exception(error)
    print(f"fluxsplit: {line}", file=sys.stderr)


def _interrupt_on(*names: str) -> None:
    """Let these signals end us as Ctrl-C does, so that the stage is ended and the temporary folder removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for name in names:
        if hasattr(signal, name):
            with suppress(ValueError, OSError):  # not the main thread
                signal.signal(getattr(signal, name), interrupt)
