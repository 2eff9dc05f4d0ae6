"""diffusers and k-diffusion as the benchmarks run them, against fastcfg in float64, and the networks they share."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.suite import architectures, diffusers_rival, foreign, k_diffusion_rival
from benchmarks.suite.architectures import ARCHITECTURES
from benchmarks.suite.cases import LoopCase, StepCase
from fastcfg import CFG, Sampler, Schedule
from fastcfg.ops import GuidedStep
from fastcfg.parity.loops import Analytic
from fastcfg.pipelines.text_to_image import TextToImage
from fastcfg.step import StepBuffers, StepSpec

pytestmark = pytest.mark.quick

SHAPE = (2, 3, 8, 8)
# By timestep. Measured over twenty seeds: 1.4e-6 at 10 and 1.1e-5 at 0, where 1 - alpha_bar of the
# libraries' float32 alpha_bar is off by some 1e-4.
STEP_TOLERANCES = {10: 5e-6, 0: 4e-5}
# Of the largest value, if that is more than 1. Measured over twenty seeds: 9.6e-6 with learned variances, else 4.0e-6.
LOOP_TOLERANCE = 4e-5

needs_diffusers = pytest.mark.skipif(foreign.load_diffusers() is None, reason="needs diffusers")
needs_k_diffusion = pytest.mark.skipif(foreign.load_k_diffusion() is None, reason="needs k-diffusion")
EVERYBODY = [
    *(pytest.param(diffusers_rival, name, marks=needs_diffusers) for name in ("ddpm", "ddpm-fixed", "ddim")),
    *(pytest.param(k_diffusion_rival, name, marks=needs_k_diffusion) for name in ("ddpm-fixed", "ddim")),
]


class Model(Analytic):
    """With variance channels or without; remembers what it was called with."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.learned, self.calls = learned, []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((x.dtype, t))
        output = super().forward(x, t, y)
        return output if self.learned else output[:, : x.shape[1]]


def loop_case(solver: str, respacing: str = "ddim10", **changes: Any) -> LoopCase:
    generator = torch.Generator().manual_seed(0)
    schedule = Schedule.named("linear").respace(respacing)
    start, *noise = torch.randn((schedule.num_timesteps + 1, *SHAPE), generator=generator)
    dtype = changes.get("dtype", torch.float32)
    cond, uncond = {"y": torch.tensor([0.5, -0.3], dtype=dtype)}, {"y": torch.zeros(2, dtype=dtype)}
    model = Model(solver != "ddpm-fixed")
    return LoopCase(solver, schedule, model, start, torch.stack(noise), cond, uncond, **changes)


def float64_step(case: StepCase) -> Tensor:
    table, batch, like = case.table, len(case.x), {"dtype": torch.float64}
    noise = "tensor" if table.uses_noise else "none"
    spec = StepSpec(branches=2, base=1, clip=True, noise_source=noise, learned_variance=table.learned_variance)
    buffers = StepBuffers(
        x=case.x.to(**like),
        table=table.on("cpu", torch.float64),
        counter=torch.tensor([case.row, 0], dtype=torch.int32),
        weights=torch.tensor([case.scale, 0.0], **like).expand(len(table), batch, 2).contiguous(),
        bound=torch.ones(batch, **like),
        noise=case.noise[:batch].to(**like),
        model_input=torch.empty((2 * batch, *case.x.shape[1:]), **like),
        time=torch.empty(2 * batch, dtype=torch.int64),
    )
    GuidedStep(spec, buffers, "reference")(case.output.to(**like))
    return buffers.x


@pytest.mark.parametrize(("rival", "solver"), EVERYBODY)
@pytest.mark.parametrize("timestep", STEP_TOLERANCES)
def test_a_step_is_the_float64_step(rival: ModuleType, solver: str, timestep: int) -> None:
    random = StepCase.random(solver, SHAPE)
    case = StepCase(solver, random.schedule, random.x, random.output, random.noise, random.seeds, timestep=timestep)
    provider = rival.step(case)
    for _ in range(2):
        provider.prepare()
        provider.run(False)
        error = (provider.result() - float64_step(case)).abs().max()
        assert error <= STEP_TOLERANCES[timestep]


@pytest.mark.parametrize(("rival", "solver"), EVERYBODY)
@pytest.mark.parametrize("clip", [0.7, None])
def test_a_loop_ends_where_the_float64_loop_does(rival: ModuleType, solver: str, clip: float | None) -> None:
    case = loop_case(solver, clip=clip)
    wide: dict[str, Any] = {"dtype": torch.float64, "state_dtype": torch.float64, "backend": "reference"}
    sampler = Sampler(case.model, case.table, guidance=CFG(case.scale), clip=clip, graph=False, **wide)
    want = sampler.sample(SHAPE, cond=case.cond, uncond=case.uncond, x_T=case.start, noise=case.noise)
    provider = rival.loop(case)
    provider.prepare()
    provider.run(False)
    assert (provider.result() - want).abs().max() <= LOOP_TOLERANCE * want.abs().max().clamp(min=1)


@pytest.mark.parametrize(("rival", "solver"), EVERYBODY)
def test_the_model_gets_its_dtype_and_timesteps_of_the_whole_process(rival: ModuleType, solver: str) -> None:
    case = loop_case(solver, dtype=torch.bfloat16)
    provider = rival.loop(case)
    provider.prepare()
    provider.run(False)
    assert [dtype for dtype, _ in case.model.calls] == [torch.bfloat16] * 10
    times = torch.stack([t for _, t in case.model.calls])
    assert times.dtype == torch.int64
    assert torch.equal(times, torch.arange(900, -1, -100)[:, None].expand(10, 4))
    # diffusers' latents are of the model's dtype.
    assert provider.result().dtype == (torch.bfloat16 if rival is diffusers_rival else torch.float32)


@pytest.mark.parametrize(("rival", "solver"), EVERYBODY)
def test_drawing_moves_the_generator_and_giving_does_not(rival: ModuleType, solver: str) -> None:
    # sample_euler draws whatever it is given, and DDIM of diffusers never does.
    moves = {"ddim": rival is k_diffusion_rival}.get(solver)
    for provider in (rival.step(StepCase.random(solver, SHAPE)), rival.loop(loop_case(solver))):
        provider.prepare()
        for draw in (False, True):
            state = torch.get_rng_state()
            provider.run(draw)
            assert torch.equal(torch.get_rng_state(), state) == (not (draw if moves is None else moves))


@needs_diffusers
def test_diffusers_refuses_timesteps_that_are_not_its_own() -> None:
    with pytest.raises(ValueError, match="schedule: got timesteps"):
        diffusers_rival.loop(loop_case("ddim", "10"))


@needs_k_diffusion
def test_k_diffusion_refuses_learned_variances() -> None:
    assert [bool(k_diffusion_rival.problem(name)) for name in ("ddpm", "ddpm-fixed", "ddim")] == [True, False, False]
    with pytest.raises(NotImplementedError, match="no learned variances"):
        k_diffusion_rival.step(StepCase.random("ddpm", SHAPE))


def test_the_full_process_is_found_by_its_alphas() -> None:
    for name in ("linear", "squaredcos_cap_v2", "scaled_linear"):
        full = Schedule.named(name)
        assert (foreign.full_process(full.respace("2")).betas == full.betas).all()
    with pytest.raises(ValueError, match="schedule: got one of no named process"):
        foreign.full_process(Schedule(np.full(1000, 0.01)))


@needs_k_diffusion
def test_no_stand_in_of_torchvision_stays() -> None:
    left = [module for name, module in sys.modules.items() if name.partition(".")[0] == "torchvision"]
    assert all(module.__spec__ for module in left)


def test_libraries_that_are_not_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("diffusers", "k_diffusion"):
        monkeypatch.setitem(sys.modules, name, None)
    assert foreign.load_diffusers.__wrapped__() is None
    assert foreign.load_k_diffusion.__wrapped__() is None


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> architectures.Architecture:
    found = ARCHITECTURES[request.param]
    if found.problem():
        pytest.skip(found.problem())
    return found


def test_tiny_networks_give_outputs_that_depend_on_the_branch(architecture: architectures.Architecture) -> None:
    model, cond, uncond = architecture.build("cpu", torch.float32, 2, tiny=True)
    x = torch.randn((2, *architecture.tiny_shape), generator=torch.Generator().manual_seed(0))
    both = {name: torch.cat([value, uncond[name]]) for name, value in cond.items()}
    output = model(torch.cat([x, x]), torch.full((4,), 500), **both)
    channels, *size = architecture.tiny_shape
    assert output.shape == (4, channels * (1 + architecture.learned_variance), *size)
    assert output.isfinite().all()
    assert output.std() > 0.1
    assert (output[:2] - output[2:]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    models = []
    for _ in range(2):
        torch.rand(1)
        state = torch.get_rng_state()
        models.append(ARCHITECTURES["adm-64"].build("cpu", torch.float32, 1, tiny=True)[0])
        assert torch.equal(torch.get_rng_state(), state)
    one, other = (model.parameters() for model in models)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# As published: 385M and 398M (GLIDE), 296M and 554M (guided-diffusion), 860M and 2.57B (Stable Diffusion).
SIZES = {"glide-base": 385030726, "glide-upsampler": 398361286, "adm-64": 295904454, "adm-256": 553838086}
SIZES |= {"sd15": 859520964, "sdxl": 2567463684}


def test_networks_have_their_published_sizes(
    architecture: architectures.Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_weights(make: Any, device: str, dtype: torch.dtype) -> torch.nn.Module:
        with torch.device(device):
            return make()

    monkeypatch.setattr(architectures, "_random", without_weights)
    if architecture.name == "embedded":
        size = TextToImage.load().meta.image_size
        assert architecture.shape == (3, size, size)
    else:
        model, *_ = architecture.build("meta", torch.float32, 1)
        assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[architecture.name]
