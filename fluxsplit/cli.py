"""The `fluxsplit` command: arguments → jobs, events → terminal; and the one place where errors are caught."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import Parameter, Signature
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fluxsplit import __version__
from fluxsplit.cli_commands import COMMANDS, Command
from fluxsplit.cli_help import GroupedCommand
from fluxsplit.cli_options import Debug, Json, Quiet
from fluxsplit.errors import INTERRUPTED_EXIT_CODE, FluxsplitError, refusal

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


GALLERY_EXAMPLES = """Examples:
  fluxsplit gallery
  fluxsplit gallery images --renders large --rerender "--model flux1-dev-fp8.safetensors"
"""


def _add(command: Command) -> None:
    """Make a command of typer's from its row: one function for all, under a signature of the row's options."""

    def body(context: typer.Context, **_: Any) -> None:
        raise typer.Exit(_run(command.name, _given(context), debug=bool(context.params.get("debug"))))

    kinds: dict[str, Any] = {"context": typer.Context, **command.options, "debug": Debug}
    defaults = {"context": Parameter.empty, command.required: Parameter.empty, "debug": False}
    body.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(name, Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=kind)
            for name, kind in kinds.items()
        ]
    )
    body.__annotations__ = kinds
    body.__doc__ = command.description
    app.command(command.name, cls=command.kind, epilog=command.examples, short_help=command.summary)(body)


for _command in COMMANDS:
    _add(_command)


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

    raise typer.Exit(run_gallery(_given(context), lambda words: _parsed("rerender", words, context)))


@app.command(cls=GroupedCommand, short_help="Say what files hold.")
def info(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Latents, pictures, weight files; folders; - for stdin.")
    ],
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
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Pictures or folders; - for stdin.")],
    target: Annotated[
        str, typer.Option("--for", metavar="pixelfed|civitai|web", help="Where the copies are to be shown.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the copies go.")] = "exports",
    no_ai_mark: Annotated[bool, typer.Option("--no-ai-mark", help="Leave out the mark that an AI made it.")] = False,
    json: Json = None,
    quiet: Quiet = None,
    debug: Debug = False,
) -> None:
    """Make copies that fit: size, format, and metadata kept or dropped on purpose.

    pixelfed: JPEG up to 15 MB without metadata, the prompt beside it as alt text; civitai: PNG with parameters;
    web: small WebP without metadata.
    """
    from fluxsplit.cli_export import run_export  # noqa: PLC0415  only where it is needed
    from fluxsplit.progress import Progress  # noqa: PLC0415

    with Progress(json_lines=bool(json), quiet=bool(quiet), debug=debug) as progress:
        raise typer.Exit(run_export(files, target, out, not no_ai_mark, progress))


RUN_EXAMPLES = """Examples:
  fluxsplit run workflows/sample.toml
  fluxsplit run workflows/sample.toml --seed 8..15 --dry-run
"""


@app.command(
    cls=GroupedCommand,
    epilog=RUN_EXAMPLES,
    short_help="Run a workflow file.",
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False},
)
def run(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(metavar="FILE.toml", help="One table, named as its command."),
    ],
    debug: Debug = False,
) -> None:
    """Run a workflow file: the settings of one command, named as their flags.

    Flags of that command may follow the file, and overrule it.
    """
    from fluxsplit.settings import read_workflow  # noqa: PLC0415

    command, settings = read_workflow(Path(file).expanduser())
    flags = _parsed(command, context.args, context)
    raise typer.Exit(_run(command, settings | _given(flags), debug=debug or bool(flags.params["debug"])))


def _parsed(name: str, words: Sequence[str], context: typer.Context) -> Any:
    """The flags of command `name` in these words; what it must be given besides comes from elsewhere."""
    command: Any = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for parameter in command.params:
        parameter.required = False
    return command.make_context(name, list(words), parent=context.parent)


def _given(context: typer.Context) -> dict[str, Any]:
    """The flags that were given, by name."""
    given = {name.rstrip("_"): value for name, value in context.params.items() if value not in (None, [], ())}
    return {name: value for name, value in given.items() if name != "debug"}


def _runner(command: str) -> Callable[[dict[str, Any], dict[str, Any], Progress], int]:
    """The function of a command; only the one that is run is imported, since together they take as long as it does."""
    match command:
        case "sample":
            from fluxsplit.cli_sample import sample as runner  # noqa: PLC0415
        case "preview":
            from fluxsplit.cli_preview import preview as runner  # noqa: PLC0415
        case "rerender":
            from fluxsplit.cli_rerender import rerender as runner  # noqa: PLC0415
        case "decode":
            from fluxsplit.cli_decode import decode as runner  # noqa: PLC0415
        case "encode":
            from fluxsplit.cli_encode import encode as runner  # noqa: PLC0415
        case "upscale":
            from fluxsplit.cli_upscale import upscale as runner  # noqa: PLC0415
        case "peek":
            from fluxsplit.cli_peek import peek as runner  # noqa: PLC0415
        case _:
            raise ValueError(f"no function is known for {command!r}")
    return runner


def _run(command: str, given: dict[str, Any], *, debug: bool) -> int:
    """Do a command, with progress on stderr and results on stdout; returns the exit code."""
    from fluxsplit.progress import Progress  # noqa: PLC0415
    from fluxsplit.settings import defaults  # noqa: PLC0415

    settings = defaults(command, os.environ)
    quiet = bool(given.get("quiet", settings.get("quiet", False)))
    with Progress(json_lines=bool(given.get("json")), quiet=quiet, debug=debug) as progress:
        try:
            code = _runner(command)(given, settings, progress)
        except FluxsplitError as error:
            _say_where_set(error, command, {key: value for key, value in settings.items() if key not in given})
            raise
        if progress.failures > 1:
            progress.note(f"{progress.failures} failed")
        return code


def _say_where_set(error: FluxsplitError, command: str, settings: dict[str, Any]) -> None:
    """Add where a setting was set, if by no flag: to what names it and its value, as in `x.png: --vram '8X' is`, and to
    what would have another given."""
    from fluxsplit.settings import set_in  # noqa: PLC0415

    begun = re.match(r"(?:(?:.*: )?--)?([a-z]+(?:-[a-z]+)*) ", error.message)
    advised = re.search(r"\bgive --([a-z]+(?:-[a-z]+)*)", error.hint)
    for found, label in ((begun, "set in"), (advised, "{} is set in")):
        key = found[1].replace("-", "_") if found else ""
        if found is None or key not in settings:
            continue
        value = settings[key]
        shown = (str(value), f"{value:g}" if isinstance(value, float) else "")
        is_named = found is advised or any(text and text in error.message for text in shown)
        if is_named and (place := set_in(command, key, os.environ)):
            error.message += f" ({label.format(found[1])} {place})"
            return


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit; every error ends here as one line on stderr."""
    words = sys.argv[1:] if arguments is None else arguments
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):  # names of files need not be valid text
        with suppress(AttributeError, OSError, ValueError):
            if os.name == "posix":  # names are bytes, and go out as they came in, whatever the locale
                stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
            else:  # in pipes and files UTF-8, as we read it, and not the old code page
                encoding = None if stream.isatty() else "utf-8"
                stream.reconfigure(encoding=encoding, errors="replace")  # type: ignore[union-attr]
    _interrupt_on("SIGTERM", "SIGHUP", "SIGBREAK")
    try:
        app(words)
    except FluxsplitError as error:
        _fail(error.line(), error, "--debug" in words)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(INTERRUPTED_EXIT_CODE)
    except SystemExit as ended:  # typer makes one of a KeyboardInterrupt
        if ended.code == INTERRUPTED_EXIT_CODE:
            _say_interrupted()
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        sys.exit(1)
    except OSError as error:
        _fail(refusal(error).line(), error, "--debug" in words)
        sys.exit(1)
    except Exception as error:
        _fail(
            f"{type(error).__name__}: {error}; this is a bug, run with --debug for its place", error, "--debug" in words
        )
        sys.exit(1)
    sys.exit(0)


def _open_what_is_closed() -> None:
    """Of a closed stdout or stderr (`>&-`) Python makes None; what is written to it goes nowhere then."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  (to the end)


def _say_interrupted() -> None:
    """On a line of its own, not behind the terminal's ^C."""
    with suppress(AttributeError, OSError, ValueError):  # as where the terminal is gone
        newline = "\n" if sys.stderr.isatty() else ""
        print(f"{newline}fluxsplit: interrupted", file=sys.stderr)


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
