"""`fastcfg parity --model` with a diffusers pipeline: its own first steps against the fused step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loop_pipeline import Pipeline

from benchmarks.suite.foreign import load_diffusers
from fastcfg.cli import main
from fastcfg.ops import step as ops_step
from fastcfg.parity import PipelineProblem, check_pipeline
from fastcfg.reference import ReferenceStep

diffusers: Any = load_diffusers()
pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(diffusers is None, reason="diffusers is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def tiny(pipeline: str, scheduler: Any) -> Any:
    """An unconditional pipeline of diffusers with a small random network."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    made = getattr(diffusers, pipeline)(unet=unet, scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def check(pipeline: Any, rows: int = 5, backends: tuple[str, ...] = ("reference",), **call: Any) -> Any:
    return check_pipeline(PipelineProblem(pipeline, call), backends, rows, lambda items, desc: items)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {}),
        ("DDPMScheduler", {"thresholding": True, "clip_sample": False}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
    ],
)
def test_schedulers_are_within_bounds(name: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    scheduler = getattr(diffusers, name)(**config)
    step = scheduler.step
    (finding,) = check(Pipeline(scheduler, dtype))
    assert finding.problem == ""
    assert len(finding.trajectory) == 5
    assert scheduler.step == step  # as it was


def test_stock_pipelines_are_checked() -> None:
    ddim = {"eta": 0.7, "use_clipped_model_output": True}
    for name, scheduler, options in (
        ("DDIMPipeline", diffusers.DDIMScheduler(), {}),
        ("DDIMPipeline", diffusers.DDIMScheduler(), ddim),
        ("DDPMPipeline", diffusers.DDPMScheduler(), {}),
    ):
        call = {"batch_size": 2, "num_inference_steps": 10, "output_type": "np", **options}
        (finding,) = check(tiny(name, scheduler), rows=3, **call)
        assert finding.problem == ""
        assert finding.options == f"{name}, {type(scheduler).__name__}"
        assert finding.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    "change",
    [lambda b: b.x.mul_(1.001), lambda b: b.history is not None and b.history.mul_(1.01)],
    ids=["x", "history"],
)
def test_a_wrong_step_is_found(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(ReferenceStep):
        def __call__(self, output: torch.Tensor) -> None:
            super().__call__(output)
            if self.buffers.x.dtype == torch.float32:
                change(self.buffers)

    monkeypatch.setattr(ops_step, "ReferenceStep", Wrong)
    (finding,) = check(Pipeline(diffusers.DPMSolverMultistepScheduler()))
    assert "ulp from the reference, more than 50" in finding.problem


def test_a_table_of_another_scheduler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcfg.parity import pipelines

    compiled = pipelines.compile_scheduler
    other = diffusers.DPMSolverMultistepScheduler(solver_order=1)
    monkeypatch.setattr(pipelines, "compile_scheduler", lambda *_, **__: compiled(other, 20))
    (finding,) = check(Pipeline(diffusers.DPMSolverMultistepScheduler()))
    assert "ulp from the reference, more than 50" in finding.problem


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pipeline(diffusers.DDIMScheduler(), skipped=3), "begins at timestep"),
        (lambda: Pipeline(diffusers.PNDMScheduler()), "needs 4 saved tensors"),
        (lambda: Pipeline(diffusers.DDIMScheduler(), colour=1), "the pipeline failed: KeyError"),
    ],
)
def test_what_cannot_be_checked_is_said(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(make())


def test_the_command_takes_a_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import diffusers\nfrom support.loop_pipeline import Pipeline\n"
        "def build():\n    return {'pipeline': Pipeline(diffusers.EulerDiscreteScheduler()), 'call': {'steps': 10}}\n"
        "def misspelt():\n    return {**build(), 'cal': {}}\n"
    )
    arguments = [
        "parity",
        "--model",
        "mine.py:build",
        "--backend",
        "reference",
        "--device",
        "cpu",
        "--json",
        "out.json",
    ]
    assert main(arguments) == 0
    assert "Pipeline, EulerDiscreteScheduler" in capsys.readouterr().out
    (finding,) = json.loads(Path("out.json").read_text())["findings"]
    assert finding["ok"]
    assert finding["factor"] == 4.0
    assert main([*arguments[:2], "mine.py:misspelt"]) == 2
    assert "'cal' beside a pipeline" in capsys.readouterr().err
