"""Objects of other projects whose steps call their model in another manner than model(x, t, **model_kwargs)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.own_diffusion import OwnDiffusion
from torch import Tensor

import fastcfg
from fastcfg.frontends._gaussian.manner import USUAL, Manner, called, manner_of

pytestmark = pytest.mark.quick

SHAPE = (2, 3, 4, 5)
LABELS = torch.tensor([0.3, -0.2])


class Timestep(OwnDiffusion):
    """As PixArt's."""

    def asked(self, model: Any, x: Any, t: Any, model_kwargs: Any) -> Any:
        return model(x, timestep=t, **model_kwargs)


class Named(OwnDiffusion):
    """As diffae's."""

    def asked(self, model: Any, x: Any, t: Any, model_kwargs: Any) -> Any:
        return model(x=x, t=t, t_cond=None, **model_kwargs)


class Columns(OwnDiffusion):
    """As scDiffusion's."""

    def asked(self, model: Any, x: Any, t: Any, model_kwargs: Any) -> Any:
        return model(x, t.reshape(-1, 1), **model_kwargs)


class Floats(OwnDiffusion):
    """As glide-finetune's."""

    def asked(self, model: Any, x: Any, t: Any, model_kwargs: Any) -> Any:
        return model(x, t.float(), **model_kwargs)


class LabelsAlone(OwnDiffusion):
    """As semantic-diffusion-model's."""

    def asked(self, model: Any, x: Any, t: Any, model_kwargs: Any) -> Any:
        return model(x, t, y=model_kwargs["y"])


class FirstTime(OwnDiffusion):
    """Times that are all the first's: of another schedule."""

    def asked(self, model: Any, x: Any, t: Any, model_kwargs: Any) -> Any:
        return model(x, torch.full_like(t, self.num_timesteps - 1), **model_kwargs)


class TimeOfNoStep(OwnDiffusion):
    """A flag that depends on the time."""

    def asked(self, model: Any, x: Any, t: Any, model_kwargs: Any) -> Any:
        return model(x, t, late=bool(t[0] < 2), **model_kwargs)


class Strict:
    """A network that takes arguments of one form alone, and depends on all of them."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        kind, names = self.kind, set(kwargs)
        assert len(args) == {Timestep: 1, Named: 0}.get(kind, 2)
        assert names - {"s"} == {Timestep: {"timestep"}, Named: {"x", "t", "t_cond"}, TimeOfNoStep: {"late"}}.get(
            kind, set()
        ) | {"y"}
        assert ("s" in names) == (kind is not LabelsAlone)
        x = args[0] if args else kwargs["x"]
        t = args[1] if len(args) > 1 else kwargs.get("timestep", kwargs.get("t"))
        assert t.shape == ((2, 1) if kind is Columns else (2,))
        assert t.dtype == (torch.float32 if kind is Floats else torch.int64)
        moved = kwargs["y"] + 0.1 * t.flatten() + float(kwargs.get("late", False))
        return torch.sin(2 * x + moved.reshape(-1, 1, 1, 1))


def run(kind: Any, scaled: float, **options: Any) -> Any:
    own = kind()
    own.posterior_mean_coef1 = scaled * own.posterior_mean_coef1
    fast, model = fastcfg.accelerate(own), Strict(kind)
    for seed in range(3):
        results = []
        for diffusion in (own, fast):
            torch.manual_seed(seed)
            images = diffusion.p_sample_loop(model, SHAPE, model_kwargs={"y": LABELS, "s": 1.5}, **options)
            results.append((images, torch.get_rng_state()))
        (want, before), (got, after) = results
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        assert torch.equal(before, after)
    return fastcfg.report(fast)


@pytest.mark.parametrize("kind", [Timestep, Named, Columns, Floats, LabelsAlone, FirstTime])
@pytest.mark.parametrize("scaled", [1.0, 0.9])
def test_the_engine_calls_the_model_in_the_objects_manner(kind: Any, scaled: float) -> None:
    assert run(kind, scaled)["run"] in ("engine", "stepped")


@pytest.mark.parametrize("kind", [Timestep, Named, Columns, Floats, LabelsAlone])
def test_so_it_does_with_a_denoised_fn(kind: Any) -> None:
    assert run(kind, 1.0, denoised_fn=torch.tanh)["run"] in ("engine", "stepped")


def test_a_manner_that_changes_is_the_originals() -> None:
    assert run(TimeOfNoStep, 1.0)["run"] == "the original"


def test_manners_are_read_off_a_call() -> None:
    x, t = torch.randn(SHAPE), torch.tensor([3, 3])
    assert manner_of((x, t), {"y": LABELS}, {"y": LABELS}, x) == USUAL
    assert manner_of((x, x, t), {}, {}, x) == USUAL  # it cannot be told which is the state
    assert manner_of((x, t, t + 1), {}, {}, x) == USUAL
    assert manner_of((x, t), {"extra": torch.ones(5)}, {}, x) == USUAL
    found = manner_of((), {"x": x, "times": t[:, None].float(), "mode": "a"}, {"y": 1}, x)
    assert found == Manner("x", "times", torch.float32, 1, (("mode", "a"),), frozenset({"y"}))
    asked: dict[str, Any] = {}
    called(lambda **kwargs: asked.update(kwargs), found)(x, t, y=2, z=3)
    assert set(asked) == {"x", "times", "mode", "z"}
    assert found.read((), asked)[1].tolist() == [3.0, 3.0]
    with pytest.raises(ValueError, match="something else than x and its time"):
        found.read((x, t), {})


def test_the_usual_manner_leaves_the_model_as_it_is() -> None:
    model = Strict(OwnDiffusion)
    assert called(model, USUAL) is model
