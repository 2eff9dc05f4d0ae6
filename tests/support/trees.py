"""Comparison of nested containers of tensors."""

from __future__ import annotations

import torch


def assert_equal_trees(a: object, b: object) -> None:
    """Nested containers hold bitwise equal tensors and equal numbers."""
    if isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple))
        for left, right in zip(a, b, strict=True):
            assert_equal_trees(left, right)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
