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


def test_outputs_in_another_order_are_fused_where_the_samples_keep_theirs() -> None:
    fast = fastcfg.accelerate(OtherTable())
    for _ in range(3):
        fast.p_sample_loop(network((0, 2, 3, 1)), SHAPE)
    assert fastcfg.report(fast)["run"] in ("engine", "stepped")
