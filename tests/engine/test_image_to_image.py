"""diffusers' image to image, its loop written here over plain schedulers, beside the sampler on compiled tables."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers
from fastcfg import CFG, Sampler, StepTable
from fastcfg.compiler import compile_scheduler

diffusers = load_diffusers()
pytestmark = pytest.mark.skipif(diffusers is None, reason="of diffusers")

SHAPE, STEPS = (2, 3, 6, 5), 10
IMAGE, NOISE = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 5))
LABELS = {"cond": {"y": torch.tensor([0.6, -0.3])}, "uncond": {"y": torch.zeros(2)}}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "LMSDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "UniPCMultistepScheduler": {"solver_order": 3},
    "DEISMultistepScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
}


def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(0.8 * x + y.view(-1, 1, 1, 1)) - 0.0003 * t.view(-1, 1, 1, 1)


def image_to_image(scheduler: Any, strength: float) -> Tensor:
    """As in diffusers' pipelines."""
    scheduler.set_timesteps(STEPS)
    skipped = max(STEPS - min(int(STEPS * strength), STEPS), 0) * scheduler.order
    timesteps = scheduler.timesteps[skipped:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    if hasattr(scheduler, "scale_noise"):
        x = scheduler.scale_noise(IMAGE, timesteps[:1], NOISE)
    else:
        x = scheduler.add_noise(IMAGE, NOISE, timesteps[:1])
    for t in timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        uncond, cond = (model(given, t.expand(2), LABELS[name]["y"]) for name in ("uncond", "cond"))
        x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_sampler_gives_diffusers_images(name: str) -> None:
    original = getattr(diffusers, name)(**SCHEDULERS[name])
    table = compile_scheduler(original, STEPS)
    sampler = Sampler(model, table, guidance=CFG(3.0), noise_source="torch", graph=False)
    for strength in (0.35, 0.8, 1.0):
        want = image_to_image(copy.deepcopy(original), strength)
        # PNDM has a row more than steps, and diffusers counts the share of the steps.
        where = {"start": STEPS - int(STEPS * strength)} if name == "PNDMScheduler" else {"strength": strength}
        got = sampler.sample(SHAPE, init=IMAGE, **where, seed=5, **LABELS)
        size = want.abs().max()
        assert (got - want).abs().max() < 2e-5 * size, strength


def test_compiled_tables_are_pickled_without_their_scheduler() -> None:
    table = compile_scheduler(diffusers.DPMSolverMultistepScheduler(), STEPS)
    assert table.restarted(3) is not table
    again = pickle.loads(pickle.dumps(table))
    assert isinstance(again, StepTable)
    assert (again.levels == table.levels).all()
    with pytest.raises(ValueError, match="start: got row 3 of the table DPMSolverMultistepScheduler"):
        again.restarted(3)
    assert (copy.deepcopy(table).restarted(3).rows == table.restarted(3).rows).all()
