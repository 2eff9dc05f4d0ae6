"""The pictures of docs/solvers.md and docs/guidance.md: `python -m benchmarks pictures`.

Every solver draws the same prompt from the same two seeds with the embedded model in 5, 10 and 20 steps, one grid a
family; every method of guidance does at three scales, in 20 steps; and the noise levels of every schedule are plotted.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command import parser_of
from fastcfg import CFG, Guidance, Sampler, Schedule, StepTable, sigmas, solvers
from fastcfg import guidance as methods
from fastcfg.pipelines.pictures import to_bytes
from fastcfg.pipelines.text_to_image import TextToImage
from fastcfg.schedule import consistency_timesteps
from fastcfg.utils.files import replacing

PROMPT = "a red circle above a blue square"
NEGATIVE = "a green triangle"
STEPS, SEEDS, SCALES = (5, 10, 20), [0, 1], (1.5, 4.0, 12.0)
COLOURS = 64  # of a grid's palette, which keeps its file small

Build = Callable[[int], StepTable]
_TILE, _GAP, _LABEL, _HEAD = 64, 4, 190, 22


def families(process: Schedule) -> dict[str, dict[str, tuple[Build, float]]]:
    """By family and label: the table of so many steps, and the guidance scale."""
    denoiser = solvers.Denoiser("epsilon", schedule=process)

    def on_timesteps(build: Callable[..., StepTable], scale: float = 3.0, **options: Any) -> tuple[Build, float]:
        return lambda n: build(process.respace(n), **options), scale

    def on_levels(build: Callable[..., StepTable], scale: float = 3.0, **options: Any) -> tuple[Build, float]:
        return lambda n: build(sigmas.karras(n, 0.02, 80.0), denoiser=denoiser, **options), scale

    return {
        "timesteps": {
            "ddpm": on_timesteps(solvers.ddpm),
            "ddim": on_timesteps(solvers.ddim),
            "ddim, eta 1": on_timesteps(solvers.ddim, eta=1.0),
            # It does not clip x0, and the end of the cosine schedule multiplies the errors of ε by 1,600.
            "plms, from t = 950": (lambda n: solvers.plms(process.respace(np.linspace(0, 950, n).astype(int))), 3.0),
            "prk (4 calls a step)": on_timesteps(solvers.prk),
        },
        "one_step": {
            "euler": on_levels(solvers.euler),
            "euler, s_churn 5": on_levels(solvers.euler, s_churn=5.0),
            "euler_ancestral": on_levels(solvers.euler_ancestral),
            "heun (2 calls)": on_levels(solvers.heun),
            "heun, s_churn 5": on_levels(solvers.heun, s_churn=5.0),
            "dpm2 (2 calls)": on_levels(solvers.dpm2),
            "dpmpp_2s_ancestral (2)": on_levels(solvers.dpmpp_2s_ancestral),
        },
        "multistep": {
            "lms": on_levels(solvers.lms),
            "deis": on_levels(solvers.deis),
            "dpmpp_2m": on_levels(solvers.dpmpp_2m),
            "dpmpp_2m_sde": on_levels(solvers.dpmpp_2m_sde),
            "dpmpp_3m_sde": on_levels(solvers.dpmpp_3m_sde),
            "unipc": on_levels(solvers.unipc),
            "unipc, order 3": on_levels(solvers.unipc, order=3),
            "sa_solver": on_levels(solvers.sa_solver),
        },
        "cfg_pp": {
            "ddim, CFG(3)": on_timesteps(solvers.ddim),
            "ddim, CFG(12)": on_timesteps(solvers.ddim, 12.0),
            "ddim_cfg_pp, CFG(0.6)": on_timesteps(solvers.ddim_cfg_pp, 0.6),
            "ddim_cfg_pp, CFG(1)": on_timesteps(solvers.ddim_cfg_pp, 1.0),
            "euler_ancestral_cfg_pp, 1": on_levels(solvers.euler_ancestral_cfg_pp, 1.0),
        },
        "consistency": {
            "lcm": (lambda n: solvers.lcm(process.respace(consistency_timesteps(n))), 3.0),
            "tcd, gamma 0": (lambda n: solvers.tcd(process, consistency_timesteps(n), gamma=0.0), 3.0),
            "tcd, gamma 0.3": (lambda n: solvers.tcd(process, consistency_timesteps(n)), 3.0),
        },
        "langevin": {
            "corrected ddpm (2 calls)": on_timesteps(
                lambda kept: solvers.predictor_corrector(solvers.ddpm(kept), kept)
            ),
            "langevin (20 calls a level)": on_timesteps(solvers.langevin, steps_per_level=20),
        },
    }


def guided() -> dict[str, Callable[[float], Guidance]]:
    """Methods of guidance by label: the spec of a scale."""
    return {
        "CFG": CFG,
        "CFG, interval (0.2, 0.8)": lambda s: CFG(s, interval=(0.2, 0.8)),
        "CFG, rescale 0.7": lambda s: CFG(s, rescale=0.7),
        "AdaptiveCFG": methods.AdaptiveCFG,
        "CFGZeroStar": methods.CFGZeroStar,
        "TangentialCFG": methods.TangentialCFG,
        "MagnitudeAwareCFG": methods.MagnitudeAwareCFG,
        "APG, eta 0, momentum -0.5": lambda s: methods.APG(s, eta=0.0, momentum=-0.5),
        "APGMix": lambda s: methods.APGMix(s, apg_scale=s),
        "PerpNeg, a green triangle": lambda s: methods.PerpNeg(s),
        "AutoGuidance": methods.AutoGuidance,
        "PerturbedCFG": methods.PerturbedCFG,
    }


def draw(pipeline: TextToImage, table: StepTable, guidance: Guidance) -> np.ndarray:
    """uint8 [len(SEEDS), H, W, 3]."""
    size, texts = pipeline.meta.image_size, {"cond": PROMPT, "negative": NEGATIVE, "uncond": ""}
    texts |= {"weak": PROMPT, "perturbed": PROMPT}
    encoded = {}
    for name in guidance.branches:
        text = pipeline._encode(pipeline._tokens("prompt", texts[name]) if texts[name] else [])
        encoded[name] = {key: value.expand(len(SEEDS), *value.shape[1:]) for key, value in text.items()}
    other = {name: weaker(pipeline.model) for name in ("weak", "perturbed") if name in guidance.branches}
    sampler = Sampler(
        pipeline.model, table, guidance=guidance, clip=1.0, branch_models=other, memory_format=torch.channels_last
    )
    x = sampler.sample((len(SEEDS), 3, size, size), branches=encoded, seed=SEEDS)
    return to_bytes(x)


def weaker(model: torch.nn.Module) -> torch.nn.Module:
    """The model with 5 % of noise on every weight."""
    noisy, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * parameter.float().std(correction=0) * noise.to(parameter))
    return noisy


def draw_grid(rows: Mapping[str, Callable[[float], np.ndarray]], columns: Mapping[str, float], path: Path) -> None:
    """Write a grid: by row's label what draws the pictures of a column's value."""
    from PIL import Image, ImageDraw, ImageFont

    font, side = ImageFont.load_default(13), _TILE + _GAP
    page = Image.new("RGB", (_LABEL + len(columns) * (len(SEEDS) * side + _GAP), _HEAD + len(rows) * side), "white")
    canvas = ImageDraw.Draw(page)
    for i, (title, value) in enumerate(columns.items()):
        left = _LABEL + i * (len(SEEDS) * side + _GAP)
        canvas.text((left, _HEAD / 2), title, "black", font, anchor="lm")
        for j, (label, pictures) in enumerate(rows.items()):
            top = _HEAD + j * side
            canvas.text((_GAP, top + _TILE / 2), label, "black", font, anchor="lm")
            for k, picture in enumerate(pictures(value)):
                tile = Image.fromarray(picture).resize((_TILE, _TILE), Image.Resampling.NEAREST)
                page.paste(tile, (left + k * side, top))
    save(page, path)


def save(page: Any, path: Path) -> None:
    """Write a picture in few colours, whole or not at all."""
    with replacing(path) as temporary:
        page.convert("RGB").quantize(COLOURS, dither=0).save(temporary, "PNG", optimize=True)


def plot_sigmas(path: Path, n: int = 10) -> None:
    """Write the levels of every schedule."""
    from matplotlib.figure import Figure
    from PIL import Image

    process = Schedule.named("scaled_linear")
    ends = sigmas.discrete_sigmas(process)[[0, -1]].tolist()
    of_levels = {build.__name__: build(n, *ends) for build in (sigmas.karras, sigmas.exponential, sigmas.beta)}
    of_levels["polyexponential, rho 2"] = sigmas.polyexponential(n, *ends, rho=2.0)
    of_levels["align_your_steps, sd15"] = sigmas.align_your_steps(n)
    of_timesteps = {spacing: sigmas.from_schedule(process, n, spacing)[0] for spacing in sigmas.SPACINGS}
    shifts = (1.0, math.exp(sigmas.flow_mu(4096)), 12.0)
    of_flows = {f"shift {shift:.3g}": sigmas.flow(n, shift) for shift in shifts}
    panels = {"levels": of_levels, "from_schedule": of_timesteps, "flow": of_flows}
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for label, levels in curves.items():
            shown = levels if title == "flow" else levels[:-1]
            axes.plot(np.arange(len(shown)), shown, marker="o", markersize=3, linewidth=1, label=label)
        axes.set(title=title, xlabel=f"step of {n}", ylabel="sigma", yscale="linear" if title == "flow" else "log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80, format="png")
    save(Image.open(drawn), path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = parser_of("pictures", __doc__)
    parser.add_argument("--out", metavar="DIR", default="docs", help="where to (default: %(default)s)")
    out = Path(parser.parse_args(argv).out)
    (out / "solvers").mkdir(parents=True, exist_ok=True)
    plot_sigmas(out / "solvers/sigmas.png")
    pipeline = TextToImage.load()
    in_steps = {f"{steps} steps": float(steps) for steps in STEPS}
    for name, solvers_of in families(pipeline.schedule).items():
        rows = {
            label: lambda steps, build=build, scale=scale: draw(pipeline, build(int(steps)), CFG(scale))
            for label, (build, scale) in solvers_of.items()
        }
        draw_grid(rows, in_steps, out / f"solvers/{name}.png")
        print(out / f"solvers/{name}.png", flush=True)
    table = solvers.ddpm(pipeline.schedule.respace(20))
    methods_of = guided().items()
    rows = {label: lambda scale, method=method: draw(pipeline, table, method(scale)) for label, method in methods_of}
    draw_grid(rows, {f"scale {scale:g}": scale for scale in SCALES}, out / "guidance_methods.png")
    print(out / "guidance_methods.png", flush=True)
    return 0
