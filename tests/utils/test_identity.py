"""Keys of values by their contents."""

from __future__ import annotations

import pytest
import torch

from fastcfg.utils.identity import value_key

pytestmark = pytest.mark.quick
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_and_layout_have_a_key(dtype: torch.dtype) -> None:
    for tensor in (torch.ones(()), torch.ones(1).expand(1), torch.ones(2, 3).t(), torch.ones(1, 1).expand(4, 1)):
        a, b = tensor.to(dtype), tensor.to(dtype).contiguous()
        assert value_key(a) == value_key(b)
        assert value_key(a) != value_key(torch.zeros_like(b))
