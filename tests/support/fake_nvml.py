"""A stand-in for nvidia-ml-py."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any


class FakeNvml:
    """nvidia-ml-py on a machine with one GPU, "GPU-1", that does not tell its power; attributes are what it tells."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU, nvmlMemory_v2 = 1, 2, 0, 2  # noqa: N815
    nvmlClocksThrottleReasonNone = 0  # noqa: N815
    nvmlClocksThrottleReasonGpuIdle = 1  # noqa: N815
    nvmlClocksThrottleReasonSwPowerCap = 4  # noqa: N815
    nvmlClocksThrottleReasonHwSlowdown = 8  # noqa: N815
    nvmlClocksThrottleReasonAll = 15  # noqa: N815

    class NVMLError(Exception):
        """Its base error."""

    def __init__(self, driver: str | None = "580.1") -> None:
        self.driver, self.running = driver, 0
        self.clocks, self.temperature, self.reasons = {1: 1500, 2: 3200}, 41, 5
        self.pids, self.used = [os.getpid(), 1], 3 * 2**30

    def nvmlInit(self) -> None:  # noqa: N802
        if self.driver is None:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.running += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.running -= 1

    def nvmlSystemGetDriverVersion(self) -> Any:  # noqa: N802
        return self.driver.encode() if self.driver else None

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-1":
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetPowerManagementLimit(self, gpu: str) -> int:  # noqa: N802
        return 700_000

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:  # noqa: N802
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetClockInfo(self, gpu: str, clock: int) -> int:  # noqa: N802
        return self.clocks[clock]

    def nvmlDeviceGetMaxClockInfo(self, gpu: str, clock: int) -> int:  # noqa: N802
        return {1: 1980, 2: 3201}[clock]

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> int:  # noqa: N802
        return self.temperature

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: str) -> int:  # noqa: N802
        return self.reasons

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=97, memory=30)

    def nvmlDeviceGetMemoryInfo(self, gpu: str, version: int) -> Any:  # noqa: N802
        assert version == 2
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: str) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid) for pid in self.pids]
