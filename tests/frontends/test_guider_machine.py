"""Random sequences of what is done to a guider between two steps: the fused one beside the original, and beside the
original in float64."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from support.guider_cases import CASES, PREDICTIONS, STEPS, WITH_MOMENTUM, error, guide, guide_exactly, make
from torch import Tensor

from fastcfg.frontends.diffusers import fuse

SHAPES = ((3, 4, 6), (3, 4, 6), (2, 4, 6), (1, 2, 5), (2, 3, 4, 5), (2, 7))
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
SEEDS = st.integers(0, 9)
RARELY = st.sampled_from([False] * 9 + [True])
OPTIONS: list[tuple[str, list[Any]]] = [
    ("guidance_scale", [0.0, 1.0, 1.5, 4.0, 7.5, None, float("nan")]),
    ("guidance_rescale", [0.0, 0.3, 1.0, 1.5]),
    ("use_original_formulation", [False, True]),
    ("_enabled", [True, True, False]),
    ("_start", [0.0, 0.3]),
    ("_stop", [0.5, 1.0]),
    ("eta", [0.0, 0.5, 1.0]),
    ("adaptive_projected_guidance_rescale", [0.0, 1.0, 15.0]),
    ("adaptive_projected_guidance_norm_dim", [None, None, (-1,)]),
    ("adaptive_projected_guidance_scale", [1.0, 3.0]),
    ("adaptive_projected_guidance_start_step", [-1, 2, 5]),
    ("zero_init_steps", [0, 1, 4]),
    ("alpha", [0.5, 8.0]),
    ("skip_layer_guidance_scale", [0.0, 2.0]),
    ("skip_layer_guidance_start", [0.0, 0.5]),
    ("skip_layer_guidance_stop", [0.5, 1.0]),
    ("seg_guidance_scale", [0.0, 2.0]),
    ("seg_guidance_start", [0.0, 0.5]),
]
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "turned": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}


def normals(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class GuiderMachine(RuleBasedStateMachine):
    """The original, the fused one and the original in float64, each with a twin."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.steps, self.shape, self.dtype = 0, None, SHAPES[0], torch.float32
        self.kept: list[list[Any]] = []
        self.saved: list[Any] = []

    @initialize(case=st.sampled_from(CASES + 4 * WITH_MOMENTUM))
    def begin(self, case: tuple[str, dict[str, Any]]) -> None:
        self.name = case[0]
        theirs, ours, exact = ([make(*case), make(*case)] for _ in range(3))
        self.guiders = [theirs, [fuse(one) for one in ours], exact]

    def each(self, action: Callable[[list[Any], torch.dtype], Any]) -> list[Any]:
        """What an action returns or raises, for the three."""
        results: list[Any] = []
        for guiders, dtype in zip(self.guiders, (self.dtype, self.dtype, torch.float64), strict=True):
            try:
                results.append(action(guiders, dtype))
            except Exception as raised:
                results.append(type(raised))
        if isinstance(results[0], type) or isinstance(results[1], type):
            assert results[0] is results[1]
        return results

    def compare(self, theirs: Any, ours: Any, exact: Any) -> None:
        """That two tensors are one, to the precision that is asked."""
        if not isinstance(theirs, Tensor):
            assert type(ours) is type(theirs)
            return
        got, want = (theirs.dtype, theirs.stride(), theirs.requires_grad), (ours.dtype, ours.stride())
        assert got == (*want, ours.requires_grad)
        theirs, ours, exact = (one.detach() for one in (theirs, ours, exact))
        # Where the original divides zero by zero the fused one may not.
        theirs, ours, exact = (one.where(~theirs.isnan(), 0) for one in (theirs, ours, exact))
        if theirs.dtype in (torch.float32, torch.float64):
            if error(ours, theirs) > 2e-6:
                assert error(ours, exact) <= 1.1 * error(theirs, exact)
        else:
            assert error(ours, exact) <= max(2 * error(theirs, exact), torch.finfo(theirs.dtype).eps / 2)

    @rule(step=st.integers(-1, STEPS + 1), steps=st.sampled_from([STEPS, STEPS, STEPS, None, 3]))
    def set_state(self, step: int, steps: int | None) -> None:
        self.step, self.steps = step, steps

    @rule(shape=st.sampled_from(SHAPES))
    def change_shape(self, shape: tuple[int, ...]) -> None:
        self.shape = SHAPES[0] if len(shape) > 3 and self.name == "MagnitudeAwareGuidance" else shape

    @rule(dtype=st.sampled_from(DTYPES))
    def change_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @rule(
        seeds=st.lists(SEEDS, min_size=1, max_size=3),
        form=st.sampled_from(["plain", "plain", "plain", *FORMS]),
        gradient=RARELY,
    )
    def go_on(self, seeds: list[int], form: str, gradient: bool) -> None:
        """A pipeline's steps."""
        for seed in seeds:
            self._forward(seed, form, gradient)
            self.step += 1

    @rule(seeds=st.lists(SEEDS, min_size=2, max_size=5))
    def run_from_the_start(self, seeds: list[int]) -> None:
        self.step, self.steps = 0, STEPS
        self.go_on(seeds, "plain", False)

    @rule(
        seed=SEEDS,
        change=st.sampled_from(
            [
                lambda row: row | {"pred_uncond": row["pred_uncond"].bfloat16()},
                lambda row: row | {"pred_uncond": row["pred_uncond"][:1]},
                lambda row: row | {"pred_uncond": row["pred_uncond"].transpose(1, -1)},
                lambda row: {"pred_cond": row["pred_cond"]},
                lambda row: {key: value[..., :0] for key, value in row.items()},
            ]
        ),
    )
    def call_directly(self, seed: int, change: Any) -> None:
        self._forward(seed, "plain", False, change)

    def _forward(self, seed: int, form: str, gradient: bool, change: Any = None) -> None:
        numbers = normals((len(PREDICTIONS), *self.shape), self.dtype, seed)

        def forward(guiders: list[Any], dtype: torch.dtype) -> Any:
            guider = guiders[0]
            row = {name: FORMS[form](one) for name, one in zip(PREDICTIONS, numbers.to(dtype), strict=True)}
            if gradient:
                row["pred_cond"] = row["pred_cond"].clone(memory_format=torch.preserve_format).requires_grad_()
            run = guide if guiders is not self.guiders[2] else guide_exactly
            if change is None:
                return run(guider, self.step, row, self.steps)
            guider.set_state(self.step, self.steps, None)
            given = change(row)
            return guider.forward(**{key: given[key] for key in guider._input_predictions if key in given})

        outputs = self.each(forward)
        if isinstance(outputs[0], type):
            return
        assert not isinstance(outputs[2], type)
        for field in ("pred", "pred_cond", "pred_uncond"):
            self.compare(*(output[field] for output in outputs))
        self.kept.append([self.average(guiders) for guiders in self.guiders])
        self.compare(*self.kept[-1])

    @staticmethod
    def average(guiders: list[Any]) -> Any:
        return getattr(getattr(guiders[0], "momentum_buffer", None), "running_average", None)

    def has_average(self) -> bool:
        return hasattr(self, "guiders") and isinstance(self.average(self.guiders[0]), Tensor)

    @rule(which=st.integers(0, 99))
    def change_option(self, which: int) -> None:
        changes = [(name, value) for name, values in OPTIONS for value in values if hasattr(self.guiders[0][0], name)]
        name, value = changes[which % len(changes)]
        self.each(lambda guiders, dtype: setattr(guiders[0], name, value))

    @precondition(has_average)
    @rule(decay=st.sampled_from([0.5, 0.25, 0, None]), of_the_buffer=st.booleans())
    def change_decay(self, decay: float | None, of_the_buffer: bool) -> None:
        """Of this run, or of the next."""
        if of_the_buffer:
            self.each(lambda guiders, dtype: setattr(guiders[0].momentum_buffer, "momentum", decay))
        else:
            self.each(lambda guiders, dtype: setattr(guiders[0], "adaptive_projected_guidance_momentum", decay))
        self.go_on([1], "plain", False)

    @precondition(has_average)
    @rule(which=st.integers(0, 5), seed=SEEDS)
    def edit_momentum(self, which: int, seed: int) -> None:
        def edit(guiders: list[Any], dtype: torch.dtype) -> None:
            buffer = guiders[0].momentum_buffer
            average = buffer.running_average
            with torch.no_grad():
                if which == 0:
                    average.mul_(0.5)
                elif which == 1:
                    average[..., 0] = 1.0
                elif which == 2:
                    buffer.running_average = normals(average.shape, average.dtype, seed).to(average.dtype)
                elif which == 3:
                    buffer.running_average = average.flip(0)
                elif which == 4:
                    buffer.running_average = 0
                else:
                    guiders[0].momentum_buffer = type(buffer)(-0.75) if seed % 2 else None

        self.each(edit)
        self.go_on([seed], "plain", False)

    @rule(which=st.integers(0, 5))
    def copy(self, which: int) -> None:
        def swap(guiders: list[Any], dtype: torch.dtype) -> None:
            one, twin = guiders
            if which == 0:
                guiders.reverse()
            elif which == 1:
                guiders[0] = copy.deepcopy(one)
            elif which == 2:
                guiders[0] = pickle.loads(pickle.dumps(one))
            elif which == 3:
                guiders[1] = copy.copy(one)
            elif hasattr(one, "momentum_buffer") and which == 4:
                one.momentum_buffer, twin.momentum_buffer = twin.momentum_buffer, one.momentum_buffer
            else:
                mine = dict(vars(one))
                vars(one).clear()
                vars(one).update(vars(twin))
                vars(twin).update(mine)

        self.each(swap)

    @rule(restore=st.booleans())
    def save_or_restore(self, restore: bool) -> None:
        if not restore or not self.saved:
            with contextlib.suppress(RuntimeError):  # of tensors with gradients
                self.saved = [copy.deepcopy(vars(guiders[0])) for guiders in self.guiders]
            return
        for guiders, saved in zip(self.guiders, self.saved, strict=True):
            vars(guiders[0]).update(copy.copy(saved))

    def teardown(self) -> None:
        # What was kept of the past is as the original would have left it.
        for kept in self.kept:
            self.compare(*kept)


def test_random_sequences() -> None:
    logging.getLogger("diffusers.guiders").setLevel(logging.ERROR)
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    options = settings(
        max_examples=250,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=checks,
    )
    run_state_machine_as_test(GuiderMachine, settings=options)
