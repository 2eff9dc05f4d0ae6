"""Objects of other projects: attributes, helpers and errors that theirs have, and how their calls are reported."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from support.own_diffusion import OwnDiffusion
from torch import Tensor

import fastcfg
from fastcfg.frontends._gaussian.side_effects import is_simple

pytestmark = pytest.mark.quick

SHAPE = (2, 3, 4, 5)
WRITTEN: list[int] = []


def network(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return torch.sin(2 * x + 0.1 * t.reshape(-1, 1, 1, 1))


def same_images(own: Any, model: Any = network, calls: int = 3, **options: Any) -> Any:
    """An accelerated object, whose calls were as its original's."""
    fast = fastcfg.accelerate(own)
    for seed in range(calls):
        results = []
        for diffusion in (own, fast):
            torch.manual_seed(seed)
            results.append((diffusion.p_sample_loop(model, SHAPE, **options), torch.get_rng_state()))
        (want, before), (got, after) = results
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        assert torch.equal(before, after)
    return fast


def test_nothing_is_reported_before_the_first_call_of_a_loop() -> None:
    fast = fastcfg.accelerate(OwnDiffusion())
    assert fastcfg.report(fast) == {}
    fast.p_sample(network, torch.randn(SHAPE), torch.tensor([3, 3]))
    assert fastcfg.report(fast) == {}
    with pytest.raises(TypeError, match="accelerated: got OwnDiffusion, expected"):
        fastcfg.report(OwnDiffusion())


class Fitting(OwnDiffusion):
    """Its step takes samples of one shape alone, and does more than the process."""

    def predicted(self, x: Any, t: Any, output: Any) -> Any:
        assert x.shape == SHAPE
        return super().predicted(x, t, output).tanh()


def test_a_step_that_fails_on_other_shapes_is_the_originals() -> None:
    fast = same_images(Fitting())
    assert fastcfg.report(fast)["run"] == "the original"
    assert "AssertionError" in fastcfg.report(fast)["reason"]


class Settings(defaultdict[str, Any]):
    """As a project's configuration: a dictionary that cannot be copied by calling its class."""

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.depth = 1


class Configured(OwnDiffusion):
    """Its configuration is such a dictionary."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.conf = Settings()
        self.conf["changes"] = changes

    def predicted(self, x: Any, t: Any, output: Any) -> Any:
        assert self.conf.depth == 1
        assert self.conf["absent"] is None
        if self.conf["changes"]:
            self.conf["calls"] = (self.conf["calls"] or 0) + 1
            output = output + 0.01 * self.conf["calls"]
        return super().predicted(x, t, output)


def test_dictionaries_of_a_projects_own_class_are_copied() -> None:
    own = Configured(changes=False)
    own.conf["absent"] = None
    assert fastcfg.report(same_images(own))["run"] == "engine"


def test_changes_of_such_dictionaries_are_noticed() -> None:
    own = Configured(changes=True)
    fast = fastcfg.accelerate(own)
    for seed in range(3):
        results = []
        for diffusion in (own, fast):
            diffusion.conf = Settings()
            diffusion.conf["changes"] = True
            torch.manual_seed(seed)
            results.append(diffusion.p_sample_loop(network, SHAPE))
        torch.testing.assert_close(*results, atol=2e-5, rtol=0)
        assert fastcfg.report(fast)["run"] == "the original"


def halved(x: Tensor) -> Tensor:
    """A function of the loop's module."""
    return 0.5 * x


def noted(x: Tensor) -> Tensor:
    """One that acts elsewhere."""
    WRITTEN.append(len(x))
    return x


class Starting(OwnDiffusion):
    """Methods that call such functions."""

    def halved(self, shape: Any) -> Tensor:
        return halved(torch.randn(*shape))

    def noted(self, shape: Any) -> Tensor:
        return noted(torch.randn(*shape))

    def p_sample_loop(self, model: Any, shape: Any, **options: Any) -> Any:
        return super().p_sample_loop(model, shape, noise=self.noted(shape), **options)


def test_a_loops_helpers_are_read_too() -> None:
    assert is_simple(Starting, "halved", Starting())
    assert not is_simple(Starting, "noted", Starting())
    WRITTEN.clear()
    fast = same_images(Starting())
    assert WRITTEN == [2] * 6
    assert fastcfg.report(fast)["run"] == "stepped"


class Conditioned(OwnDiffusion):
    """As MedSegDiff's: it starts from more channels than its shape names, and samples the last of them."""

    def p_sample_loop(
        self, model: Any, shape: Any, noise: Any = None, device: Any = None, model_kwargs: Any = None
    ) -> Any:
        start = torch.randn(shape[0], 1, *shape[2:], device=device)
        return super().p_sample_loop(model, start.shape, noise=start + noise[:, -1:])


def test_noise_of_another_shape_is_the_loops_own_affair() -> None:
    same_images(Conditioned(), noise=torch.randn(2, 5, 4, 5))
