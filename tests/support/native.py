"""Marks for tests of the native kernels, which are skipped where the extension is not built."""

from __future__ import annotations

import pytest
import torch

from fastcfg.ops import instruction_sets, native_problem

_PROBLEM = native_problem(torch.device("cpu"))
built = pytest.mark.skipif(bool(_PROBLEM), reason=_PROBLEM)
# Backends that run the native kernels where they can.
chosen = pytest.mark.parametrize("backend", ["auto", pytest.param("native", marks=built)])
every_set = pytest.mark.parametrize("instructions", instruction_sets())
