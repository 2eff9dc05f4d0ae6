"""The steps of the process that an object describes, compared with the object's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...engine.model_output import output_tensor
from .folding import folded, folded_model, leading_dims
from .loops import LoopCall
from .manner import USUAL, Manner
from .own_run import Fit
from .process import Process
from .proof import DifferentError, FirstStep, OtherStep, StepCall, check_first
from .proof_times import check_times
from .recognition import STEPS

_OPTIONS = ("clip_denoised", "denoised_fn", "cond_fn", "model_kwargs", "eta")


def proved(twin: Process, name: str, own: Callable[..., Any], first: FirstStep) -> Fit | str:
    """How the engine makes an object's steps if they are its process's own, or what they do otherwise. `own` is the
    step of a copy of the object."""
    reason = ""
    for manner in first.manners:
        found = _proved(twin, name, own, first, manner)
        if isinstance(found, Fit):
            return found
        reason = reason or found
    return reason


def _proved(twin: Process, name: str, own: Callable[..., Any], first: FirstStep, manner: Manner) -> Fit | str:
    call, solver, reason = first.call, STEPS[name], ""
    if twin._prediction == "previous_x" and solver == "ddpm" and call.get("denoised_fn") is not None:
        return "its denoised_fn changes only what it reports"
    asked = first.recorders["model"].calls
    clips = [bool(call.get("clip_denoised"))] if "clip_denoised" in call.arguments else [True, False]
    folds = leading_dims(call.get("x"), output_tensor(first.recorders["model"].calls[0].returned)) if asked else 0
    if folds and any(call.get(function) is not None for function in ("cond_fn", "denoised_fn")):
        return "its channels are not the second dimension, and it has a cond_fn or denoised_fn"
    for clip in clips:
        other = other_step(twin, name, clip, folds, manner)
        try:
            check_first(first, other)
            check_times(own, call, first.recorders["model"].calls[0].returned, other, twin.num_timesteps)
        except DifferentError as error:
            reason = reason or str(error)
        except Exception as error:  # of either step, for samples of another shape
            reason = reason or f"its step is not guided-diffusion's ({type(error).__name__}: {error})"
        else:
            options = {"eta": call.get("eta", 0.0), "solver": solver}
            return Fit(twin._kind(LoopCall(model=_no_model, shape=(1, 1), **options)), clip, folds, manner)
    return reason


def differing(twin: Process, name: str, signature: Any, own: Callable[..., Any], loop: Mapping[str, Any]) -> str:
    """How an object's steps differ from its process's, with a loop's arguments and random outputs of the model;
    empty if they do not. `own` is the step of a copy of the object, with these arguments."""
    shape = tuple(loop["x"].shape if "x" in loop else loop["shape"])
    device = loop.get("device") or "cpu"
    if len(shape) < 2:
        return f"its samples have shape {shape}"
    learned = twin._variance.startswith("learned")
    output = torch.zeros(shape[0], shape[1] * (2 if learned else 1), *shape[2:], device=device)
    given = {option: loop[option] for option in _OPTIONS if loop.get(option) is not None}
    given |= {"model": _no_model, "x": torch.zeros(shape, device=device)}
    try:
        call = StepCall(signature, (), {**given, "t": torch.zeros(shape[0], dtype=torch.int64, device=device)})
        check_times(own, call, output, other_step(twin, name, loop.get("clip_denoised", True)), twin.num_timesteps)
    except (TypeError, DifferentError) as error:
        return str(error)
    return ""


def _no_model(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return x


def other_step(twin: Process, name: str, clip: bool, folds: int = 0, manner: Manner = USUAL) -> OtherStep:
    """A process's step, with or without a limit of x0."""
    solver = STEPS[name]

    def make(**given: Any) -> Mapping[str, Any]:
        names = ("model", "x", "t", "denoised_fn", "model_kwargs")
        arguments: dict[str, Any] = {argument: given.get(argument) for argument in names}
        arguments["clip_denoised"] = clip
        if given.get("cond_fn") is not None:
            arguments["cond_fn"] = given["cond_fn"]
        if solver != "ddpm":
            arguments["eta"] = given.get("eta", 0.0)
        step: Callable[..., Mapping[str, Tensor]] = getattr(twin, name)
        x, t = arguments["x"], arguments["t"]
        if folds:
            arguments["model"] = folded_model(arguments["model"], tuple(x.shape[: 1 + folds]))
            arguments["x"] = folded(x, folds)
            arguments["t"] = t.repeat_interleave(len(arguments["x"]) // len(t))
        with torch.no_grad():
            return {result: value.view(x.shape) for result, value in step(**arguments).items()}

    arrays: Any = twin._schedule
    first: dict[str, Any] = {"epsilon": arrays.sqrt_recip_alphas_cumprod, "previous_x": 1 / arrays.posterior_mean_coef1}
    then = {
        "ddpm": arrays.posterior_mean_coef1,
        "ddim": np.sqrt(arrays.alphas_cumprod_prev),
        "ddim_reverse": np.sqrt(arrays.alphas_cumprod_next),
    }
    x0 = first.get(twin._prediction, np.ones(twin.num_timesteps))
    return OtherStep(make, {"pred_xstart": x0, "sample": x0 * then[solver]}, manner=manner)
