"""Stand-ins for other projects' samplers, each with that project's interface and what is particular to it: the order
and names of arguments, how the model is called, where noise is drawn, what is returned, guidance of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def wide(values: Tensor, like: Tensor) -> Tensor:
    """Numbers per sample, as a factor of samples."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Network(nn.Module):
    """A network of almost no work that depends on all that it is given."""

    sigma_min, sigma_max = 0.0, float("inf")
    in_channels = out_dim = channels = 3
    self_condition = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -0.4, 0.2]))

    def forward(self, x: Tensor, t: Any, y: Any = None, **further: Any) -> Tensor:
        a, b, c = self.weight.detach().to(x.dtype)
        time = torch.as_tensor(t, dtype=x.dtype).reshape(-1).expand(len(x))
        time = time / (1 + time.abs())
        inside = a * x + wide(time, x) * b
        if isinstance(y, dict):
            y = next(iter(y.values()))
        if isinstance(y, list):
            y = y[0]
        if y is not None:
            inside = inside + c * wide(y.to(x.dtype).reshape(len(x), -1).mean(dim=1), x)
        return torch.tanh(inside) + 0.1 * x / (1 + wide(time, x).abs())

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        first, second = self(torch.cat([half, half]), t, y).chunk(2)
        mixed = second + cfg_scale * (first - second)
        return torch.cat([mixed, mixed])


# --- EDM and EDM2 ----------------------------------------------------------------------------------------------------


def edm_levels(n: int, low: float, high: float, rho: float, like: Tensor) -> Tensor:
    """The noise levels of EDM, with a 0 at the end."""
    part = torch.arange(n, dtype=torch.float64, device=like.device) / (n - 1)
    levels = (high ** (1 / rho) + part * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def edm_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Any = None,
    randn_like: Callable[..., Tensor] = torch.randn_like,
    num_steps: int = 6,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_noise: float = 1,
) -> Tensor:
    """EDM's: the state is float64, noise is drawn whether it is used or not, the levels are rounded by the net."""
    levels = edm_levels(num_steps, max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max), rho, latents)
    levels = torch.cat([net.round_sigma(levels[:-1]), levels[-1:]])
    x = latents.double() * levels[0]
    for i, (level, following) in enumerate(pairwise(levels)):
        raised = net.round_sigma(level * (1 + min(S_churn / num_steps, math.sqrt(2) - 1)))
        start = x + (raised**2 - level**2).sqrt() * S_noise * randn_like(x)
        slope = (start - net(start, raised, class_labels).double()) / raised
        x = start + (following - raised) * slope
        if i + 1 < num_steps:
            second = (x - net(x, following, class_labels).double()) / following
            x = start + (following - raised) * (slope + second) / 2
    return x


class StackedRandomGenerator:
    """EDM's: a generator for every sample."""

    def __init__(self, seeds: list[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def randn_like(self, like: Tensor) -> Tensor:
        draws = [torch.randn(like.shape[1:], dtype=like.dtype, generator=each) for each in self.generators]
        return torch.stack(draws)


def edm2_sampler(
    net: Any,
    noise: Tensor,
    labels: Any = None,
    gnet: Any = None,
    num_steps: int = 6,
    guidance: float = 1,
    S_churn: float = 0,
    dtype: torch.dtype = torch.float32,
    randn_like: Callable[..., Tensor] = torch.randn_like,
) -> Tensor:
    """EDM2's: float32, noise where there is churn, another network to guide by."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(x, t, labels).to(dtype)
        return out if guidance == 1 else gnet(x, t, labels).to(dtype).lerp(out, guidance)

    levels = edm_levels(num_steps, 0.002, 80, 7, noise).to(dtype)
    x = noise.to(dtype) * levels[0]
    for i, (level, following) in enumerate(pairwise(levels)):
        raised = level
        if S_churn > 0:
            raised = level * (1 + min(S_churn / num_steps, math.sqrt(2) - 1))
            x = x + (raised**2 - level**2).sqrt() * randn_like(x)
        slope = (x - denoise(x, raised)) / raised
        ahead = x + (following - raised) * slope
        if i + 1 < num_steps:
            ahead = x + (following - raised) * (slope + (ahead - denoise(ahead, following)) / following) / 2
        x = ahead
    return x


# --- SiT's transport and REPA ----------------------------------------------------------------------------------------


class Transport:
    """SiT's sampler: its functions are made first, and called as sample(x, model, **model_kwargs)."""

    def sample_ode(self, method: str = "euler", num_steps: int = 6) -> Callable[..., Tensor]:
        times = torch.linspace(0, 1, num_steps)

        def sample(x: Tensor, model: Any, **model_kwargs: Any) -> Tensor:
            def slope(t: Tensor, x: Tensor) -> Tensor:
                return model(x, torch.ones(len(x)).to(x) * t, **model_kwargs)

            passed = [x]
            for t, following in pairwise(times):
                step, first = following - t, slope(t, x)
                x = x + step * (first if method == "euler" else slope(t + step / 2, x + step / 2 * first))
                passed.append(x)
            return torch.stack(passed)

        return sample

    def sample_sde(
        self, method: str = "Euler", num_steps: int = 6, last_step_size: float = 0.04
    ) -> Callable[..., list[Tensor]]:
        times = torch.linspace(0, 1 - last_step_size, num_steps)
        step = times[1] - times[0]

        def drift(x: Tensor, t: Tensor, model: Any, **model_kwargs: Any) -> Tensor:
            t = wide(t, x)
            velocity = model(x, t.flatten(), **model_kwargs)
            score = -(x - t * velocity) / (1 - t)
            return velocity + (1 - t) * score

        def sample(init: Tensor, model: Any, **model_kwargs: Any) -> list[Tensor]:
            x, passed = init, []
            for t in times[:-1]:
                with torch.no_grad():
                    noise = torch.randn(x.size()).to(x) * step.sqrt()
                    at = torch.ones(x.size(0)).to(x) * t
                    noise = (2 * (1 - wide(at, x))).sqrt() * noise
                    if method == "Euler":
                        x = x + drift(x, at, model, **model_kwargs) * step + noise
                    else:
                        x = x + noise
                        first = drift(x, at, model, **model_kwargs)
                        x = x + (first + drift(x + step * first, at + step, model, **model_kwargs)) / 2 * step
                    passed.append(x)
            at = torch.ones(len(init)) * times[-1]
            return [*passed, x + drift(x, at, model, **model_kwargs) * last_step_size]

        return sample


def repa_euler(
    model: Any, latents: Tensor, y: Tensor, num_steps: int = 6, heun: bool = False, cfg_scale: float = 1.0
) -> Tensor:
    """REPA's: the state is float64, the model is given float32 and returns a tuple, guidance doubles the batch."""
    times, x = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), latents.double()
    null = torch.full((len(y),), 10.0)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        inputs, labels = (torch.cat([x] * 2), torch.cat([y, null])) if cfg_scale > 1 else (x, y)
        at = torch.ones(len(inputs), dtype=torch.float64) * t
        out = model(inputs.to(latents.dtype), at.to(latents.dtype), y=labels)[0].double()
        if cfg_scale > 1:
            conditional, unconditional = out.chunk(2)
            out = unconditional + cfg_scale * (conditional - unconditional)
        return out

    with torch.no_grad():
        for i, (t, following) in enumerate(pairwise(times)):
            first = velocity(x, t)
            ahead = x + (following - t) * first
            if heun and i + 1 < num_steps:
                ahead = x + (following - t) * (first + velocity(ahead, following)) / 2
            x = ahead
    return x


def repa_euler_maruyama(model: Any, latents: Tensor, y: Tensor, num_steps: int = 6, cfg_scale: float = 1.0) -> Tensor:
    """REPA's stochastic sampler: a draw before the model's call, and a score from the velocity of either half."""
    times, x = torch.linspace(1.0, 0.04, num_steps, dtype=torch.float64), latents.double()
    times = torch.cat([times, times.new_zeros(1)])
    null = torch.full((len(y),), 10.0)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        inputs, labels = (torch.cat([x] * 2), torch.cat([y, null])) if cfg_scale > 1 else (x, y)
        at = torch.ones(len(inputs), dtype=torch.float64) * t
        velocity = model(inputs.to(latents.dtype), at.to(latents.dtype), y=labels)[0].double()
        score = ((t - 1) * velocity - inputs) / (t**2 + (1 - t) * t)
        out = velocity - t * score
        if cfg_scale > 1:
            conditional, unconditional = out.chunk(2)
            out = unconditional + cfg_scale * (conditional - unconditional)
        return out

    with torch.no_grad():
        for t, following in pairwise(times[:-1]):
            noise = torch.randn_like(x) * (following - t).abs().sqrt()
            x = x + drift(x, t) * (following - t) + (2 * t).sqrt() * noise
        return x + drift(x, times[-2]) * (times[-1] - times[-2])


# --- CompVis ---------------------------------------------------------------------------------------------------------


class LatentDiffusion(nn.Module):
    """CompVis': what its samplers ask of their model, and a loop of its own that clamps x0."""

    num_timesteps, parameterization, clip_denoised = 100, "eps", True

    def __init__(self) -> None:
        super().__init__()
        self.model = Network()
        betas = torch.linspace(1e-3**0.5, 0.05**0.5, self.num_timesteps, dtype=torch.float64) ** 2
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0).float())

    @property
    def device(self) -> torch.device:
        return self.betas.device  # type: ignore[return-value]

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.model(x, t, cond)  # type: ignore[no-any-return]

    @torch.no_grad()
    def p_sample_loop(self, cond: Any, shape: Any, timesteps: int | None = None) -> Tensor:
        x = torch.randn(shape, device=self.device)
        for i in reversed(range(timesteps or self.num_timesteps)):
            t = torch.full((shape[0],), i, dtype=torch.long)
            a, before = self.alphas_cumprod[i], self.alphas_cumprod[max(i - 1, 0)] if i else torch.ones(())  # type: ignore
            x_recon = (x - (1 - a).sqrt() * self.apply_model(x, t, cond)) / a.sqrt()
            if self.clip_denoised:
                x_recon.clamp_(-1.0, 1.0)
            beta = 1 - a / before
            mean = beta * before.sqrt() / (1 - a) * x_recon + (1 - before) * (1 - beta).sqrt() / (1 - a) * x
            noise = torch.randn(x.shape, device=x.device)
            x = mean + (beta * (1 - before) / (1 - a)).sqrt() * noise * (i > 0)
        return x


class DDIMSampler:
    """CompVis' DDIM: it draws its start, guides by itself, and returns its intermediate samples too."""

    def __init__(self, model: Any) -> None:
        self.model, self.ddpm_num_timesteps = model, model.num_timesteps

    def make_schedule(self, steps: int, eta: float) -> None:
        self.timesteps = list(range(1, self.ddpm_num_timesteps, self.ddpm_num_timesteps // steps))
        self.alphas = self.model.alphas_cumprod[self.timesteps]
        self.alphas_before = torch.cat([self.model.alphas_cumprod[:1], self.alphas[:-1]])
        ratio = (1 - self.alphas_before) / (1 - self.alphas) * (1 - self.alphas / self.alphas_before)
        self.sigmas = eta * ratio.sqrt()

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: tuple[int, ...],
        conditioning: Any = None,
        callback: Any = None,
        eta: float = 0.0,
        mask: Any = None,
        x0: Any = None,
        temperature: float = 1.0,
        x_T: Any = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        verbose: bool = True,
    ) -> Any:
        self.make_schedule(S, eta)
        print(f"sampling {S} steps")
        x = torch.randn((batch_size, *shape), device=self.model.betas.device) if x_T is None else x_T
        kept: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        old: list[Tensor] = []
        for i, step in enumerate(reversed(self.timesteps)):
            index = len(self.timesteps) - 1 - i
            t = torch.full((batch_size,), step, dtype=torch.long)
            if mask is not None:
                x = x0 * mask + (1 - mask) * x
            guided = (unconditional_guidance_scale, unconditional_conditioning)
            x, pred_x0 = self.step(x, conditioning, t, index, temperature, old, *guided)
            if callback:
                callback(i)
            if index % log_every_t == 0 or i == 0:
                kept["x_inter"].append(x)
                kept["pred_x0"].append(pred_x0)
        return x, kept

    def output(self, x: Tensor, c: Any, t: Tensor, scale: float, unconditional: Any) -> Tensor:
        if unconditional is None or scale == 1.0:
            return self.model.apply_model(x, t, c)  # type: ignore[no-any-return]
        both = self.model.apply_model(torch.cat([x] * 2), torch.cat([t] * 2), torch.cat([unconditional, c]))
        e_uncond, e = both.chunk(2)
        return e_uncond + scale * (e - e_uncond)  # type: ignore[no-any-return]

    def move(self, x: Tensor, e: Tensor, index: int, temperature: float) -> tuple[Tensor, Tensor]:
        a, before, sigma = (
            torch.full((len(x), 1, 1, 1), float(values[index]))
            for values in (self.alphas, self.alphas_before, self.sigmas)
        )
        pred_x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        noise = sigma * torch.randn(x.shape) * temperature
        return before.sqrt() * pred_x0 + (1 - before - sigma**2).sqrt() * e + noise, pred_x0

    def step(
        self, x: Tensor, c: Any, t: Tensor, index: int, temperature: float, old: list[Tensor], *guidance: Any
    ) -> tuple[Tensor, Tensor]:
        return self.move(x, self.output(x, c, t, *guidance), index, temperature)


class PLMSSampler(DDIMSampler):
    """CompVis' PLMS: two evaluations in its first step, up to three outputs kept."""

    def step(
        self, x: Tensor, c: Any, t: Tensor, index: int, temperature: float, old: list[Tensor], *guidance: Any
    ) -> Any:
        e = self.output(x, c, t, *guidance)
        if not old:
            ahead, _ = self.move(x, e, index, temperature)
            at = torch.full_like(t, self.timesteps[max(index - 1, 0)])
            mixed = (e + self.output(ahead, c, at, *guidance)) / 2
        elif len(old) == 1:
            mixed = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            mixed = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mixed = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        old[:] = [*old[-2:], e]
        return self.move(x, mixed, index, temperature)


# --- DPM-Solver and UniPC as they are called -------------------------------------------------------------------------


class NoiseScheduleVP:
    """The linear process in continuous time."""

    T, steps = 1.0, 1000

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def std(self, t: Tensor) -> Tensor:
        return torch.sqrt(1 - torch.exp(2 * self.log_alpha(t)))

    def lam(self, t: Tensor) -> Tensor:
        return self.log_alpha(t) - self.std(t).log()


def model_wrapper(
    model: Any, schedule: NoiseScheduleVP, condition: Any = None, unconditional: Any = None, scale: float = 1.0
) -> Any:
    """DPM-Solver's: an ε-model of continuous time, guided."""

    def noise(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        at = (t - 1 / schedule.steps) * 1000
        return model(x, at) if cond is None else model(x, at, cond)  # type: ignore[no-any-return]

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if scale == 1.0 or unconditional is None:
            return noise(x, t, condition)
        first, second = noise(torch.cat([x] * 2), torch.cat([t] * 2), torch.cat([unconditional, condition])).chunk(2)
        return first + scale * (second - first)

    return guided


class DPM_Solver:  # noqa: N801
    """dpm_solver_pytorch's: made with the model, sampled from x."""

    def __init__(self, model_fn: Any, noise_schedule: Any, correcting_x0_fn: Any = None) -> None:
        self.model = lambda x, t: model_fn(x, t.expand(len(x)))
        self.noise_schedule, self.correcting_x0_fn = noise_schedule, correcting_x0_fn

    def data(self, x: Tensor, t: Tensor) -> Tensor:
        process = self.noise_schedule
        x0: Tensor = (x - process.std(t) * self.model(x, t)) / process.alpha(t)
        return x0 if self.correcting_x0_fn is None else self.correcting_x0_fn(x0, t)  # type: ignore[no-any-return]

    def sample(
        self, x: Tensor, steps: int = 6, order: int = 2, method: str = "multistep", return_intermediate: bool = False
    ) -> Any:
        process = self.noise_schedule
        kept = []
        with torch.no_grad():
            times = torch.linspace(process.T, 1 / process.steps, steps + 1, device=x.device)
            past: list[Tensor] = []
            for i, (s, t) in enumerate(pairwise(times)):
                x0 = self.data(x, s.reshape(1))
                h = process.lam(t) - process.lam(s)
                if past and order > 1:
                    r = (process.lam(s) - process.lam(times[i - 1])) / h
                    mixed = x0 + (x0 - past[-1]) / (2 * r)
                else:
                    mixed = x0
                x = process.std(t) / process.std(s) * x - process.alpha(t) * torch.expm1(-h) * mixed
                past = [x0]
                kept.append(x)
        return (x, kept) if return_intermediate else x


class UniPC(DPM_Solver):
    """Its steps multiply stacked outputs by a small vector of coefficients, in float32."""

    def sample(self, x: Tensor, steps: int = 6, order: int = 3, **_: Any) -> Any:
        process, past = self.noise_schedule, list[Tensor]()
        times = torch.linspace(process.T, 1 / process.steps, steps + 1, device=x.device)
        for s, t in pairwise(times):
            past = [*past[-2:], self.data(x, s.reshape(1))]
            h = process.lam(t) - process.lam(s)
            rhos = torch.tensor([0.5, 0.1])[: len(past) - 1]
            x = process.std(t) / process.std(s) * x - process.alpha(t) * torch.expm1(-h) * past[-1]
            if len(rhos):
                differences = torch.stack([past[-1] - old for old in past[:-1]], dim=1)
                x = x - process.alpha(t) * torch.expm1(-h) * torch.einsum("k,bkchw->bchw", rhos, differences)
        return x


# --- Stability's ------------------------------------------------------------------------------------------------------


class VanillaCFG:
    """sgm's guider: it lays the branches side by side, and blends what comes back."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def prepare_inputs(self, x: Tensor, s: Tensor, c: dict[str, Tensor], uc: dict[str, Tensor]) -> Any:
        both = {name: torch.cat((uc[name], c[name])) if name == "vector" else c[name] for name in c}
        return torch.cat([x] * 2), torch.cat([s] * 2), both

    def __call__(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        first, second = denoised.chunk(2)
        return first + self.scale * (second - first)


class EDMSampler:
    """sgm's: called with the denoiser, x, which it scales in place, and two dictionaries of conditionings."""

    def __init__(self, num_steps: int = 6, scale: float = 5.0, s_churn: float = 0.0) -> None:
        self.num_steps, self.guider, self.s_churn = num_steps, VanillaCFG(scale), s_churn

    def __call__(self, denoiser: Any, x: Tensor, cond: Any, uc: Any = None, num_steps: int | None = None) -> Tensor:
        levels = edm_levels(num_steps or self.num_steps, 0.03, 14.6, 7, x).float()
        x *= torch.sqrt(1.0 + levels[0] ** 2.0)
        ones, uc = x.new_ones([len(x)]), cond if uc is None else uc
        for level, following in pairwise(levels):
            raised = level * (1 + self.s_churn / len(levels))
            if self.s_churn > 0:
                x = x + torch.randn_like(x) * (raised**2 - level**2).sqrt()
            out = denoiser(*self.guider.prepare_inputs(x, ones * raised, cond, uc))
            denoised = self.guider(out, ones * raised)
            x = x + (x - denoised) / wide(ones * raised, x) * wide(ones * (following - raised), x)
        return x


def sample_audio(
    model: Any, x: Tensor, steps: int, eta: float, callback: Any = None, sigma_max: float = 1.0, **extra_args: Any
) -> Tensor:
    """stable-audio's: (B, C, T), v-prediction, the third argument is a number of steps."""
    t = torch.linspace(sigma_max, 0, steps + 1)[:-1]
    alphas, sigmas = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
    ones = x.new_ones([len(x)])
    for i in range(steps):
        v = model(x, ones * t[i], **extra_args)
        pred, eps = x * alphas[i] - v * sigmas[i], x * sigmas[i] + v * alphas[i]
        if i < steps - 1:
            noise = eta * (sigmas[i + 1] / sigmas[i]) * (1 - alphas[i] ** 2 / alphas[i + 1] ** 2).sqrt()
            x = pred * alphas[i + 1] + eps * (sigmas[i + 1] ** 2 - noise**2).sqrt()
            if eta:
                x += torch.randn_like(x) * noise
        if callback is not None:
            callback({"x": x, "t": t[i], "i": i, "denoised": pred})
    return pred


def sample_rectified_flow(
    model: Any,
    x: Tensor,
    steps: Any = None,
    sigma_max: float = 1,
    sigmas: Any = None,
    callback: Any = None,
    **args: Any,
) -> Tensor:
    """stable-audio's Euler: steps or sigmas."""
    t = torch.linspace(sigma_max, 0, steps + 1) if sigmas is None else sigmas
    for i, (now, following) in enumerate(pairwise(t)):
        v = model(x, now * torch.ones((len(x),), dtype=x.dtype), **args)
        x = x + (following - now) * v
        if callback is not None:
            callback({"x": x, "t": now, "i": i + 1, "denoised": x - following * v})
    return x


def v_sample(model: Any, x: Tensor, steps: Tensor, eta: float, extra_args: Any, callback: Any = None) -> Tensor:
    """v-diffusion's: the levels are called steps."""
    alphas, sigmas, ones = torch.cos(steps * math.pi / 2), torch.sin(steps * math.pi / 2), x.new_ones([len(x)])
    for i in range(len(steps)):
        v = model(x, ones * steps[i], **extra_args).float()
        pred, eps = x * alphas[i] - v * sigmas[i], x * sigmas[i] + v * alphas[i]
        if callback is not None:
            callback({"x": x, "i": i, "t": steps[i], "v": v, "pred": pred})
        if i < len(steps) - 1:
            noise = eta * (sigmas[i + 1] / sigmas[i]) * (1 - alphas[i] ** 2 / alphas[i + 1] ** 2).sqrt()
            x = pred * alphas[i + 1] + eps * (sigmas[i + 1] ** 2 - noise**2).sqrt()
            if eta:
                x += torch.randn_like(x) * noise
    return pred


# --- Flux and flow_matching -------------------------------------------------------------------------------------------


def flux_denoise(
    model: Any, img: Tensor, img_ids: Tensor, txt: Tensor, vec: Tensor, timesteps: list[float], guidance: float = 4.0
) -> Tensor:
    """Flux': the model is called by keyword, the times are a list."""
    strength = torch.full((len(img),), guidance, dtype=img.dtype)
    for t, following in pairwise(timesteps):
        at = torch.full((len(img),), t, dtype=img.dtype)
        img = img + (following - t) * model(img=img, img_ids=img_ids, txt=txt, y=vec, timesteps=at, guidance=strength)
    return img


def flux_model(**given: Tensor) -> Tensor:
    x, t = given["img"], given["timesteps"]
    inside = x * 0.6 + wide(t + 0.1 * given["guidance"] + given["y"].mean(dim=1), x)
    return torch.tanh(inside + wide(given["txt"].mean(dim=(1, 2)), x)) + 0.1 * x


class ODESolver:
    """flow_matching's: the model is in the object, x_init may stand anywhere."""

    def __init__(self, velocity_model: Any) -> None:
        self.velocity_model = velocity_model

    def sample(
        self,
        x_init: Tensor,
        step_size: float | None,
        method: str = "euler",
        time_grid: Tensor | None = None,
        return_intermediates: bool = False,
        **model_extras: Any,
    ) -> Any:
        steps = round(1 / (step_size or 0.25))
        x, passed = x_init, [x_init]
        for i in range(steps):
            t = torch.tensor(i / steps)
            x = x + self.velocity_model(x=x, t=t, **model_extras) / steps
            passed.append(x)
        return torch.stack([passed[0], passed[-1]]) if return_intermediates else x


# --- Karras samplers of point-e and of consistency models -------------------------------------------------------------


class DummyGenerator:
    """consistency_models' generator of seeds that are torch's own."""

    def randn_like(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.randn_like(*args, **kwargs)


def sample_karras_heun(denoiser: Any, x: Tensor, sigmas: Tensor, generator: Any, s_churn: float = 0.0) -> Tensor:
    """consistency_models' Heun: noise is drawn whether it is used or not, by an object of its own."""
    ones = x.new_ones([len(x)])
    for level, following in pairwise(sigmas):
        noise, raised = generator.randn_like(x), level * (1 + min(s_churn / (len(sigmas) - 1), 2**0.5 - 1))
        x = x + noise * (raised**2 - level**2) ** 0.5
        slope = (x - denoiser(x, raised * ones)) / raised
        if following == 0:
            x = x + slope * (following - raised)
        else:
            ahead = x + slope * (following - raised)
            second = (ahead - denoiser(ahead, following * ones)) / following
            x = x + (slope + second) / 2 * (following - raised)
    return x


class KarrasDenoiser:
    """consistency_models' diffusion object: no loops, a denoiser."""

    sigma_data, sigma_max, sigma_min, weight_schedule, distillation, num_timesteps = (
        0.5,
        80.0,
        0.002,
        "karras",
        True,
        40,
    )

    def denoise(self, model: Any, x_t: Tensor, sigmas: Tensor, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
        out = model(x_t, 250 * torch.log(sigmas + 1e-44), **model_kwargs)
        skip = wide(self.sigma_data**2 / (sigmas**2 + self.sigma_data**2), x_t)
        return out, skip * x_t + (1 - skip) * out


# --- lucidrains ------------------------------------------------------------------------------------------------------


def picked(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return wide(values.gather(-1, t), like)


class DenoisingDiffusion(nn.Module):
    """lucidrains': a module that has the network, float32 tables, an objective, and loops that take a shape."""

    def __init__(
        self,
        model: Any,
        *,
        image_size: int = 8,
        timesteps: int = 12,
        sampling_timesteps: int | None = None,
        objective: str = "pred_v",
        ddim_sampling_eta: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.image_size, self.objective = model, (image_size, image_size), objective
        self.channels, self.self_condition = model.channels, model.self_condition
        betas = torch.linspace(0.02, 0.3, timesteps, dtype=torch.float64)
        alphas = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
        variance = betas * (1 - before) / (1 - alphas)
        tables = {
            "betas": betas,
            "alphas_cumprod": alphas,
            "alphas_cumprod_prev": before,
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * before.sqrt() / (1 - alphas),
            "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - alphas),
        }
        for name, values in tables.items():
            self.register_buffer(name, values.float())
        self.num_timesteps, self.sampling_timesteps = timesteps, sampling_timesteps or timesteps
        self.is_ddim_sampling, self.ddim_sampling_eta = self.sampling_timesteps < timesteps, ddim_sampling_eta

    def unnormalize(self, x: Tensor) -> Tensor:
        return (x + 1) * 0.5

    def x_start(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        out, a = self.model(x, t, cond), picked(self.alphas_cumprod, t, x)  # type: ignore[arg-type]
        if self.objective == "pred_noise":
            return (1 / a).sqrt() * x - (1 / a - 1).sqrt() * out  # type: ignore[no-any-return]
        return out if self.objective == "pred_x0" else a.sqrt() * x - (1 - a).sqrt() * out

    @torch.inference_mode()
    def p_sample(self, x: Tensor, t: int, x_self_cond: Any = None) -> tuple[Tensor, Tensor]:
        at = torch.full((len(x),), t, dtype=torch.long)
        x_start = self.x_start(x, at, x_self_cond)
        x_start.clamp_(-1.0, 1.0)
        mean = picked(self.posterior_mean_coef1, at, x) * x_start + picked(self.posterior_mean_coef2, at, x) * x  # type: ignore
        noise = torch.randn_like(x) if t > 0 else 0.0
        return mean + (0.5 * picked(self.posterior_log_variance_clipped, at, x)).exp() * noise, x_start  # type: ignore

    @torch.inference_mode()
    def p_sample_loop(self, shape: Any, return_all_timesteps: bool = False) -> Tensor:
        x = torch.randn(shape, device=self.betas.device)
        passed, x_start = [x], None
        for t in reversed(range(self.num_timesteps)):
            x, x_start = self.p_sample(x, t, x_start if self.self_condition else None)
            passed.append(x)
        return self.unnormalize(torch.stack(passed, dim=1) if return_all_timesteps else x)

    @torch.inference_mode()
    def ddim_sample(self, shape: Any, return_all_timesteps: bool = False) -> Tensor:
        times = torch.linspace(-1, self.num_timesteps - 1, self.sampling_timesteps + 1).int().tolist()[::-1]
        x = torch.randn(shape, device=self.betas.device)
        passed, x_start = [x], None
        for t, following in pairwise(times):
            at = torch.full((len(x),), t, dtype=torch.long)
            x_start = self.x_start(x, at, x_start if self.self_condition else None).clamp(-1, 1)
            a = self.alphas_cumprod[t]
            eps = ((1 / a).sqrt() * x - x_start) / (1 / a - 1).sqrt()
            if following < 0:
                x = x_start
            else:
                b = self.alphas_cumprod[following]
                sigma = self.ddim_sampling_eta * ((1 - a / b) * (1 - b) / (1 - a)).sqrt()
                x = x_start * b.sqrt() + (1 - b - sigma**2).sqrt() * eps + sigma * torch.randn_like(x)
            passed.append(x)
        return self.unnormalize(torch.stack(passed, dim=1) if return_all_timesteps else x)

    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False) -> Tensor:
        loop = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return loop((batch_size, self.channels, *self.image_size), return_all_timesteps=return_all_timesteps)  # type: ignore


class SuperResolution(nn.Module):
    """SR3's interface: a module with its network, whose loop takes the low-resolution image and lays it beside x."""

    def __init__(self) -> None:
        super().__init__()
        self.num_timesteps, self.conditional = 10, True
        betas = torch.linspace(0.01, 0.2, 10, dtype=torch.float64)
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0).float())
        self.register_buffer("levels", torch.cat([betas.new_ones(1), torch.cumprod(1 - betas, 0)]).sqrt().float())

    def denoise_fn(self, x: Tensor, level: Tensor) -> Tensor:
        low, noisy = x.chunk(2, dim=1)
        return torch.tanh(0.8 * noisy - wide(level, noisy) * low)

    @torch.no_grad()
    def super_resolution(self, x_in: Tensor, continous: bool = False) -> Tensor:
        x = torch.randn(x_in.shape)
        for t in reversed(range(self.num_timesteps)):
            level = self.levels[t + 1].repeat(len(x), 1)  # type: ignore[index]
            out = self.denoise_fn(torch.cat([x_in, x], dim=1), level)
            a, before, beta = self.levels[t + 1] ** 2, self.levels[t] ** 2, self.betas[t]  # type: ignore[index]
            x0 = ((x - (1 - a).sqrt() * out) / a.sqrt()).clamp(-1, 1)
            x = beta * before.sqrt() / (1 - a) * x0 + (1 - before) * (1 - beta).sqrt() / (1 - a) * x
            if t:
                x = x + (beta * (1 - before) / (1 - a)).sqrt() * torch.randn_like(x)
        return x


def repa_network(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """REPA's network returns its projections too."""
    return Network()(x, t, y), [x]
