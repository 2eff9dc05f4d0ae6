"""From a checkpoint and prompts to pictures."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from . import solvers
from .guidance import CFG
from .models.checkpoint import CheckpointMeta, load_checkpoint
from .models.text2im import Text2ImUNet
from .models.tokenizer import Tokenizer
from .sampler import Sampler, Step
from .schedule import Schedule

__all__ = ["SOLVERS", "TextToImage"]

SOLVERS = ("ddpm", "ddim")

_EMBEDDED = "shapes.safetensors"


class TextToImage:
    """A text-conditional model with its tokenizer and noise schedule, ready to sample.

    Args:
        model: the network, with learned variances (twice the image's channels come out).
        tokenizer: its tokenizer.
        meta: schedule and image size, as in a checkpoint.

    Attributes:
        model: as given.
        tokenizer: as given.
        meta: as given.
        schedule: the noise schedule the model was trained with.

    Raises:
        ValueError: a network without learned variances, or one that needs pictures too, as the upsampler does.

    Example:
        >>> pipeline = TextToImage.load()
        >>> images = pipeline.sample("a red circle above a blue square", num_samples=4, seed=0)
        >>> images.shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(self, model: Text2ImUNet, tokenizer: Tokenizer, meta: CheckpointMeta) -> None:
        if meta.network != Text2ImUNet.__name__:
            raise ValueError(f"model: got a {meta.network}, expected a {Text2ImUNet.__name__}, which needs text alone")
        if model.out_channels != 2 * model.in_channels:
            raise ValueError(
                f"model: got {model.out_channels} output channels, "
                f"expected {2 * model.in_channels}: the noise and its learned variance"
            )
        self.model, self.tokenizer, self.meta = model, tokenizer, meta
        self.schedule = Schedule.named(meta.schedule, meta.num_timesteps)
        self._sampler: Sampler | None = None
        self._options: tuple[Any, ...] = ()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> TextToImage:
        """Read a checkpoint.

        Args:
            path: a file that `fastcfg train` wrote; None is the model that comes with the package.
            device: where to run it.
            dtype: dtype of weights and features; None keeps float32. The state and the solver's arithmetic are float32
                in any case.

        Raises:
            ValueError: not such a file, a device that is not there, or a dtype that is not floating.
            OSError: the file cannot be read.
        """
        place = _checked_device(device)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, expected a floating dtype")
        with ExitStack() as stack:
            if path is None:
                from importlib.resources import as_file, files

                path = stack.enter_context(as_file(files("fastcfg") / "checkpoints" / _EMBEDDED))
            model, tokenizer, meta = load_checkpoint(path)
        # Channels-last convolutions: 10 % less time per picture on a CPU (AVX2, embedded model, batches of 8 to 128).
        model = model.to(place, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(model, tokenizer, meta)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        negative: str | None = None,
        guidance_scale: float = 3.0,
        steps: int = 50,
        solver: str = "ddpm",
        eta: float = 0.0,
        num_samples: int = 1,
        seed: int | Sequence[int] = 0,
        backend: str = "auto",
        graph: str | bool = "auto",
        noise: str = "philox",
        batch_size: int = 64,
        progress: bool | str = False,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Draw pictures.

        Args:
            prompts: a prompt, or several.
            negative: what to guide away from, instead of from the empty prompt.
            guidance_scale: s of uncond + s (cond - uncond): 0 ignores the prompt, 1 samples the conditional model.
            steps: timesteps per picture, spread evenly over the schedule.
            solver: "ddpm" (with the learned variances) or "ddim".
            eta: the noise of "ddim": 0 for none, 1 for as much as DDPM's.
            num_samples: pictures per prompt.
            seed: sample i of every prompt has the seed `seed + i`; or one seed per picture.
            backend: as `Sampler`.
            graph: as `Sampler`.
            noise: as `Sampler`. With "philox" a picture depends on its prompt and seed alone, but for the last bits:
                torch's convolutions and matrix products may round otherwise in another batch size.
            batch_size: pictures computed at once.
            progress: show a progress bar; a string is its label.
            callback: called with the `Step` of every row of every batch.

        Returns:
            float32 [N, 3, H, W] in [-1, 1], the samples of the first prompt first.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a prompt that is empty, longer than the model's context or of words it does not know; steps
                outside 1 ... T; an unknown solver; eta with "ddpm"; a scale that is not finite; counts below 1; or what
                `Sampler` raises.
        """
        if not isinstance(prompts, str | Sequence):
            raise TypeError(f"prompts: got {type(prompts).__name__}, expected a string or several")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise ValueError("prompts: got none, expected at least one")
        tokens = [self._tokens("prompt", text) for text in texts]
        unconditional = self._tokens("negative", negative) if negative else []
        self._check(guidance_scale, steps, solver, eta, num_samples, batch_size)
        seeds = _seeds(seed, len(texts), num_samples)
        sampler = self._sampler_for(steps, solver, eta, backend, graph, noise)
        sampler.guidance = CFG(guidance_scale)

        encoded = [self._encode(ids) for ids in tokens]
        cond = {name: torch.cat([text[name] for text in encoded]) for name in encoded[0]}
        owner = torch.arange(len(texts), device=self.device).repeat_interleave(num_samples)
        shape = (self.model.in_channels, self.meta.image_size, self.meta.image_size)
        batches = list(zip(owner.split(batch_size), _split(seeds, batch_size), strict=True))
        images = []
        with _progress_bar(len(batches) * steps, progress) as bar:

            def after_row(step: Step) -> None:
                bar.update()
                if callback is not None:
                    callback(step)

            for rows, batch_seeds in batches:
                images.append(
                    sampler.sample(
                        (len(rows), *shape),
                        cond={name: values[rows] for name, values in cond.items()},
                        uncond=self._encode(unconditional),
                        # torch's generator takes one seed for the whole batch.
                        seed=batch_seeds if noise == "philox" else batch_seeds[0],
                        callback=after_row if callback is not None or progress else None,
                    )
                )
        return torch.cat(images).clamp_(-1, 1)

    def report(self) -> dict[str, Any]:
        """How the last call was executed: see `Sampler.report`."""
        return {} if self._sampler is None else self._sampler.report()

    def _check(
        self, guidance_scale: float, steps: int, solver: str, eta: float, num_samples: int, batch_size: int
    ) -> None:
        if solver not in SOLVERS:
            raise ValueError(f"solver: got {solver!r}, expected one of {', '.join(SOLVERS)}")
        if solver == "ddpm" and eta:
            raise ValueError(f"eta: got {eta!r} with solver 'ddpm', expected 0 (it is the noise of 'ddim')")
        if not isinstance(guidance_scale, int | float) or not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale: got {guidance_scale!r}, expected a finite number")
        _check_count("steps", steps, self.schedule.num_timesteps)
        _check_count("num_samples", num_samples)
        _check_count("batch_size", batch_size)

    def _tokens(self, name: str, text: str) -> list[int]:
        """Ids of a text that the model can read."""
        if not isinstance(text, str):
            raise TypeError(f"{name}: got {type(text).__name__}, expected a string")
        if not text.strip():
            raise ValueError(f"{name}: got {text!r}, expected words")
        unknown = self.tokenizer.unknown_words(text)
        if unknown:
            raise ValueError(f"{name}: got {_unknown_words(unknown, self._vocabulary())}")
        ids = self.tokenizer.encode(text)
        if len(ids) > self.model.text_ctx:
            raise ValueError(f"{name}: got {len(ids)} tokens in {text!r}, expected at most {self.model.text_ctx}")
        return ids

    def _vocabulary(self) -> list[str]:
        words = json.loads(self.tokenizer.to_json())["model"]["vocab"]
        return [word for word in words if not word.startswith("<|")]

    @torch.no_grad()
    def _encode(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Encode one text. Never several at once: matrix products of another size may round otherwise."""
        tokens, mask = self.tokenizer.padded_tokens_and_mask(ids, self.model.text_ctx)
        return self.model.get_text_emb(
            torch.tensor([tokens], device=self.device), torch.tensor([mask], device=self.device)
        )

    def _sampler_for(self, steps: int, solver: str, eta: float, backend: str, graph: str | bool, noise: str) -> Sampler:
        """The sampler of the last call if its options are the same."""
        options = (steps, solver, eta, backend, graph, noise, self.device)
        if self._sampler is None or options != self._options:
            schedule = self.schedule.respace(steps)
            table = solvers.ddpm(schedule) if solver == "ddpm" else solvers.ddim(schedule, eta=eta)
            self._sampler = Sampler(
                self.model,
                table,
                guidance=CFG(),
                clip=1.0,
                noise=noise,
                backend=backend,
                graph=graph,
                memory_format=torch.channels_last,
            )
            self._options = options
        return self._sampler


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected one like 'cpu' or 'cuda'") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {str(place)!r}, expected one of the {torch.cuda.device_count()} GPUs torch sees")
    return place


def _check_count(name: str, value: int, most: int | None = None) -> None:
    if not isinstance(value, int) or value < 1 or (most is not None and value > most):
        raise ValueError(f"{name}: got {value!r}, expected {'at least 1' if most is None else f'1 to {most}'}")


def _seeds(seed: int | Sequence[int], num_prompts: int, num_samples: int) -> list[int]:
    """One seed per picture."""
    if isinstance(seed, int):
        return [seed + i for i in range(num_samples)] * num_prompts
    if not isinstance(seed, Sequence) or not all(isinstance(value, int) for value in seed):
        raise TypeError(f"seed: got {seed!r}, expected an integer or a sequence of integers")
    seeds = list(seed)
    if len(seeds) != num_prompts * num_samples:
        raise ValueError(f"seed: got {len(seeds)} seeds, expected one per picture ({num_prompts * num_samples})")
    return seeds


def _split(values: list[int], size: int) -> list[list[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _unknown_words(unknown: list[str], vocabulary: list[str]) -> str:
    """What is wrong with words that are not in the vocabulary, and what may have been meant."""
    described = []
    for word in unknown:
        close = difflib.get_close_matches(word, vocabulary)
        described.append(f"{word!r}" + (f" (did you mean {' or '.join(close)}?)" if close else ""))
    return f"words the model does not know: {', '.join(described)}; expected some of {', '.join(vocabulary)}"


def _progress_bar(total: int, progress: bool | str) -> Any:
    from tqdm import tqdm

    label = progress if isinstance(progress, str) else None
    return tqdm(total=total, desc=label, unit="step", disable=progress is False)
