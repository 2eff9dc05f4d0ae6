"""From a checkpoint and prompts to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..engine.noise import Generators
from ..engine.sampler import Step
from ..guidance import Guidance
from ..guidance.by_name import guidance_by_name
from ..guidance.scales import Interval
from ..utils.checks import check_count, check_finite
from .base import SOLVERS, Drawing, Pipeline
from .pictures import picture_noise

__all__ = ["SOLVERS", "TextToImage"]


class TextToImage(Pipeline):
    """Draws pictures from prompts: the model that comes with the package, GLIDE's base models, or your own.

    Arguments, attributes and errors as `Pipeline`.

    Example:
        >>> pipeline = TextToImage.load()
        >>> images = pipeline.sample("a red circle above a blue square", num_samples=4, seed=0)
        >>> images.shape
        torch.Size([4, 3, 32, 32])

    With GLIDE's weights: `TextToImage.load("base.pt", "cuda").sample("an oil painting of a corgi", steps=100)`.
    """

    _NETWORKS = ("Text2ImUNet", "InpaintText2ImUNet")
    _PURPOSE = "draw from text"
    _EMBEDDED = "shapes.safetensors"

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        steps: int | str = 50,
        solver: str = "ddpm",
        schedule: str | None = None,
        guidance: str | Guidance = "cfg",
        guidance_interval: Interval | None = None,
        eta: float | None = None,
        num_samples: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: Generators | None = None,
        inpaint: tuple[Tensor, Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        backend: str = "auto",
        graph: str | bool = "auto",
        noise_source: str = "philox",
        batch_size: int = 64,
        progress: bool | str = False,
        callback: Callable[[Step], None] | None = None,
        negative: str | None = None,
    ) -> Tensor:
        """Draw pictures.

        Args:
            prompts: a prompt, or several.
            negative_prompt: what to guide away from, instead of from the empty prompt.
            guidance_scale: s of uncond + s (cond - uncond): 0 ignores the prompt, 1 samples the conditional model. None
                is 3, or 0.6 for CFG++ solvers, whose scale runs from 0 to 1.
            solver, steps, schedule, eta: as `solvers.by_name.solver_table` (there `spacing`): "ddpm" (with the learned
                variances), "ddim", "dpmpp_2m", ...; a number of steps or a respacing; "karras", "trailing", ... or None
                for the solver's usual steps.
            guidance: one of `fastcfg.guidance.by_name.METHODS`, such as "cfg", "apg" or "rescaled_cfg"; or a
                `Guidance` with branches among cond, uncond and negative, which has its own scale and interval.
            guidance_interval: (start, stop) in shares of the steps, as `CFG.interval`: outside of it a picture takes
                one forward of the network in place of two. None guides all steps.
            num_samples: pictures per prompt.
            seed: sample i of every prompt has the seed `seed + i`; or one seed per picture. None or -1 draws a random
                one, which `report()["seeds"]` returns.
            generator: torch's, in place of a seed: one, or a list with one for each picture, as `Sampler.sample`.
            inpaint: for inpainting networks: (image, mask), [3, H, W] in [-1, 1] and [1, H, W] with 1 where the image
                is known and 0 elsewhere, or one of either per picture, [N, ...]. Known pixels are returned unchanged.
            cond_fn: as `Sampler`: a gradient that guides too (a classifier's, CLIP's), called with the state of one
                batch, the model's times, and the keyword arguments of the conditional branch.
            backend, graph, noise_source: as `Sampler`. With noise from "philox" a picture depends on its prompt and
                seed alone, except for the last bits: torch's convolutions and matrix products may round differently in
                another batch size.
            batch_size: pictures computed at once.
            progress: show a progress bar; a string is its label.
            callback: called with the `Step` of every row of every batch.
            negative: old name of negative_prompt.

        Returns:
            float32 [N, 3, H, W] in [-1, 1], the samples of the first prompt first. `fastcfg.to_pil` converts them.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a prompt that is empty, longer than the model's context or with words it does not know; an
                unknown name; options that do not go together; numbers out of range; pictures to inpaint that do not
                fit the network; or what `Sampler` raises.
        """
        if negative is not None and negative_prompt is not None:
            raise ValueError(f"negative: got {negative!r} with negative_prompt, expected one of them")
        negative = negative if negative_prompt is None else negative_prompt
        texts, others, spec = self._texts(prompts, negative, guidance, guidance_scale, guidance_interval, solver)
        num_samples = check_count("num_samples", num_samples)
        batch_size = check_count("batch_size", batch_size)
        seeds, generator = picture_noise(seed, generator, noise_source, len(texts), num_samples)
        inputs = self._inpainting(inpaint, len(texts) * num_samples)
        execution = {"backend": backend, "graph": graph, "noise_source": noise_source}
        sampler = self._sampler_for((solver, steps, schedule, eta, 1.0), **execution)
        texts = [text for text in texts for _ in range(num_samples)]
        drawn = Drawing(texts, seeds, spec, others, inputs, batch_size, cond_fn, progress, callback, generator)
        return self._draw(sampler, drawn)

    def check(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        steps: int | str = 50,
        solver: str = "ddpm",
        schedule: str | None = None,
        guidance: str | Guidance = "cfg",
        guidance_interval: Interval | None = None,
        eta: float | None = None,
        inpaint: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Raise what `sample` would raise for these arguments, without drawing."""
        _, _, spec = self._texts(prompts, negative_prompt, guidance, guidance_scale, guidance_interval, solver)
        self._check_table(self._table(solver, steps, schedule, eta), spec, self._inpainting(inpaint, 1))

    def _texts(
        self,
        prompts: Any,
        negative: str | None,
        guidance: str | Guidance,
        scale: float | None,
        interval: Interval | None,
        solver: str,
    ) -> tuple[list[str], dict[str, list[int]], Guidance]:
        """The prompts, the token ids of the other branches, and the guidance."""
        texts = self._prompts(prompts)
        away = self._tokens("negative_prompt", negative) if negative else []
        if isinstance(guidance, Guidance):
            for name, value in (("guidance_scale", scale), ("guidance_interval", interval)):
                if value is not None:
                    raise ValueError(f"{name}: got {value!r} with a {type(guidance).__name__}, expected None")
            spec = guidance
        else:
            scale = default_scale(solver) if scale is None else check_finite("guidance_scale", scale)
            spec = guidance_by_name(guidance, scale, interval)
        others = [branch for branch in spec.branches if branch != "cond"]
        if unknown := set(others) - {"uncond", "negative"}:
            got = ", ".join(sorted(unknown))
            raise ValueError(f"guidance: got the branches {got}, expected some of cond, uncond, negative")
        if "negative" in others and not away:
            raise ValueError(f"negative_prompt: got {negative!r} with {type(spec).__name__}, expected words")
        if not others and away:
            raise ValueError(f"negative_prompt: got {negative!r} with {type(spec).__name__}, expected None")
        # Where the negative prompt has a branch of its own, the unconditional one reads nothing.
        own = "negative" if "negative" in others else "uncond"
        return texts, {branch: away if branch == own else [] for branch in others}, spec


def default_scale(solver: str) -> float:
    """The guidance scale of a named solver unless one is given: that of CFG++ runs from 0 to 1."""
    return 0.6 if str(solver).endswith("cfg_pp") else 3.0
