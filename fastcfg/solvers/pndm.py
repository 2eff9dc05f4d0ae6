"""Pseudo numerical methods (Liu et al. 2022, https://arxiv.org/abs/2202.09778): Runge-Kutta and linear multistep.

Both move x along ε with the transfer φ(x, ε) = √ᾱ_to (x - √(1-ᾱ) ε)/√ᾱ + √(1-ᾱ_to) ε, and combine several ε as the
classical methods combine slopes. ε is the model's own: clipping changes the reported x0 alone.
"""

from __future__ import annotations

import numpy as np

from ..schedule import Schedule
from ..table import StepTable
from ..utils.checks import check_one_of, takes_numbers
from ._multistep import history
from ._prediction import Array, check_schedule, epsilon_coefficients, level_coefficients, levels_of, x0_coefficients
from ._rebuild import rebuilt

# Weights of the newest ε first, by order.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@rebuilt
@takes_numbers
def plms(
    schedule: Schedule, *, order: int = 4, prediction: str = "epsilon", rescale_timesteps: bool = False
) -> StepTable:
    """Pseudo linear multistep: one model evaluation a step, the last `order` ε combined.

    The first steps have the order that the ε before them allow, and order - 1 tensors are saved. The paper's warm-up,
    three steps of `prk`, would need four, one more than a table has: within the third, its start, the sum of its ε so
    far and the ε of both steps before are all still needed.

    Args, errors, result: as `ddim`, and order: 1 (DDIM) to 4.

    Example:
        >>> table = plms(Schedule.named("linear", 1000).respace(20))
        >>> len(table), table.num_history
        (20, 3)
    """
    check_one_of("order", order, ADAMS_BASHFORTH)
    p_x, p_m = x0_coefficients(schedule, prediction)
    e_x, e_m = epsilon_coefficients(schedule.alphas_cumprod, p_x, p_m, prediction)
    A, B = _transfer(schedule.alphas_cumprod, schedule.alphas_cumprod_prev)
    p_x, p_m, e_x, e_m, A, B = (column[::-1] for column in (p_x, p_m, e_x, e_m, A, B))

    rows = np.arange(schedule.num_timesteps)
    weights = np.zeros((len(rows), 4))
    for row in range(len(rows)):
        b = ADAMS_BASHFORTH[min(row + 1, order)]
        weights[row, : len(b)] = b
    now = B * weights[:, 0]
    columns = {"p_x": p_x, "p_m": p_m, "a_x": A + now * e_x, "a_m": now * e_m, "k_x": e_x, "k_m": e_m}
    columns |= history((B[:, None] * weights[:, 1:order]).T)
    times = schedule.model_timesteps(rescale_timesteps)[::-1]
    levels = levels_of(np.append(schedule.alphas_cumprod[::-1], 1.0))
    return StepTable.from_columns(t=times, **columns, integer_time=not rescale_timesteps, levels=levels, name="plms")


@takes_numbers
def prk(schedule: Schedule, *, prediction: str = "epsilon", rescale_timesteps: bool = False) -> StepTable:
    """Pseudo Runge-Kutta of fourth order, four model evaluations a step: glide-finetune's `prk_sample_loop`.

    As in that fork, the steps lead from t = T-2 to t = 0 (x_T is taken for x_{T-2}, and x_0 is returned unchanged), and
    the stages halfway between two timesteps take the mean of their ᾱ and of their model times: times are floats.

    Args, errors: as `ddim`, without prediction "previous_x", and
        schedule: the process, re-spaced to 2 more than the number of steps wanted: at least 3 timesteps.

    Result: a table of 4 * (`schedule.num_timesteps` - 2) rows, noisiest first; the four of a step share its index.

    Example:
        >>> table = prk(Schedule.named("linear", 1000).respace(20))
        >>> table.num_steps, table["t"][:4].tolist()
        (18, [946.0, 920.0, 920.0, 894.0])
    """
    check_schedule(schedule)
    if schedule.num_timesteps < 3:
        raise ValueError(f"schedule: got {schedule.num_timesteps} timesteps, expected at least 3")
    t = np.arange(schedule.num_timesteps - 2, 0, -1)
    stages = (t[:, None] - np.array([0, 0.5, 0.5, 1])).ravel()
    indices = np.arange(schedule.num_timesteps)
    ᾱ = np.interp(stages, indices, schedule.alphas_cumprod)
    p_x, p_m = level_coefficients(ᾱ, prediction)
    e_x, e_m = epsilon_coefficients(ᾱ, p_x, p_m, prediction)

    start, half, _, end = ᾱ.reshape(-1, 4).T
    A_half, B_half = _transfer(start, half)
    A, B = _transfer(start, end)
    # With X the step's start: h0 <- X at the first stage, h1 <- A_half X + B_half (ε_1 + 2 ε_2) at the second. At the
    # fourth x is A X + B ε_3, so A X + B (ε_1 + 2 ε_2 + 2 ε_3 + ε_4)/6 is a sum over x, ε_4, h0 and h1.
    c = B / (6 * B_half)
    on_x, on_ε, saved_ε = _rows(A_half, 0, 0, 1 / 3), _rows(B_half, B_half, B, B / 6), _rows(0, 2 * B_half, 0, 0)
    columns = {"p_x": p_x, "p_m": p_m, "a_x": on_x + on_ε * e_x, "a_m": on_ε * e_m}
    columns |= {"a_h0": _rows(0, A_half, A, 2 * A / 3 - c * A_half), "a_h1": _rows(0, 0, 0, c)}
    columns |= {"k_x": np.tile([1.0, 1.0, 0.0, 0.0], len(t)) + saved_ε * e_x, "k_m": saved_ε * e_m}
    columns |= {"slot": np.tile([0.0, 1.0, -1.0, -1.0], len(t)), "steps": np.repeat(np.arange(len(t)), 4)}
    times = np.interp(stages, indices, schedule.model_timesteps(rescale_timesteps))
    levels = levels_of(np.append(ᾱ, schedule.alphas_cumprod[0]))
    return StepTable.from_columns(t=times, **columns, integer_time=False, levels=levels, name="prk")


def _rows(*stages: Array | float) -> Array:
    """The rows of a column from its value at each stage, [N] or one number."""
    return np.stack(np.broadcast_arrays(*stages), axis=1).ravel()


def _transfer(ᾱ: Array, ᾱ_to: Array) -> tuple[Array, Array]:
    """(A, B) with φ(x, ε) = A x + B ε."""
    A = np.sqrt(ᾱ_to / ᾱ)
    return A, np.sqrt(1 - ᾱ_to) - A * np.sqrt(1 - ᾱ)
