"""The state of NVIDIA GPUs, through nvidia-ml-py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def nvml_states(uuids: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """The driver's version, and per GPU a dict of power, clocks, temperature, reasons for low clocks, users (None for
    a value that NVML does not report); or the reason why there are none, and no dicts.

    GPUs are named by torch's UUIDs: CUDA and NVML number them differently.
    """
    try:
        import pynvml
    except ImportError:
        return "the package nvidia-ml-py is not installed", []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return str(error), []
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        # Older versions of the package return bytes.
        driver = driver.decode() if isinstance(driver, bytes) else driver
        return driver, [_state(pynvml, uuid) for uuid in uuids]
    except pynvml.NVMLError as error:  # NVML does not know the UUID of a part of a divided GPU
        return str(error), []
    finally:
        pynvml.nvmlShutdown()


def _state(nvml: Any, uuid: str) -> dict[str, Any]:
    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except nvml.NVMLError:
            return None

    gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
    limit, power = ask(nvml.nvmlDeviceGetPowerManagementLimit, gpu), ask(nvml.nvmlDeviceGetPowerUsage, gpu)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu)
    memory = ask(nvml.nvmlDeviceGetMemoryInfo, gpu, nvml.nvmlMemory_v2)  # version 1 includes the driver's own
    pids = [process.pid for process in ask(nvml.nvmlDeviceGetComputeRunningProcesses, gpu) or ()]
    return {
        "power_limit_w": None if limit is None else limit / 1000,
        "power_w": None if power is None else power / 1000,
        "sm_clock_mhz": ask(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_SM),
        "sm_clock_max_mhz": ask(nvml.nvmlDeviceGetMaxClockInfo, gpu, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": ask(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_MEM),
        "memory_clock_max_mhz": ask(nvml.nvmlDeviceGetMaxClockInfo, gpu, nvml.NVML_CLOCK_MEM),
        "temperature_c": ask(nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU),
        "throttle_reasons": None if reasons is None else _reasons(nvml, reasons),
        "utilization_percent": getattr(ask(nvml.nvmlDeviceGetUtilizationRates, gpu), "gpu", None),
        "memory_used_mib": None if memory is None else memory.used // 2**20,
        # A container hides or renumbers processes: a list without this one says nothing.
        "other_processes": len(pids) - 1 if os.getpid() in pids else None,
    }


_PREFIX = "nvmlClocksThrottleReason"


def _reasons(nvml: Any, bits: int) -> list[str]:
    """Names of the reasons set in a bit mask."""
    masks = {name.removeprefix(_PREFIX): getattr(nvml, name) for name in dir(nvml) if name.startswith(_PREFIX)}
    return sorted(name for name, mask in masks.items() if isinstance(mask, int) and name != "All" and bits & mask)
