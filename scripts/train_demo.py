"""Train the demo model that ships with the package, from nothing.

    python scripts/train_demo.py all --work DIR --minutes 60
    torchrun --nproc-per-node 2 scripts/train_demo.py flow --work DIR --minutes 60

Each step can be run alone (`text`, `vae`, `flow`, `check`, `export`); `flow` and `vae` resume
from their checkpoints in the work folder. Minutes count training over all runs together.
`unpack` makes such checkpoints from the packaged model, to go on from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

DEMO_FOLDER = Path(__file__).resolve().parent.parent / "fluxsplit" / "demo"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("text", "vae", "flow", "check", "export", "unpack", "all"))
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and logs")
    parser.add_argument("--demo", type=Path, default=DEMO_FOLDER, help="where the demo is kept")
    parser.add_argument("--minutes", type=float, default=60.0, help="flow training time")
    parser.add_argument("--text-minutes", type=float, default=7.0)
    parser.add_argument("--vae-minutes", type=float, default=25.0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's choice")
    parser.add_argument(
        "--rope-short-side-tokens",
        type=int,
        default=8,
        help="positions the shorter side spans at any size; 0 for Flux's plain indices",
    )
    parser.add_argument("--batch", type=int, default=32, help="128x128 pictures a step")
    parser.add_argument("--assisted", action="store_true", help="a second process on a CPU that others use too")
    parser.add_argument("--dtype", choices=("fp8", "fp32"), default="fp8", help="of the export")
    parser.add_argument("--shift", type=float, default=3.0, help="sampling shift at 64 tokens")
    parser.add_argument("--pairs", type=int, default=100, help="prompts to check at each size")
    parser.add_argument("--sizes", default="128x128,256x256", help="sizes to check")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--steps", type=int, default=4, help="Euler steps of the check")
    return parser.parse_args()


def main() -> None:
    """Run one step, or all in order."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    from demo_flow import FlowConfig

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizers = options.demo / "tokenizers"
    step = options.step
    config = FlowConfig(batch=options.batch, rope_short_side_tokens=options.rope_short_side_tokens)
    if step == "unpack":
        from demo_import import unpack

        print(unpack(options.demo, options.work, config))
    if step in ("text", "all"):
        from demo_text import train_text

        train_text(options.work, tokenizers, options.text_minutes, device)
    if step in ("vae", "all"):
        from demo_vae import train_vae

        train_vae(options.work, options.vae_minutes, device)
    if step in ("flow", "all"):
        from demo_assistant import train_flow

        train_flow(options.work, tokenizers, config, options.minutes, device, options.assisted)
    if step in ("check", "all"):
        from demo_check import check_flow

        print(json.dumps(check_flow(options, device)))
    if step in ("export", "all"):
        from demo_export import export

        print(export(options.work, options.demo, options.dtype, options.shift))


if __name__ == "__main__":
    main()
