"""Scales by channel, frame and place, planned and run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.pairwise import pairwise
from torch import Tensor

from fastcfg import (
    APG,
    CFG,
    AdaptiveCFG,
    AutoGuidance,
    Compose,
    DynamicThreshold,
    Guidance,
    InstructPix2Pix,
    PerturbedCFG,
    Sampler,
    Schedule,
    solvers,
)
from fastcfg.guidance.places import plan_for
from fastcfg.ops.blender import Blender

pytestmark = pytest.mark.quick

B, C = 2, 4
SHAPE = (B, C, 3, 4)
SCHEDULE = Schedule.named("squaredcos_cap_v2", 100).respace(4)
TABLES = {
    "ddpm learned": solvers.ddpm(SCHEDULE),
    "ddpm": solvers.ddpm(SCHEDULE, variance="fixed_small"),
    "ddim": solvers.ddim(SCHEDULE),
    "heun": solvers.heun([14.6, 4.0, 1.2, 0.0]),
    "dpmpp_2m": solvers.dpmpp_2m([14.6, 4.0, 1.2, 0.4, 0.0]),
    "cfg++": solvers.ddim_cfg_pp(SCHEDULE),
}
VALUES = {"cond": (0.8, -0.5), "uncond": (0.1, 0.0), "image": (0.3, 0.2), "weak": (0.4, 0.1), "perturbed": (0.2, 0.3)}


class Model:
    def __init__(self, variance: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.variance, self.dtype = variance, dtype

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        ones = [1] * (x.ndim - 1)
        place = torch.linspace(-1, 1, x[0].numel()).view(x.shape[1:]).to(x.dtype)
        m = torch.tanh(0.6 * x + y.view(-1, *ones).to(x.dtype) * place) - 0.002 * t.to(x.dtype).view(-1, *ones)
        return torch.cat([m, torch.sin(3 * x + y.view(-1, *ones).to(x.dtype))], dim=1) if self.variance else m


def sampler(guidance: Guidance, table: str = "ddim", dtype: torch.dtype = torch.float32, **options: Any) -> Sampler:
    model = Model(TABLES[table].learned_variance)
    names = {"weak", "perturbed"} & set(guidance.branches)
    others = dict.fromkeys(names, model)
    given = {"clip": 1.0, "graph": False, "dtype": dtype, "branch_models": others, **options}
    return Sampler(model, TABLES[table], guidance=guidance, **given)


def draw(of: Sampler, shape: tuple[int, ...] = SHAPE) -> Tensor:
    branches = {name: {"y": torch.tensor(VALUES[name])} for name in of.guidance.branches}
    return of.sample(shape, branches=branches, seed=0)


SMOOTH = torch.rand(1, 1, *SHAPE[2:], generator=torch.Generator().manual_seed(0)) * 4
RAMP = np.linspace(1, 3, C).reshape(1, C, 1, 1)  # SVD's, with frames in the second dimension
SCALES: dict[str, Any] = {
    "ramp": RAMP,
    "place": SMOOTH,
    "mask": (SMOOTH > 2).float() * 3 + 1,
    "all": SMOOTH * torch.from_numpy(RAMP) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1),
    "by row": RAMP * np.linspace(2, 1, 4).reshape(4, 1, 1, 1, 1),
    "place by row": SMOOTH[None] * torch.linspace(2, 0, 4).view(4, 1, 1, 1, 1),
}
FACTORS = {
    "scale": tuple(SCALES),
    "table": ("ddpm learned", "ddpm", "ddim", "dpmpp_2m"),
    "formulation": ("standard", "original", "sum"),
    "interval": ((0.0, 1.0), (0.3, 0.8)),
    "order": (("cond", "uncond"), ("uncond", "cond")),
    "dtype": (torch.float32, torch.float16),
    "way": ("captured", "rows of graphs", "kernel", "captured kernel"),
    "function": (None, "denoised_fn"),
}
WAYS: dict[str, dict[str, Any]] = {
    "captured": {"graph": True},
    "rows of graphs": {"graph": True, "rows_per_graph": 2},
    "kernel": {"backend": "triton"},
    "captured kernel": {"backend": "triton", "graph": True},
}


def by_element(case: dict[str, Any], **options: Any) -> Tensor:
    """The same run by a model that blends by itself, in the steps' order of roundings."""
    scale = torch.as_tensor(np.asarray(SCALES[case["scale"]]), dtype=torch.float32)
    scale = (scale if scale.ndim == 5 else scale[None]).expand(4, *SHAPE)
    table, model = TABLES[case["table"]], Model(TABLES[case["table"]].learned_variance)
    guided = CFG(interval=case["interval"]).inside(table)
    times = torch.from_numpy(table["t"])

    def blended(x: Tensor, t: Tensor) -> Tensor:
        row = int((times - t[0]).abs().argmin())
        outputs = [model(x, t, torch.tensor(VALUES[name])).float() for name in ("cond", "uncond")]
        cond, uncond = (output[:, :C] for output in outputs)
        s = scale[row]
        m = cond
        if guided[row]:
            difference = cond - uncond
            if case["formulation"] == "standard":
                m = torch.where(s == 1, cond, torch.addcmul(uncond, s, difference))
            elif case["formulation"] == "sum":
                m = s * cond + (1 - s) * uncond
            else:
                m = torch.where(s == 0, cond, torch.addcmul(cond, s, difference))
        return torch.cat([m, outputs[0][:, C:]], dim=1)

    run = Sampler(blended, table, clip=1.0, graph=False, dtype=case["dtype"], **options)
    return run.sample(SHAPE, cond={}, seed=0)


def forbidden(case: dict[str, Any]) -> bool:
    """Learned variance takes an exponential, which the interpreter has from numpy: tests/kernels allows for that."""
    return case.get("table") == "ddpm learned" and "kernel" in case.get("way", "")


@pytest.mark.parametrize("case", pairwise(FACTORS, forbidden), ids=lambda case: " ".join(map(str, case.values())))
def test_a_map_is_the_blend_done_by_hand(case: dict[str, Any]) -> None:
    function = {} if case["function"] is None else {"denoised_fn": lambda x0: 0.5 * x0}
    guidance = CFG(SCALES[case["scale"]], case["interval"], case["formulation"], case["order"])
    eager = draw(sampler(guidance, case["table"], case["dtype"], **function))
    run = sampler(guidance, case["table"], case["dtype"], **function, **WAYS[case["way"]])
    assert torch.equal(draw(run), eager)
    if case["dtype"] == torch.float32:
        assert torch.allclose(eager, by_element(case, **function), rtol=0, atol=2e-5)
    by = case["scale"] in ("ramp", "by row")
    assert max(program["passes"] for program in run.report()["programs"]) == (1 if by else 2)


@pytest.mark.parametrize("way", [{}, {"graph": True}, {"backend": "triton"}])
@pytest.mark.parametrize("scale", [3.0, 1.0, [1.5, 3.0]])
def test_a_map_that_is_one_number_per_sample_is_that_number(scale: Any, way: dict[str, Any]) -> None:
    values = np.broadcast_to(np.reshape(scale, (-1, 1, 1, 1)), (np.size(scale), C, 3, 4))
    runs = [sampler(CFG(given), **way) for given in (scale, values)]
    assert torch.equal(*map(draw, runs))
    assert runs[0].report() == runs[1].report()


@pytest.mark.parametrize("formulation", ["standard", "original", "sum"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_where_a_map_is_constant_its_samples_are_the_scalars(backend: str, formulation: str) -> None:
    """A map that is constant but in one place of the last sample: the kernel reads it, with the scalar's bits."""
    scale = torch.full(SHAPE, 2.5)
    scale[-1, 0, 0, 0] = 3.0
    plain, mapped = (sampler(CFG(given, formulation=formulation), backend=backend, clip=None) for given in (2.5, scale))
    want, got = draw(plain), draw(mapped)
    assert torch.equal(got[:-1], want[:-1])
    assert not torch.equal(got[-1], want[-1])
    assert mapped.report()["programs"][0]["passes"] == plain.report()["programs"][0]["passes"] + 1


class DiT:
    """A model with DiT's own function of a doubled batch."""

    def __init__(self, variance: bool) -> None:
        self.forward = Model(variance)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Written again from its description: three channels are guided, the others are each half's own."""
        half = x[: len(x) // 2]
        output = self.forward(torch.cat([half, half]), t, y)
        cond, uncond = output[:, :3].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), output[:, 3:]], dim=1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("table", ["ddpm learned", "ddim"])
def test_three_channels_are_dits(table: str, backend: str) -> None:
    dit = DiT(TABLES[table].learned_variance)
    conditions = torch.tensor([*VALUES["cond"], *VALUES["uncond"]])
    model = lambda x, t: dit.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), conditions, 4.0)[:B]  # noqa: E731
    want = Sampler(model, TABLES[table], clip=1.0, graph=False, backend=backend).sample(SHAPE, cond={}, seed=0)
    run = sampler(CFG(4.0, channels=3), table, backend=backend)
    got = draw(run)
    # DiT rounds a product and a sum, the step once.
    assert torch.allclose(got, want, rtol=0, atol=5e-6)
    assert run.report()["programs"][0]["passes"] == 1
    # The others are not guided, to the last bit; and a map can say the same.
    rest = draw(sampler(CFG(1.0), table, backend=backend))
    only = sampler(CFG(4.0, channels=3), table, backend=backend)
    first = Model(TABLES[table].learned_variance)
    only.model = lambda x, t, y: torch.cat([torch.zeros_like(x[:, :3]), first(x, t, y)[:, 3:]], dim=1)
    if table == "ddim":
        assert torch.equal(draw(only)[:, 3], rest[:, 3])
    ramp = np.where(np.arange(C) < 3, 4.0, 1.0).reshape(1, C, 1, 1)
    assert torch.equal(draw(sampler(CFG(ramp), table, backend=backend)), got)


def test_all_channels_are_plain_guidance() -> None:
    plain, run = sampler(CFG(3.0)), sampler(CFG(3.0, channels=C))
    assert torch.equal(draw(run), draw(plain))
    assert run.report() == plain.report()


def test_regional_prompts_are_each_their_own_in_their_place() -> None:
    """A model that treats every element alone: in each region the run is that of its prompt."""
    left = torch.zeros(1, 1, *SHAPE[2:])
    left[..., :2] = 1
    guidance = Compose({"cond": 3.0 * left, "image": 2.0 * (1 - left)})
    got = draw(sampler(guidance))
    for name, scale, columns in (("cond", 3.0, slice(0, 2)), ("image", 2.0, slice(2, 4))):
        alone = sampler(CFG(scale))
        y = {key: {"y": torch.tensor(VALUES[which])} for key, which in (("cond", name), ("uncond", "uncond"))}
        want = alone.sample(SHAPE, branches=y, seed=0)
        assert torch.equal(got[..., columns], want[..., columns])


@pytest.mark.parametrize(
    "guidance",
    [
        InstructPix2Pix(SMOOTH, [1.5, 2.0]),
        InstructPix2Pix(RAMP, lambda progress: 1 + progress),
        AutoGuidance(SMOOTH, channels=2),
        PerturbedCFG(RAMP, perturbed_scale=SMOOTH, perturbed_interval=(0.0, 0.8)),
    ],
    ids=lambda guidance: type(guidance).__name__,
)
def test_every_place_is_planned_as_a_sample(guidance: Guidance) -> None:
    """Against the same spec for one element at a time."""
    table, names = TABLES["ddim"], ("text_scale", "image_scale", "scale", "perturbed_scale")
    plan = plan_for(guidance, table, SHAPE)
    index = np.broadcast_to(plan.places.index, SHAPE)  # type: ignore[union-attr]
    fields = {name: getattr(guidance, name) for name in names if hasattr(guidance, name)}
    evaluated: list[set[int]] = [set() for _ in range(4)]
    for place in np.ndindex(SHAPE):
        given = {}
        for name, scale in fields.items():
            by_sample = isinstance(scale, list)
            is_map = not callable(scale) and np.ndim(scale) == 4
            given[name] = (
                float(np.broadcast_to(scale, SHAPE)[place]) if is_map else scale[place[0]] if by_sample else scale
            )
        if getattr(guidance, "channels", None) is not None:
            given["channels"] = None
            if place[1] >= 2:
                given["scale"] = 1.0
        want = type(guidance)(**{**vars(guidance), **given}).plan(table, 1)
        got = plan.places.values[:, index[place]]  # type: ignore[union-attr]
        assert got.tolist() == want.weights[:, 0].tolist(), place
        for row, active in enumerate(want.active):
            evaluated[row] |= set(active)
    assert [set(active) for active in plan.active] == [found | {guidance.base} for found in evaluated]


def test_a_map_costs_no_capture_when_its_numbers_change() -> None:
    run = sampler(CFG(SMOOTH), graph=True)
    first = draw(run)
    for scale, captures in ((SMOOTH + 1, 1), (SCALES["all"], 1), (RAMP, 2), (SCALES["place by row"], 3), (3.0, 4)):
        run.guidance = CFG(scale)
        assert torch.equal(draw(run), draw(sampler(CFG(scale))))
        assert run.report()["captures"] == captures
    run.guidance = CFG(SMOOTH)
    assert torch.equal(draw(run), first)
    assert run.report()["captures"] == 4


def test_cfg_pp_takes_a_map() -> None:
    got = draw(sampler(CFG(SMOOTH / 4), "cfg++"))
    assert torch.equal(draw(sampler(CFG(SMOOTH / 4), "cfg++", backend="triton")), got)
    assert not torch.allclose(got, draw(sampler(CFG(0.5), "cfg++")))


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 3, 2, 3, 4)])
def test_maps_of_samples_of_any_rank(shape: tuple[int, ...]) -> None:
    ramp = np.linspace(1, 3, shape[2]).reshape(1, 1, shape[2], *[1] * (len(shape) - 3))
    frames = [draw(sampler(CFG(float(scale))), shape) for scale in ramp.ravel()]
    got = draw(sampler(CFG(ramp)), shape)
    for i, frame in enumerate(frames):
        # The first frame's scale is 1: the conditional branch alone.
        assert torch.equal(got[:, :, i], frame[:, :, i])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_maps_of_vectors_have_a_dimension_for_rows(backend: str) -> None:
    """A scale [R, B] is one number for each row and sample."""
    scales = (1.0, 2.0, 3.0)
    alone = [draw(sampler(CFG(scale), backend=backend), (2, 3)) for scale in scales]
    got = draw(sampler(CFG(np.reshape(scales, (1, 1, 3))), backend=backend), (2, 3))
    for i, want in enumerate(alone):
        assert torch.equal(got[:, i], want[:, i])


@pytest.mark.parametrize(
    ("guidance", "options", "message"),
    [
        (
            CFG(np.ones((1, 5, 1, 1))),
            {},
            r"scale: got shape \(1, 5, 1, 1\), expected one that broadcasts to the samples'",
        ),
        (CFG(np.ones((4, 1, 4))), {}, r"scale: got shape \(4, 1, 4\), expected one that broadcasts"),
        (CFG(np.ones((3, 1, 1, 1, 1))), {}, r"scale: got shape \(3, 1, 1, 1, 1\), expected .* or to \(4, 2, 4, 3, 4\)"),
        (Compose({"cond": 1.0, "image": np.ones((9, 1, 1, 1))}), {}, r"scales\['image'\]: got shape \(9, 1, 1, 1\)"),
        (CFG(3.0, channels=5), {}, "channels: got 5, expected at most the state's 4"),
        (
            CFG(RAMP, rescale=0.5),
            {},
            "guidance: got scales by place with CFG and rescale, expected one scale per sample",
        ),
        (APG(3.0, channels=3), {}, "guidance: got channels=3 with APG, expected one scale per sample"),
        (AdaptiveCFG(RAMP), {}, "guidance: got scales by place with AdaptiveCFG, .*: it ends sample by sample"),
        (CFG(RAMP), {"clip": DynamicThreshold(0.9)}, "clip: got a DynamicThreshold with scales by place"),
        (CFG(lambda progress: RAMP), {}, r"scale: got shape \(1, 4, 1, 1\), expected at most two dimensions"),
    ],
)
def test_what_does_not_combine_is_refused(guidance: Guidance, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(sampler(guidance, **options))


@pytest.mark.parametrize(
    ("guidance", "message"), [(CFG(RAMP), "scale: got shape"), (CFG(3.0, channels=3), "channels: got 3, expected None")]
)
def test_loops_of_ones_own_take_one_scale_per_sample(guidance: Guidance, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blender(guidance, 4, torch.zeros(SHAPE))
