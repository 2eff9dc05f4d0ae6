"""Which items of its config a step reads, in whatever way it does."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from fastcfg.compiler.step import UntraceableError
from fastcfg.compiler.step.config import ConfigReads, noting
from fastcfg.frontends._fused import steps
from fastcfg.frontends.diffusers import fuse

pytestmark = pytest.mark.quick
ITEMS = {"first": 1.0, "second": [1, 2], "third": None}


class Odd(dict[str, Any]):
    """Reads its items in its own way."""

    def __getitem__(self, name: str) -> Any:
        return len(self) or super().__getitem__(name)


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (lambda config: config["first"], {"first"}),
        (lambda config: config.get("first"), {"first"}),
        (lambda config: config.get("fourth", 1), {"fourth"}),
        (lambda config: "second" in config, {"second"}),
        (lambda config: "{first}".format_map(config), {"first"}),
        (lambda config: (isinstance(config, dict), config.__class__), set()),
        (dict, None),
        (list, None),
        (len, None),
        (bool, None),
        (str, None),
        (json.dumps, None),
        (copy.copy, None),
        (copy.deepcopy, None),
        (lambda config: config.copy(), None),
        (lambda config: list(config.keys()), None),
        (lambda config: dict(**config), None),
        (lambda config: {**config}, None),
        (lambda config: {} | config, None),
        (lambda config: config | {}, None),
        (lambda config: config == {}, None),
        (lambda config: config != {}, None),
        (lambda config: list(config.items()), None),
        (lambda config: list(config.values()), None),
        (lambda config: list(reversed(config)), None),
    ],
)
@pytest.mark.parametrize("kind", [dict, OrderedDict, FrozenDict])
def test_what_is_read_is_noted(kind: Any, read: Callable[[Any], Any], names: set[str] | None) -> None:
    reads, config = ConfigReads(), kind(ITEMS)
    copied = noting(config, reads)
    assert reads.items() == set()
    want = read(config)
    got = read(copied)
    assert got == want
    assert type(got) is type(want)
    assert reads.items() == names


def test_attributes_are_items_too() -> None:
    reads, config = ConfigReads(), FrozenDict(ITEMS)
    config.fifth = 5  # as code in the wild sets them
    copied = noting(config, reads)
    assert (copied.first, copied.fifth, hasattr(copied, "sixth")) == (1.0, 5, False)
    assert reads.items() == {"first", "fifth", "sixth"}
    assert vars(copied)["third"] is None
    assert reads.items() is None


@pytest.mark.parametrize("kind", [dict, FrozenDict])
def test_a_step_must_not_change_it(kind: Any) -> None:
    config = kind(ITEMS)
    copied = noting(config, ConfigReads())
    with pytest.raises(UntraceableError, match="changes its config"):
        copied["first"] = 2.0
    with pytest.raises(UntraceableError, match="changes its config"):
        copied.first = 2.0
    with pytest.raises(UntraceableError, match="changes its config"):
        del copied["first"]
    for change in (lambda: copied.update(first=2.0), lambda: copied.pop("first"), lambda: copied.setdefault("last", 1)):
        with pytest.raises(UntraceableError, match="changes its config"):
            change()
    assert config == kind(ITEMS)


def test_a_class_with_its_own_ways_is_read_as_a_whole() -> None:
    reads, config = ConfigReads(), Odd(ITEMS)
    assert noting(config, reads) is config
    assert reads.items() is None


def test_a_step_is_traced_again_only_for_items_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import EulerDiscreteScheduler

    calls, traced, x = [], steps.trace_step, torch.linspace(-1, 1, 32).view(1, 2, 4, 4)
    monkeypatch.setattr(steps, "trace_step", lambda *args: calls.append(1) or traced(*args))

    def step(unread: str, read: str, attribute: str | None = None) -> None:
        both = []
        for own in (fuse(EulerDiscreteScheduler()), EulerDiscreteScheduler()):
            own.register_to_config(unread=unread, prediction_type=read)
            if attribute is not None:
                own.config.prediction_type = attribute
            own.set_timesteps(7)
            own.is_scale_input_called = True
            both.append(own.step(0.5 * x, own.timesteps[0], 10 * x).prev_sample)
        torch.testing.assert_close(*both)

    counts = []
    for arguments in (("a", "epsilon"), ("b", "epsilon"), ("b", "v_prediction"), ("a", "epsilon", "v_prediction")):
        step(*arguments)
        counts.append(len(calls))
    assert counts == [1, 1, 2, 3]
