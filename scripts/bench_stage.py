"""Runs a stage as the product does, with the card's allocator capped, and notes the allocator's peaks at the end.

    python scripts/bench_stage.py STAGE REPORT CAP_BYTES        # 0 for no cap

The job and the events go the usual way. REPORT becomes a JSON file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from fluxsplit import stages


def main() -> int:
    """Cap, run the stage, report; returns the stage's exit code."""
    stage, report, cap_bytes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if cap_bytes and torch.cuda.is_available():
        total_bytes = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total_bytes))
    sys.argv = ["stages", stage]
    code = stages.main()
    peaks = {}
    if torch.cuda.is_available():
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    report.write_text(json.dumps(peaks))
    return code


if __name__ == "__main__":
    exit_code = main()
    sys.stderr.flush()
    os._exit(exit_code)  # as the product's own entry ends
