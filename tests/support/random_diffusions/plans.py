"""Plans of a changed diffusion object and of calls of it, made beside its accelerated form."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastcfg
from support.families.base import GaussianDiffusion, Loss, Mean, SpacedDiffusion, Var, betas
from support.families.beside import CLOSE, Call, Outcome, lines_of, logged, reported, run, unlike
from support.families.networks import Classifier, Network

from .attributes import EDITS
from .edits import TERMS, WHENS, Edit
from .loops import LOOPS
from .steps import STEPS

CHANGES: dict[str, Callable[[type, int], type]] = {one.__name__: one for one in STEPS}
CHANGES |= {f"loops: {one.__name__}": one for one in LOOPS}
MODELS = (
    "plain",
    "function",
    "counts",
    "draws",
    "buffer",
    "alias",
    "double",
    "half",
    "transposed",
    "grads",
    "in place",
)
KWARGS = ("none", "empty", "y", "negative", "s", "extra", "text")
NOISES = ("none", "given", "double", "transposed", "half", "large", "huge")
SIZES = ((3, 4, 4), (3, 2, 6), (5,), (4, 9))
BY_HAND = ("nothing", "sample", "replaced", "pred_xstart", "stop", "draw", "table", "kwargs", "late")
FUNCTIONS: dict[str, Any] = {
    "none": None,
    "halved": lambda x0: x0 * 0.9,
    "bent": lambda x0: 2 * torch.tanh(x0 / 2),
    "rows": lambda x0: x0 - 0.1 * x0[:1],
    "in place": lambda x0: x0.mul_(0.9),
    "draws": lambda x0: x0 + 0.05 * torch.randn_like(x0),
}


class Model(nn.Module):
    """A network that misbehaves in one way."""

    def __init__(self, kind: str, learned: bool) -> None:
        super().__init__()
        self.inner, self.kind, self.count = Network(2 if learned else 1), kind, 0
        self.kept: dict[Any, Tensor] = {}

    def forward(
        self, x: Tensor, t: Tensor, y: Any = None, s: float = 1.0, extra: Any = None, text: Any = None
    ) -> Tensor:
        self.count += 1
        if self.kind == "in place":
            x.mul_(0.99)
        result = self.inner(x, t, y) * s
        if self.kind == "counts":
            result = result * (1 + 0.02 * (self.count % 3))
        if self.kind == "draws":
            result = result + 0.05 * torch.randn_like(result)
        if self.kind == "alias" and result.shape == x.shape:
            return x
        if self.kind == "buffer":
            return self.kept.setdefault((result.shape, result.dtype), result.clone()).copy_(result)
        if self.kind == "double":
            return result.double()
        if self.kind == "half":
            return result.to(torch.bfloat16)
        if self.kind == "transposed":
            return result.transpose(-1, -2).contiguous().transpose(-1, -2)
        return result if self.kind == "grads" else result.detach()


@dataclass(frozen=True)
class CallPlan:
    """A call of a loop."""

    loop: str = "p_sample_loop"
    progressive: bool = False
    clip: bool = True
    denoised: str = "none"
    classifier: bool = False
    kwargs: str = "none"
    noise: str = "none"
    batch: int = 2
    eta: float = 0.0
    by_hand: str = "nothing"

    def call(self, diffusion: Any, size: tuple[int, ...]) -> Call:
        """The call, with new tensors."""
        shape = (self.batch, *size)
        kwargs: dict[str, Any] = {"clip_denoised": self.clip, "device": "cpu"}
        if FUNCTIONS[self.denoised] is not None:
            kwargs["denoised_fn"] = FUNCTIONS[self.denoised]
        given = {"y": torch.linspace(-1, 1, self.batch), "s": 1.5, "extra": torch.ones(2), "text": ["a"] * self.batch}
        if self.kwargs != "none" or self.classifier:
            named = ("y", self.kwargs) if self.kwargs in given else ()
            kwargs["model_kwargs"] = {name: given[name] for name in named}
        if self.kwargs == "negative":
            kwargs["model_kwargs"]["y"] = 0.5 + given["y"] * given["y"]
        if self.classifier:
            kwargs["cond_fn"] = Classifier()
        if self.noise != "none":
            kwargs["noise"] = self._noise(shape)
        if self.loop == "ddim_sample_loop" and self.eta:
            kwargs["eta"] = self.eta
        name = f"{self.loop}_progressive" if self.progressive else self.loop
        arrange = getattr(type(diffusion), "arrange", None) if name == "p_sample_loop" else None
        return Call(name, (shape,), kwargs, "", arrange)

    def _noise(self, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        return {
            "given": noise,
            "double": noise.double(),
            "transposed": noise.transpose(-1, -2).contiguous().transpose(-1, -2),
            "half": noise.to(torch.bfloat16),
            "large": 4 * noise,
            "huge": 40 * noise,
        }[self.noise]

    def edit(self, diffusion: Any, steps: Iterator[Any], kwargs: Any) -> Iterator[Any]:
        """The steps, with what their user does after the second, or before the first."""
        if self.by_hand == "late":
            torch.manual_seed(11)
        for i, out in enumerate(steps):
            yield out
            if i == 1 and self.by_hand == "sample":
                out["sample"].mul_(0.8)
            elif i == 1 and self.by_hand == "replaced":
                out["sample"] = out["sample"] + 0.2
            elif i == 1 and self.by_hand == "pred_xstart":
                out["pred_xstart"].zero_()
            elif i == 1 and self.by_hand == "draw":
                torch.randn(3)
            elif i == 1 and self.by_hand == "table":
                diffusion.posterior_mean_coef1 = np.asarray(diffusion.posterior_mean_coef1) * 1.05
            elif i == 1 and self.by_hand == "kwargs" and "y" in kwargs:
                kwargs["y"].mul_(0.5)
            elif i == 1 and self.by_hand == "stop":
                return


@dataclass(frozen=True)
class Plan:
    """An object, its changes, and calls of it with edits before each but the first."""

    spaced: bool = True
    steps: int = 5
    mean: Mean = Mean.EPSILON
    var: Var = Var.FIXED_LARGE
    rescale: bool = False
    changes: tuple[Edit | tuple[str, int], ...] = ()
    model: str = "plain"
    size: tuple[int, ...] = SIZES[0]
    calls: tuple[CallPlan, ...] = (CallPlan(), CallPlan())
    edits: tuple[tuple[str, int], ...] = ()

    @property
    def learned(self) -> bool:
        return self.var in (Var.LEARNED, Var.LEARNED_RANGE)

    def make(self) -> Any:
        """The object, of a class of its own."""
        kind: Any = SpacedDiffusion if self.spaced else GaussianDiffusion
        kind = type("Changed", (kind,), {})
        for one in self.changes:
            kind = one(kind) if isinstance(one, Edit) else CHANGES[one[0]](kind, one[1])
        options: dict[str, Any] = {"model_mean_type": self.mean, "model_var_type": self.var, "loss_type": Loss.MSE}
        options["rescale_timesteps"] = self.rescale
        if self.spaced:
            kept = np.linspace(0, 23, self.steps).round().astype(int).tolist()
            return kind(use_timesteps=kept, betas=betas(), **options)
        return kind(betas=betas(self.steps), **options)

    def network(self) -> Any:
        model = Model(self.model, self.learned)
        return (lambda x, t, **kwargs: model(x, t, **kwargs)) if self.model == "function" else model


@dataclass
class Checked:
    """What came of a plan: how its calls ran, what was logged, and what was not the same."""

    ran: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    unlike: str = ""


def check(
    plan: Plan, accelerate: Any = fastcfg.accelerate, report: Callable[[Any], dict[str, Any]] = reported
) -> Checked:
    """Make the calls of a plan, beside the object itself."""
    checked, networks = Checked(), (plan.network(), plan.network())
    theirs = plan.make()
    with logged(checked.said):
        try:
            ours = accelerate(plan.make())
        except (TypeError, ValueError) as error:
            checked.ran.append("refused")
            checked.said += lines_of(error)
            return checked
    for turn, call in enumerate(plan.calls):
        if turn and turn <= len(plan.edits):
            name, n = plan.edits[turn - 1]
            for one in (theirs, ours):
                with contextlib.suppress(Exception):
                    EDITS[name](one, n)
        want = _made(call, theirs, networks[0], plan.size, turn)
        with logged(checked.said):
            got = _made(call, ours, networks[1], plan.size, turn)
        found = {"run": "the original", "reason": "", **report(ours)}
        checked.ran.append(found["run"])
        # A model's own rounding to bfloat16 turns a rounding of x into one of its output.
        close = 2**-7 if plan.model == "half" else CLOSE
        said = unlike(want, got, exactly=found["run"] == "the original", close=close)
        if not said and "original" in found["run"] and not found["reason"] and not want.failed:
            said = "nothing says why the original ran"
        if said:
            checked.unlike = f"call {turn} ({found['run']}: {found['reason']}): {said}"
            break
    return checked


def _made(plan: CallPlan, diffusion: Any, network: Any, size: tuple[int, ...], seed: int) -> Outcome:
    call = plan.call(diffusion, size)
    kwargs = call.kwargs.get("model_kwargs", {})
    return run(diffusion, network, call, seed, lambda steps: plan.edit(diffusion, steps, kwargs))


__all__ = ["BY_HAND", "CHANGES", "EDITS", "FUNCTIONS", "KWARGS", "MODELS", "NOISES", "SIZES", "TERMS", "WHENS", "Plan"]
