"""The originals' formulas against every step recorded from guided-diffusion and GLIDE, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.golden_data import PREDICTIONS, assert_recorded, cases, fill_known, schedule_of, tensor
from torch import Tensor

from fastcfg.reference import originals
from fastcfg.schedule import Schedule

pytestmark = pytest.mark.quick


def recorded(*stems: str) -> list[Any]:
    return [pytest.param(stem, case, id=f"{case['impl']}-{case['id']}") for stem in stems for case in cases(stem)]


def p_mean_variance(case: dict[str, Any], model_output: Tensor, x: Tensor, t: Tensor, **options: Any) -> Any:
    return originals.p_mean_variance(
        schedule_of(case),
        model_output,
        x,
        t,
        prediction=PREDICTIONS[case["mean_type"]],
        variance=case["var_type"].lower(),
        **options,
    )


@pytest.mark.parametrize(("stem", "case"), recorded("p_mean_variance_gd", "p_mean_variance_glide"))
def test_p_mean_variance_is_the_originals(stem: str, case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    x = tensor(stem, f"{inputs}/x", getattr(torch, case["x_dtype"]))
    output = tensor(stem, f"{inputs}/model_output", getattr(torch, case["model_output_dtype"]))
    denoised_fn = None
    if case["denoised_fn"] == "known":
        denoised_fn = fill_known(tensor(stem, f"{inputs}/known_image"), tensor(stem, f"{inputs}/known_mask"))

    p = p_mean_variance(
        case,
        output[:, : case["model_output_channels"]],
        x,
        tensor(stem, f"{inputs}/t"),
        clip_denoised=case["clip_denoised"],
        denoised_fn=denoised_fn,
    )

    assert set(p) == set(case["out_dtypes"])
    for name, dtype in case["out_dtypes"].items():
        assert_recorded(p[name], stem, f"{case['id']}/{name}", dtype, 2e-5)


@pytest.mark.parametrize(("stem", "case"), recorded("single_steps_gd", "single_steps_glide"))
def test_a_single_step_is_the_originals(stem: str, case: dict[str, Any]) -> None:
    dtype = getattr(torch, case.get("x_dtype") or "float32")
    names = ("x", "model_output", "noise", "grad", "x_start")
    t = tensor(stem, f"{case['inputs']}/t")
    given = {name: tensor(stem, f"{case['inputs']}/{name}", dtype) for name in names}
    before = {name: value.clone() for name, value in given.items()}

    results = single_step(case, t, **given)

    tolerance = 2e-5 if case["fn"] in ("p_sample", "condition_mean") or case["fn"].startswith("q_") else 5e-4
    for name in case["outputs"]:
        assert_recorded(results[name], stem, f"{case['id']}/{name}", case["out_dtypes"][name], tolerance)
    assert all(torch.equal(given[name], before[name]) for name in names), "an input was modified"


def single_step(
    case: dict[str, Any], t: Tensor, x: Tensor, model_output: Tensor, noise: Tensor, grad: Tensor, x_start: Tensor
) -> dict[str, Tensor]:
    """The call that a case recorded, composed of our functions."""
    schedule, function = schedule_of(case), case["fn"]
    if function == "q_mean_variance":
        return named("mean variance log_variance", *originals.q_mean_variance(schedule, x_start, t))
    if function == "q_sample":
        return {"sample": originals.q_sample(schedule, x_start, t, noise)}
    if function == "q_posterior_mean_variance":
        moments = originals.q_posterior_mean_variance(schedule, x_start, x, t)
        return named("mean variance log_variance_clipped", *moments)
    if function == "_predict_xstart_from_eps":
        return {"pred_xstart": originals.predict_xstart_from_eps(schedule, x, t, noise)}
    if function == "_predict_eps_from_xstart":
        return {"eps": originals.predict_eps_from_xstart(schedule, x, t, x_start)}
    if function == "_predict_xstart_from_xprev":
        return {"pred_xstart": originals.predict_xstart_from_xprev(schedule, x, t, x_start)}

    clip = True if case["clip_denoised"] is None else case["clip_denoised"]
    p = p_mean_variance(case, model_output, x, t, clip_denoised=clip)
    if function == "condition_mean":
        return {"mean": originals.condition_mean(p, grad)}
    if function == "condition_score":
        return originals.condition_score(schedule, p, x, t, grad)
    if function == "p_sample":
        if case["cond_fn"]:
            p["mean"] = originals.condition_mean(p, grad)
        return {"sample": originals.p_sample(p, t, noise), "pred_xstart": p["pred_xstart"]}
    if case["cond_fn"]:
        p = originals.condition_score(schedule, p, x, t, grad)
    if function == "ddim_sample":
        sample = originals.ddim_sample(schedule, p, x, t, noise, eta=case["eta"])
    else:
        assert function == "ddim_reverse_sample"
        sample = originals.ddim_reverse_sample(schedule, p, x, t)
    return {"sample": sample, "pred_xstart": p["pred_xstart"]}


def named(names: str, *values: Tensor) -> dict[str, Tensor]:
    return dict(zip(names.split(), values, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "v"}, r"prediction: got 'v', expected one of epsilon, x0, previous_x"),
        ({"variance": "FIXED_SMALL"}, r"variance: got 'FIXED_SMALL', expected one of fixed_small, "),
        ({"variance": "fixed_small"}, r"model_output: got shape \(2, 6, 4, 4\), expected \(2, 3, 4, 4\)"),
        ({"model_output": torch.zeros(2, 3, 4, 4)}, r"model_output: got shape \(2, 3, 4, 4\), expected \(2, 6, 4, 4\)"),
        ({"model_output": torch.zeros(1, 6, 4, 4)}, r"model_output: got shape \(1, 6, 4, 4\), expected \(2, 6, 4, 4\)"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    arguments = {"model_output": torch.zeros(2, 6, 4, 4), "x": torch.zeros(2, 3, 4, 4), "t": torch.tensor([9, 0])}
    with pytest.raises(ValueError, match=message):
        originals.p_mean_variance(Schedule.named("cosine", 10), **{**arguments, **options})
