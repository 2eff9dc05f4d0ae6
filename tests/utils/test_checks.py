"""Checks of arguments: numbers by protocol, and what the messages say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fastcfg.utils.checks import as_integer, as_number, check_count, check_finite, check_one_of, check_shape, listed

pytestmark = pytest.mark.quick

THREES = (3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32))
NO_INTEGERS = (3.0, "3", None, True, np.True_, np.float32(3), torch.tensor(True), torch.tensor(3.0), [3], np.array([3]))
HALVES = (0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).half())
NO_NUMBERS = (True, np.True_, torch.tensor(True), "0.5", b"1", None, 1j, np.complex64(1), torch.tensor(1j), [0.5])


@pytest.mark.parametrize("value", THREES, ids=repr)
def test_integers_count_by_protocol(value: Any) -> None:
    assert (as_integer(value), type(as_integer(value)), as_number(value)) == (3, int, 3.0)
    assert check_count("n", value) == 3


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_what_is_no_integer(value: Any) -> None:
    assert as_integer(value) is None
    with pytest.raises(ValueError, match=r"^n: got .*, expected an integer of at least 1$"):
        check_count("n", value)


@pytest.mark.parametrize("value", HALVES, ids=repr)
def test_numbers_count_by_protocol(value: Any) -> None:
    assert (as_number(value), type(as_number(value))) == (0.5, float)
    assert check_finite("x", value, above=0) == 0.5


@pytest.mark.parametrize("value", [*NO_NUMBERS, np.array([0.5]), torch.tensor([0.5, 1.0])], ids=repr)
def test_what_is_no_number(value: Any) -> None:
    assert as_number(value) is None
    with pytest.raises(ValueError, match=r"^x: got .*, expected a finite number$"):
        check_finite("x", value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_count("n", 0), "n: got 0, expected an integer of at least 1"),
        (lambda: check_count("n", 6, 5), "n: got 6, expected an integer from 1 to 5"),
        (lambda: check_count("n", -1, least=0), "n: got -1, expected an integer of at least 0"),
        (lambda: check_finite("x", math.nan), "x: got nan, expected a finite number"),
        (lambda: check_finite("x", -0.5, least=0), "x: got -0.5, expected a finite value of at least 0"),
        (lambda: check_finite("x", math.inf, above=0), "x: got inf, expected a finite value above 0"),
        (lambda: check_finite("x", 0, above=0), "x: got 0, expected a finite value above 0"),
        (lambda: check_one_of("kind", "c", ("a", "b")), "kind: got 'c', expected one of a, b"),
        (lambda: check_shape("shape", (2,)), "shape: got (2,), expected (B, C, ...) of positive integers"),
        (lambda: check_shape("shape", (2, 0, 4)), "shape: got (2, 0, 4), expected (B, C, ...) of positive integers"),
        (lambda: check_shape("shape", (2, True, 4)), "shape: got (2, True, 4), expected (B, C, ...) of positive"),
        (lambda: check_shape("shape", 3), "shape: got 3, expected (B, C, ...) of positive integers"),
        (lambda: check_shape("size", "ab", 2, "[H, W]"), "size: got 'ab', expected [H, W] of positive integers"),
    ],
)
def test_messages_name_argument_got_and_expected(call: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value).startswith(message)


def test_values_in_range_are_returned_in_plain_types() -> None:
    assert check_count("n", 5, 5) == 5
    assert check_finite("x", 0, least=0) == 0.0
    assert check_one_of("kind", "a", ("a", "b")) == "a"
    assert check_shape("shape", torch.Size([2, 3, 4])) == (2, 3, 4)
    assert [type(size) for size in check_shape("shape", [np.int64(2), 3, 4])] == [int, int, int]


def test_names_are_listed() -> None:
    assert (listed(["a", "b"]), listed([]), listed("abcde", 2), listed("ab", 2)) == (
        "a, b",
        "nothing",
        "a, b and 3 more",
        "a, b",
    )
