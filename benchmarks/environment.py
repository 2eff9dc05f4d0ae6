"""Where a benchmark ran."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from fastcfg.cli.doctor import cpu_name
from fastcfg.cli.versions import commit, versions


def environment(device: torch.device, load_before: float | None) -> dict[str, Any]:
    """Versions, machine, load and commit, for a report.

    Args:
        device: what was measured.
        load_before: `load_average` before the measuring.
    """
    return {
        **versions(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": [load_before, load_average()],
        "commit": commit(),
    }


def load_average() -> float | None:
    """Others' and our own load of the machine, last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
