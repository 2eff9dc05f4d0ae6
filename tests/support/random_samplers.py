"""Sampling functions of k-diffusion's form made up at random: how they step, draw, call back and treat tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

DRAWS = ("none", "randn_like", "randn", "normal_", "bound", "shared", "own", "given", "wide", "numpy", "rand")
DRAWS += ("sampler", "unused", "first", "seed")
CALLBACKS = ("middle", "before", "end", "twice", "early derivative")
IN_PLACE = ("nothing", "x", "the caller's x", "output", "sigmas")
EDITS = ("nothing", "x", "denoised", "data", "late", "sigma", "draws", "raises", "returns")
MODELS = ("plain", "draws", "edits", "buffer", "double", "weights", "same")

_randn_like = torch.randn_like


@dataclass(frozen=True)
class Plan:
    """A sampling function and a call of it."""

    stages: int
    history: int
    draw: str
    callback: str
    in_place: str
    edit: str
    edited_step: int
    model: str
    no_grad: bool
    curved: bool
    observed: bool

    def function(self) -> Callable[..., Tensor]:
        """The sampling function."""

        def sample(
            model: Any,
            x: Tensor,
            sigmas: Tensor,
            extra_args: Any = None,
            callback: Any = None,
            disable: Any = None,
            noise_sampler: Any = None,
            generator: Any = None,
            bound: Any = torch.randn_like,
        ) -> Tensor:
            args, own = extra_args or {}, torch.Generator().manual_seed(5)
            if self.draw == "seed":
                own.manual_seed(args.get("seed", 0))
            x = x.clone() if self.in_place == "x" else x
            if self.draw == "first":
                x = x + 0.1 * torch.randn_like(x)

            def noise(x: Tensor, *levels: Tensor) -> Tensor:
                return {
                    "randn_like": lambda: torch.randn_like(x),
                    "unused": lambda: torch.randn_like(x),
                    "randn": lambda: torch.randn(x.shape, dtype=x.dtype),
                    "normal_": lambda: torch.empty_like(x).normal_(0, 1.5),
                    "bound": lambda: bound(x),
                    "shared": lambda: torch.randn(1, *x.shape[1:]),
                    "own": lambda: torch.randn(x.shape, generator=own),
                    "seed": lambda: torch.randn(x.shape, generator=own),
                    "given": lambda: torch.randn(x.shape, generator=generator),
                    "wide": lambda: torch.randn(x.shape, dtype=torch.float64).float(),
                    "numpy": lambda: torch.from_numpy(np.random.standard_normal(x.shape)).float(),  # noqa: NPY002
                    "rand": lambda: torch.rand_like(x) * random.random(),
                    "sampler": lambda: noise_sampler(*levels) if noise_sampler else torch.randn_like(x),
                }[self.draw]()

            def tell(i: int, x: Tensor, denoised: Tensor, sigma: Tensor) -> None:
                if callback is not None:
                    callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma * 1.0, "denoised": denoised})

            past: list[Tensor] = []
            if self.in_place == "sigmas":
                sigmas[0] *= 1.0
            for i in range(len(sigmas) - 1):
                sigma, following = sigmas[i], sigmas[i + 1]
                if self.callback == "before" and callback is not None:
                    callback({"x": x, "i": i, "sigma": sigma})
                m = model(x, sigma * x.new_ones([len(x)]), **args)
                d = (x - m) / sigma
                if self.callback in ("middle", "twice", "early derivative"):
                    tell(i, x, m, sigma)
                if self.callback != "early derivative":
                    d = (x - m) / sigma
                slope = d if not past else 1.25 * d - 0.25 * past[-1]
                if len(past) > 1 and self.history > 1:
                    slope = slope + 0.1 * (past[-1] - past[-2])
                if self.stages == 2 and following > 0:
                    between = x + slope * (following - sigma)
                    m2 = model(between, following * x.new_ones([len(x)]), **args)
                    slope = 0.5 * (slope + (between - m2) / following)
                past = [*past, d][-self.history :] if self.history else []
                step = slope * (0.95 * following - sigma)
                if self.in_place in ("x", "the caller's x"):
                    x += step
                elif self.in_place == "output":
                    x = m.mul_(1.0).add_(x - m).add_(step)
                else:
                    x = x + step
                if self.curved:
                    x = x + 1e-3 * x**2
                if self.draw not in ("none", "first"):
                    z = noise(x, sigma, following)
                    x = x + (0.3 * following if self.draw != "unused" else 0.0) * z
                if self.callback in ("end", "twice"):
                    tell(i, x, m, sigma)
            return x

        return torch.no_grad()(sample) if self.no_grad else sample


class Outcome:
    """A call, observed: its result or exception, what its callback was told, and where it left all generators."""

    def __init__(self, plan: Plan, function: Callable[..., Tensor], run: int, model: Model) -> None:
        torch.manual_seed(3 + run)
        np.random.seed(4 + run)  # noqa: NPY002
        random.seed(5 + run)
        generator = torch.Generator().manual_seed(6 + run)
        sigmas = torch.tensor([9.0, 4.0, 2.0, 0.8, 0.3, 0.0])
        x = 9 * torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(run))
        self.model, self.told, kept = model, list[dict[str, Any]](), list[dict[str, Any]]()

        def callback(info: dict[str, Any]) -> Any:
            copies = {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in info.items()}
            self.told.append(copies | {"calls": self.model.calls, "next": torch.get_rng_state()})
            kept.append(info)
            with torch.no_grad():
                return self._react(plan, info, kept)

        options: dict[str, Any] = {"extra_args": {"seed": 8 + run}} if plan.draw == "seed" else {}
        if plan.observed:
            options["callback"] = callback
        if plan.draw == "given":
            options["generator"] = generator
        if plan.draw == "sampler":
            options["noise_sampler"] = lambda *levels: torch.randn(2, 3, 4, 5) * sum(map(float, levels)) / 10
        self.error, self.result = "", torch.zeros(())
        try:
            self.result = function(self.model, x, sigmas, disable=True, **options)
        except KeyError as error:
            self.error = repr(error)
        self.tensors = [self.result.detach(), x, sigmas, *self.model.weights]
        self.needs_grad, self.is_x = self.result.requires_grad, self.result is x
        self.states = [torch.get_rng_state().tolist(), generator.get_state().tolist(), random.getstate()]
        self.states += [self.model.calls, np.random.get_state()[1].tolist()]  # type: ignore[index]  # noqa: NPY002

    @staticmethod
    def _react(plan: Plan, info: dict[str, Any], kept: list[dict[str, Any]]) -> Any:
        if plan.edit == "draws":
            torch.randn(3)
        if plan.edit == "returns":
            return info["x"]
        if info["i"] != plan.edited_step:
            return None
        if plan.edit in ("x", "denoised", "sigma") and plan.edit in info:
            (info[plan.edit] if plan.edit == "sigma" else info[plan.edit][..., :2]).mul_(0.5)
        if plan.edit == "data":
            info["x"].data[:, 1] = 0.25
        if plan.edit == "late":
            kept[max(len(kept) - 2, 0)].get("denoised", info["x"]).add_(0.5)
        if plan.edit == "raises":
            raise KeyError("stop")
        return None

    def check(self, original: Outcome) -> None:
        """Assert that the original did the same."""
        assert self.error == original.error
        assert (self.needs_grad, self.is_x) == (original.needs_grad, original.is_x)
        for got, want in zip(self.tensors, original.tensors, strict=True):
            _close(got, want)
        assert self.states == original.states
        assert len(self.told) == len(original.told)
        for got, want in zip(self.told, original.told, strict=True):
            assert list(got) == list(want)
            for name, value in want.items():
                if isinstance(value, Tensor):
                    _close(got[name], value)
                else:
                    assert got[name] == value


class Model:
    """A denoiser, with a habit."""

    def __init__(self, habit: str) -> None:
        self.habit, self.calls = habit, 0
        self.weights = [torch.ones(3, 1, 1, requires_grad=habit == "weights")]
        self._buffer = torch.zeros(2, 3, 4, 5)

    def __call__(self, x: Tensor, sigma: Tensor, seed: int = 0) -> Tensor:
        self.calls += 1
        s = sigma.view(-1, 1, 1, 1)
        if self.habit == "edits" and self.calls == 3:
            with torch.no_grad():
                x[:, 0] *= 0.9
        m = torch.tanh(x / (1 + s**2).sqrt()) * self.weights[0] + 0.1 * x / (1 + s)
        if self.habit == "draws":
            m = m + 0.01 * torch.randn(1)
        if self.habit == "buffer":
            return self._buffer.copy_(m.detach())
        if self.habit == "same" and self.calls == 2:
            return x
        return m.double() if self.habit == "double" and self.calls == 2 else m


def _close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    if not want.is_floating_point():
        assert torch.equal(got, want)
        return
    difference = float((got.detach().double() - want.detach().double()).abs().max()) if want.numel() else 0.0
    # Measured: 1e-6 of the largest value.
    assert difference <= 1e-5 * max(1.0, float(want.detach().abs().max())), difference
