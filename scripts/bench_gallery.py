"""Measures the gallery with many pictures in a real Chromium, and takes its screenshot.

    python scripts/bench_gallery.py                      # 1,000 pictures
    python scripts/bench_gallery.py --count 5000 --shot gallery.png

A server and a browser on one machine, so that both compete for its cores. Thumbnails are made while the page
is looked at the first time (`cold`), and come from the cache the second time (`warm`). `cpu_ms` is what the page's main
thread computed, script, style and layout, which other programs' load does not change; other milliseconds are by
the clock. Needs playwright and a Chromium. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fluxsplit.gallery_index import GalleryIndex
from fluxsplit.picks import Pick, add_pick
from gallery_pictures import prompt_of, write_previews, write_render

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCROLL = """async (screens) => {
  const box = document.getElementById('scroll'), gaps = [];
  box.scrollTop = 0;
  await new Promise(requestAnimationFrame);
  let last = performance.now();
  const end = box.clientHeight * screens;
  while (box.scrollTop < Math.min(end, box.scrollHeight - box.clientHeight - 1)) {
    box.scrollTop += box.clientHeight / 10;
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    gaps.push(now - last);
    last = now;
  }
  gaps.sort((a, b) => a - b);
  const at = (share) => gaps[Math.min(gaps.length - 1, Math.floor(share * gaps.length))];
  return {frames: gaps.length, median_ms: at(0.5), p95_ms: at(0.95), worst_ms: gaps[gaps.length - 1],
    mounted: document.querySelectorAll('.cell').length};
}"""
FILTER = """async (text) => {
  const box = document.getElementById('prompt-filter');
  const start = performance.now();
  box.value = text;
  box.dispatchEvent(new Event('input'));
  await new Promise(requestAnimationFrame);
  await new Promise((done) => { const c = new MessageChannel(); c.port1.onmessage = done; c.port2.postMessage(0); });
  return [performance.now() - start, document.getElementById('shown').textContent];
}"""
KEYS = """async (presses) => {
  const gaps = [];
  for (let n = 0; n < presses; n++) {
    const start = performance.now();
    document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', code: 'ArrowRight', bubbles: true}));
    gaps.push(performance.now() - start);
  }
  gaps.sort((a, b) => a - b);
  return gaps[Math.floor(gaps.length / 2)];
}"""


def main() -> None:
    """Make the pictures, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--shot", type=Path, help="where to keep a screenshot")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, given.count)
        report = {"pictures": given.count, "index_cpu_s": index_cpu_s(folder), **measure(folder, given)}
    print(json.dumps(report))


def prepare(folder: Path, count: int) -> None:
    """Previews in groups of 25, some results, some decisions."""
    print(f"making {count} pictures", file=sys.stderr)
    write_previews(folder / "previews", count)
    (folder / "renders").mkdir()
    for number in (1, 4):
        write_render(folder / "renders", number, 0)
    for number, (pick, stars) in enumerate((("pick", 4), ("reject", 0), (None, 3), ("pick", 5), (None, 0)), 1):
        add_pick(folder / "previews", Pick(f"{number:04d}.png", pick, stars))


def index_cpu_s(folder: Path) -> dict[str, float]:
    """CPU seconds to read all pictures, and of one look at a folder in which nothing changed."""
    index = GalleryIndex(folder / "previews", folder / "renders", b"x")
    before = resource.getrusage(resource.RUSAGE_SELF)
    while index.refresh():
        pass
    read = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(10):
        index.refresh()
    idle = resource.getrusage(resource.RUSAGE_SELF)
    cpu = [usage.ru_utime + usage.ru_stime for usage in (before, read, idle)]
    return {"all": round(cpu[1] - cpu[0], 3), "unchanged": round((cpu[2] - cpu[1]) / 10, 4)}


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Start the command, open its page twice, measure what a person would notice."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415  not needed by the rest

    environment = {**os.environ, "FLUXSPLIT_CACHE": str(folder / "cache")}
    words = [sys.executable, "-m", "fluxsplit", "gallery", "--no-open", str(folder / "previews")]
    words += ["--renders", str(folder / "renders")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=given.chromium, args=FLAGS)
            cold = visit(browser, url, given)
            warm = visit(browser, url, given)
            browser.close()
    finally:
        process.terminate()
        process.wait()
    return {"cold": cold, "warm": warm}


def visit(browser: Any, url: str, given: argparse.Namespace) -> dict[str, Any]:
    """One visit with an empty browser cache."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    devtools = context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(url)
    first = "performance.getEntriesByName('first picture')[0]?.startTime"
    wait_for(page, first)
    found = {"first_picture_ms": round(page.evaluate(first))}
    wait_for(page, f"document.getElementById('shown').textContent.startsWith('{given.count} pictures')")
    found["all_listed_ms"] = round(page.evaluate("performance.now()"))
    if given.shot:
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(4000)
        page.screenshot(path=str(given.shot))
    before_ms = cpu_ms(devtools)
    scroll = page.evaluate(SCROLL, 30)
    scroll["cpu_ms"] = (cpu_ms(devtools) - before_ms) / scroll["frames"]
    found["scroll"] = {name: round(value, 1) for name, value in scroll.items()}
    times, before_ms = [], cpu_ms(devtools)
    for text in (prompt_of(3), "fog", "lighthouse noon", "nothing like it", ""):
        elapsed_ms, told = page.evaluate(FILTER, text)
        times.append(elapsed_ms)
        print(f"{text!r}: {told}, {elapsed_ms:.1f} ms", file=sys.stderr)
    each_ms = (cpu_ms(devtools) - before_ms) / len(times)
    median_ms = sorted(times)[len(times) // 2]
    found["filter"] = {"median_ms": round(median_ms, 1), "worst_ms": round(max(times), 1), "cpu_ms": round(each_ms, 1)}
    found["arrow_ms"] = round(page.evaluate(KEYS, 200), 2)
    context.close()
    return found


def wait_for(page: Any, condition: str) -> None:
    """Wait until an expression is true; playwright's own way evaluates text, which the content policy refuses."""
    end_s = time.monotonic() + 120
    while not page.evaluate(condition):
        if time.monotonic() > end_s:
            raise TimeoutError(condition)
        page.wait_for_timeout(5)


def cpu_ms(devtools: Any) -> float:
    """Milliseconds that the page's main thread has computed so far."""
    metrics = {metric["name"]: metric["value"] for metric in devtools.send("Performance.getMetrics")["metrics"]}
    return 1000 * float(metrics["TaskDuration"])


if __name__ == "__main__":
    main()
