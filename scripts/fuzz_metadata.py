"""Mutates files of every known tool and reads them; anything but a typed error, or too much memory, is a find.

    python scripts/fuzz_metadata.py --runs 1000000

Prints how many were read, refused and how much memory the process took at most; a find is kept and ends the run.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from foreign_files import CASES, mutate  # type: ignore[import-not-found]

from fluxsplit.errors import FluxsplitError
from fluxsplit.found import read_found

SLOW_S = 5.0


def main() -> None:
    """Run the loop and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-find"), help="where a find is written")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    known = refused = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "x"
        originals = []
        for case in CASES:
            case.write(path)
            originals.append(path.read_bytes())
        for _ in range(args.runs):
            data = mutate(rng.choice(originals), rng)
            path.write_bytes(data)
            started = time.process_time()
            try:
                known += read_found(path).tool is not None
            except FluxsplitError:
                refused += 1
            except BaseException:
                args.keep.write_bytes(data)
                raise
            if time.process_time() - started > SLOW_S:
                args.keep.write_bytes(data)
                raise SystemExit(f"over {SLOW_S} s; kept as {args.keep}")
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"runs": args.runs, "recipes": known, "refused": refused, "peak_mb": round(peak_mb)}))


if __name__ == "__main__":
    main()
