"""The captured loop on a GPU: the checks of `python -m benchmarks graphs`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.graphs import CHECKS, NotHereError

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    try:
        CHECKS[name](torch.device("cuda", torch.cuda.current_device()))
    except NotHereError as reason:
        pytest.skip(str(reason))
