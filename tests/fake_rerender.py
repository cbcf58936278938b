"""Stands in for `python -m fluxsplit rerender … --json`: reads the picks, says what it does, writes the results.

`FAKE_STEP_S` slows it down; a picture named `0666.png` fails.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "scripts")]

from fluxsplit.picks import picked_names, read_picks  # noqa: E402
from gallery_pictures import write_render  # noqa: E402

words = sys.argv[1:]
value = {name: words[at + 1] for at, name in enumerate(words) if name.startswith("--") and at + 1 < len(words)}
renders = Path(value["--out"])
renders.mkdir(exist_ok=True)
failures = 0
names = picked_names(read_picks(value["--from-picks"]))
for image, name in enumerate(names):
    for step in range(4):
        time.sleep(float(os.environ.get("FAKE_STEP_S", "0.01")))
        task = {"key": "step", "title": f"image {image + 1} of {len(names)}", "done": step + 1, "total": 4}
        print(json.dumps({"progress": {**task, "detail": f"step {step + 1} of 4"}}), file=sys.stderr, flush=True)
    if name == "0666.png":
        failures += 1
        print("fluxsplit: 0666.png: no luck", file=sys.stderr, flush=True)
        continue
    number = int(Path(name).stem)
    path = write_render(renders, number, (number - 1) // 4)
    print(json.dumps({"path": str(path), "recipe": None}), flush=True)
sys.exit(1 if failures else 0)
