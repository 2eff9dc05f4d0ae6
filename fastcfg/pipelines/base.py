"""What GLIDE's two stages share: a network with its tokenizer and schedule, and pictures drawn in batches."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .. import solvers
from ..engine.sampler import Sampler, Step
from ..guidance import Guidance
from ..models.checkpoint import CheckpointMeta
from ..models.image_conditioned import InpaintText2ImUNet, SuperResInpaintText2ImUnet
from ..models.loading import load_network
from ..models.text2im import Text2ImUNet
from ..models.tokenizer import Tokenizer
from ..schedule import Schedule
from ..table import StepTable
from ..utils.progress import progress_bar
from .inpainting import KnownPixels, checked_inpainting

__all__ = ["SOLVERS", "Stage"]

SOLVERS = ("ddpm", "ddim")

_Self = TypeVar("_Self", bound="Stage")


class Stage:
    """A text-conditional network with its tokenizer and noise schedule, ready to sample: the base of both stages.

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
        ValueError: a network of another stage, without text or without learned variances.
    """

    _NETWORKS: ClassVar[tuple[str, ...]]  # the classes that a stage runs
    _PURPOSE: ClassVar[str]

    def __init__(self, model: Text2ImUNet, tokenizer: Tokenizer, meta: CheckpointMeta) -> None:
        if meta.network not in self._NETWORKS:
            expected = f"{' or '.join(self._NETWORKS)}, to {self._PURPOSE}"
            raise ValueError(f"model: got a {meta.network}, expected a {expected}")
        if not model.xf_width:
            raise ValueError("model: got a network without text (xf_width = 0), expected one with text")
        self._channels = int(meta.model["in_channels"])
        if model.out_channels != 2 * self._channels:
            raise ValueError(
                f"model: got {model.out_channels} output channels, "
                f"expected {2 * self._channels}: the noise and its learned variance"
            )
        self.model, self.tokenizer, self.meta = model, tokenizer, meta
        self.schedule = Schedule.named(meta.schedule, meta.num_timesteps)
        self._sampler: Sampler | None = None
        self._options: tuple[Any, ...] = ()
        self._known: KnownPixels | None = None

    @classmethod
    def _load(
        cls: type[_Self],
        path: str | os.PathLike[str],
        device: torch.device | str,
        dtype: torch.dtype | None,
        tokenizer: Tokenizer | str | os.PathLike[str] | None,
        options: Mapping[str, Any] | None,
    ) -> _Self:
        place = _checked_device(device)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, expected a floating dtype")
        stage = cls(*load_network(path, tokenizer, options))
        # Channels-last convolutions: 10 % less time per picture on a CPU (AVX2, embedded model, batches of 8 to 128).
        stage.model.to(place, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return stage

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def inpaints(self) -> bool:
        """Whether the network sees the known part of a picture."""
        return isinstance(self.model, InpaintText2ImUNet | SuperResInpaintText2ImUnet)

    def report(self) -> dict[str, Any]:
        """How the last call was executed: see `Sampler.report`."""
        return {} if self._sampler is None else self._sampler.report()

    def _table(self, steps: int | str, solver: str, eta: float, temperature: float = 1.0) -> StepTable:
        """The solver's table for as many steps, or for those of a respacing, and its factor of the starting noise."""
        if solver not in SOLVERS:
            raise ValueError(f"solver: got {solver!r}, expected one of {', '.join(SOLVERS)}")
        if solver == "ddpm" and eta:
            raise ValueError(f"eta: got {eta!r} with solver 'ddpm', expected 0 (it is the noise of 'ddim')")
        if not isinstance(steps, str):
            check_count("steps", steps, self.schedule.num_timesteps)
        try:
            schedule = self.schedule.respace(steps)
        except ValueError as error:
            raise ValueError(f"steps: got {steps!r}, expected a number or another respacing ({error})") from error
        table = solvers.ddpm(schedule) if solver == "ddpm" else solvers.ddim(schedule, eta=eta)
        return replace(table, initial_scale=temperature)

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

    def _inpainting(self, inpaint: tuple[Tensor, Tensor] | None, batch: int) -> dict[str, Tensor]:
        """What the network sees of the known pixels of N pictures."""
        if inpaint is None:
            return {}
        if not self.inpaints:
            raise ValueError(f"inpaint: got pictures for a {self.meta.network}, expected None: it cannot see them")
        image, mask = checked_inpainting(inpaint, self._channels, self.meta.image_size, batch, self.device)
        return {"inpaint_image": image * mask, "inpaint_mask": mask}

    def _sampler_for(
        self, steps: int | str, solver: str, eta: float, temperature: float, backend: str, graph: str | bool, noise: str
    ) -> Sampler:
        """The sampler of the last call if its options are the same."""
        options = (steps, solver, eta, temperature, backend, graph, noise, self.device, self.model.dtype)
        if self._sampler is None or options != self._options:
            self._sampler = Sampler(
                self.model,
                self._table(steps, solver, eta, temperature),
                clip=1.0,
                noise=noise,
                backend=backend,
                graph=graph,
                memory_format=torch.channels_last,
            )
            self._options = options
        return self._sampler

    def _draw(
        self,
        sampler: Sampler,
        guidance: Guidance,
        texts: Sequence[Sequence[int]],
        owners: Sequence[int],
        unconditional: Sequence[int] | None,
        pictures: Mapping[str, Tensor],
        seeds: list[int],
        cond_fn: Callable[..., Tensor] | None,
        batch_size: int,
        progress: bool | str,
        callback: Callable[[Step], None] | None,
    ) -> Tensor:
        """Run a sampler over N pictures.

        Args:
            sampler: from `_sampler_for`.
            guidance: with the branches cond and, if `unconditional` is given, uncond.
            texts: ids of P texts.
            owners: N numbers of the picture's texts.
            unconditional: ids of the text of the branch uncond; None for no such branch.
            pictures: what else the network is given, [N or 1, ...], in all branches.
            seeds: N seeds.
            cond_fn: as `Sampler`.
            batch_size: pictures computed at once.
            progress: show a progress bar; a string is its label.
            callback: called with the `Step` of every row of every batch.

        Returns:
            float32 [N, C, H, W] in [-1, 1].
        """
        encoded = [self._encode(ids) for ids in texts]
        cond = {name: torch.cat([text[name] for text in encoded]) for name in encoded[0]}
        uncond = None if unconditional is None else self._encode(unconditional)
        sampler.guidance, sampler.cond_fn = guidance, cond_fn
        sampler.denoised_fn = self._denoised_fn(min(batch_size, len(seeds)), pictures)
        size, noise = self.meta.image_size, sampler.noise
        starts = range(0, len(seeds), batch_size)
        images = []
        with progress_bar(progress, total=len(starts) * sampler.table.num_rows) as bar:
            for start in starts:
                part = slice(start, start + batch_size)
                rows = torch.tensor(owners[part], device=self.device)
                shown = {name: value if len(value) == 1 else value[part] for name, value in pictures.items()}
                if sampler.denoised_fn is not None:
                    self._known.load(shown["inpaint_image"], shown["inpaint_mask"], len(rows))  # type: ignore[union-attr]
                images.append(
                    sampler.sample(
                        (len(rows), self._channels, size, size),
                        cond={**{name: values[rows] for name, values in cond.items()}, **shown},
                        uncond=None if uncond is None else {**uncond, **shown},
                        # torch's generator takes one seed for the whole batch.
                        seed=seeds[part] if noise == "philox" else seeds[start],
                        progress=bar if progress else False,
                        callback=callback,
                    )
                )
        return torch.cat(images).clamp_(-1, 1)

    def _denoised_fn(self, batch: int, pictures: Mapping[str, Tensor]) -> KnownPixels | None:
        """What puts known pixels back, if there are some: the function of the last call if its buffers suffice."""
        if "inpaint_mask" not in pictures:
            return None
        if self._known is None or self._known.batch < batch or self._known.device != self.device:
            self._known = KnownPixels(batch, self._channels, self.meta.image_size, self.device)
        return self._known


def check_count(name: str, value: int, most: int | None = None) -> None:
    """Raise ValueError unless a value is an integer from 1 to `most`."""
    if not isinstance(value, int) or value < 1 or (most is not None and value > most):
        raise ValueError(f"{name}: got {value!r}, expected {'at least 1' if most is None else f'1 to {most}'}")


def check_finite(name: str, value: float) -> None:
    """Raise ValueError unless a value is a finite number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, expected a finite number")


def picture_seeds(seed: int | Sequence[int], num_prompts: int, num_samples: int) -> list[int]:
    """One seed per picture: `seed + i` for sample i of every prompt, or as given.

    Raises:
        TypeError: not integers.
        ValueError: another number of seeds than of pictures.
    """
    if isinstance(seed, int):
        return [seed + i for i in range(num_samples)] * num_prompts
    if not isinstance(seed, Sequence) or not all(isinstance(value, int) for value in seed):
        raise TypeError(f"seed: got {seed!r}, expected an integer or a sequence of integers")
    seeds = list(seed)
    if len(seeds) != num_prompts * num_samples:
        raise ValueError(f"seed: got {len(seeds)} seeds, expected one per picture ({num_prompts * num_samples})")
    return seeds


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected one like 'cpu' or 'cuda'") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {str(place)!r}, expected one of the {torch.cuda.device_count()} GPUs torch sees")
    return place


def _unknown_words(unknown: list[str], vocabulary: list[str]) -> str:
    """What is wrong with words that are not in the vocabulary, and what may have been meant."""
    described = []
    for word in unknown:
        close = difflib.get_close_matches(word, vocabulary)
        described.append(f"{word!r}" + (f" (did you mean {' or '.join(close)}?)" if close else ""))
    return f"words the model does not know: {', '.join(described)}; expected some of {', '.join(vocabulary)}"
