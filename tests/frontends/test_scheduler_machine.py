"""Random sequences of operations on every fused scheduler, beside its original: the same after each of them.

The suite runs a few hundred, always the same. To run others, for instance 20,000 of them:

    FASTCFG_EXAMPLES=20000 FASTCFG_SEED=1 pytest tests/frontends/test_scheduler_machine.py

A failure prints the class, its configuration and the shortest sequence found, as an `@example` or a call of `beside`
takes them. `FASTCFG_SHRINK=0` reports failures as they were found, which is sooner.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.scheduler_kinds import KINDS
from support.scheduler_machine import SHAPES, Mismatch, beside, make
from support.scheduler_operations import CALLS, CONFIG, OPTIONS, STEP_WORDS

from benchmarks.suite.foreign import load_diffusers

diffusers: Any = load_diffusers()
pytestmark = [
    pytest.mark.skipif(diffusers is None, reason="diffusers is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

MANY = int(os.environ.get("FASTCFG_EXAMPLES", "0"))
EACH = max(1, (MANY or 300) // len(KINDS))
PHASES = [Phase.explicit, Phase.generate] + ([] if os.environ.get("FASTCFG_SHRINK") == "0" else [Phase.shrink])
run_many = settings(
    max_examples=EACH,
    derandomize=not MANY,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    phases=PHASES,
    suppress_health_check=list(HealthCheck),
)

# How an attribute is changed: those that leave a run which still samples come up more often.
CHANGES = ["inplace", "numpy", "data", "scale", "clone", "swap"] * 3 + [
    "none",
    "zero",
    "less",
    "more",
    "list",
    "half",
    "double",
]
TABLES = {"betas", "alphas", "alpha_t", "sigma_t", "lambda_t", "log_sigmas", "one"}  # not read, or seldom
OPENINGS = [["set 12"]] * 6 + [["set 5"], ["set 20"], ["set 2"], ["set 1"], ["set timesteps"], ["set sigmas"]]
OPENINGS += [["step", "scale own", "set 12"], ["copied deepcopy copy", "set 12", "begin 3"]]


def _step_words(scheduler: Any) -> list[str]:
    named = inspect.signature(scheduler.step).parameters
    absent = {f"option={word}" for word, (argument, _) in OPTIONS.items() if argument not in named} - {"option=unknown"}
    absent |= set() if "generator" in named else {f"noise={word}" for word in STEP_WORDS["noise"]}
    absent |= set() if hasattr(scheduler, "step_plms") else {"method=step_plms", "method=step_prk"}
    return [word for kind, words in STEP_WORDS.items() for one in words if (word := f"{kind}={one}") not in absent]


def _unlike(words: list[str]) -> list[str]:
    """One word of a kind: `sample=masked` and `sample=half` do not go together."""
    return list({word.split("=")[0]: word for word in words}.values())


def _lines(*choices: Any) -> st.SearchStrategy[str]:
    return st.tuples(*(st.just(one) if isinstance(one, str) else st.sampled_from(one) for one in choices)).map(" ".join)


@functools.cache
def sequences_of(name: str) -> st.SearchStrategy[list[str]]:
    """Sequences of operations that mean something to a class."""
    scheduler = make(name, KINDS[name][0])
    state = sorted(key for key in vars(scheduler) if key != "_internal_dict")
    state += [key for key in state if key not in TABLES] * 3
    step = st.sampled_from(["step"] * 5 + ["step noise=generator", "step option=tuple"])
    words = _step_words(scheduler)
    odd_step = st.lists(st.sampled_from(words), min_size=1, max_size=3).map(lambda w: " ".join(["step", *_unlike(w)]))
    options = [option for option in CONFIG if option in scheduler.config]
    ways = ["attribute", "item", "both", "register"]
    rare = [
        _lines("poke", state, CHANGES),
        _lines("poke", state, CHANGES),
        _lines("config", options, ["0", "1", "2"], ways) if options else step,
        _lines("edit", ["sample", "output", "returned", "x0"], ["scale", "zero", "data"]),
        _lines("copied", ["copy", "deepcopy", "pickle", "torch_save", "from_config"], ["copy", "original"]),
        _lines("state", ["save", "deep_save", "restore", "replace", "give", "swap"]),
        st.just("switch"),
        _lines("set", ["1", "2", "4", "7", "12", "timesteps", "sigmas", "0"], ["", "keep", "device"]),
        _lines("begin", ["0", "1", "2", "9"]) if hasattr(scheduler, "set_begin_index") else step,
        _lines("scale", ["own", "next", "int", "off"]) if hasattr(scheduler, "scale_model_input") else step,
        _lines("call", [one for one in CALLS if hasattr(type(scheduler), one)]),
    ]
    groups = [step] * 8 + [odd_step] * 5 + rare

    @st.composite
    def operation(draw: Any) -> str:
        line: str = draw(draw(st.sampled_from(groups)))
        return line

    @st.composite
    def sequence(draw: Any) -> list[str]:
        return [*draw(st.sampled_from(OPENINGS)), *draw(st.lists(operation(), min_size=8, max_size=26))]

    return sequence()


@pytest.mark.parametrize("name", KINDS)
def test_random_sequences_are_as_the_original_s(name: str) -> None:
    @run_many
    @seed(int(os.environ.get("FASTCFG_SEED", "0")))
    @given(st.sampled_from(KINDS[name]), sequences_of(name), st.sampled_from(SHAPES))
    def sequences(config: dict[str, Any], operations: list[str], shape: tuple[int, ...]) -> None:
        beside(name, config, operations, shape)

    sequences()


# What real code does between two steps, for the classes in their first configuration.
SCENES = {
    "latents are blended between steps": "step; step sample=blended; step; step sample=scaled; step sample=inplace",
    "the sample passed is the scaled one": "step sample=given; step sample=given; step sample=given; step sample=given",
    "the dtype changes": "step sample=half output=half; step sample=half; step; step sample=double; step output=half",
    "the batch changes": "step; step; step sample=batch1; step; step sample=batch4",
    "copies go on": "step; step; copied deepcopy copy; step; copied pickle copy; step; switch; step; step",
    "a shallow copy shares its lists": "step; copied copy copy; step; switch; step; switch; step",
    "states are swapped": "step; step; state swap; step; state swap; step; step",
    "attributes are saved and restored": "step; state deep_save; step; step; state restore; step; step",
    "past outputs are edited": (
        "step; step; poke model_outputs inplace; step; poke ets scale; poke model_outputs zero; "
        "poke lower_order_nums zero; poke derivatives less; step; step"
    ),
    "the past sample is edited": (
        "step; edit sample; edit output; step; edit returned; step; poke last_sample scale; "
        "poke sample scale; step; step"
    ),
    "sigmas are edited": (
        "step; poke sigmas inplace; step; poke sigmas numpy; step; poke sigmas scale; "
        "poke alphas_cumprod scale; step; step"
    ),
    "options are assigned": (
        "config prediction_type 1 attribute; step; config solver_order 0 attribute; step; "
        "config algorithm_type 1 register; step; config clip_sample 1 item; step"
    ),
    "the index is moved": "step; poke _step_index less; step; poke _step_index none; step; poke _step_index more; step",
    "gradients are wanted once": "step; step; step context=grad; step; step context=inference; step",
    "noise is the caller's": (
        "step noise=generator; step noise=list; step noise=given; step option=eta noise=both; "
        "step option=churn noise=generator; step"
    ),
    "layouts differ": (
        "step sample=channels_last; step output=channels_last; step sample=transposed; step sample=strided"
    ),
    "steps go on after the last": "set 2; step; step; scale own; step t=past; step t=past; scale own; step",
    "two runs": "step; step; set 4; step; step; set 4 keep; step; step",
    "an option is unknown": "step; step option=unknown; step; step style=names; step style=positions option=tuple",
}


# The steps of these are another class's or run by the original: the random sequences suffice.
SAME = {
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "CogVideoXDDIMScheduler",
    "TCDScheduler",
    "MiniMaxH3Scheduler",
}
SAME |= {name for i, name in enumerate(KINDS) if i > list(KINDS).index("CMStochasticIterativeScheduler")}


@pytest.mark.parametrize("scene", SCENES)
def test_what_real_code_does(scene: str) -> None:
    wrong = []
    for name in sorted(KINDS.keys() - SAME):
        try:
            beside(name, KINDS[name][0], ["set 8", *SCENES[scene].split("; ")])
        except Mismatch as found:
            wrong.append(str(found))
    assert not wrong, "\n".join([f"{len(wrong)} classes", *wrong])


# Faults that must be found


def _with(**methods: Callable[..., Any]) -> Callable[[Any], Any]:
    """A drop-in that does nothing but have other methods, which are given the original's first."""

    def drop_in(scheduler: Any) -> Any:
        original = type(scheduler)
        replaced = {
            name: functools.partialmethod(method, getattr(original, name, None)) for name, method in methods.items()
        }
        made = object.__new__(type(original.__name__, (original,), replaced))
        made.__dict__.update(vars(scheduler))
        return made

    return drop_in


def _forgetful(self: Any, original: Any, memo: Any) -> Any:
    made = object.__new__(type(self))
    made.__dict__.update({key: copy.deepcopy(value, memo) for key, value in vars(self).items()})
    made.model_outputs = [None] * len(made.model_outputs)
    return made


def _stale(self: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    kept = vars(self).setdefault("_fastcfg_sigmas", self.sigmas.clone())
    there, self.sigmas = self.sigmas, kept
    result = original(self, *args, **kwargs)
    self.sigmas = there
    return result


def _drawing(self: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    torch.rand(1)
    return original(self, *args, **kwargs)


def _rounding(self: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    result.prev_sample[..., 0] += 4e-6 * result.prev_sample.abs().max()
    return result


def _contiguous(self: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    result.prev_sample = result.prev_sample.contiguous()
    return result


def _one_buffer(self: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    buffer = vars(self).setdefault("_fastcfg_buffer", result.prev_sample.clone())
    result.prev_sample = buffer.copy_(result.prev_sample)
    return result


def _copying(self: Any, original: Any, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
    return original(self, model_output, timestep, sample.clone(), **kwargs)


def _uncounted(self: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    self.lower_order_nums = 1
    return result


def _other_error(self: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(self, *args, **kwargs)
    except TypeError as error:
        raise ValueError(str(error)) from error


@pytest.mark.parametrize(
    ("drop_in", "operations", "said"),
    [
        (_with(__deepcopy__=_forgetful), ["step", "copied deepcopy copy"], "model_outputs.1.: got .'NoneType'"),
        (_with(step=_stale), ["step", "poke sigmas scale", "step"], "result.step.prev_sample: off by"),
        (_with(step=_drawing), ["step"], "the global generator"),
        (_with(step=_rounding), ["step"], "result.step.prev_sample: off by"),
        (_with(step=_contiguous), ["step sample=channels_last output=channels_last"], "got strides"),
        (_with(step=_one_buffer), ["step", "step"], "passed or returned before"),
        (_with(step=_copying), ["step", "edit sample"], "state.last_sample"),
        (_with(step=_uncounted), ["step", "step"], "state.lower_order_nums"),
        (_with(step=_other_error), ["step option=unknown"], "raised .ValueError.*expected .TypeError"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_the_machine_finds_faults(drop_in: Callable[[Any], Any], operations: list[str], said: str) -> None:
    operations = ["set 8", *operations]
    beside("UniPCMultistepScheduler", {}, operations, drop_in=_with())
    with pytest.raises(Mismatch, match=said):
        beside("UniPCMultistepScheduler", {}, operations, drop_in=drop_in)


def test_nan_comes_through_an_x0_that_is_limited_and_multiplied_by_0() -> None:
    operations = ["set 12", *["step"] * 4, "poke _step_index inplace", "step output=nan", "step"]
    beside("HeunDiscreteScheduler", {"clip_sample": True, "prediction_type": "sample"}, operations, (2, 3, 4, 5))
