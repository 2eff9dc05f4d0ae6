"""Test settings that must stand before torch and triton are imported, and shared fixtures."""

from __future__ import annotations

import os
from typing import Any

# One thread: results do not depend on the machine's cores, and parallel test workers do not compete.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

pytest.register_assert_rewrite("support.captured_loop", "support.machine_code")

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined. Tests that compile kernels do so in subprocesses without it.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    """Make the Triton interpreter round ``tl.fma`` once."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from support.interpreter_fma import round_once

        round_once()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the current CUDA device where there is one."""
    return torch.device("cpu") if request.param == "cpu" else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` and ``torch.empty_like`` return with NaN, so that unwritten output shows."""

    def poisoned(allocate: Any) -> Any:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
