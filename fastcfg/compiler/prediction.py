"""What a sampling function's model predicts, and x0 as a sum of a row's state and output.

If a model predicts perfectly, every state of a deterministic sampler is x_i = α_i c + σ_i e for one image c and one
noise e. Written as complex numbers, x_i = α_i + i σ_i, its outputs are 1 (c itself), i (e, "epsilon"), i x_i (α_i e -
σ_i c, "v") or i - 1 (e - c, "flow"), so that the states are known up to the first one, which follows from the last: 1,
the image. Then x0 = p_x x + p_m m with p_x = 1/α_i, p_m = -σ_i/α_i for epsilon, α_i and -σ_i for v, 1 and -σ_i for
flow.
"""

from __future__ import annotations

import numpy as np

from .probe import Array, Response

PREDICTIONS = ("denoised", "v", "epsilon", "flow")
_EXACT = 1e-5  # for functions that compute their coefficients in float32


def predicted_x0(response: Response, prediction: str | None) -> tuple[str, Array, Array]:
    """The prediction, and p_x and p_m [C]. None finds it: "v" where the states stay on the unit circle; "denoised" if
    that cannot be told.

    Raises:
        ValueError: the function's coefficients do not fit the prediction.
    """
    one, zero = np.ones(response.calls), np.zeros(response.calls)
    if prediction is None:
        prediction = _found(response)
    if prediction == "denoised":
        return prediction, zero, one
    states = _states(response, prediction)
    if states is None or not _fits(states, prediction):
        raise ValueError(f"prediction: got {prediction!r}, expected one that the function's coefficients fit")
    alpha, sigma = states[:-1].real, states[:-1].imag
    if prediction == "v":
        return prediction, alpha, -sigma
    if prediction == "flow":
        return prediction, one, -sigma
    return prediction, 1 / alpha, -sigma / alpha


def _found(response: Response) -> str:
    end = response.states[-1, : 1 + response.calls]
    if abs(end.sum() - 1) < _EXACT * max(1.0, np.abs(end).max()):
        return "denoised"  # outputs that are one image lead to it
    for prediction in ("v", "epsilon"):
        states = _states(response, prediction)
        if response.calls > 1 and states is not None and _fits(states, prediction):
            return prediction
    return "denoised"


def _states(response: Response, prediction: str) -> Array | None:
    """α_i + i σ_i, complex [C + 1]; None if no first state leads to the image."""
    made = np.zeros((response.calls + 1, 2), dtype=complex)  # what a state is of: the first one, and 1
    outputs = np.zeros((response.calls, 2), dtype=complex)
    for i, row in enumerate(response.states):
        known = row[1 : 1 + i]
        made[i] = row[0] * np.array([1, 0]) + known @ outputs[:i]
        if i < response.calls:
            outputs[i] = {"epsilon": np.array([0, 1j]), "flow": np.array([0, 1j - 1]), "v": 1j * made[i]}[prediction]
    if abs(made[-1, 0]) < 1e-12:
        return None
    found: Array = made @ np.array([(1 - made[-1, 1]) / made[-1, 0], 1])
    return found


def _fits(states: Array, prediction: str) -> bool:
    """Whether states begin with noise and end with the image, without leaving the prediction's path."""
    alpha, sigma, slack = states.real, states.imag, _EXACT * np.abs(states).max()
    if prediction == "v":
        return bool((np.abs(np.abs(states) - 1) < _EXACT).all()) and bool((alpha[:-1] > -slack).all())
    falls = bool((sigma[:-1] > 0).all() and (np.diff(np.angle(states)) < slack).all())
    if prediction == "flow":
        return falls and bool((alpha > -slack).all() and (np.abs(alpha + sigma - 1) < slack).all())
    return falls and bool((alpha > 0).all())
