"""The device stage: says what the device that would compute is, so that a dry run can plan for it without torch."""

from __future__ import annotations

from dataclasses import asdict

from fluxsplit.device import DTYPE_NAMES, device_info, pick_device, pick_dtype
from fluxsplit.events import Events
from fluxsplit.jobs import DeviceJob
from fluxsplit.rates import with_file_rates, with_rates


def run(job: DeviceJob, events: Events) -> None:
    """Send one event `device` with the fields of DeviceInfo and the dtype that `auto` means there."""
    device = pick_device(job.device)
    dtype = pick_dtype(job.dtype, device, job.parameters)
    info = with_rates(device_info(device), device, dtype, job.hidden, job.head, job.tokens)
    info = with_file_rates(info, job.path, job.weight_bytes)
    events.send("device", dtype=DTYPE_NAMES[dtype], **asdict(info))
