"""Every test has a home and a cache of its own; heavy ones compute on one thread."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

# before any room of ours, which would have diffusers believe that transformers is missing; one test compares pipelines
import diffusers.utils.import_utils  # noqa: F401
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as behind a shell's `&`: every process of ours would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("FLUXSPLIT_CACHE", str(home / "cache"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums then have one order on every machine. Tests of the light rooms do not import torch for this."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
