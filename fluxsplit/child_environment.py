"""The environment and the command line that a stage process starts with.

Variables that must precede `import torch` are set here, each only where the person has not set it.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

KERNEL_RELEASE = Path("/proc/sys/kernel/osrelease")
KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
KEPT_BYTES, MAPPED_BYTES = 1 << 31, 1 << 26
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MIOPEN_FIND_MODE": "2",  # the exhaustive search took 10 to 23 minutes at the first decode (unsloth#11636)
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",
    # Threads of a product that wait for one another spin for a hundredth of a second by default. Where other programs
    # want the cores they spin instead of letting the last one run: 20 s for a picture of 3 s beside two of them.
    "GOMP_SPINCOUNT": "2000",
}
_OF_STAGE = {
    # glibc gives large pieces back at once and faults them in anew for the next activation, which took 1 s of a step of
    # 12.6 on a CPU. The largest ones go on being mapped: kept, they left holes of 200 MB. The VAE's strips are of many
    # sizes: there the holes would cost more than the faults do.
    "sample": {"MALLOC_MMAP_THRESHOLD_": str(MAPPED_BYTES), "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES)},
}


def module_command(module: str, *arguments: str) -> list[str]:
    """A command that runs a module of this package, with nothing taken from the current folder (`-P`)."""
    return [sys.executable, "-P", "-m", module, *arguments]


def own_process_group() -> dict[str, Any]:
    """Arguments of Popen that spare the process the terminal's Ctrl-C, which is its parent's to hear."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"process_group": 0}


def child_environment(base: Mapping[str, str], kfd_nodes: Path = KFD_NODES, *, stage: str = "") -> dict[str, str]:
    """`base` with what a stage needs set, where it is not set already."""
    environment = _DEFAULTS | _OF_STAGE.get(stage, {}) | dict(base)
    if can_grow_segments() and not any(name in base for name in _ALLOCATOR_SETTINGS):
        # else what was freed in one size is of no use for another, 0.7 GB of a 13 GB plan
        environment[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    if "HSA_OVERRIDE_GFX_VERSION" not in base and needs_gfx_override(gfx_versions(kfd_nodes)):
        environment["HSA_OVERRIDE_GFX_VERSION"] = "10.3.0"
    root = Path(__file__).absolute().parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # a checkout that may not be installed
        known = [part for part in (str(root), base.get("PYTHONPATH", "")) if part]
        environment["PYTHONPATH"] = ";".join(known) if sys.platform == "win32" else ":".join(known)
    return environment


def can_grow_segments(kernel: Path = KERNEL_RELEASE) -> bool:
    """Whether torch's allocator can be given segments that grow: Linux, NVIDIA.

    Older ROCm warns of it and does without. Under WSL some drivers fail at the first allocation (pytorch#192330).
    """
    if sys.platform != "linux" or is_rocm():
        return False
    with contextlib.suppress(OSError):
        return "microsoft" not in kernel.read_text().lower()
    return True


@functools.cache
def is_rocm() -> bool:
    """Whether the torch that is installed was built for AMD cards, without importing it."""
    try:
        return "+rocm" in version("torch")
    except PackageNotFoundError:
        return False


def gfx_versions(nodes: Path) -> list[int]:
    """`gfx_target_version` of every AMD graphics card that the kernel lists, as 100301 for gfx1031."""
    versions = []
    for properties in sorted(nodes.glob("*/properties")):
        with contextlib.suppress(OSError, ValueError):
            table = dict(line.split(None, 1) for line in properties.read_text().splitlines() if " " in line)
            versions.append(int(table.get("gfx_target_version", "0")))
    return [version for version in versions if version]


def needs_gfx_override(versions: Iterable[int]) -> bool:
    """Whether ROCm's gfx1030 kernels must be claimed: RDNA2 cards only, one of them not gfx1030 itself.

    gfx1031 and its sisters share gfx1030's instructions, but ROCm ships kernels for gfx1030 alone. The variable
    counts for every card, so that a card of another family beside it rules it out.
    """
    cards = list(versions)
    return all(100300 <= card <= 100306 for card in cards) and any(card != 100300 for card in cards)
