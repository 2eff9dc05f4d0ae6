"""The originals' GaussianDiffusion on our side: every recorded table, step and loop, by their names and arguments."""

from __future__ import annotations

import inspect
import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.golden_data import (
    FOLDER,
    TOYS,
    arrays,
    assert_recorded,
    cases,
    error,
    fill_known,
    guided,
    tensor,
    toy_gradient,
)
from torch import Tensor

from fastcfg.frontends import ClassifierFree, glide, guided_diffusion

IMPLEMENTATIONS: dict[str, ModuleType] = {"gd": guided_diffusion, "glide": glide}


def respaced(module: ModuleType, case: dict[str, Any]) -> Any:
    """The process of a case, made as MANIFEST says the original was."""
    betas = module.get_named_beta_schedule(case["sched"], case["T"])
    options = {}
    if module is guided_diffusion:
        options = {
            "model_mean_type": guided_diffusion.ModelMeanType[case.get("mean_type", case.get("mean"))],
            "model_var_type": guided_diffusion.ModelVarType[case.get("var_type", case.get("var"))],
            "loss_type": guided_diffusion.LossType.MSE,
            "rescale_timesteps": case.get("rescale_timesteps", case.get("rescale", False)),
        }
    if case["respacing"] is None:
        return module.GaussianDiffusion(betas=betas, **options)
    return module.SpacedDiffusion(
        use_timesteps=module.space_timesteps(case["T"], case["respacing"]), betas=betas, **options
    )


def recorded(*stems: str) -> list[Any]:
    return [pytest.param(stem, case, id=f"{stem[-5:]}-{case['id']}") for stem in stems for case in cases(stem)]


# Schedules and tables.


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case["id"]) for case in cases("schedules") if case["kind"] in ("named", "spaced")]
)
def test_the_attributes_are_the_originals(case: dict[str, Any]) -> None:
    module = IMPLEMENTATIONS[case["impl"]]
    base = {"sched": case["schedule"], "T": case["T"], "respacing": case.get("respacing")}
    diffusion = respaced(module, {**base, "mean_type": "EPSILON", "var_type": "FIXED_SMALL"})
    assert diffusion.num_timesteps == len(arrays("schedules")[f"{case['id']}/betas"])
    for name in case["arrays"]:
        got, want = np.asarray(getattr(diffusion, name)), arrays("schedules")[f"{case['id']}/{name}"]
        assert got.dtype == want.dtype
        # numpy's float64 log differs by 1 ulp between AVX-512 and AVX2.
        exact = not name.startswith(("log_", "posterior_log_"))
        assert np.array_equal(got, want) if exact else np.allclose(got, want, rtol=4e-16, atol=0)
    if case["kind"] == "spaced":
        assert isinstance(diffusion.timestep_map, list)
        assert diffusion.use_timesteps == set(diffusion.timestep_map)
        assert diffusion.original_num_steps == case["T"]


def test_the_deprecated_schedules() -> None:
    for case in cases("schedules"):
        if case["kind"] == "legacy":
            betas = glide.get_beta_schedule(
                case["schedule"],
                beta_start=case["beta_start"],
                beta_end=case["beta_end"],
                num_diffusion_timesteps=case["T"],
            )
            assert np.array_equal(betas, arrays("schedules")[f"{case['id']}/betas"])
    with pytest.raises(NotImplementedError, match="unknown beta schedule 'cosine'"):
        glide.get_beta_schedule("cosine", beta_start=0.1, beta_end=0.2, num_diffusion_timesteps=3)


@pytest.mark.parametrize("row", cases("schedule_errors"), ids=lambda row: f"{row['impl']}-{row['schedule']}-{row['T']}")
def test_what_the_originals_refuse_is_refused_alike(row: dict[str, Any]) -> None:
    module = IMPLEMENTATIONS[row["impl"]]
    case = {**row, "sched": row["schedule"], "mean_type": "EPSILON", "var_type": "FIXED_SMALL"}
    if row["ok"]:
        diffusion = respaced(module, case)
        broken = [name for name in row["non_finite_tables"] if not np.isfinite(getattr(diffusion, name)).all()]
        assert broken == row["non_finite_tables"]
        return
    recorded_type = {"AssertionError": AssertionError, "IndexError": IndexError}.get(row["error"], NotImplementedError)
    with pytest.raises(recorded_type) as caught:
        respaced(module, case)
    assert isinstance(caught.value, ValueError)
    if row["error"] == "NotImplementedError":
        assert str(caught.value) == row["message"]


@pytest.mark.parametrize("module", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_space_timesteps(module: ModuleType) -> None:
    name = "glide" if module is glide else "gd"
    for row in cases("space_timesteps"):
        want = row.get("both", row.get(name))
        if isinstance(want, dict):
            recorded_type = ZeroDivisionError if want["error"] == "ZeroDivisionError" else ValueError
            with pytest.raises(recorded_type):
                module.space_timesteps(row["num_timesteps"], row["section_counts"])
        else:
            assert sorted(module.space_timesteps(row["num_timesteps"], row["section_counts"])) == want


def test_create_gaussian_diffusion_has_the_originals_defaults_and_choices() -> None:
    defaults = json.loads((FOLDER / "defaults.json").read_text())["signatures"]
    plain = guided_diffusion.create_gaussian_diffusion
    names = {
        "guided_diffusion.script_util.create_gaussian_diffusion": plain,
        "glide_text2im.model_creation.create_gaussian_diffusion": glide.create_gaussian_diffusion,
    }
    for name, function in names.items():
        parameters = inspect.signature(function).parameters.values()
        bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
        assert str(bare) == defaults[name]
    types = guided_diffusion.ModelMeanType, guided_diffusion.ModelVarType, guided_diffusion.LossType
    for options, want in (
        ({}, ("EPSILON", "FIXED_LARGE", "MSE")),
        ({"sigma_small": True, "predict_xstart": True}, ("START_X", "FIXED_SMALL", "MSE")),
        ({"learn_sigma": True, "sigma_small": True}, ("EPSILON", "LEARNED_RANGE", "MSE")),
        ({"learn_sigma": True, "rescale_learned_sigmas": True}, ("EPSILON", "LEARNED_RANGE", "RESCALED_MSE")),
        ({"use_kl": True, "rescale_learned_sigmas": True}, ("EPSILON", "FIXED_LARGE", "RESCALED_KL")),
    ):
        diffusion = plain(**options, timestep_respacing="10")
        got = diffusion.model_mean_type, diffusion.model_var_type, diffusion.loss_type
        assert got == tuple(kind[name] for kind, name in zip(types, want, strict=True))
    assert plain().num_timesteps == 1000


LOOP = "model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, device=None"
SIGNATURES = {
    "p_sample_loop": f"(self, {LOOP}, progress=False, **engine)",
    "p_sample_loop_progressive": f"(self, {LOOP}, progress=False, **engine)",
    "ddim_sample_loop": f"(self, {LOOP}, progress=False, eta=0.0, **engine)",
    "ddim_sample_loop_progressive": f"(self, {LOOP}, progress=False, eta=0.0, **engine)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_loops_have_the_originals_signatures(name: str) -> None:
    for module in (guided_diffusion, glide):
        signature = inspect.signature(getattr(module.SpacedDiffusion, name))
        parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(parameters)) == SIGNATURES[name]
    diffusion = glide.create_gaussian_diffusion(1000, "squaredcos_cap_v2", "3")
    with pytest.raises(TypeError, match="missing a required argument: 'shape'"):
        getattr(diffusion, name)(torch.tanh)
    with pytest.raises(TypeError, match="too many positional arguments"):
        getattr(diffusion, name)(torch.tanh, (2, 3, 4, 4), None, True, None, None, None, "cpu", False, 0.0, 1)


# One step.


@pytest.mark.parametrize(("stem", "case"), recorded("p_mean_variance_gd", "p_mean_variance_glide"))
def test_p_mean_variance(stem: str, case: dict[str, Any]) -> None:
    module = IMPLEMENTATIONS[stem.rsplit("_", 1)[1]]
    inputs = case["inputs"]
    x = tensor(stem, f"{inputs}/x", getattr(torch, case["x_dtype"]))
    output = tensor(stem, f"{inputs}/model_output", getattr(torch, case["model_output_dtype"]))
    output = output[:, : case["model_output_channels"]]
    known = None
    if case["denoised_fn"] == "known":
        known = fill_known(tensor(stem, f"{inputs}/known_image"), tensor(stem, f"{inputs}/known_mask"))
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Any:
        seen.append(t)
        return (output, "extra-object") if case.get("model_returns_tuple") else output

    p = respaced(module, case).p_mean_variance(
        model, x, tensor(stem, f"{inputs}/t"), clip_denoised=case["clip_denoised"], denoised_fn=known
    )

    assert seen[0].tolist() == case["model_timesteps"]
    assert str(seen[0].dtype) == f"torch.{case['model_timesteps_dtype']}"
    if module is glide:
        assert p.pop("extra") == ("extra-object" if case.get("model_returns_tuple") else None)
    assert set(p) == set(case["out_dtypes"])
    for name, dtype in case["out_dtypes"].items():
        assert_recorded(p[name], stem, f"{case['id']}/{name}", dtype, 2e-5)


@pytest.mark.parametrize(("stem", "case"), recorded("single_steps_gd", "single_steps_glide"))
def test_a_single_step(stem: str, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = IMPLEMENTATIONS[stem.rsplit("_", 1)[1]]
    dtype = getattr(torch, case.get("x_dtype") or "float32")
    t = tensor(stem, f"{case['inputs']}/t")
    given = {name: tensor(stem, f"{case['inputs']}/{name}", dtype) for name in ("x", "model_output", "noise", "grad")}
    x, x_start = given["x"], tensor(stem, f"{case['inputs']}/x_start", dtype)
    draws: list[Tensor] = []

    def randn_like(like: Tensor) -> Tensor:
        draws.append(like)
        return given["noise"].to(like.dtype)

    monkeypatch.setattr(torch, "randn_like", randn_like)
    diffusion = respaced(module, case)
    clip = case.get("clip_denoised") is not False

    def model(x: Tensor, t: Tensor) -> Tensor:
        return given["model_output"]

    def cond_fn(x: Tensor, t: Tensor) -> Tensor:
        return given["grad"]

    options: dict[str, Any] = {"clip_denoised": clip, "model_kwargs": {}}
    if case["fn"] in ("p_sample", "ddim_sample", "ddim_reverse_sample"):
        if case["cond_fn"]:
            options["cond_fn"] = cond_fn
        if case["fn"] != "p_sample":
            options["eta"] = case["eta"]
        results = getattr(diffusion, case["fn"])(model, x, t, **options)
    elif case["fn"] in ("condition_mean", "condition_score"):
        p = diffusion.p_mean_variance(model, x, t, **options)
        results = getattr(diffusion, case["fn"])(cond_fn, p, x, t, model_kwargs={})
        results = results if isinstance(results, dict) else {"mean": results}
    else:
        arguments: dict[str, dict[str, Tensor]] = {
            "q_mean_variance": {"x_start": x_start, "t": t},
            "q_sample": {"x_start": x_start, "t": t, "noise": given["noise"]},
            "q_posterior_mean_variance": {"x_start": x_start, "x_t": x, "t": t},
            "_predict_xstart_from_eps": {"x_t": x, "t": t, "eps": given["noise"]},
            "_predict_eps_from_xstart": {"x_t": x, "t": t, "pred_xstart": x_start},
            "_predict_xstart_from_xprev": {"x_t": x, "t": t, "xprev": x_start},
        }
        results = getattr(diffusion, case["fn"])(**arguments[case["fn"]])
        if isinstance(results, tuple):
            last = "log_variance" if case["fn"] == "q_mean_variance" else "log_variance_clipped"
            results = dict(zip(("mean", "variance", last), results, strict=True))
        else:
            results = {case["outputs"][0]: results}

    assert len(draws) == (case.get("randn_like_calls") or 0)
    tolerance = 2e-5 if case["fn"] in ("p_sample", "condition_mean") or case["fn"].startswith("q_") else 5e-4
    for name in case["outputs"]:
        assert_recorded(results[name], stem, f"{case['id']}/{name}", case["out_dtypes"][name], tolerance)


# Whole loops.

LOOPS = [pytest.param(case, id=case["id"]) for case in cases("loops")]
BACKENDS = ["reference", "auto"]


class Loop:
    """The call that a case recorded."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.stem = case, f"loop_{case['id']}"
        self.diffusion = respaced(IMPLEMENTATIONS[case["impl"]], case)
        self.source = "loop_" + case["noise"].split()[-1] if case["noise"].startswith("arrays of") else self.stem
        dtype = getattr(torch, case.get("dtype", "float32"))
        self.arguments: dict[str, Any] = {"clip_denoised": case["clip"], "device": "cpu"}
        kwargs = {"y": torch.tensor(case["y"])} if "y" in case else {"low_res": tensor(self.stem, "low_res")}
        self.arguments["model_kwargs"] = kwargs
        if "denoised" in case:
            known = (tensor(self.stem, f"known_{name}", dtype) for name in ("image", "mask"))
            self.arguments["denoised_fn"] = fill_known(*known)
        if "cond" in case:
            self.arguments["cond_fn"] = toy_gradient
        if case["fn"] == "ddim_sample_loop":
            self.arguments["eta"] = case["eta"]
        if "torch_seed" not in case:
            self.arguments["noise"] = tensor(self.source, "x_T", dtype)
            drawn = arrays(self.source).get("noise")
            if drawn is not None:
                self.arguments["noise_source"] = lambda step, shape: torch.from_numpy(drawn[step]).to(dtype)

    def model(self, fused: bool) -> Any:
        toy = TOYS[self.case["model"]]
        if self.case["kind"] != "cfg":
            return toy
        return ClassifierFree(toy, self.case["scale"]) if fused else guided(toy, self.case["scale"])

    def steps(self, fused: bool, **options: Any) -> list[dict[str, Tensor]]:
        if "torch_seed" in self.case:
            torch.manual_seed(self.case["torch_seed"])
        function = getattr(self.diffusion, f"{self.case['fn']}_progressive")
        return list(function(self.model(fused), tuple(self.case["shape"]), **self.arguments, **options))

    def final(self, fused: bool, **options: Any) -> Tensor:
        if "torch_seed" in self.case:
            torch.manual_seed(self.case["torch_seed"])
        function = getattr(self.diffusion, self.case["fn"])
        return function(self.model(fused), tuple(self.case["shape"]), **self.arguments, **options)

    def generator_is_where_theirs_was(self) -> bool:
        return "torch_seed" not in self.case or torch.equal(torch.rand(4), tensor(self.stem, "rng_probe"))


@pytest.mark.parametrize("fused", [False, True], ids=["model_fn", "ClassifierFree"])
@pytest.mark.parametrize("case", LOOPS)
def test_the_originals_loop_bit_for_bit(case: dict[str, Any], fused: bool) -> None:
    loop = Loop(case)
    steps = loop.steps(fused, backend="reference")
    assert loop.generator_is_where_theirs_was()
    assert len(steps) == case["steps"]
    for i in case["kept_steps"]:
        for name, got in steps[i].items():
            assert_recorded(got, loop.stem, f"step{i:03d}/{name}", case["out_dtype"], 1e-3)
    assert_recorded(loop.final(fused, backend="reference"), loop.stem, "final", case["out_dtype"], 1e-4)


@pytest.mark.parametrize("fused", [False, True], ids=["model_fn", "ClassifierFree"])
@pytest.mark.parametrize("case", LOOPS)
def test_the_engine_runs_the_originals_loop(case: dict[str, Any], fused: bool) -> None:
    loop = Loop(case)
    batch = case["shape"][0] // (2 if case["kind"] == "cfg" and fused else 1)
    steps = loop.steps(fused)
    assert loop.generator_is_where_theirs_was()
    assert len(steps) == case["steps"]
    for i in case["kept_steps"]:
        for name, got in steps[i].items():
            want = tensor(loop.stem, f"step{i:03d}/{name}")
            assert got.shape == want.shape
            # Measured, as in test_golden_loops: 3.9e-4 and 1.3e-5.
            assert error(got[:batch], want[:batch]) < (1e-3 if name == "pred_xstart" else 1e-4)
    got, want = loop.final(fused), tensor(loop.stem, "final")
    assert loop.generator_is_where_theirs_was()
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert error(got[:batch], want[:batch]) < 2e-5
    if batch < len(got):
        assert torch.equal(got[batch:], got[:batch])


@pytest.mark.parametrize("fused", [False, True], ids=["model_fn", "ClassifierFree"])
# float64 would draw other noise from a seed.
@pytest.mark.parametrize("case", [case for case in LOOPS if not {"dtype", "torch_seed"} & case.values[0].keys()])
def test_the_engine_is_no_further_from_float64_than_the_originals(case: dict[str, Any], fused: bool) -> None:
    loop = Loop(case)
    ours, theirs = loop.final(fused), tensor(loop.stem, "final")
    double = Loop({**case, "dtype": "float64"})
    truth = double.final(fused)
    batch = case["shape"][0] // (2 if case["kind"] == "cfg" else 1)
    assert truth.dtype == torch.float64
    assert error(ours[:batch], truth[:batch]) < 2 * error(theirs[:batch], truth[:batch])


@pytest.mark.parametrize("case", [case for case in LOOPS if case.values[0]["kind"] == "cfg"][:2])
def test_guidance_scale_guides_a_plain_model(case: dict[str, Any]) -> None:
    loop = Loop(case)
    want = loop.final(True)
    function = getattr(loop.diffusion, case["fn"])
    got = function(TOYS[case["model"]], case["shape"], **loop.arguments, guidance_scale=case["scale"])
    assert torch.equal(got, want)
