"""The state of the GPU around and during a benchmark, and what harms the numbers."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

import torch

from fastcfg.cli.nvml import nvml_states

# Why clocks are low although there is work; not GpuIdle, clocks set by a user, or SyncBoost.
HARMFUL = ("HwPowerBrakeSlowdown", "HwSlowdown", "HwThermalSlowdown", "SwPowerCap", "SwThermalSlowdown")
LOW_CLOCK, HOT, CONTEXT_MIB = 0.9, 80, 2048  # a CUDA context with its libraries takes about half a GiB


class GpuMonitor:
    """Context in which a GPU is watched; a CPU has nothing to read.

    Attributes:
        before, after: the state at the start and the end, as `fastcfg.cli.nvml.nvml_states` has it, and `torch_mib`,
            the memory of torch's allocator; None on a CPU, or without NVML.
    """

    def __init__(self, device: torch.device) -> None:
        self.before = self.after = None
        self._device, self._measured, self._problem = device, [], ""

    def __enter__(self) -> GpuMonitor:
        if self._device.type == "cuda":
            torch.empty(1, device=self._device)  # from now on the GPU lists this process among its users
            with suppress(Exception):
                importlib.import_module("pynvml").nvmlInit()  # kept open: a reading is cheap from now on
        self.before = self._read()
        return self

    def __exit__(self, *error: object) -> None:
        self.after = self._read()

    def snapshot(self, helper_mib: int | None = None) -> dict[str, Any] | None:
        """The state now, to be called while a workload is being measured; it counts in `notes`.

        Args:
            helper_mib: the memory of torch's allocator in our process that measures; None if this one does.
        """
        if (state := self._read()) is None:
            return None
        if helper_mib is not None:
            state["torch_mib"] += helper_mib
            others = state["other_processes"]
            state["other_processes"] = None if others is None else max(others - 1, 0)
        self._measured.append(state)
        return state

    def notes(self) -> list[str]:
        """What harms the numbers, in sentences; empty if nothing is known."""
        notes, states = [f"The GPU's state is unknown: {self._problem}."] if self._problem else [], self._measured
        slowed = [set(state["throttle_reasons"] or ()) for state in states]
        counts = {reason: sum(reason in reasons for reasons in slowed) for reason in HARMFUL}
        notes += [f"Throttled: {reason} in {n} of {len(states)} readings." for reason, n in counts.items() if n]
        around = [state for state in (self.before, *states, self.after) if state]
        others = [state["other_processes"] for state in around]
        used = max(((state["memory_used_mib"] or 0) - state["torch_mib"] for state in around), default=0)
        if sharing := max((n or 0 for n in others), default=0):
            notes.append(f"Shared with other processes: {sharing}.")
        elif None in others and used > CONTEXT_MIB:
            notes.append(
                f"Perhaps shared: {used / 1024:.1f} GiB beside torch's are used by processes that do not show."
            )
        busy = [state for state, reasons in zip(states, slowed, strict=True) if "GpuIdle" not in reasons]
        for name in ("sm_clock", "memory_clock"):
            clocks = [(state[f"{name}_mhz"] or 0, state[f"{name}_max_mhz"]) for state in busy]
            if (share := min((now / most for now, most in clocks if now and most), default=1.0)) < LOW_CLOCK:
                notes.append(f"The {name.replace('_', ' ')} was down to {share:.0%} of its maximum while measured.")
        hottest = max((state["temperature_c"] or 0 for state in around), default=0)
        return [*notes, f"Up to {hottest} °C."] if hottest >= HOT else notes

    def _read(self) -> dict[str, Any] | None:
        if self._device.type != "cuda":
            return None
        told, states = nvml_states([f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"])
        self._problem = "" if states else told
        return {**states[0], "torch_mib": torch.cuda.memory_reserved(self._device) // 2**20} if states else None
