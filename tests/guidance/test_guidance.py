"""Guidance specs: weights by row and sample, and which branches are evaluated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastcfg import CFG, Compose, Guidance, NoGuidance, StepTable
from fastcfg.reference import blend

pytestmark = pytest.mark.quick

PLAIN = StepTable.from_columns(t=[3, 2, 1, 0], a_x=1.0)
LEARNED = StepTable.from_columns(t=[3, 2, 1, 0], a_x=1.0, l_v=1.0, learned_variance=True)
# Two steps of two stages each.
STAGED = StepTable.from_columns(t=[3, 2, 1, 0], a_x=1.0, steps=[0, 0, 1, 1])
# CFG++: the second and third rows add the unconditional output.
RAW = StepTable.from_columns(t=[3, 2, 1, 0], a_x=1.0, a_u=[0.0, 0.5, 0.5, 0.0])

COND, UNCOND, BOTH = (0,), (1,), (0, 1)


def blended(guidance: Guidance, table: StepTable, batch: int, outputs: torch.Tensor) -> torch.Tensor:
    """float64 [R, B, C]: what a run blends at each row from outputs [K, B, C], evaluating the active branches only."""
    plan = guidance.plan(table, batch)
    rows = []
    for weights, active in zip(plan.weights, plan.active, strict=True):
        chosen = list(active)
        base = chosen.index(guidance.base) if guidance.base in chosen else None
        rows.append(blend(outputs[chosen].unbind(), base, torch.from_numpy(weights[:, chosen])))
    return torch.stack(rows)


def outputs(branches: int, batch: int) -> torch.Tensor:
    return torch.randn(branches, batch, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("scale", "want"),
    [
        (3, [[3.0, 3.0]] * 4),
        ([1.5, -2.0], [[1.5, -2.0]] * 4),
        ([2.5], [[2.5, 2.5]] * 4),
        (torch.tensor([1.5, -2.0], requires_grad=True), [[1.5, -2.0]] * 4),
        ([[1], [2], [3], [4]], [[1, 1], [2, 2], [3, 3], [4, 4]]),
        (np.arange(8).reshape(4, 2), [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (lambda progress: 4 * progress, [[0, 0], [1, 1], [2, 2], [3, 3]]),
        (lambda progress: [1 - progress, 2], [[1, 2], [0.75, 2], [0.5, 2], [0.25, 2]]),
    ],
    ids=["number", "per sample", "list of one", "tensor", "[R, 1]", "[R, B]", "function", "function per sample"],
)
def test_scales_in_every_spelling(scale: Any, want: Any) -> None:
    weights = CFG(scale).plan(PLAIN, 2).weights
    assert weights.dtype == np.float64
    assert weights[..., 0].tolist() == np.array(want, dtype=float).tolist()
    assert not weights[..., 1].any()


def test_a_function_of_progress_sees_steps_not_stages() -> None:
    assert CFG(lambda progress: progress).plan(STAGED, 1).weights[:, 0, 0].tolist() == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)])
def test_formulations_agree(order: tuple[str, str], interval: tuple[float, float]) -> None:
    scale = np.array([3.0, 0.0, 1.0, -1.5])
    m = outputs(2, 4)
    cond, uncond = m[order.index("cond")], m[order.index("uncond")]
    s = torch.from_numpy(scale)[:, None]
    want = torch.stack([uncond + s * (cond - uncond) if interval[0] <= i / 4 < interval[1] else cond for i in range(4)])
    for formulation, given in (("standard", scale), ("sum", scale), ("original", scale - 1)):
        got = blended(CFG(given, interval, formulation, order), PLAIN, 4, m)
        # Measured: 8.9e-16.
        assert (got - want).abs().max() < 1e-14, formulation


@pytest.mark.parametrize(
    ("scale", "plain", "learned"),
    [
        (3.0, BOTH, BOTH),
        (1.0, COND, COND),
        (0.0, UNCOND, BOTH),
        ([1.0, 1.0], COND, COND),
        ([1.0, 2.0], BOTH, BOTH),
        ([0.0, 1.0], BOTH, BOTH),
    ],
)
@pytest.mark.parametrize("formulation", ["standard", "original", "sum"])
def test_branches_without_weight_are_not_evaluated(
    scale: Any, plain: tuple[int, ...], learned: tuple[int, ...], formulation: str
) -> None:
    given = np.asarray(scale) - (formulation == "original")
    assert CFG(given, formulation=formulation).plan(PLAIN, 2).active == (plain,) * 4
    # The variance channels are the conditional branch's, whatever the scale.
    assert CFG(given, formulation=formulation).plan(LEARNED, 2).active == (learned,) * 4


def test_branches_follow_the_scale_row_by_row() -> None:
    assert CFG([[3.0], [1.0], [0.0], [2.0]]).plan(PLAIN, 3).active == (BOTH, COND, UNCOND, BOTH)


def test_branches_are_positions_in_the_batch() -> None:
    guidance = CFG([[3.0], [1.0], [0.0], [2.0]], order=("uncond", "cond"))
    assert (guidance.conditional, guidance.unconditional, guidance.base) == (1, 0, 0)
    assert guidance.plan(PLAIN, 1).active == (BOTH, (1,), (0,), BOTH)


def test_a_table_that_adds_the_unconditional_output_keeps_its_branch() -> None:
    assert CFG(1.0).plan(RAW, 1).active == (COND, BOTH, BOTH, COND)
    assert CFG(3.0, interval=(0.0, 0.5)).plan(RAW, 1).active == (BOTH, BOTH, BOTH, COND)
    outside = CFG(3.0, interval=(0.0, 0.25))
    m = outputs(2, 1)
    assert torch.allclose(blended(outside, RAW, 1, m)[1:], m[0].expand(3, 1, 5), rtol=0, atol=1e-15)


def test_a_table_that_adds_the_unconditional_output_needs_its_branch() -> None:
    with pytest.raises(ValueError, match="guidance: got branches cond, expected 'uncond' among them"):
        NoGuidance().plan(RAW, 1)


@pytest.mark.parametrize(
    ("interval", "inside"),
    [
        ((0.0, 1.0), [0, 1, 2, 3]),
        ((0.25, 0.75), [1, 2]),
        ((0.3, 0.8), [1, 2]),
        ((0.5, 1.0), [2, 3]),
        ((0.9, 1.0), [3]),
        ((0.0, 0.2), []),
    ],
)
def test_the_interval_counts_whole_steps(interval: tuple[float, float], inside: list[int]) -> None:
    active = CFG(3.0, interval=interval).plan(PLAIN, 1).active
    assert active == tuple(BOTH if i in inside else COND for i in range(4))


def test_the_interval_takes_all_stages_of_a_step() -> None:
    assert CFG(3.0, interval=(0.5, 1.0)).plan(STAGED, 1).active == (COND, COND, BOTH, BOTH)


def test_no_guidance_runs_the_conditional_branch() -> None:
    guidance = NoGuidance()
    assert guidance.branches == ("cond",)
    assert guidance.plan(LEARNED, 2).active == (COND,) * 4
    m = outputs(1, 2)
    assert torch.equal(blended(guidance, PLAIN, 2, m), m.expand(4, 2, 5))


def test_composition_of_three_conditionings() -> None:
    guidance = Compose({"cond": [2.0, 0.5], "image": 1.5, "style": lambda progress: -progress})
    assert guidance.branches == ("cond", "image", "style", "uncond")
    assert (guidance.conditional, guidance.unconditional, guidance.base) == (0, 3, 3)
    cond, image, style, uncond = m = outputs(4, 2)
    s = torch.tensor([2.0, 0.5], dtype=torch.float64)[:, None]
    got = blended(guidance, PLAIN, 2, m)
    for i in range(4):
        want = uncond + s * (cond - uncond) + 1.5 * (image - uncond) - i / 4 * (style - uncond)
        # Measured: 8.9e-16.
        assert (got[i] - want).abs().max() < 1e-14
    # The style has no weight at the first row.
    assert guidance.plan(PLAIN, 2).active == ((0, 1, 3), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))


def test_composition_of_one_conditioning_is_plain_guidance() -> None:
    m = outputs(2, 3)
    for scale in (3.0, 1.0, 0.0):
        assert torch.equal(blended(Compose({"cond": scale}), PLAIN, 3, m), blended(CFG(scale), PLAIN, 3, m))


def test_composition_that_needs_no_unconditional_branch_still_measures_from_it() -> None:
    guidance = Compose({"cond": 0.75, "image": 0.25})
    assert guidance.plan(PLAIN, 1).active == ((0, 1, 2),) * 4
    cond, image, _ = m = outputs(3, 1)
    assert torch.allclose(blended(guidance, PLAIN, 1, m)[0], 0.75 * cond + 0.25 * image, rtol=0, atol=1e-15)


def test_composition_with_an_interval() -> None:
    guidance = Compose({"cond": 2.0, "image": 1.0}, interval=(0.5, 1.0))
    assert guidance.plan(PLAIN, 1).active == ((0,), (0,), (0, 1, 2), (0, 1, 2))


class Halved(Guidance):
    """A user's own spec: half of the conditional output, then nothing at all."""

    branches = ("cond", "uncond")

    def weights(self, table: StepTable, batch: int) -> NDArray[np.float64]:
        weights = np.zeros((table.num_rows, batch, 2))
        weights[:2, :, 0] = 0.5
        return weights


def test_a_lone_branch_with_another_weight_than_one_is_still_weighted() -> None:
    m = outputs(2, 3)
    got = blended(Halved(), PLAIN, 3, m)
    assert torch.equal(got[:2], 0.5 * m[0].expand(2, 3, 5))
    assert not got[2:].any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CFG(float("nan")), "scale: got nan, expected finite"),
        (lambda: CFG([1.0, float("inf")]), r"scale: got \[1.0, inf\], expected finite"),
        (lambda: CFG("strong"), "scale: got 'strong', expected finite numbers"),
        (lambda: CFG(True), "scale: got True, expected finite numbers"),
        (lambda: CFG(rescale=True), "rescale: got True, expected a number from 0 to 1"),
        (lambda: CFG([[1.0], [2.0, 3.0]]), r"scale: got .*, expected finite numbers"),
        (lambda: CFG(np.full((1, 1, 1), np.inf)), r"scale: got shape \(1, 1, 1\) with others, expected finite numbers"),
        (lambda: CFG(channels=0), "channels: got 0, expected an integer of at least 1"),
        (lambda: CFG(channels=1.5), "channels: got 1.5, expected an integer"),
        (lambda: CFG([1.0, 2.0]).plan(PLAIN, 3), r"scale: got 2 values, expected 1 or one per sample \(3\)"),
        (lambda: CFG(np.ones((3, 1))).plan(PLAIN, 3), r"scale: got shape \(3, 1\), expected \(4, 1\) or \(4, 3\)"),
        (lambda: CFG(np.ones((4, 2))).plan(PLAIN, 3), r"scale: got shape \(4, 2\), expected \(4, 1\) or \(4, 3\)"),
        (lambda: CFG(lambda p: 1 / p if p else np.inf).plan(PLAIN, 1), "scale: got inf, expected finite"),
        (lambda: CFG(lambda p: [1.0, 2.0]).plan(PLAIN, 3), r"scale: the function returned shapes \[\(2,\)\]"),
        (lambda: CFG(interval=(0.5, 0.5)), r"interval: got \(0.5, 0.5\), expected 0 <= start < stop <= 1"),
        (lambda: CFG(interval=(-0.1, 0.5)), r"interval: got \(-0.1, 0.5\)"),
        (lambda: CFG(interval=(0.0, 1.1)), r"interval: got \(0.0, 1.1\)"),
        (lambda: CFG(interval=(0.0, float("nan"))), r"interval: got \(0.0, nan\)"),
        (lambda: CFG(formulation="diffusers"), "formulation: got 'diffusers', expected one of standard, original, sum"),
        (lambda: CFG(order=("cond", "cond")), r"order: got .*, expected a permutation of \('cond', 'uncond'\)"),
        (lambda: Compose({"image": 1.0}), r"scales: got \['image'\], expected names with 'cond' and without 'uncond'"),
        (lambda: Compose({"cond": 1.0, "uncond": 1.0}), r"scales: got \['cond', 'uncond'\]"),
        (lambda: Compose({"cond": 1.0, "image": float("nan")}), r"scales\['image'\]: got nan, expected finite"),
        (lambda: Compose({"cond": 1.0, "image": [1.0, 2.0]}).plan(PLAIN, 3), r"scales\['image'\]: got 2 values"),
        (lambda: Compose({"cond": 1.0}, interval=(1.0, 0.0)), r"interval: got \(1.0, 0.0\)"),
    ],
)
def test_errors_name_the_argument(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
