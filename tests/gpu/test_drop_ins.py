"""What only a GPU can show of the drop-ins: loops that never wait for the device, and the kernels' results in them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers, load_k_diffusion
from fastcfg import APG, CFG, InstructPix2Pix, PerpNeg, Schedule, solvers
from fastcfg.frontends import k_diffusion as fused_functions
from fastcfg.frontends.diffusers import fuse
from fastcfg.ops.blender import Blender
from fastcfg.ops.stepper import Stepper

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

DEVICE = torch.device("cuda")
SHAPE = (2, 4, 32, 32)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {}),
    ("DDPMScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"thresholding": True}),
    ("UniPCMultistepScheduler", {}),
    ("LCMScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {}),
]


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


def run(scheduler: Any, x: Tensor) -> Tensor:
    """A pipeline's loop after `set_timesteps`."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator()} if takes else {}
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(torch.tanh(given), t, x, **options, return_dict=False)[0]
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "config"), SCHEDULERS, ids=str)
def test_a_fused_scheduler_never_syncs_and_samples_as_the_original(
    name: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    diffusers = load_diffusers() or pytest.skip("diffusers is not installed")
    original, ours = getattr(diffusers, name)(**config), fuse(getattr(diffusers, name)(**config))
    start = normal(*SHAPE, dtype=dtype) * float(getattr(original, "init_noise_sigma", 1.0))
    results = []
    for scheduler in (original, ours):
        scheduler.set_timesteps(8, device=DEVICE)
        results.append(run(scheduler, start))
    want, first = results
    ours.set_timesteps(8, device=DEVICE)  # the second run has its memory from the first
    with no_sync():
        again = run(ours, start)
    assert torch.equal(again, first)
    size = float(want.float().abs().max())
    # Eight steps' roundings, of which the fused ones are fewer.
    tolerance = 1e-5 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    assert float((first.float() - want.float()).abs().max()) < tolerance * max(1.0, size)


@pytest.mark.parametrize("name", ["sample_euler", "sample_dpmpp_2m", "sample_heun", "sample_dpmpp_2m_sde"])
def test_a_fused_function_samples_as_the_original(name: str) -> None:
    sampling, _ = load_k_diffusion() or pytest.skip("k-diffusion is not installed")
    original = getattr(sampling, name)
    sigmas = sampling.get_sigmas_karras(8, 0.03, 14.6, device=DEVICE)
    x, scale = normal(*SHAPE) * 14.6, normal(*SHAPE, seed=1)
    options: dict[str, Any] = {}
    if "sde" in name:
        options["noise_sampler"] = lambda sigma, following: scale
    model = lambda x, sigma: torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt())  # noqa: E731
    want = original(model, x, sigmas, disable=True, **options)
    got = fused_functions.fuse(original)(model, x, sigmas, disable=True, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stepper_s_kernel_has_the_reference_s_bits(dtype: torch.dtype) -> None:
    """It reads and writes the caller's tensors, in their dtype."""
    process = Schedule.named("linear").respace(6)
    fixed = solvers.ddpm(process, variance="fixed_large")  # learned ones take an exponential, which has no such bits
    for table in (solvers.ddim(process, eta=0.5), solvers.plms(process), fixed):
        fused, plain = (
            Stepper(table, normal(*SHAPE, dtype=dtype), 1.0, backend) for backend in ("triton", "reference")
        )
        x = normal(*SHAPE, dtype=dtype)
        for row in range(len(table)):
            output = normal(*SHAPE, seed=row, dtype=dtype)
            noise = normal(*SHAPE, seed=100 + row, dtype=dtype) if table.uses_noise else None
            got, want = (stepper(row, output, x, noise) for stepper in (fused, plain))
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])  # type: ignore[arg-type]
            x = want[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "guidance",
    [CFG(4.0), CFG([2.0, 4.0]), CFG(4.0, rescale=0.7), APG(4.0, momentum=-0.5), PerpNeg(), InstructPix2Pix()],
)
def test_a_blender_never_syncs_and_blends_as_the_reference(guidance: Any, dtype: torch.dtype) -> None:
    rows = [
        {name: normal(*SHAPE, seed=10 * row + k, dtype=dtype) for k, name in enumerate(guidance.branches)}
        for row in range(4)
    ]
    fused, plain = (Blender(guidance, 4, rows[0]["cond"], backend) for backend in ("triton", "reference"))
    fused(0, rows[0])
    fused.begin()
    for row, outputs in enumerate(rows):
        with no_sync():
            got = fused(row, outputs)
        want = plain(row, outputs)
        assert got.dtype == dtype
        error = float((got.float() - want.float()).abs().max()) / float(want.float().abs().max())
        assert error < max(2e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_guiders_never_sync_in_unchanged_steps(dtype: torch.dtype) -> None:
    from support.guider_cases import CASES, error, guide, guide_exactly, make

    for name, options in CASES:
        if name == "MagnitudeAwareGuidance":  # it raises for images
            continue
        exact, theirs, ours = make(name, options), make(name, options), fuse(make(name, options))
        for step in range(8):
            names = exact._input_predictions
            row = {part: normal(*SHAPE, seed=10 * step + k, dtype=dtype) for k, part in enumerate(names)}
            want, own = guide_exactly(exact, step, row).pred, guide(theirs, step, row).pred
            guide(copy.deepcopy(ours), step, row)  # builds what this kind of step needs
            ours.set_state(step, 8, None)
            wanted = [getattr(state, ours._identifier_key) for state in ours.prepare_inputs({})]
            with no_sync():
                got = ours.forward(**{part: row[part] for part in wanted}).pred
            assert error(got, want) <= max(2 * error(own, want), torch.finfo(dtype).eps, 2e-6), (name, step)
