"""Models in noise-level space, where the state is x = x0 + σz: what they predict, and at which levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..schedule import Schedule
from ..sigmas import discrete_sigmas
from ..table import StepTable
from ..utils.checks import check_finite, check_one_of
from ._prediction import Array

PREDICTIONS = ("x0", "epsilon", "v", "edm", "flow")


@dataclass(frozen=True, eq=False)
class Denoiser:
    """How a solver in noise-level space calls a model and reads its output.

    Attributes:
        prediction: "x0": the model is D(x, σ) itself. "epsilon" or "v": a model of the discrete process `schedule`,
            called with x/√(σ²+1) and the timestep interpolated in log σ, clamped to the process (k-diffusion's
            `DiscreteEpsDDPMDenoiser` and `DiscreteVDDPMDenoiser`). "edm": the network F of Karras et al. 2022
            (https://arxiv.org/abs/2206.00364, table 1), called with x/√(σ²+sigma_data²) and log(σ)/4. "flow": the
            velocity v = z - x0 of x = (1-σ) x0 + σ z (Lipman et al. 2022, https://arxiv.org/abs/2210.02747), called
            with x and 1000 σ, for levels up to 1 (`fastcfg.sigmas.flow`). Its ODE dx/dσ = v = (x - x0)/σ is that of
            noise-level space, so any solver here that adds no noise solves it; `euler` and `heun` are diffusers'
            `FlowMatchEulerDiscreteScheduler` and `FlowMatchHeunDiscreteScheduler`.
        schedule: the process of "epsilon" and "v"; the model is called with times of its `timestep_map`.
        sigma_data: the data's standard deviation, for "edm" alone.

    Raises:
        TypeError: "epsilon" or "v" without a Schedule.
        ValueError: unknown prediction, a schedule it does not take or that ends in pure noise, sigma_data not above 0.

    Example:
        >>> from fastcfg import sigmas, solvers
        >>> levels, _ = sigmas.from_schedule(process := Schedule.named("scaled_linear"), 20)
        >>> table = solvers.dpmpp_2m(levels, denoiser=Denoiser("epsilon", schedule=process))
    """

    prediction: str = "x0"
    schedule: Schedule | None = None
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_one_of("prediction", self.prediction, PREDICTIONS)
        if self.prediction in ("epsilon", "v"):
            if not isinstance(self.schedule, Schedule):
                raise TypeError(f"schedule: got {type(self.schedule).__name__}, expected a Schedule")
            discrete_sigmas(self.schedule)
        elif self.schedule is not None:
            raise ValueError(f"schedule: got one, expected None with prediction {self.prediction!r}")
        object.__setattr__(self, "sigma_data", check_finite("sigma_data", self.sigma_data, above=0))

    def columns(self, σ: Array) -> dict[str, Array]:
        """The columns c_in, t, p_x and p_m of rows at noise levels σ [R] above 0, ValueError above 1 for a flow."""
        one = np.ones_like(σ)
        if self.prediction == "flow":
            if σ.max() > 1:
                raise ValueError(f"sigmas: got up to {σ.max():g}, expected at most 1 with prediction 'flow'")
            return {"c_in": one, "t": 1000 * σ, "p_x": one, "p_m": -σ}
        if self.schedule is not None:
            log_σ = np.log(discrete_sigmas(self.schedule))
            t, c_in = np.interp(np.log(σ), log_σ, self.schedule.model_timesteps()), 1 / np.sqrt(σ**2 + 1)
            if self.prediction == "epsilon":
                return {"c_in": c_in, "t": t, "p_x": one, "p_m": -σ}
            return {"c_in": c_in, "t": t, "p_x": c_in**2, "p_m": -σ * c_in}
        if self.prediction == "edm":
            c_in = 1 / np.sqrt(σ**2 + self.sigma_data**2)
            c_skip, c_out = (self.sigma_data * c_in) ** 2, σ * self.sigma_data * c_in
            return {"c_in": c_in, "t": np.log(σ) / 4, "p_x": c_skip, "p_m": c_out}
        return {"c_in": one, "t": σ, "p_x": 0 * one, "p_m": one}


RAW = Denoiser()


def noise_levels(sigmas: ArrayLike) -> Array:
    """`sigmas` as float64 [N + 1], checked as `euler` says."""
    try:
        σ = np.array(sigmas, dtype=np.float64)
    except (TypeError, ValueError) as error:
        got = type(sigmas).__name__
        raise TypeError(f"sigmas: got {got}, expected noise levels [N + 1] (see fastcfg.sigmas)") from error
    if σ.ndim != 1 or len(σ) < 2:
        raise ValueError(f"sigmas: got shape {σ.shape}, expected [N + 1] with N >= 1 steps (see fastcfg.sigmas)")
    if not (np.isfinite(σ).all() and (np.diff(σ) < 0).all() and σ[-1] >= 0):
        raise ValueError(f"sigmas: got {σ.tolist()}, expected finite values that fall strictly, the last at least 0")
    return σ


def at_least_0(**numbers: float) -> None:
    """Raise ValueError, with its name, for the first number that is negative or not finite."""
    for name, value in numbers.items():
        check_finite(name, value, least=0)


def denoising_table(
    denoiser: Denoiser, σ: Array, σ_max: float, *, end: float, noise: Array | None = None, **columns: Any
) -> StepTable:
    """A table of rows at noise levels σ [R], for a start of standard deviation σ_max and a run that ends at level
    `end`. `noise` is the deviation of the state's noise before each row, where it is not σ."""
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"denoiser: got {type(denoiser).__name__}, expected a Denoiser")
    # The state of a flow has another scale at every level.
    if denoiser.prediction == "flow" and np.any(columns.get("s", 0)):
        raise ValueError("denoiser: got prediction 'flow' for steps that add noise, expected a solver without")
    columns |= denoiser.columns(σ)
    deviation = np.append(σ if noise is None else noise, end)
    signal = 1 - deviation if denoiser.prediction == "flow" else np.ones_like(deviation)
    options: dict[str, Any] = {"initial_scale": float(σ_max), "levels": np.stack([signal, deviation], axis=1)}
    return StepTable.from_columns(integer_time=False, **options, **columns)
