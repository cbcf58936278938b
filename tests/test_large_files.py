"""A weight file larger than memory and what may be promised of it: it opens, is shown, and renders."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fluxsplit"
DEMO = PACKAGE / "demo" / "flux-demo.safetensors"
TABLE = "text_encoders.t5xxl.transformer.shared.weight"


def memory_bytes(name: str) -> int:
    """A line of /proc/meminfo."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def write_large(path: Path, size_bytes: int) -> None:
    """The demo model with a table of T5's words so long, and for the most part a hole, that the file has this size."""
    data = DEMO.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = memoryview(data)[8 + length :]
    entries = {name: entry for name, entry in header.items() if name not in ("__metadata__", TABLE)}
    table = header[TABLE]
    order = sorted(entries, key=lambda name: entries[name]["data_offsets"][0])
    parts, at = [], 0
    for name in order:
        start, stop = entries[name]["data_offsets"]
        parts.append(body[start:stop])
        entries[name]["data_offsets"] = [at, at + stop - start]
        at += stop - start
    width_bytes = table["shape"][1] * 2
    rows = (size_bytes - at) // width_bytes
    entries[TABLE] = {**table, "shape": [rows, table["shape"][1]], "data_offsets": [at, at + rows * width_bytes]}
    text = json.dumps({"__metadata__": header["__metadata__"], **entries}).encode()
    text += b" " * (-len(text) % 8)  # as every writer pads it, so that no view is misaligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            file.write(part)
        start, stop = table["data_offsets"]
        file.write(body[start:stop])
        file.truncate(8 + len(text) + at + rows * width_bytes)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc/meminfo")
def test_a_file_larger_than_memory_opens_and_renders(tmp_path: Path) -> None:
    size_bytes = memory_bytes("MemTotal") + memory_bytes("SwapTotal") + memory_bytes("CommitLimit") + (1 << 30)
    path = tmp_path / "large.safetensors"
    write_large(path, size_bytes)
    if path.stat().st_blocks * 512 > 1 << 30 or shutil.disk_usage(tmp_path).free < 1 << 30:
        pytest.skip("this file system keeps no holes")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "fluxsplit"]
    shown = subprocess.run([*command, "info", path], env=environment, capture_output=True, text=True, check=True)
    assert "all-in-one" in shown.stdout
    words = ["sample", "-m", path, "--tokenizers", PACKAGE / "demo" / "tokenizers", "-p", "a red circle", "--seed", "7"]
    made = subprocess.run(
        [*command, *words, "--size", "64x64", "--out", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    same = subprocess.run(
        [*command, "sample", "-p", "a red circle", "--seed", "7", "--size", "64x64", "--out", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    shas = []
    for printed in (made.stdout, same.stdout):
        words = [*command, "info", "--json", printed.strip()]
        report = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
        shas.append(json.loads(report)["payload_sha256"])
    assert shas[0] == shas[1]
