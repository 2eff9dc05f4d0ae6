"""Guidance methods beside diffusers' guiders and float64 formulas, row by row through the sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcfg.guidance
from fastcfg import (
    APG,
    CFG,
    AdaptiveCFG,
    APGMix,
    AutoGuidance,
    CFGZeroStar,
    Compose,
    DynamicThreshold,
    GramGuidance,
    Guidance,
    InstructPix2Pix,
    MagnitudeAwareCFG,
    PerpNeg,
    PerturbedCFG,
    Sampler,
    StepTable,
    TangentialCFG,
)
from fastcfg.cli import main
from fastcfg.cli.methods import methods, option_runs
from fastcfg.guidance import by_name
from fastcfg.ops import triton_problem
from fastcfg.ops.blender import Blender

R, B, SHAPE = 8, 4, (4, 3, 6, 5)


def table_of(rows: int) -> StepTable:
    """A row's x is the guided output itself."""
    return StepTable.from_columns(t=range(rows), a_m=1.0)


TABLE = table_of(R)
NAMES = ("cond", "uncond", "negative", "image", "weak", "perturbed")
BACKENDS = ["reference"] if triton_problem(torch.device("cpu")) else ["reference", "triton"]


def recorded(dtype: torch.dtype = torch.float32) -> Tensor:
    """[R, branches, B, C, H, W]: what a model says, with branches that are close in sample 1 and huge in sample 2."""
    outputs = torch.randn((R, len(NAMES), *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs += 0.5 * outputs[:, 1:2]
    outputs[:, :, 1] = outputs[:, 1:2, 1] + 2.0**-9 * outputs[:, :, 1]
    outputs[:, :, 2] *= 2.0**11
    return outputs.to(dtype)


_CALLS: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()


class Player:
    """A model that plays a recording, and counts its samples: out of the engine's sight, since a model whose state
    changes from call to call is not captured."""

    def __init__(self, outputs: Tensor) -> None:
        self.outputs = outputs

    @property
    def calls(self) -> list[int]:
        return _CALLS.setdefault(self, [])

    def __call__(self, x: Tensor, t: Tensor, branch: Tensor, sample: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.outputs[t.long(), branch, sample]


def play(guidance: Guidance, outputs: Tensor, batch: int = B, graph: bool = False, **options: Any) -> Tensor:
    """[R, B, ...]: the guided output of every row. The interpreter is slow: tests give it two."""
    given = {"table": table_of(len(outputs)), "dtype": outputs.dtype, "backend": "reference", **options}
    sampler = Sampler(Player(outputs), guidance=guidance, graph=graph, **given)
    conditions = {
        name: {"branch": torch.full((batch,), NAMES.index(name)), "sample": torch.arange(batch)}
        for name in guidance.branches
    }
    steps = sampler.iterate((batch, *SHAPE[1:]), branches=conditions, seed=0)
    rows = torch.stack([step.x for step in steps])
    assert sampler.report()["graph"] == ("stand-in" if graph else "none"), sampler.report()
    return rows


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Errors relative to the largest number of each sample and row."""
    size = want.double().abs().amax(dim=(2, 3, 4), keepdim=True).clamp_min(1e-30)
    error = float(((got - want).abs() / size).max())
    assert error < tolerance, error


# diffusers' guiders

OURS_TO_THEIRS = {"scale": "guidance_scale", "rescale": "guidance_rescale"}
METHODS: dict[str, tuple[type[CFG], str, dict[str, Any], dict[str, str]]] = {
    "cfg": (CFG, "ClassifierFreeGuidance", {}, {}),
    "zero star": (CFGZeroStar, "ClassifierFreeZeroStarGuidance", {"zero_init_steps": 2}, {}),
    "apg": (
        APG,
        "AdaptiveProjectedGuidance",
        {"eta": 0.25, "norm_threshold": 5.0},
        {"norm_threshold": "adaptive_projected_guidance_rescale"},
    ),
    "apg with momentum": (
        APG,
        "AdaptiveProjectedGuidance",
        {"eta": 0.0, "momentum": -0.5, "norm_threshold": 15.0},
        {
            "norm_threshold": "adaptive_projected_guidance_rescale",
            "momentum": "adaptive_projected_guidance_momentum",
        },
    ),
    "apg without a limit": (
        APG,
        "AdaptiveProjectedGuidance",
        {"eta": 0.5, "momentum": 0.7, "norm_threshold": 0.0},
        {
            "norm_threshold": "adaptive_projected_guidance_rescale",
            "momentum": "adaptive_projected_guidance_momentum",
        },
    ),
    "apg mix": (
        APGMix,
        "AdaptiveProjectedMixGuidance",
        {"apg_scale": 9.0, "apg_start_step": 3, "momentum": -0.5, "norm_threshold": 9.0, "eta": 0.1},
        {
            "apg_scale": "adaptive_projected_guidance_scale",
            "apg_start_step": "adaptive_projected_guidance_start_step",
            "norm_threshold": "adaptive_projected_guidance_rescale",
            "momentum": "adaptive_projected_guidance_momentum",
        },
    ),
    "tangential": (TangentialCFG, "TangentialClassifierFreeGuidance", {}, {}),
    "magnitude aware": (MagnitudeAwareCFG, "MagnitudeAwareGuidance", {"alpha": 2.0}, {}),
    "auto": (AutoGuidance, "AutoGuidance", {}, {}),
    "perturbed": (
        PerturbedCFG,
        "SkipLayerGuidance",
        {"perturbed_scale": 1.5, "perturbed_interval": (0.13, 0.7)},
        {"perturbed_scale": "skip_layer_guidance_scale"},
    ),
}
EXTRA = {
    "AutoGuidance": {"auto_guidance_layers": 1, "dropout": 0.1},
    "SkipLayerGuidance": {
        "skip_layer_guidance_layers": 1,
        "skip_layer_guidance_start": 0.13,
        "skip_layer_guidance_stop": 0.7,
    },
}
# Scale of the two formulations, interval, rescale.
SETTINGS = [
    (4.0, "standard", (0.0, 1.0), 0.0),
    (4.0, "standard", (0.26, 0.8), 0.7),
    (3.0, "original", (0.0, 0.6), 0.0),
    (3.0, "original", (0.25, 1.0), 1.0),
    (1.0, "standard", (0.0, 1.0), 0.3),
    (0.0, "standard", (0.0, 1.0), 0.0),
]


def theirs(name: str, scale: float, formulation: str, interval: tuple[float, float], rescale: float) -> Any:
    guiders = pytest.importorskip("diffusers.guiders")
    _, kind, options, names = METHODS[name]
    options = {names.get(key, key): value for key, value in options.items() if key != "perturbed_interval"}
    return getattr(guiders, kind)(
        guidance_scale=scale,
        guidance_rescale=rescale,
        use_original_formulation=formulation == "original",
        start=interval[0],
        stop=interval[1],
        **options,
        **EXTRA.get(kind, {}),
    )


def guide(guider: Any, outputs: Tensor) -> Tensor:
    """[R, B, ...]: diffusers' guided outputs."""
    rows = []
    second = NAMES.index("weak" if type(guider).__name__ == "AutoGuidance" else "uncond")
    # Flat, as torch has no norm over three dimensions for the magnitude-aware guider.
    for step, row in enumerate(outputs.flatten(3)):
        guider.set_state(step, len(outputs), None)
        guider.prepare_inputs({})
        given = {"pred_cond": row[0], "pred_uncond": row[second]}
        if hasattr(guider, "skip_layer_guidance_scale"):
            given["pred_cond_skip"] = row[NAMES.index("perturbed")]
        rows.append(guider.forward(**given).pred)
    return torch.stack(rows).view(outputs[:, 0].shape)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_methods_are_diffusers_guiders(name: str, setting: tuple[Any, ...]) -> None:
    scale, formulation, interval, rescale = setting
    kind, _, options, _ = METHODS[name]
    ours = kind(scale=scale, formulation=formulation, interval=interval, rescale=rescale, **options)
    for dtype in (torch.float32, torch.float16):
        outputs = recorded(dtype)
        want = guide(theirs(name, *setting), outputs.double())
        # Where the guided output is 0, rescaling it is not a number in diffusers.
        want = torch.where(want.isnan(), 0, want)
        got = play(ours, outputs)
        # Measured: 2e-7, and 3.9e-6 where diffusers computes in float32 (tangential).
        assert_near(got, want, 1e-5 if name in ("tangential", "zero star") else 1e-6)


# Float64 formulas


def norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(1).sum(1).view(-1, 1, 1, 1)


def rescaled(m: Tensor, cond: Tensor, φ: float) -> Tensor:
    std_c, std_m = (v.flatten(1).std(dim=1).view(-1, 1, 1, 1) for v in (cond, m))
    return m * (φ * std_c / std_m + 1 - φ)


def tangential(m: dict[str, Tensor]) -> Tensor:
    pair = torch.stack([m["cond"].flatten(1), m["uncond"].flatten(1)], dim=1)
    v = torch.linalg.svd(pair, full_matrices=False).Vh[:, 0].view(m["cond"].shape)
    kept = dot(m["uncond"], v) * v
    return kept + 4 * (m["cond"] - kept)


def perp_neg(m: dict[str, Tensor]) -> Tensor:
    e, n = m["cond"] - m["uncond"], m["negative"] - m["uncond"]
    return m["uncond"] + 5 * (e - 0.8 * (n - dot(n, e) / dot(e, e) * e))


def instruct(m: dict[str, Tensor]) -> Tensor:
    return m["uncond"] + 1.5 * (m["image"] - m["uncond"]) + 7 * (m["cond"] - m["image"])


def magnitude_aware(m: dict[str, Tensor]) -> Tensor:
    d = m["cond"] - m["uncond"]
    return m["uncond"] + (1 + 9 * torch.exp(-8 * norm(d) / norm(m["uncond"]))) * d


def zero_star(m: dict[str, Tensor]) -> Tensor:
    u = m["uncond"] * dot(m["cond"], m["uncond"]) / dot(m["uncond"], m["uncond"])
    return u + 4 * (m["cond"] - u)


def apg(m: dict[str, Tensor]) -> Tensor:
    c, d = m["cond"], m["cond"] - m["uncond"]
    d = d * (9 / norm(d)).clamp(max=1)
    return m["uncond"] + 6 * (d - 0.75 * dot(d, c) / dot(c, c) * c)


FORMULAS: dict[str, tuple[Guidance, Callable[[dict[str, Tensor]], Tensor]]] = {
    "zero star": (CFGZeroStar(4.0, zero_init_steps=0, order=("uncond", "cond")), zero_star),
    "apg": (APG(6.0, eta=0.25, norm_threshold=9.0, order=("uncond", "cond")), apg),
    "tangential": (TangentialCFG(4.0, order=("uncond", "cond")), tangential),
    "magnitude aware": (MagnitudeAwareCFG(order=("uncond", "cond")), magnitude_aware),
    "perp neg": (PerpNeg(5.0, {"negative": 0.8}), perp_neg),
    "instruct": (InstructPix2Pix(7.0, 1.5), instruct),
    "instruct rescaled": (InstructPix2Pix(7.0, 1.5, rescale=0.6), lambda m: rescaled(instruct(m), m["cond"], 0.6)),
    "perp neg rescaled": (PerpNeg(5.0, {"negative": 0.8}, rescale=1.0), lambda m: rescaled(perp_neg(m), m["cond"], 1)),
    "compose rescaled": (
        Compose({"cond": 2.0, "image": 1.0}, rescale=0.5),
        lambda m: rescaled(2 * m["cond"] + m["image"] - 2 * m["uncond"], m["cond"], 0.5),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_methods_are_their_formulas(name: str) -> None:
    guidance, formula = FORMULAS[name]
    for dtype, backend in zip((torch.float32, torch.float16, torch.bfloat16), [BACKENDS[0], *BACKENDS], strict=False):
        outputs = recorded(dtype)[: 2 if backend == "triton" else R]
        want = torch.stack([formula(dict(zip(NAMES, row, strict=True))) for row in outputs.double()])
        # Measured: 1.7e-7.
        assert_near(play(guidance, outputs, backend=backend), want, 1e-6)


def test_momentum_adds_up_over_the_guided_rows_and_starts_again_with_a_run() -> None:
    outputs = recorded()
    guidance = APG(2.0, (0.25, 1.0), momentum=0.9, norm_threshold=0.0)
    h, want = torch.zeros(SHAPE, dtype=torch.float64), []
    for step, row in enumerate(outputs.double()):
        if step >= 2:
            h = row[0] - row[1] + 0.9 * h
        want.append(row[1] + 2 * h if step >= 2 else row[0])
    sampler = Sampler(Player(outputs), TABLE, guidance=guidance, backend="reference")
    conditions = {n: {"branch": torch.full((B,), i), "sample": torch.arange(B)} for i, n in enumerate(NAMES[:2])}
    for _ in range(2):
        rows = torch.stack([step.x for step in sampler.iterate(SHAPE, branches=conditions, seed=0)])
        assert_near(rows, torch.stack(want), 1e-6)


LOOKING: dict[str, Guidance] = {
    "rescale": CFG(4.0, rescale=0.7),
    "adaptive": AdaptiveCFG(4.0, rescale=0.7, threshold=0.8),
    "compose": Compose({"cond": 2.0, "image": 1.0}, rescale=0.5),
    "perturbed": PerturbedCFG(3.0, rescale=0.5, perturbed_interval=(0.0, 0.6)),
    "zero star": CFGZeroStar(4.0),
    "apg": APG(4.0, (0.0, 0.7), momentum=-0.5),
    "apg mix": APGMix(rescale=0.4, apg_start_step=2),
    "tangential": TangentialCFG([2.0, 1.0, 4.0, 3.0]),
    "magnitude aware": MagnitudeAwareCFG(),
    "perp neg": PerpNeg(),
}


@pytest.mark.parametrize("name", LOOKING)
def test_zeros_are_never_not_a_number(name: str) -> None:
    outputs = recorded()
    outputs[0] = 0
    outputs[1, 0] = 0
    outputs[2, 1] = 0
    outputs[3, 0] = outputs[3, 1]
    outputs[4] = 1.0
    outputs[5] = outputs[5, :1]
    for dtype in (torch.float32, torch.float16):
        assert play(LOOKING[name], outputs.to(dtype)).isfinite().all()


@pytest.mark.parametrize("name", LOOKING)
def test_captured_equals_eager_and_a_sample_is_its_own(name: str) -> None:
    outputs, guidance = recorded(torch.bfloat16), LOOKING[name]
    eager = play(guidance, outputs)
    assert torch.equal(play(guidance, outputs, graph=True), eager)
    if name not in ("tangential", "adaptive"):  # scales per sample; rows with other programs
        assert torch.equal(play(guidance, outputs, batch=1)[:, 0], eager[:, 0])


BLENDED: dict[str, Guidance] = LOOKING | {
    "plain": CFG(4.0, (0.2, 0.8)),
    "by sample": CFG([2.0, 1.0, 4.0, 3.0], formulation="original"),
    "sum": CFG(4.0, formulation="sum"),
    "instruct": InstructPix2Pix(),
}
del BLENDED["adaptive"]


@pytest.mark.parametrize("name", BLENDED)
def test_a_blender_blends_as_a_sampler(name: str) -> None:
    # The kernels have their own tests; here one method's launches them.
    last = BACKENDS[-1] if name == "apg" else BACKENDS[0]
    for dtype, backend in ((torch.float32, BACKENDS[0]), (torch.bfloat16, last)):
        outputs = recorded(dtype)[: 2 if backend == "triton" else R]
        blender = Blender(BLENDED[name], len(outputs), outputs[0, 0], backend)
        for _ in range(2):
            blender.begin()
            rows = [
                blender(row, {k: outputs[row, NAMES.index(k)] for k in blender.branches(row)})
                for row in range(len(outputs))
            ]
            assert rows[0].dtype == dtype
            want = play(BLENDED[name], outputs, backend=backend)
            # What is rounded once may be half of the last place off.
            assert_near(torch.stack(rows), want, 1e-6 if dtype == torch.float32 else 2.0**-8 + 1e-6)


def test_a_blender_refuses_what_it_cannot_blend() -> None:
    like = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="got AdaptiveCFG"):
        Blender(AdaptiveCFG(), R, like)
    with pytest.raises(ValueError, match=r"like: got torch\.float64"):
        Blender(CFG(), R, like.double())
    with pytest.raises(ValueError, match=r"outputs: got \['cond'\], expected those of row 0: \['cond', 'uncond'\]"):
        Blender(CFG(), R, like)(0, {"cond": like})


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs the Triton interpreter")
def test_captured_kernels_equal_eager_ones() -> None:
    outputs, guidance = recorded(torch.bfloat16)[:3], APG(4.0, momentum=-0.5, rescale=0.5)
    eager = play(guidance, outputs, backend="triton")
    assert torch.equal(play(guidance, outputs, backend="triton", graph=True), eager)
    assert torch.equal(play(guidance, outputs, batch=1, backend="triton")[:, 0], eager[:, 0])


@pytest.mark.parametrize(
    "options", [{"clip": DynamicThreshold(0.9)}, {"denoised_fn": torch.tanh}], ids=["clip", "denoised_fn"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_x0_is_predicted_from_the_guided_output(options: dict[str, Any], backend: str) -> None:
    rows = 2 if backend == "triton" else R
    table = StepTable.from_columns(t=range(rows), p_m=1.0, a_0=1.0)
    outputs, guidance = recorded()[:rows], APG(4.0, momentum=-0.5, rescale=0.5)
    m = play(guidance, outputs, backend=backend)
    if "clip" in options:
        bound = m.abs().flatten(2).quantile(0.9, dim=2).clamp_min(1).view(rows, B, 1, 1, 1)
        want = torch.clamp(m, -bound, bound) / bound
    else:
        want = torch.tanh(m)
    torch.testing.assert_close(
        play(guidance, outputs, backend=backend, table=table, **options), want, rtol=0, atol=1e-6
    )


def test_scales_by_row_and_sample_and_rows_without_guidance() -> None:
    outputs = recorded()
    scales = np.linspace(0.5, 6, R)[:, None] * np.array([1.0, 0.5, 2.0, 0.0]) + np.array([0, 0, 0, 1.0])
    got = play(MagnitudeAwareCFG(scales, (0.0, 0.75)), outputs)
    c, u = outputs.double()[:, 0], outputs.double()[:, 1]
    for row in range(R):
        s = torch.from_numpy(scales[row]).view(-1, 1, 1, 1)
        d = c[row] - u[row]
        w = 1 + (s - 1) * torch.exp(-8 * norm(d) / norm(u[row]))
        assert_near(got[row, None], (u[row] + w * d if row < 6 else c[row])[None], 1e-6)


@dataclass(frozen=True, eq=False)
class Bounded(GramGuidance):
    """A user's own: the update is at most as long as uncond."""

    def mix(self, gram: Tensor, planned: Tensor) -> Tensor:
        u, d = self.other, self.conditional
        weights = planned.clone()
        weights[:, d] = planned[:, d].minimum((gram[:, u, u] / gram[:, d, d]).sqrt())
        return weights


def test_a_users_function_of_the_gram_matrix() -> None:
    outputs = recorded()
    c, u = outputs.double()[:, 0].flatten(0, 1), outputs.double()[:, 1].flatten(0, 1)
    want = u + torch.clamp(norm(u) / norm(c - u), max=4.0) * (c - u)
    for order in (("cond", "uncond"), ("uncond", "cond")):
        assert_near(play(Bounded(4.0, order=order), outputs, graph=True), want.view(R, *SHAPE), 1e-6)


# What is evaluated, kept, and refused


def test_branches_that_guide_nothing_are_not_evaluated() -> None:
    both, cond = (0, 1), (0,)
    assert APG(3.0, (0.0, 0.5)).plan(TABLE, 2).active == (both,) * 4 + (cond,) * 4
    assert APG([[3.0], [1.0]] * 4).plan(TABLE, 2).active == (both, cond) * 4
    assert APG([1.0, 3.0]).plan(TABLE, 2).active == (both,) * 8
    assert CFG(0.0).plan(TABLE, 2).active == ((1,),) * 8
    assert CFG(0.0, rescale=0.5).plan(TABLE, 2).active == (both,) * 8
    assert CFGZeroStar(3.0, (0.5, 1.0), zero_init_steps=1).plan(TABLE, 2).active == (both, *(cond,) * 3, *(both,) * 4)
    spec = PerturbedCFG(3.0, (0.25, 0.75), perturbed_interval=(0.125, 0.5))
    assert spec.plan(TABLE, 2).active == (cond, cond, *((0, 1, 2),) * 2, both, both, cond, cond)
    spec = PerturbedCFG(3.0, (0.5, 0.75), perturbed_interval=(0.0, 0.5))
    assert spec.plan(TABLE, 2).active == (cond, *((0, 2),) * 3, both, both, cond, cond)


def test_other_models_run_their_branches_alone() -> None:
    outputs = recorded()
    players = {"main": Player(outputs), "weak": Player(2 * outputs)}
    conditions = {"branch": torch.zeros(B, dtype=torch.int64), "sample": torch.arange(B)}
    sampler = Sampler(
        players["main"],
        TABLE,
        guidance=AutoGuidance(3.0, (0.0, 0.5)),
        branch_models={"weak": players["weak"]},
        graph=False,
    )
    rows = torch.stack([step.x for step in sampler.iterate(SHAPE, cond=conditions, seed=0)])
    cond = outputs[:, 0].double()
    assert_near(rows, torch.cat([2 * cond[:4] + 3 * (cond - 2 * cond)[:4], cond[4:]]), 1e-6)
    assert (players["main"].calls, players["weak"].calls) == ([B] * 8, [B] * 4)

    sampler = Sampler(
        players["main"],
        TABLE,
        guidance=PerturbedCFG(3.0, perturbed_interval=(0.0, 1.0)),
        branch_models={"perturbed": players["weak"]},
        graph=True,
    )
    given = {"cond": conditions, "uncond": {**conditions, "branch": torch.ones(B, dtype=torch.int64)}}
    captured = sampler.sample(SHAPE, **given, seed=0)
    last = outputs[-1].double()
    want = last[1] + 3 * (last[0] - last[1]) + 2.8 * (last[0] - 2 * last[0])
    assert_near(captured[None], want[None], 1e-6)
    assert sampler.report()["graph"] == "stand-in"
    assert players["main"].calls[-1] == 2 * B
    # Another model is another program.
    sampler.branch_models = {"perturbed": Player(0 * outputs)}
    assert_near(sampler.sample(SHAPE, **given, seed=0)[None], (want + 5.6 * last[0])[None], 1e-6)
    assert sampler.report()["captures"] == 2


def test_scales_change_without_a_capture_and_parameters_with_one() -> None:
    outputs = recorded()
    conditions = {n: {"branch": torch.full((B,), i), "sample": torch.arange(B)} for i, n in enumerate(NAMES[:2])}
    sampler = Sampler(Player(outputs), TABLE, graph=True)
    captures = []
    for guidance in (APG(3.0), APG(5.0), APG([2.0, 1.0, 3.0, 4.0]), APG(5.0, eta=0.5), APG(5.0, momentum=0.1)):
        sampler.guidance = guidance
        got = sampler.sample(SHAPE, branches=conditions, seed=0)
        assert torch.equal(got, play(guidance, outputs)[-1])
        captures.append(sampler.report()["captures"])
    assert captures == [1, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CFG(rescale=1.5), "rescale: got 1.5, expected a number from 0 to 1"),
        (lambda: CFGZeroStar(zero_init_steps=-1), "zero_init_steps: got -1, expected an integer of at least 0"),
        (lambda: APG(eta=float("nan")), "eta: got nan, expected a finite number"),
        (lambda: APG(momentum="no"), "momentum: got 'no', expected a finite number"),
        (lambda: APG(norm_threshold=-1.0), "norm_threshold: got -1.0, expected a finite number of at least 0"),
        (lambda: APGMix(apg_start_step=0.5), "apg_start_step: got 0.5, expected an integer of at least 0"),
        (lambda: APGMix(apg_scale=[1.0, 2.0]).plan(TABLE, 3), "apg_scale: got 2 values, expected 1 or one per sample"),
        (lambda: MagnitudeAwareCFG(alpha=-1.0), "alpha: got -1.0"),
        (lambda: PerpNeg(negatives={"cond": 1.0}), r"negatives: got \['cond'\], expected names other than"),
        (lambda: PerpNeg(negatives={"a": float("inf")}), r"negatives\['a'\]: got inf"),
        (lambda: InstructPix2Pix(image_scale=float("nan")), "image_scale: got nan"),
        (lambda: PerturbedCFG(perturbed_interval=(0.5, 0.2)), r"perturbed_interval: got \(0.5, 0.2\)"),
        (lambda: AutoGuidance(order=("cond", "uncond")), r"order: got .* expected a permutation of \('cond', 'weak'\)"),
        (
            lambda: AutoGuidance().plan(StepTable.from_columns(t=range(3), a_u=1.0), 1),
            "guidance: got branches cond, weak, expected 'uncond' among them",
        ),
        (
            lambda: Sampler(Player(recorded()), TABLE, guidance=CFG(), branch_models={"weak": abs}).sample(SHAPE),
            "branch_models: got 'weak', expected branches of the guidance: cond, uncond",
        ),
    ],
)
def test_errors_name_the_argument(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_branch_model_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match=r"branch_models\['weak'\]: got int, expected a callable"):
        Sampler(Player(recorded()), TABLE, guidance=AutoGuidance(), branch_models={"weak": 3}).sample(SHAPE)  # type: ignore[dict-item]


# What it costs


def test_the_command_lists_what_every_method_costs(capsys: pytest.CaptureFixture[str]) -> None:
    specs = {name for name in fastcfg.guidance.__all__ if isinstance(getattr(fastcfg.guidance, name), type)}
    assert specs - {"Guidance", "GuidancePlan", "GramGuidance"} == set(methods()) - {"rescale=0.7", "channels=3", "map"}
    assert main(["methods"]) == 0
    costs, more, names = capsys.readouterr().out.split("\n\n")
    options = dict.fromkeys(("state_fn", "inpaint", "log_prob", "check_finite"), "1")
    free = ("init, start, stop", "lists of seeds", "prompts by row", "lengths by branch", "models by row")
    told = {line[:-1].strip(): line[-1] for line in more.splitlines()[1:]}
    assert told == options | dict.fromkeys(free, "0")
    assert names == f"--guidance takes {', '.join(by_name.METHODS)}\n"
    rows = {line.split()[0]: line.split()[-2:] for line in costs.splitlines()[1:]}
    linear = {"NoGuidance": 1, "CFG": 2, "Compose": 3, "InstructPix2Pix": 3, "AutoGuidance": 2, "PerturbedCFG": 3}
    linear |= {"channels=3": 2}
    assert {name: int(forwards) for name, (forwards, passes) in rows.items() if passes == "1"} == linear
    assert {passes for _, passes in rows.values()} == {"1", "2"}


class Launches(TorchDispatchMode):
    """The operations of ours that are called, but for the start's noise."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith("fastcfg.") and "initial_noise" not in str(function):
            self.names.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs the Triton interpreter")
@pytest.mark.parametrize("guidance", [CFG(3.0), APG(3.0, momentum=-0.5, rescale=0.5), PerpNeg()], ids=repr)
def test_the_passes_told_are_those_launched(guidance: Guidance) -> None:
    outputs, named = recorded()[:2], [{"branch": torch.full((B,), i), "sample": torch.arange(B)} for i in range(3)]
    sampler = Sampler(Player(outputs), table_of(2), guidance=guidance, backend="triton", graph=False)
    with Launches() as launches:
        sampler.sample(SHAPE, branches=dict(zip(guidance.branches, named, strict=False)), seed=0)
    (program,) = sampler.report()["programs"]
    assert launches.names == (["gram", "guided_step"] if program["passes"] == 2 else ["guided_step"]) * 2


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs the Triton interpreter")
@pytest.mark.parametrize("name", option_runs())
def test_the_passes_of_options_are_those_launched(name: str) -> None:
    sampler, arguments = option_runs("triton")[name]
    with Launches() as launches:
        sampler.sample((1, 1, 8), **arguments)
    rows = launches.names.count("guided_step")
    assert rows == len(sampler.report()["branches"])
    assert len(launches.names) == rows * max(program["passes"] for program in sampler.report()["programs"])
