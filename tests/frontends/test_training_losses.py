"""Training losses and the variational bound against those recorded from guided-diffusion."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.golden_data import FOLDER, TOYS, assert_recorded, tensor

from fastcfg.frontends import guided_diffusion as gd

pytestmark = pytest.mark.quick

STEM = "training_losses"
CASES = [pytest.param(case, id=case["id"]) for case in json.loads((FOLDER / f"{STEM}.json").read_text())["cases"]]


def process(case: dict[str, Any]) -> gd.GaussianDiffusion:
    if case["options"] is not None:
        return gd.create_gaussian_diffusion(**case["options"])
    return gd.GaussianDiffusion(
        betas=gd.get_named_beta_schedule("cosine", 30),
        model_mean_type=gd.ModelMeanType.PREVIOUS_X,
        model_var_type=gd.ModelVarType.LEARNED,
        loss_type=gd.LossType[case["loss_type"]],
    )


@pytest.mark.parametrize("case", CASES)
def test_losses_and_bound_are_the_originals(case: dict[str, Any]) -> None:
    diffusion, model = process(case), TOYS[case["model"]]
    x_start, kwargs = tensor(STEM, "x_start"), {"y": tensor(STEM, "y")}
    t, noise = tensor(STEM, f"{case['id']}/t"), tensor(STEM, f"{case['id']}/noise")
    losses = diffusion.training_losses(model, x_start, t, model_kwargs=kwargs, noise=noise)
    assert sorted(losses) == case["losses"]
    for name, got in losses.items():
        assert_recorded(got, STEM, f"{case['id']}/losses/{name}", "float32", 2e-5)
    if case["bpd"]:
        torch.manual_seed(case["bpd_seed"])
        bound = diffusion.calc_bpd_loop(model, x_start, model_kwargs=kwargs)
        assert sorted(bound) == case["bpd"]
        for name, got in bound.items():
            assert_recorded(got, STEM, f"{case['id']}/bpd/{name}", "float32", 1e-4)


def test_the_mean_gets_no_gradient_from_the_bound() -> None:
    diffusion = gd.create_gaussian_diffusion(learn_sigma=True, timestep_respacing="10")
    output = torch.zeros(2, 6, 4, 4, requires_grad=True)
    x_start, t = torch.zeros(2, 3, 4, 4), torch.tensor([3, 9])
    losses = diffusion.training_losses(lambda x, t: output, x_start, t, noise=torch.zeros_like(x_start))
    (gradient,) = torch.autograd.grad(losses["vb"].sum(), output)
    assert not gradient[:, :3].any()
    assert gradient[:, 3:].any()


def test_bad_losses_are_named() -> None:
    diffusion = gd.create_gaussian_diffusion(timestep_respacing="10")
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([3, 9])
    with pytest.raises(ValueError, match=r"model_output: got shape \(2, 6, 4, 4\), expected \(2, 3, 4, 4\)"):
        diffusion.training_losses(lambda x, t: torch.cat([x, x], 1), x, t)
    with pytest.raises(ValueError, match=r"noise: got shape \(1, 3, 4, 4\), expected"):
        diffusion.training_losses(lambda x, t: x, x, t, noise=x[:1])
    assert gd.LossType.RESCALED_KL.is_vb()
    assert not gd.LossType.RESCALED_MSE.is_vb()
