"""The stages: each runs in a process of its own, and this is the only room that wires rooms.

`python -m fluxsplit.stages STAGE` reads a job from stdin and writes events; see docs/architecture.md.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback

from fluxsplit.errors import INTERRUPTED_EXIT_CODE, FluxsplitError, OutOfMemory, is_out_of_memory, memory_hint
from fluxsplit.events import Events, read_job
from fluxsplit.jobs import STAGES, job_from_json

_HEAVY = {
    "text": "fluxsplit.stage_text",
    "sample": "fluxsplit.stage_sample",
    "decode": "fluxsplit.stage_decode",
    "encode": "fluxsplit.stage_encode",
    "upscale": "fluxsplit.stage_upscale",
    "peek": "fluxsplit.stage_peek",
    "device": "fluxsplit.stage_device",
}


def main() -> int:
    """Run the stage named on the command line; returns its exit code."""
    stage = sys.argv[1] if len(sys.argv) == 2 else ""
    if stage not in STAGES:
        print(f"usage: python -m fluxsplit.stages {'|'.join(STAGES)}", file=sys.stderr)
        return 2
    events = Events.claim_stdout()
    try:
        run = importlib.import_module(_HEAVY[stage]).run
        events.send("ready")
        line = read_job()
        if not line:
            return 1
        run(job_from_json(stage, line), events)
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except BaseException as error:
        known = as_error(error, stage)
        code = known.exit_code
        events.send("error", exit_code=code, message=known.message, hint=known.hint, traceback=traceback.format_exc())
        return code
    events.done()
    return 0


def as_error(error: BaseException, stage: str) -> FluxsplitError:
    """What to tell the person about anything that a stage raised."""
    if isinstance(error, FluxsplitError):
        return error
    text = str(error)
    if is_out_of_memory(error):
        detail = text.splitlines()[0][:300] if text else "memory ran out"
        return OutOfMemory(f"the {stage} stage ran out of memory: {detail}", memory_hint(stage))
    return FluxsplitError(
        f"the {stage} stage failed: {type(error).__name__}: {text[:300]}", "run it again with --debug"
    )


def keep_tuned() -> None:
    """Have torch write what TunableOp found for products, which some versions do only where a process ends in order."""
    torch = sys.modules.get("torch")
    write = getattr(torch.cuda.tunable, "write_file", None) if torch is not None else None
    if write is not None and os.environ.get("PYTORCH_TUNABLEOP_ENABLED") == "1":
        with contextlib.suppress(RuntimeError):
            write()


if __name__ == "__main__":
    code = main()
    keep_tuned()
    sys.stderr.flush()
    # Not sys.exit: the driver frees the memory either way, and interpreter shutdown with a mapped 12 GB file is slow.
    os._exit(code)
