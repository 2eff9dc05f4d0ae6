"""The Gaussian diffusion process of guided-diffusion; GLIDE's is the same with fixed types.

Single steps are the originals' own operations (`fastcfg.reference.originals`). Loops run on the engine, or step by step
in the originals' order with `backend="reference"`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ... import solvers
from ...reference import originals
from ...schedule import Schedule
from ...table import StepTable
from ...utils.lru import LRU
from .._fused.fall_through import log_once
from .attributes import ARRAYS, Tables, overridden
from .init_image import begins_from_image, from_image
from .loops import Function, Keywords, LoopCall, LoopKind, LoopRunner, Model, layout_problem, loop_call, step_by_step
from .schedules import AssertionValueError, make_schedule

Result = TypeVar("Result")

# What the originals' loops call, by solver, and with a cond_fn.
_COMMON = (
    *("p_mean_variance", "q_posterior_mean_variance", "_predict_xstart_from_eps", "_predict_xstart_from_xprev"),
    *("_predict_eps_from_xstart", "_wrap_model", "_scale_timesteps"),
)
_STEPS = {
    "ddpm": ("p_sample", *_COMMON),
    "ddim": ("ddim_sample", *_COMMON),
    "ddim_reverse": ("ddim_reverse_sample", *_COMMON),
}
_CONDITIONED = ("condition_mean", "condition_score")

# (model, shape, noise, ..., progress, eta): the originals' arguments of a loop.
_LOOP = list(inspect.signature(LoopCall).parameters.values())[:10]


def _sampling_loop(
    solver: str, *, takes_eta: bool = False
) -> Callable[[Callable[[Any, LoopCall], Result]], Callable[..., Result]]:
    """Give a method of a `LoopCall` the signature of the originals' loops, plus **engine."""
    parameters = [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *_LOOP[: 10 if takes_eta else 9],
        inspect.Parameter("engine", inspect.Parameter.VAR_KEYWORD, annotation="Any"),
    ]

    def decorate(method: Callable[[Any, LoopCall], Result]) -> Callable[..., Result]:
        signature = inspect.signature(method).replace(parameters=parameters)

        @functools.wraps(method)
        def loop(*args: Any, **kwargs: Any) -> Result:
            given = signature.bind(*args, **kwargs).arguments
            process, engine = given.pop("self"), given.pop("engine", {})
            return method(process, loop_call(solver, engine, **given))

        loop.__signature__ = signature  # type: ignore[attr-defined]
        return loop

    return decorate


class Process:
    """A Gaussian diffusion process with the originals' attributes and methods; base of the frontends' classes.

    Attributes:
        num_timesteps: T.
        betas, alphas_cumprod, alphas_cumprod_prev, alphas_cumprod_next, sqrt_alphas_cumprod,
        sqrt_one_minus_alphas_cumprod, log_one_minus_alphas_cumprod, sqrt_recip_alphas_cumprod,
        sqrt_recipm1_alphas_cumprod, posterior_variance, posterior_log_variance_clipped, posterior_mean_coef1,
        posterior_mean_coef2: float64 [T].
    """

    num_timesteps: int
    betas: np.ndarray

    # What the model predicts, as in `fastcfg.solvers`.
    _prediction, _variance, _rescale = "epsilon", "learned_range", False
    # Whether models may return (output, extra), as GLIDE's may.
    _takes_tuples = False

    def _set_schedule(self, schedule: Schedule) -> None:
        self._schedule, self.num_timesteps = schedule, schedule.num_timesteps
        with np.errstate(divide="ignore", invalid="ignore"):
            for name in ARRAYS:
                setattr(self, name, getattr(schedule, name).copy())
        self._as_made = self._read = Tables(self)
        self._runner = LoopRunner()
        self._tables: LRU[StepTable] = LRU(16)
        self._times: LRU[Tensor] = LRU(16)

    def _arrays(self) -> Schedule:
        """What single steps read, as the originals' do at every step: the arrays that the attributes are now."""
        if not self._as_made.differing(self):
            return self._schedule
        if self._read is self._as_made or self._read.differing(self):
            self._read = Tables(self)
        return self._read  # type: ignore[return-value]

    def _edited(self) -> list[str]:
        """The attributes that are not what the engine's table was made from."""
        return self._as_made.differing(self)

    # q: from images to noise.

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x0), each of x_start's shape."""
        return originals.q_mean_variance(self._arrays(), x_start, t)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t from x0; noise is drawn like x_start by default."""
        noise = torch.randn_like(x_start) if noise is None else noise
        _check_shape("noise", noise, x_start.shape)
        return originals.q_sample(self._arrays(), x_start, t, noise)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x0)."""
        _check_shape("x_t", x_t, x_start.shape)
        return originals.q_posterior_mean_variance(self._arrays(), x_start, x_t, t)

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return originals.predict_xstart_from_eps(self._arrays(), x_t, t, eps)

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return originals.predict_eps_from_xstart(self._arrays(), x_t, t, pred_xstart)

    # p: one step from noise to images, in the originals' operations.

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: Keywords = None,
    ) -> dict[str, Any]:
        """p(x_{t-1} | x_t): mean, variance, log_variance and pred_xstart, each of x's shape.

        Args:
            x: [B, C, ...].
            t: int64 [B], indices into the (respaced) process.
            model, clip_denoised, denoised_fn, model_kwargs: as for `p_sample_loop`.

        ValueError if t or the model's output has the wrong shape.
        """
        output, extra = self._call(model, x, t, model_kwargs), {}
        if self._takes_tuples:
            output, extra["extra"] = output if isinstance(output, tuple) else (output, None)
        types = {"prediction": self._prediction, "variance": self._variance}
        options: dict[str, Any] = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, **types}
        return {**originals.p_mean_variance(self._arrays(), output, x, t, **options, methods=self), **extra}

    def condition_mean(
        self, cond_fn: Model, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Keywords = None
    ) -> Tensor:
        """The mean moved by the variance times ∇ log p(y | x_t), which is cond_fn(x, times, **model_kwargs)."""
        return originals.condition_mean(p_mean_var, self._gradient(cond_fn, x, t, model_kwargs))

    def condition_score(
        self, cond_fn: Model, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Keywords = None
    ) -> dict[str, Tensor]:
        """p_mean_var with mean and pred_xstart from the score moved by ∇ log p(y | x_t)."""
        gradient = self._gradient(cond_fn, x, t, model_kwargs)
        return originals.condition_score(self._arrays(), p_mean_var, x, t, gradient, methods=self)

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Keywords = None,
        *,
        noise: Tensor | Function | None = None,
    ) -> dict[str, Tensor]:
        """x_{t-1} of DDPM: sample and pred_xstart (without the gradient's shift).

        Noise is drawn like x after the model's call; it may be given, or a function of x that draws it.
        """
        p = self._p(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        drawn = _drawn(noise, x)
        if cond_fn is not None:
            p["mean"] = self.condition_mean(cond_fn, p, x, t, model_kwargs=model_kwargs)
        return {"sample": originals.p_sample(p, t, drawn), "pred_xstart": p["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Keywords = None,
        eta: float = 0.0,
        *,
        noise: Tensor | Function | None = None,
    ) -> dict[str, Tensor]:
        """x_{t-1} of DDIM: sample and pred_xstart (with the gradient's shift). Noise as for `p_sample`."""
        p = self._p(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        p = p if cond_fn is None else self.condition_score(cond_fn, p, x, t, model_kwargs=model_kwargs)
        sample = originals.ddim_sample(self._arrays(), p, x, t, _drawn(noise, x), eta=eta, methods=self)
        return {"sample": sample, "pred_xstart": p["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Keywords = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """x_{t+1} of the deterministic ODE: sample and pred_xstart."""
        _check_deterministic(eta)
        p = self._p(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        p = p if cond_fn is None else self.condition_score(cond_fn, p, x, t, model_kwargs=model_kwargs)
        return {"sample": originals.ddim_reverse_sample(self._arrays(), p, x, t), "pred_xstart": p["pred_xstart"]}

    def _p(self, model: Model, x: Tensor, t: Tensor, clip: bool, denoised_fn: Any, kwargs: Keywords) -> dict[str, Any]:
        """`p_mean_variance`, called as the originals' steps call it."""
        return self.p_mean_variance(model, x, t, clip_denoised=clip, denoised_fn=denoised_fn, model_kwargs=kwargs)

    # Loops.

    @_sampling_loop("ddpm")
    def p_sample_loop(self, call: LoopCall) -> Tensor:
        """Sample by DDPM.

        Args:
            model: called as model(x, times, **model_kwargs): a network, any function, or `fastcfg.ClassifierFree`,
                with which the engine runs half the batch.
            shape, noise: (B, C, ...), with `ClassifierFree` of the doubled batch; and x_T, drawn by default.
            clip_denoised, denoised_fn: clamp x0 to [-1, 1], and a function applied to x0 before.
            cond_fn: (x, times, **model_kwargs) -> ∇ log p(y | x_t).
            device, progress: where to run, by default where the model's parameters or the noise are; show a bar.
            **engine: arguments the originals lack: seed, guidance_scale (wraps the model in `ClassifierFree`), backend
                ("reference": the originals' own operations, bit for bit), noise_source ("torch", "philox" or a
                function (step, shape) -> normals, step 0 executed first), graph, threshold (a `DynamicThreshold`
                instead of the clamp); and of forks, skip_timesteps (how many of the noisiest steps are left out) and
                init_image (of the given shape: noised to the first step that is left; zeros by default).

        Returns:
            The samples, of the given shape. With `ClassifierFree` the second half repeats the first.

        Raises:
            TypeError: an unknown keyword, or a shape that is not a tuple or list.
            ValueError: shapes, scales, names or batches that do not fit.
        """
        return self._last(call)

    @_sampling_loop("ddpm")
    def p_sample_loop_progressive(self, call: LoopCall) -> Iterator[dict[str, Tensor]]:
        """`p_sample_loop` as a generator of {"sample", "pred_xstart"} after every step."""
        return self._steps(call)

    @_sampling_loop("ddim", takes_eta=True)
    def ddim_sample_loop(self, call: LoopCall) -> Tensor:
        """Sample by DDIM with noise level eta; other arguments as for `p_sample_loop`."""
        return self._last(call)

    @_sampling_loop("ddim", takes_eta=True)
    def ddim_sample_loop_progressive(self, call: LoopCall) -> Iterator[dict[str, Tensor]]:
        """`ddim_sample_loop` as a generator of {"sample", "pred_xstart"} after every step."""
        return self._steps(call)

    def ddim_reverse_sample_loop(
        self,
        model: Model,
        x: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: Keywords = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        **engine: Any,
    ) -> Tensor:
        """Run the deterministic ODE from images x [B, C, ...] to noise; other arguments as for `p_sample_loop`."""
        _check_deterministic(eta)
        options: dict[str, Any] = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn}
        options |= {"model_kwargs": model_kwargs, "device": device, "progress": progress}
        return self._last(loop_call("ddim_reverse", engine, model=model, shape=tuple(x.shape), noise=x, **options))

    def _last(self, call: LoopCall) -> Tensor:
        name = call.name
        if call.solver != "ddim_reverse" and overridden(self, (f"{name}_progressive",)):
            *_, last = getattr(self, f"{name}_progressive")(**call.arguments())
        elif begins_from_image(call):
            return self._last(from_image(call, self.num_timesteps, self.q_sample))
        elif (steps := self._originals_steps(call)) is None:
            return self._runner.final(call, self._kind(call))
        else:
            *_, last = steps
        sample: Tensor = last["sample"]
        return sample

    def _steps(self, call: LoopCall) -> Iterator[dict[str, Tensor]]:
        if begins_from_image(call):
            return self._steps_from_image(call)
        steps = self._originals_steps(call)
        return self._runner.steps(call, self._kind(call)) if steps is None else steps

    def _steps_from_image(self, call: LoopCall) -> Iterator[dict[str, Tensor]]:
        # A generator: like the forks', it draws when its first step is asked for.
        yield from self._steps(from_image(call, self.num_timesteps, self.q_sample))

    def _originals_steps(self, call: LoopCall) -> Iterator[dict[str, Tensor]] | None:
        """The originals' own loop; None for calls that the engine runs."""
        # With a predicted x_{t-1} the mean is the output itself, and denoised_fn changes only the reported x0.
        reported_only = self._prediction == "previous_x" and call.solver == "ddpm" and call.denoised_fn is not None
        if call.backend != "reference" and not reported_only:
            if not (problem := self._problem(call)):
                return None
            log_once(call.name, problem)
        return self._loop(call, call.first)

    def _loop(self, call: LoopCall, first: int) -> Iterator[dict[str, Tensor]]:
        """The originals' own loop from a step on."""
        times = range(self.num_timesteps)
        if call.solver == "ddim_reverse":

            def reverse(*args: Any, noise: Any = None, cond_fn: Any = None, **options: Any) -> dict[str, Tensor]:
                return self.ddim_reverse_sample(*args, **options)

            return step_by_step(reverse, times, call, first)
        step = self.p_sample if call.solver == "ddpm" else partial(self.ddim_sample, eta=call.eta)
        return step_by_step(step, reversed(times), call, first)

    def _problem(self, call: LoopCall) -> str:
        """Why the engine cannot run a loop as the original would; empty if it can."""
        if methods := overridden(self, _STEPS[call.solver] + (_CONDITIONED if call.cond_fn is not None else ())):
            return f"{type(self).__name__} overrides {', '.join(methods)}"
        if edited := self._edited():
            return f"{', '.join(edited)} changed since the process was made"
        return layout_problem(call)

    def _kind(self, call: LoopCall) -> LoopKind:
        # The originals draw in every step, but for the reverse ODE.
        draws = call.solver != "ddim_reverse"
        return LoopKind(self._table(call), self._prediction, self._variance, self._loop, draws=draws)

    def _table(self, call: LoopCall) -> StepTable:
        """The solver's table, built once: samplers know their programs by it."""
        own: dict[str, dict[str, Any]] = {"ddpm": {"variance": self._variance}, "ddim": {"eta": call.eta}}
        options = {"prediction": self._prediction, "rescale_timesteps": self._rescale, **own.get(call.solver, {})}
        build = getattr(solvers, call.solver)
        key = (call.solver, call.eta, *options.values())
        return self._tables.get_or_make(key, lambda: build(self._schedule, **options))

    def _call(self, model: Model, x: Tensor, t: Tensor, model_kwargs: Keywords) -> Any:
        _check_shape("t", t, (len(x),))
        return self._wrap_model(model)(x, self._scale_timesteps(t), **(model_kwargs or {}))

    def _gradient(self, cond_fn: Model, x: Tensor, t: Tensor, model_kwargs: Keywords) -> Tensor:
        if model_kwargs is None:
            raise TypeError("model_kwargs: got None with a cond_fn, expected its keyword arguments")
        gradient: Tensor = self._wrap_model(cond_fn)(x, self._scale_timesteps(t), **model_kwargs)
        return gradient

    def _wrap_model(self, model: Model) -> Model:
        """The model as a function of this process's times."""
        return model

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """Times as floats in the range of a 1000-step process, if they are rescaled."""
        return t.float() * (1000.0 / self.num_timesteps) if self._rescale else t


class SpacedProcess(Process):
    """The steps `use_timesteps` of a process with arguments kwargs; base of both `SpacedDiffusion`s.

    Attributes:
        use_timesteps: a set.
        timestep_map: the same as a sorted list.
        original_num_steps: T of the other process.
    """

    def __init__(self, use_timesteps: Collection[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.use_timesteps, self.original_num_steps = set(use_timesteps), self.num_timesteps
        kept = self._schedule.respace(self.use_timesteps)
        self.timestep_map = kept.timestep_map.tolist()
        self._set_schedule(make_schedule(kept.betas, kept.timestep_map, self.original_num_steps))

    def _edited(self) -> list[str]:
        now = {"timestep_map": list(self.timestep_map), "original_num_steps": self.original_num_steps}
        made = (self._schedule.timestep_map.tolist(), self._schedule.original_num_timesteps)
        return super()._edited() + [name for name, was in zip(now, made, strict=True) if now[name] != was]

    def _wrap_model(self, model: Model) -> Model:
        def wrapped(x: Tensor, t: Tensor, **model_kwargs: Any) -> Any:
            return model(x, self._model_times(t), **model_kwargs)

        return wrapped

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # the wrapped model's are

    def _model_times(self, t: Tensor) -> Tensor:
        """The model's times at t: steps of the original process, as floats if they are rescaled."""
        key = t.device, tuple(self.timestep_map)
        times = self._times.get_or_make(key, lambda: torch.tensor(self.timestep_map, device=t.device))[t]
        return times.float() * (1000.0 / self.original_num_steps) if self._rescale else times.to(t.dtype)


def _check_deterministic(eta: float) -> None:
    """Raise AssertionValueError unless eta is 0."""
    if eta != 0.0:
        raise AssertionValueError(f"eta: got {eta}, expected 0: the reverse ODE is deterministic")


def _drawn(noise: Tensor | Function | None, x: Tensor) -> Tensor:
    if noise is None:
        return torch.randn_like(x)
    return noise if isinstance(noise, Tensor) else noise(x)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}")
