"""The `fluxsplit` command, also by `python -m fluxsplit`: what runs until `cli` is there to say that Ctrl-C came."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit; Ctrl-C during the first imports ends the process without a traceback."""
    catches = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where a shell's & has it ignored
    if catches:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fluxsplit.cli import main as run  # noqa: PLC0415

    if catches:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
