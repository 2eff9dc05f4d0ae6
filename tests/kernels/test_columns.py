"""The kernels' offsets into a row of the table."""

from __future__ import annotations

import pytest
import triton.language as tl

from fastcfg.kernels import _columns
from fastcfg.table import DEVICE_COLUMNS

pytestmark = pytest.mark.quick


def test_offsets_are_the_table_s_columns() -> None:
    constants = {name: int(item) for name, item in vars(_columns).items() if isinstance(item, tl.constexpr)}
    assert constants.pop("WIDTH") == len(DEVICE_COLUMNS)
    assert constants == {name.upper(): index for index, name in enumerate(DEVICE_COLUMNS)}
