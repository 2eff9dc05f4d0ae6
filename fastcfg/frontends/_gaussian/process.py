"""What guided-diffusion's and GLIDE's `GaussianDiffusion` have in common.

Single steps are the originals' own operations (`fastcfg.reference.originals`); loops run on the engine, or step by step
in the originals' order where `backend="reference"` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import solvers
from ...engine.noise import NoiseSource, recorded_source, torch_source
from ...ops import dynamic_threshold
from ...reference import originals
from ...schedule import Schedule
from ...table import StepTable
from ..classifier_free import ClassifierFree
from .loops import Engine, Request
from .schedules import AssertionValueError, make_schedule

__all__ = ["Function", "Keywords", "Model", "Process", "deterministic"]

Model = Callable[..., Any]
Function = Callable[[Tensor], Tensor]
Keywords = dict[str, Any] | None

# The originals' numpy attributes that are arrays of the schedule.
_ARRAYS = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "alphas_cumprod_next", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
    *("sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"),
    *("posterior_mean_coef1", "posterior_mean_coef2"),
)


class Process:
    """A Gaussian diffusion process with the originals' methods; base of the frontends' classes.

    Args:
        schedule: the process.
        prediction: what the model predicts, as in `fastcfg.solvers`.
        variance: its variance, likewise.
        rescale_timesteps: give the model float times in the range of a 1000-step process.
    """

    num_timesteps: int
    betas: np.ndarray
    # Each of the originals has its own arguments for it.
    ddim_reverse_sample: Callable[..., dict[str, Tensor]]

    def _set_up(self, schedule: Schedule, prediction: str, variance: str, rescale_timesteps: bool = False) -> None:
        self._schedule, self._prediction, self._variance = schedule, prediction, variance
        self._rescale = rescale_timesteps
        self.num_timesteps = schedule.num_timesteps
        with np.errstate(divide="ignore", invalid="ignore"):
            for name in _ARRAYS:
                setattr(self, name, getattr(schedule, name))
        self._engine = Engine()
        self._tables: dict[Any, StepTable] = {}
        self._times: dict[torch.device, Tensor] = {}

    def _keep(self, base: Process, use_timesteps: Collection[int], names: tuple[str, str]) -> None:
        """Be the process of some of base's timesteps."""
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = base.num_timesteps
        kept = base._schedule.respace(self.use_timesteps)
        self.timestep_map = kept.timestep_map.tolist()
        schedule = make_schedule(kept.betas, kept.timestep_map, base.num_timesteps)
        self._set_up(schedule, *names, base._rescale)

    # q: from images to noise.

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x0), each of x_start's shape."""
        return originals.q_mean_variance(self._schedule, x_start, t)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t from x0, with noise drawn like x_start unless it is given."""
        noise = torch.randn_like(x_start) if noise is None else noise
        _same_shape("noise", noise, x_start)
        return originals.q_sample(self._schedule, x_start, t, noise)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x0)."""
        _same_shape("x_t", x_t, x_start)
        return originals.q_posterior_mean_variance(self._schedule, x_start, x_t, t)

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return originals.predict_xstart_from_eps(self._schedule, x_t, t, eps)

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return originals.predict_eps_from_xstart(self._schedule, x_t, t, pred_xstart)

    # p: one step from noise to images, operation for operation the originals'.

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
            model: called as model(x, the model's times, **model_kwargs).
            x: [B, C, ...].
            t: int64 [B], indices into the (re-spaced) process.
            clip_denoised: clamp x0 to [-1, 1].
            denoised_fn: applied to x0 before the clamp.
            model_kwargs: for the model.

        Raises:
            ValueError: t or the model's output of another shape than the process expects.
        """
        return self._p_mean_variance(self._call(model, x, t, model_kwargs), x, t, clip_denoised, denoised_fn)

    def condition_mean(
        self, cond_fn: Model, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Keywords = None
    ) -> Tensor:
        """The mean moved by the variance times ∇ log p(y | x_t), which cond_fn(x, times, **model_kwargs) computes."""
        return originals.condition_mean(p_mean_var, cond_fn(x, self._model_times(t), **_given(model_kwargs)))

    def condition_score(
        self, cond_fn: Model, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Keywords = None
    ) -> dict[str, Tensor]:
        """p_mean_var with mean and pred_xstart from the score moved by ∇ log p(y | x_t)."""
        gradient = cond_fn(x, self._model_times(t), **_given(model_kwargs))
        return originals.condition_score(self._schedule, p_mean_var, x, t, gradient)

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

        Noise is drawn like x after the model's call, unless it is given, or a function of x that draws it.
        """
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        drawn = _drawn(noise, x)
        if cond_fn is not None:
            p["mean"] = self.condition_mean(cond_fn, p, x, t, model_kwargs)
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
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            p = self.condition_score(cond_fn, p, x, t, model_kwargs)
        sample = originals.ddim_sample(self._schedule, p, x, t, _drawn(noise, x), eta=eta)
        return {"sample": sample, "pred_xstart": p["pred_xstart"]}

    # Loops.

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Keywords = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        **engine: Any,
    ) -> Tensor:
        """Sample by DDPM.

        Args:
            model: called as model(x, times, **model_kwargs): a network, a function of the caller's own, or
                `fastcfg.ClassifierFree`, whose samples the engine does not compute twice.
            shape: (B, C, ...), with `ClassifierFree` of the doubled batch.
            noise: x_T; drawn if left out.
            clip_denoised: clamp x0 to [-1, 1].
            denoised_fn: applied to x0 before the clamp.
            cond_fn: (x, times, **model_kwargs) -> ∇ log p(y | x_t).
            model_kwargs: for model and cond_fn.
            device: where to run; by default that of the model's parameters or the noise.
            progress: show a progress bar.
            **engine: what the originals lack: seed, guidance_scale (wraps the model in `ClassifierFree`), backend
                ("reference": the originals' own operations, bit for bit), noise_source ("torch", "philox" or a
                function (step, shape) -> normals, step 0 executed first), graph, threshold (a `DynamicThreshold`
                instead of the clamp).

        Returns:
            The samples, of the given shape. With `ClassifierFree` the second half repeats the first.

        Raises:
            TypeError: an unknown keyword, or a shape that is no tuple or list.
            ValueError: shapes, scales, names or batches that do not fit.
        """
        loop = (model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        return self._final("ddpm", 0.0, loop, engine)

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Keywords = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        **engine: Any,
    ) -> Iterator[dict[str, Tensor]]:
        """`p_sample_loop` as a generator of {"sample", "pred_xstart"} after every step."""
        loop = (model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        return self._steps("ddpm", 0.0, loop, engine)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Keywords = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        **engine: Any,
    ) -> Tensor:
        """Sample by DDIM with noise level eta; otherwise as `p_sample_loop`."""
        loop = (model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        return self._final("ddim", eta, loop, engine)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Keywords = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        **engine: Any,
    ) -> Iterator[dict[str, Tensor]]:
        """`ddim_sample_loop` as a generator of {"sample", "pred_xstart"} after every step."""
        loop = (model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        return self._steps("ddim", eta, loop, engine)

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
        """Run the deterministic ODE from images x [B, C, ...] to noise; otherwise as `p_sample_loop`."""
        deterministic(eta)
        loop = (model, tuple(x.shape), x, clip_denoised, denoised_fn, None, model_kwargs, device, progress)
        return self._final("ddim_reverse", 0.0, loop, engine)

    def _call(self, model: Model, x: Tensor, t: Tensor, model_kwargs: Keywords) -> Any:
        if t.shape != (len(x),):
            raise ValueError(f"t: got shape {tuple(t.shape)}, expected {(len(x),)}")
        return model(x, self._model_times(t), **(model_kwargs or {}))

    def _p_mean_variance(
        self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool, denoised_fn: Function | None
    ) -> dict[str, Any]:
        return originals.p_mean_variance(
            self._schedule,
            output,
            x,
            t,
            prediction=self._prediction,
            variance=self._variance,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
        )

    def _model_times(self, t: Tensor) -> Tensor:
        """What the model is called with at t: steps of the original process, rescaled to float if asked for."""
        if t.device not in self._times:
            self._times[t.device] = torch.as_tensor(self._schedule.timestep_map, device=t.device)
        times = self._times[t.device][t]
        if self._rescale:
            return times.float() * (1000.0 / self._schedule.original_num_timesteps)
        return times.to(t.dtype)

    def _final(self, solver: str, eta: float, loop: tuple[Any, ...], engine: dict[str, Any]) -> Tensor:
        request = _request(loop, engine, draws=solver != "ddim_reverse")
        if self._as_the_originals(request, solver):
            *_, last = self._originals_loop(solver, eta, request)
            return last["sample"]
        return self._engine.final(request, self._table(solver, eta))

    def _steps(
        self, solver: str, eta: float, loop: tuple[Any, ...], engine: dict[str, Any]
    ) -> Iterator[dict[str, Tensor]]:
        request = _request(loop, engine, draws=solver != "ddim_reverse")
        if self._as_the_originals(request, solver):
            return self._originals_loop(solver, eta, request)
        return self._engine.run(request, self._table(solver, eta))

    def _as_the_originals(self, request: Request, solver: str) -> bool:
        # With a predicted x_{t-1} the mean is the output itself, and denoised_fn only changes what is reported.
        reported_only = self._prediction == "previous_x" and solver == "ddpm" and request.denoised_fn is not None
        return request.backend == "reference" or reported_only

    def _table(self, solver: str, eta: float) -> StepTable:
        """The solver's table, built once: samplers know their programs by it."""
        if (solver, eta) not in self._tables:
            options: dict[str, Any] = {"prediction": self._prediction, "rescale_timesteps": self._rescale}
            if solver == "ddpm":
                options["variance"] = self._variance
            elif solver == "ddim":
                options["eta"] = eta
            self._tables[solver, eta] = getattr(solvers, solver)(self._schedule, **options)
        return self._tables[solver, eta]

    def _originals_loop(self, solver: str, eta: float, request: Request) -> Iterator[dict[str, Tensor]]:
        """The originals' loop over their own steps: the same calls, draws and roundings."""
        shape, device = tuple(request.shape), request.place
        source = _source(request, shape, device)
        x = source.start() if request.noise is None else request.noise
        order: Any = range(self.num_timesteps) if solver == "ddim_reverse" else reversed(range(self.num_timesteps))
        if request.progress:
            from tqdm.auto import tqdm

            order = tqdm(order, total=self.num_timesteps)
        step: Any = {"ddpm": self.p_sample, "ddim": self.ddim_sample, "ddim_reverse": self._reverse_step}[solver]
        options: dict[str, Any] = {
            "clip_denoised": request.clip_denoised,
            "denoised_fn": _thresholded(request),
            "cond_fn": request.cond_fn,
            "model_kwargs": request.model_kwargs,
            **({"eta": eta} if solver == "ddim" else {}),
        }
        for i, index in enumerate(order):
            t = torch.full((shape[0],), index, device=device)
            with torch.no_grad():
                out = step(request.model, x, t, **options, noise=partial(_draw, source, i))
            yield out
            x = out["sample"]

    def _reverse_step(self, model: Model, x: Tensor, t: Tensor, **options: Any) -> dict[str, Tensor]:
        del options["noise"], options["cond_fn"]
        return self.ddim_reverse_sample(model, x, t, **options)

    def _reversed(self, p: dict[str, Tensor], x: Tensor, t: Tensor) -> dict[str, Tensor]:
        sample = originals.ddim_reverse_sample(self._schedule, p, x, t)
        return {"sample": sample, "pred_xstart": p["pred_xstart"]}


def _request(loop: tuple[Any, ...], engine: dict[str, Any], draws: bool) -> Request:
    options = dict(engine)
    scale = options.pop("guidance_scale", None)
    unknown = sorted(set(options) - {"seed", "backend", "noise_source", "graph", "threshold"})
    if unknown:
        raise TypeError(
            f"sampling loop: got unexpected {', '.join(unknown)}, "
            "expected the originals' arguments, seed, guidance_scale, backend, noise_source, graph or threshold"
        )
    model, *others = loop
    options["draws"] = draws
    return Request(model if scale is None else ClassifierFree(model, scale), *others, **options)


def _source(request: Request, shape: tuple[int, ...], device: torch.device) -> NoiseSource:
    """The start, and the steps' noise for the whole batch."""
    if request.noise_source == "philox":
        raise ValueError("noise_source: got 'philox' with backend='reference', expected 'torch' or a function")
    drawn = torch_source(request.seed, shape, device)
    if not callable(request.noise_source):
        return drawn
    return recorded_source(request.noise_source, 0, shape, drawn.start)


def _thresholded(request: Request) -> Function | None:
    """denoised_fn, and behind it the threshold, whose result the clamp leaves alone."""
    function, threshold = request.denoised_fn, request.threshold
    if threshold is None:
        return function
    limits = (threshold.quantile, threshold.floor, threshold.ceiling)
    return lambda x0: dynamic_threshold(x0 if function is None else function(x0), *limits)


def _draw(source: NoiseSource, step: int, x: Tensor) -> Tensor:
    buffer = torch.empty_like(x)
    source.fill(step, buffer)  # type: ignore[misc]
    return buffer


def _drawn(noise: Tensor | Function | None, x: Tensor) -> Tensor:
    if noise is None:
        return torch.randn_like(x)
    return noise if isinstance(noise, Tensor) else noise(x)


def _given(model_kwargs: Keywords) -> dict[str, Any]:
    if model_kwargs is None:
        raise TypeError("model_kwargs: got None with a cond_fn, expected its keyword arguments")
    return model_kwargs


def deterministic(eta: float) -> None:
    if eta != 0.0:
        raise AssertionValueError(f"eta: got {eta}, expected 0: the reverse ODE is deterministic")


def _same_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
