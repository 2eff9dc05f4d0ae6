"""What an accelerated diffusion object is: one of its own class, with all that its project and its user gave it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.families import base, conditioned, forks, images, motion, others
from support.families.base import GaussianDiffusion, Loss, Mean, SpacedDiffusion, Var, betas, spaced
from support.families.networks import Network
from torch import Tensor

import fastcfg

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore")]

SHAPE = (2, 3, 4, 4)
LOOPS = ("p_sample_loop", "p_sample_loop_progressive", "ddim_sample_loop", "ddim_sample_loop_progressive")
CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for module in (base, forks, images, conditioned, motion, others)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, SpacedDiffusion) and kind.__module__ == module.__name__
}


def sample(diffusion: Any, model: Any = None, seed: int = 3, **options: Any) -> Tensor:
    torch.manual_seed(seed)
    result: Tensor = diffusion.p_sample_loop(model or Network(2), SHAPE, device="cpu", **options)
    return result


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= 2e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_it_is_of_its_own_class(name: str) -> None:
    diffusion = spaced(CLASSES[name])
    before = copy.deepcopy(vars(diffusion))
    diffusion.callback_of_the_user = lambda: 7
    ours = fastcfg.accelerate(diffusion)
    assert isinstance(ours, CLASSES[name])
    assert isinstance(ours, SpacedDiffusion)
    assert (type(ours).__name__, type(ours).__module__) == (name, CLASSES[name].__module__)
    assert type(diffusion) is CLASSES[name]
    assert fastcfg.is_fused(ours)
    assert not fastcfg.is_fused(diffusion)
    assert fastcfg.accelerate(ours) is ours
    assert fastcfg.report(ours) == {}
    assert ours.callback_of_the_user() == 7
    assert vars(ours).keys() == vars(diffusion).keys()
    for attribute, value in before.items():
        assert np.array_equal(getattr(ours, attribute), value), attribute
        assert np.array_equal(getattr(diffusion, attribute), value), attribute


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_keep_their_arguments_order_and_defaults(name: str, loop: str) -> None:
    own, ours = (
        inspect.signature(getattr(kind, loop))
        for kind in (CLASSES[name], type(fastcfg.accelerate(spaced(CLASSES[name]))))
    )
    engine = [one for one in ours.parameters if one not in own.parameters]
    assert engine in ([], ["engine"])
    kept = [one for one in ours.parameters.values() if one.name not in engine]
    assert kept == list(own.parameters.values())


@pytest.mark.parametrize("name", CLASSES)
def test_other_methods_are_the_object_s(name: str) -> None:
    kind = CLASSES[name]
    ours: Any = type(fastcfg.accelerate(spaced(kind)))
    for method, value in inspect.getmembers(kind, inspect.isfunction):
        if not (method.endswith(("_sample_loop", "_sample_loop_progressive")) or method.startswith("__")):
            assert getattr(ours, method) is value, method


def test_training_and_further_samplers_are_the_object_s() -> None:
    theirs, ours = spaced(forks.Fork), fastcfg.accelerate(spaced(forks.Fork))
    x, t = torch.linspace(-1, 1, 96).view(SHAPE), torch.tensor([1, 4])
    results = []
    for diffusion in (theirs, ours):
        torch.manual_seed(2)
        losses = diffusion.training_losses(Network(2), x, t)
        results.append(
            [losses["loss"], diffusion.q_sample(x, t), diffusion.plms_sample_loop(Network(2), SHAPE, device="cpu")]
        )
    assert all(map(torch.equal, *results))
    assert losses.keys() == {"loss", "mse"}


@pytest.mark.parametrize("name", ["SpacedDiffusion", "DiT", "Fork", "Motion", "Points", "Percentile"])
def test_copies_are_whole_before_and_after_a_loop(name: str) -> None:
    kwargs: dict[str, Any] = {"model_kwargs": {"y": {}}} if name == "Motion" else {}

    def network(x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        return torch.cat([0.5 * torch.tanh(x), torch.sin(x)], 1)

    ours, want = fastcfg.accelerate(spaced(CLASSES[name])), sample(spaced(CLASSES[name]), network, **kwargs)
    for _ in range(2):
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
            assert type(other) is type(ours)
            assert vars(other).keys() == vars(ours).keys()
            assert fastcfg.report(other) == {}
            assert close(sample(other, network, **kwargs), want)
        assert close(sample(ours, network, **kwargs), want)
    twin = copy.deepcopy(ours)
    twin.posterior_mean_coef1[2] *= 1.3
    assert not close(sample(twin, network, **kwargs), want)
    assert close(sample(ours, network, **kwargs), want)


def test_a_subclass_of_the_user_s_of_an_accelerated_class() -> None:
    ours = fastcfg.accelerate(spaced(SpacedDiffusion))

    class Mine(type(ours)):  # type: ignore[misc]
        def p_sample(self, *args: Any, **kwargs: Any) -> Any:
            out = super().p_sample(*args, **kwargs)
            return {**out, "sample": 0.5 * out["sample"]}

    mine, network = spaced(Mine), Network(2)
    assert not close(sample(mine, network), sample(ours, network))
    torch.manual_seed(3)
    x = torch.randn(SHAPE)
    for index in reversed(range(mine.num_timesteps)):
        with torch.no_grad():
            x = mine.p_sample(network, x, torch.tensor([index] * 2))["sample"]
    assert close(sample(mine, network), x)
    assert "derived" in fastcfg.report(mine)["reason"]


def edit_entry(diffusion: Any) -> None:
    diffusion.posterior_mean_coef2[1] *= 1.2


def edit_type(diffusion: Any) -> None:
    diffusion.model_mean_type = Mean.START_X


def edit_method(diffusion: Any) -> None:
    original = diffusion.q_posterior_mean_variance

    def posterior(x_start: Tensor, x_t: Tensor, t: Tensor) -> Any:
        mean, *rest = original(x_start=x_start, x_t=x_t, t=t)
        return 0.9 * mean, *rest

    diffusion.q_posterior_mean_variance = posterior


def edit_step(diffusion: Any) -> None:
    original = diffusion.p_sample
    diffusion.p_sample = lambda *args, **kwargs: {**(out := original(*args, **kwargs)), "sample": 0.9 * out["sample"]}


def edit_times(diffusion: Any) -> None:
    diffusion.timestep_map[2] += 3


def edit_rescaling(diffusion: Any) -> None:
    diffusion.rescale_timesteps = True


@pytest.mark.parametrize("edit", [edit_entry, edit_type, edit_method, edit_step, edit_times, edit_rescaling])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_edits_are_heard_between_calls(edit: Any, calls: int) -> None:
    theirs, ours, network = spaced(SpacedDiffusion), fastcfg.accelerate(spaced(SpacedDiffusion)), Network(2)
    before = sample(theirs, network)
    for _ in range(calls):
        assert close(sample(ours, network), before)
    for diffusion in (theirs, ours):
        edit(diffusion)
    want = sample(theirs, network)
    assert not close(want, before)
    for _ in range(3):
        assert close(sample(ours, network), want)


# Objects and outputs of other kinds.


def unlike(**attributes: Any) -> Any:
    """A process with some attributes changed, or, where None, taken away."""
    diffusion = spaced(SpacedDiffusion, mean=Mean.START_X, var=Var.FIXED_SMALL)
    for name, value in attributes.items():
        setattr(diffusion, name, value) if value is not None else delattr(diffusion, name)
    return diffusion


@pytest.mark.parametrize(
    "attributes",
    [{"loss_type": None}, {"loss_type": "e2e_mse"}, {"rescale_timesteps": None}],
    ids=["no loss", "another loss", "no rescaling"],
)
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_what_sampling_does_not_need_may_be_missing(attributes: Any, loop: str) -> None:
    theirs, ours, network = unlike(**attributes), fastcfg.accelerate(unlike(**attributes)), Network()
    torch.manual_seed(0)
    want = getattr(theirs, loop)(network, SHAPE, device="cpu")
    for run in ("stepped", "engine"):
        torch.manual_seed(0)
        assert close(getattr(ours, loop)(network, SHAPE, device="cpu"), want)
        assert fastcfg.report(ours)["run"] == run


def test_types_that_are_strings_are_read() -> None:
    words = {"model_mean_type": "x_start", "model_var_type": "fixed_small"}
    network, want = Network(), sample(unlike(), Network())
    assert close(sample(fastcfg.accelerate(unlike(**words)), network), want)


FORMS: dict[str, Any] = {
    "dict": lambda output: {"x": output},
    "list": lambda output: [output],
    "tuple": lambda output: (output, None),
    "object": lambda output: SimpleNamespace(pred=output),
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_that_are_no_tensors_are_read(form: str) -> None:
    network = Network()
    want = sample(unlike(), network)
    ours = fastcfg.accelerate(unlike())
    for _ in range(2):
        assert close(sample(ours, lambda x, t: FORMS[form](network(x, t))), want)


def test_a_loop_without_known_steps_is_reported_as_the_original() -> None:
    words = fastcfg.accelerate(spaced(others.Words, mean=Mean.START_X, var=Var.FIXED_SMALL))
    words.p_sample_loop(Network(), (2, 5, 3))
    assert fastcfg.report(words) == {"run": "the original", "reason": "its loop makes no step of those that are known"}


def test_what_fails_in_the_object_s_own_step_fails() -> None:
    def times(self: Any, t: Tensor) -> Tensor:
        raise LookupError("no such time")

    failing = type("Failing", (GaussianDiffusion,), {"_scale_timesteps": times})
    types: dict[str, Any] = {"model_mean_type": Mean.EPSILON, "model_var_type": Var.FIXED_LARGE, "loss_type": Loss.MSE}
    ours = fastcfg.accelerate(failing(betas=betas(5), **types))
    with pytest.raises(LookupError, match="no such time"):
        sample(ours)


@pytest.mark.parametrize("attributes", [(), ("num_timesteps",), ("sqrt_etas", "kappa", "num_timesteps")])
def test_objects_of_other_interfaces_are_refused(attributes: tuple[str, ...]) -> None:
    other = SimpleNamespace(**dict.fromkeys(attributes, 1))
    with pytest.raises(TypeError, match="obj: got SimpleNamespace, expected a"):
        fastcfg.accelerate(other)
