"""One row of a table applied to a state: the equations of `fastcfg.table` in torch, with the kernels' order of
operations and roundings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..step import StepSpec
from ._fma import fma


@dataclass(frozen=True)
class Scratch:
    """Memory for the results, like x; None allocates."""

    m: Tensor | None = None  # the blended output, later the standard deviation
    difference: Tensor | None = None  # a branch minus the base; with a weighted base, or three branches in delta form
    x0: Tensor | None = None  # the predicted x0
    low: Tensor | None = None  # [B, 1, ...], minus the clip bound
    saved: Tensor | None = None  # the tensor to save
    sum: Tensor | None = None  # the terms of x0 by the coefficients' rests, later the next x without its last term
    y: Tensor | None = None  # the next x; it may be x itself


def table_step(
    row: Mapping[str, Tensor],
    x: Tensor,
    outputs: Sequence[Tensor],
    spec: StepSpec,
    *,
    weights: Tensor | None = None,
    variance: Tensor | None = None,
    bound: Tensor | None = None,
    noise: Tensor | None = None,
    history: Sequence[Tensor] = (),
    gradient: Tensor | None = None,
    momentum: Tensor | None = None,
    scratch: Scratch = Scratch(),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Guidance, x0, update and the tensor to save.

    Args:
        row: a scalar tensor in x's dtype for every one of `DEVICE_COLUMNS`.
        x: [B, C, ...], float32 or float64.
        outputs: the K branches' outputs, each like x.
        spec: which terms exist, and so which of the following are needed.
        weights: [B, K], the row's blend weights ([B, K + 1] with momentum; [B, K, C] or [B, K, C, ...] by place).
        variance: the conditional branch's variance channels.
        bound: [B], the clip bound of x0.
        noise, gradient, momentum, history: as in `StepBuffers`, each like x.

    Returns:
        The next x, x0 (None if it is not predicted), and the tensor to save (None if the solver saves nothing).
    """
    added = momentum if spec.momentum else None
    m = blend(outputs, spec.base, weights, scratch.m, scratch.difference, spec.scaled, added)

    x0 = predict(row, x, m, scratch.x0, scratch.sum) if spec.predict_x0 else None
    if spec.clip:
        limit = per_sample(bound, x)  # type: ignore[arg-type]
        x0 = torch.clamp(x0, torch.neg(limit, out=scratch.low), limit, out=scratch.x0)  # type: ignore[arg-type]
        if spec.rescale:
            x0 = torch.div(x0, limit, out=scratch.x0)

    if spec.gradient:
        x0 = fma(row["p_g"], gradient, x0, out=scratch.x0)  # type: ignore[arg-type]

    saved = None
    if spec.history:
        saved = torch.mul(x, row["k_x"], out=scratch.saved)
        if x0 is not None:
            saved = fma(row["k_0"], x0, saved, out=scratch.saved)
        saved = fma(row["k_m"], m, saved, out=scratch.saved)

    # Small terms come first, mostly, which takes a third off the rounding of methods with saved tensors; states last.
    past = [(row[f"a_h{j}"], h) for j, h in enumerate(history)]
    terms = [(row["a_x_rest"], x), *([] if spec.saves_states else past)]
    if x0 is not None:
        terms.append((row["a_0"], x0))
    if spec.raw_output:
        terms.append((row["a_m"], m))
    if spec.unconditional is not None:
        terms.append((row["a_u"], outputs[spec.unconditional]))
    terms += [(row["a_x"], x), *(past if spec.saves_states else [])]
    y = torch.mul(terms[0][1], terms[0][0], out=scratch.sum)
    for coefficient, term in terms[1:-1]:
        y = fma(coefficient, term, y, out=scratch.sum)
    y = fma(*terms[-1], y, out=scratch.y)

    if spec.gradient:
        scale = row["a_g"]
        if spec.learned_variance:
            scale = torch.mul(variance, row["l_v"] + row["l_v"], out=scratch.m)  # type: ignore[arg-type]
            scale = torch.mul(torch.exp2(scale, out=scratch.m), row["a_g"], out=scratch.m)
        y = fma(scale, gradient, y, out=scratch.y)  # type: ignore[arg-type]

    if spec.noise_source != "none":
        std = row["s"]
        if spec.learned_variance:
            std = fma(row["l_v"], variance, row["l_0"], out=scratch.m)  # type: ignore[arg-type]
            std = torch.exp2(std, out=scratch.m)
        y = fma(std, noise, y, out=scratch.y)  # type: ignore[arg-type]
    return y, x0, saved


def predict(
    row: Mapping[str, Tensor], x: Tensor, m: Tensor, out: Tensor | None = None, rest: Tensor | None = None
) -> Tensor:
    """A row's unlimited x0 from the state and the blended output, each [B, C, ...]. `out`, which may be m, is memory
    for it, and `rest` for the terms of the coefficients' rests."""
    rest = fma(row["p_x_rest"], x, torch.mul(m, row["p_m_rest"], out=rest), out=rest)
    return fma(row["p_x"], x, fma(row["p_m"], m, rest, out=out), out=out)


def blend(
    outputs: Sequence[Tensor],
    base: int | None,
    weights: Tensor | None,
    out: Tensor | None = None,
    difference: Tensor | None = None,
    scaled: bool = False,
    momentum: Tensor | None = None,
) -> Tensor:
    """The guided output of K branches, each [B, C, ...], with weights [B, K]: the delta form from branch `base` (which
    is weighted too if `scaled`), or the weighted sum. A momentum [B, C, ...] is added with weight K. `out` and
    `difference` are memory, as `m` and `difference` of `Scratch`.

    Weights may also be [B, K, C] or [B, K, C, ...]. Where one branch's is 1 and the others' are 0, the delta form is
    that branch to the last bit, as where it is the only one evaluated.
    """
    if len(outputs) == 1:
        return outputs[0]
    by_place = weights.ndim > 2  # type: ignore[union-attr]
    w = weights.view(*weights.shape, *[1] * (outputs[0].ndim + 1 - weights.ndim)).unbind(1)  # type: ignore[union-attr]
    if base is None:
        m = torch.mul(outputs[0], w[0], out=out)
        for k in range(1, len(outputs)):
            m = fma(w[k], outputs[k], m, out=out)
    else:
        if len(outputs) == 2 and not scaled:
            # There is one difference, and `out` holds no running blend yet.
            difference = out
        m = torch.mul(outputs[base], w[base], out=out) if scaled else outputs[base]
        alone: Tensor | None = None  # where no branch before has a weight
        for k, m_k in enumerate(outputs):
            if k != base:
                m = fma(w[k], torch.sub(m_k, outputs[base], out=difference), m, out=out)
                if by_place:
                    exact = w[k] == 1 if alone is None else (w[k] == 1) & alone
                    m = torch.where(exact, m_k, m, out=out)
                    alone = w[k] == 0 if alone is None else (w[k] == 0) & alone
    return m if momentum is None else fma(w[-1], momentum, m, out=out)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] to [B, 1, ...], to broadcast with a tensor [B, C, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))
