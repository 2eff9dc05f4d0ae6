"""Objects of other projects whose steps put samples into another memory order: torch draws noise in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.own_diffusion import Mean, OwnDiffusion
from torch import Tensor

import fastcfg

pytestmark = pytest.mark.quick

SHAPE = (2, 3, 4, 5)


class OutputFirst(OwnDiffusion):
    """Its sums begin with the model's output, whose memory order they take."""

    def predicted(self, x: Any, t: Any, output: Any) -> Any:
        share = self.at(self.sqrt_recipm1_alphas_cumprod, t, x)
        return -share * output + self.at(self.sqrt_recip_alphas_cumprod, t, x) * x


class StateFirst(OwnDiffusion):
    """Its sums begin with the state, whatever the model predicts."""

    def p_mean_variance(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        out = super().p_mean_variance(*args, **kwargs)
        x = args[1]
        return out | {"mean": 0 * x + out["mean"], "pred_xstart": 0 * x + out["pred_xstart"]}


class OtherTable(OwnDiffusion):
    """Its schedule is none that its betas describe: its own steps are compiled."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.posterior_mean_coef1 = 0.9 * self.posterior_mean_coef1


class OtherTableOutputFirst(OtherTable, OutputFirst):
    """Both."""


def network(order: tuple[int, ...]) -> Any:
    """A network whose results have their dimensions in this order in memory, outermost first."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        y = torch.sin(2 * x.contiguous() + 0.1 * t.reshape(-1, 1, 1, 1))
        return y.permute(order).contiguous().permute(*(order.index(dim) for dim in range(4)))

    return model


def changing(x: Tensor, t: Tensor) -> Tensor:
    """A network whose results have another memory order in the second half of the steps."""
    return network((0, 2, 3, 1) if t[0] < 3 else (0, 1, 2, 3))(x, t)


def seeded(diffusion: Any, seed: int, model: Any, progressive: bool) -> tuple[Any, Tensor]:
    torch.manual_seed(seed)
    if progressive:
        result = [out["sample"].clone() for out in diffusion.p_sample_loop_progressive(model, SHAPE)]
    else:
        result = [diffusion.p_sample_loop(model, SHAPE)]
    return torch.stack([sample.contiguous() for sample in result]), torch.get_rng_state()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mean", Mean)
@pytest.mark.parametrize("model", [network((0, 2, 3, 1)), network((3, 0, 1, 2)), changing])
@pytest.mark.parametrize("kind", [OwnDiffusion, OutputFirst, StateFirst, OtherTable, OtherTableOutputFirst])
def test_noise_is_drawn_in_the_samples_own_memory_order(kind: Any, model: Any, mean: Mean, progressive: bool) -> None:
    own = kind(mean=mean)
    fast = fastcfg.accelerate(own)
    for seed in range(3):
        (want, before), (got, after) = (seeded(diffusion, seed, model, progressive) for diffusion in (own, fast))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        assert torch.equal(before, after)


@pytest.mark.parametrize("mean", Mean)
@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 0, 1, 2)])
@pytest.mark.parametrize("kind", [OwnDiffusion, OutputFirst, StateFirst, OtherTable, OtherTableOutputFirst])
def test_samples_in_another_order_are_fused(kind: Any, order: tuple[int, ...], mean: Mean) -> None:
    own, model = kind(mean=mean), network(order)
    fast = fastcfg.accelerate(own)
    for seed in range(3):
        torch.manual_seed(seed)
        want = list(own.p_sample_loop_progressive(model, SHAPE))
        torch.manual_seed(seed)
        got = list(fast.p_sample_loop_progressive(model, SHAPE))
        for ours, theirs in zip(got, want, strict=True):
            assert {name: value.stride() for name, value in ours.items()} == {
                name: value.stride() for name, value in theirs.items()
            }
    assert fastcfg.report(fast)["run"] in ("engine", "stepped")
    torch.manual_seed(3)
    wanted = own.p_sample_loop(model, SHAPE)
    torch.manual_seed(3)
    assert fast.p_sample_loop(model, SHAPE).stride() == wanted.stride()


class Shaking(OwnDiffusion):
    """Its loop draws like its samples, between its steps."""

    def p_sample_loop_progressive(self, model: Any, shape: Any, **options: Any) -> Any:
        x = torch.randn(*shape)
        for i in reversed(range(self.num_timesteps)):
            with torch.no_grad():
                out = self.p_sample(model, x, torch.tensor([i] * len(x)), **options)
            out["sample"] = out["sample"] + 0.01 * torch.randn_like(out["sample"])
            out["pred_xstart"] = out["pred_xstart"] + 0.01 * torch.randn_like(out["pred_xstart"])
            yield out
            x = out["sample"]


@pytest.mark.parametrize("mean", Mean)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 1, 2)])
def test_a_loop_draws_like_the_samples_it_is_given(order: tuple[int, ...], mean: Mean) -> None:
    own, model = Shaking(mean=mean), network(order)
    fast = fastcfg.accelerate(own)
    for seed in range(3):
        (want, before), (got, after) = (seeded(diffusion, seed, model, True) for diffusion in (own, fast))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        assert torch.equal(before, after)
    assert fastcfg.report(fast)["run"] == "stepped"


def test_a_start_in_another_order_than_the_samples_is_the_originals() -> None:
    own, model = OwnDiffusion(mean=Mean.START_X), network((3, 0, 1, 2))
    fast = fastcfg.accelerate(own)
    start = torch.randn(SHAPE).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for noise in (None, start, None, start):
        results = []
        for diffusion in (own, fast):
            torch.manual_seed(0)
            results.append(diffusion.p_sample_loop(model, SHAPE, noise=noise))
        torch.testing.assert_close(*results, atol=2e-5, rtol=0)
    assert fastcfg.report(fast)["run"] == "the original"
