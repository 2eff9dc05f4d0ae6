"""The step as a careful user writes it: coefficients looked up once on the device, nothing superfluous.

It runs eagerly or through `torch.compile`, which is the best that a sampler gets without kernels of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.cases import Provider, StepCase
from fastcfg.parity.steps import Case as OptionCase
from fastcfg.reference.plain import plain_row
from fastcfg.table import COLUMNS, DEVICE_COLUMNS


def tail(x: Tensor, output: Tensor, noise: Tensor | None, row: Tensor, c_in: Tensor, scale: float, kind: str) -> Any:
    """Guidance, x0, update, noise and the next model input.

    Args:
        x: float32 [B, C, ...].
        output: [2B, C or 2C, ...], conditional half first.
        noise: float32 [B, C, ...]; None draws it.
        row: float32 [columns] of a `StepTable`.
        c_in: float32 [], of the next row.
        scale: of the guidance.
        kind: "learned", "fixed" or "none": where the noise's standard deviation comes from.

    Returns:
        The next x and the next model input [2B, C, ...].
    """
    c = dict(zip(DEVICE_COLUMNS, row.unbind(), strict=True))
    channels = x.shape[1]
    cond, uncond = output[:, :channels].float().chunk(2)
    m = uncond + scale * (cond - uncond)
    x0 = (c["p_x"] * x + c["p_m"] * m).clamp(-1, 1)
    y = c["a_x"] * x + c["a_0"] * x0
    if kind != "none":
        noise = torch.randn_like(x) if noise is None else noise
        v = output[: len(x), channels:].float() if kind == "learned" else None
        y = y + (c["s"] if v is None else torch.exp2(c["l_0"] + c["l_v"] * v)) * noise
    entered = (c_in * y).to(output.dtype)
    return y, torch.cat([entered, entered])


def step(case: StepCase, mode: str | None = None) -> Provider:
    """The tail of a case.

    Args:
        case: the inputs.
        mode: of torch.compile; None runs eagerly.
    """
    table = case.table.on(case.x.device, torch.float32)
    kind = "learned" if case.table.learned_variance else "fixed" if case.table.uses_noise else "none"
    noise = case.noise[: len(case.x)].clone()
    timesteps = torch.from_numpy(case.schedule.timestep_map[::-1].copy()).to(case.x.device)
    next_c_in = table[:, COLUMNS.index("c_in")]
    function, begin = compiled(tail, mode)

    def run(draw: bool) -> tuple[Tensor, ...]:
        begin()
        drawn = None if draw and kind != "none" else noise
        y, entered = function(case.x, case.output, drawn, table[case.row], next_c_in[case.row + 1], case.scale, kind)
        return y, entered, timesteps[case.row + 1].expand(2 * len(case.x))

    return Provider.returning(run, lambda made: made[0], capturable=mode is None)


def option_step(case: OptionCase, device: torch.device, mode: str | None = None) -> Provider:
    """One of `fastcfg.parity`'s sets of options, by the formulas of `plain_row`."""
    spec = case.spec
    given = {name: tensor.to(device) for name, tensor in case.tensors.items()}
    x, output, table = given["x"], case.output.to(device), case.table.float().to(device)
    c_in = table[:, COLUMNS.index("c_in")]
    terms: dict[str, Any] = {name: given[name] for name in ("bound", "noise", "gradient")}
    terms |= {"weights": given["weights"][case.row], "history": tuple(given.get("history", ())[: spec.history])}

    def formulas(x: Tensor, output: Tensor, row: Tensor, c_in: Tensor, terms: dict[str, Any]) -> list[Tensor]:
        made = plain_row(row.unbind(), x, output, spec, **terms)  # type: ignore[arg-type]
        entered = (c_in * made["x"]).to(output.dtype)
        kept = [made["x0"]] * spec.keep_x0 + [made["saved"]] * (spec.history > 0)
        return [made["x"], torch.cat([entered] * spec.branches), *kept]

    function, begin = compiled(formulas, mode)

    def run(draw: bool) -> list[Tensor]:
        begin()
        made: list[Tensor] = function(x, output, table[case.row], c_in[case.row + 1], terms)
        return made

    return Provider.returning(run, lambda made: made[0], capturable=mode is None)


def compiled(function: Callable[..., Any], mode: str | None) -> tuple[Callable[..., Any], Callable[[], object]]:
    """A function compiled or as it is, and what must be called before each run of it."""
    if mode is None:
        return function, lambda: None
    result = torch.compile(function, mode=mode, fullgraph=True, dynamic=False)
    # With graphs of its own, torch overwrites the last run's results.
    return result, torch.compiler.cudagraph_mark_step_begin if mode != "default" else lambda: None


def copy_of(size: int, device: torch.device) -> Provider:
    """The floor of everything bound by bandwidth: a copy that moves `size` bytes, half read and half written."""
    source = torch.zeros(max(size // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Provider(lambda: None, lambda draw: target.copy_(source), None, capturable=True)


def smallest(device: torch.device) -> Provider:
    """The floor of everything bound by launches: an operation on one number."""
    number = torch.zeros(1, device=device)
    return Provider(lambda: None, lambda draw: number.add_(1.0), None, capturable=True)
